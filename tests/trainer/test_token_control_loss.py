"""Clip-Cov, KL-Cov and random tokens in training: what the loss gets, what is logged, what is refused."""

import itertools
import logging
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from first_fast import first_fast
from published_token_control import PublishedLoss
from ranks_in_threads import on_ranks

from trl_entropy import DrGRPOConfig, DrGRPOTrainer, Probe
from trl_entropy.config.setting import own_settings
from trl_entropy.control import TokenControl
from trl_entropy.estimators.control.token_control import centred_covariances, kl_cov_tokens, token_covariances
from trl_entropy.runs.directory import RunDirectory

CLIP = {"token_control": "clip_cov", "token_control_bounds": [0.2, 0.9], "token_control_quantiles": True,
        "token_control_fraction": 0.1}  # fmt: skip


def read_by(settings):
    """Without the settings that their `token_control` does not read: they would be refused."""
    own, control = own_settings(DrGRPOConfig), settings["token_control"]
    readers = {name: described.read_with.get("token_control", (control,)) for name, described in own.items()}
    return {name: value for name, value in settings.items() if control in readers.get(name, (control,))}


class Kept(Probe):
    def __init__(self):
        super().__init__()
        self.rollouts, self.inputs, self.gradients, self.entropies = [], [], [], []

    def on_micro_batch(self, args, state, control, *, inputs, loss_logps, per_token_logps, token_entropy, **kwargs):
        self.inputs.append((inputs, per_token_logps))
        self.entropies.append(token_entropy)
        loss_logps.register_hook(self.gradients.append)

    def on_rollouts(self, args, state, control, *, rollouts, **kwargs):
        self.rollouts.append(rollouts)


def trained(make_trainer, **settings):
    kept = Kept()
    trainer = make_trainer(callbacks=[kept], **({"max_steps": 1, "lr_scheduler_type": "constant"} | settings))
    trainer.train()
    return trainer, kept, RunDirectory(trainer.args.output_dir).metrics()


@pytest.mark.parametrize("accumulation", [1, 4])
def test_chosen_tokens_have_no_loss(make_trainer, accumulation):
    """A tenth of the step's tokens, all micro-batches together; every other token as without."""
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 16 // accumulation}
    _, kept, (row,) = trained(make_trainer, entropy_probe=False, **CLIP, **settings)
    (rollouts,) = kept.rollouts
    mask = rollouts.completion_mask.bool()
    left_out = mask & (rollouts.advantages == 0) & (rollouts.raw_advantages != 0)[:, None]
    zero = int((mask & (rollouts.raw_advantages == 0)[:, None]).sum())
    assert 0 < int(left_out.sum()) <= row["token_control/num_tokens"] == int(0.1 * int(mask.sum()))
    assert int(left_out.sum()) >= row["token_control/num_tokens"] - zero
    others = mask & ~left_out
    assert torch.equal(rollouts.advantages[others], rollouts.raw_advantages[:, None].expand(mask.shape)[others])
    gradients = torch.cat(kept.gradients)
    assert not gradients[left_out].any() and gradients[others & (rollouts.advantages != 0)].all()


CENTRED = {"token_control_centre": "distribution"}


def covariances_of(kept, centre):
    """Of the tokens of one micro-batch that is the step, from what its loss computed."""
    ((inputs, logps),) = kept.inputs
    mask, raw = inputs["completion_mask"].bool(), inputs["raw_advantages"]
    if centre == "distribution":
        (entropy,) = kept.entropies
        return centred_covariances(logps, entropy, raw, mask)
    return token_covariances(logps, raw, mask)


@pytest.mark.parametrize("scope", first_fast(["optimizer_batch", "micro_batch"]))
@pytest.mark.parametrize("centre", first_fast(["distribution", "batch"]))
def test_the_largest_covariances_have_no_loss(make_trainer, scope, centre):
    """The tenth of the tokens with the largest, and no other; by the batch's means or by each token's own."""
    control = {"token_control": "clip_cov", "token_control_choice": "largest", "token_control_fraction": 0.1}
    settings = {"token_control_scope": scope, "token_control_centre": centre, "entropy_probe": False}
    _, kept, (row,) = trained(make_trainer, **control, **settings)
    covariances = covariances_of(kept, centre)
    ((inputs, _),) = kept.inputs
    left_out = (inputs["advantages"] != inputs["raw_advantages"][:, None]).expand(covariances.shape)
    values, number = (
        covariances[~covariances.isnan()].sort(descending=True).values,
        int(row["token_control/num_tokens"]),
    )
    assert number == int(0.1 * len(values)) == int(left_out.sum())
    assert torch.equal(covariances[left_out].sort(descending=True).values, values[:number])
    assert row["token_control/mean_covariance"] == pytest.approx(float(values[:number].mean()), rel=1e-5)
    assert not kept.gradients[0][left_out].any()


def test_centred_covariances_are_of_the_policy_that_sampled(make_trainer):
    """Off policy too: log-probabilities are TRL's old ones, entropies are of the same policy."""
    control = {"token_control": "kl_cov", "token_control_fraction": 0.1, **CENTRED, "learning_rate": 1e-2}
    _, kept, _ = trained(make_trainer, num_iterations=2, max_steps=2, entropy_probe=False, **control)
    (inputs, _), (again, _) = kept.inputs
    old, mask = inputs["old_per_token_logps"], inputs["completion_mask"].bool()
    covariances = centred_covariances(old, kept.entropies[0], inputs["advantages"], mask)  # the first update's policy
    chosen = inputs["token_control_mask"]
    assert torch.equal(chosen, kl_cov_tokens(covariances, int(chosen.sum()))) and chosen.any()
    assert torch.equal(again["token_control_mask"], chosen)
    assert not torch.equal(
        chosen, kl_cov_tokens(token_covariances(old, inputs["advantages"], mask), int(chosen.sum()))
    )


def test_kl_cov_holds_the_largest_covariances_to_the_policy_that_sampled(make_trainer):
    """In the second step on the same completions; in the first it does nothing."""
    settings = {"num_iterations": 2, "max_steps": 2, "learning_rate": 1e-2, "entropy_probe": False}
    control = {"token_control": "kl_cov", "token_control_fraction": 0.1, "token_control_coefficient": 3.0}
    _, plain, _ = trained(make_trainer, **settings)
    _, kept, rows = trained(make_trainer, **settings, **control)
    assert torch.equal(kept.gradients[0], plain.gradients[0])
    inputs, logps = kept.inputs[1]
    chosen, old = inputs["token_control_mask"], inputs["old_per_token_logps"]
    covariances = token_covariances(old, inputs["advantages"], inputs["completion_mask"])
    assert torch.equal(chosen, kl_cov_tokens(covariances, int(rows[0]["token_control/num_tokens"])))
    assert torch.equal(logps, plain.inputs[1][1])
    expected = plain.gradients[1] + 3.0 * (logps - old).sign().where(chosen, 0.0) / (16 * 12)
    torch.testing.assert_close(kept.gradients[1], expected, rtol=1e-5, atol=1e-9)


BOUNDS, EPSILON, FRACTION = (0.01, 0.4), 0.02, 0.06
OFF_POLICY = {
    **{"num_iterations": 2, "max_steps": 2, "learning_rate": 1e-2, "entropy_probe": False, "loss_type": "bnpo"},
    **{"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "token_control_fraction": FRACTION},
}


class OfAllLengths(DrGRPOTrainer):
    def _generate_single_turn(self, *args, **kwargs):
        completion_ids, logps = super()._generate_single_turn(*args, **kwargs)
        return [ids[: 5 + number % 8] for number, ids in enumerate(completion_ids)], logps


def published(inputs, logps):
    columns = logps, inputs["old_per_token_logps"], inputs["raw_advantages"], inputs["completion_mask"]
    return PublishedLoss(*(values.double().tolist() for values in columns))


def as_tensor(gradient, shape):
    values = torch.zeros(shape)
    for place, value in gradient.items():
        values[place] = value
    return values


def places(chosen):
    return {tuple(place) for place in chosen.nonzero().tolist()}


def test_clip_cov_of_micro_batches_is_the_published_loss(make_trainer):
    """Its gradient by tokens, in both iterations: nothing chosen in the first is left out of the second."""
    control = {"token_control": "clip_cov", "token_control_bounds": list(BOUNDS), "token_control_scope": "micro_batch"}
    _, kept, rows = trained(make_trainer, trainer_class=OfAllLengths, epsilon=EPSILON, **OFF_POLICY, **control)
    counts, num_clipped = [], 0
    for (inputs, logps), gradient in zip(kept.inputs, kept.gradients, strict=True):
        oracle, mask = published(inputs, logps), inputs["completion_mask"].bool()
        left_out = mask & (inputs["advantages"] == 0) & (inputs["raw_advantages"] != 0)[:, None]
        chosen = places(left_out)
        assert chosen <= oracle.clip_cov_candidates(BOUNDS, EPSILON)
        assert len(chosen) == oracle.clip_cov_count(FRACTION, BOUNDS, EPSILON) > 1
        expected = as_tensor(oracle.clip_cov_gradient(chosen, EPSILON), mask.shape) / 2  # two micro-batches
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)
        counts.append(len(chosen))
        num_clipped += sum(oracle.clipped(place, EPSILON) for place in oracle.places)
    assert [row["token_control/num_tokens"] for row in rows] == [sum(counts[:2]), sum(counts[2:])]
    assert num_clipped


def test_kl_cov_of_micro_batches_is_the_published_loss(make_trainer):
    """The authors do not clip KL-Cov's ratio, and give the share in percent."""
    control = {"token_control": "kl_cov", "token_control_coefficient": 3.0, "token_control_scope": "micro_batch"}
    _, kept, rows = trained(make_trainer, trainer_class=OfAllLengths, epsilon=1e6, **OFF_POLICY, **control)
    for (inputs, logps), gradient in zip(kept.inputs, kept.gradients, strict=True):
        oracle = published(inputs, logps)
        assert places(inputs["token_control_mask"]) == oracle.kl_cov_tokens(100 * FRACTION)
        expected = as_tensor(oracle.kl_cov_gradient(100 * FRACTION, 3.0), logps.shape) / 2
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-8)
    chosen, covariances = kept.inputs[2:], []
    for inputs, logps in chosen:
        oracle = published(inputs, logps)
        covariances += [oracle.covariance[place] for place in oracle.kl_cov_tokens(100 * FRACTION)]
    assert rows[1]["token_control/num_tokens"] == len(covariances)
    assert rows[1]["token_control/mean_covariance"] == pytest.approx(sum(covariances) / len(covariances), rel=1e-5)


def test_chance_depends_on_seed_step_micro_batch_and_rank_alone(tmp_path):
    random = {"token_control": "random", "token_control_fraction": 0.3, "use_cpu": True, "bf16": False}
    by_seed = [DrGRPOConfig(output_dir=str(tmp_path), seed=seed, **random) for seed in (0, 1)]

    def chosen(seed, step, number, rank):
        accelerator = Mock(spec=Accelerator, process_index=rank)
        control = TokenControl(by_seed[seed], accelerator, score=pytest.fail)
        logps, mask = torch.zeros(4, 10), torch.ones(4, 10, dtype=torch.long)
        inputs = {"advantages": torch.ones(4), "completion_mask": mask}
        control.change_micro_batch(inputs, logps, step, number)
        return inputs["advantages"] == 0

    settings = list(itertools.product((0, 1), repeat=4))
    found = [frozenset(places(chosen(*numbers))) for numbers in settings]
    torch.rand(3)
    assert found == [frozenset(places(chosen(*numbers))) for numbers in settings]
    assert len(set(found)) == 16 and all(len(tokens) == 12 for tokens in found)


def test_chance_of_a_whole_batch_depends_on_seed_and_step_alone(tmp_path):
    random = {"token_control": "random", "token_control_fraction": 0.3, "use_cpu": True, "bf16": False}
    alone = Mock(spec=Accelerator, process_index=0)
    alone.gather.side_effect = alone.pad_across_processes.side_effect = lambda rows, **how: rows

    def chosen(seed, step):
        args = DrGRPOConfig(output_dir=str(tmp_path), seed=seed, max_completion_length=12, **random)
        batch = {"advantages": torch.ones(4), "completion_mask": torch.ones(4, 10, dtype=torch.long)}
        TokenControl(args, alone, lambda batch: torch.zeros(4, 10)).change_optimizer_batch(batch, step)
        return frozenset(places(batch["advantages"] == 0))

    settings = list(itertools.product((0, 1), repeat=2))
    found = [chosen(*numbers) for numbers in settings]
    torch.rand(3)
    assert found == [chosen(*numbers) for numbers in settings]
    assert len(set(found)) == 4 and all(len(tokens) == 12 for tokens in found)


@pytest.mark.parametrize("control", ["random", "random_positive", "kl_cov", "clip_cov"])
def test_tokens_of_all_ranks_are_chosen_together(tmp_path, control):
    """Each rank gets its own rows of the choice of one process; its completions are no wider than before."""
    generator = torch.Generator().manual_seed(0)
    logps, advantages = torch.rand(4, 10, generator=generator).log(), torch.tensor([1.0, -2.0, 0.5, 1.5])
    mask = (torch.arange(10) < torch.tensor([[10], [4], [7], [6]])).long()
    settings = {"token_control": control, "token_control_fraction": 0.3, "token_control_bounds": [-5.0, 5.0]}

    def chosen(rows, width, accelerator):
        args = DrGRPOConfig(
            output_dir=str(tmp_path), max_completion_length=12, use_cpu=True, bf16=False, **read_by(settings)
        )
        batch = {"advantages": advantages[rows], "completion_mask": mask[rows, :width]}
        metrics = TokenControl(args, accelerator, lambda batch: logps[rows, :width]).change_optimizer_batch(batch, 1)
        changed = batch.get("token_control_mask", batch["advantages"] == 0)
        return (changed & mask[rows, :width].bool()), metrics

    ((whole, counted),) = on_ranks(1, lambda rank, accelerator: chosen(slice(0, 4), 10, accelerator))
    (first, one), (second, two) = on_ranks(
        2, lambda rank, accelerator: chosen(slice(2 * rank, 2 * rank + 2), (10, 7)[rank], accelerator)
    )
    assert torch.equal(first, whole[:2]) and torch.equal(second, whole[2:, :7]) and not whole[2:, 7:].any()
    assert one == two == counted and int(whole.sum()) == counted["token_control/num_tokens"] == 8


@pytest.mark.parametrize("control", first_fast(["clip_cov", "kl_cov"]))
@pytest.mark.parametrize("accumulation", first_fast([1, 4]))
def test_scopes_agree_on_a_single_micro_batch_alone(make_trainer, control, accumulation):
    """Every token within the bounds, so that chance has no part in it."""
    settings = {
        **{"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 16 // accumulation},
        **{"token_control": control, "entropy_probe": False, "num_iterations": 1 + (control == "kl_cov")},
    }
    if control == "kl_cov":
        settings["token_control_fraction"] = 0.1
    else:
        settings |= {"token_control_bounds": list(BOUNDS), "token_control_fraction": 1.0}
    found = []
    for scope in ("optimizer_batch", "micro_batch"):
        _, kept, (row,) = trained(make_trainer, token_control_scope=scope, **settings)
        name = "token_control_mask" if control == "kl_cov" else "advantages"
        found.append((torch.cat([inputs[name] for inputs, _ in kept.inputs]), row))
    (of_step, step_row), (of_micro_batch, micro_batch_row) = found
    assert torch.equal(of_step, of_micro_batch) == (accumulation == 1)
    keys = ("token_control/num_tokens", "token_control/mean_covariance")
    same = [step_row[key] == pytest.approx(micro_batch_row[key], rel=1e-5) for key in keys]
    assert all(same) if accumulation == 1 else not all(same)


@pytest.mark.parametrize("control", ["clip_cov", "random"])
def test_padding_beyond_the_longest_completion_changes_no_choice(make_trainer, control):
    settings = CLIP if control == "clip_cov" else {"token_control": "random", "token_control_fraction": 0.1}
    found = []
    for multiple in (None, 16):
        _, kept, (row,) = trained(make_trainer, entropy_probe=False, pad_to_multiple_of=multiple, **settings)
        ((inputs, _),) = kept.inputs
        found.append((inputs["advantages"], row["token_control/num_tokens"]))
    (plain, number), (padded, number_of_padded) = found
    assert plain.shape[1] <= 12 and padded.shape[1] == 16 and number == number_of_padded > 0
    assert torch.equal(plain, padded[:, : plain.shape[1]])


@pytest.mark.parametrize("scope", ["optimizer_batch", "micro_batch"])
def test_random_positive_tokens_have_no_loss(make_trainer, scope):
    control = {"token_control": "random_positive", "token_control_scope": scope, "token_control_fraction": 0.2}
    _, kept, (row,) = trained(make_trainer, entropy_probe=False, **control)
    ((inputs, _),) = kept.inputs
    mask, raw = inputs["completion_mask"].bool(), inputs["raw_advantages"][:, None]
    left_out = mask & (inputs["advantages"] != raw)
    assert int(left_out.sum()) == row["token_control/num_tokens"] == int(0.2 * int(mask.sum()))
    assert (raw.expand(mask.shape)[left_out] > 0).all() and not kept.gradients[0][left_out].any()
    others = mask & ~left_out & (raw != 0)
    assert kept.gradients[0][others].all()


@pytest.mark.parametrize("scope", first_fast(["optimizer_batch", "micro_batch"]))
@pytest.mark.parametrize("control", first_fast(["clip_cov", "random"]))
def test_probes_go_with_it(make_trainer, control, scope):
    _, _, rows = trained(
        make_trainer, entropy_probe=True, entropy_probe_completions="held_out", entropy_probe_num_completions=4,
        entropy_attribution="sequence",
        noise_scale_probe=True, **read_by(CLIP | {"token_control": control, "token_control_scope": scope}),
    )  # fmt: skip
    assert abs(rows[-1]["entropy/attribution_rounding"]) < 1e-5
    assert rows[-1]["noise_scale/gradient_error"] < 1e-4


@pytest.mark.parametrize("scope", ["optimizer_batch", "micro_batch"])
def test_a_choice_of_nothing_is_said(make_trainer, caplog, scope):
    settings = {"token_control": "clip_cov", "token_control_bounds": [1e6, 2e6], "token_control_scope": scope}
    with caplog.at_level(logging.WARNING, logger="trl_entropy"):
        _, _, (row,) = trained(make_trainer, **settings)
    assert "chose no token; no covariance lies within" in caplog.text
    assert row["token_control/num_tokens"] == 0 and "token_control/mean_covariance" not in row


def no_reward(completion_ids, **kwargs):
    return [0.0] * len(completion_ids)


def test_no_positive_advantage_is_said(make_trainer, caplog):
    with caplog.at_level(logging.WARNING, logger="trl_entropy"):
        trained(make_trainer, token_control="random_positive", reward_funcs=no_reward)
    assert "no completion has a positive advantage" in caplog.text


@pytest.mark.parametrize("scope", ["optimizer_batch", "micro_batch"])
def test_kl_cov_on_policy_does_nothing_and_is_warned_of(make_trainer, caplog, scope):
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "entropy_probe": False}
    _, plain, _ = trained(make_trainer, **settings)
    with caplog.at_level(logging.WARNING, logger="trl_entropy"):
        _, kept, (row,) = trained(make_trainer, token_control="kl_cov", token_control_scope=scope, **settings)
    assert "does nothing, in both scopes" in caplog.text and row["token_control/num_tokens"] > 0
    assert all(torch.equal(*pair) for pair in zip(kept.gradients, plain.gradients, strict=True))


@pytest.mark.parametrize(
    "settings, warning",
    [
        ({"num_iterations": 2, "steps_per_generation": 1, "gradient_accumulation_steps": 2}, "does nothing"),
        ({"steps_per_generation": 2}, None),
        ({"num_iterations": 2}, None),
        ({"use_vllm": True, "vllm_importance_sampling_correction": True}, "only the sign of rounding errors"),
    ],
    ids=str,
)
def test_kl_cov_is_warned_of_where_no_update_is_off_policy(tmp_path, caplog, settings, warning):
    defaults = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "token_control": "kl_cov"}
    with caplog.at_level(logging.WARNING, logger="trl_entropy"):
        DrGRPOConfig(token_control_scope="micro_batch", **defaults, **settings)
    assert (warning or "") in caplog.text and ("token_control" in caplog.text) == bool(warning)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"token_control": "clip"}, "token_control is 'clip'; use one of none, clip_cov"),
        ({"token_control_fraction": 0.0}, "token_control_fraction"),
        ({"token_control_bounds": [0.5, 0.4]}, "token_control_bounds"),
        ({"token_control_choice": "largest"}, "no token_control_bounds and no token_control_quantiles"),
        ({"token_control_choice": "first"}, "token_control_choice is 'first'; use one of"),
        ({"token_control_centre": "token"}, "token_control_centre is 'token'; use one of"),
        ({"token_control_bounds": [0.5, 1.5]}, "token_control_bounds"),
        ({"steps_per_generation": 2}, "steps_per_generation=1"),
        ({"token_control": "kl_cov", "loss_type": "dapo"}, "loss_type='dr_grpo'"),
        ({"token_control_scope": "rollouts"}, "token_control_scope is 'rollouts'; use one of"),
        ({"token_control_scope": "micro_batch", "loss_type": "cispo"}, "loss_type to one of"),
        ({"token_control_scope": "micro_batch", "importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"token_control": "kl_cov", "noise_scale_probe": True}, "token_control other than 'kl_cov'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(settings, message, tmp_path):
    defaults = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "num_generations": 4}
    with pytest.raises(ValueError, match=message):
        DrGRPOConfig(**(defaults | {"per_device_train_batch_size": 16} | read_by(CLIP | settings)))
