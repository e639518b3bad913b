"""Drawing the completions that a probe measures on: independent of the step's own, without changing training."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import ConcatDataset
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.utils import pad

from trl_entropy.rollouts.completions import Completions
from trl_entropy.runs.counted import counted


@runtime_checkable
class ProbeBatchSampler(Protocol):
    """Draws a probe batch: completions that are independent of the step's own."""

    def draw(
        self, num_prompts: int, source: str, step: int, sampler: str = "model", with_values: bool = False
    ) -> Completions:
        """
        This process's share of a probe batch that is drawn from the present policy, one completion per prompt.

        Args:
            num_prompts: number of prompts over all processes.
            source: `"held_out"`: training prompts that are not among this step's; `"eval"`: `eval_dataset`.
            step: seeds the draw, together with the run's seed.
            sampler: `"model"`: the model's own `generate`; `"vllm"`: the vLLM that generates the rollouts, with its
                log-probabilities. The random state of a vLLM server does advance.
            with_values: score them too, for what probes measure the change of: `Completions.values`. Collective.
        """

    def check_alike(self) -> None:
        """Raises `ValueError` unless a draw of held-out prompts is what training's own completions are made by."""


def prompt_key(prompt: Any) -> str:
    """A string that identifies a prompt, plain or conversational: equal for equal prompts."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=_key_of_image)


def _key_of_image(value: Any) -> str:
    """An image by its size and 256 of its pixels, which is quick however large it is; anything else as text."""
    if not hasattr(value, "resize") or not hasattr(value, "tobytes"):
        return str(value)
    return f"{value.size} {hashlib.sha1(value.resize((16, 16), 0).tobytes()).hexdigest()}"


def prompt_of(row: Mapping[str, Any]) -> Any:
    """The prompt of a row of a dataset, with the row's images in it, as TRL puts them."""
    if "images" not in row and "image" not in row:
        return row["prompt"]
    images = row["images"] if "images" in row else [row["image"]] if row["image"] is not None else None
    return prepare_multimodal_messages(row["prompt"], images=images or None)


def has_images(prompt: Any) -> bool:
    """Whether a conversation has messages with images."""
    contents = [message.get("content") for message in prompt] if isinstance(prompt, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, dict) and part.get("type") == "image" for part in parts)


def prompts_of(dataset: Any) -> Iterator[str]:
    """Keys of all prompts in order; nothing for a streamed dataset."""
    if isinstance(dataset, Dataset):
        yield from map(prompt_key, dataset["prompt"])


def draw_rows(
    dataset: Dataset | ConcatDataset, num_prompts: int, exclude: Collection[str], seed: tuple[int, ...]
) -> list[dict[str, Any]]:
    """
    Rows of `dataset` with distinct prompts (see [`prompt_of`]) outside `exclude`, drawn with a random generator of
    their own; equal on all ranks.

    Raises:
        ValueError: if the dataset has too few other prompts.
    """
    chosen: list[dict[str, Any]] = []
    taken = set(exclude)
    for number in np.random.default_rng(seed).permutation(len(dataset)).tolist():
        row = dataset[number]
        if (key := prompt_key(prompt_of(row))) not in taken:
            taken.add(key)
            chosen.append(row)
        if len(chosen) == num_prompts:
            return chosen
    raise ValueError(
        f"the dataset has only {counted(len(chosen), 'distinct prompt')} beside those of this step, but a probe "
        f"batch takes {num_prompts}. Lower entropy_probe_num_completions (entropy_control_num_completions), or train "
        "on more problems."
    )


def pack_completions(
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    first_prompt: int,
    pad_token_id: int,
    device: Any,
    sampling_logps: list[list[float | None]] | None = None,
    own_tokens: list[list[int]] | None = None,
) -> Completions:
    """
    One completion per prompt as padded tensors; rows are numbered from `first_prompt`.

    Args:
        sampling_logps: one that the sampler does not know (vLLM's are nan at times, which TRL makes None) becomes nan.
        own_tokens: 1 for each token that the policy drew, 0 for those of tools and environments; None: it drew all.
    """

    def padded(rows: list, value: float, side: str, dtype: torch.dtype = torch.long) -> torch.Tensor:
        return pad([torch.tensor(row, dtype=dtype) for row in rows], padding_value=value, padding_side=side).to(device)

    def ones(rows: list[list[int]]) -> list[list[int]]:
        return [[1] * len(ids) for ids in rows]

    known: list[list[float]] | None = None
    if sampling_logps is not None:
        known = [[math.nan if logp is None else logp for logp in row] for row in sampling_logps]
    prompts, completions = padded(prompt_ids, pad_token_id, "left"), padded(completion_ids, pad_token_id, "right")
    prompt_mask, completion_mask = padded(ones(prompt_ids), 0, "left"), padded(ones(completion_ids), 0, "right")
    return Completions(
        input_ids=torch.cat([prompts, completions], dim=1),
        attention_mask=torch.cat([prompt_mask, completion_mask], dim=1),
        completion_mask=completion_mask,
        loss_mask=completion_mask if own_tokens is None else padded(own_tokens, 0, "right"),
        prompt_index=torch.arange(first_prompt, first_prompt + len(prompt_ids), device=device),
        sampling_logps=None if known is None else padded(known, 0.0, "right", torch.float32),
    )


@contextlib.contextmanager
def own_randomness(seed: tuple[int, ...], device: torch.device) -> Iterator[None]:
    """
    Seed torch and numpy inside the context and restore their random states after it: training's draws do not change.

    The model's own `generate` draws with torch. vLLM inside this process does too, or takes each completion's seed
    from numpy (its second model runner, which it uses on a GPU).
    """
    sequence, state = np.random.SeedSequence(seed), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
        np.random.seed(sequence.generate_state(4))
        try:
            yield
        finally:
            np.random.set_state(state)
