"""
A run directory as pandas DataFrames, read when asked for: live, killed and resumed runs too. Imports no torch.

    run = load_run("runs/quickstart")
    run.steps["entropy/policy"].plot()
    high_entropy_tokens(run.evaluation_tokens)
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.metrics import unit

logger = logging.getLogger(__name__)

_TOKEN_COLUMNS = [
    "step", "prompt_id", "sample", "position", "token_id", "token", "entropy", "surprisal", "correct",
]  # fmt: skip
# Student's t, 97.5 %, for 1 to 10 degrees of freedom.
_STUDENT_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def load_run(path: str | os.PathLike[str]) -> Run:
    """
    The run of a directory; nothing is read yet.

    Raises:
        ValueError: when there is no such directory.
    """
    if not Path(path).is_dir():
        raise ValueError(f"{path} is no directory; give a run directory, such as runs/quickstart")
    return Run(Path(path))


class Run:
    """
    What a run directory holds, as DataFrames. A property reads its files at its first use; `load_run` again to see
    what a live run has written since.

    Args:
        path: the run directory.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.resolve().name
        self._directory = RunDirectory(path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    # ---- training

    @functools.cached_property
    def steps(self) -> pd.DataFrame:
        """`metrics.jsonl`: a row a step (the index), a column a key; nan where a step has no such key."""
        return _by_step(self._directory.metrics())

    def rows(self, key: str = "step") -> list[dict[str, Any]]:
        """Lines of `metrics.jsonl` that have `key`, as `plots` takes them: without what a step lacks."""
        return [row for row in self._directory.metrics() if row.get(key) is not None]

    @functools.cached_property
    def training_evaluation(self) -> pd.DataFrame:
        """`evaluation/metrics.csv`, what training evaluated on held-out prompts, by step."""
        return _by_step(self._directory.evaluation())

    @functools.cached_property
    def completions(self) -> pd.DataFrame:
        """`completions/*.parquet`: TRL's table of prompts, completions, rewards and advantages, a row a completion."""
        return _concatenated(_read_parquets(sorted(self.path.glob("completions/*.parquet"))))

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """`config.yaml`; empty when the run was killed before it was written."""
        import yaml

        path = self.path / "config.yaml"
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}

    @functools.cached_property
    def environment(self) -> dict[str, Any]:
        """`environment.json`: versions, machine, command line."""
        path = self.path / "environment.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    # ---- probe files

    def probe_steps(self, probe: str) -> list[int]:
        """Steps whose file of a probe (`entropy`, `rollouts`, ...) is there."""
        return sorted(int(path.stem.split("_")[1]) for path in self.path.glob(f"probes/{probe}/step_*.safetensors"))

    def probe_file(self, probe: str, step: int) -> dict[str, np.ndarray]:
        """The arrays of one probed step, by name."""
        from safetensors.numpy import load_file

        return load_file(self.path / "probes" / probe / f"step_{step:06d}.safetensors")

    @functools.cached_property
    def tokens(self) -> pd.DataFrame:
        """
        A row a completion token of the entropy probe's batches E: `step`, `row`, `prompt_index`, `position` (0: the
        completion's first), `token_id`, `token`, and every (B, T) array of the file, such as `entropy_before`.
        """
        return _concatenated(self.tokens_of("entropy", step) for step in self.probe_steps("entropy"))

    def tokens_of(self, probe: str, step: int) -> pd.DataFrame:
        """The same of one step's file of any probe that has a `completion_mask`; cheaper than all of them."""
        table = self.tokens_in(self.probe_file(probe, step))
        table.insert(0, "step", step)
        return table

    def tokens_in(self, arrays: Mapping[str, np.ndarray]) -> pd.DataFrame:
        """[`token_table`] of a probe file's arrays, with each token's text."""
        table = token_table(arrays)
        table.insert(4, "token", self._texts(table["token_id"]))
        return table

    def prompt_text(self, step: int, prompt_index: int) -> str:
        """Text of a prompt of the step's own completions (`probes/rollouts`)."""
        arrays = self.probe_file("rollouts", step)
        row = int(np.flatnonzero(arrays["prompt_index"] == prompt_index)[0])
        width = arrays["input_ids"].shape[1] - arrays["completion_mask"].shape[1]
        kept: np.ndarray = arrays["attention_mask"][row, :width].astype(bool)
        return "".join(self._texts(pd.Series(arrays["input_ids"][row, :width][kept])))

    @functools.cached_property
    def groups(self) -> pd.DataFrame:
        """
        A row a prompt group of the probed steps' own completions (`probes/rollouts`): `step`, `prompt_index`,
        `num_completions`, `reward_mean`, `reward_std`, `length_mean` in tokens.
        """
        return _concatenated(
            _groups_of(step, self.probe_file("rollouts", step)) for step in self.probe_steps("rollouts")
        )

    def kernel(self, step: int | None = None) -> pd.DataFrame:
        """
        The Fisher kernel K_ij of a step in nats^2, prompt by prompt: rows and columns by `prompt_index`, `row`.

        Args:
            step: a probed one; None: the last.

        Raises:
            ValueError: when no step has one.
        """
        steps = self.probe_steps("fisher")
        if not steps:
            raise ValueError(f"{self.path} holds no Fisher kernel; train with fisher_probe: true")
        arrays = self.probe_file("fisher", steps[-1] if step is None else step)
        names = pd.MultiIndex.from_arrays([arrays["prompt_index"], arrays["rows"]], names=["prompt_index", "row"])
        return pd.DataFrame(arrays["kernel"], index=names, columns=names).sort_index().sort_index(axis=1)

    def kernel_shares(self, step: int) -> pd.DataFrame:
        """
        What of the trace of a step's Fisher kernel each parameter makes, in their order: `parameter`, `layer` (nan
        outside of numbered layers), `matrix` (the name within the layer, LoRA's A and B too), `share`; they sum to 1.
        """
        from safetensors import safe_open

        with safe_open(self.path / "probes" / "fisher" / f"step_{step:06d}.safetensors", "np") as file:
            names, norms = json.loads(file.metadata()["parameters"]), file.get_tensor("parameter_norms").sum(axis=1)
        table = pd.DataFrame({"parameter": names})
        parts = table["parameter"].str.extract(r"(?:.*\.layers\.(?P<layer>\d+)\.)?(?P<matrix>.*)")
        return table.assign(layer=parts["layer"].astype(float), matrix=parts["matrix"], share=norms / norms.sum())

    # ---- `trl-entropy evaluate`

    @functools.cached_property
    def evaluation(self) -> pd.DataFrame:
        """A row a number of an evaluated checkpoint: `step`, `metric`, `value`, `low`, `high` (95 %), `unit`."""
        rows = [
            {"step": summary["step"], "metric": name, **entry, "unit": unit(name)}
            for summary in self._directory.checkpoint_summaries()
            for name, entry in summary["metrics"].items()
        ]
        return pd.DataFrame(rows, columns=["step", "metric", "value", "low", "high", "unit"])

    @functools.cached_property
    def records(self) -> pd.DataFrame:
        """A row a completion that was drawn to evaluate a checkpoint, with its token ids, log-probs, entropies."""
        return self._evaluated("records.parquet")

    @functools.cached_property
    def prompts(self) -> pd.DataFrame:
        """A row a held-out prompt and checkpoint: pass@k, counts and sums over its samples."""
        return self._evaluated("prompts.parquet")

    @functools.cached_property
    def positions(self) -> pd.DataFrame:
        """A row a token position and checkpoint: mean entropy and surprisal with 95 % intervals."""
        return self._evaluated("positions.csv")

    @functools.cached_property
    def evaluation_tokens(self) -> pd.DataFrame:
        """
        A row a token of the evaluated samples: `step`, `prompt_id`, `sample`, `position`, `token_id`, `token`,
        `entropy`, `surprisal`, `correct`.
        """
        columns = ["step", "prompt_id", "sample", "correct", "completion_ids", "logps", "entropies"]
        if self.records.empty:
            return pd.DataFrame(columns=_TOKEN_COLUMNS)
        rows = self.records.loc[~self.records["greedy"], columns].reset_index(drop=True)
        table = rows.explode(["completion_ids", "logps", "entropies"])
        table["position"] = table.groupby(level=0).cumcount()
        table["surprisal"] = -table.pop("logps").astype(float)
        table["entropy"] = table.pop("entropies").astype(float)
        table["token_id"] = table.pop("completion_ids").astype(int)
        table["token"] = self._texts(table["token_id"])
        return table.reset_index(drop=True)[_TOKEN_COLUMNS]

    def _evaluated(self, name: str) -> pd.DataFrame:
        tables = []
        for summary in self._directory.checkpoint_summaries():
            path = self._directory.checkpoint_folder(summary["step"]) / name
            table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
            table.insert(0, "step", summary["step"])
            tables.append(table)
        return _concatenated(tables)

    def _texts(self, token_ids: pd.Series) -> pd.Series:
        """Text of each token; `#12` where the run keeps no tokenizer (it wrote no checkpoint)."""
        texts = {token: self._text(token) for token in token_ids.unique().tolist()}
        return token_ids.map(texts)

    def _text(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"#{token_id}"
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    @functools.cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        path = next(iter(sorted(self.path.glob("checkpoint-*/tokenizer.json"))), None)
        return None if path is None else Tokenizer.from_file(str(path))


def token_table(arrays: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """A row a completion token of a probe file, padding left out: every (B, T) array becomes a column."""
    mask: np.ndarray = arrays["completion_mask"].astype(bool)
    rows, positions = np.nonzero(mask)
    width = mask.shape[1]
    columns = {
        "row": rows,
        "prompt_index": arrays["prompt_index"][rows],
        "position": positions,
        "token_id": arrays["input_ids"][:, -width:][mask],
    }
    columns |= {
        name: array[mask] for name, array in arrays.items() if array.shape == mask.shape and name != "completion_mask"
    }
    return pd.DataFrame(columns)


def cosines_of(kernel: pd.DataFrame) -> pd.DataFrame:
    """K_ij / sqrt(K_ii K_jj); nan in the rows of a completion whose K_ii is not positive."""
    diagonal = np.diag(kernel)
    norms = np.sqrt(np.where(diagonal > 0, diagonal, np.nan))
    return kernel / np.outer(norms, norms)


def spectrum_of(kernel: pd.DataFrame) -> pd.Series:
    """Eigenvalues of a kernel from the largest, nats^2, by their rank 1, 2, ..."""
    values = np.linalg.eigvalsh(kernel.to_numpy())[::-1]
    return pd.Series(values, index=pd.RangeIndex(1, len(values) + 1, name="rank"), name="eigenvalue")


def compare_runs(paths: Iterable[str | os.PathLike[str]]) -> pd.DataFrame:
    """The steps of several runs, one below the other: the columns `run` (its directory's name) and `step` first."""
    runs = [load_run(path) for path in paths]
    return _concatenated(run.steps.reset_index().assign(run=run.name) for run in runs).pipe(_first, ["run", "step"])


def over_runs(steps: pd.DataFrame, key: str) -> pd.DataFrame:
    """
    Mean of `key` over runs at each step, with the 95 % Student interval of that mean.

    Args:
        steps: of [`compare_runs`].
        key: a column.

    Returns:
        By step: `mean`, `low`, `high`, `num_runs`; a step that only one run has reached has no interval.
    """
    table = steps.groupby("step")[key].agg(["mean", "std", "count"])
    margin = table["std"] / np.sqrt(table["count"]) * table["count"].map(lambda count: student_t(count - 1))
    ends = {"low": table["mean"] - margin, "high": table["mean"] + margin, "num_runs": table["count"]}
    return table[["mean"]].assign(**ends)


def high_entropy_tokens(
    tokens: pd.DataFrame, column: str = "entropy", quantile: float = 0.8, min_count: int = 5
) -> pd.DataFrame:
    """
    Which tokens are drawn where the policy is undecided.

    Args:
        tokens: a row a token: `Run.evaluation_tokens`, or `Run.tokens` with `column="entropy_before"`.
        column: the entropy, in nats.
        quantile: a token is undecided above this quantile of the entropy.
        min_count: leave tokens out that were drawn less often.

    Returns:
        By `token`, the largest share first: `count`; `entropy_mean`, nats; `high_fraction`, how often it was drawn
        undecidedly; `share_of_entropy`, its part of the sum over all tokens.
    """
    high = tokens[column] > tokens[column].quantile(quantile)
    groups = tokens.assign(high=high).groupby("token", sort=False)
    table = groups.agg(count=(column, "size"), entropy_mean=(column, "mean"), high_fraction=("high", "mean"))
    table["share_of_entropy"] = table["count"] * table["entropy_mean"] / tokens[column].sum()
    return table[table["count"] >= min_count].sort_values("share_of_entropy", ascending=False)


def token_dump(tokens: pd.DataFrame, columns: Sequence[str] = ("entropy", "surprisal"), width: int = 30) -> str:
    """
    One completion token by token, as text: position, token, numbers in nats, and a bar as long as the first of them.

    Args:
        tokens: the rows of one completion, in order.
        columns: what to print; the first is drawn, `width` characters for the largest.
    """
    largest = tokens[columns[0]].max() or 1.0
    heads = "  ".join(f"{column:>14}" for column in columns)
    lines = [f"{'position':>8}  {'token':<16}  {heads}"]
    for row in tokens.to_dict("records"):
        numbers = "  ".join(f"{row[column]:>14.4f}" for column in columns)
        bar = "█" * round(width * row[columns[0]] / largest)
        lines.append(f"{row['position']:>8}  {row['token']!r:<16}  {numbers}  {bar}")
    return "\n".join(lines)


def _by_step(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows).set_index("step") if rows else pd.DataFrame(index=pd.Index([], name="step"))


def _groups_of(step: int, arrays: Mapping[str, np.ndarray]) -> pd.DataFrame:
    table = pd.DataFrame({
        "prompt_index": arrays["prompt_index"], "reward": arrays["rewards"],
        "length": arrays["completion_mask"].sum(1),
    })  # fmt: skip
    groups = table.groupby("prompt_index").agg(
        num_completions=("reward", "size"), reward_mean=("reward", "mean"),
        reward_std=("reward", "std"), length_mean=("length", "mean"),
    )  # fmt: skip
    groups.insert(0, "step", step)
    return groups.reset_index()


def _read_parquets(paths: list[Path]) -> Iterator[pd.DataFrame]:
    """All of them; TRL writes in place, so a killed or live run may leave the newest unfinished: it is named."""
    from pyarrow import ArrowInvalid

    for path in paths:
        try:
            yield pd.read_parquet(path)
        except ArrowInvalid as error:
            if path != paths[-1]:
                raise
            logger.warning("%s is not finished (killed while writing, or live): left out (%s)", path, error)


def _concatenated(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    tables = list(tables)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _first(table: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    return table[[*names, *(name for name in table if name not in names)]]


def student_t(dof: int) -> float:
    """97.5 % quantile of Student's t; nan without degrees of freedom, within 2e-4 above 10 (Cornish-Fisher)."""
    if dof < 1:
        return float("nan")
    if dof <= len(_STUDENT_T):
        return _STUDENT_T[dof - 1]
    z = NormalDist().inv_cdf(0.975)
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / dof**power for power, term in enumerate(terms, start=1))
