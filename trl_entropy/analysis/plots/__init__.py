"""
Figures of a run, from the tables of `analysis.run` or the lines of `metrics.jsonl` (`Run.rows`).

Every function draws into the axes that it is given and returns them; without data the axes say in a sentence what is
missing. The colours suit colour-blind readers too.
"""

from trl_entropy.analysis.plots.axes import BLUE, GREEN, GREY, ORANGE, plot_key, series
from trl_entropy.analysis.plots.probes import (
    plot_change_slope,
    plot_controlled_change,
    plot_kernel,
    plot_noise_scale,
    plot_set_point,
    plot_spectrum,
)
from trl_entropy.analysis.plots.tokens import (
    plot_checkpoints,
    plot_high_entropy_tokens,
    plot_positions,
    plot_prices,
    plot_shares,
    plot_tokens,
)
from trl_entropy.analysis.plots.training import (
    plot_entropy,
    plot_entropy_change,
    plot_integral,
    plot_pass_at_1,
    plot_prediction,
    plot_reward,
    plot_runs,
)

__all__ = [
    "BLUE", "GREEN", "GREY", "ORANGE", "plot_change_slope", "plot_checkpoints", "plot_controlled_change",
    "plot_entropy", "plot_entropy_change", "plot_high_entropy_tokens", "plot_integral", "plot_kernel", "plot_key",
    "plot_noise_scale", "plot_pass_at_1", "plot_positions", "plot_prediction", "plot_prices", "plot_reward",
    "plot_runs", "plot_set_point", "plot_shares", "plot_spectrum", "plot_tokens", "series",
]  # fmt: skip
