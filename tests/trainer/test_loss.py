"""The loss and its gradient against (T1), (T2) in float64, written out as loops."""

import pytest
import torch

from trl_entropy.gradients.float64_reference import float64_reference

LENGTHS = [1, 12, 3, 7, 2, 2, 11, 5, 12, 12, 1, 1, 4, 9, 6, 8]  # 4 prompts x 4 completions
EPSILON, BETA = 0.2, 0.3


def scripted_completions(lengths, vocab_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab_size, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture
def scripted(monkeypatch, make_trainer, problems):
    """A trainer whose rollouts are given, with the micro-batches of its step: policy moved off the sampling one."""

    def build(normalizer, accumulation, beta):
        trainer = make_trainer(
            length_normalizer=normalizer,
            per_device_train_batch_size=16 // accumulation,
            gradient_accumulation_steps=accumulation,
            num_iterations=2,  # TRL then keeps the sampling policy's log-probabilities
            beta=beta,
            epsilon=EPSILON,
        )
        completions = scripted_completions(LENGTHS, 400)
        monkeypatch.setattr(trainer, "_generate_single_turn", lambda *a, **k: (completions, None))
        trainer.model.train()
        rows = [{"prompt": problems[i]["prompt"]} for i in range(4) for _ in range(4)]
        trainer.current_gradient_accumulation_steps = accumulation
        batches = []
        for trainer._step in range(accumulation):
            batches.append(trainer._prepare_inputs(rows))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        return trainer, batches, completions

    return build


def oracle(trainer, batches, completions, normalizer, beta):
    """Loss and gradient in float64: loops over prompts, completions and tokens, rewards and groups from the script."""
    rewards = [sum(t % 2 for t in ids) / len(ids) for ids in completions]
    rows = {tuple(ids): i for i, ids in enumerate(completions)}
    model, terms, clipped = trainer.model, [], 0
    with float64_reference(model):
        for batch in batches:
            ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
            mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
            width = batch["completion_ids"].shape[1]
            logps = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
            for row, tokens in enumerate(batch["completion_ids"]):
                length = int(batch["completion_mask"][row].sum())
                i = rows[tuple(tokens[:length].tolist())]
                group = range(i // 4 * 4, i // 4 * 4 + 4)
                advantage = rewards[i] - sum(rewards[j] for j in group) / 4
                normalizer_length = 12 if normalizer == "max_completion_length" else max(LENGTHS[j] for j in group)
                for k in range(length):
                    logp = logps[row, ids.shape[1] - width + k - 1, tokens[k]]
                    ratio = (logp - batch["old_per_token_logps"][row, k].double()).exp()
                    bounded = ratio.clamp(1 - EPSILON, 1 + EPSILON)
                    clipped += bool(bounded * advantage < ratio * advantage)
                    term = -torch.minimum(ratio * advantage, bounded * advantage) / normalizer_length
                    if beta:
                        d = batch["ref_per_token_logps"][row, k].double() - logp
                        # The ratio is TRL's `use_bias_correction_kl`, on by default; L_i is not for the KL term.
                        term = term + beta * ratio * (d.exp() - d - 1) / 12
                    terms.append(term / 16)
        loss = torch.stack(terms).sum()
        gradient = torch.autograd.grad(loss, list(model.parameters()))
    assert clipped > 5, "the case does not exercise clipping"
    return loss.item(), torch.cat([g.flatten() for g in gradient])


@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("normalizer", ["max_completion_length", "group_max"])
def test_loss_and_gradient_are_those_of_the_equation(scripted, normalizer, accumulation, beta):
    trainer, batches, completions = scripted(normalizer, accumulation, beta)
    expected_loss, expected_gradient = oracle(trainer, batches, completions, normalizer, beta)
    trainer.accelerator.gradient_state._set_sync_gradients(False)  # no step is being made
    losses = [trainer._compute_loss(trainer.model, batch) for batch in batches]
    gradient = torch.autograd.grad(sum(losses), list(trainer.model.parameters()))
    gradient = torch.cat([g.flatten() for g in gradient]).double()
    assert sum(losses).item() == pytest.approx(expected_loss, rel=2e-5)
    assert (gradient - expected_gradient).norm() < 2e-5 * expected_gradient.norm()
