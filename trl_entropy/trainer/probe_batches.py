"""`ProbeBatches`: draws probe batches with the trainer's own generation, without changing the course of training."""

from __future__ import annotations

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import ConcatDataset
from transformers import Trainer
from trl.chat_template_utils import parse_response
from trl.data_utils import is_conversational

from trl_entropy.engine.parameters import evaluation_mode
from trl_entropy.rollouts.completions import Completions
from trl_entropy.rollouts.drawing import draw_rows, has_images, own_randomness, pack_completions, prompt_of
from trl_entropy.rollouts.generation import generating_with_the_model
from trl_entropy.rollouts.pixel_inputs import COLUMN_KEYS, IMAGE_KEYS, PixelInputs
from trl_entropy.trainer.bases import generate_single_turn
from trl_entropy.trainer.completion_values import have_ended, scoring_leaves_no_trace
from trl_entropy.trainer.step_prompts import StepPrompts


class ProbeBatches:
    """
    The trainer's [`~trl_entropy.rollouts.drawing.ProbeBatchSampler`]. A draw does not change training's random state,
    the order of its prompts, or its metrics.

    Written against trl 1.16, whose `_tokenize_prompts`, `_generate_single_turn` and `_generate` it calls.

    Args:
        trainer: the trainer whose policy, datasets and generation are used.
        step_prompts: the prompts of the present step, which a draw of held-out prompts leaves out.
    """

    def __init__(self, trainer: Trainer, step_prompts: StepPrompts) -> None:
        self._trainer, self._step_prompts = trainer, step_prompts

    def draw(
        self, num_prompts: int, source: str, step: int, sampler: str = "model", with_values: bool = False
    ) -> Completions:
        """See [`~trl_entropy.rollouts.drawing.ProbeBatchSampler`]."""
        trainer = self._trainer
        dataset = trainer.train_dataset if source == "held_out" else trainer.eval_dataset
        if isinstance(dataset, dict):  # all sets together: rows are drawn by number, and their columns may differ
            dataset = ConcatDataset(list(dataset.values()))
        exclude = self._step_prompts.all() if source == "held_out" else set()
        rank, share = trainer.accelerator.process_index, num_prompts // trainer.accelerator.num_processes
        seed = trainer.args.seed
        rows = draw_rows(dataset, num_prompts, exclude, (seed, step))[rank * share : (rank + 1) * share]
        own_sampler = generating_with_the_model(trainer) if sampler == "model" else contextlib.nullcontext()
        with own_sampler:
            drawn = self._draw(list(map(prompt_of, rows)), (seed, step, rank), rank * share)
        if with_values and trainer.completion_values.keys:
            return replace(drawn.packed, values=self._values(rows, drawn))
        return drawn.packed

    def check_alike(self) -> None:
        """See [`~trl_entropy.rollouts.drawing.ProbeBatchSampler`]."""
        trainer = self._trainer
        if trainer.environments:
            raise ValueError("training's prompts are made by environments, which a probe does not reset")
        dataset = trainer.train_dataset
        if not isinstance(dataset, Dataset) or "prompt" not in dataset.column_names:
            raise ValueError(
                "the dataset is streamed or has no column of prompts, so that none can be drawn by number"
            )

    def draw_completions(self, prompts: list[Any], seed: tuple[int, ...], first_prompt: int = 0) -> Completions:
        """
        One completion of each prompt, numbered from `first_prompt`, by the trainer's present generation. Local.

        With tools, or with a `rollout_func`, a completion is a whole episode, whose environment tokens `loss_mask`
        leaves out; then all processes must call this together, with equally many prompts.
        """
        return self._draw(prompts, seed, first_prompt).packed

    def _draw(self, prompts: list[Any], seed: tuple[int, ...], first_prompt: int) -> _Drawn:
        trainer, device = self._trainer, self._trainer.accelerator.device
        model = trainer.accelerator.unwrap_model(trainer.model)
        own_tokens, images, fields, episodes, more = None, None, {}, None, {}
        with own_randomness(seed, device), evaluation_mode(model):  # the policy that is scored has no dropout
            if trainer.tools or trainer.rollout_func is not None:
                if any(map(has_images, prompts)):
                    raise ValueError("the prompts have images, which TRL does not hand over of episodes with tools")
                with _generating_episodes(trainer, len(prompts)):
                    made = trainer._generate(prompts)
                prompt_ids, completion_ids, own_tokens, episodes, logps, more, *_, shown = made
                if any(shown):
                    raise ValueError(
                        "a tool answered with images, which a draw of episodes for a probe or a control drops. "
                        "Measure on the completions of the steps themselves (entropy_probe_completions, "
                        "entropy_control_completions)."
                    )
            else:
                prompt_ids, images, fields = trainer._tokenize_prompts(prompts)
                completion_ids, logps = generate_single_turn(trainer, prompt_ids, images, fields)
        packed = pack_completions(
            prompt_ids, completion_ids, first_prompt, trainer._tokenizer.pad_token_id, device, logps, own_tokens
        )
        if fields:
            packed = _with_images(packed, images, fields)
        return _Drawn(packed, prompt_ids, completion_ids, own_tokens, episodes, more)

    def _values(self, rows: list[dict[str, Any]], drawn: _Drawn) -> dict[str, torch.Tensor]:
        """What the probes measure the change of: rewards and metrics as training computes them. Collective."""
        trainer, values, ids = self._trainer, self._trainer.completion_values, drawn.completion_ids
        prompts = list(map(prompt_of, rows))
        completions = drawn.episodes or _as_messages(trainer, prompts, drawn.prompt_ids, ids)
        given = [
            row | {name: column[place] if isinstance(column, list) else column for name, column in drawn.more.items()}
            for place, row in enumerate(rows)
        ]
        columns = dict.fromkeys(name for row in given for name in row)  # sets of evaluation prompts may differ in them
        given = [dict.fromkeys(columns) | row for row in given]
        values.note_ends(have_ended(trainer, ids, drawn.own_tokens))
        with scoring_leaves_no_trace(trainer), evaluation_mode(trainer.accelerator.unwrap_model(trainer.model)):
            trainer._calculate_rewards(given, prompts, completions, ids)
        return values.columns(drawn.packed.lengths)


class _Drawn(NamedTuple):
    """
    Completions as they were drawn.

    Attributes:
        packed: the same as tensors.
        own_tokens: 1 for each token that the policy drew; None: it drew all.
        episodes: the messages of episodes with tools, or what TRL makes of a `rollout_func`'s; None: no episodes.
        more: further columns for reward functions, of a `rollout_func`.
    """

    packed: Completions
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    own_tokens: list[list[int]] | None
    episodes: list[Any] | None
    more: Mapping[str, Any]


def _as_messages(trainer: Any, prompts: list[Any], prompt_ids: list[list[int]], ids: list[list[int]]) -> list[Any]:
    """Completions as TRL 1.16's `_generate` hands them to reward functions: texts, or conversations of one message."""
    if is_conversational({"prompt": prompts[0]}):
        tokenizer = trainer._tokenizer
        if getattr(tokenizer, "response_template", None) or getattr(tokenizer, "response_schema", None):
            return [
                [parse_response(tokenizer, own, prefix=prefix, tools=trainer.tools)]
                for own, prefix in zip(ids, prompt_ids, strict=True)
            ]
        contents = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
        return [[{"role": "assistant", "content": content}] for content in contents]
    return trainer.processing_class.batch_decode(ids, skip_special_tokens=True)


def _with_images(completions: Completions, images: list[list[Any] | None] | None, fields: Mapping) -> Completions:
    """
    The same with the images of the prompts.

    Args:
        images: by prompt.
        fields: what the processor made of them and of the prompts: tensors, arrays, or lists by prompt and token.
    """
    device = completions.input_ids.device
    width = completions.input_ids.shape[1] - completions.completion_mask.shape[1]
    types = {name: fields[name] for name in COLUMN_KEYS if name in fields}
    counts = [len(of_prompt or ()) for of_prompt in images or [None] * len(completions)]
    pixels = {name: _as_tensor(fields[name]).to(device) for name in IMAGE_KEYS if name in fields}
    columns = {name: torch.zeros_like(completions.input_ids) for name in types}
    for name, rows in types.items():
        for row, values in enumerate(rows):
            columns[name][row, width - len(values) : width] = torch.as_tensor(values, device=device)
    return replace(
        completions,
        pixel_inputs=PixelInputs.of(pixels | {"num_images": counts}, len(completions)),
        column_types=columns,
    )


def _as_tensor(values: Any) -> torch.Tensor:
    return values if isinstance(values, torch.Tensor) else torch.tensor(np.array(values))


@contextlib.contextmanager
def _generating_episodes(trainer: Any, num_prompts: int) -> Iterator[None]:
    """
    Let TRL's `_generate` draw episodes for a probe: one of each prompt, with the tools that belong to no environment,
    and without a trace in the trainer's metrics and counts.
    """
    count = trainer.state.num_input_tokens_seen
    tools = {name: vars(trainer).get(name) for name in ("_sync_tool_dicts", "_async_tool_dicts")}
    kept = {name: getattr(trainer, name) for name in ("_metrics", "num_generations", "num_generations_eval")}
    by_name: tuple[dict[str, Any], dict[str, Any]] = {}, {}
    for tool in trainer.tools:
        by_name[inspect.iscoroutinefunction(tool)][tool.__name__] = tool
    vars(trainer).update(
        _metrics=defaultdict(lambda: defaultdict(list)),
        num_generations=1,
        num_generations_eval=1,
        _sync_tool_dicts=[by_name[0]] * num_prompts,
        _async_tool_dicts=[by_name[1]] * num_prompts,
    )
    try:
        yield
    finally:
        vars(trainer).update(kept | tools)
        trainer.state.num_input_tokens_seen = count
