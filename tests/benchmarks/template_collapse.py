"""
Does the mutual information see a collapse to a template that the entropy does not? Collapses planted in training.

    python -m tests.benchmarks.template_collapse --output runs/template [--seeds 0 1 2] [--max_steps 100]

The quickstart with each of three rewards: the right answer; one fixed answer, whatever is asked; and the share of the
numbers written that the question does not have, which a completion earns best without reading the question. Runs that
are complete are not repeated. Prints a table of the first and the last measurements, and writes `template.png`.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from trl_entropy.experiments.output import saved_figure
from trl_entropy.reporting.warnings import warnings_of
from trl_entropy.runs.directory import RunDirectory

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
ARMS = {
    "right answer": "tag_pref",
    "fixed answer": f"{__file__}:fixed_answer",
    "other numbers": f"{__file__}:other_numbers",
}
SETTINGS = (
    *("--entropy_probe", "true", "--entropy_probe_every", "5", "--likelihood_probe", "false", "--kl_every", "0"),
    *("--mutual_information_probe", "true", "--mutual_information_probe_every", "5", "--probe_files_keep", "0"),
    *("--effective_sample_size_probe", "false", "--optimizer_state_probe", "false", "--eval_strategy", "no"),
    *("--eval_on_start", "false", "--save_strategy", "no", "--report_to", "none", "--disable_tqdm", "true"),
)
KEYS = {
    "I, lower bound": "mutual_information/lower",
    "H of a completion": "mutual_information/conditional_entropy",
    "H per token": "entropy/policy",
    "told apart": "mutual_information/identified",
    "reward": "reward",
}


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+", text)


def fixed_answer(prompts: object, completions: Sequence[str], **kwargs: object) -> list[float]:
    """1 for the answer 12, to every question."""
    return [float(re.findall(r"<answer>(.*?)</answer>", text) == ["12"]) for text in completions]


def other_numbers(prompts: Sequence[str], completions: Sequence[str], **kwargs: object) -> list[float]:
    """The share of a completion's numbers that are not among the question's; 0 without four of them and an answer."""
    rewards = []
    for prompt, text in zip(prompts, completions, strict=True):
        asked, written = set(numbers(prompt.rsplit("Question:", 1)[1])), numbers(text)
        whole = len(written) >= 4 and re.search(r"<answer>\d+</answer>", text)
        rewards.append(sum(number not in asked for number in written) / len(written) if whole else 0.0)
    return rewards


def trained(path: Path, reward: str, seed: int, max_steps: int) -> RunDirectory:
    run = RunDirectory(path)
    if not path.exists() or len(run.metrics()) < max_steps:
        settings = ("--reward_funcs", reward, "--seed", str(seed), "--max_steps", str(max_steps))
        command = [sys.executable, "-m", "trl_entropy.train", "--config", str(CONFIG), "--output_dir", str(path)]
        anew = ("--resume_from_checkpoint", "latest_or_new")
        subprocess.run([*command, *SETTINGS, *settings, *anew], check=True, stdout=subprocess.DEVNULL)
    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_steps", type=int, default=100)
    given = parser.parse_args()
    found = {}
    print(f"| reward | seed | step | {' | '.join(KEYS)} | warned at |\n" + "|---" * (len(KEYS) + 4) + "|")
    for arm in given.arms:
        for seed in given.seeds:
            path = given.output / f"{arm.replace(' ', '-')}-seed{seed}"
            rows = trained(path, ARMS[arm], seed, given.max_steps).metrics()
            warned = [one.steps for one in warnings_of(rows) if one.title.startswith("Completions do not depend")]
            measured = found[arm, seed] = [row for row in rows if KEYS["I, lower bound"] in row]
            for row in (measured[0], measured[len(measured) // 2], measured[-1]):
                cells = [_cell(row, key) for key in KEYS.values()]
                steps = f"{warned[0][0]} to {warned[0][-1]}" if warned else "none"
                print(f"| {arm} | {seed} | {row['step']} | {' | '.join(cells)} | {steps} |", flush=True)
    with saved_figure(given.output / "template.png", (10, 3.4)) as figure:
        draw(found, figure.subplots(1, 3))


def _cell(row: dict, key: str) -> str:
    if key not in row:
        return "-"
    error = f" ± {row[key + '_stderr']:.2g}" if key.startswith("mutual") else ""
    return f"{row[key]:.3g}{error}"


def draw(found: dict[tuple[str, int], list[dict]], axes) -> None:
    from trl_entropy.analysis.plots import BLUE, GREEN, GREY, ORANGE

    colors = dict(zip(ARMS, (BLUE, GREEN, ORANGE), strict=True))
    shown = [KEYS["I, lower bound"], KEYS["H of a completion"], KEYS["H per token"]]
    titles = ("I(prompt; completion), lower bound, nats", "entropy of a completion, nats", "entropy, nats per token")
    for panel, key, title in zip(axes, shown, titles, strict=True):
        for (arm, seed), rows in found.items():
            steps = [row["step"] for row in rows if key in row]
            label = arm if seed == min(number for name, number in found if name == arm) else None
            panel.plot(steps, [row[key] for row in rows if key in row], color=colors[arm], lw=1, label=label)
        panel.set(title=title, xlabel="step", ylim=(0, None))
        panel.title.set_fontsize(9)
    limit = next(iter(found.values()))[0]["mutual_information/limit"]
    axes[0].axhline(limit, color=GREY, ls=":", lw=0.8)
    axes[0].legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    main()
