"""Which precision is chosen, by what noise, and what is said of it."""

import math

import pytest
import torch
from accelerate import Accelerator
from low_precision import RoundedProducts, rounded

from trl_entropy.engine import tf32
from trl_entropy.estimators.statistics.estimate import Linearization
from trl_entropy.gradients.scores import score
from trl_entropy.models.embedded import build_model, build_tokenizer
from trl_entropy.probes import EntropyProbe
from trl_entropy.probes.precision import DerivativePrecision
from trl_entropy.rollouts.completions import Completions

CPU = torch.device("cpu")


def change(*without_each: float, value: float) -> Linearization:
    left_out = torch.tensor(without_each, dtype=torch.float64)
    return Linearization(torch.tensor(value, dtype=torch.float64), torch.zeros(4), lambda prompt_index: left_out)


@pytest.fixture
def with_tf32(monkeypatch):
    monkeypatch.setattr(tf32, "is_available", lambda device: True)


def decided(exact: Linearization, low: Linearization) -> tuple[float | None, str | None]:
    precision = DerivativePrecision("auto")
    noise = precision.decide(
        lambda of: exact if of.wanted == "float32" else low, torch.arange(4), Accelerator(cpu=True)
    )
    return noise, precision.chosen


EXACT = change(1.0, 2.0, 3.0, 4.0, value=2.5)  # a jackknife error of sqrt(3/4 * 5)


@pytest.mark.parametrize(
    ("low", "noise", "chosen"),
    [
        (change(1.1, 2.1, 3.1, 4.1, value=2.6), 0.1, "tf32"),  # all move alike, by 0.05 standard errors
        (change(1.3, 2.3, 3.3, 4.3, value=2.8), 0.3, "float32"),
        # The change itself does not move, but every prompt's part does: by chance they cancel
        (change(1.2, 1.8, 3.2, 3.8, value=2.5), math.sqrt(0.75 * 4 * 0.2**2), "float32"),
    ],
)
def test_noise_is_difference_and_scatter(low, noise, chosen, caplog):
    caplog.set_level("INFO")
    found, kept = decided(EXACT, low)
    assert found == pytest.approx(noise / math.sqrt(0.75 * 5)) and kept == chosen
    assert caplog.text.count("the noise of TF32 is") == 1


def test_without_a_standard_error_it_is_float32():
    noise, chosen = decided(change(2.5, value=2.5), change(2.5, value=2.5))
    assert math.isnan(noise) and chosen == "float32"


def test_a_step_of_no_size_decides_nothing():
    """As the first of a warm-up, whose learning rate is 0."""
    still = change(0.0, 0.0, 0.0, 0.0, value=0.0)
    assert decided(still, still) == (None, None)


def test_a_cpu_decides_nothing_and_says_so_once(caplog):
    assert not DerivativePrecision("auto").is_undecided(CPU)
    asked = DerivativePrecision("tf32")
    for _ in range(2):
        asked.warn_if_without_effect(CPU)
    assert caplog.text.count("has no effect on cpu") == 1
    with pytest.raises(ValueError, match="use one of auto, float32, tf32"):
        DerivativePrecision("bf16")


def test_what_was_chosen_stands_when_a_run_is_resumed(with_tf32):
    before, after = EntropyProbe(), EntropyProbe()
    assert before.precision.is_undecided(CPU)
    before.precision.chosen = "tf32"
    after.load_state_dict(before.state_dict())
    assert not after.precision.is_undecided(CPU) and after.attribution is None
    assert after.precision.products(CPU) is not None and after.precision._is_low(CPU)
    older = before.state_dict()
    del older["precision"]
    after.load_state_dict(older)
    assert after.precision.is_undecided(CPU)


def test_operands_are_rounded_to_nearest():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for bits in (4, 10):
        unit = 2.0 ** (values.abs().log2().floor() - bits)  # in the last place
        assert torch.equal(rounded(values, bits).double(), (values.double() / unit).round() * unit)
    assert torch.equal(rounded(torch.tensor([0.0, 1.0, -2.0]), 10), torch.tensor([0.0, 1.0, -2.0]))


def test_values_are_float32_and_slopes_are_rounded(with_tf32, monkeypatch):
    monkeypatch.setattr(tf32, "products", RoundedProducts)
    model, generator = build_model(build_tokenizer()), torch.Generator().manual_seed(0)
    ids, ones = torch.randint(2, 300, (3, 9), generator=generator), torch.ones(3, 9, dtype=torch.long)
    rows = Completions(ids, ones, ones[:, :5], torch.arange(3), loss_mask=ones[:, :5])
    params = {name: param.detach() for name, param in model.named_parameters()}
    direction = {name: 1e-3 * torch.randn(param.shape, generator=generator) for name, param in params.items()}
    given = model, rows, 1.0, 2, params
    low, exact = (DerivativePrecision(name).score(*given, direction, 1) for name in ("tf32", "float32"))
    values = score(*given)
    assert torch.equal(low.entropy[0], values.entropy[0]) and torch.equal(low.logps[0], values.logps[0])
    for own, other in ((low.entropy[1], exact.entropy[1]), (low.logps[1], exact.logps[1])):
        assert 0 < (own - other).norm() < 1e-2 * other.norm()
    second = [of.score(*given, direction, 2) for of in (DerivativePrecision("tf32"), DerivativePrecision())]
    assert all(torch.equal(*pair) for pair in zip(*(scores.entropy for scores in second), strict=True))
