"""What an evaluation that was cut off has generated is used by the next one, and by no other one."""

import errno
import itertools
import json
import os

import pytest
import torch
from small_evaluation import PROMPTS, rows_with

from trl_entropy.evaluation import sampling
from trl_entropy.evaluation.kept import KeptBatches, discard_stale, folder_of
from trl_entropy.evaluation.sampling import Sampler

KEY = {"settings": {"seed": 0}, "fingerprint": "a"}


@pytest.fixture
def kept(tmp_path):
    """kept(key): the batches that are kept for an evaluation."""
    return lambda key=KEY: KeptBatches(tmp_path / "step_000005", key)


@pytest.fixture
def drawn(monkeypatch):
    """The sizes of the batches that the model has drawn; more than `most` completions need too much memory."""
    sizes, draw = [], Sampler._draw_batch

    def counting(self, prompt_ids, greedy, start):
        sizes.append(len(prompt_ids))
        if len(prompt_ids) > counting.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return draw(self, prompt_ids, greedy, start)

    counting.most = 10**9
    monkeypatch.setattr(sampling.Sampler, "_draw_batch", counting)
    return sizes, counting


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("cut", [1, 3, 4, 7, 8])
def test_it_goes_on_bit_for_bit_wherever_it_was_cut_off(policy, tokenizer, settings, kept, drawn, greedy, cut):
    sizes, _ = drawn
    prompts = PROMPTS * 2

    def rows(kept, take=None):
        sizes.clear()
        return list(
            itertools.islice(Sampler(policy, tokenizer, settings, 3, kept=kept).draw(rows_with(prompts), greedy), take)
        )

    whole = rows(None)
    assert sizes == [3, 3, 2]
    assert rows(kept(), cut) == whole[:cut]
    num_kept = len(sizes)
    assert rows(kept()) == whole and sizes == [3, 3, 2][num_kept:]
    assert rows(kept()) == whole and sizes == []


def test_it_goes_on_with_the_batch_size_that_memory_left(policy, tokenizer, settings, kept, drawn):
    sizes, limit = drawn
    limit.most = 3
    whole = list(Sampler(policy, tokenizer, settings, 8).draw(rows_with(PROMPTS * 2), greedy=False))
    some = Sampler(policy, tokenizer, settings, 8, kept=kept()).draw(rows_with(PROMPTS * 2), greedy=False)
    assert list(itertools.islice(some, 3)) == whole[:3]
    limit.most = 8  # now there is more memory, and batches of another size would draw something else
    assert (
        list(Sampler(policy, tokenizer, settings, 8, kept=kept()).draw(rows_with(PROMPTS * 2), greedy=False)) == whole
    )
    assert sizes[-2:] == [2, 2]


@pytest.mark.parametrize("other", [{"fingerprint": "b"}, {"settings": {"seed": 1}}])
def test_nothing_is_used_under_other_settings_or_weights(kept, other):
    kept().write(False, 0, [{"completion": "x"}], 2, 0.5)
    assert kept().read(False, 0) == [{"completion": "x"}]
    assert kept(KEY | other).read(False, 0) is None
    assert kept().read(False, 0) is None  # deleted


def test_two_evaluations_at_once_do_not_mix(kept):
    """The second deletes what the first has kept, and the first goes on writing there."""
    first, second = kept(), kept(KEY | {"fingerprint": "b"})
    first.write(False, 0, [{"completion": "of a"}], 2, 0.5)
    assert second.read(False, 0) is None
    second.write(False, 0, [{"completion": "of b"}], 2, 0.5)
    assert first.read(False, 0) is None and second.read(False, 0) == [{"completion": "of b"}]
    first.remove()
    second.remove()


def test_a_damaged_file_is_drawn_again(policy, tokenizer, settings, kept, tmp_path):
    whole = list(Sampler(policy, tokenizer, settings, 3, kept=kept()).draw(rows_with(PROMPTS * 2), greedy=False))
    folder = folder_of(tmp_path / "step_000005")
    assert folder.name.startswith(".")
    second = folder / "samples_00000003.parquet"
    second.write_bytes(second.read_bytes()[:100])
    (folder / "samples_00000006.parquet").unlink()
    assert (
        list(Sampler(policy, tokenizer, settings, 3, kept=kept()).draw(rows_with(PROMPTS * 2), greedy=False)) == whole
    )


@pytest.mark.parametrize("text", ["", "[", json.dumps({"other": 1})])
def test_a_damaged_key_is_another_one(kept, tmp_path, text):
    kept().write(True, 0, [{"completion": "x"}], 2, 0.5)
    (folder_of(tmp_path / "step_000005") / "key.json").write_text(text)
    assert kept().read(True, 0) is None


def test_seconds_and_batch_size_are_those_of_what_was_read(kept):
    kept().write(True, 0, [{"completion": "x"}], 4, 1.5)
    kept().write(True, 1, [{"completion": "y"}], 2, 0.25)
    again = kept()
    assert (again.seconds, again.batch_size) == (0.0, None)
    assert again.read(True, 0) and again.read(True, 1) and again.read(True, 2) is None
    assert (again.seconds, again.batch_size) == (1.75, 2)
    again.remove()
    assert kept().read(True, 0) is None


def make_partial(run, step, settings, fingerprint="a"):
    output = run / "evaluation" / f"step_{step:06d}"
    KeptBatches(output, {"settings": settings, "fingerprint": fingerprint})
    return folder_of(output)


def test_what_no_evaluation_will_go_on_from_is_removed(tmp_path):
    for step in (2, 3, 5):
        (tmp_path / f"checkpoint-{step}").mkdir()
    folders = {step: make_partial(tmp_path, step, {"seed": 0}) for step in (0, 2, 3, 4, 5)}
    for step, seed in (
        (2, 0),
        (3, 1),
    ):  # the results of 2 are those that its batches were kept for, those of 3 are not
        (tmp_path / "evaluation" / f"step_{step:06d}").mkdir()
        summary = {"settings": {"seed": seed}, "fingerprint": "a"}
        (tmp_path / "evaluation" / f"step_{step:06d}" / "summary.json").write_text(json.dumps(summary))
    discard_stale(tmp_path)
    assert [step for step, folder in folders.items() if folder.exists()] == [0, 3, 5]  # 4 has no checkpoint
    discard_stale(tmp_path, after_step=4)
    assert [step for step, folder in folders.items() if folder.exists()] == [0, 3]


def test_what_was_not_renamed_any_more_is_removed_or_put_back(tmp_path):
    folder = tmp_path / "evaluation"
    for name in (".step_000001.tmp", ".step_000002.former.tmp", ".step_000003.former.tmp", "step_000003"):
        (folder / name).mkdir(parents=True)
    discard_stale(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["step_000002", "step_000003"]


def test_one_error_while_it_is_deleted_leaves_nothing(kept, tmp_path, monkeypatch):
    batches, calls, rmdir = kept(), [], os.rmdir

    def failing_once(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise OSError(errno.EIO, "Input/output error")
        rmdir(*args, **kwargs)

    monkeypatch.setattr(os, "rmdir", failing_once)
    batches.remove()
    assert len(calls) == 2 and not any(tmp_path.iterdir())
