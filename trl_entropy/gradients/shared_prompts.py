"""
Scores of completions whose prompt several of them share: the model reads each prompt once, and every completion goes
on from its keys and values.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils.memory import should_reduce_batch_size
from jaxtyping import Float, Int
from torch import Tensor, nn

from trl_entropy.config.settings_file import one_line
from trl_entropy.estimators.entropy_change.entropy import entropy_and_logps
from trl_entropy.gradients.inputs import base_model, counts_columns, model_inputs
from trl_entropy.rollouts.completions import Completions

logger = logging.getLogger(__name__)

# (keywords of the model's forward) -> its output
Call = Callable[[dict[str, Any]], Any]

# Logits of a batch, numbers, above which the memory that they need matters more than the time of the prompts.
MAX_LOGITS = 2**24
# Rounding of the logits, in units of their dtype, by which both ways may differ, relative to the largest.
_ROUNDING = 64
# Frequencies of rotary positions that depend on how many tokens the model is given at a time.
_ROPES_BY_LENGTH = ("dynamic", "longrope")
# Whether a model goes on from the keys and values of a prompt as if it had read both together; found out once.
_GOES_ON: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True)
class SharedPrompts:
    """
    The completions of a batch, and which of the prompts each has.

    Attributes:
        completions: B of them.
        first: the row that each of the N prompts is taken from.
        owner: the number of each row's prompt.
    """

    completions: Completions
    first: Int[Tensor, " N"]
    owner: Int[Tensor, " B"]

    @classmethod
    def of(cls, model: nn.Module, completions: Completions) -> SharedPrompts | None:
        """
        None where nothing is gained, or where the model is not known to go on from a prompt as if it had read all at
        once: with images, learned positions, or rotary ones that depend on the length. Others are tried on first use.
        """
        shared = cls._found(completions)
        if shared is None or not _may_go_on(model, completions):
            return None
        base = base_model(model)
        if base not in _GOES_ON:
            reason = shared._few()._why_not(model)
            _GOES_ON[base] = reason is None
            if reason is not None:
                logger.info("%s reads a prompt once for each of its completions: %s", type(base).__name__, reason)
        return shared if _GOES_ON[base] else None

    @classmethod
    def _found(cls, completions: Completions) -> SharedPrompts | None:
        """None unless rows of one group have the same prompt, and there are two of a prompt or more on average."""
        numbers, owner = completions.prompt_index.unique(return_inverse=True)
        rows, end = torch.arange(len(owner), device=owner.device), completions.prompt_columns
        first = torch.full_like(numbers, len(owner)).scatter_reduce(0, owner, rows, "amin")
        if 2 * len(numbers) > len(owner) or not end:
            return None
        same = all(
            torch.equal(given[:, :end][first][owner], given[:, :end])
            for given in (completions.input_ids, completions.attention_mask)
        )
        return cls(completions, first, owner) if same else None

    def scores(self, call: Call, temperature: float) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Entropy and log-probability of every token of the completions, nats."""
        tokens = self.completions.input_ids[:, self.completions.prompt_columns :]
        return entropy_and_logps(self.logits(call), tokens, temperature)

    def logits(self, call: Call) -> Float[Tensor, "B T V"]:
        """Of the tokens of the completions, as `call` gives them."""
        given, end = self.completions, self.completions.prompt_columns
        prompts = {"input_ids": given.input_ids[:, :end], "attention_mask": given.attention_mask[:, :end]}
        read = call(
            {name: rows[self.first] for name, rows in prompts.items()} | {"use_cache": True, "logits_to_keep": 1}
        )
        read.past_key_values.batch_select_indices(self.owner)
        rest = {"input_ids": given.input_ids[:, end:], "attention_mask": given.attention_mask, "use_cache": True}
        output = call(rest | {"past_key_values": read.past_key_values})
        return torch.cat([read.logits[self.owner], output.logits[:, :-1]], dim=1)

    def _few(self) -> SharedPrompts:
        """Two rows of a prompt that has them and, if there is one, a row of another."""
        prompt = self.owner.bincount().argmax()
        rows = torch.cat([(self.owner == prompt).nonzero()[:2, 0], (self.owner != prompt).nonzero()[:1, 0]])
        found = self._found(self.completions.rows(rows.repeat(2)).trimmed())
        assert found is not None, "each row comes twice"
        return found

    def _why_not(self, model: nn.Module) -> str | None:
        """Why the model does not go on from a prompt as if it had read all at once; None if it does."""
        own = self.completions.attention_mask[:, self.completions.prompt_columns :].bool()
        with torch.no_grad():
            whole = model(**model_inputs(model, self.completions)).logits[:, :-1][own]
            try:
                parts = self.logits(lambda keywords: model(**keywords))[own]
            except Exception as error:
                if should_reduce_batch_size(error):
                    raise
                return f"it does not go on from a prompt ({one_line(error)[:120]})"
        allowed = _ROUNDING * torch.finfo(whole.dtype).eps * whole.abs().max()
        difference = (parts - whole).abs().max()
        return None if difference <= allowed else f"going on from a prompt, its logits differ by {difference:.2g}"


def _may_go_on(model: nn.Module, completions: Completions) -> bool:
    config = getattr(base_model(model), "config", None)
    if config is None:  # no model of transformers
        return False
    config = config.get_text_config()
    if completions.completion_mask.numel() * config.vocab_size > MAX_LOGITS:
        return False
    if completions.pixel_inputs is not None or completions.column_types or counts_columns(model):
        return False
    return not any(name in repr(getattr(config, "rope_parameters", None)) for name in _ROPES_BY_LENGTH)
