"""The runs that the claims read: how each family is trained, and where its runs are kept and found again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from trl_entropy.analysis.run import Run, load_run

_NO_EXTRAS = {
    "report_to": "none", "save_strategy": "no", "eval_strategy": "no", "eval_on_start": "false", "kl_every": "0",
    "optimizer_state_probe": "false", "effective_sample_size_probe": "false", "disable_tqdm": "true",
}  # fmt: skip
_NO_PROBES = {"entropy_probe": "false", "likelihood_probe": "false"}
_EVERY_STEP = {
    "entropy_probe_every": "1", "entropy_probe_num_completions": "128", "entropy_attribution": "token",
    "likelihood_probe_every": "1", "likelihood_probe_distribution": "true", "probe_files_keep": "60",
    "noise_scale_probe": "true", "noise_scale_within_prompt": "true",
    "fisher_probe": "true", "fisher_probe_every": "4", "fisher_num_sequences": "64",
}  # fmt: skip
_INFORMATION = {
    "mutual_information_probe": "true", "mutual_information_probe_every": "2", "mutual_information_num_prompts": "16",
}  # fmt: skip
_CLIP_COV = {
    "token_control": "clip_cov", "token_control_quantiles": "true", "token_control_bounds": "0.8 1.0",
    "token_control_fraction": "0.1",
}  # fmt: skip
_LISTS = ("resume_allow_changes", "token_control_bounds")
_REWARDS = Path(__file__).parent / "rewards.py"


@dataclass(frozen=True)
class Family:
    """
    Runs of the quickstart that differ in the seed.

    Attributes:
        name: of the family and the beginning of its runs' names.
        purpose: what its settings are for.
        settings: those that differ from the quickstart's.
        seeds: of its runs; none of them was looked at before the claims were written down.
        num_steps: of each run.
        minutes: CPU minutes of a run, about, from steps on one core of a busy machine.
        until: how many steps these settings hold; then the run goes on with those of `later`.
        later: settings that change then.
        without: settings that are left out then, since nothing would read them.
    """

    name: str
    purpose: str
    settings: dict[str, str]
    seeds: Sequence[int]
    num_steps: int
    minutes: float
    until: int | None = None
    later: dict[str, str] = field(default_factory=dict)
    without: Sequence[str] = ()

    def commands(self, seed: int, output: Path) -> list[list[str]]:
        """The training commands of one seed: one, or a second one that goes on with other settings."""
        stages = [{**_NO_EXTRAS, **self.settings, "seed": str(seed)}]
        stages[0]["max_steps"] = str(self.until or self.num_steps)
        if self.until is not None:
            stages[0] |= {"save_strategy": "steps", "save_steps": str(self.until)}
            kept = {name: value for name, value in stages[0].items() if name not in self.without}
            stages.append({**kept, **self.later, "max_steps": str(self.num_steps)})
            stages[1]["resume_from_checkpoint"] = "latest"
            stages[1]["resume_allow_changes"] = " ".join(self.later)
        start = ["train", "--config", "quickstart", "--output_dir", str(output)]
        return [start + [word for item in stage.items() for word in _words(*item)] for stage in stages]

    def path(self, seed: int, folder: Path) -> Path:
        """Where the run of a seed is kept."""
        return folder / f"{self.name}-seed{seed}"

    def run(self, seed: int, folder: Path) -> Run | None:
        """The finished run of a seed in `folder`; None if there is none."""
        path = self.path(seed, folder)
        return load_run(path) if path.is_dir() and _num_steps(path) >= self.num_steps else None

    def train(self, seed: int, folder: Path) -> None:
        """
        Train a seed in a process of its own. It gets its name when it is finished, so that a run that was stopped is
        begun again.

        Raises:
            ValueError: if training ends with an error, whose messages stand above, or is stopped before its end.
        """
        path = self.path(seed, folder)
        unfinished = path.with_name(f"{path.name}.unfinished")
        if path.exists():
            raise ValueError(f"{path} exists and is not a finished run of {self.num_steps} steps; move it away")
        shutil.rmtree(unfinished, ignore_errors=True)
        for words in self.commands(seed, unfinished):
            done = subprocess.run([sys.executable, "-m", "trl_entropy", *words], check=False)
            if done.returncode:
                raise ValueError(
                    f"training {path.name} ended with exit code {done.returncode}; its messages stand above"
                )
        if (num_steps := _num_steps(unfinished)) < self.num_steps:
            raise ValueError(f"training {path.name} was stopped after {num_steps} of {self.num_steps} steps")
        unfinished.rename(path)


def _num_steps(run: Path) -> int:
    return max((int(row["step"]) for row in load_run(run).rows()), default=0)


def _words(name: str, value: str) -> list[str]:
    return [f"--{name}", *(value.split(" ") if name in _LISTS else [value])]


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "probed",
            "the quickstart with every step probed",
            _EVERY_STEP,
            (10, 11, 12),
            60,
            6.0,
        ),
        Family(
            "slow",
            "the quickstart at a third of its learning rate, without probes",
            _NO_PROBES | {"learning_rate": "1.0e-4"},
            (10, 11, 12),
            120,
            3.0,
        ),
        Family(
            "brief",
            "a planted collapse: the reward is for saying as little as possible, whatever was asked",
            _NO_PROBES | _INFORMATION | {"reward_funcs": f"{_REWARDS}:brevity", "learning_rate": "1.0e-3"},
            (10, 11, 12),
            60,
            2.0,
        ),
        Family(
            "fast",
            "a collapse that nobody asked for: ten times the quickstart's learning rate",
            _NO_PROBES | _INFORMATION | {"learning_rate": "3.0e-3"},
            (10, 11, 12),
            60,
            2.0,
        ),
        Family("plain", "the quickstart without probes, for longer", _NO_PROBES, (10, 11, 12), 80, 2.0),
        Family(
            "bonus",
            "the same with a constant entropy bonus",
            _NO_PROBES | {"entropy_coef": "0.03"},
            (10, 11, 12),
            80,
            2.0,
        ),
        Family(
            "covariance",
            "the same with Clip-Cov, which is switched off half way",
            _NO_PROBES | _CLIP_COV,
            (10, 11, 12),
            80,
            2.0,
            until=40,
            later={"token_control": "none"},
            without=("token_control_quantiles", "token_control_bounds", "token_control_fraction"),
        ),
    )
}


def shortened(families: Mapping[str, Family], num_steps: int) -> dict[str, Family]:
    """The families with runs of `num_steps` where they have more; what changes on the way changes earlier too."""
    found = {}
    for name, family in families.items():
        share = min(1.0, num_steps / family.num_steps)
        until = None if family.until is None else round(share * family.until)
        found[name] = replace(
            family, num_steps=min(num_steps, family.num_steps), minutes=share * family.minutes, until=until
        )
    return found
