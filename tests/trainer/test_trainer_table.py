"""Every cell of docs/trainers.md: what it says is supported is trained and logs its numbers, the rest is refused."""

import ast
import sys
from pathlib import Path

import pytest
from test_other_trainers import ProbedGRPOConfig, ProbedHalved, rows_of
from trl import GRPOConfig, GRPOTrainer

from trl_entropy import (
    DrGRPOConfig,
    DrGRPOTrainer,
    EntropyChange,
    ProbedGMPOConfig,
    ProbedGMPOTrainer,
    ProbedRLOOConfig,
    ProbedRLOOTrainer,
)
from trl_entropy.probes import PROBES as TOGGLES

ROOT = Path(__file__).parents[2]
TRAINERS = {
    "DrGRPOTrainer": (DrGRPOTrainer, DrGRPOConfig, {}),
    "ProbedGMPOTrainer": (ProbedGMPOTrainer, ProbedGMPOConfig, {"scale_rewards": "none", "top_k": 0}),
    "ProbedRLOOTrainer": (ProbedRLOOTrainer, ProbedRLOOConfig, {"beta": 0.0}),
    "ProbedTrainer, unknown loss": (ProbedHalved, ProbedGRPOConfig, {"scale_rewards": "none", "top_k": 0}),
}
ENTROPY = {"entropy_probe": True, "entropy_probe_num_completions": 8}
HELD_OUT = ENTROPY | {"entropy_probe_completions": "held_out", "entropy_probe_num_completions": 4}
# Row -> settings, and a key that a step must have.
PROBES = {
    "entropy_probe, next rollouts": (ENTROPY, "entropy/delta_measured"),
    "entropy_probe, held out": (HELD_OUT, "entropy/delta_measured"),
    "entropy_probe, rollouts (T17)": (
        {"entropy_probe": True, "entropy_probe_completions": "rollouts"},
        "entropy/delta_in_sample",
    ),
    "entropy_attribution (T9)": (ENTROPY | {"entropy_attribution": "sequence"}, "entropy/delta_momentum"),
    "noise_scale_probe (T14)": ({"noise_scale_probe": True}, "noise_scale/grad_sq_norm"),
    "noise_scale_within_prompt": (
        {"noise_scale_probe": True, "noise_scale_within_prompt": True},
        "noise_scale/grad_sq_norm",
    ),
    "fisher_probe (T12)": ({"fisher_probe": True, "fisher_num_sequences": 16}, "fisher/effective_rank"),
    "effective_sample_size_probe": ({"effective_sample_size_probe": True}, "ess/loss_weights"),
    "likelihood_probe": ({"likelihood_probe": True}, "likelihood/delta_above_mean"),
    "mutual_information_probe (T23)": (
        {"mutual_information_probe": True, "mutual_information_probe_every": 1, "mutual_information_num_prompts": 4},
        "mutual_information/lower",
    ),
    "optimizer_state_probe": ({"optimizer_state_probe": True}, "optimizer_state/exp_avg_sq_p50"),
    "kl_every": ({"kl_every": 1}, "kl"),
    "entropy_control": (
        {"entropy_control": "hold", "entropy_control_target": 3.0, "entropy_control_num_completions": 4},
        "entropy_control/entropy",
    ),
}
ENGINES = {
    "one process": "plain",
    "DDP": "ddp-cpu",
    "ZeRO-1": "zero1-cpu",
    "ZeRO-2": "zero2-cpu",
    "ZeRO-3": "zero3-cpu",
    "FSDP2": "fsdp2-cpu",
}


def table(heading: str) -> dict[tuple[str, str], str]:
    """(row, column) -> cell, of the table below a heading."""
    text = (ROOT / "docs" / "trainers.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return {(row[0], name): cell for row in rows for name, cell in zip(header[1:], row[1:], strict=True)}


CELLS = table("Trainers")
TRAINED = [key for key, cell in CELLS.items() if key[1] in TRAINERS]


def make(make_trainer, row: str, column: str, **more):
    kind, config, settings = TRAINERS[column]
    return make_trainer(kind, config, max_steps=2, **(settings | PROBES[row][0] | more))


def test_the_table_has_every_row_and_column():
    assert TOGGLES.keys() <= {name for settings, _ in PROBES.values() for name in settings}
    assert {row for row, _ in CELLS} == {*PROBES} and {name for _, name in CELLS} == {*TRAINERS, "EntropyChange"}
    assert set(CELLS.values()) == {"yes", "no"}


@pytest.mark.slow
@pytest.mark.parametrize(("row", "column"), [key for key in TRAINED if CELLS[key] == "yes"])
def test_what_is_supported_logs_its_numbers(make_trainer, row, column):
    trainer = make(make_trainer, row, column)
    trainer.train()
    assert any(PROBES[row][1] in one for one in rows_of(trainer)), sorted(rows_of(trainer)[-1])


@pytest.mark.parametrize(("row", "column"), [key for key in TRAINED if CELLS[key] == "no"])
def test_what_is_not_is_refused_by_name(make_trainer, row, column):
    with pytest.raises(ValueError, match=row.split(",")[0].split(" ")[0]):
        make(make_trainer, row, column)


def test_the_callback_has_no_toggles(make_trainer):
    """What it logs is tested in test_entropy_change.py; no setting of a probe is one of GRPOConfig's."""
    assert {key[0] for key, cell in CELLS.items() if key[1] == "EntropyChange" and cell == "yes"} == {
        "entropy_probe, next rollouts"
    }
    for settings, _ in PROBES.values():
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            make_trainer(GRPOTrainer, GRPOConfig, [EntropyChange()], **settings)


def test_every_engine_is_trained_by_a_test():
    sys.path.insert(0, str(ROOT / "tests" / "distributed"))
    from test_trainers_ranks import ENGINES as RANKS
    from test_user_launch import LAUNCHES
    from trainers_worker import KINDS

    others = {"ProbedGMPOTrainer": "gmpo", "ProbedRLOOTrainer": "rloo", "EntropyChange": "callback"}
    assert {*others.values()} == {*KINDS} - {"agent"}  # which is DrGRPOTrainer again
    tested = {(row, name) for row, engine in ENGINES.items() for name in others if engine in ("plain", *RANKS)}
    launched = {engine for engine, *_ in LAUNCHES.values()} - {"cpu"} | {"plain"}
    tested |= {(row, "DrGRPOTrainer") for row, engine in ENGINES.items() if engine in launched}
    worker = ast.parse((ROOT / "tests" / "distributed" / "watch_worker.py").read_text())
    words = {node.value for node in ast.walk(worker) if isinstance(node, ast.Constant)}
    watched = {row for row, engine in ENGINES.items() if engine.removesuffix("-cpu") in words}
    tested |= {(row, "watch_step") for row in watched}
    assert {key for key, cell in table("Engines").items() if cell == "yes"} == tested
