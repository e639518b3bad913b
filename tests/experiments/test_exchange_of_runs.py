"""`experiment exchange RUN`: prices of the steps that were made, planted in a copy of a real run."""

import json
import shutil

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from trl_entropy.analysis.run import load_run
from trl_entropy.experiments.exchange import main
from trl_entropy.experiments.exchange_of_runs import prices_of
from trl_entropy.reporting.attribution_section import attribution_section

PRICE = 0.25  # nats per token lost for a unit of reward, by every token


@pytest.fixture(scope="module")
def priced(real_run, tmp_path_factory):
    """A run whose every token earned reward in proportion to the entropy that it lost; tokens in three turns."""
    path = tmp_path_factory.mktemp("runs") / "priced"
    shutil.copytree(real_run, path)
    for file in sorted((path / "probes" / "attribution").glob("step_*.safetensors")):
        with safe_open(file, "np") as opened:
            metadata = opened.metadata()
            given = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        own = given["completion_mask"].astype(bool)
        own[:, 1::3] = False  # what a tool wrote
        given |= {"loss_mask": own, "kind": np.where(np.arange(own.shape[1]) % 2, 1, 0) * own.astype(np.uint8)}
        given["kind"] = given["kind"].astype(np.uint8)
        given["attribution"] = np.where(own, given["attribution"], 0).astype(given["attribution"].dtype)
        given["attribution_reward"] = -given["attribution"] / PRICE
        save_file(given, file, metadata)
    return path


def test_every_part_has_the_planted_price(priced):
    result, tables = prices_of(priced)
    assert list(tables) == ["outcome", "outcome_probability", "turn", "kind"]
    assert {row["category"] for row in result["rows"] if row["by"] == "kind"} == {"kind_prose", "kind_call", "all"}
    for row in result["rows"]:
        if row["earned"]["value"]:
            assert row["price"]["value"] == pytest.approx(PRICE, rel=1e-5)
            assert row["lost"]["value"] == pytest.approx(PRICE * row["earned"]["value"], rel=1e-5)
    parts = [row["lost"]["value"] for row in result["rows"] if row["by"] == "turn"]
    assert sum(parts[:-1]) == pytest.approx(parts[-1], rel=1e-5)


def test_the_command_prints_the_table_and_writes_numbers_and_figure(priced, tmp_path, capsys):
    main([str(priced), "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| turn | first turn |" in printed and "| kind | calls of tools |" in printed
    assert "0.25 [0.25, 0.25]" in printed or "consistent with 0" in printed
    assert json.loads((tmp_path / "exchange.json").read_text())[0]["run"] == "priced"
    assert (tmp_path / "exchange.png").stat().st_size > 10_000


def test_a_run_without_it_is_refused_in_one_line(real_run, tmp_path):
    with pytest.raises(SystemExit, match="holds no attribution of the reward; train with entropy_probe: true"):
        main([str(real_run), "--output", str(tmp_path)])


@pytest.mark.slow
def test_the_page_shows_the_scatter_where_there_are_prices(priced, real_run):
    section = attribution_section(load_run(priced))
    assert section.price_figure.num_panels == 3 and section.price_figure.png.startswith(b"\x89PNG")
    assert attribution_section(load_run(real_run)).price_figure is None
