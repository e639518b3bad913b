"""Datasets that a user's own script passes: what cannot be trained on is refused at construction, the rest trains."""

import pytest
from datasets import Dataset, DatasetDict

from trl_entropy import DrGRPOTrainer
from trl_entropy.analysis.run import Run
from trl_entropy.probes.entropy import EntropyProbe
from trl_entropy.reporting.write import write_report
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.evaluations import evaluation_of
from trl_entropy.trainer import dr_grpo

PROBE = {"entropy_probe": True, "entropy_probe_num_completions": 4}
EVAL = {**PROBE, "entropy_probe_completions": "eval"}


@pytest.fixture
def refused(make_trainer, monkeypatch):
    """refused(message, **settings): it is, in one line, before TRL is handed anything."""
    monkeypatch.setattr(dr_grpo.PromptSelectingTrainer, "__init__", lambda *a, **k: pytest.fail("a model would load"))

    def refused(message, **settings):
        with pytest.raises(ValueError, match=message) as error:
            make_trainer(**settings)
        assert "\n" not in str(error.value)

    return refused


def renamed(problems: Dataset) -> Dataset:
    return problems.rename_column("prompt", "question")


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        (r"train_dataset has 3 prompt\(s\), but a step draws 4 different", {"dataset": lambda p: p.select(range(3))}),
        ("train_dataset has no rows", {"dataset": lambda p: p.select([])}),
        (r"train_dataset has no column 'prompt', only \['question'\]", {"dataset": renamed}),
        (r"eval_dataset has no column 'prompt'", {"eval_dataset": renamed}),
        (r"eval_dataset\['b'\] has no column", {"eval_dataset": lambda p: {"a": p, "b": renamed(p)}}),
        ("eval_dataset has no rows", {"eval_dataset": lambda p: p.select([])}),
        ("completions='eval' draws prompts from eval_dataset, and there is none", EVAL),
        (
            "completions='eval' draws prompts from eval_dataset, and there is none",
            EVAL | {"eval_dataset": lambda p: {}},
        ),
        (
            "draws 4 prompts, and eval_dataset has 3",
            EVAL | {"eval_dataset": lambda p: p.select(range(3))},
        ),
        ("draws 4 prompts beside the 4 of a step, and .* has 7", PROBE | {"dataset": lambda p: p.select(range(7))}),
        (
            r"a streamed dataset \(eval_dataset\['b'\]\) has none",
            EVAL | {"eval_dataset": lambda p: {"a": p, "b": p.to_iterable_dataset()}},
        ),
        *(
            (
                r"a streamed dataset \(train_dataset\) has none",
                settings | {"dataset": lambda p: p.to_iterable_dataset()},
            )
            for settings in (
                PROBE,
                {"curriculum": "pass_rate"},
                {"callbacks": [EntropyProbe(num_prompts=4)]},
                {"entropy_control": "report", "entropy_control_num_completions": 4},
            )
        ),
    ],
)
def test_what_cannot_be_trained_on_is_refused(refused, problems, message, settings):
    made = {name: value(problems) if callable(value) else value for name, value in settings.items()}
    refused(message, **made)


def test_datasets_are_found_where_a_script_passes_them_by_place(problems, make_trainer, monkeypatch):
    args = make_trainer().args
    monkeypatch.setattr(dr_grpo.PromptSelectingTrainer, "__init__", lambda *a, **k: pytest.fail("a model would load"))
    with pytest.raises(ValueError, match="train_dataset has 3"):
        DrGRPOTrainer("no-model", len, args, problems.select(range(3)))
    with pytest.raises(ValueError, match="eval_dataset has no column"):
        DrGRPOTrainer("no-model", len, args, problems, renamed(problems))


def test_prompts_of_an_environment_cannot_be_drawn(problems, make_trainer, monkeypatch):
    args = make_trainer(**PROBE).args
    monkeypatch.setattr(dr_grpo.PromptSelectingTrainer, "__init__", lambda *a, **k: pytest.fail("a model would load"))
    environments = renamed(problems).rename_column("question", "environment")
    with pytest.raises(ValueError, match="draws prompts from train_dataset, whose prompts come from an environment"):
        DrGRPOTrainer("no-model", len, args, environments, environment_factory={"a": object})


def test_a_streamed_dataset_trains_with_probes_that_draw_nothing(problems, make_trainer):
    trainer = make_trainer(
        dataset=problems.to_iterable_dataset(), effective_sample_size_probe=True, save_strategy="no"
    )
    trainer.train()
    assert [row["step"] for row in RunDirectory(trainer.args.output_dir).metrics()] == [1, 2]


@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_several_evaluation_sets_have_rows_by_name(kind, problems, make_trainer):
    """Names that begin alike too; the probe draws from all of them, whatever their other columns are."""
    sets = kind(a=problems.select(range(4)), a_b=problems.select(range(4, 8)).add_column("extra", [1] * 4))
    trainer = make_trainer(
        eval_dataset=sets, eval_strategy="steps", eval_steps=1, eval_on_start=True, num_generations_eval=2,
        per_device_eval_batch_size=8, **(EVAL | {"entropy_probe_num_completions": 8}),
    )  # fmt: skip
    trainer.train()
    run = RunDirectory(trainer.args.output_dir)
    rows = run.evaluation()
    assert [(row["step"], row["dataset"]) for row in rows] == [(s, name) for s in (0, 1, 2) for name in ("a", "a_b")]
    assert all({"reward", "entropy", "loss", "runtime"} <= set(row) for row in rows)
    assert not any(name.startswith(("a_", "eval_")) for row in rows for name in row)
    assert rows[0]["reward"] != rows[1]["reward"]
    assert all(row["entropy/delta_measured_stderr"] > 0 for row in run.metrics())
    run.write_checkpoint_tables()
    table = (run.evaluation_path.parent / "consolidated_metrics.csv").read_text()
    assert '"training, a"' in table and '"training, a_b"' in table
    assert len(Run(run.path).training_evaluation) == 6
    write_report(run.path)
    page = (run.report_path / "index.html").read_text()
    assert "held out, a:" in page and "held out, a_b:" in page


def test_the_name_of_an_evaluation_set_is_that_of_transformers_own_keys():
    logs = {"eval_a_loss": 1.0, "eval_a_runtime": 2.0, "eval_reward": 3.0, "epoch": 4.0}
    assert evaluation_of(logs) == ({"loss": 1.0, "runtime": 2.0, "reward": 3.0, "epoch": 4.0}, "a")
    assert evaluation_of({"eval_runtime": 2.0, "eval_reward": 3.0}) == ({"runtime": 2.0, "reward": 3.0}, "")
