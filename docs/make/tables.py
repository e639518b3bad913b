"""
Writes docs/metrics.md, docs/run-files.md, docs/refused.md from the package's tables: `python docs/make/tables.py`.

A test compares them with what this writes, and the second with a real run.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from trl_entropy.preflight.support import AXES, DEPENDS_ON, remedy
from trl_entropy.runs.inventory import RUN_FILES, RunFile
from trl_entropy.runs.metrics import EVALUATION, METRICS, Metric

DOCS = Path(__file__).parents[1]

_METRICS = """\
# Every metric key

`metrics.jsonl`, the console, TensorBoard and `load_run(RUN).steps` use these keys. This page is written by
`python docs/make/tables.py` from `trl_entropy/runs/metrics.py`. (T1), (T2), ... are equations of [theory](theory.md);
which toggle logs a key stands in [every toggle](toggles.md).

- `KEY_stderr` is the standard error of `KEY`, in the same unit. It stands for no interval by itself:
  [intervals](intervals.md) says which degrees of freedom belong to it.
- *E* is the probe batch, on which a change is measured; *U* the completions that the step was trained on.
- `rewards/NAME/delta_measured` and the like, of a reward function, and `metrics/NAME/delta_measured`, of a metric
  function, mean what `reward/delta_measured` means, in the function's own unit (`change_of`).
- `same_sample_*`, `cross_*` and `placebo_*` are regressions over the steps so far of the measured change on the
  predicted one. `same_sample`: both on the same completions, so that agreement confirms the derivative and predicts
  nothing. `cross`: predicted on one half of the prompts of E, measured on the other, which share no sampling error.
  `placebo`: predicted from an earlier step's update. The noise of a prediction flattens the plain slope, and
  `corrected_slope` is the slope without that: 1 for a right prediction. They begin with the third step, and say little
  while the steps are few.
- `time/NAME` is the seconds of a probe. `eval_KEY` is a number of held-out prompts.
- *Held-out* prompts are prompts that training never uses: those of `eval_dataset`, or of the split for evaluation.
  `entropy_probe_completions: held_out` is another thing, prompts of the training set that are not in this step.
- *Over processes* says what is summed before the one division: `sum`; `max`; `histogram`; `E`, sums over each
  completion of E; `U`, products between prompt groups of U; `groups`, products of each group's gradient; `pairs`,
  products of all pairs of completions; `none`, every process has the same number; `TRL`, as TRL does it.
- *Over steps* says what trackers get of several steps with `logging_steps` above 1.
"""
_TITLES = {
    "": "Of the step",
    "entropy": "Entropy: measured, predicted, split",
    "reward": "Expected reward",
    "length": "Length",
    "truncated": "Truncated completions",
    "noise_scale": "Gradient noise scale",
    "fisher": "Fisher kernel",
    "entropy_control": "Entropy control",
    "token_control": "Control by tokens",
    "optimizer_state": "Optimizer state",
    "ess": "Effective sample size",
    "curriculum": "Curriculum",
    "resampling": "Resampled groups",
}
_RUN_FILES = """\
# What a run leaves

A run directory is `output_dir`. Everything in it is written here first and moved into place whole, so that a run
which was killed at any moment can be read. This page is written by `python docs/make/tables.py` from
`trl_entropy/runs/inventory.py`, and a test compares it with a real run.

```python
from trl_entropy import load_run

run = load_run("runs/quickstart")  # reads no file yet, and needs no torch
```

The snippets below go on from there. In shapes B stands for completions, T for tokens of a completion, L for prompt and
completion together, P for prompt groups, N for the completions of a kernel, K for parameters by name. Rows of
`probes/rollouts` and `probes/attribution` of a step are the same completions in the same order.

Of a long run the files of probes and the tables in `completions/` are kept for at most 200 evenly spaced steps each
(`probe_files_keep`, `completions_files_keep`), the first and the newest among them: 10,000 steps of 1,024 completions
of 1,024 tokens leave 5 GB and the checkpoints ([how it was measured](results/robust.md#the-size-of-a-long-run)).
Settings, commands and environment variables are written with tokens and passwords masked.

## The tables behind the page

`view(run, NAME, step=N)` gives the tables that the page of the report shows, as pandas DataFrames: `steps`, `parts`,
`evaluation`, and of a step `groups`, `completions`, `tokens`, `dropped`, `measured_completions`, `measured_tokens`.

```python
from trl_entropy import view

view(run, "groups", step=10).sort_values("change")
```

`trl_entropy.analysis.views.COLUMNS` says what each column holds and in which unit.
"""
_REFUSED = (Path(__file__).parent / "refused.md.txt").read_text(encoding="utf-8")


def refused_page() -> str:
    """docs/refused.md."""
    rows: list[tuple[str, ...]] = []
    for axis, values in AXES.items():
        for value in values:
            by_remedy: dict[str, list[str]] = {}
            for probe in DEPENDS_ON:
                if text := remedy(probe, axis, value):
                    by_remedy.setdefault(text, []).append(f"`{probe}`")
            rows += [(axis, f"`{value}`", ", ".join(probes), text) for text, probes in by_remedy.items()]
    supported = [f"`{value}`" for values in AXES.values() for value, text in values.items() if text is None]
    sentence = f"All others of these are supported: {', '.join(supported)}."
    return "\n".join([_REFUSED, table(("", "value", "refused by", "what to set"), rows), "", sentence, ""])


def metrics_page() -> str:
    """docs/metrics.md."""
    groups: dict[str, list[Metric]] = {}
    for metric in METRICS.values():
        prefix = metric.name.split("/")[0] if "/" in metric.name else ""
        groups.setdefault(prefix if prefix in _TITLES else "", []).append(metric)
    header = ("key", "unit", "over processes", "over steps", "what it says")
    parts = [_METRICS]
    for prefix, title in _TITLES.items():
        rows = ((f"`{m.name}`", m.unit, m.reduce, m.over_steps, m.help) for m in groups[prefix])
        parts += [f"## {title}\n", table(header, rows), ""]
    rows = ((f"`{metric.name}`", metric.unit, metric.help) for metric in EVALUATION.values())
    text = "What `trl-entropy evaluate` writes, with `_low` and `_high` where there is a 95 % interval over problems."
    parts += ["## Of evaluated checkpoints\n", f"{text}\n", table(("name", "unit", "what it says"), rows), ""]
    return "\n".join(parts)


def run_files_page() -> str:
    """docs/run-files.md."""
    rows = ((f"`{file.pattern}`", file.format.split(",")[0], file.readers) for file in RUN_FILES)
    parts = [_RUN_FILES, "## All files\n", table(("file", "format", "who reads it"), rows), "\n## Each file\n"]
    return "\n".join(parts + [_section(file) for file in RUN_FILES if file.snippet or file.parts])


def _section(file: RunFile) -> str:
    parts = [f"### `{file.pattern}`\n", f"{file.holds} Format: {file.format}. Read by {file.readers}.\n"]
    if file.snippet:
        parts += ["```python\n" + file.snippet.replace("'", '"') + "\n```\n"]
    if file.parts:
        kind = "tensor" if file.pattern.endswith("safetensors") else "column"
        rows = ((f"`{name}`", part.shape, part.unit, part.help) for name, part in file.parts.items())
        parts += [table((kind, "shape", "unit", "what it holds"), rows), ""]
    return "\n".join(parts)


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Rows as a table of Markdown."""
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    (DOCS / "metrics.md").write_text(metrics_page(), encoding="utf-8")
    (DOCS / "refused.md").write_text(refused_page(), encoding="utf-8")
    (DOCS / "run-files.md").write_text(run_files_page(), encoding="utf-8")
