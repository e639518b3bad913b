"""Changes of how TRL's trainer generates: ending completions at a text, and using the model itself instead of vLLM."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from transformers import GenerationConfig


def answer_end(tokenizer: Any, completion_ids: list[int], tag: str) -> int | None:
    """
    Number of tokens up to and including the one that completes `tag`; None if the completion has no `tag`.

    Found by bisection over prefixes, since a tag may consist of several tokens or end inside one.
    """

    def closed(num_tokens: int) -> bool:
        return tag in tokenizer.decode(completion_ids[:num_tokens], skip_special_tokens=True)

    if not closed(len(completion_ids)):
        return None
    low, high = 0, len(completion_ids)  # closed(high) holds, closed(low) does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if closed(middle) else (middle, high)
    return high


def last_turn(completion_ids: list[int], own_tokens: list[int]) -> list[int]:
    """The tokens after the last one of a tool or an environment; `own_tokens` is 1 for those that the policy drew."""
    return completion_ids[len(own_tokens) - own_tokens[::-1].index(0) :] if 0 in own_tokens else completion_ids


@contextlib.contextmanager
def stopping_at(model: Any, tokenizer: Any, text: str) -> Iterator[None]:
    """
    Make `model.generate` stop a completion once it contains `text`.

    `stop_strings` needs a tokenizer, which TRL does not pass to `generate`; both are bound to it inside the context.
    """
    generate = model.generate
    model.generate = functools.partial(generate, stop_strings=text, tokenizer=tokenizer)
    try:
        yield
    finally:
        del model.generate


def turn_ended_at(trainer: Any, text: str, draw: Callable[[], Any]) -> Any:
    """What `draw` returns, TRL's `_generate_single_turn`, with completions that end once they contain `text`."""
    with stopping_at(trainer.accelerator.unwrap_model(trainer.model), trainer._tokenizer, text):
        completion_ids, logprobs = draw()
    ends = [answer_end(trainer._tokenizer, ids, text) for ids in completion_ids]
    completion_ids = [ids[:end] for ids, end in zip(completion_ids, ends, strict=True)]
    if logprobs is not None:
        logprobs = [values[:end] for values, end in zip(logprobs, ends, strict=True)]
    return completion_ids, logprobs


@contextlib.contextmanager
def generating_with_the_model(trainer: Any) -> Iterator[None]:
    """
    Make TRL's trainer generate with the model itself, from its full distribution: even if rollouts come from vLLM, and
    whatever the run's settings or the model's own keep from being drawn.

    Written against trl 1.16, whose `_generate_single_turn` reads the attributes that are set here.
    """
    settings = {
        "max_new_tokens": trainer.max_completion_length,
        "do_sample": True,
        "temperature": trainer.temperature,
        "top_k": 0,
        "pad_token_id": trainer._tokenizer.pad_token_id,
        "eos_token_id": trainer.eos_token_ids,
    }
    if stops := (trainer.args.generation_kwargs or {}).get("stop_strings"):
        settings["stop_strings"] = stops
    if trainer._is_vlm:  # as TRL does: the token stands for pixels, and the policy cannot draw it
        settings["suppress_tokens"] = [trainer.model.config.image_token_id]
    config = GenerationConfig(**settings, disable_compile=True)
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # inside peft's wrapper
    changed: dict[str, Any] = {"generation_config": config, "generation_kwargs": settings}
    changed |= {"use_vllm": False, "use_transformers_continuous_batching": False}
    kept = {name: getattr(trainer, name, None) for name in changed}
    of_model, model.generation_config = model.generation_config, config  # from which generate takes what is not set
    vars(trainer).update(changed)
    try:
        yield
    finally:
        vars(trainer).update(kept)
        model.generation_config = of_model
