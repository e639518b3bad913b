"""`token_control: exchange` in training: which tokens are left out, by brute force; off is off; resumed; refused."""

import pytest
import torch
from peft import LoraConfig

from trl_entropy import DrGRPOConfig, Probe
from trl_entropy.control import TokenExchange
from trl_entropy.runs.directory import RunDirectory

ALWAYS = {"token_control": "exchange", "token_control_floor": 100.0, "token_control_fraction": 0.1}
NEVER = ALWAYS | {"token_control_floor": 1e-6}


class Kept(Probe):
    """The completions of each step, its parameters before, and Adam's second moments after it."""

    def __init__(self):
        super().__init__()
        self.rollouts, self.parameters, self.metrics = [], [], []

    def on_rollouts(self, args, state, control, *, rollouts, model, **kwargs):
        self.rollouts.append(rollouts)
        self.parameters.append({name: p.detach().clone() for name, p in model.named_parameters()})

    def on_step_end(self, args, state, control, *, optimizer, model, **kwargs):
        names = {id(p): name for name, p in model.named_parameters()}
        self.metrics.append(dict.fromkeys(names.values()))  # in the model's order, not the optimizer's
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                kept = optimizer.state[parameter]
                v_hat = kept["exp_avg_sq"].double() / (1 - group["betas"][1] ** float(kept["step"]))
                self.metrics[-1][names[id(parameter)]] = v_hat.sqrt() + group["eps"]


def trained(make_trainer, callbacks=None, **settings):
    trainer = make_trainer(callbacks=callbacks, **({"max_steps": 3, "lr_scheduler_type": "constant"} | settings))
    trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    return trainer, RunDirectory(trainer.args.output_dir).metrics()


def flat(trainer):
    return torch.cat([param.detach().flatten() for param in trainer.model.parameters()])


# ---- the oracle: plain automatic differentiation in float64, token by token


def distributions(model, rollouts):
    """Log-probability of each token and entropy of its distribution, with the graph."""
    logits = model(input_ids=rollouts.input_ids, attention_mask=rollouts.attention_mask).logits.double()
    width = rollouts.completion_ids.shape[1]
    logps = logits[:, -width - 1 : -1].log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    return logps.gather(-1, rollouts.completion_ids.unsqueeze(-1)).squeeze(-1), entropy


def gradient(value, model, retain=False):
    found = torch.autograd.grad(value, list(model.parameters()), retain_graph=retain)
    return torch.cat([part.double().flatten() for part in found])


def gradients_of_means(model, rollouts):
    """grad h by (T8), written out, and grad J with the mean of the others as baseline."""
    logps, entropy = distributions(model, rollouts)
    mask, value = rollouts.loss_mask.bool(), entropy.detach()
    h = value[mask].mean()
    whole_h, whole_j = torch.zeros(()), torch.zeros(())
    for i in range(len(mask)):
        for k in range(int(mask[i].sum())):
            later = (value[i, k + 1 :] - h)[mask[i, k + 1 :]].sum()
            whole_h = whole_h + entropy[i, k] + later * logps[i, k]
        same = (rollouts.prompt_index == rollouts.prompt_index[i]).nonzero().flatten().tolist()
        others = sum(float(rollouts.rewards[j]) for j in same if j != i) / (len(same) - 1)
        whole_j = whole_j + (float(rollouts.rewards[i]) - others) * logps[i][mask[i]].sum()
    return gradient(whole_h / mask.sum(), model, retain=True), gradient(whole_j / len(mask), model)


def metric_of(root):
    """M from sqrt(v_hat) + eps, which is no smaller than a tenth of its mean where there was a gradient."""
    whole = torch.cat([part.flatten() for part in root.values()])
    live = whole > 1e-8 * (1 + 1e-6)
    return torch.where(live, 1 / whole.clamp(min=0.1 * float(whole[live].mean())), 0.0)


def parts_by_token(model, rollouts, directions):
    """(A_i grad S_ik) . direction of each token, one backward pass each."""
    logps, _ = distributions(model, rollouts)
    mask = rollouts.loss_mask.bool()
    found = [torch.zeros(mask.shape, dtype=torch.float64) for _ in directions]
    for i, k in mask.nonzero().tolist():
        of_token = float(rollouts.raw_advantages[i]) * gradient(logps[i, k], model, retain=True)
        for part, direction in zip(found, directions, strict=True):
            part[i, k] = of_token @ direction
    return found


def dearest(entropy, reward, mask, count):
    losing = [tuple(place) for place in mask.nonzero().tolist() if entropy[tuple(place)] < 0]

    def key(place):
        lost, earned = -float(entropy[place]), float(reward[place])
        return (0, -lost) if earned <= 0 else (1, -lost / earned)

    return sorted(losing, key=key)[:count]


def put(model, parameters):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(parameters[name])


@pytest.mark.slow
def test_the_dearest_tokens_have_no_loss(make_trainer):
    """In the second and third step; gradients are of the steps before, at their parameters, the newest weighs most."""
    kept = Kept()
    trainer, rows = trained(make_trainer, [kept], max_completion_length=8, **ALWAYS)
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    assert rows[0]["token_control/num_tokens"] == 0 and "token_control/entropy_share" not in rows[0]
    known = []
    for step in (1, 2):
        put(model, kept.parameters[step - 1])
        known.append(gradients_of_means(model, kept.rollouts[step - 1]))
        weights = [0.7**age for age in reversed(range(len(known)))]
        means = [sum(w * one[q] for w, one in zip(weights, known, strict=True)) / sum(weights) for q in (0, 1)]
        put(model, kept.parameters[step])
        rollouts, metric = kept.rollouts[step], metric_of(kept.metrics[step - 1])
        mask = rollouts.loss_mask.bool()
        entropy, reward = parts_by_token(model, rollouts, [metric * mean for mean in means])
        count = int(0.1 * int(mask.sum()))
        chosen = torch.zeros_like(mask)
        for place in dearest(entropy, reward, mask, count):
            chosen[place] = True
        left_out = mask & (rollouts.advantages != rollouts.raw_advantages[:, None])
        assert torch.equal(left_out, chosen) and int(chosen.sum()) == count
        row = rows[step]
        assert row["token_control/num_tokens"] == count
        for name, part in (("entropy", entropy), ("reward", reward)):
            assert row[f"token_control/{name}_share"] == pytest.approx(
                float(part[chosen].sum() / part.sum()), rel=1e-3
            )


def test_above_its_floor_training_is_the_plain_one(make_trainer):
    (plain, _), (controlled, rows) = (trained(make_trainer, **settings) for settings in ({}, NEVER))
    assert torch.equal(flat(plain), flat(controlled))
    assert [row["token_control/num_tokens"] for row in rows] == [0, 0, 0]
    assert all("token_control/entropy_share" not in row for row in rows)


def test_attribution_goes_with_it(make_trainer):
    """The tokens left out have no part in the step; the last step is not measured, as no prompt is left for it."""
    kept = Kept()
    _, rows = trained(make_trainer, [kept], entropy_probe=True, entropy_attribution="token", **ALWAYS)
    for rollouts, row in zip(kept.rollouts[1:], rows[1:], strict=True):
        left_out = (rollouts.advantages != rollouts.raw_advantages[:, None]) & rollouts.loss_mask.bool()
        assert int(left_out.sum()) == row["token_control/num_tokens"] > 0
        assert row["token_control/entropy_share"] != 0
    assert abs(rows[1]["entropy/attribution_rounding"]) < 1e-3


class Rises(Probe):
    """Puts the floor below the entropy in some steps."""

    def __init__(self, floors):
        super().__init__()
        self.floors = floors

    def on_rollouts(self, args, state, control, **kwargs):
        self.exchange.floor = self.floors[state.global_step]


def test_a_step_above_the_floor_ages_what_is_known(make_trainer):
    """Steps 1 and 3 are below it: tokens are left out in steps 2 and 4, and the older gradient weighs 0.7 squared."""
    rises = Rises([100.0, 1e-6, 100.0, 100.0])
    trainer = make_trainer(callbacks=[rises], max_steps=4, lr_scheduler_type="constant", **ALWAYS)
    rises.exchange = trainer.probe_runner.named_probes()["token_exchange"]
    trainer.train()
    rows = RunDirectory(trainer.args.output_dir).metrics()
    assert [row["token_control/num_tokens"] > 0 for row in rows] == [False, True, False, True]
    assert rises.exchange.running.weight == pytest.approx(0.3 * (0.7**3 + 0.7 + 1))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_run_is_the_unbroken_one(make_trainer, tmp_path, stop):
    points = []
    for name, stops in (("straight", [4]), ("resumed", [stop, 4])):
        for end in stops:
            trainer, rows = trained(
                make_trainer, max_steps=end, output_dir=str(tmp_path / name), save_strategy="steps", save_steps=1,
                resume_from_checkpoint="latest" if end > stops[0] else None, **ALWAYS,
            )  # fmt: skip
        logged = [{k: v for k, v in row.items() if k.startswith(("token_control/", "reward"))} for row in rows]
        points.append((flat(trainer), logged))
    assert torch.equal(points[0][0], points[1][0]) and points[0][1] == points[1][1]
    assert points[0][1][-1]["token_control/num_tokens"] > 0


def test_it_goes_with_lora_accumulation_and_a_floor_of_the_entropy(make_trainer, problems):
    peft_config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    settings = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "learning_rate": 3e-3}
    control = {"entropy_control": "floor", "entropy_control_target": 3.0, "entropy_control_completions": "rollouts"}
    _, rows = trained(make_trainer, peft_config=peft_config, **settings, **control, **ALWAYS)
    assert [row["token_control/num_tokens"] > 0 for row in rows] == [False, True, True]


def test_without_memory_the_gradients_are_of_the_last_step(make_trainer):
    trainer, rows = trained(make_trainer, token_control_gradient_ema=0.0, **ALWAYS)
    exchange = trainer.probe_runner.named_probes()["token_exchange"]
    assert exchange.running.sums == [] and exchange.directions is not None
    assert rows[-1]["token_control/num_tokens"] > 0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"token_control_floor": None}, "token_control_floor to an entropy above 0"),
        ({"token_control_floor": 0.0}, "token_control_floor to an entropy above 0"),
        ({"token_control_gradient_ema": 1.0}, r"token_control_gradient_ema in \[0, 1\)"),
        ({"token_control_scope": "micro_batch"}, "token_control_scope='optimizer_batch'"),
        ({"num_iterations": 2}, "num_iterations=1"),
        ({"loss_type": "dapo"}, "loss_type='dr_grpo'"),
        ({"beta": 0.1}, "beta=0"),
        ({"entropy_coef": 0.1}, "entropy_coef=0"),
        ({"optim": "lion_32bit"}, "optim='adamw_torch_fused'"),
        ({"top_k": 5}, "token_control='exchange': .*top_k=5"),
        ({"token_control": "random"}, "token_control_floor is 100.0, but nothing reads it"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(settings, message, tmp_path):
    defaults = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "num_generations": 4}
    with pytest.raises(ValueError, match=message):
        DrGRPOConfig(**(defaults | {"per_device_train_batch_size": 16} | ALWAYS | settings))


def test_sharded_parameters_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="DeepSpeed and FSDP spread them over processes"):
        DrGRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **ALWAYS)


def test_dropout_is_refused(make_trainer):
    peft_config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.3, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=r"lora_dropout=0\.3: token_control='exchange' computes the gradients"):
        make_trainer(peft_config=peft_config, disable_dropout=False, **ALWAYS)


def test_a_state_that_was_saved_is_taken_up():
    first, second = TokenExchange(1.0), TokenExchange(1.0)
    vector = {"a": torch.ones(3)}
    first.running.add((vector, vector))
    first.directions = vector, vector
    second.load_state_dict(first.state_dict())
    assert second.running.weight == first.running.weight and second.directions == (vector, vector)
    first.directions = None
    second.load_state_dict(first.state_dict())
    assert second.directions is None
