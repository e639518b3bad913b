"""The layout that a run writes is one that TensorBoard reads, and its charts are of what the run logs."""

import re

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from trl_entropy.runs.metrics import METRICS, unit
from trl_entropy.runs.tensorboard import MARGIN, layout_of

PROBES = {"entropy", "noise_scale", "fisher", "effective_sample_size", "mutual_information"}


def charts_of(layout):
    return {title: (kind, tags) for charts in layout.values() for title, (kind, tags) in charts.items()}


def key_of(expression):
    return re.sub(r"\\(.)", r"\1", expression).removeprefix("train/").removesuffix("$")


def test_every_key_is_a_metric_and_a_chart_has_one_unit():
    charts = charts_of(layout_of(PROBES))
    assert len(charts) > 12 and any(kind == MARGIN for kind, _ in charts.values())
    for title, (_, tags) in charts.items():
        keys = [key_of(tag) for tag in tags]
        assert all(key in METRICS or key.startswith("completions/") for key in keys), title
        assert len({unit(key) for key in keys}) == 1, title


def test_a_line_is_its_key_and_not_one_that_begins_with_it():
    expressions = [e for kind, tags in charts_of(layout_of(PROBES)).values() if kind != MARGIN for e in tags]
    (expression,) = (e for e in expressions if e.startswith("train/entropy/delta_measured"))
    # TensorBoard takes re.match
    assert re.match(expression, "train/entropy/delta_measured")
    assert not re.match(expression, "train/entropy/delta_measured_stderr")


def test_charts_of_probes_that_are_off_are_left_out():
    assert list(layout_of(())) == ["Training"]


def test_a_run_writes_it_and_logs_what_it_draws(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    trainer = make_trainer(
        report_to="tensorboard",
        max_steps=3,
        entropy_probe=True,
        entropy_probe_completions="held_out",
        entropy_probe_num_completions=4,
        noise_scale_probe=True,
    )
    trainer.train()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (written,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(written.tensor_proto.string_val[0])
    expected = ["Training", "Entropy change of a step", "Reward change of a step", "Gradient noise"]
    assert [category.title for category in layout.category] == expected
    tags = events.Tags()["scalars"]
    for chart in (chart for category in layout.category for chart in category.chart):
        expressions = chart.multiline.tag or [f"{chart.margin.series[0].value}$"]
        off = chart.title.startswith("what made it")  # entropy_attribution
        assert off or any(re.match(e, tag) for e in expressions for tag in tags), chart.title
