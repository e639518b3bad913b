"""
The table of families in docs/families.md, from what the checks say of a tiny model of each:

    python tests/preflight/family_table.py > docs/families.md      (about three minutes)
"""

import sys

import torch

from trl_entropy.models.tiny import adapted, family_config, tiny_config, tiny_model
from trl_entropy.preflight.conformance import Setup, conformance

FAMILIES = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo", "olmo2"),
    *("granite", "cohere", "smollm3", "gpt2", "gpt_neox", "opt", "stablelm", "starcoder2", "falcon", "bloom", "glm4"),
    *("nanochat", "mamba", "falcon_h1", "mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "olmoe"),
    *("lfm2", "jamba", "qwen3_next", "ernie4_5_moe", "glm4_moe"),
)
# Every value of tuning, checkpointing, attention and dtype is in one of these, and most pairs.
CELLS = (
    ("full", Setup(False, "sdpa", torch.float32)),
    ("lora", Setup(True, "eager", torch.bfloat16)),
    ("full", Setup(True, "sdpa", torch.bfloat16)),
)
COLUMNS = ("scores", "forward", "rows", "attribution", "sum of rows")
HEAD = """# Families of models

What `trl-entropy check-model` says of a tiny model of each family, after two optimizer steps: *scores* against a
plain forward without padding, derivatives in *forward* mode against reverse mode, each sequence's gradient (*rows*)
against a backward pass of its own, the *attribution* by sequence against the whole, and the *sum of rows* in training
against the gradient. `ok` is a relative error below 1e-3 (5e-2 for sums that training makes in bfloat16); `refused`
means that a probe that needs it says so at start. Each family is tried with all parameters in float32, `sdpa` (where
the family has it), without gradient checkpointing; with LoRA in bfloat16, `eager`, with it; and with all parameters
in bfloat16, `sdpa`, with it. Written by `python tests/preflight/family_table.py`; a test compares each row with what
it finds (2 cores, no GPU, shared, 2026-12-01, seed 0).
"""


def family_row(family: str) -> str:
    """The family's row of the table."""
    states: dict[str, dict[str, str]] = {column: {} for column in COLUMNS}
    for tuning, setup in CELLS:
        torch.manual_seed(0)
        model = tiny_model(tiny_config(family_config(family)), attn_implementation=setup.attention, dtype=setup.dtype)
        for outcome in conformance(adapted(model, tuning), setup):
            column = next(one for one in COLUMNS if outcome.check.startswith(one[:4]))
            if outcome.state != "ok":
                print(family, tuning, setup, outcome, file=sys.stderr)
                states[column][outcome.state] = tuning
    cells = [", ".join(sorted(states[column])) or "ok" for column in COLUMNS]
    return f"| {family} | {' | '.join(cells)} |"


def main() -> None:
    print(HEAD)
    print(f"| family | {' | '.join(COLUMNS)} |\n|---{'|---' * len(COLUMNS)}|")
    for family in FAMILIES:
        print(family_row(family), flush=True)


if __name__ == "__main__":
    main()
