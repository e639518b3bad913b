"""
Writes docs/learn.md, the theory as a text to learn from: `python docs/make/two_tokens.py > docs/learn.md`.

Its example is a policy with one parameter and completions of two tokens, small enough for a pocket calculator. Imports
no torch; a test compares every number with what the package's estimators say of the same policy.
"""

from __future__ import annotations

from math import exp, log, sqrt
from pathlib import Path
from typing import Any

import jinja2
from one_step import fixed, scientific

TEMPLATE = Path(__file__).parent / "two_tokens.md.jinja"
THETA, LR, BETAS, EPS = 1.0, 0.1, (0.9, 0.99), 1e-8
FIRST_GRADIENT = -0.1  # of the step before
COMPLETIONS = ("aa", "ab", "aa", "ba")  # E: one of each of four prompts, drawn before the step
TRAINED = {"aa": 1.0, "bb": 0.0}  # U: two completions of one prompt, with their rewards


def sigmoid(x: float) -> float:
    """The probability of a."""
    return 1 / (1 + exp(-x))


def entropy(p: float) -> float:
    """Of two tokens with probabilities p and 1 - p, nats."""
    return -p * log(p) - (1 - p) * log(1 - p)


def token(theta: float, before: str, text: str) -> dict[str, float]:
    """
    Log-probability `S` of the token `text` after `before`, entropy `H` of the distribution that it is drawn from, and
    the derivatives of both by theta.
    """
    scale = {"": 1.0, "a": 2.0, "b": 0.0}[before]  # the logit of a is scale x theta
    p = sigmoid(scale * theta)
    slope = scale * (1 - p) if text == "a" else -scale * p
    likelihood, curve = (p if text == "a" else 1 - p), -scale * theta * scale * p * (1 - p)
    return {"S": log(likelihood), "H": entropy(p), "dS": slope, "dH": curve}


def exact(theta: float) -> float:
    """The policy's entropy, nats per token: over all completions, each by its probability."""
    p = sigmoid(theta)
    return (entropy(p) + p * entropy(sigmoid(2 * theta)) + (1 - p) * log(2)) / 2


def exact_slope(theta: float) -> float:
    """Its derivative by theta."""
    p, q = sigmoid(theta), sigmoid(2 * theta)
    tokens = -theta * p * (1 - p) + p * (-4 * theta * q * (1 - q))
    return (tokens + p * (1 - p) * (entropy(q) - log(2))) / 2


def step() -> dict[str, Any]:
    """(T1), (T2), (T4), (T5): advantages, the gradient, and AdamW's second step in parts."""
    mean = sum(TRAINED.values()) / len(TRAINED)
    rows = []
    for text, reward in TRAINED.items():
        for place, before in ((0, ""), (1, text[0])):
            alpha = (reward - mean) / (len(TRAINED) * 2)  # one prompt, two completions, longest length 2
            one = token(THETA, before, text[place])
            rows.append({"completion": text, "token": text[place], "advantage": reward - mean, "alpha": alpha} | one)
    gradient = -sum(row["alpha"] * row["dS"] for row in rows)
    first, second = (1 - BETAS[0]) * FIRST_GRADIENT, (1 - BETAS[1]) * FIRST_GRADIENT**2
    after = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
    metric = 1 / (sqrt(after / (1 - BETAS[1] ** 2)) + EPS)
    correction = 1 - BETAS[0] ** 2
    parts = {
        "momentum": -LR * BETAS[0] / correction * metric * first,
        "gradient": -LR * (1 - BETAS[0]) / correction * metric * gradient,
    }
    return {
        "rows": rows, "gradient": gradient, "first": first, "second": second, "after": after, "metric": metric,
        "correction1": correction, "correction2": 1 - BETAS[1] ** 2, "parts": parts, "update": sum(parts.values()),
        "k": LR * (1 - BETAS[0]) / correction,
    }  # fmt: skip


def sampled(update: float) -> dict[str, Any]:
    """(T6), (T7), (T8), (T10) on the completions E, and the jackknife over their prompts."""
    rows = []
    for text in COMPLETIONS:
        ends = []
        for theta in (THETA, THETA + update):
            first, then = token(theta, "", text[0]), token(theta, text[0], text[1])
            weight = exp(first["S"] - token(THETA, "", text[0])["S"])
            change = weight * (then["dH"] + first["dS"] * then["H"])  # of the second token's w H
            ends.append([first["H"] + weight * then["H"], 1 + weight, first["dH"] + change, weight * first["dS"]])
        rows.append({"text": text, "before": ends[0], "after": ends[1]})
    without = [_changes([row for row in rows if row is not one], update)["measured"] for one in rows]
    mean, count = sum(without) / len(without), len(rows)
    stderr = sqrt((count - 1) / count * sum((value - mean) ** 2 for value in without))
    return {"rows": rows, "without": without, "stderr": stderr} | _changes(rows, update)


def _changes(rows: list[dict[str, Any]], update: float) -> dict[str, float]:
    values, slopes = [], []
    for end in ("before", "after"):
        top, bottom, top_slope, bottom_slope = (sum(row[end][i] for row in rows) for i in range(4))
        values.append(top / bottom)
        slopes.append((top_slope - top / bottom * bottom_slope) / bottom * update)
    return {
        "h_before": values[0], "h_after": values[1], "measured": values[1] - values[0], "linear": slopes[0],
        "slope_after": slopes[1], "trapezoid": (slopes[0] + slopes[1]) / 2,
    }  # fmt: skip


def numbers() -> dict[str, Any]:
    """All that the template names."""
    made = step()
    update, slope = made["update"], exact_slope(THETA)
    for row in made["rows"]:
        row["change"] = made["k"] * row["alpha"] * row["dS"] * made["metric"] * slope
    return {
        "theta": THETA, "lr": LR, "betas": BETAS, "old": FIRST_GRADIENT, "p": sigmoid(THETA), "q": sigmoid(2 * THETA),
        "H1": entropy(sigmoid(THETA)), "H2": entropy(sigmoid(2 * THETA)), "log2": log(2), "step": made,
        "exact": {
            "before": exact(THETA), "after": exact(THETA + update), "slope": slope,
            "change": exact(THETA + update) - exact(THETA), "linear": slope * update,
            "trapezoid": (slope + exact_slope(THETA + update)) * update / 2,
        },
        "E": sampled(update),
    }  # fmt: skip


def page() -> str:
    """docs/learn.md."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"e": scientific, "f": fixed}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(numbers())


if __name__ == "__main__":
    print(page(), end="")
