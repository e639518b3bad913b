"""Try what the probes compute on a model: `trl-entropy check-model NAME_OR_PATH`."""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import TYPE_CHECKING, Any

from trl_entropy.runs.console import quiet_libraries
from trl_entropy.runs.file_errors import ending_in_one_line

if TYPE_CHECKING:
    from torch import nn

TUNINGS = ("full", "lora", "rslora", "dora", "ia3")


@ending_in_one_line()
def main(argv: list[str] | None = None) -> None:
    """Print a table of checks; exit with status 1 if one of them is wrong."""
    options = _options().parse_args(argv)
    quiet_libraries()
    is_wrong = False
    for setup in _setups(options):
        try:
            model = _model(options, setup)
        except (ValueError, OSError, ImportError) as error:
            sys.exit(f"Error: {options.model} cannot be built: {error}")
        from trl_entropy.preflight.conformance import conformance

        print(f"\n{options.model}, {options.peft}, {setup}")
        for outcome in conformance(model, setup):
            is_wrong |= outcome.state == "wrong"
            print(f"  {outcome}")
    print("\nok: right to its error; refused: a probe says so at start, with this reason; wrong: please report it.")
    sys.exit(1 if is_wrong else 0)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-entropy check-model",
        description="Make two optimizer steps with a model on random tokens, and compare what the probes compute: "
        "scores with a plain forward, derivatives in forward mode with those in reverse mode, the gradient of each "
        "sequence with a backward pass of its own, and their sums with the whole.",
    )
    add = parser.add_argument
    add("model", metavar="NAME_OR_PATH", help="a model's name or folder, or with --tiny also a family such as qwen3")
    add("--tiny", action="store_true", help="build a small model of the same architecture; no weights are loaded")
    add("--peft", choices=TUNINGS, default="full", help="what is trained: all, or an adapter of peft")
    add("--every", action="store_true", help="try bfloat16, eager attention and gradient checkpointing too")
    return parser


def _setups(options: argparse.Namespace) -> list[Any]:
    import torch

    from trl_entropy.preflight.conformance import Setup

    if not options.every:
        return [Setup()]
    kinds = itertools.product((False, True), ("sdpa", "eager"), (torch.float32, torch.bfloat16))
    return [Setup(*kind) for kind in kinds]


def _model(options: argparse.Namespace, setup: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    from trl_entropy.models.tiny import adapted, family_config, tiny_config, tiny_model
    from trl_entropy.preflight.shapes import read_config

    more = {"attn_implementation": setup.attention, "dtype": setup.dtype}
    if options.tiny:
        config = family_config(options.model) or read_config(options.model)[0]
        return adapted(tiny_model(tiny_config(config), **more), options.peft)
    return adapted(AutoModelForCausalLM.from_pretrained(options.model, **more), options.peft)


if __name__ == "__main__":
    main()
