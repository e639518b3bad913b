"""`trl-entropy experiment kernel` on a real run of three steps."""

import json
import shutil

import numpy as np
import pytest

from trl_entropy.analysis.run import load_run
from trl_entropy.experiment import main


def test_tables_and_pictures(real_run, tmp_path, capsys):
    main(["kernel", str(real_run), "--steps", "2", "3", "--output", str(tmp_path)])
    output = capsys.readouterr().out
    result = json.loads((tmp_path / "kernel.json").read_text(), parse_constant=pytest.fail)
    assert (tmp_path / "kernel.png").stat().st_size > 20_000
    files = [load_run(real_run).probe_file("fisher", step) for step in (2, 3)]
    predicted, measured = (
        np.concatenate([file[f"logps_change_{name}"] for file in files]) for name in ("predicted", "measured")
    )
    # Step 1 has learning rate 0 and adds nothing
    slope = result["slopes"]["all"]
    assert slope["value"] == pytest.approx(predicted @ measured / (predicted @ predicted))
    assert slope["low"] < slope["value"] < slope["high"]
    assert slope["rms"] == pytest.approx(np.sqrt((predicted @ predicted) / (1.5 * len(predicted))))
    for step, row in load_run(real_run).steps.loc[[2, 3]].iterrows():
        entry = result["kernels"][str(step)]
        assert entry["slope"]["value"] == pytest.approx(row["fisher/change_slope"])
        assert entry["slope"]["low"] < row["fisher/change_slope"] < entry["slope"]["high"]
        assert entry["numbers"]["effective_rank"] == row["fisher/effective_rank"]
        assert sum(entry["matrices"].values()) == pytest.approx(1)
        assert sum(entry["change_shares"].values()) == pytest.approx(1)
    assert "| step 3 |" in output and "noise_scale/simple" in output


def test_what_is_missing_is_said(real_run, tmp_path):
    with pytest.raises(SystemExit, match="no Fisher file of step 7; there are"):
        main(["kernel", str(real_run), "--steps", "7"])
    shutil.copy(real_run / "metrics.jsonl", tmp_path)
    with pytest.raises(SystemExit, match="fisher_probe=True"):
        main(["kernel", str(tmp_path)])
