"""
Writes docs/one-step.md from a run of the quickstart: `python docs/make/one_step.py RUN --step 10 > docs/one-step.md`.

The head of the page has the command that makes the run. Reads files alone, and needs no torch.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from trl_entropy import load_run, view
from trl_entropy.analysis.comparison import student_t
from trl_entropy.analysis.run import Run

TEMPLATE = Path(__file__).parent / "one_step.md.jinja"
_OUTPUT = "runs/one-step"


def page(run: Run, step: int) -> str:
    """The page, in Markdown."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"e": scientific, "f": fixed}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(numbers_of(run, step))


def scientific(value: float, digits: int = 3) -> str:
    """1.23e-4."""
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def fixed(value: float, digits: int = 4) -> str:
    """0.1234."""
    return f"{value:.{digits}f}"


def numbers_of(run: Run, step: int) -> dict[str, Any]:
    """All that the template names."""
    row = next(row for row in run.rows() if row["step"] == step)
    groups = _groups(run, step)
    return {
        "step": step,
        "row": row,
        "config": run.config,
        "head": _head(run),
        "groups": groups,
        "printed_changes": sum(
            round(group["change"] * 1e6, 2) for group in groups
        ),  # what the table's column adds up to
        "adamw": _adamw(run.config, row, step),
        "parts": {name: row[f"entropy/delta_{name}"] for name in ("momentum", "weight_decay", "gradient")},
        "measured": _measured(run, step),
        "tokens": _tokens(run, step, _adamw(run.config, row, step)["coefficient"]),
    }


def _head(run: Run) -> dict[str, Any]:
    environment = run.environment
    words = [str(word) for word in environment["command"][1:]]
    if "--output_dir" in words:  # a path of the machine that made the page
        words[words.index("--output_dir") + 1] = _OUTPUT
    return {
        "command": "python -m trl_entropy.train " + " ".join(words),
        "output": _OUTPUT,
        "date": environment["time"][:10],
        "cpus": environment["num_cpus"],
        "device": environment["device"],
        "packages": {name: environment["packages"][name] for name in ("torch", "trl", "transformers")},
    }


def _groups(run: Run, step: int) -> list[dict[str, Any]]:
    rollouts = run.probe_file("rollouts", step)
    attribution = run.probe_file("attribution", step)
    table = view(run, "groups", step=step).set_index("prompt_index")
    found = []
    for prompt in dict.fromkeys(rollouts["prompt_index"].tolist()):
        rows = rollouts["prompt_index"] == prompt
        rewards = rollouts["rewards"][rows]
        found.append(
            {
                "question": _question(table.loc[prompt, "prompt"]),
                "rewards": " ".join(f"{reward:g}" for reward in rewards),
                "mean": float(rewards.mean()),
                "advantages": sorted(set(np.round(rollouts["advantages"][rows], 6).tolist())),
                "weight": float(np.abs(attribution["loss_coefficients"][rows]).max()),
                "coefficient": _largest_in_size(attribution["loss_coefficients"][rows]),
                "steepest": _largest_in_size(rollouts["advantages"][rows]),
                "change": float(attribution["attribution"][rows].astype(float).sum()),
            }
        )
    return found


def _largest_in_size(values: np.ndarray) -> float:
    return float(values.flat[np.abs(values).argmax()])


def _adamw(config: dict[str, Any], row: dict[str, Any], step: int) -> dict[str, float]:
    beta1, beta2, norm = config["adam_beta1"], config["adam_beta2"], row["grad_norm"]
    clip = min(1.0, config["max_grad_norm"] / (norm + 1e-6)) if config["max_grad_norm"] else 1.0
    second, first = row["optimizer_state/exp_avg_sq_p50"], row["optimizer_state/exp_avg_p50"]
    metric = 1 / ((second / (1 - beta2**step)) ** 0.5 + config["adam_epsilon"])
    return {
        "clip": clip,
        "correction1": 1 - beta1**step,
        "correction2": 1 - beta2**step,
        "metric": metric,
        "first": first,
        "second": second,
        "moved": row["learning_rate"] * metric * first / (1 - beta1**step),
        "coefficient": row["learning_rate"] * clip * (1 - beta1) / (1 - beta1**step),
    }


def _measured(run: Run, step: int) -> dict[str, Any]:
    """(T6), (T7) from the file of the probe: sums of each prompt, and what is left without it."""
    file, drawn = run.probe_file("entropy", step), run.probe_metadata("entropy", step)["drawn"]
    mask = file.get("loss_mask", file["completion_mask"]).astype(float)
    change = (file["logps_before"] - file["logps_after"]).astype(float) * mask
    if drawn == "before the step":
        change = -change
    weight = mask * np.exp(np.cumsum(change, axis=1) - change)  # of what came before the token
    plain = drawn == "after the step"
    before, after = (weight, mask) if plain else (mask, weight)
    terms = [before * file["entropy_before"], before, after * file["entropy_after"], after]
    prompts = list(dict.fromkeys(file["prompt_index"].tolist()))
    sums = np.array([[term[file["prompt_index"] == prompt].sum() for term in terms] for prompt in prompts])
    total = sums.sum(0)
    without = [_change(total - one) for one in sums]
    count, spread = len(prompts), np.array(without) - np.mean(without)
    stderr = float(np.sqrt((count - 1) / count * (spread**2).sum()))
    return {
        "drawn": drawn,
        "plain_is_after": plain,
        "num_completions": len(mask),
        "example": _example(run, file, mask, weight, plain),
        "prompts": [{"sums": one.tolist(), "without": left} for one, left in zip(sums, without, strict=True)],
        "total": total.tolist(),
        "before": total[0] / total[1],
        "after": total[2] / total[3],
        "change": _change(total),
        "mean_without": float(np.mean(without)),
        "stderr": stderr,
        "dof": count - 1,
        "t": student_t(count - 1),
    }


def _example(
    run: Run, file: dict[str, np.ndarray], mask: np.ndarray, weight: np.ndarray, plain_is_after: bool
) -> dict[str, Any]:
    """The token whose weight is furthest from 1, among those with an entropy of at least 0.1 nats."""
    end = "before" if plain_is_after else "after"
    far = np.where((mask > 0) & (file[f"entropy_{end}"] >= 0.1), np.abs(np.log(np.maximum(weight, 1e-9))), -1.0)
    row, position = (int(index) for index in np.unravel_index(far.argmax(), far.shape))
    before, after = (
        float((file[f"logps_{name}"][row, :position].astype(float) * mask[row, :position]).sum())
        for name in ("before", "after")
    )
    ids = file["input_ids"][row, -mask.shape[1] :]
    prompts = list(dict.fromkeys(file["prompt_index"].tolist()))
    return {
        "text": run.texts_of(pd.Series([int(ids[position])])).iloc[0],
        "row": row,
        "prompt": prompts.index(int(file["prompt_index"][row])) + 1,
        "position": position,
        "before": before,
        "after": after,
        "exponent": before - after if plain_is_after else after - before,
        "weight": float(weight[row, position]),
        "entropy": float(file[f"entropy_{end}"][row, position]),
    }


def _change(sums: np.ndarray) -> float:
    return float(sums[2] / sums[3] - sums[0] / sums[1])


def _tokens(run: Run, step: int, coefficient: float) -> list[dict[str, Any]]:
    """The three tokens that did most, with what comes before them."""
    table = view(run, "tokens", step=step)
    advantages = run.probe_file("attribution", step)["raw_advantages"]
    found = []
    for _, token in table.loc[table["change"].abs().sort_values(ascending=False).index[:3]].iterrows():
        earlier = table[(table["row"] == token["row"]) & (table["position"] < token["position"])]
        found.append(
            {
                "text": token["token"],
                "row": int(token["row"]),
                "position": int(token["position"]),
                "earlier": "".join(earlier.sort_values("position")["token"].tolist()[-8:]),
                "probability": float(np.exp(token["logp"])),
                "entropy": float(token["entropy"]),
                "advantage": float(advantages[int(token["row"])]),
                "weight": float(token["weight"]),
                "derivative": float(token["change"] / (coefficient * token["weight"])),
                "change": float(token["change"]),
            }
        )
    return found


def _question(prompt: str) -> str:
    """The part of a prompt that differs from the others."""
    found = re.search(r"Question: (.*?)(\n|$)", prompt)
    return (found[1] if found else prompt[-80:]).replace("|", "/")


def main() -> None:
    """Print the page of the run and step that the command line names."""
    parser = argparse.ArgumentParser(description="Print docs/one-step.md, from a run.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--step", type=int, default=10)
    args = parser.parse_args()
    print(page(load_run(args.run), args.step), end="")


if __name__ == "__main__":
    main()
