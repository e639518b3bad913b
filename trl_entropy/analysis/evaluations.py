"""What `trl-entropy evaluate` left in a run directory, as pandas DataFrames: the part of `Run` that reads it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.metrics import unit
from trl_entropy.runs.reading import check_last_line, reading

_TOKEN_COLUMNS = [
    "step", "prompt_id", "sample", "position", "token_id", "token", "entropy", "surprisal", "correct",
]  # fmt: skip
_SAMPLE_COLUMNS = ["step", "prompt_id", "sample", "correct"]
_TOKEN_LISTS = ["completion_ids", "logps", "entropies"]


class Evaluations:
    """The tables of a run's evaluated checkpoints; a property reads its files when it is first used."""

    _directory: RunDirectory

    def texts_of(self, token_ids: pd.Series) -> pd.Series:
        """The text of each token id."""
        raise NotImplementedError

    @functools.cached_property
    def evaluation(self) -> pd.DataFrame:
        """Numbers of evaluated checkpoints, a row each: `step`, `metric`, `value`, `low`, `high` (95 %), `unit`."""
        rows = [
            {"step": summary["step"], "metric": name, **entry, "unit": unit(name)}
            for summary in self._directory.checkpoint_summaries()
            for name, entry in summary["metrics"].items()
        ]
        return pd.DataFrame(rows, columns=["step", "metric", "value", "low", "high", "unit"])

    @functools.cached_property
    def records(self) -> pd.DataFrame:
        """The completions of evaluated checkpoints, a row each, with token ids, log-probabilities and entropies."""
        return self._evaluated("records.parquet")

    @functools.cached_property
    def prompts(self) -> pd.DataFrame:
        """A row for each held-out prompt and checkpoint: pass@k, and counts and sums over the prompt's samples."""
        return self._evaluated("prompts.parquet")

    @functools.cached_property
    def positions(self) -> pd.DataFrame:
        """A row for each token position and checkpoint: mean entropy and surprisal with 95 % intervals."""
        return self._evaluated("positions.csv")

    @property
    def evaluated_steps(self) -> list[int]:
        """The steps of the evaluated checkpoints."""
        return [summary["step"] for summary in self._directory.checkpoint_summaries()]

    @functools.cached_property
    def evaluation_tokens(self) -> pd.DataFrame:
        """
        The tokens of the evaluated samples, a row for each: `step`, `prompt_id`, `sample`, `position`, `token_id`,
        `token`, `entropy`, `surprisal`, `correct` (whether the sample is).
        """
        tables = [self.evaluation_tokens_of(step) for step in self.evaluated_steps]
        return concatenated(tables) if tables else pd.DataFrame(columns=_TOKEN_COLUMNS)

    def evaluation_tokens_of(self, step: int) -> pd.DataFrame:
        """[`Run.evaluation_tokens`] of one checkpoint; reads its file only."""
        return self._tokens_of_samples(self._samples(step))

    def first_samples(self) -> dict[int, pd.DataFrame]:
        """[`Run.evaluation_tokens`] of each checkpoint's first sample on the prompt that was evaluated first."""
        found, prompt = {}, None
        for step in self.evaluated_steps:
            rows = self._samples(step)
            prompt = rows["prompt_id"].iloc[0] if prompt is None else prompt
            found[step] = self._tokens_of_samples(rows[(rows["prompt_id"] == prompt) & (rows["sample"] == 0)])
        return found

    def _samples(self, step: int) -> pd.DataFrame:
        """A row for each sample of a checkpoint, without the texts."""
        rows = self._evaluated_at(step, "records.parquet", ["greedy", *_SAMPLE_COLUMNS[1:], *_TOKEN_LISTS])
        return rows[~rows.pop("greedy")]

    def _tokens_of_samples(self, rows: pd.DataFrame) -> pd.DataFrame:
        lengths = rows["completion_ids"].map(len).to_numpy(dtype=int)
        table = rows[_SAMPLE_COLUMNS].loc[rows.index.repeat(lengths)].reset_index(drop=True)
        nothing: list[np.ndarray] = [np.empty(0)]
        table["position"] = np.concatenate([*nothing, *map(np.arange, lengths)]).astype(int)
        values = {name: np.concatenate([*nothing, *rows[name]]) for name in _TOKEN_LISTS}
        table["surprisal"], table["entropy"] = -values["logps"].astype(float), values["entropies"].astype(float)
        table["token_id"] = values["completion_ids"].astype(int)
        table["token"] = self.texts_of(table["token_id"])
        return table[_TOKEN_COLUMNS]

    def _evaluated(self, name: str) -> pd.DataFrame:
        return concatenated(self._evaluated_at(step, name) for step in self.evaluated_steps)

    def _evaluated_at(self, step: int, name: str, columns: list[str] | None = None) -> pd.DataFrame:
        path = self._directory.checkpoint_folder(step) / name
        with reading(path):
            table = table_in(path, columns)
        table.insert(0, "step", step)
        return table


def table_in(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """The table in a file of Parquet, of which only `columns` are read if they are given, or of CSV."""
    if path.suffix != ".csv":
        with open(path, "rb") as file:  # by its name pandas would take a folder for an empty table
            return pd.read_parquet(file, columns=columns)
    check_last_line(path)
    return pd.read_csv(path)


def concatenated(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    tables = list(tables)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
