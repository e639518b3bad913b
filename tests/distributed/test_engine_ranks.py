"""What the engine hands out under each kind of training, against one process and against the equations."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from engine_worker import (
    NUM_STEPS,
    PROBE_BATCH,
    Case,
    build_model,
    loss_of,
    probe_score,
    run_case,
    token_batches,
)
from launching import REPOSITORY, launch
from torch import nn

WORKER = Path(__file__).with_name("engine_worker.py")
CLIPPED = {"max_grad_norm": 0.05}  # far below the norms met
UNCLIPPED = {"max_grad_norm": 100.0}
OFF = {"max_grad_norm": 0.0}

QUICK = [
    Case(lora=False, bf16=False, accumulation=1, **CLIPPED),
    Case(lora=False, bf16=True, accumulation=2, **CLIPPED),
    Case(lora=True, bf16=False, accumulation=2, **UNCLIPPED),
    Case(lora=True, bf16=True, accumulation=1, **OFF),
]
SLOW = [
    Case(lora=False, bf16=False, accumulation=2, **UNCLIPPED),
    Case(lora=False, bf16=True, accumulation=1, **OFF),
    Case(lora=True, bf16=False, accumulation=1, **CLIPPED),
    Case(lora=True, bf16=True, accumulation=2, **CLIPPED),
    Case(lora=False, bf16=False, accumulation=1, optim="adamw_torch_fused"),
    Case(lora=False, bf16=True, accumulation=2, checkpointing="non-reentrant"),
    Case(lora=False, bf16=False, accumulation=1, checkpointing="reentrant"),
    Case(lora=True, bf16=True, accumulation=2, checkpointing="non-reentrant"),
]
POISONED = [Case(lora=False, bf16=bf16, accumulation=2, poisoned=True) for bf16 in (False, True)]
RESUMED = [Case(lora=False, bf16=True, accumulation=2, resumes=True)]
# Trained twice, with and without the engine's functions wanting every step.
COMPARED = [QUICK[1], QUICK[2]]
SGD = Case(lora=False, bf16=False, accumulation=2, optim="sgd")
NO_MASTER = Case(lora=False, bf16=False, accumulation=1, load_in_bf16=True)

# Number of processes. "plain" runs in pytest's own process, the others are launch/<engine>.yaml.
QUICK_ENGINES = {"plain": 1, "ddp-cpu": 2, "zero2-cpu": 2, "zero3-cpu": 2, "fsdp2-cpu": 2}
# ZeRO-2 slices less than ZeRO-3, by the same code.
SHORT_COMMANDS = [pytest.param(name, marks=pytest.mark.slow if name == "zero2-cpu" else ()) for name in QUICK_ENGINES]
NUM_PROCESSES = QUICK_ENGINES | {
    "cpu": 1,
    "zero1": 2,
    "zero1-float32-sums": 2,
    "zero2-float32-sums": 2,
    "zero3-float32-sums": 2,
}


def unwatched(case: Case) -> Case:
    return dataclasses.replace(case, watched=False)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """trained(engine, cases): the records of each rank, by case; every engine is launched once per set of cases."""
    done: dict[tuple, dict[Case, list[dict]]] = {}

    def train(engine: str, cases: list[Case]) -> dict[Case, list[dict]]:
        key = (engine, *cases)
        if key not in done:
            done[key] = {}  # if the launch fails, the other tests of these cases fail at once
            output_dir = tmp_path_factory.mktemp("engine")
            run_all(engine, cases, output_dir)
            num_processes = NUM_PROCESSES[engine]
            done[key] = {case: load(output_dir, case.name, num_processes) for case in cases}
            for case in filter(lambda case: case.resumes, cases):
                done[key][case, "resumed"] = load(output_dir, f"resumed-{case.name}", num_processes)
            done[key]["messages"] = load(output_dir, "messages", num_processes) if engine == "ddp-cpu" else []
        return done[key]

    return train


def run_all(engine: str, cases: list[Case], output_dir: Path) -> None:
    if engine == "plain":
        for case in cases:
            run_case(case, output_dir)
        return
    shipped = (REPOSITORY / "launch" / f"{engine}.yaml").exists()
    config = engine if shipped else zero_config(engine, output_dir)
    settings = json.dumps([dataclasses.asdict(case) for case in cases])
    run = launch(config, WORKER, str(output_dir), settings, scratch=output_dir / "ops", timeout=280)
    assert run.returncode == 0, run.stdout[-8000:]
    assert "cannot be shared" not in run.stdout


def zero_config(engine: str, directory: Path) -> str:
    """An accelerate YAML for what is not shipped: ZeRO-1, or gradients that DeepSpeed accumulates in float32."""
    config = yaml.safe_load((REPOSITORY / "launch" / "zero2-cpu.yaml").read_text())
    stage = int(engine.removeprefix("zero")[0])
    if engine.endswith("float32-sums"):
        automatic = ["gradient_clipping", "gradient_accumulation_steps", "train_batch_size"]
        settings = dict.fromkeys([*automatic, "train_micro_batch_size_per_gpu"], "auto")
        settings |= {"zero_optimization": {"stage": stage}, "bf16": {"enabled": "auto"}}
        settings |= {"data_types": {"grad_accum_dtype": "fp32"}}
        (directory / "deepspeed.json").write_text(json.dumps(settings))
        config["deepspeed_config"] = {
            "deepspeed_config_file": str(directory / "deepspeed.json"),
            "zero3_init_flag": False,
        }
        del config["mixed_precision"]  # accelerate wants it in one file only
    else:
        config["deepspeed_config"]["zero_stage"] = stage
    path = directory / "accelerate.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def load(directory: Path, name: str, num_processes: int) -> list[dict]:
    paths = sorted(directory.glob(f"{name}.rank*.pt"))
    assert len(paths) == num_processes, f"{len(paths)} processes ran, {num_processes} were asked for"
    return [torch.load(path, weights_only=False) for path in paths]


def quick_cases(engine: str) -> list[Case]:
    extra = {"plain": [SGD], "ddp-cpu": [NO_MASTER]}.get(engine, [])
    compared = COMPARED if engine.startswith("zero") else COMPARED[:1]
    return [*QUICK, *map(unwatched, compared), *extra]


# ---- the one-process oracle


def oracle_model(case: Case, params: dict, dtype: torch.dtype) -> nn.Module:
    """`params` in the model of the case, rounded to `dtype`, and the frozen parameters too; buffers stay float32."""
    model = build_model(case.lora)
    for name, param in model.named_parameters():
        param.data = params.get(name, param.data).to(dtype)
    return model


def oracle_gradient(case: Case, records: list[dict], step: int, model: nn.Module) -> dict[str, torch.Tensor]:
    """The mean over ranks of the mean over micro-batches, in one process: no DDP, no DeepSpeed, no Trainer."""
    total: dict[str, torch.Tensor] = {}
    micro_batches = [batch for record in records for batch in record["batches"][step]]
    trainable = {name: param for name, param in model.named_parameters() if param.requires_grad}
    for batch in micro_batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.bf16 and model.dtype == torch.float32):
            loss = loss_of(model, batch)
        for name, grad in zip(trainable, torch.autograd.grad(loss, list(trainable.values())), strict=True):
            total[name] = total.get(name, 0) + grad.double() / len(micro_batches)
    return total


def flat(values: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in values.values()])


def relative_error(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert got.keys() == expected.keys()
    difference = flat(got) - flat({name: expected[name] for name in got})
    return float(difference.norm() / flat(expected).norm())


def adamw_update(step: dict, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(T4) in float64, from what was recorded before the step; and the sum of the magnitudes of its terms."""
    theta, g, m, v = (step[key][name].double() for key in ("params_before", "gradient", "exp_avg", "exp_avg_sq"))
    (b1, b2), t, c = step["betas"][name], step["optimizer_step"], step["clip_factor"]
    terms = [b1 * m / (1 - b1**t), (1 - b1) * c * g / (1 - b1**t)]
    v_hat = (b2 * v + (1 - b2) * (c * g) ** 2) / (1 - b2**t)
    terms = [term / (v_hat.sqrt() + step["eps"][name]) for term in terms] + [step["weight_decay"][name] * theta]
    rate = step["learning_rate"][name]
    return -rate * sum(terms), rate * sum(term.abs() for term in terms)


def unit_in_last_place(*values: torch.Tensor) -> torch.Tensor:
    """Of the largest of `values`, as float32 numbers."""
    largest = torch.stack([value.float().abs() for value in values]).amax(dim=0)
    return (torch.nextafter(largest, torch.full_like(largest, torch.inf)) - largest).double()


# ---- checks, each on every case


def check_equal_on_all_ranks(records: list[dict]) -> None:
    first, *others = records
    for other in others:
        for step, other_step in zip(first["steps"], other["steps"], strict=True):
            assert step.keys() == other_step.keys()
            for key, value in step.items():
                if isinstance(value, dict) and torch.is_tensor(next(iter(value.values()))):
                    assert all(torch.equal(value[name], other_step[key][name]) for name in value), key
                elif not isinstance(value, tuple):
                    assert value == other_step[key], key


def rounding_before_the_bias(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """What DeepSpeed puts in the place of torch's `linear` under ZeRO-3."""
    return x @ weight.t() if bias is None else x @ weight.t() + bias


def check_gradient(engine: str, case: Case, records: list[dict], rounded: bool) -> None:
    """`rounded`: the engine itself computes and sums gradients in bf16, so only bf16's precision can be asked for."""
    linear = rounding_before_the_bias if engine.startswith("zero3") else nn.functional.linear
    for number, step in enumerate(records[0]["steps"]):
        model = oracle_model(case, step["params_before"], torch.bfloat16 if rounded else torch.float32)
        with mock.patch.object(nn.functional, "linear", linear):
            expected = oracle_gradient(case, records, number, model)
        assert relative_error(step["gradient"], expected) <= (2**-7 if rounded else 1e-6)
        assert all(g.dtype == torch.float32 for g in step["gradient"].values())
        assert not step["without_gradient"]


def check_clipping(case: Case, records: list[dict]) -> None:
    for step, logged in zip(records[0]["steps"], records[0]["logged_grad_norms"], strict=True):
        norm = float(flat(step["gradient"]).norm())
        assert step["grad_norm"] == pytest.approx(norm, rel=1e-6)
        assert float(logged) == pytest.approx(norm, rel=1e-4)  # what the engine itself says; logged with 4 digits
        expected = min(1.0, case.max_grad_norm / (norm + 1e-6)) if case.max_grad_norm else 1.0
        assert step["clip_factor"] == pytest.approx(expected, rel=1e-6)
        assert (step["clip_factor"] < 1) == (case.max_grad_norm == CLIPPED["max_grad_norm"])


def check_update_is_adamw(records: list[dict]) -> None:
    """Within 1e-6 of its terms, and the three roundings of theta itself: 1 - lr wd, the product, and the sum."""
    for step in records[0]["steps"]:
        expected = {name: adamw_update(step, name) for name in step["update"]}
        theta = step["params_before"], step["params_after"]
        rounding = {name: unit_in_last_place(*(params[name] for params in theta)) for name in expected}
        for name, update in step["update"].items():
            value, magnitude = expected[name]
            assert ((update.double() - value).abs() <= 1.5 * rounding[name] + 1e-6 * magnitude).all(), name
        values = {name: value for name, (value, _) in expected.items()}
        allowed = 1e-6 + flat(rounding).norm() / 2 / flat(values).norm()
        assert relative_error(step["update"], values) <= allowed <= 1e-5


def check_settings(case: Case, records: list[dict]) -> None:
    for number, step in enumerate(records[0]["steps"]):
        rate = 1e-2 * (1 - number / NUM_STEPS)  # the default schedule: linear, to 0
        assert step["optimizer_step"] == number + 1
        assert list(step["learning_rate"].values()) == pytest.approx([rate] * len(step["update"]))
        for name, decay in step["weight_decay"].items():
            assert decay == (0.0 if name.endswith("bias") or "norm" in name else 0.1), name


def check_moments(records: list[dict]) -> None:
    """Zero before the first step, and then what (T4) makes of the gradients that were handed out."""
    steps = records[0]["steps"]
    assert not any(value.any() for key in ("exp_avg", "exp_avg_sq") for value in steps[0][key].values())
    for step, following in itertools.pairwise(steps):
        clipped = {name: step["clip_factor"] * g.double() for name, g in step["gradient"].items()}
        b1, b2 = step["betas"][next(iter(clipped))]
        exp_avg = {name: b1 * step["exp_avg"][name] + (1 - b1) * g for name, g in clipped.items()}
        exp_avg_sq = {name: b2 * step["exp_avg_sq"][name] + (1 - b2) * g**2 for name, g in clipped.items()}
        assert relative_error(following["exp_avg"], exp_avg) <= 1e-6
        assert relative_error(following["exp_avg_sq"], exp_avg_sq) <= 1e-6


def check_parameters(case: Case, records: list[dict], model_dtype: torch.dtype) -> None:
    """The update joins two true states of theta, and the model holds theta, rounded to its dtype."""
    steps = records[0]["steps"]
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        for name, update in step["update"].items():
            before, after = step["params_before"][name], step["params_after"][name]
            assert torch.equal(update, after - before)
            assert update.any()
            # Exact where after is within [before/2, 2 before] (Sterbenz); elsewhere the difference itself is rounded.
            small = 2 * update.abs() <= before.abs()
            assert torch.equal((before + update)[small], after[small])
            error = (before.double() + update.double() - after.double()).abs()
            assert (error <= unit_in_last_place(update) / 2).all()
            assert torch.equal(step["model_before"][name], before.to(model_dtype))
            assert torch.equal(step["model_after"][name], after.to(model_dtype))
            if following is not None:
                assert torch.equal(following["params_before"][name], after)
        assert not step["step_skipped"]
    assert all(torch.equal(steps[-1]["model_after"][name], value) for name, value in records[0]["final"].items())


def check_scoring(case: Case, records: list[dict], frozen_dtype: torch.dtype) -> None:
    """A probe scores with float32 theta whatever the engine computes with; or with what training computes with."""
    for step in records[0]["steps"]:
        # The frozen weights are as the engine rounded them.
        frozen = {name: param.data.to(frozen_dtype) for name, param in build_model(case.lora).named_parameters()}
        model = oracle_model(case, frozen | step["params_before"], torch.float32)
        expected, own = probe_score(model), step["probe_own_dtype"]
        for got, value in zip(step["probe"], expected, strict=True):
            assert got.dtype == value.dtype
            assert float(got) == pytest.approx(float(value), rel=1e-6)
        if case.bf16:
            assert float(own[0]) != float(expected[0])
            assert float(own[0]) == pytest.approx(float(expected[0]), rel=3e-2)


def check_all(engine: str, case: Case, records: list[dict]) -> None:
    names = {"zero3": "Zero3Engine", "zero2": "ZeroEngine", "zero1": "ZeroEngine", "fsdp2": "Fsdp2Engine"}
    name = names.get(engine[:5], "PlainEngine")
    assert {record["engine"] for record in records} == {name}
    assert {record["num_processes"] for record in records} == {NUM_PROCESSES[engine]}
    assert len(records[0]["steps"]) == NUM_STEPS
    assert sum(len(micro_batches) for micro_batches in records[0]["batches"]) == NUM_STEPS * case.accumulation
    assert all(step["has_float32_master"] for step in records[0]["steps"])
    computes_in = torch.bfloat16 if name != "PlainEngine" and case.bf16 else torch.float32
    # FSDP2's parameters stay float32: each forward gathers a rounded copy.
    keeps = torch.float32 if name == "Fsdp2Engine" else computes_in
    check_equal_on_all_ranks(records)
    check_gradient(engine, case, records, rounded=computes_in == torch.bfloat16)
    check_clipping(case, records)
    check_update_is_adamw(records)
    check_settings(case, records)
    check_moments(records)
    check_parameters(case, records, keeps)
    check_scoring(case, records, keeps)


# ---- tests


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
@pytest.mark.parametrize("engine", SHORT_COMMANDS)
def test_every_quantity(trained, engine: str, case: Case) -> None:
    check_all(engine, case, trained(engine, quick_cases(engine))[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=lambda case: case.name)
@pytest.mark.parametrize("engine", ["cpu", "ddp-cpu", "zero2-cpu", "zero3-cpu"])
def test_every_quantity_in_the_other_cases(trained, engine: str, case: Case) -> None:
    check_all(engine, case, trained(engine, SLOW)[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", [*QUICK, *SLOW], ids=lambda case: case.name)
def test_every_quantity_under_zero1(trained, case: Case) -> None:
    check_all("zero1", case, trained("zero1", [*QUICK, *SLOW])[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", [QUICK[1], SLOW[3]], ids=lambda case: case.name)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_quantity_where_deepspeed_accumulates_in_float32(trained, stage: int, case: Case) -> None:
    """Other code in DeepSpeed: BF16_Optimizer for ZeRO-1, other gradient buffers for ZeRO-2."""
    engine = f"zero{stage}-float32-sums"
    check_all(engine, case, trained(engine, [QUICK[1], SLOW[3]])[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", POISONED, ids=lambda case: case.name)
@pytest.mark.parametrize("engine", ["cpu", "zero2-cpu", "zero1", "zero3-cpu"])
def test_a_step_that_is_not_finite(trained, engine: str, case: Case) -> None:
    """torch makes it, DeepSpeed drops it. Either is said, and nothing hangs."""
    for record in trained(engine, POISONED)[case]:
        _, step, _ = record["steps"]
        assert math.isnan(step["clip_factor"])
        assert math.isnan(step["grad_norm"])
        assert step["step_skipped"] == (engine != "cpu")
        values = flat(step["update"])
        assert not values.any() if step["step_skipped"] else values.isnan().all()


@pytest.mark.parametrize("engine", SHORT_COMMANDS)
def test_reading_leaves_training_bit_identical(trained, engine: str) -> None:
    cases = quick_cases(engine)
    records = trained(engine, cases)
    pairs = [(dataclasses.replace(case, watched=True), case) for case in cases if not case.watched]
    assert pairs
    for watched_case, unwatched_case in pairs:
        for read, left_alone in zip(records[watched_case], records[unwatched_case], strict=True):
            assert len(read["steps"]) == NUM_STEPS
            assert not left_alone["steps"]
            assert read["final"].keys() == left_alone["final"].keys()
            assert all(torch.equal(value, left_alone["final"][name]) for name, value in read["final"].items())
            assert read["logged_grad_norms"] == left_alone["logged_grad_norms"]


def test_update_of_any_optimizer(trained) -> None:
    for step in trained("plain", quick_cases("plain"))[SGD][0]["steps"]:
        for name, update in step["update"].items():
            decayed = step["weight_decay"][name] * step["params_before"][name]
            expected = -step["learning_rate"][name] * (step["clip_factor"] * step["gradient"][name] + decayed)
            rounding = unit_in_last_place(step["params_before"][name], step["params_after"][name])
            allowed = rounding + 1e-6 * expected.abs()
            assert ((update - expected).abs() <= allowed).all()


def test_model_in_bf16_without_a_master(trained) -> None:
    records = trained("ddp-cpu", quick_cases("ddp-cpu"))[NO_MASTER]
    check_equal_on_all_ranks(records)
    for step in records[0]["steps"]:
        assert not step["has_float32_master"]
        for name, update in step["update"].items():
            assert update.dtype == torch.float32
            assert torch.equal(step["model_before"][name].float(), step["params_before"][name])
            assert torch.equal(step["model_after"][name].float(), step["params_after"][name])
            assert torch.equal(update, step["params_after"][name] - step["params_before"][name])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["cpu", "ddp-cpu", "zero2-cpu", "zero1", "zero3-cpu"])
def test_resumed_step_is_the_same_step(trained, engine: str) -> None:
    """Moments, step count and master come from the checkpoint."""
    records = trained(engine, RESUMED)
    for straight, resumed in zip(records[RESUMED[0]], records[RESUMED[0], "resumed"], strict=True):
        assert len(resumed["steps"]) == 1
        assert resumed["steps"][0]["optimizer_step"] == NUM_STEPS
        check_equal_on_all_ranks([{"steps": straight["steps"][-1:]}, resumed])
        check_update_is_adamw([resumed])


def test_one_rank_fails_and_all_say_so(trained) -> None:
    messages = trained("ddp-cpu", quick_cases("ddp-cpu"))["messages"]
    for ((message, cause),) in (rank[0] for rank in messages):
        assert message == "rank 1 failed while counting: KeyError: 'seven'"
        assert cause in ("None", "KeyError('seven')")
    assert [float(total) for _, total in messages] == [2.0, 2.0]  # the group still works


def test_probe_batch_is_no_training_batch(trained) -> None:
    """Guards the test itself: scoring on the update's own tokens could hide a leak between the two."""
    records = trained("plain", quick_cases("plain"))[QUICK[0]]
    probe = token_batches(PROBE_BATCH)
    assert probe.shape[0] != records[0]["batches"][0][0].shape[0]
    assert math.isfinite(float(records[0]["steps"][0]["probe"][0]))
