"""Training arguments that are written without tokens and keys: to every checkpoint, to trackers, to the run."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from trl import SFTConfig

from trl_entropy.runs.secrets import is_secret_name, masked


class WithoutSecrets:
    """
    The part of training arguments that leaves their secrets out of what is pickled (`training_args.bin`, which
    transformers writes into every checkpoint) and of `to_dict` (trackers, config.yaml). Copies keep them.
    """

    def to_dict(self) -> dict[str, Any]:
        written: Any = masked(super().to_dict())  # type: ignore[misc]
        return written

    def __getstate__(self) -> dict[str, object]:
        return {
            name: None if is_secret_name(name) else masked(value) if isinstance(value, str | dict | list) else value
            for name, value in self.__dict__.items()
        }

    def __copy__(self) -> WithoutSecrets:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> WithoutSecrets:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied


class SFTArguments(WithoutSecrets, SFTConfig):
    """TRL's arguments of supervised fine-tuning."""
