"""The entropy probe's numbers on two ranks are those of one process: DDP, ZeRO-2, ZeRO-3, FSDP2, full and LoRA."""

import json
import time
from pathlib import Path

import pytest
from comparing import CLOCKS, largest_deviation, rounding_of
from launching import launch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trl_entropy.estimators.entropy_change.step_change import point_terms, step_changes
from trl_entropy.gradients.scores import score
from trl_entropy.rollouts.completions import Completions
from trl_entropy.runs.directory import RunDirectory

pytestmark = pytest.mark.timeout(600)  # a launch with all runs takes minutes

WORKER = Path(__file__).with_name("probe_worker.py")
SECOND_ORDER = {"entropy_second_order": True, "entropy_placebo": True}
GRADIENTS = {
    "noise_scale_probe": True,
    "noise_scale_within_prompt": True,
    "fisher_probe": True,
    "fisher_num_sequences": 16,
}
SPARSE = {"resample_uninformative_groups": True, "equal_often": True, "num_prompts_per_step": 6,
          "per_device_train_batch_size": 12}  # fmt: skip
BUDGET = {"entropy_control": "hold", "entropy_control_per_step": 0.02, "entropy_control_num_completions": 8}
# Nothing is drawn, so that nothing reads how many completions.
OWN = {"entropy_probe_completions": "rollouts", "entropy_probe_num_completions": None}
NEXT = {"entropy_probe_completions": "next_rollouts", "entropy_probe_num_completions": None}
RUNS = [
    SECOND_ORDER | GRADIENTS | {"name": "full", "entropy_attribution": "token"},
    SECOND_ORDER
    | GRADIENTS
    | {"name": "lora", "lora": True, "entropy_attribution": "sequence", "gradient_accumulation_steps": 1},
    # The step after it: what is measured one step late, on the engine's own share of theta and of the first moment.
    NEXT | {"name": "next step", "entropy_attribution": "token"},
    # Divided by the tokens of all processes, with coefficients that differ between the tokens of a completion.
    OWN
    | {
        "name": "rollouts",
        "loss_type": "dapo",
        "beta": 0.1,
        "noise_scale_probe": True,
        "fisher_probe": True,
        "fisher_num_sequences": 16,
    },
    BUDGET | {"name": "budget", "entropy_attribution": "sequence"},
    BUDGET
    | {
        "name": "budget of own completions",
        "entropy_control_completions": "rollouts",
        "entropy_control_num_completions": 128,
        "lora": True,
    },
    {
        "name": "clip_cov",
        "token_control": "clip_cov",
        "token_control_bounds": [0.3, 0.9],
        "token_control_quantiles": True,
        "token_control_fraction": 0.2,
    },
    # One group each, so that one process has the same micro-batches.
    {
        "name": "micro-batches",
        "lora": True,
        "noise_scale_probe": True,
        "noise_scale_from": "micro_batches",
        "per_device_train_batch_size": 4,
    },
    SPARSE
    | {"name": "resampling", "noise_scale_probe": True, "noise_scale_within_prompt": True, "max_resample_rounds": 1},
    SPARSE | OWN | {"name": "resampling, rollouts", "curriculum": "pass_rate"},
]
FIRST_RUNS = tuple(RUNS[:3])
EXCHANGE = (
    {"name": "exchange", "token_control": "exchange", "token_control_floor": 100.0, "token_control_fraction": 0.2},
)
# bf16: gradients are rounded by their place in the batch, so two ranks make another update than one process. At the
# rate of real runs, 1e-6, the bf16 model itself hardly moves.
BF16 = [
    {"name": f"bf16-{rate}", "bf16": True, "keeps_parameters": True, "learning_rate": rate} for rate in (1e-4, 1e-6)
]
MANY_RANKS = ["ddp-cpu", "zero2-cpu", "zero3-cpu", "fsdp2-cpu"]
# The same training without a probe, and its number of completions as by default: nothing reads it.
NO_PROBE = {
    "entropy_probe": False,
    "entropy_probe_completions": "next_rollouts",
    "entropy_probe_num_completions": None,
}
OFF = [
    {"name": "full-off", **NO_PROBE},
    {"name": "lora-off", "lora": True, "gradient_accumulation_steps": 1, **NO_PROBE},
]


@pytest.fixture(scope="session")
def rows_of(tmp_path_factory, model_path):
    """rows_of(engine): metrics of every run under that engine, or of `runs`; launched once for each."""
    done: dict[tuple, dict[str, list[dict]]] = {}

    def run(engine: str, runs: tuple[dict, ...] = (*RUNS, *BF16, *OFF)) -> dict[str, list[dict]]:
        key = (engine, len(runs))
        if key not in done:
            done[key] = {}  # if the launch fails, the other tests of its runs fail at once
            directory = tmp_path_factory.mktemp(engine)
            settings = [json.dumps(run | {"model_path": model_path}) for run in runs]
            result = launch(engine, WORKER, str(directory), *settings, scratch=directory / "ops", timeout=550)
            assert result.returncode == 0, result.stdout[-6000:]
            done[key] = {run["name"]: RunDirectory(directory / run["name"]).metrics() for run in runs}
            done[key]["directory"] = directory
            environment = json.loads((directory / runs[0]["name"] / "environment.json").read_text())
            assert environment["num_processes"] == (1 if engine == "cpu" else 2)
        return done[key]

    return run


@pytest.mark.parametrize("run", [run["name"] for run in FIRST_RUNS])
def test_numbers_are_those_of_one_process_where_everything_is_split(rows_of, run):
    """The short command's part of the next test."""
    check_numbers(run, rows_of("cpu", FIRST_RUNS)[run], rows_of("zero3-cpu", FIRST_RUNS)[run])


@pytest.mark.slow
def test_the_dearest_tokens_of_all_ranks_are_left_out(rows_of):
    """DDP; engines that spread the parameters refuse it."""
    (name,) = (run["name"] for run in EXCHANGE)
    of_one, of_two = rows_of("cpu", EXCHANGE)[name], rows_of("ddp-cpu", EXCHANGE)[name]
    check_numbers(name, of_one, of_two)
    assert of_two[-1]["token_control/num_tokens"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("run", [run["name"] for run in RUNS])
@pytest.mark.parametrize("engine", MANY_RANKS)
def test_numbers_are_those_of_one_process(rows_of, engine, run):
    check_numbers(run, rows_of("cpu")[run], rows_of(engine)[run])


def check_numbers(run: str, expected: list[dict], got: list[dict]) -> None:
    assert len(expected) == len(got) == 3
    largest_deviation(expected, got)
    for one in expected:
        change = "entropy/delta_in_sample" if "rollouts" in run else "entropy/delta_measured"
        assert one[f"{change}_stderr"] > 100 * rounding_of(one)
    if "resampling" in run:
        assert sum(row["resampling/num_rounds"] for row in expected) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["cpu", *MANY_RANKS])
@pytest.mark.parametrize("rate", [1e-4, 1e-6])
def test_bf16_numbers_are_those_of_the_float32_parameters(rows_of, model_path, engine, rate):
    """One process scores the probe's files with theta before and after, as that engine's float32 values have it."""
    rows, run = rows_of(engine)[f"bf16-{rate}"], rows_of(engine)["directory"] / f"bf16-{rate}"
    model = AutoModelForCausalLM.from_pretrained(model_path)
    for step, row in enumerate(rows, start=1):
        file = load_file(run / "probes" / "entropy" / f"step_{step:06d}.safetensors")
        names = ("input_ids", "attention_mask", "completion_mask", "prompt_index")
        given = {name: file[name].long() for name in names}  # stored as int32 and bytes
        completions = Completions(**given, loss_mask=given["completion_mask"])
        parameters = load_file(run / f"parameters_{step}.safetensors")
        before, after = (
            {name: parameters[f"{when}.{name}"] for name, _ in model.named_parameters()}
            for when in ("before", "after")
        )
        update = {name: after[name] - before[name] for name in before}
        scores = [score(model, completions, 1.0, 64, params, update, order=1) for params in (before, after)]
        points = [point_terms(at.entropy, at.logps, scores[0].logps[0], completions.completion_mask) for at in scores]
        rounding = 3e-7 * row["entropy/probe_batch"]
        for name, change in step_changes(*points).items():
            estimate = change.estimate(completions.prompt_index)
            # A derivative is no difference of two entropies.
            tolerance = rounding if name == "measured" else 1e-3 * estimate.stderr
            assert row[f"entropy/delta_{name}"] == pytest.approx(estimate.value, rel=1e-4, abs=tolerance)
            assert row[f"entropy/delta_{name}_stderr"] == pytest.approx(estimate.stderr, rel=1e-3, abs=tolerance)
        assert row["entropy/delta_linear_stderr"] > 0
        assert rate < 1e-4 or row["entropy/delta_measured_stderr"] > 10 * rounding
    # The model that training runs rounds the step to bf16, and so changes otherwise.
    differences = [abs(row["entropy/delta_measured_model"] - row["entropy/delta_measured"]) for row in rows]
    assert max(differences) > (1e-5 if rate == 1e-4 else 1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["full", "lora"])
@pytest.mark.parametrize("engine", MANY_RANKS)
def test_probes_leave_training_bit_identical(rows_of, engine, run):
    """The third step's loss and gradient have everything in them that the first two did to the parameters."""
    probed, alone = rows_of(engine)[run], rows_of(engine)[f"{run}-off"]
    for row, expected in zip(probed, alone, strict=True):
        assert {"loss", "grad_norm", "entropy/policy"} <= expected.keys() < row.keys()
        assert all(row[key] == value for key, value in expected.items() if not key.startswith(CLOCKS))


@pytest.mark.slow
def test_the_launcher_ends_with_one_message(tmp_path, model_path):
    """`test_failing_ranks.py` has every event and engine; here the launcher takes part."""
    settings = json.dumps({"name": "failing", "fails_in": "on_after_update", "model_path": model_path})
    result = launch("ddp-cpu", WORKER, str(tmp_path), settings, scratch=tmp_path / "ops", timeout=60)
    assert result.returncode != 0
    assert "[rank1]: ValueError: injected on rank 1" in result.stdout, result.stdout[-6000:]
    # On a busy machine the launcher ends the other rank before it has written what it knows.
    told = "OtherRankFailed: rank 1 failed: ValueError: injected on rank 1" in result.stdout
    assert told or "closing signal SIGTERM" in result.stdout, result.stdout[-6000:]
    assert time.time() - float((tmp_path / "failing.failed.txt").read_text()) < 30
