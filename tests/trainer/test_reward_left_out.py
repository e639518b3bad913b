"""The reward's attribution (T22) against the step that is made without a completion: brute force, in float64."""

import pytest
import torch
from safetensors.torch import load_file

from trl_entropy.estimators.entropy_change.expectation import baseline
from trl_entropy.experiments.influence_check import SCALE, Float64Step, left_out
from trl_entropy.experiments.state import FixedState
from trl_entropy.gradients.float64_reference import float64_reference
from trl_entropy.gradients.scores import score
from trl_entropy.probes import EntropyProbe
from trl_entropy.probes.probe import Probe
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.tasks.rewards import tag_pref
from trl_entropy.tasks.word_problems import load_word_problems

NUM_LEFT_OUT = 24


class Step(FixedState):
    """A step of a training in the place of a checkpoint's, with coefficients of training's own loss."""

    loss_coefficients = None

    def __init__(self, **known) -> None:
        vars(self).update(known)


class LeavingOut(Probe):
    """Makes a step again, without each of its completions in turn, and measures what that does to E's reward."""

    name = "leaving_out"
    needs_loss_coefficients = True

    def __init__(self, entropy: EntropyProbe) -> None:
        super().__init__(every=entropy.every)
        self.entropy = entropy

    def on_before_update(self, args, state, control, *, update, engine, record, **kwargs) -> None:
        fixed = Step(
            context=update, args=args, before=update.params_before, model=engine.module, rollouts=record.rollouts,
            loss_coefficients=record.loss_coefficients.policy,
        )  # fmt: skip
        drawn, self.rows = self.entropy._drawn, left_out(record.rollouts.raw_advantages, NUM_LEFT_OUT)
        rewards = drawn.values["reward"].double()
        above = rewards - baseline(rewards, drawn.prompt_index)

        def sums(params):
            return score(engine.module, drawn, args.temperature, 32, params).logps[0].double().sum(1)

        with float64_reference(engine.module):
            step = Float64Step(fixed, 32)
            start, metric, whole = sums(step.before), step.metric(), step.params_after(step.gradient)
            changes = []
            for row in self.rows.tolist():
                without = {name: value + metric[name] * step.rows[name][row] for name, value in whole.items()}
                changes.append([(((sums(end) - start).exp() - 1) * above).mean() for end in (whole, without)])
        self.true = torch.tensor([of_whole - of_rest for of_whole, of_rest in changes], dtype=torch.float64) / SCALE


@pytest.mark.slow
def test_a_completion_left_out_changes_the_reward_as_attributed(make_trainer):
    """A step of the embedded model after its warm start; AdamW's M held, at a hundredth of the step."""
    entropy = EntropyProbe(every=2, num_prompts=64, attribution="sequence", reward_attribution=True)
    probe = LeavingOut(entropy)
    trainer = make_trainer(
        model="embedded", dataset=load_word_problems(num_problems=256), reward_funcs=tag_pref,
        callbacks=[entropy, probe], num_generations=8, per_device_train_batch_size=64, max_completion_length=32,
        learning_rate=3e-4, max_steps=2,
    )  # fmt: skip
    trainer.train()
    file = load_file(RunDirectory(trainer.args.output_dir).path / "probes/attribution/step_000002.safetensors")
    attributed = file["attribution_reward"].double()[probe.rows]
    correlation = torch.corrcoef(torch.stack([attributed, probe.true]))[0, 1]
    slope = (attributed @ probe.true) / (attributed @ attributed)
    print(f"correlation {float(correlation):.6f}, slope {float(slope):.5f}, {len(attributed)} completions")
    assert len(attributed) == NUM_LEFT_OUT and correlation > 0.99
    assert float(slope) == pytest.approx(1, abs=0.02)
