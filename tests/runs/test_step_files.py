"""Files of some steps: how many stay, and that the steps' completions stay as long as a probe refers to them."""

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from trl_entropy.runs import step_files
from trl_entropy.runs.reading import UnreadableFile
from trl_entropy.runs.step_files import ROLLOUTS, completions_path, keep_completions, probe_steps, write_probe_file


def write(run, probe, step, keep):
    return write_probe_file(run, probe, step, {"a": torch.zeros(1)}, {}, keep)


def test_each_probe_keeps_its_own_and_the_completions_that_they_refer_to(tmp_path):
    for step in range(1, 41):
        for probe, every in {"entropy": 1, "fisher": 8}.items():
            if step % every == 0:
                write(tmp_path, probe, step, 4)
                write(tmp_path, ROLLOUTS, step, 4)
    assert probe_steps(tmp_path, "entropy") == [1, 17, 33, 40]
    assert probe_steps(tmp_path, "fisher") == [8, 24, 40]
    assert probe_steps(tmp_path, ROLLOUTS) == [1, 8, 17, 24, 33, 40]


def test_without_a_bound_all_stay(tmp_path):
    for step in range(1, 41):
        write(tmp_path, "entropy", step, None)
    assert probe_steps(tmp_path, "entropy") == list(range(1, 41))
    write(tmp_path, "entropy", 41, 4)  # a run that is resumed with a bound
    assert probe_steps(tmp_path, "entropy") == [1, 17, 33, 41]


def test_a_file_that_cannot_be_written_deletes_none(tmp_path, monkeypatch):
    write(tmp_path, "entropy", 1, 1)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, "entropy", 2, 1)
    assert probe_steps(tmp_path, "entropy") == [1]


def test_other_files_are_left_alone(tmp_path):
    others = ("step_000001.txt", ".step_000009.safetensors.tmp", "notes")
    (tmp_path / "probes" / "entropy").mkdir(parents=True)
    for name in others:
        (tmp_path / "probes" / "entropy" / name).write_text("mine")
    for step in (1, 2):
        write(tmp_path, "entropy", step, 1)
    left = {path.name for path in (tmp_path / "probes" / "entropy").iterdir()}
    assert left == {"step_000002.safetensors", *others}


@pytest.fixture
def table():
    return pd.DataFrame({"step": [1] * 64, "completion": ["a text that comes again and again"] * 64, "reward": 0.5})


def test_tables_are_compressed_and_bounded_and_read_as_trl_wrote_them(tmp_path, table):
    (tmp_path / "completions").mkdir()
    for step in range(1, 13):
        table.to_parquet(completions_path(tmp_path, step))
        keep_completions(tmp_path, step, 4)
    assert step_files.completions_steps(tmp_path) == [1, 5, 9, 12]
    path = completions_path(tmp_path, 12)
    assert pq.ParquetFile(path).metadata.row_group(0).column(1).compression == "ZSTD"
    pd.testing.assert_frame_equal(pd.read_parquet(path), table)
    before = path.read_bytes()
    table.to_parquet(path)
    keep_completions(tmp_path, 12, 4)
    assert path.read_bytes() == before  # the same table makes the same bytes
    assert not [path for path in (tmp_path / "completions").iterdir() if path.name.startswith(".")]


def test_a_table_that_is_damaged_is_named_and_stays(tmp_path, table):
    (tmp_path / "completions").mkdir()
    path = completions_path(tmp_path, 1)
    path.write_bytes(b"PAR1")
    with pytest.raises(UnreadableFile, match=r"completions_00001\.parquet cannot be read"):
        keep_completions(tmp_path, 1, 4)
    assert path.read_bytes() == b"PAR1"


def test_a_full_disk_leaves_the_table_that_trl_wrote(tmp_path, table, monkeypatch):
    (tmp_path / "completions").mkdir()
    table.to_parquet(completions_path(tmp_path, 1))

    def full(*args, **kwargs):
        raise pa.ArrowInvalid("IOError: No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match=r"No space left.*completions_00001\.parquet"):
        keep_completions(tmp_path, 1, 4)
    pd.testing.assert_frame_equal(pd.read_parquet(completions_path(tmp_path, 1)), table)
