"""Every cell of the doctor's support table has a test: what is supported is run, what is refused is refused."""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from trl_entropy.config.command_line import parse
from trl_entropy.preflight import support

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from test_user_launch import LAUNCHES, RUNS, WITHOUT_KL, command_line

TESTS = Path(__file__).parents[1]
# The engine of launch/<name>.yaml -> its column.
COLUMNS = {
    "cpu": "plain",
    "ddp-cpu": "ddp",
    "zero1-cpu": "zero1",
    "zero2-cpu": "zero2",
    "zero3-cpu": "zero3",
    "fsdp2-cpu": "fsdp2",
}
REFUSED_ENGINES = "preflight/test_support.py::test_engines_are_refused_as_build_engine_does"
ATTENTION = "engine/test_scored_attention.py::test_scores_and_derivatives_are_those_of_torchs_kernel"
QUANTISATION = "preflight/test_support.py::test_quantised_base_is_refused_by_float32_scoring_alone"
# Axis -> the test of a probe that scores the model, supported or refused; and of one that does not.
SCORING = {"attention": ATTENTION, "quantisation": QUANTISATION}
NOT_SCORING = dict.fromkeys(SCORING, "trainer/test_trainer.py::test_probes_that_take_any_kernel_do_not_score")
KL_OF_SLICES = "config/test_config.py::test_kl_is_refused_where_parameters_are_sliced"


def probes_of(name: str, directory: Path) -> set[str]:
    """Rows of the table that the runs of a launch turn on."""
    found = set()
    for run in RUNS:
        _, args, model = parse(command_line(name, run, directory, Path("embedded")))
        found |= set(support.probe_names(SimpleNamespace(args=args, has_adapter=model.use_peft, shape=None)))
    return found


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> set[tuple[str, str]]:
    """(probe, engine) of every run of `test_metrics_are_those_of_one_process`."""
    directory = tmp_path_factory.mktemp("runs")
    common, under_zero3 = probes_of("one process", directory), probes_of("zero3", directory)
    return {
        (probe, COLUMNS[engine])
        for name, (engine, *_) in LAUNCHES.items()
        for probe in (under_zero3 if name in WITHOUT_KL else common)
    }


@pytest.mark.parametrize("probe", support.DEPENDS_ON)
def test_a_probe_is_run_under_every_engine_that_it_supports(launched, probe):
    tested = {engine for engine in COLUMNS.values() if (probe, engine) in launched}
    supported = {engine for engine in support.ENGINES if support.remedy(probe, "engine", engine) is None}
    if "engine" in support.DEPENDS_ON[probe]:
        supported -= {"zero0"} if probe == "kl_every" else set()  # reads no update: DDP as far as it is concerned
        assert tested == supported
    else:  # reads neither update nor parameters, so that it cannot tell the engines apart
        assert tested == set(COLUMNS.values())


def cells():
    for probe, axes in support.DEPENDS_ON.items():
        for axis, values in support.AXES.items():
            for value in values:
                yield probe, axis, value, axis in axes


def test_every_other_cell_names_a_test_that_exists():
    named = set()
    for probe, axis, value, depends in cells():
        if axis != "engine":
            named.add((SCORING if depends else NOT_SCORING)[axis])
        elif support.remedy(probe, axis, value) is not None:
            sliced = probe == "kl_every" and value in WITHOUT_KL
            named.add(KL_OF_SLICES if sliced else REFUSED_ENGINES)
    for path, function in (name.split("::") for name in named):
        tree = ast.parse((TESTS / path).read_text())
        assert function in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, path
