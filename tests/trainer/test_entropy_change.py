"""`callbacks=[EntropyChange()]` on TRL's own trainers: the numbers of the probe, and training as it was."""

import pytest
import torch
from first_fast import first_fast
from test_other_trainers import flat, with_whole_groups
from transformers import Trainer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_entropy import EntropyChange
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.trainer.entropy_change import prompt_numbers, trainer_of_event

# What GRPOConfig needs to train as DrGRPOConfig does.
DR_GRPO = {"loss_type": "dr_grpo", "scale_rewards": "none", "beta": 0.0, "top_k": 0, "logging_steps": 1}


def history(trainer) -> list[dict]:
    return [row for row in trainer.state.log_history if "loss" in row]


def test_numbers_are_those_of_the_probe_on_the_next_rollouts(make_trainer):
    ours = make_trainer(entropy_probe=True, entropy_probe_num_completions=16, max_steps=3)
    ours.train()
    probed = RunDirectory(ours.args.output_dir).metrics()
    plain = make_trainer(with_whole_groups(GRPOTrainer), GRPOConfig, [EntropyChange()], max_steps=3, **DR_GRPO)
    plain.train()
    assert torch.equal(flat(ours.model), flat(plain.model))
    rows = history(plain)
    assert [row.get("entropy/of_step") for row in rows] == [None, 1, 2]
    for step, row in zip((1, 2), rows[1:], strict=True):
        for key in ("measured", "linear", "trapezoid", "measured_stderr", "linear_stderr"):
            expected = probed[step - 1][f"entropy/delta_{key}"]
            assert row[f"entropy/delta_{key}"] == pytest.approx(expected, rel=1e-3, abs=1e-6), key
        assert abs(row["entropy/delta_measured"]) > 1e-4


KINDS = [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)]


@pytest.mark.parametrize(("kind", "config"), first_fast(KINDS))
def test_training_is_as_without_it_bit_for_bit(make_trainer, kind, config):
    trained = []
    for callbacks in ([], [EntropyChange(every=2)]):
        trainer = make_trainer(kind, config, callbacks, max_steps=3, logging_steps=1, top_k=0)
        trainer.train()
        trained.append(flat(trainer.model))
    assert torch.equal(*trained)
    values = [row["entropy/of_step"] for row in history(trainer) if "entropy/of_step" in row]
    assert values == [2]


def test_prompts_are_numbered_by_their_tokens():
    ids = torch.tensor([[0, 5, 6], [0, 0, 6], [9, 5, 6], [5, 6, 0]])
    mask = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 1, 1], [1, 1, 0]])
    numbers = prompt_numbers(ids, mask)
    assert numbers[0] == numbers[2] == numbers[3] != numbers[1]
    assert (numbers >= 0).all()


def test_the_trainer_is_found_on_the_stack(make_trainer):
    """A contract: transformers calls callbacks from methods of the trainer."""
    found = []

    class Find(TrainerCallback):
        def on_init_end(self, *args, **kwargs):
            found.append(trainer_of_event())

    trainer = make_trainer(GRPOTrainer, GRPOConfig, [Find()])
    assert found == [trainer] and isinstance(trainer, Trainer)
    with pytest.raises(RuntimeError, match="is a callback of a Trainer"):
        trainer_of_event()


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"num_iterations": 2}, "num_iterations=2 and steps_per_generation=1 let steps share them"),
        ({"steps_per_generation": 2}, "Set num_iterations=1 and steps_per_generation=1"),
        ({"mask_truncated_completions": True}, "drops completions by their outcome"),
        ({"top_k": 5}, "top_k=5 changes it. Set top_k=0"),
        ({"generation_kwargs": {"typical_p": 0.5}}, "typical_p=0.5 changes it"),
    ],
)
def test_what_is_refused_by_name(make_trainer, settings, error):
    with pytest.raises(ValueError, match=error):
        make_trainer(GRPOTrainer, GRPOConfig, [EntropyChange()], **(DR_GRPO | settings)).train()


def test_a_trainer_that_has_probes_and_one_without_completions_are_refused(make_trainer):
    with pytest.raises(TypeError, match="DrGRPOTrainer has probes of its own: set entropy_probe=True"):
        make_trainer(callbacks=[EntropyChange()])
    with pytest.raises(TypeError, match="AsyncGRPOTrainer draws while it trains"):
        Trainer(torch.nn.Linear(1, 1), callbacks=[EntropyChange()])
    with pytest.raises(ValueError, match="every is 0"):
        EntropyChange(every=0)


def test_it_may_be_added_later_and_serve_twice(make_trainer):
    trainer = make_trainer(GRPOTrainer, GRPOConfig, max_steps=2, **DR_GRPO)
    trainer.add_callback(EntropyChange(derivatives=False))
    for _ in range(2):
        trainer.train()
        row = history(trainer)[-1]
        assert row["entropy/of_step"] == 1 and "entropy/delta_linear" not in row
