"""The console of a user's own script is that of the command, and what the user chooses stays."""

import pytest
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from trl_entropy.runs.console import ConsoleProgress
from trl_entropy.runs.directory import RunDirectory

BAR, SHOWN = {"disable_tqdm": False, "max_steps": 1}, ("reward=", "entropy=", "s/step=")


def kinds(trainer):
    callbacks = trainer.callback_handler.callbacks
    return [type(c) for c in callbacks if isinstance(c, PrinterCallback | ProgressCallback)]


def test_a_scripts_console_has_the_bar_and_no_dictionaries(make_trainer, problems, capfd):
    sets = {"easy": problems.select(range(4)), "hard": problems.select(range(4, 8))}
    trainer = make_trainer(
        **BAR, eval_dataset=sets, eval_on_start=True, num_generations_eval=2, per_device_eval_batch_size=8,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    capfd.readouterr()
    trainer.train()
    out, err = capfd.readouterr()
    shown = out + err
    assert all(word in shown for word in SHOWN) and "'loss'" not in shown and "completions/mean" not in shown
    for name in sets:
        assert f"step    1  held out, {name}: reward 0." in shown


def test_a_console_that_is_turned_off_is_quiet(make_trainer, capfd):
    trainer = make_trainer(disable_tqdm=True, max_steps=1)
    capfd.readouterr()
    trainer.train()
    assert capfd.readouterr() == ("", "")


class OwnBar(ProgressCallback):
    pass


@pytest.mark.parametrize("callbacks, disable_tqdm, expected", [
    ([], False, [ConsoleProgress]),
    ([TrainerCallback()], True, []),
    ([PrinterCallback], False, [PrinterCallback, ConsoleProgress]),
    ([PrinterCallback()], True, [PrinterCallback]),
    ([ProgressCallback()], False, [ProgressCallback]),
    ([ProgressCallback], True, [ProgressCallback]),
    ([OwnBar], False, [OwnBar]),
])  # fmt: skip
def test_what_the_user_chooses_stays(make_trainer, callbacks, disable_tqdm, expected):
    trainer = make_trainer(callbacks=callbacks, disable_tqdm=disable_tqdm)
    assert kinds(trainer) == expected
    own = [callback for callback in callbacks if not isinstance(callback, type)]
    assert all(any(c is callback for c in trainer.callback_handler.callbacks) for callback in own)


def test_the_bar_goes_as_in_transformers(make_trainer):
    trainer = make_trainer(disable_tqdm=False)
    trainer.remove_callback(ProgressCallback)
    assert kinds(trainer) == []


def test_a_scripts_tensorboard_is_where_the_command_has_it(make_trainer, monkeypatch):
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    trainer = make_trainer(report_to="tensorboard", max_steps=1)
    trainer.train()
    run = RunDirectory(trainer.args.output_dir)
    assert list(run.tensorboard_path.glob("events*")) and not (run.path / "runs").exists()
