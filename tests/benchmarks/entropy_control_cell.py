"""One run of the study of entropy control (`entropy_control.py`): training, measured on completions of its own.

    python tests/benchmarks/entropy_control_cell.py sharpen 0 entropy_control=hold entropy_control_target=0.22

How a run is measured depends on the task (`PLANS`). Nothing of it changes training, and CPU seconds count training
only.

- `fresh_from`: after every step from this one on, and after every fifth step before, the policy's entropy is measured
  on `NUM_FRESH` completions of held-out problems, drawn at temperature 1 whatever temperature training uses. None:
  never; the entropy of training's own completions is logged in any case.
- `evaluate_every`: after so many steps, `NUM_SAMPLES` completions of each of `NUM_PROBLEMS` problems are evaluated.
  None: after each third of the run.
- `calibrate_every`: after so many steps the CPU seconds of a pass of fixed size are taken, forward and backward with
  a copy of the model. On a shared machine a CPU second does less when others compute too; the runs of a study that
  takes days are compared in units of this pass. None: never.

Tasks:

- `sharpen`: the embedded word problems; reward 1 for the right answer.
- `explore` and `trap`: the problems with two operations, with a worse way that is found first
  (`trl_entropy.tasks.lead_words`).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, TrainerCallback

from trl_entropy.estimators.statistics.pass_at_k import pass_at_k
from trl_entropy.gradients.scores import score
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.tasks import lead_words, rewards

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
NUM_FRESH, FROM = 128, 20
NUM_PROBLEMS, NUM_SAMPLES = 96, 8
UNIT_LENGTH = 52  # tokens of prompt and completion, on average
OFF = {
    "entropy_probe": "false", "effective_sample_size_probe": "false", "optimizer_state_probe": "false",
    "likelihood_probe": "false", "kl_every": "0", "eval_strategy": "no", "eval_on_start": "false",
    "save_strategy": "no", "log_completions": "false", "report_to": "none",
}  # fmt: skip


class Plan(NamedTuple):
    """The settings of a task, its reward, and how a run is measured (see above)."""

    settings: dict[str, Any]
    reward: Callable[..., list[float]]
    fresh_from: int | None
    evaluate_every: int | None
    calibrate_every: int | None = None


# Those with two operations of 4,096 and 512 word problems.
_TWO_STEPS = {"num_train_problems": 2047, "num_eval_problems": 255}
PLANS = {
    "sharpen": Plan({"num_eval_problems": 512}, rewards.tag_pref, FROM, 20),
    "explore": Plan({"task": "explore", **_TWO_STEPS}, lead_words.explore_reward, FROM, 20),
    "trap": Plan({"task": "trap", **_TWO_STEPS}, lead_words.trap_reward, None, None, 10),
}
LOGGED = (
    "entropy/policy", "entropy_coef", "entropy_control/delta_predicted", "entropy_control/delta_optimizer",
    "entropy_control/realised_previous", "entropy_control/infeasible", "entropy_control/relative_size",
    "entropy_control/active", "entropy_control/price", "token_control/num_tokens",
    "resampling/num_completions", "reward",
)  # fmt: skip


def hinted(prompts: object, completions: list[str], trainer_state: Any = None, **kwargs: Any) -> list[float]:
    """The bonus of the positive control: 0.7 more for a right answer that begins with "Here", fading over 30 steps."""
    right = rewards.tag_pref(prompts, completions, **kwargs)
    step = 0 if trainer_state is None else trainer_state.global_step  # None: it is tried before training
    size, first = 0.7 * max(0.0, 1 - step / 30), [lead_words.lead_words(text)[:1] for text in completions]
    return [size * one * (words == [lead_words.BEST]) for one, words in zip(right, first, strict=True)]


class Measure(TrainerCallback):
    """Measures the policy on completions drawn after a step, and records the CPU seconds of training so far."""

    def __init__(self, task: str, seed: int) -> None:
        self.plan, self.seed = PLANS[task], seed
        self.entropy: dict[int, float] = {}  # by step
        self.seconds: list[float] = []
        self.evaluations: list[dict[str, float]] = []
        self.units: list[float] = []
        self.calibrator: PreTrainedModel | None = None
        self._spent = 0.0

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        self._spent, self._since = 0.0, time.process_time()

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        self._spent += time.process_time() - self._since
        self.seconds.append(self._spent)
        step = state.global_step
        start = self.plan.fresh_from
        if start is not None and (step >= start or step % 5 == 0):
            problems = np.random.default_rng((self.seed, step)).choice(len(self.problems), NUM_FRESH)
            self.entropy[step] = self._draw(problems, (self.seed, step, 7))[1]
        if step % (self.plan.evaluate_every or state.max_steps // 3) == 0:
            self._evaluate(step)
        if self.plan.calibrate_every and step % self.plan.calibrate_every == 0:
            self.units.append(self._calibrate())
        self._since = time.process_time()

    @property
    def problems(self) -> Any:
        return self.trainer.eval_dataset

    def _draw(self, problems: np.ndarray, seed: tuple[int, ...]) -> tuple[list[str], float]:
        """The text of one completion of each problem at temperature 1, and the mean token entropy of all."""
        trainer, config = self.trainer, self.trainer.generation_config
        temperature, config.temperature = config.temperature, 1.0
        drawn = trainer.probe_batches.draw_completions([self.problems[int(row)]["prompt"] for row in problems], seed)
        config.temperature = temperature
        entropy, mask = score(trainer.model, drawn, 1.0, 256).entropy[0], drawn.completion_mask.bool()
        ids = [row[kept] for row, kept in zip(drawn.input_ids[:, -mask.shape[1] :], mask, strict=True)]
        texts = trainer._tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts, float(entropy[mask].double().mean())

    def _calibrate(self) -> float:
        """CPU seconds of a pass over a batch like training's; the model that trains is not touched."""
        if self.calibrator is None:
            self.calibrator = copy.deepcopy(self.trainer.accelerator.unwrap_model(self.trainer.model)).eval()
        ids = torch.arange(NUM_FRESH * UNIT_LENGTH).view(NUM_FRESH, UNIT_LENGTH) % self.calibrator.config.vocab_size
        start = time.process_time()
        self.calibrator(input_ids=ids, labels=ids).loss.backward()
        spent = time.process_time() - start
        self.calibrator.zero_grad()
        return spent

    def _evaluate(self, step: int) -> None:
        problems = np.arange(NUM_PROBLEMS).repeat(NUM_SAMPLES)
        texts, entropy = self._draw(problems, (self.seed, step, 8))
        answers = [self.problems[int(row)]["answer"] for row in problems]
        values = self.plan.reward(None, texts, answer=answers)
        worth = np.array(values).reshape(NUM_PROBLEMS, NUM_SAMPLES)
        right = torch.tensor((worth == 1).sum(axis=1))
        found = {f"pass@{k}": float(pass_at_k(right, NUM_SAMPLES, k).mean()) for k in (1, 8)}
        self.evaluations.append({"step": step, "reward": float(worth.mean()), "entropy": entropy, **found})


def arguments(task: str, settings: dict[str, Any]) -> list[str]:
    """The command line of training."""
    chosen = {**OFF, **PLANS[task].settings, **settings}
    if chosen.pop("hint", False):
        chosen["reward_funcs"] = [f"{task}_reward", f"{__file__}:hinted"]
    words = [word for name, value in chosen.items() for word in (f"--{name}", *map(str, np.atleast_1d(value)))]
    return ["--config", str(CONFIG), *words]


def run_cell(task: str, settings: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    """Train with the quickstart's settings changed by `settings`; `hint` adds the bonus of the positive control."""
    from trl_entropy.config.command_line import parse
    from trl_entropy.train import build_trainer

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    words = arguments(task, {"seed": seed, "max_steps": steps, "output_dir": folder, **settings})
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer = build_trainer(*parse(words))
            measure = Measure(task, seed)
            measure.trainer = trainer
            trainer.add_callback(measure)
            trainer.train()
        rows = RunDirectory(folder).metrics()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    logged = {name: [row.get(name) for row in rows] for name in LOGGED if name in rows[-1]}
    return {
        "task": task, "settings": settings, "seed": seed, "steps": steps, "entropy": measure.entropy,
        "seconds": measure.seconds, "units": measure.units, "evaluations": measure.evaluations, "logged": logged,
    }  # fmt: skip


def write_cell(target: Path, *cell: Any) -> None:
    """Store the result of `run_cell` as JSON, unless the file exists."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(run_cell(*cell)), encoding="utf-8")
    temporary.replace(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=list(PLANS))
    parser.add_argument("seed", type=int)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument(
        "settings", nargs="*", metavar="name=value", help="fields of the config, such as entropy_control=hold"
    )
    options = parser.parse_args()
    settings: dict[str, Any] = dict(setting.split("=", 1) for setting in options.settings)
    if "hint" in settings:
        settings["hint"] = settings["hint"] == "true"
    print(json.dumps(run_cell(options.task, settings, options.seed, options.steps)))


if __name__ == "__main__":
    main()
