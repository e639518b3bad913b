"""Figures of the page as PNG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A figure of `num_panels` panels side by side."""

    name: str
    caption: str
    png: bytes
    num_panels: int = 1

    @property
    def base64(self) -> str:
        return base64.b64encode(self.png).decode()


def shade(value: float, largest: float, strongest: int) -> int:
    """A colour's strength in percent, `strongest` for the largest value; 0 for what is not a finite number."""
    part = abs(value) / largest if largest else 0.0
    return round(strongest * min(part, 1.0)) if math.isfinite(part) else 0


def draw(name: str, caption: str, panels: list[Callable]) -> Figure:
    """A figure with a panel for each of the functions, which get axes to draw into."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.5), layout="constrained", squeeze=False)
    try:
        for draw_panel, panel in zip(panels, axes[0], strict=True):
            draw_panel(panel)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=130)
    finally:
        plt.close(figure)
    return Figure(name, caption, stream.getvalue(), len(panels))
