"""A run of a script of one's own, evaluated through the function that makes its trainer."""

from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from datasets import Dataset

from trl_entropy import DrGRPOConfig, DrGRPOTrainer
from trl_entropy.evaluate import evaluate
from trl_entropy.evaluation.plan import PROFILES, Job, read_config, settings_of, targets_of
from trl_entropy.evaluation.worker import evaluate as evaluate_job
from trl_entropy.models.embedded import build_model
from trl_entropy.models.embedded_agent import build_agent_tokenizer
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.tasks import script

SMALL = {"num_samples": 2, "device": "cpu"}


def long(prompts, completions, least, **kwargs):
    return [float(len(text) > one) for text, one in zip(completions, least, strict=True)]


def words(prompts, completions, **kwargs):
    return [len(text.split()) or None for text in completions]


def rows(number):
    return Dataset.from_list([{"prompt": f"Ann has {i} apples.", "least": 20} for i in range(number)])


@pytest.fixture
def run(policy, tokenizer, tmp_path):
    """What training leaves that a script has started: a checkpoint, and no word of its task."""
    for folder in ("start", "run/checkpoint-3"):
        policy.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    settings = {"seed": 0, "max_completion_length": 6, "use_cpu": True}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run"


@pytest.fixture
def make(run):
    def make():
        args = DrGRPOConfig(output_dir=str(run), use_cpu=True, bf16=False, max_completion_length=6)
        return DrGRPOTrainer(
            str(run.parent / "start"), [long], args, rows(20), rows(3), metric_funcs=[words],
        )  # fmt: skip

    return make


def test_its_checkpoints_are_evaluated_with_its_data_and_functions(make, run, capsys):
    start, trained = evaluate(make, **SMALL)
    assert (start["step"], trained["step"], trained["num_prompts"]) == (0, 3, 3)
    metrics = trained["metrics"]
    assert metrics["pass@1"]["value"] == pytest.approx(metrics["rewards/long"]["value"])
    assert metrics == start["metrics"]  # the same weights draw the same
    assert metrics["metrics/words"]["low"] < metrics["metrics/words"]["value"] < metrics["metrics/words"]["high"]
    assert "2 checkpoints to evaluate; 3 held-out problems, with 2 samples" in capsys.readouterr().out
    evaluate(make, **SMALL)
    assert "0 checkpoints to evaluate, 2 already done" in capsys.readouterr().out
    (again,) = evaluate(make, run, checkpoints="3", pass_threshold=-1.0, **SMALL)[1:]
    assert again["metrics"]["pass@1"]["value"] == 1.0
    with pytest.raises(ValueError, match="these are no options of an evaluation: --num-sample=2"):
        evaluate(make, num_sample=2)


def test_the_function_may_be_named(run, tmp_path):
    file = tmp_path / "my_script.py"
    file.write_text(
        "from types import SimpleNamespace as Trainer\nfrom datasets import Dataset\n"
        "def fixed(prompts, completions, **kwargs):\n    return [0.5 for _ in completions]\n"
        "def make():\n    rows = Dataset.from_list([{'prompt': 'a'}, {'prompt': 'b'}])\n"
        "    args = Trainer(output_dir='run')\n"
        "    return Trainer(args=args, model=None, train_dataset=rows, eval_dataset=rows, reward_funcs=[fixed],\n"
        "                   reward_func_names=['fixed'], environments=None, rollout_func=None)\n"
    )
    with pytest.raises(ValueError, match=r"as that of a script does not\. Name the function that makes its trainer"):
        read_config(run)
    config = read_config(run, f"{file}:make")
    (target,) = targets_of(run, config, "all")  # its start policy has no name
    settings = settings_of(config, PROFILES["quick"], num_samples=2)
    assert settings.function_files.keys() == {"my_script.py"}
    job = Job.from_json(Job(target, settings, str(RunDirectory(run).checkpoint_folder(3)), 8, "cpu").to_json())
    evaluate_job(job, lambda done, total: None)
    assert RunDirectory(run).checkpoint_summary(3)["metrics"]["rewards/fixed"]["value"] == 0.5


class Desk:
    """An environment that wants its tool to be called."""

    def reset(self, **row):
        self.told = " Hint."
        return self.told

    def ring(self) -> str:
        """Rings."""
        return "?"

    def get_reward(self):
        return len(self.told)


@pytest.mark.parametrize("several", [False, True])
def test_the_environments_of_its_trainer_are_its_tools_and_rewards(policy, run, several):
    tokenizer = build_agent_tokenizer()
    for folder in (run.parent / "start", run / "checkpoint-3"):
        build_model(tokenizer, seed=0).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    rows = [{"prompt": [{"role": "user", "content": f"Ann has {i} apples."}]} for i in range(3)]
    rows = Dataset.from_list([row | {"environment": "desk"} for row in rows] if several else rows)

    def make():
        args = DrGRPOConfig(output_dir=str(run), use_cpu=True, bf16=False, max_completion_length=6)
        factory = {"desk": Desk} if several else Desk
        return DrGRPOTrainer(str(run.parent / "start"), None, args, rows, rows, environment_factory=factory)

    trained = evaluate(make, checkpoints="3", pass_threshold=6.0, **SMALL)[-1]
    assert trained["metrics"]["pass@1"]["value"] == 1.0 and trained["metrics"]["rewards/Desk"]["value"] == 6.0
    records = pd.read_parquet(RunDirectory(run).checkpoint_folder(3) / "records.parquet")
    assert records["prompt"].str.endswith(" Hint.\nResponse:").all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"args": None}, "returned a SimpleNamespace without args; it must return a DrGRPOTrainer"),
        (
            {"eval_dataset": None},
            "the eval_dataset of .* is None; one datasets.Dataset with a column prompt is needed",
        ),
        ({"eval_dataset": Dataset.from_list([{"text": "a"}])}, "is a Dataset; one datasets.Dataset with a column"),
        ({"rollout_func": long}, "has a rollout_func, which draws with a trainer of its own and as it likes"),
        ({"reward_funcs": [long, words]}, "zip"),
    ],
)
def test_what_is_no_such_trainer_is_refused_in_one_line(run, changes, said):
    parts = {"model": None, "train_dataset": rows(2), "eval_dataset": rows(2), "reward_funcs": [long],
             "reward_func_names": ["long"], "environments": None, "rollout_func": None,
             "args": SimpleNamespace(output_dir=str(run))}  # fmt: skip
    parts |= changes
    if parts["args"] is None:
        del parts["args"]
    with pytest.raises(ValueError, match=said) as refused:
        evaluate(lambda: SimpleNamespace(**parts), run)
    assert "\n" not in str(refused.value)


def test_a_function_that_fails_is_named_with_its_line(tmp_path):
    (tmp_path / "failing.py").write_text("def make():\n    return [][0]\n")
    with pytest.raises(
        ValueError, match=r"trainer_factory: .*failing\.py, line 2: IndexError: list index out of range"
    ):
        script.parts_of(f"{tmp_path / 'failing.py'}:make")
    with pytest.raises(ValueError, match=r"failing\.py has no 'mak'; it has make"):
        script.parts_of(f"{tmp_path / 'failing.py'}:mak")
