"""Draws completions of held-out prompts and scores their tokens, in batches that are halved when memory runs out."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from trl_entropy.evaluation.kept import KeptBatches
from trl_entropy.evaluation.plan import VLLM, Settings
from trl_entropy.evaluation.vllm_engine import VllmEngine
from trl_entropy.gradients.memory import halved_on_out_of_memory
from trl_entropy.gradients.scores import score
from trl_entropy.models.loading import EMBEDDED_AGENT, EMBEDDED_MODEL, EMBEDDED_MODELS, base_model_of, is_adapter
from trl_entropy.rollouts.drawing import own_randomness, pack_completions
from trl_entropy.rollouts.generation import answer_end
from trl_entropy.runs.strict_json import Json, Row
from trl_entropy.tasks.prompts import token_ids
from trl_entropy.tasks.r1_template import ANSWER_CLOSE

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# Logits in float32 that scoring may hold at once: 1 GiB; on a CPU 64 MiB, where larger batches are not faster.
_LOGITS_AT_ONCE, _LOGITS_AT_ONCE_ON_CPU = 2**28, 2**24
_EMBEDDED_OF_TASK = {
    "word_problems": EMBEDDED_MODEL, "explore": EMBEDDED_MODEL, "trap": EMBEDDED_MODEL, "calculator": EMBEDDED_AGENT
}  # fmt: skip
_DRAWN_AHEAD = 4096  # completions that an engine draws at once: enough to keep it busy, lost if it is cut off


def load_policy(model: str, settings: Settings, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a folder (a model or an adapter), from a name, or of an embedded start policy."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = _start_policy(settings, model) if model in EMBEDDED_MODELS else model
    base = name
    if is_adapter(name):
        base = base_model_of(name)
        embedded = _EMBEDDED_OF_TASK.get(settings.task["task"])
        if embedded is not None and Path(base).is_absolute() and not Path(base).exists():
            base = _start_policy(settings, embedded)  # the folder is the cache of another machine
    which = _which_model(base, settings)
    tokenizer = AutoTokenizer.from_pretrained(
        name, padding_side="left", truncation_side="left", **_which_model(name, settings)
    )
    policy = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, settings.dtype), **which)
    if is_adapter(name):
        policy = PeftModel.from_pretrained(policy, name)
        if settings.sampler == VLLM:  # vLLM takes whole weights, and the same weights must draw and score
            policy = policy.merge_and_unload()
    # With `logits_to_keep` the head gets a slice. torch's `linear` would multiply it completion by completion, since
    # the weight needs no gradient; in bfloat16 on a CPU it would copy the weight each time.
    policy.get_output_embeddings().register_forward_pre_hook(lambda head, given: (given[0].contiguous(), *given[1:]))
    return policy.to(device).eval(), tokenizer


def _which_model(name: str, settings: Settings) -> Json:
    """The run's settings of the model as far as they apply to this one: a checkpoint has no revision of its own."""
    if Path(name).parent.is_dir() and re.fullmatch(r"checkpoint-\d+", Path(name).name):
        return {key: value for key, value in settings.model.items() if key == "trust_remote_code"}
    return settings.model


def _start_policy(settings: Settings, name: str) -> str:
    from trl_entropy.models.warm_start import warm_start

    return str(warm_start(seed=settings.model_seed, name=name))


class Asked(NamedTuple):
    """
    A completion to draw.

    Attributes:
        problem: the dataset's row.
        prompt_ids: its prompt.
        completion_ids: what an engine has drawn already; None: it is to be drawn.
    """

    problem: Row
    prompt_ids: list[int]
    completion_ids: list[int] | None


@dataclass
class Sampler:
    """
    Draws completions and scores them. When memory runs out, `batch_size` is halved for the rest of the evaluation.

    Attributes:
        settings: how to sample.
        batch_size: completions at a time.
        engine: generates the completions in place of the model's `generate`; the model still scores them.
        kept: finished batches of an evaluation that was cut off, which are not drawn again; new ones are added.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    batch_size: int
    engine: VllmEngine | None = None
    kept: KeptBatches | None = None

    def __post_init__(self) -> None:
        from transformers import GenerationConfig

        self._ends = end_token_ids(self.model, self.tokenizer)
        self.model.generation_config = GenerationConfig()  # drop the model's own defaults, such as a top_k

    def draw(self, problems: Sequence[Row], greedy: bool) -> Iterator[tuple[int, Row]]:
        """
        Draw one completion of each problem's prompt, the longest prompts first, and yield (index of the problem, row).

        A row has `completion`, `completion_ids`, `logps` and `entropies` of the tokens in nats (at the sampling
        temperature, over the full vocabulary, for greedy completions too), `length`, and `clipped`: whether it reached
        the maximum length.

        A batch's random numbers are seeded by the index of its first completion in that order, so that an evaluation
        that goes on draws what an uninterrupted one draws.
        """
        prompts = [problem["prompt"] for problem in problems]
        prompt_ids = token_ids(prompts, self.tokenizer, **self.settings.chat_template_kwargs)
        order = sorted(range(len(prompts)), key=lambda place: -len(prompt_ids[place]))
        ahead: dict[int, list[int]] = {}  # completions by place that the engine has drawn already
        start = 0
        while start < len(order):
            rows = self._read(greedy, start)
            if rows is None:
                places = order[start : start + self.batch_size]
                if self.engine is not None and not ahead.keys() >= set(places):
                    some = order[start : start + max(_DRAWN_AHEAD, self.batch_size)]
                    ahead = self.engine.draw({place: prompt_ids[place] for place in some}, greedy, self._ends)
                asked = [Asked(problems[place], prompt_ids[place], ahead.get(place)) for place in places]
                rows = self._draw_and_keep(asked, greedy, start)
            yield from zip(order[start : start + len(rows)], rows, strict=True)
            start += len(rows)

    def _read(self, greedy: bool, start: int) -> list[Row] | None:
        """The kept rows from `start` on; the batch that follows is at most as large as it would have been."""
        rows = None if self.kept is None else self.kept.read(greedy, start)
        if rows is not None and self.kept is not None and self.kept.batch_size is not None:
            self.batch_size = min(self.batch_size, self.kept.batch_size)
        return rows

    def _draw_and_keep(self, asked: Sequence[Asked], greedy: bool, start: int) -> list[Row]:
        begin = time.monotonic()
        rows = self._within_memory(asked, greedy, start)
        if self.kept is not None:
            self.kept.write(greedy, start, rows, self.batch_size, time.monotonic() - begin)
        return rows

    def _within_memory(self, asked: Sequence[Asked], greedy: bool, start: int) -> list[Row]:
        """The rows of the first of these, of as many as fit into memory."""

        def attempt(size: int) -> list[Row]:
            self.batch_size = size
            return self._drawn(asked[:size], greedy, start)

        return halved_on_out_of_memory(attempt, self.batch_size)

    def _drawn(self, asked: Sequence[Asked], greedy: bool, start: int) -> list[Row]:
        """The rows of these."""
        prompt_ids = [one.prompt_ids for one in asked]
        known = [one.completion_ids for one in asked if one.completion_ids is not None]
        completion_ids = known or self._draw_batch(prompt_ids, greedy, start)
        return self._scored(prompt_ids, [self._cut(ids) for ids in completion_ids])

    def _draw_batch(self, prompt_ids: list[list[int]], greedy: bool, start: int) -> list[list[int]]:
        device = self.model.device
        pad_token_id = _pad_token_id(self.tokenizer)
        width = max(map(len, prompt_ids))
        input_ids = torch.tensor([[pad_token_id] * (width - len(ids)) + ids for ids in prompt_ids], device=device)
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompt_ids], device=device)
        with own_randomness((self.settings.seed, int(greedy), start), device), torch.no_grad():
            output = self.model.generate(
                input_ids=input_ids, attention_mask=mask, generation_config=self._generation_config(greedy),
                **({"tokenizer": self.tokenizer} if self.settings.stop_at_answer else {}),
            )  # fmt: skip
        return output[:, width:].tolist()

    def _generation_config(self, greedy: bool) -> GenerationConfig:
        from transformers import GenerationConfig

        how: Row = {"do_sample": False} if greedy else {"do_sample": True, **self.settings.sampling}
        if self.settings.stop_at_answer:
            how["stop_strings"] = ANSWER_CLOSE
        return GenerationConfig(
            max_new_tokens=self.settings.max_completion_length,
            pad_token_id=_pad_token_id(self.tokenizer),
            eos_token_id=sorted(self._ends),
            **how,
        )

    def _cut(self, ids: list[int]) -> tuple[list[int], bool]:
        """The completion up to its end token, and whether it was cut off at the maximum length."""
        cut, ended = first_end(ids, self._ends)
        if self.settings.stop_at_answer and (answered := answer_end(self.tokenizer, cut, ANSWER_CLOSE)) is not None:
            return cut[:answered], False
        return cut, not ended

    def _scored(
        self,
        prompt_ids: list[list[int]],
        ended: list[tuple[list[int], bool]],
        own_tokens: list[list[int]] | None = None,
    ) -> list[Row]:
        """
        The rows of completions.

        Args:
            ended: token ids, and whether they were cut off.
            own_tokens: 1 for each token that the policy drew, 0 for those of tools and environments; None: all are.
        """
        pad_token_id, vocabulary = _pad_token_id(self.tokenizer), self.model.config.vocab_size
        completion_ids = [ids for ids, _ in ended]
        own = own_tokens or [[1] * len(ids) for ids in completion_ids]
        packed = pack_completions(
            prompt_ids, completion_ids, 0, pad_token_id, self.model.device, own_tokens=own_tokens
        )
        logits = _LOGITS_AT_ONCE_ON_CPU if self.model.device.type == "cpu" else _LOGITS_AT_ONCE
        at_once = max(1, logits // (vocabulary * (max(map(len, completion_ids)) + 1)))
        temperature = float(self.settings.sampling["temperature"])
        scores = score(self.model, packed, temperature, min(at_once, len(ended)))
        logps, entropies = scores.logps[0].float().tolist(), scores.entropy[0].float().tolist()
        return [
            {
                "completion": self.tokenizer.decode(ids, skip_special_tokens=True),
                "completion_ids": [*compress(ids, own[row])],
                "logps": [*compress(logps[row], own[row])],
                "entropies": [*compress(entropies[row], own[row])],
                "length": sum(own[row]),
                "clipped": clipped,
            }
            for row, (ids, clipped) in enumerate(ended)
        ]


def first_end(ids: list[int], ends: set[int]) -> tuple[list[int], bool]:
    """The tokens up to and with the first end token, and whether there is one."""
    place = next((place for place, token in enumerate(ids) if token in ends), None)
    return (ids, False) if place is None else (ids[: place + 1], True)


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a completion: that of the tokenizer and those of the generation config."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return {token for token in (*configured, tokenizer.eos_token_id) if token is not None}


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
