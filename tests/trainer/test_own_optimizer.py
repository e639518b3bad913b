"""The example of docs/optimizers.md: an optimizer of one's own is split once its rule is known, and refused before."""

import re
from pathlib import Path

import pytest
import torch

from trl_entropy.engine import step_rules
from trl_entropy.models.embedded import build_model

DOCUMENT = Path(__file__).parents[2] / "docs/optimizers.md"
PROBE = {"entropy_probe": True, "entropy_probe_completions": "held_out", "entropy_probe_num_completions": 4}


class Signless(torch.optim.Optimizer):
    """What the document's rule describes."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in (one for one in group["params"] if one.grad is not None):
                state = self.state[param]
                state["step"] = state.get("step", 0) + 1
                mean = state.setdefault("mean", torch.zeros_like(param))
                mean += (param.grad.abs() - mean) / state["step"]
                param.sub_((group["lr"] * param.grad / mean).where(mean != 0, 0.0))


def test_the_documents_rule_splits_its_steps(make_trainer, tokenizer, monkeypatch):
    monkeypatch.setattr(step_rules, "_RULES", dict(step_rules._RULES))
    model = build_model(tokenizer, seed=0)
    model.get_input_embeddings().padding_idx = None
    code = re.search(r"\n    import torch\n(.*?)\n    DrGRPOTrainer", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)

    def build():
        optimizers = Signless(model.parameters(), lr=1e-3), None
        return make_trainer(model=model, optimizers=optimizers, entropy_attribution="token", weight_decay=0.0, **PROBE)

    with pytest.raises(ValueError, match=r"entropy: the steps of .*Signless cannot be split .T5.: no rule is known"):
        build()
    exec("import torch\n" + re.sub(r"^    ", "", code[1], flags=re.MULTILINE), {"Signless": Signless})
    trainer = build()
    rows = []
    monkeypatch.setattr(trainer, "record_metrics", lambda metrics, step=None: rows.append(metrics))
    trainer.train()
    found = [row["entropy/attribution_rounding"] for row in rows if "entropy/attribution_rounding" in row]
    assert len(found) == 2 and max(map(abs, found)) < 1e-4
