"""
A run directory as pandas DataFrames. Runs that still go on, were killed or were resumed can be read too.

    run = load_run("runs/quickstart")
    run.steps["entropy/policy"].plot()
    run.completions.tail()

Files are read when a table is first asked for. This module imports no torch.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from trl_entropy.analysis.evaluations import Evaluations, concatenated, table_in
from trl_entropy.analysis.step_intervals import intervals_of
from trl_entropy.analysis.tokens import own_tokens, token_table
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.reading import UnreadableFile, check_last_line, reading
from trl_entropy.runs.step_files import completions_path, completions_steps, probe_path, probe_steps
from trl_entropy.runs.strict_json import Json, Row

if TYPE_CHECKING:
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

_PROBE_COLUMNS = [
    "step", "row", "prompt_index", "position", "token_id", "token", "logps_before", "logps_after", "entropy_before",
    "entropy_after",
]  # fmt: skip


def load_run(path: str | os.PathLike[str]) -> Run:
    """
    The run in the directory `path`. Its files are read later, when a table is asked for.

    Raises:
        ValueError: when there is no such directory.
    """
    if not Path(path).is_dir():
        raise ValueError(f"There is no directory {path}. Give a run directory, such as runs/quickstart.")
    return Run(Path(path))


class Run(Evaluations):
    """
    A run directory as DataFrames. A property reads its files when it is first used and then keeps them; call
    `load_run` again to see what a run in progress has written since.

    Args:
        path: the run directory.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.resolve().name
        self._directory = RunDirectory(path)
        self._left_out: list[str] = []

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    # ---- training

    @functools.cached_property
    def steps(self) -> pd.DataFrame:
        """`metrics.jsonl`: a row for each step (the index), a column for each key; nan where a step lacks the key."""
        return _by_step(self._rows)

    def rows(self, key: str = "step") -> list[Row]:
        """The lines of `metrics.jsonl` that have `key`, as the functions of `analysis.plots` take them."""
        return [row for row in self._rows if row.get(key) is not None]

    def intervals(self, key: str = "entropy/delta_measured", num_prompts: str | None = None) -> pd.DataFrame:
        """
        What was measured or predicted on the probe batch, with its 95 % interval (Student's t over prompts).

        Args:
            key: of the entropy, the reward, a length or a metric: `NAME/probe_batch`, `NAME/delta_*`, `NAME/error_*`,
                `NAME/half_*`.
            num_prompts: for a key of your own with a `KEY_stderr` over prompts: the key that has their number, which
                for the probe batch is `entropy/num_prompts`.

        Returns:
            A row for each step that has the key (the index): `value`, `stderr`, `low`, `high`, `num_prompts`, in the
            key's unit. `low` and `high` are nan for a single prompt.

        Raises:
            ValueError: when no step has the key or its error, or that is not known to be one over prompts.
        """
        return intervals_of(self.steps, key, num_prompts)

    @functools.cached_property
    def _rows(self) -> list[Row]:
        rows = self._directory.metrics()
        self._name_unreadable(self._directory.metrics_path)
        return rows

    @functools.cached_property
    def training_evaluation(self) -> pd.DataFrame:
        """`evaluation/metrics.csv`: what training measured on held-out prompts, a row for each evaluated step, and
        for each set if there are several: then the column `dataset` names it."""
        return _by_step(self.training_evaluation_rows)

    @functools.cached_property
    def training_evaluation_rows(self) -> list[Row]:
        """The lines of `evaluation/metrics.csv`, as the functions of `analysis.plots` take them."""
        rows = self._directory.evaluation()
        self._name_unreadable(self._directory.evaluation_path)
        return rows

    @property
    def completions_steps(self) -> list[int]:
        """The steps of which there is a table of completions; `completions_files_keep` says how many there are."""
        return completions_steps(self.path)

    @functools.cached_property
    def completions(self) -> pd.DataFrame:
        """
        `completions/*.parquet`, TRL's tables: prompt, completion, rewards, advantage; a row for each completion of
        each of [`Run.completions_steps`]. All texts are read; [`Run.last_completions`] reads one table.
        """
        tables = (self.completions_of(step) for step in self.completions_steps)
        return concatenated(table for table in tables if table is not None)

    def last_completions(self) -> pd.DataFrame:
        """[`Run.completions`] of the last step whose table can be read; without rows if there is none."""
        tables = (self.completions_of(step) for step in reversed(self.completions_steps))
        return next((table for table in tables if table is not None), pd.DataFrame())

    def completions_of(self, step: int, kind: str = "completions") -> pd.DataFrame | None:
        """TRL's table of a step; None if it cannot be read: the newest may not be complete, TRL writes it in parts.
        `kind` may be `"dropped"`, for the groups that were drawn for it and replaced, or `"evaluation"`."""
        path = completions_path(self.path, step, kind)
        try:
            with reading(path):
                return table_in(path)
        except UnreadableFile as error:
            self._leave_out(f"{error}; it is left out.")
            return None

    @functools.cached_property
    def config(self) -> Json:
        """`config.yaml`: all settings; empty if the run was killed before it wrote them."""
        import yaml

        return _mapping_in(self.path / "config.yaml", yaml.safe_load)

    @functools.cached_property
    def environment(self) -> Json:
        """`environment.json`: versions, machine, command line."""
        return _mapping_in(self.path / "environment.json", json.loads)

    # ---- damage

    @property
    def left_out(self) -> list[str]:
        """What has been read so far without a part that is cut or damaged: a sentence for each file."""
        return list(self._left_out)

    @property
    def lacks_texts(self) -> bool:
        """Whether tokens were shown by number so far, since the run directory holds no tokenizer."""
        return self.__dict__.get("_tokenizer", self) is None

    def _leave_out(self, sentence: str) -> None:
        logger.warning("%s", sentence)
        self._left_out.append(sentence)

    def _name_unreadable(self, path: Path) -> None:
        if numbers := self._directory.unreadable_lines.get(path):
            lines = f"line{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers[:8]))}"
            more = ", ..." if len(numbers) > 8 else ""
            self._leave_out(f"{path}: left out is {lines}{more}, cut when the run was killed or not written yet.")

    @functools.cached_property
    def starts(self) -> list[Row]:
        """`starts.jsonl`: where training began and was resumed, the command, versions, and the settings that changed
        there: `{"learning_rate": [0.001, 0.0005]}`. Empty for runs of earlier versions."""
        return self._directory.starts()

    # ---- probe files

    def probe_steps(self, probe: str) -> list[int]:
        """The steps of which a file of `probe` (`entropy`, `rollouts`, ...) exists."""
        return probe_steps(self.path, probe)

    def probe_file(self, probe: str, step: int, names: Iterable[str] | None = None) -> dict[str, np.ndarray]:
        """The arrays that `probe` wrote at `step`, by name; of these names only, if they are given."""
        from safetensors import safe_open

        path = probe_path(self.path, probe, step)
        with reading(path), safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}

    def probe_metadata(self, probe: str, step: int) -> dict[str, str]:
        """What the file of `probe` at `step` says of itself: step, temperature, learning rate, sampler, ..."""
        from safetensors import safe_open

        path = probe_path(self.path, probe, step)
        with reading(path), safe_open(path, "np") as file:
            return dict(file.metadata())

    @functools.cached_property
    def tokens(self) -> pd.DataFrame:
        """
        The completion tokens of the entropy probe's batches E, a row for each: `step`, `row`, `prompt_index`,
        `position` (0 is the first token of the completion), `token_id`, `token`, and a column for every (B, T) array
        of the file, such as `entropy_before`.
        """
        return concatenated(self.tokens_of("entropy", step) for step in self.probe_steps("entropy"))

    def tokens_of(self, probe: str, step: int) -> pd.DataFrame:
        """[`Run.tokens`] of one step and of any probe whose file has a `completion_mask`; reads this file only."""
        table = self.tokens_in(self.probe_file(probe, step))
        table.insert(0, "step", step)
        return table

    def last_tokens(self) -> pd.DataFrame:
        """[`Run.tokens`] of the last step that has them; without rows if there is none."""
        steps = self.probe_steps("entropy")
        return self.tokens_of("entropy", steps[-1]) if steps else pd.DataFrame(columns=_PROBE_COLUMNS)

    def tokens_in(self, arrays: Mapping[str, np.ndarray], context: bool = False) -> pd.DataFrame:
        """[`token_table`] of the arrays of a probe file, with the text of each token."""
        table = token_table(arrays, context)
        table.insert(4, "token", self.texts_of(table["token_id"]))
        return table

    def prompt_text(self, step: int, prompt_index: int) -> str:
        """The text of a prompt that `step` was trained on, from `probes/rollouts`."""
        arrays = self.probe_file("rollouts", step, ("input_ids", "attention_mask", "completion_mask", "prompt_index"))
        row = int(np.flatnonzero(arrays["prompt_index"] == prompt_index)[0])
        width = arrays["input_ids"].shape[1] - arrays["completion_mask"].shape[1]
        kept: np.ndarray = arrays["attention_mask"][row, :width].astype(bool)
        return "".join(self.texts_of(pd.Series(arrays["input_ids"][row, :width][kept])))

    @functools.cached_property
    def groups(self) -> pd.DataFrame:
        """
        The prompt groups that the probed steps were trained on (`probes/rollouts`), a row for each: `step`,
        `prompt_index`, `num_completions`, `reward_mean`, `reward_std`, `length_mean` in tokens.
        """
        names = ("prompt_index", "rewards", "completion_mask")
        return concatenated(
            _groups_of(step, self.probe_file("rollouts", step, names)) for step in self.probe_steps("rollouts")
        )

    def kernel(self, step: int | None = None) -> pd.DataFrame:
        """
        The Fisher kernel K_ij of a step in nats^2; rows and columns are completions, indexed and sorted by
        `prompt_index` and `row`.

        Args:
            step: a probed step; None is the last one.

        Raises:
            ValueError: when the run has no Fisher kernel.
        """
        steps = self.probe_steps("fisher")
        if not steps:
            raise ValueError(f"{self.path} holds no Fisher kernel. Train with fisher_probe: true.")
        arrays = self.probe_file("fisher", steps[-1] if step is None else step)
        names = pd.MultiIndex.from_arrays([arrays["prompt_index"], arrays["rows"]], names=["prompt_index", "row"])
        return pd.DataFrame(arrays["kernel"], index=names, columns=names).sort_index().sort_index(axis=1)

    def last_kernel(self) -> pd.DataFrame:
        """[`Run.kernel`] of the last step that has one; without rows if there is none."""
        return self.kernel() if self.probe_steps("fisher") else pd.DataFrame()

    def kernel_shares(self, step: int) -> pd.DataFrame:
        """
        How the trace of a step's Fisher kernel is divided among the parameters, a row for each: `parameter`, `layer`
        (nan outside the numbered layers), `matrix` (the name within the layer, LoRA's A and B apart), and `share`. The
        shares sum to 1.
        """
        from safetensors import safe_open

        path = probe_path(self.path, "fisher", step)
        with reading(path), safe_open(path, "np") as file:
            names, norms = json.loads(file.metadata()["parameters"]), file.get_tensor("parameter_norms").sum(axis=1)
        table = pd.DataFrame({"parameter": names})
        parts = table["parameter"].str.extract(r"(?:.*\.layers\.(?P<layer>\d+)\.)?(?P<matrix>.*)")
        return table.assign(layer=parts["layer"].astype(float), matrix=parts["matrix"], share=norms / norms.sum())

    # ---- texts

    def texts_of(self, token_ids: pd.Series) -> pd.Series:
        """The text of each token id; `#12` for token 12 if the run directory holds no tokenizer."""
        texts = {token: self._text(token) for token in token_ids.unique().tolist()}
        return token_ids.map(texts)

    def _text(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"#{token_id}"
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def completion_texts(self, token_ids: Iterable[Sequence[int]]) -> list[str] | None:
        """The text of each of these completions without special tokens; None if the run holds no tokenizer."""
        tokenizer = self._tokenizer
        return None if tokenizer is None else tokenizer.decode_batch([list(ids) for ids in token_ids])

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer | None:
        from tokenizers import Tokenizer

        for path in [self._directory.tokenizer_path, *sorted(self.path.glob("checkpoint-*/tokenizer.json"))]:
            if path.exists():
                try:
                    with reading(path):
                        return Tokenizer.from_file(str(path))
                except UnreadableFile as error:
                    self._leave_out(f"{error}; it is left out.")
        return None


def cosines_of(kernel: pd.DataFrame) -> pd.DataFrame:
    """K_ij / sqrt(K_ii K_jj); nan in the row and the column of a completion whose K_ii is not positive."""
    diagonal = np.diag(kernel)
    norms = np.sqrt(np.where(diagonal > 0, diagonal, np.nan))
    return kernel / np.outer(norms, norms)


def spectrum_of(kernel: pd.DataFrame) -> pd.Series:
    """The eigenvalues of a kernel in nats^2, the largest first, indexed by rank 1, 2, ...; nan if an entry is."""
    entries = kernel.to_numpy(dtype=float)
    values = np.linalg.eigvalsh(entries)[::-1] if np.isfinite(entries).all() else np.full(len(entries), np.nan)
    return pd.Series(values, index=pd.RangeIndex(1, len(values) + 1, name="rank"), name="eigenvalue")


def _by_step(rows: list[Row]) -> pd.DataFrame:
    return pd.DataFrame(rows).set_index("step") if rows else pd.DataFrame(index=pd.Index([], name="step"))


def _groups_of(step: int, arrays: Mapping[str, np.ndarray]) -> pd.DataFrame:
    table = pd.DataFrame({
        "prompt_index": arrays["prompt_index"], "reward": arrays["rewards"],
        "length": own_tokens(arrays).sum(1),
    })  # fmt: skip
    groups = table.groupby("prompt_index").agg(
        num_completions=("reward", "size"), reward_mean=("reward", "mean"),
        reward_std=("reward", "std"), length_mean=("length", "mean"),
    )  # fmt: skip
    groups.insert(0, "step", step)
    return groups.reset_index()


def _mapping_in(path: Path, parse: Callable[[str], object]) -> Json:
    """The settings in a file of YAML or JSON; empty if there is no such file."""
    if not path.exists():
        return {}
    with reading(path):
        if path.suffix == ".yaml":  # a part of YAML is YAML too
            check_last_line(path)
        found = parse(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no names with values")
    return found
