"""Datasets that a user's own script passes: what cannot be trained on is refused at construction, the rest trains."""

import pandas as pd
import pytest
from datasets import Dataset, DatasetDict
from first_fast import first_fast

from trl_entropy import DrGRPOConfig, DrGRPOTrainer
from trl_entropy.analysis.run import Run
from trl_entropy.config.setting import own_settings
from trl_entropy.probes import FisherProbe, NoiseScaleProbe
from trl_entropy.probes.entropy import EntropyProbe
from trl_entropy.reporting.write import write_report
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.evaluations import evaluation_of
from trl_entropy.runs.step_files import completions_path, completions_steps
from trl_entropy.trainer import dr_grpo
from trl_entropy.trainer.dataset_checks import check_datasets

PROBE = {"entropy_probe": True, "entropy_probe_completions": "held_out", "entropy_probe_num_completions": 4}
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
        (r"train_dataset has 3 prompts, but a step draws 4 different", {"dataset": lambda p: p.select(range(3))}),
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


STEP = {"num_generations": 4, "per_device_train_batch_size": 16}
CONTROL = {"entropy_control": "report", "entropy_control_num_completions": 4}
# Every toggle, in each of the ways in which it takes prompts or scores completions: whether it works with a stream,
# and whether it goes with images.
TOGGLES = {
    "entropy_probe": (PROBE, False, True),
    "entropy_prediction": ({"entropy_probe": True, "entropy_prediction": "linear"}, True, True),
    "entropy_probe_completions": (EVAL, True, True),  # of a set that is no stream
    "entropy_probe_completions ": ({"entropy_probe": True, "entropy_probe_completions": "rollouts"}, True, True),
    "entropy_second_order": (PROBE | {"entropy_second_order": True}, False, True),
    "entropy_placebo": (PROBE | {"entropy_placebo": True}, False, True),
    "entropy_attribution": (PROBE | {"entropy_attribution": "token"}, False, True),
    "entropy_attribution ": (
        {"entropy_probe": True, "entropy_attribution": "sequence"} | EVAL, True, False,
    ),
    "kl_every": ({"kl_every": 1}, True, True),
    "effective_sample_size_probe": ({"effective_sample_size_probe": True}, True, True),
    "noise_scale_probe": ({"noise_scale_probe": True}, True, False),
    "noise_scale_from": (
        {"noise_scale_probe": True, "noise_scale_from": "micro_batches", "gradient_accumulation_steps": 2}, True, True,
    ),
    "noise_scale_within_prompt": ({"noise_scale_probe": True, "noise_scale_within_prompt": True}, True, False),
    "fisher_probe": ({"fisher_probe": True, "fisher_num_sequences": 12}, True, False),
    "likelihood_probe": ({"likelihood_probe": True}, True, True),
    "mutual_information_probe": (
        {"mutual_information_probe": True, "mutual_information_probe_every": 1, "mutual_information_num_prompts": 4},
        True, False,
    ),
    "optimizer_state_probe": ({"optimizer_state_probe": True}, True, True),
    "entropy_control": (CONTROL, False, True),
    "entropy_control ": ({"entropy_control": "report", "entropy_control_completions": "rollouts"}, True, True),
    "token_control": ({"token_control": "random"}, True, True),
    "metric_every": ({"metric_every": 2}, True, True),
    "change_of": (PROBE | {"change_of": ["entropy", "length"]}, False, True),
    "reward_attribution": (
        PROBE | {"entropy_attribution": "sequence", "reward_attribution": True}, False, False,
    ),
    "probe_precision": (PROBE | {"probe_precision": "float32"}, False, True),
    "token_control ": ({"token_control": "random", "token_control_scope": "micro_batch"}, True, True),
    "token_control  ": ({"token_control": "exchange", "token_control_floor": 1.0}, True, True),
    "curriculum": ({"curriculum": "pass_rate"}, False, False),
    "resample_uninformative_groups": ({"resample_uninformative_groups": True}, False, False),
    "evaluate_checkpoints": ({"evaluate_checkpoints": "wait", "save_strategy": "steps"}, True, True),
}  # fmt: skip


def test_every_toggle_is_tried():
    logging = {name for name, described in own_settings(DrGRPOConfig).items() if described.logs}
    assert {name.strip() for name in TOGGLES} == logging


def checked(train_dataset, eval_dataset, settings):
    args = DrGRPOConfig(output_dir="unused", bf16=False, use_cpu=True, **(STEP | settings))
    check_datasets(args, train_dataset, eval_dataset)


@pytest.mark.parametrize("name", TOGGLES)
def test_streams_and_images_work_or_are_refused_in_one_line(problems, name):
    settings, streams, sees_images = TOGGLES[name]
    stream = problems.to_iterable_dataset()
    if streams:
        checked(stream, problems, settings)
    else:
        with pytest.raises(ValueError, match=r"a streamed dataset \(train_dataset\) has none"):
            checked(stream, problems, settings)
    images = problems.add_column("image", [None] * 8)
    in_messages = [{"role": "user", "content": [{"type": "image", "image": None}, {"type": "text", "text": "What?"}]}]
    of_messages = Dataset.from_dict({"prompt": [in_messages] * 8})
    for dataset in (images, images.rename_column("image", "images"), of_messages):
        sets = (problems, dataset) if settings.get("entropy_probe_completions") == "eval" else (dataset, problems)
        if sees_images:
            checked(*sets, settings)
            continue
        with pytest.raises(ValueError, match="image") as error:
            checked(*sets, settings)
        assert "\n" not in str(error.value) and "use text alone" in str(error.value)


def test_episodes_that_a_probe_draws_have_no_images(problems):
    args = DrGRPOConfig(output_dir="unused", bf16=False, use_cpu=True, **(STEP | PROBE))
    with pytest.raises(ValueError, match="draws episodes with tools or rollout_func"):
        check_datasets(args, problems.add_column("image", [None] * 8), None, has_episodes=True)
    check_datasets(args, problems, None, has_episodes=True)


@pytest.mark.parametrize(
    "probe", [EntropyProbe(num_prompts=4, attribution="sequence"), FisherProbe(), NoiseScaleProbe()]
)
def test_probes_in_callbacks_do_not_take_gradients_by_image_either(problems, probe):
    args = DrGRPOConfig(output_dir="unused", bf16=False, use_cpu=True, **STEP)
    with pytest.raises(ValueError, match=f"{type(probe).__name__} takes the gradient of each completion by the rows"):
        check_datasets(args, problems.add_column("image", [None] * 8), None, callbacks=[probe])


def test_a_stream_trains_with_all_that_works_on_one(problems, make_trainer):
    """In one run, as far as they go together."""
    settings = {}
    for name in ("entropy_probe_completions ", "kl_every", "noise_scale_within_prompt", "fisher_probe"):
        settings |= TOGGLES[name][0]
    trainer = make_trainer(dataset=problems.to_iterable_dataset(), optimizer_state_probe=True, **settings)
    trainer.train()
    row = RunDirectory(trainer.args.output_dir).metrics()[-1]
    assert {"kl", "noise_scale/grad_sq_norm", "entropy/delta_in_sample", "fisher/change_slope"} <= set(row)


def check_tables(run, problems):
    """What is evaluated does not take the place of what a step was trained on."""
    assert completions_steps(run) == [1, 2] and completions_steps(run, "evaluation") == [0, 1, 2]
    trained = [pd.read_parquet(completions_path(run, step)) for step in (1, 2)]
    assert all(table["step"].eq(step).all() for step, table in enumerate(trained, start=1))
    for name, rows in (("a", range(4)), ("a_b", range(4, 8))):
        table = pd.read_parquet(completions_path(run, 1, "evaluation", name))
        assert len(table) == 8 and set(table["prompt"]) == set(problems.select(rows)["prompt"])
        assert not set(table["completion"]) <= set(trained[0]["completion"])
    assert not [path for path in (run / "completions").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("kind", first_fast([dict, DatasetDict]))
def test_several_evaluation_sets_have_rows_by_name(kind, problems, make_trainer):
    """Names that begin alike too; the probe draws from all of them, whatever their other columns are."""
    sets = kind(a=problems.select(range(4)), a_b=problems.select(range(4, 8)).add_column("extra", [1] * 4))
    trainer = make_trainer(
        eval_dataset=sets, eval_strategy="steps", eval_steps=1, eval_on_start=True, num_generations_eval=2,
        per_device_eval_batch_size=8, log_completions=True, num_completions_to_print=0,
        **(EVAL | {"entropy_probe_num_completions": 8}),
    )  # fmt: skip
    trainer.train()
    run = RunDirectory(trainer.args.output_dir)
    check_tables(run.path, problems)
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
