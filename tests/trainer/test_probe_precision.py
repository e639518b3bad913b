"""Derivatives with products in low precision, emulated: what moves, by how much, and what must not move at all."""

import pytest
import torch
from low_precision import TF32_BITS, RoundedProducts
from run_rows import without_clocks
from test_entropy_probe import PROBE, flat, problems  # noqa: F401
from test_next_rollouts import StopAfter

from trl_entropy.engine import tf32
from trl_entropy.probes import EntropyProbe
from trl_entropy.runs.directory import RunDirectory

SETTINGS = PROBE | {"entropy_probe_num_completions": 16, "entropy_attribution": "sequence", "max_steps": 2}
MEASURED = ["probe_batch", "delta_measured", "delta_measured_stderr", "half_a_measured", "half_b_measured"]
FEW_BITS = 3  # with which the first-order change of this run moves by 0.7 % of its standard error alone, by chance


@pytest.fixture
def emulate(monkeypatch):
    """emulate(bits): a device whose units multiply with so many bits of mantissa, where they are asked to."""

    def emulated(bits: int) -> None:
        monkeypatch.setattr(tf32, "is_available", lambda device: True)
        monkeypatch.setattr(tf32, "products", lambda: RoundedProducts(bits))

    return emulated


@pytest.fixture
def run(make_trainer, problems):  # noqa: F811
    """run(**settings): the trainer after training, its rows, and what its probe chose."""

    def train(resume_from_checkpoint=None, **settings):
        trainer = make_trainer(dataset=problems, **SETTINGS | settings)
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        (probe,) = (one for one in trainer.callback_handler.callbacks if isinstance(one, EntropyProbe))
        return trainer, without_clocks(RunDirectory(trainer.args.output_dir).metrics()), probe.precision.chosen

    return train


@pytest.mark.slow
def test_auto_takes_tf32_and_nothing_coarser(run, emulate, caplog):
    caplog.set_level("INFO")
    plain, exact, chosen = run()
    assert chosen is None and not any("entropy/precision_noise" in row for row in exact)
    emulate(TF32_BITS)
    trained, low, chosen = run()
    assert chosen == "tf32" and caplog.text.count("derivatives are computed in TF32") == 1
    noise = low[0].pop("entropy/precision_noise")
    assert 0 < noise < 0.1 and "entropy/precision_noise" not in low[1]
    for own, other in zip(low, exact, strict=True):
        for name in ("linear", "trapezoid"):
            key = f"entropy/delta_{name}"
            assert 0 < abs(own[key] - other[key]) < 0.1 * other[f"{key}_stderr"]
        for name in ("momentum", "gradient")[own["step"] == 1 :]:
            assert own[f"entropy/delta_{name}"] != other[f"entropy/delta_{name}"]
        assert abs(own["entropy/attribution_rounding"]) < 1e-2
        for name in MEASURED:  # scored by a pass of its own, with torch's own kernel of attention
            assert own[f"entropy/{name}"] == pytest.approx(other[f"entropy/{name}"], rel=1e-4, abs=1e-6)
    assert torch.equal(flat(plain.model), flat(trained.model))
    emulate(FEW_BITS)
    _, refused, chosen = run()
    print(noise, refused[0]["entropy/precision_noise"])
    assert chosen == "float32" and refused[0].pop("entropy/precision_noise") > 0.1
    assert refused == exact


@pytest.mark.slow
@pytest.mark.parametrize("bits", [TF32_BITS, FEW_BITS])
def test_a_resumed_run_is_the_unbroken_one(run, emulate, tmp_path, bits):
    emulate(bits)
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "entropy_attribution": "token"}
    _, unbroken, chosen = run(**saving, output_dir=str(tmp_path / "unbroken"))
    assert chosen == ("tf32" if bits == TF32_BITS else "float32")
    run(**saving, output_dir=str(tmp_path / "resumed"), callbacks=[StopAfter(2)])
    checkpoint = str(tmp_path / "resumed" / "checkpoint-2")
    _, resumed, again = run(checkpoint, **saving, output_dir=str(tmp_path / "resumed"))
    assert again == chosen and resumed == unbroken
