"""A file of settings: every value is converted to its field's type, or refused in one line that says where."""

import dataclasses
import os
import re
import typing
from pathlib import Path

import pytest
import yaml
from trl import ModelConfig, SFTConfig

from trl_entropy import DrGRPOConfig
from trl_entropy.config.command_line import parse, parse_sft
from trl_entropy.config.setting import default_of, own_settings
from trl_entropy.config.settings_file import convert_setting, hints_of, sentence
from trl_entropy.config.unread import readers_of
from trl_entropy.doctor import _options as doctor_options
from trl_entropy.doctor import diagnose
from trl_entropy.evaluate import main as evaluate_main
from trl_entropy.sft import main as sft_main
from trl_entropy.tasks.arguments import TaskArguments
from trl_entropy.tasks.demonstrations import DemonstrationArguments
from trl_entropy.train import main as train_main

ON_CPU = ["--bf16", "false", "--use_cpu", "true", "--gradient_checkpointing", "false"]
PARSED = (TaskArguments, DrGRPOConfig, ModelConfig)
HINTS = hints_of(PARSED)


@pytest.fixture
def read(tmp_path):
    """read(text, *flags): what `parse` makes of a file with this text."""

    def read(text, *flags, parser=parse):
        path = tmp_path / "settings.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return parser(["--config", str(path), "--output_dir", str(tmp_path / "run"), *ON_CPU, *flags])

    return read


def refusal(call) -> str:
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and message.endswith((".", "?")), message
    return message


# ---- converted


def test_numbers_with_an_exponent_in_lists_and_maps(read):
    _, args, _ = read(
        "token_control: clip_cov\ntoken_control_bounds: [1e-1, 5]\nlearning_rate: 1e-6\nmax_steps: 1e1\n"
    )
    assert args.token_control_bounds == [0.1, 5.0] and (args.learning_rate, args.max_steps) == (1e-6, 10)
    task, args, _ = read("reward_weights: [1e0, 5e-1]\nreward_funcs: [tag_pref, format_reward]\n")
    assert args.reward_weights == [1.0, 0.5] and all(isinstance(one, float) for one in args.reward_weights)
    assert task.reward_funcs == ["tag_pref", "format_reward"]
    _, args, _ = read("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-6}\n")
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6}
    _, args, _ = read("generation_kwargs: {suppress_tokens: [3, 1e0], deep: {a: 2e-3, b: text}}\n")
    assert args.generation_kwargs == {"suppress_tokens": [3, 1.0], "deep": {"a": 2e-3, "b": "text"}}


def test_a_lone_value_is_a_list_of_one(read):
    task, args, _ = read("reward_funcs: tag_pref\nreward_weights: 5e-1\n")
    assert (task.reward_funcs, args.reward_weights) == (["tag_pref"], [0.5])
    assert convert_setting("lora_target_modules", "q_proj", HINTS["lora_target_modules"]) == ["q_proj"]


@pytest.mark.parametrize("parsed", [*PARSED, DemonstrationArguments, SFTConfig])
def test_every_field_takes_its_default_and_no_value_of_another_kind(parsed):
    """A rule over all fields: what a field has by default stays what it is; what it cannot be is refused by name."""
    hints = typing.get_type_hints(parsed)
    for field in dataclasses.fields(parsed):
        if not field.init:
            continue
        made = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if made is not None and made is not dataclasses.MISSING:
            assert convert_setting(field.name, made, hints[field.name]) == made
        if hints[field.name] in (int, float, bool):
            for value in ("abc", [1.5], {"a": 1}, None, float("nan")):
                with pytest.raises(ValueError, match=f"{field.name} is "):
                    convert_setting(field.name, value, hints[field.name])


def test_texts_stand_for_what_they_spell(read):
    _, args, _ = read(
        'learning_rate: "1e-3"\nmax_steps: "7"\nbf16_full_eval: "true"\nreport_to: none\nrun_name: 2024-01-01\n'
    )
    assert (args.learning_rate, args.max_steps, args.bf16_full_eval, args.run_name) == (1e-3, 7, True, "2024-01-01")


def test_home_is_found_in_every_path(read, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("task: gsm8k\ndataset_name: ~/data\n")
    task, args, model = parse(
        ["--config", "~/x.yaml", "--output_dir", "~/run", "--model_name_or_path=~/model", *ON_CPU]
    )
    found = (task.dataset_name, args.output_dir, model.model_name_or_path)
    assert found == tuple(str(tmp_path / name) for name in ("data", "run", "model"))


def test_variables_of_the_environment_are_set(read, monkeypatch):
    monkeypatch.setenv("TRL_ENTROPY_TEST", "0")
    read("env: {TRL_ENTROPY_TEST: 3}\n")
    assert os.environ["TRL_ENTROPY_TEST"] == "3"


# ---- refused, by file and line


REFUSED = [
    ("seed: 1\nmax_steps:\t3\n", "line 2: a tab, which YAML does not take here; use spaces"),
    ("lr_scheduler_kwargs:\n\tmin_lr: 1\n", "line 2: a tab"),
    ("", "is empty: it needs lines such as"),
    ("# nothing\n", "is empty"),
    ("- a\n", "holds no settings"),
    ("abc\n", "holds no settings"),
    ("seed: 'a\n", "line 2: found unexpected end of stream"),
    ("seed: {a\n", "line 2: expected"),
    (b"seed: 1\nrun_name: caf\xe9\n", "line 2: the file is not UTF-8"),
    ("seed: 1\n\nseed: 2\n", "line 3: seed stands in line 1 already"),
    ("seed: 1\nentropy_prob: true\n", "line 2: there is no setting 'entropy_prob'; is entropy_probe meant?"),
    ("seed: &a [*a]\n", "line 1: found unconstructable recursive node"),
    ("run_name: 2024-99-99\n", "line 1: month must be in 1..12"),
    ("seed: !!python/object:os.system x\n", "line 1: could not determine a constructor"),
    ("learning_rate: abc\n", "line 1: learning_rate is 'abc'; a number is needed"),
    ("learning_rate:\n", "line 1: learning_rate is empty; a number is needed, or leave the setting out"),
    ("learning_rate: [1]\n", r"learning_rate is \[1\]; a number"),
    ("learning_rate: .nan\n", "learning_rate is nan; a number"),
    ("max_steps: 1.5\n", "max_steps is 1.5; a whole number is needed"),
    ("entropy_probe: maybe\n", "entropy_probe is 'maybe'; true or false is needed"),
    ("save_strategy: no\n", r'save_strategy is false; use one of no, steps, .*write "no" in quotes'),
    ("save_strategy: often\n", "save_strategy is 'often'; use one of no, steps"),
    ("task: gsm9k\n", "task is 'gsm9k'; use one of word_problems, gsm8k"),
    ("model_name_or_path: [1]\n", r"model_name_or_path is \[1\]; a text is needed"),
    ("lr_scheduler_kwargs: 5\n", "lr_scheduler_kwargs is 5; a map of names to values"),
    ("lr_scheduler_kwargs: abc\n", "lr_scheduler_kwargs is 'abc'; a map of names to values"),
    ("lr_scheduler_kwargs: '{min_lr: 1'\n", "lr_scheduler_kwargs is .*; no JSON"),
    ("env: 3\n", "env is 3; names of variables"),
    ("reward_funcs: []\n", "reward_funcs is empty; name a function, such as tag_pref"),
    ("reward_weights: [1, 2]\n", r"reward_weights has 2 numbers, reward_funcs 1"),
    ("per_device_train_batch_size: 0\n", "per_device_train_batch_size is 0; use 1 or more"),
    ("temperature: 0\n", "temperature is 0; use above 0"),
    ("seed: -1\n", "seed is -1; use 0 or more"),
    ("probe_batch_size: 0\n", "probe_batch_size is 0; use 1 or more"),
    ("num_eval_problems: 0\n", "num_eval_problems is 0; use 1 or more.*eval_strategy=no"),
    ("num_train_problems: 3\nnum_prompts_per_step: 4\n", "num_train_problems is 3, but a step draws 4 different"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=[repr(text)[:40] for text, _ in REFUSED])
def test_what_cannot_be_is_refused_in_one_line(read, text, message):
    assert re.search(message, refusal(lambda: read(text)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "missing.yaml"], "there is no file missing.yaml"),
        (["--config", "."], "'.' cannot be read"),
        (["--config"], "needs the path of a YAML file"),
        (["--config", "a", "--config", "b"], "stands twice"),
        (["--learning_rate", "abc"], "invalid float value: 'abc'"),
        (["--entropy_prob", "true"], "entropy_prob"),
        (["--lr_scheduler_kwargs", "{bad"], "lr_scheduler_kwargs is '{bad'; no JSON"),
        (["--seed"], "expected one argument"),
    ],
)
def test_a_command_line_that_cannot_be_is_refused_in_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        parse([*ON_CPU, "--output_dir", str(tmp_path), *flags])
    assert message in str(error.value) and "\n" not in str(error.value)
    for main in (train_main, sft_main):
        with pytest.raises(SystemExit) as end:
            main([*ON_CPU, "--output_dir", str(tmp_path / "run"), *flags])
        assert str(end.value).startswith("Error in the settings: ") and "\n" not in str(end.value)
    options, rest = doctor_options().parse_known_args([*ON_CPU, *flags])
    assert any(message in str(finding) for finding in diagnose(options, rest)[1])


def test_a_question_at_the_end_of_an_error_has_no_full_stop(tmp_path):
    assert sentence(ValueError("is it\n a run directory?")) == "is it a run directory?"
    assert sentence(ValueError("use 1.")) == sentence(ValueError("use 1")) == "use 1."
    (tmp_path / "settings.yaml").write_text("learning_rat: 1\n")
    for main, given in (
        (train_main, ["--config", str(tmp_path / "settings.yaml")]),
        (sft_main, ["--config", str(tmp_path / "settings.yaml")]),
        (evaluate_main, ["--run", str(tmp_path)]),
    ):
        with pytest.raises(SystemExit, match=r"^Error.*\?$"):
            main(given)


# ---- what nothing reads


READERS = readers_of(PARSED)


def other_than(value: object, kind: object = None) -> object:
    """A value other than `value`, of the type that is annotated where the default is None."""
    if isinstance(value, bool):
        return not value
    if value is None and "int" in str(kind):
        return 7
    return {int: 7, float: 0.25, str: "other", list: [0.25, 0.75], type(None): 0.25}[type(value)]


def test_fields_that_need_something_turned_on():
    assert {"entropy_attribution", "entropy_probe_every", "fisher_num_sequences", "entropy_control_gain"} <= set(
        READERS
    )
    assert {"dataset_name", "max_prompt_length", "lora_r", "max_resample_rounds", "evaluate_profile"} <= set(READERS)
    assert not {"entropy_probe", "task", "probe_batch_size", "kl_every", "use_peft"} & set(READERS)


# A dataset_name says what the task is, where none is named.
@pytest.mark.parametrize("name", [name for name in READERS if name != "dataset_name"])
def test_a_setting_that_nothing_reads_is_refused_by_name(name, tmp_path):
    """The default may be given; another value is refused while its toggle is off, in a file and in a script."""
    by_name = {field.name: (parsed, field) for parsed in PARSED for field in dataclasses.fields(parsed)}
    parsed, field = by_name[name]
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default
    choices = field.metadata.get("choices") or [other_than(default, field.type)]
    value = next(choice for choice in choices if choice != default)
    path = tmp_path / "settings.yaml"
    flags = ["--config", str(path), "--output_dir", str(tmp_path / "run"), *ON_CPU]
    path.write_text(yaml.safe_dump({name: value}))
    message = refusal(lambda: parse(flags))
    assert message.startswith(f"{name} is ") and f"{READERS[name].toggle} is " in message
    if parsed is DrGRPOConfig:
        with pytest.raises(ValueError, match=f"{name} is .*, but nothing reads it"):
            DrGRPOConfig(output_dir="x", use_cpu=True, bf16=False, **{name: value})
    if default is not None and name != "lora_dropout":  # RL has another default than TRL
        path.write_text(yaml.safe_dump({name: default}))
        parse(flags)


def test_a_dataset_is_the_task_or_is_refused(read):
    text = "dataset_name: mine.jsonl\nprompt_column: question\n" + yaml.safe_dump(STEP)
    task = read(text)[0]
    assert (task.task, task.dataset_name, task.prompt_column) == ("dataset", "mine.jsonl", "question")
    assert "task is 'word_problems'" in refusal(lambda: read("task: word_problems\n" + text))
    assert "dataset_name is not set" in refusal(lambda: read("task: dataset\n" + yaml.safe_dump(STEP)))


SECOND_LEVEL = {name: reader for name, reader in READERS.items() if reader.others}
# What turns a setting's toggle on, in a way that all other checks accept.
ON = {
    "entropy_control": {"entropy_control": "hold", "entropy_control_per_step": 0.001},
    "token_control": {"token_control": "random"},
    "entropy_probe": {"entropy_probe": True},
}
STEP = {"num_prompts_per_step": 4, "num_generations": 4, "per_device_train_batch_size": 16}


def unread_by(reader):
    """A value of the toggle with which it does not read the setting."""
    choices = own_settings(DrGRPOConfig)[reader.toggle].choices or (None,)
    return next((choice for choice in choices if choice not in (*reader.values, "none")), "none")


@pytest.mark.parametrize("name", SECOND_LEVEL)
def test_a_setting_that_another_value_leaves_unread_is_refused_by_name(name, read):
    """`token_control_bounds` under `token_control: random`; the same rule for every field that says so."""
    first, second = SECOND_LEVEL[name].needed
    on = STEP | ON[first.toggle] | {second.toggle: unread_by(second)}
    value = next((c for c in own_settings(DrGRPOConfig)[name].choices if c != default_of(DrGRPOConfig, name)), None)
    kind = DrGRPOConfig.__dataclass_fields__[name].type
    value = other_than(default_of(DrGRPOConfig, name), kind) if value is None else value
    message = f"{name} is .*, but nothing reads it: {second.toggle} is .*Set {second.toggle}"
    DrGRPOConfig(**on, output_dir="x", use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match=message):
        DrGRPOConfig(**on, output_dir="x", use_cpu=True, bf16=False, **{name: value})
    text = yaml.safe_dump({key: entry for key, entry in on.items() if entry is not None} | {name: value})
    assert re.search(message, refusal(lambda: read(text)))


def test_every_setting_whose_help_names_a_value_of_another_is_read_with_it():
    """Else nobody would see that a new one is missing from the rule."""
    assert set(SECOND_LEVEL) == {
        "entropy_control_gain", "entropy_control_gradient_ema", "entropy_control_num_completions",
        "entropy_control_release", "entropy_control_release_steps",
        "entropy_prediction", "entropy_probe_num_completions", "entropy_probe_sampler", "probe_precision",
        "reward_attribution", "token_control_bounds", "token_control_centre", "token_control_choice",
        "token_control_coefficient", "token_control_floor", "token_control_gradient_ema", "token_control_quantiles",
    }  # fmt: skip
    for name, described in own_settings(DrGRPOConfig).items():
        if described.help.startswith(("clip_cov:", "kl_cov:")):
            assert described.read_with == {"token_control": (described.help.split(":")[0],)}, name
        assert all(not values or set(values) <= set(own_settings(DrGRPOConfig)[other].choices)
                   for other, values in described.read_with.items())  # fmt: skip


def test_the_command_line_may_leave_settings_of_a_file_unread(read):
    text = "token_control: clip_cov\ntoken_control_bounds: [2, 3]\nentropy_probe: true\n"
    text += "entropy_probe_num_completions: 16\n" + yaml.safe_dump(STEP)
    assert read(text)[1].token_control_bounds == [2, 3]
    args = read(text, "--token_control", "random", "--entropy_probe_completions", "rollouts")[1]
    assert (args.token_control_bounds, args.entropy_probe_num_completions) == ([1.0, 5.0], None)


def test_what_the_command_line_turns_off_is_left_out(read):
    """A toggle may be turned off without taking its settings out of the file."""
    text = "entropy_probe: true\nentropy_probe_every: 5\nentropy_attribution: token\n" + yaml.safe_dump(STEP)
    text += "task: gsm8k\ndataset_name: my.jsonl\n"
    task, args, _ = read(text, "--entropy_probe", "false", "--task", "word_problems")
    assert (args.entropy_probe, args.entropy_probe_every, args.entropy_attribution) == (False, 1, "none")
    assert task.dataset_name is None
    assert read(text)[1].entropy_attribution == "token"
    assert "entropy_probe_every is 5" in refusal(lambda: read(text.replace("probe: true", "probe: false")))
    flags = ("--entropy_probe", "false", "--entropy_probe_every", "3")
    assert "entropy_probe_every is 3" in refusal(lambda: read(text, *flags))
    flags = ("--entropy_probe_every", "3", "--entropy_probe", "false")  # as where a script is given more settings
    assert read(text, *flags)[1].entropy_probe_every == 1
    model = read("use_peft: true\nlora_r: 8\nmodel_name_or_path: x\n", "--use_peft", "False", parser=parse_sft)[2]
    assert model.lora_r == 16


def test_shipped_files_hold_nothing_that_is_not_read(tmp_path):
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")):
        parser = parse_sft if path.name.startswith("sft-") else parse
        more = ["--use_vllm", "False"] if "server" in path.name else []  # refused on a CPU
        parser(["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu", "True", *more])


def test_null_keeps_the_files_of_all_steps(read):
    text = "log_completions: true\nprobe_files_keep: {0}\ncompletions_files_keep: {0}\n"
    for given, expected in (("null", None), ("7", 7)):
        args = read(text.format(given))[1]
        assert args.probe_files_keep == args.completions_files_keep == expected
    assert read("probe_files_keep: 0\n")[1].probe_files_keep == 0
    with pytest.raises(ValueError, match="completions_files_keep is 0; use 1 or more"):
        read(text.format("0"))
