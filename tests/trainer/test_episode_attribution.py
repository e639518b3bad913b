"""Attribution of whole episodes against the step that is made without one: brute force, in float64."""

import pytest
import torch
from environment_rollouts import two_turns
from safetensors.torch import load_file

from trl_entropy.experiments.influence_check import SCALE, check_by_leaving_out
from trl_entropy.experiments.redraws import Cache
from trl_entropy.experiments.state import FixedState
from trl_entropy.models.embedded import build_model
from trl_entropy.probes import EntropyProbe
from trl_entropy.probes.probe import Probe
from trl_entropy.runs.directory import RunDirectory

STEP = 10


@pytest.fixture(scope="module")
def model_path(tmp_path_factory, tokenizer) -> str:
    """A random policy draws the padding token too, of whose embedding torch gives no gradient (`padding_idx`)."""
    path = tmp_path_factory.mktemp("policy_without_padding_index")
    model = build_model(tokenizer, seed=0)
    model.config.pad_token_id = None
    model.save_pretrained(path)
    return str(path)


class Step(FixedState):
    """A step of a training in the place of a checkpoint's, with coefficients of training's own loss."""

    loss_coefficients = None

    def __init__(self, **known) -> None:
        vars(self).update(known)


class LeavingOut(Probe):
    """Makes a step again, without each of its episodes in turn, and measures what that does to the entropy of E."""

    name = "leaving_out"
    needs_loss_coefficients = True

    def __init__(self, entropy: EntropyProbe, folder) -> None:
        super().__init__(every=entropy.every)
        self.entropy, self.folder = entropy, folder

    def on_before_update(self, args, state, control, *, metrics, update, engine, record, **kwargs) -> None:
        fixed = Step(
            context=update,
            args=args,
            before=update.params_before,
            model=engine.module,
            rollouts=record.rollouts,
            loss_coefficients=record.loss_coefficients.policy,
        )
        self.check = check_by_leaving_out(
            fixed, Cache(self.folder), self.entropy._drawn, len(record.rollouts.rewards), 16
        )
        self.rows = record.rollouts.raw_advantages.nonzero().squeeze(1)


def test_an_episode_left_out_changes_the_entropy_as_attributed(make_trainer, tmp_path_factory):
    entropy = EntropyProbe(every=STEP, num_prompts=4, attribution="token")
    probe = LeavingOut(entropy, tmp_path_factory.mktemp("left_out"))
    trainer = make_trainer(rollout_func=two_turns, max_steps=STEP, callbacks=[entropy, probe], weight_decay=0.1)
    trainer.train()
    run = RunDirectory(trainer.args.output_dir)
    file = load_file(run.path / f"probes/attribution/step_{STEP:06d}.safetensors")
    assert not torch.equal(file["loss_mask"], file["completion_mask"])
    attributed = file["attribution"].double().sum(1)[probe.rows]
    held, free = (torch.tensor(probe.check[made]["true"], dtype=torch.float64) / SCALE for made in ("held", "free"))
    assert torch.corrcoef(torch.stack([attributed, held]))[0, 1] > 0.999
    assert float((attributed @ held) / (attributed @ attributed)) == pytest.approx(1, abs=0.01)
    # AdamW's metric without the episode is another one, the more so the younger its moments: 0.96 at the second step.
    assert torch.corrcoef(torch.stack([attributed, free]))[0, 1] > 0.99
