"""What a checkpoint keeps for those who must remember something when a run is resumed. Imports no torch."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

# Tensors, numbers, strings, None, and containers of them: what `torch.load(weights_only=True)` reads back.
StateDict = dict[str, Any]


@runtime_checkable
class StateOwner(Protocol):
    """Saves and restores its own state."""

    def state_dict(self) -> StateDict:
        """All that must be remembered."""

    def load_state_dict(self, state: StateDict) -> None:
        """Go on from what `state_dict` gave."""
