"""`trl-entropy doctor --trainer_factory` on runs of scripts of one's own, of which no model is loaded."""

import re
from pathlib import Path

import pytest

from trl_entropy import doctor
from trl_entropy.rollouts.user_functions import UserFunctionsTrainer

SCRIPT = '''
from datasets import Dataset, IterableDataset
from trl_entropy import DrGRPOConfig, DrGRPOTrainer

ROWS = Dataset.from_list([{"prompt": f"Ann has {i} apples.", "least": 20} for i in range(40)])


def long(completions, least, **kwargs):
    return [float(len(text) > one) for text, one in zip(completions, least)]


def words(completions, **kwargs):
    return [len(text.split()) for text in completions]


def broken(completions, **kwargs):
    return [{}[text] for text in completions]


class Desk:
    def reset(self, **row):
        return None

    def ring(self) -> str:
        """Rings."""
        return "?"


def args(**settings):
    given = {"num_prompts_per_step": 8, "num_generations": 4, "per_device_train_batch_size": 8, "max_steps": 6,
             "use_cpu": True, "bf16": False, "gradient_checkpointing": False} | settings
    return DrGRPOConfig("run", **given)


def make(rewards=long, data=ROWS, held_out=ROWS.select(range(3)), model="Qwen/Qwen2.5-0.5B", settings={}, **more):
    trainer = DrGRPOTrainer(model, rewards, args(**settings), data, held_out, metric_funcs=[words], **more)
    trainer.nothing_is_called_after_it()


def in_memory():
    from trl_entropy.models.embedded import build_model, build_tokenizer
    make(model=build_model(build_tokenizer()))


def with_lora():
    from peft import LoraConfig
    make(peft_config=LoraConfig(r=4, target_modules=["q_proj"]))


def wrapped():
    from peft import LoraConfig, get_peft_model
    from trl_entropy.models.embedded import build_model, build_tokenizer
    make(model=get_peft_model(build_model(build_tokenizer()), LoraConfig(r=4, target_modules=["q_proj"])))


def no_evaluation():
    make(held_out=None)


def failing_reward():
    make(rewards=[long, broken])


def desk():
    make(environment_factory=Desk, settings={"curriculum": "pass_rate"})


def uneven():
    make(settings={"num_prompts_per_step": 3})


def streamed():
    make(data=ROWS.to_iterable_dataset())


def raising():
    return [][0]


def other():
    return 3


def with_trl():
    from trl import GRPOConfig
    DrGRPOTrainer("model", long, GRPOConfig("run", use_cpu=True, bf16=False), ROWS)
'''


@pytest.fixture
def diagnosed(tmp_path, monkeypatch):
    """diagnosed(function of the script, options): (report, findings)."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(SCRIPT)
    monkeypatch.setattr(UserFunctionsTrainer, "__init__", lambda *given, **more: pytest.fail("a trainer is made"))

    def diagnose(function: str, *more: str):
        options, settings = doctor._options().parse_known_args([f"--trainer_factory=mine.py:{function}", *more])
        report, found = doctor.diagnose(options, settings)
        return "\n".join(report), found

    return diagnose


def told(found, problem=True):
    return [str(finding) for finding in found if finding.is_problem == problem]


def test_the_report_is_of_what_the_script_gives_to_its_trainer(diagnosed):
    report, found = diagnosed("make", "--hardware", "cpu-64GB")
    assert told(found) == []
    assert "Qwen/Qwen2.5-0.5B: 494,032,768 parameters" in report and "6 steps" in report
    assert "a step: 8 prompts x 4 completions = 32" in report
    assert "reward long: 0, 0, 1 for an empty completion" in report and "metric words: 0, 4, " in report
    assert not Path("run").exists()


@pytest.mark.parametrize(("function", "said"), [
    ("in_memory", "(made by the script): 459,904 parameters, 459,904 trainable"),
    ("with_lora", "494,032,768 parameters, adapter"),
    ("wrapped", "459,904 parameters, adapter"),
])  # fmt: skip
def test_kinds_of_models(diagnosed, function, said):
    report, found = diagnosed(function, "--hardware", "cpu-64GB")
    assert said in report and told(found) == []


def test_the_settings_are_planned_for_the_processes_of_the_run(diagnosed):
    report, found = diagnosed("make", "--hardware", "4xH100-80GB", "--num_processes", "4")
    assert "as 4 processes x 1 micro-batch of 8" in report
    assert any("use_cpu" in one for one in told(found, problem=False))


@pytest.mark.parametrize(("function", "said"), [
    ("failing_reward", "reward function broken, .*mine.py, line 17: KeyError: '', for the completion ''"),
    ("desk", "curriculum='pass_rate' takes prompts from the dataset, but with environment_factory"),
    ("uneven", "num_prompts_per_step"),
    ("streamed", "the train_dataset of .*mine.py:streamed is a IterableDataset; trl-entropy doctor reads"),
    ("raising", r"trainer_factory: .*mine.py, line \d+: IndexError: list index out of range"),
    ("other", "mine.py:other made no DrGRPOTrainer; it returned a int"),
    ("with_trl", "gives the trainer GRPOConfig as args; a DrGRPOConfig is needed"),
    ("absent", "mine.py has no 'absent'; it has "),
])  # fmt: skip
def test_what_is_wrong_is_a_problem_in_one_line(diagnosed, function, said):
    problems = told(diagnosed(function, "--hardware", "cpu-64GB")[1])
    assert len(problems) == 1 and re.search(said, problems[0]) and "\n" not in problems[0], problems


def test_what_an_evaluation_will_miss_is_a_note(diagnosed):
    found = diagnosed("no_evaluation", "--hardware", "cpu-64GB")[1]
    assert told(found) == [] and any("eval_dataset is no single datasets.Dataset" in one for one in told(found, False))


def test_settings_beside_the_script_are_refused(diagnosed):
    (problem,) = told(diagnosed("make", "--max_steps", "3")[1])
    assert "takes the settings from the script, but there is --max_steps 3 too" in problem
