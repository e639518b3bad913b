"""What a step was made of is known, so that held-out prompts are none of its own."""

import itertools

import pytest
from datasets import Dataset

from trl_entropy import Probe
from trl_entropy.trainer import probe_batches
from trl_entropy.trainer.step_prompts import most_generations


@pytest.mark.parametrize("micro_batches, per_generation", list(itertools.product(range(1, 8), repeat=2)))
def test_a_step_comes_from_at_most_so_many_generations(micro_batches, per_generation):
    """Counted over all steps until both begin together again."""
    generations = [index // per_generation for index in range(micro_batches * per_generation)]
    steps = itertools.batched(generations, micro_batches) if hasattr(itertools, "batched") else (
        generations[start : start + micro_batches] for start in range(0, len(generations), micro_batches)
    )  # fmt: skip
    assert most_generations(micro_batches, per_generation) == max(len(set(step)) for step in steps)


class Prompts(Probe):
    """Keeps the prompts of each step."""

    def __init__(self, decode):
        super().__init__()
        self.decode, self.steps = decode, []

    def on_before_update(self, args, state, control, *, rollouts, **kwargs):
        rows = zip(rollouts.prompt_ids, rollouts.prompt_mask.bool(), strict=True)
        self.steps.append({self.decode(ids[mask]) for ids, mask in rows})


@pytest.mark.slow
def test_held_out_prompts_are_none_of_a_step_that_spans_two_generations(make_trainer, tokenizer, monkeypatch):
    """Generations of three prompts, steps of two: every other step has prompts of two generations."""
    drawn, draw = [], probe_batches.draw_rows

    def drawing(*given):
        drawn.append(draw(*given))
        return drawn[-1]

    monkeypatch.setattr(probe_batches, "draw_rows", drawing)
    prompts = Prompts(lambda ids: tokenizer.decode(ids, skip_special_tokens=True))
    make_trainer(
        callbacks=[prompts],
        dataset=Dataset.from_dict({"prompt": [f"Ann has {i} apples." for i in range(12)]}),
        entropy_probe=True,
        entropy_probe_completions="held_out",
        entropy_probe_num_completions=6,
        max_completion_length=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=3,
        max_steps=12,
    ).train()
    assert len(drawn) == len(prompts.steps) == 12 and all(len(step) == 2 for step in prompts.steps)
    for held_out, step in zip(drawn, prompts.steps, strict=True):
        assert not {row["prompt"].strip() for row in held_out} & {prompt.strip() for prompt in step}
