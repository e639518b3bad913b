"""
Entropies and log-probabilities of completion tokens with the logits of a few tokens at a time.

The logits of a batch, (B, T, V), are larger than all else that scoring needs: 0.6 MB a token at 152,000 entries. So
the model's body runs once, and its head, with whatever the model makes of its output (a scale, a softcap), for some
columns of the completions after the others. A backward pass makes the logits of a chunk again. In forward mode the
tangents of a chunk exist with the chunk alone.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils.memory import should_reduce_batch_size
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trl_entropy.config.settings_file import one_line
from trl_entropy.engine.strict_float32 import patched
from trl_entropy.estimators.entropy_change.entropy import entropy_and_logps
from trl_entropy.gradients.inputs import base_model, model_inputs
from trl_entropy.rollouts.completions import Completions

logger = logging.getLogger(__name__)

# Logits of a chunk, numbers: on a CPU 64 MiB in float32; on an accelerator, where small products leave it idle, more.
LOGITS_AT_ONCE_ON_CPU, LOGITS_AT_ONCE = 2**24, 2**26
# Rounding of the scores in units of their dtype by which both ways may differ, relative to the largest score.
_ROUNDING = 64
_TRIED_COLUMNS = 3

# (keywords of the model's forward) -> its output, whose `logits` are read
Call = Callable[[dict[str, Any]], Any]
Scores = tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]
# The body of each model whose head can be applied to some columns after the others, else None; found out once.
_BODIES: WeakKeyDictionary[nn.Module, nn.Module | None] = WeakKeyDictionary()


def chunked_scores(
    model: nn.Module, completions: Completions, temperature: float, recompute: bool, call: Call | None = None
) -> Scores:
    """
    Entropy and log-probability of every completion token, nats, columns with and without a token alike.

    At most `logits_at_once` logits exist at a time, and at least one column's. A batch with fewer is scored as one, as
    is that of a model whose head cannot be applied in parts: on first use both ways are compared on a few tokens.

    Args:
        model: unwrapped.
        temperature: that the logits are divided by.
        recompute: for a backward pass; the logits of a chunk are then made again instead of kept. Not in forward mode.
        call: calls the model, by default `model(**keywords)`.
    """
    inputs, width = model_inputs(model, completions), completions.completion_mask.shape[1]
    call = call or (lambda keywords: model(**keywords))
    columns = columns_at_once(model, len(completions), completions.input_ids.device)
    body = _body(model, completions) if columns < width else None
    if body is not None:
        return _Chunks(base_model(model), body, completions, inputs, temperature, columns, recompute).scores(call)
    return entropy_and_logps(call(inputs).logits[:, :-1], completions.input_ids[:, -width:], temperature)


def logits_at_once(on_cpu: bool) -> int:
    """How many logits, tokens times vocabulary, are computed at a time."""
    return LOGITS_AT_ONCE_ON_CPU if on_cpu else LOGITS_AT_ONCE


def columns_at_once(model: nn.Module, num_rows: int, device: torch.device) -> int:
    """Columns of `num_rows` completions in a chunk, at least one."""
    return max(1, logits_at_once(device.type == "cpu") // (num_rows * max(1, vocabulary_size(model))))


def vocabulary_size(model: nn.Module) -> int:
    """Logits of a token; 0 for a model that is none of transformers."""
    base = base_model(model)
    if not hasattr(base, "get_output_embeddings"):
        return 0
    size = getattr(base.get_output_embeddings(), "out_features", None)
    return int(size if size is not None else base.config.get_text_config().vocab_size)


def can_split(model: nn.Module, completions: Completions) -> bool:
    """Whether some columns after the others have the scores of all at once, tried on a row of `completions`."""
    return _body(model, completions) is not None


def _body(model: nn.Module, completions: Completions) -> nn.Module | None:
    """The module that gives the hidden states to which the head is applied in parts; None if no such is found."""
    base = base_model(model)
    if base not in _BODIES:
        reasons = {body: _why_not(model, body, _few_columns(completions)) for body in _candidates(base)}
        _BODIES[base] = next((body for body, reason in reasons.items() if reason is None), None)
        if _BODIES[base] is None:
            why = " and ".join(str(reason) for reason in reasons.values()) or "it has no body apart from its head"
            logger.info("%s is scored with the logits of all tokens at once: %s", type(base).__name__, why)
    return _BODIES[base]


def _candidates(base: Any) -> Iterator[nn.Module]:
    """What a causal model of transformers may call for its hidden states."""
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    for body in dict.fromkeys((getattr(base, getattr(base, "base_model_prefix", ""), None), decoder)):
        if isinstance(body, nn.Module) and body is not base:
            yield body


def _why_not(model: nn.Module, body: nn.Module, few: Completions) -> str | None:
    """Why the head cannot be applied to parts of what `body` returns; None if it can."""
    inputs, width = model_inputs(model, few), few.completion_mask.shape[1]
    with torch.no_grad():
        logits = model(**inputs).logits[:, :-1]
        whole = torch.stack(entropy_and_logps(logits, few.input_ids[:, -width:], 1.0))
        chunks = _Chunks(base_model(model), body, few, inputs, 1.0, columns=1, recompute=False)
        try:
            parts = torch.stack(chunks.scores(lambda keywords: model(**keywords)))
        except Exception as error:
            if should_reduce_batch_size(error):
                raise
            return f"its head does not take a part of the hidden states ({one_line(error)[:120]})"
    allowed = _ROUNDING * torch.finfo(logits.dtype).eps * whole.abs().max()
    difference = (parts - whole).abs().max()
    return None if difference <= allowed else f"in parts its scores differ by {difference:.2g} nats"


def _few_columns(completions: Completions) -> Completions:
    """The first row without padding, with a few tokens of its completion; with images, whose tokens count, all."""
    row = completions.rows(torch.tensor([0], device=completions.input_ids.device)).trimmed()
    width = row.completion_mask.shape[1]
    keep = width if row.pixel_inputs is not None else min(width, _TRIED_COLUMNS)
    end = row.input_ids.shape[1] - width + keep
    return Completions(
        row.input_ids[:, :end],
        row.attention_mask[:, :end],
        row.completion_mask[:, :keep],
        row.prompt_index,
        loss_mask=row.loss_mask[:, :keep],
        first_position=row.first_position,
        pixel_inputs=row.pixel_inputs,
        column_types={name: kinds[:, :end] for name, kinds in row.column_types.items()},
    )


@dataclass
class _Chunks:
    """
    One call of the model, in which its body hands on the hidden states of the last chunk alone; the logits of the
    others come from calls inside, with a body that returns the hidden states that it is told.
    """

    base: Any
    body: nn.Module
    completions: Completions
    inputs: dict[str, Any]
    temperature: float
    columns: int
    recompute: bool

    def scores(self, call: Call) -> Scores:
        forward, width = self.body.forward, self.completions.completion_mask.shape[1]
        *first_ids, last_ids = self.completions.input_ids[:, -width:].split(self.columns, dim=1)
        scores: list[Scores] = []

        def forward_in_chunks(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            *first, last = _hidden_states(output)[:, -width - 1 : -1].split(self.columns, dim=1)
            output_with = _with_other_states(output)
            scores.extend(self._of_chunk(output_with, *part) for part in zip(first, first_ids, strict=True))
            return output_with(last.contiguous())

        with _replaced(self.body, forward_in_chunks):
            logits = call(self.inputs).logits
        scores.append(self._scores(logits, last_ids))
        entropy, logps = (torch.cat(parts, dim=1) for parts in zip(*scores, strict=True))
        return entropy, logps

    def _of_chunk(self, output_with: Callable, hidden: Float[Tensor, "B t D"], ids: Int[Tensor, "B t"]) -> Scores:
        def head(hidden: Tensor) -> Scores:
            # Contiguous: torch multiplies a slice row by row, and a narrow weight is copied each time
            output = output_with(hidden.contiguous())
            with _replaced(self.body, lambda *args, **kwargs: output):
                return self._scores(self.base.forward(**self.inputs).logits, ids)

        if not self.recompute:
            return head(hidden)
        return checkpoint(head, hidden, use_reentrant=False, preserve_rng_state=False)

    def _scores(self, logits: Float[Tensor, "B t V"], ids: Int[Tensor, "B t"]) -> Scores:
        if not self.recompute:
            return entropy_and_logps(logits, ids, self.temperature)
        return _EntropyAndLogps.apply(
            logits if logits.dtype == torch.float64 else logits.float(), ids, self.temperature
        )


class _EntropyAndLogps(torch.autograd.Function):
    """
    `entropy_and_logps` with its gradient, dH/dz_v = -p_v (log p_v + H) and dS/dz_v = 1[v = o] - p_v, z the logits over
    the temperature. It keeps one tensor of the logits' size, freed whichever part is differentiated; what autograd
    keeps for the other part would stay, of every chunk that is made again, until the graph is freed.
    """

    @staticmethod
    def forward(ctx: Any, logits: Float[Tensor, "B t V"], ids: Int[Tensor, "B t"], temperature: float) -> Scores:
        log_probs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        ctx.save_for_backward(log_probs, entropy, ids)
        ctx.temperature = temperature
        return entropy, log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_entropy: Tensor, of_logps: Tensor) -> tuple[Tensor, None, None]:
        log_probs, entropy, ids = ctx.saved_tensors
        gradient = (log_probs + entropy.unsqueeze(-1)).mul_(of_entropy.unsqueeze(-1)).add_(of_logps.unsqueeze(-1))
        gradient.mul_(log_probs.exp()).neg_()
        gradient.scatter_add_(-1, ids.unsqueeze(-1), of_logps.unsqueeze(-1))
        return gradient if ctx.temperature == 1 else gradient.div_(ctx.temperature), None, None


@contextlib.contextmanager
def _replaced(body: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The body computes something else inside; calling it still runs its hooks."""
    with contextlib.ExitStack() as undo:
        patched(undo, body, "forward", forward)
        yield


def _hidden_states(output: Any) -> Float[Tensor, "B L D"]:
    """The first entry of the body's output, a tuple or a `ModelOutput`."""
    return output[0]


def _with_other_states(output: Any) -> Callable[[Tensor], Any]:
    """Makes the same output with other hidden states; does not keep those that it has."""
    if isinstance(output, tuple):
        following = output[1:]
        return lambda hidden: (hidden, *following)
    (name, _), *rest = output.items()
    kind, others = type(output), dict(rest)
    return lambda hidden: kind(**{name: hidden, **others})
