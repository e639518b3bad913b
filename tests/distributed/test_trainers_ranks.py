"""Other trainers of TRL, and the callback for a plain one, give under every engine the numbers of one process."""

import json
from pathlib import Path

import pytest
from comparing import largest_deviation, rounding_of
from launching import launch
from trainers_worker import KINDS

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("trainers_worker.py")
ENGINES = ("ddp-cpu", "zero1-cpu", "zero2-cpu", "zero3-cpu", "fsdp2-cpu")
WITHOUT_KL = ("zero3-cpu", "fsdp2-cpu")


@pytest.fixture(scope="module")
def rows_of(tmp_path_factory, model_path):
    done: dict[str, dict[str, list[dict]]] = {}

    def run(engine: str) -> dict[str, list[dict]]:
        if engine not in done:
            done[engine] = {}
            directory = tmp_path_factory.mktemp("trainers")
            with_kl = str(engine not in WITHOUT_KL)
            result = launch(
                engine, WORKER, str(model_path), str(directory), with_kl, scratch=directory / "ops", timeout=280
            )
            assert result.returncode == 0, result.stdout[-6000:]
            done[engine] = {kind: json.loads((directory / f"{kind}.json").read_text()) for kind in KINDS}
        return done[engine]

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_numbers_are_those_of_one_process(rows_of, engine, kind):
    expected, got = rows_of("cpu")[kind], rows_of(engine)[kind]
    if kind == "callback":  # what it logs itself; transformers' own clocks and sums aside
        expected, got = (
            [{key: row[key] for key in row if key.startswith("entropy/")} for row in rows[1:]]
            for rows in (expected, got)
        )
    elif engine in WITHOUT_KL:
        expected = [{key: value for key, value in row.items() if key != "kl"} for row in expected]
    expected, got = (
        # Shares of the change, which may be near 0, are ratios of parts that are compared themselves.
        [{key: row[key] for key in row if not key.startswith("entropy/share_")} for row in rows]
        for rows in (expected, got)
    )
    deviation, key = largest_deviation(expected, got)
    print(f"| {engine} | {kind} | {len(got[-1])} | {deviation:.1e} | {key} |")
    for row in expected:
        assert row["entropy/delta_measured_stderr"] > 100 * rounding_of(row)
