"""Every command ends with one line where a file cannot be written, and asks for room only on a full disk."""

import errno
from pathlib import Path

import pytest

from trl_entropy import archive, doctor, evaluate, experiment, report, sft, train

QUICKSTART = ["--config", str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")]
SFT = ["--config", str(Path(__file__).parents[2] / "configs" / "sft-smollm2-135m.yaml"), "--use_cpu", "true"]
# The command, what it calls, and its arguments.
COMMANDS = {
    "train": (train, "check_writable", [*QUICKSTART, "--output_dir", "RUN"]),
    "train, while building": (train, "build_trainer", [*QUICKSTART, "--output_dir", "RUN"]),
    "sft": (sft, "fine_tune", [*SFT, "--bf16", "false", "--output_dir", "RUN"]),
    "evaluate": (evaluate, "check_writable", ["--run", "RUN"]),
    "report": (report, "write_report", ["RUN"]),
    "archive": (archive, "archive", ["RUN", "URL"]),
    "doctor": (doctor, "diagnose", QUICKSTART),
    "experiment": (experiment.importlib, "import_module", ["kernel", "RUN"]),
}


@pytest.mark.parametrize("number, advice", [
    (errno.ENOSPC, "Make room on the disk"), (errno.EROFS, "Choose another folder, or allow writing to this one"),
    (errno.EIO, None),
])  # fmt: skip
@pytest.mark.parametrize("name", COMMANDS)
def test_one_line(name, number, advice, tmp_path, monkeypatch):
    command, called, arguments = COMMANDS[name]

    def fail(*args, **kwargs):
        raise OSError(number, "what happened", "some/file")

    monkeypatch.setattr(command, called, fail)
    monkeypatch.setattr(evaluate, "read_config", lambda *_: {})
    monkeypatch.setattr(evaluate, "_settings", lambda args, config: None)
    monkeypatch.setattr(evaluate, "targets_of", lambda *_: [])
    main = (experiment if called == "import_module" else command).main
    with pytest.raises(SystemExit) as end:
        main([str(tmp_path) if argument == "RUN" else argument for argument in arguments])
    line = str(end.value)
    assert f"[Errno {number}] what happened: 'some/file'" in line and "\n" not in line
    assert advice in line if advice else "room" not in line and "folder" not in line


@pytest.mark.parametrize("number, advice", [
    (errno.ENOSPC, "make room on the disk"), (errno.EROFS, "choose another folder, or allow writing to this one"),
    (errno.EIO, "remove the cause"),
])  # fmt: skip
def test_what_to_do_where_training_stops(number, advice, tmp_path):
    error = OSError(number, "what happened", "some/file")
    assert train._advice_on(error, tmp_path).endswith(
        f"Training stopped; {advice}, then begin anew with --resume_from_checkpoint latest_or_new."
    )
