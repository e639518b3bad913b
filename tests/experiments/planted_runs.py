"""Runs with planted numbers: what a policy over a few tokens would have left."""

import numpy as np
import torch

from trl_entropy.runs.step_files import write_probe_file
from trl_entropy.runs.strict_json import to_line

NUM_PROMPTS, NUM_GENERATIONS, VOCABULARY = 4, 4, 6


def drawn(generator, num_tokens):
    """Scores of completions whose every token is drawn from a distribution of its own, by name."""
    rows = NUM_PROMPTS * NUM_GENERATIONS
    logits = 1.5 * generator.standard_normal((rows, num_tokens, VOCABULARY))
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    tokens = (p.cumsum(-1) > generator.random((rows, num_tokens, 1))).argmax(-1)
    logps = np.log(np.take_along_axis(p, tokens[..., None], -1)[..., 0])
    entropy = -(p * np.log(p)).sum(-1)
    return {
        "logps_before": logps, "entropy_before": entropy, "entropy_after": entropy.copy(),
        "sum_squared_before": (p**2).sum(-1),
        "mean_discriminator_before": (p**2 * (np.log(p) + entropy[..., None])).sum(-1),
    }  # fmt: skip


def right_answers(generator):
    """0 and 1, in each group one to three right answers; and the advantages."""
    rewards = np.zeros((NUM_PROMPTS, NUM_GENERATIONS))
    for group, number in zip(rewards, generator.integers(1, NUM_GENERATIONS, NUM_PROMPTS), strict=True):
        group[generator.permutation(NUM_GENERATIONS)[:number]] = 1
    return rewards.ravel(), (rewards - rewards.mean(1, keepdims=True)).ravel()


def write_step(path, step, rewards, advantages, scores=None, attribution=None, kernel=None):
    """The files of a step; numbers of tokens have a row for each completion."""
    prompts = np.repeat(np.arange(NUM_PROMPTS), NUM_GENERATIONS) + NUM_PROMPTS * step
    num_tokens = 1 if scores is None else scores["logps_before"].shape[1]
    shared = {"completion_mask": np.ones((len(prompts), num_tokens), dtype=bool), "prompt_index": prompts}
    ids = {"input_ids": np.ones((len(prompts), 2 + num_tokens), dtype=np.int32)}
    write(path, "rollouts", step, shared | ids | {"rewards": rewards, "advantages": advantages})
    if scores is not None:
        write(path, "likelihood", step, shared | scores)
    if attribution is not None:
        of_tokens = {"logps": scores["logps_before"], "entropy": scores["entropy_before"]}
        of_tokens |= {"attribution": attribution, "loss_coefficients": np.ones_like(attribution)}
        write(path, "attribution", step, shared | {"raw_advantages": advantages} | of_tokens)
    if kernel is not None:
        write(path, "fisher", step, {"kernel": kernel, "rows": np.arange(len(kernel)), "prompt_index": prompts})


def write(path, probe, step, arrays):
    tensors = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in arrays.items()}
    tensors = {name: value.float() if value.dtype == torch.float64 else value for name, value in tensors.items()}
    write_probe_file(path, probe, step, tensors, {}, None)


def write_metrics(path, rows):
    path.mkdir(parents=True, exist_ok=True)
    lines = [to_line({"step": step, **row}) for step, row in enumerate(rows, start=1)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
