"""`trl-entropy doctor` on every shipped config, and every problem that it knows, with its remedy."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml

from trl_entropy import doctor, train
from trl_entropy.preflight import short_report
from trl_entropy.preflight.finding import Finding
from trl_entropy.preflight.launch import launch_from_environment, read_accelerate_config
from trl_entropy.runs.checkpoints import seal

REPOSITORY = Path(__file__).parents[2]
CONFIGS = [
    path for path in sorted((REPOSITORY / "configs").glob("*.yaml")) if "-m trl_entropy.train" in path.read_text()
]
ON_CPU = ["--task", "word_problems", "--use_cpu", "true", "--bf16", "false", "--gradient_checkpointing", "false"]
STEP = ["--num_prompts_per_step", "64"]
PROBED = ["--entropy_probe", "true", "--entropy_probe_completions", "held_out", "--entropy_probe_num_completions", "8"]
GPUS = ["--hardware", "2xH100-80GB", "--model_name_or_path", "Qwen/Qwen2.5-1.5B", "--dtype", "bfloat16"]
LORA = ["--use_peft", "true"]
QUANTISED = [*LORA, "--load_in_4bit", "true"]
LARGE_ROWS = ["--noise_scale_probe", "true", "--probe_rows_gib", "0.001", "--num_prompts_per_step", "8"]
KL = ["--kl_every", "1"]
ROLLOUTS = ["--entropy_probe_completions", "rollouts", "--num_prompts_per_step", "64"]
REENTRANT = ["--gradient_checkpointing_kwargs", '{"use_reentrant": true}', "--num_prompts_per_step", "64"]
GIB = 2**30


@pytest.fixture(autouse=True)
def in_repository(monkeypatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.fixture
def diagnose(tmp_path):
    """diagnose(*arguments): (report, findings) for a run into an empty directory."""

    def diagnose(*arguments: str) -> tuple[str, list[Finding]]:
        options, settings = doctor._options().parse_known_args([str(a) for a in arguments])
        if "--output_dir" not in settings:
            settings += ["--output_dir", str(tmp_path / "run")]
        report, found = doctor.diagnose(options, settings)
        assert all(len(line) <= 100 for line in report), max(report, key=len)
        return "\n".join(report), found

    return diagnose


def problems(found: list[Finding]) -> list[Finding]:
    return [finding for finding in found if finding.is_problem]


def accelerate_yaml(folder: Path, **settings) -> Path:
    base = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "use_cpu": False, "mixed_precision": "no"}
    path = folder / "accelerate.yaml"
    path.write_text(yaml.safe_dump({**base, **settings}))
    return path


def hardware_of(text: str) -> list[str]:
    """`--hardware` as the comment `# Hardware:` says; nothing for a run on the CPU."""
    line = re.search(r"# Hardware: (.*)", text)[1]
    if found := re.search(r"(\d+) ?x ?(\w+)[ -](\d+) ?GB", line):
        return ["--hardware", f"{found[1]}x{found[2]}-{found[3]}GB"]
    if found := re.search(r"(\d+) GPUs? with (\d+) ?GB", line):
        return ["--hardware", f"{found[1]}xGPU-{found[2]}GB"]
    assert "CPU" in line, f"the Hardware line names neither '2 x H100 80 GB' nor CPU cores: {line}"
    return []


@pytest.mark.parametrize(
    "path",
    [
        # The prompts of GSM8K are counted, all of them.
        pytest.param(path, marks=pytest.mark.slow if path.stem == "gsm8k-embedded" else ())
        for path in CONFIGS
    ],
    ids=lambda path: path.stem,
)
def test_every_shipped_config_passes_on_its_hardware(path, diagnose):
    text = path.read_text()
    launch = re.search(r"--config_file (\S+)", text)[1]
    report, found = diagnose("--config", path, "--accelerate_config", launch, *hardware_of(text))
    if not hardware_of(text) and "gsm8k" in path.stem and not (REPOSITORY / "../shared/data/gsm8k").is_dir():
        pytest.skip("its dataset is not part of the repository")
    # A model that an earlier command makes is not there yet, and nothing else is wrong.
    made_before = bool(re.search(r"^model_name_or_path: runs/", text, re.MULTILINE))
    missing = [problem for problem in problems(found) if "is no folder here" in problem.text]
    assert problems(found) == missing and len(missing) <= made_before
    assert missing or ("Batch plan" in report and "PROBLEM" not in report)


def test_the_fine_tuning_config_passes_on_its_hardware(diagnose):
    config = REPOSITORY / "configs" / "sft-qwen2.5-1.5b-gsm8k.yaml"
    launch = ["--accelerate_config", "launch/ddp.yaml"]
    report, found = diagnose("--sft", "--config", config, *launch, "--hardware", "2xH100-80GB")
    assert problems(found) == [] and "a step: 48 demonstrations" in report and "1,543,714,304 parameters" in report
    _, found = diagnose("--sft", "--config", config)
    assert any("bf16" in str(finding) for finding in problems(found))


def test_reference_run_is_estimated_from_the_built_in_shape(diagnose):
    config = REPOSITORY / "configs" / "qwen2.5-1.5b-gsm8k.yaml"
    arguments = ["--config", config, "--accelerate_config", "launch/zero2.yaml", *GPUS, *LORA, "--lora_r", "64"]
    report, found = diagnose(*arguments)
    assert "1,543,714,304 parameters, adapter" in report and "built-in table" in " ".join(report.split())
    assert re.search(r"weights +2\.88 +2\.88 +2\.88 +2\.88 +1\.44", report)  # bf16: 2 x 1.54e9 bytes; ZeRO-3 halves
    assert "*zero2" in report and "2 processes x 64 micro-batches of 16" in report
    assert problems(found) == []


@pytest.mark.parametrize("settings, copies", [([], 14), (["--entropy_control_gradient_ema", "0"], 10)], ids=str)
def test_the_copies_of_the_entropy_control_are_counted(diagnose, settings, copies):
    budget = ["--entropy_control", "hold", "--entropy_control_target", "0.2", *settings]
    report, _ = diagnose(*GPUS, *budget)
    (line,) = (line for line in report.splitlines() if "entropy_control: copies" in line)
    *_, ddp, zero1, zero2, zero3, fsdp2 = map(float, line.split()[2:])
    whole = pytest.approx(copies * 4 * 1_543_714_304 / GIB, rel=0.01)
    assert ddp == zero1 == zero2 == whole
    made = pytest.approx((copies - 4) * 4 * 1_543_714_304 / GIB, rel=0.01)  # the rest lies in the machine's memory
    assert zero3 == fsdp2 == made
    assert "entropy_control" not in diagnose(*GPUS)[0]


def test_main_exits_with_1_on_a_problem_and_0_without(tmp_path, capsys):
    for more, status in (([], 0), (["--entropy_probe", "true", "--top_k", "5"], 1)):
        with pytest.raises(SystemExit) as end:
            doctor.main([*ON_CPU, "--output_dir", str(tmp_path), *more])
        assert end.value.code == status
        printed = capsys.readouterr().out
        assert ("PROBLEM" in printed) == bool(status) and f"{status} problem" in printed
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*ON_CPU, "--entropy_probe", "true", *STEP, "--top_p", "0.9"], "top_p=0.9 changes it. Set top_k=0"),
        ([*ON_CPU, "--num_generations", "1"], "num_generations is 1.*Set num_generations to 2"),
        ([*ON_CPU, "--use_transformers_continuous_batching", "true", "--bf16", "true"], "to bfloat16 in place"),
        ([*ON_CPU, "--use_vllm", "true"], "package vllm.*trl_entropy.vllm"),
        ([*ON_CPU, "--model_name_or_path", "nobody/nothing"], "no folder here.*Give a folder"),
        ([*ON_CPU, "--model_name_or_path", "Qwen/Qwen2.5-0.5B"], "weights of Qwen.*HF_HUB_OFFLINE=1.*Download"),
        ([*ON_CPU, *LORA, "--lora_dropout", "0", "--lora_target_modules", "nothing"], "cannot be built.*nothing"),
        ([*ON_CPU, "--task", "gsm8k", "--dataset_name", "./missing"], "no file or folder missing.*train.jsonl"),
        ([*ON_CPU, "--task", "gsm8k", "--dataset_name", "data/gsm8k"], "there is no file or folder data/gsm8k"),
        ([*ON_CPU, "--num_train_problems", "3", "--num_prompts_per_step", "4"], "is 3, but a step draws 4 different"),
        ([*ON_CPU, "--num_eval_problems", "0"], "num_eval_problems is 0; use 1 or more"),
        ([*ON_CPU, *PROBED, "--num_train_problems", "8"], "draws 8 prompts beside the 1 of a step, and .* has 8"),
        ([*ON_CPU, "--entropy_attribution", "token"], "entropy_attribution is 'token', but nothing reads it"),
        ([*ON_CPU, "--output_dir", "README.md/run"], "README.md is a file. Choose another output_dir"),
        (["--sft", *ON_CPU, "--task", "gsm8k", "--dataset_name", "data/x", *GPUS[2:4]], "no file or folder data/x"),
        ([*ON_CPU, "--resume_from_checkpoint", "./missing"], "missing is no checkpoint"),
        ([*ON_CPU, "--cpu", "--num_processes", "2"], "asks for 2 processes and starts ONE.*MULTI_GPU"),
        ([*ON_CPU, "--optimizer_state_probe", "true", "--optim", "sgd"], "reads Adam's moments, but optim is sgd"),
        ([*ON_CPU, "--accelerate_config", "launch/missing.yaml"], "missing.yaml"),
        ([*ON_CPU, "--hardware", "H100"], "H100.*write 2xH100-80GB"),
        ([*ON_CPU, "--config", "missing.yaml"], "missing.yaml.*Correct the path"),
        ([*GPUS, *KL, "--accelerate_config", "launch/zero3.yaml"], "kl_every does not.*zero3.*zero_stage: 2"),
        ([*GPUS, *QUANTISED, *LARGE_ROWS], "noise_scale_probe .extra. does not work with quantisation 4bit"),
        ([*GPUS, *PROBED, *LORA, "--load_in_4bit", "true"], "quantisation 4bit.*dtype: bfloat16"),
        ([*GPUS, *PROBED, "--bf16", "false", "--fp16", "true"], "loss scaling changes gradients.*bf16: true"),
        ([*GPUS, "--num_processes", "8"], r"8 processes on a machine with 2 GPUs. Set num_processes: 2"),
        ([*GPUS, "--hardware", "1xT4-16GB", *PROBED], "peak.*and has 14.9 GiB. Lower"),
        ([*GPUS, *PROBED, *ROLLOUTS, "--probe_rows_gib", "1"], "two float32 gradients"),
        ([*GPUS, *LORA, *REENTRANT], "marked ready only once.*use_reentrant: false"),
    ],
)  # fmt: skip
def test_problem_is_named_with_its_remedy(diagnose, arguments, message):
    _, found = diagnose(*arguments)
    assert any(re.search(message, str(finding)) for finding in problems(found)), found


@pytest.mark.parametrize(("launch", "more", "notes"), [
    ("launch/ddp.yaml", [], 1), ("launch/zero2.yaml", [], 0), ("launch/ddp.yaml", LORA, 0),
    ("launch/ddp.yaml", ["--dtype", "float32"], 0), ("launch/ddp.yaml", [*LORA, "--load_in_4bit", "true"], 1),
])  # fmt: skip
def test_training_without_float32_values_is_noted(diagnose, launch, more, notes):
    found = diagnose(*GPUS, "--accelerate_config", launch, *more)[1]
    assert sum("no float32 copy" in finding.text for finding in found) == notes


def test_records_are_read_as_training_will(tmp_path, diagnose):
    (tmp_path / "few.jsonl").write_text('{"question": "q", "answer": "#### 5"}\n' * 3)
    records = [*ON_CPU, "--task", "gsm8k", "--dataset_name", tmp_path / "few.jsonl"]
    assert problems(diagnose(*records)[1]) == []
    for more, message in (
        (["--num_prompts_per_step", "4"], r"train_dataset has 3 prompts, but a step draws 4"),
        (["--max_prompt_length", "9"], "no prompt of 3 fits into max_prompt_length=9"),
    ):
        assert any(re.search(message, finding.text) for finding in problems(diagnose(*records, *more)[1]))
    (tmp_path / "few.jsonl").write_text('{"question": "q", "answer": "#### 1,5"}\n')
    assert any("few.jsonl, line 1: the answer must" in finding.text for finding in problems(diagnose(*records)[1]))
    (note,) = (finding for finding in diagnose(*GPUS, *records[len(ON_CPU) :])[1] if "few.jsonl" in finding.text)
    assert not note.is_problem  # of another machine


def test_an_output_folder_that_cannot_be_written_to(monkeypatch, diagnose):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert any("Nothing can be written to" in finding.text for finding in problems(diagnose(*ON_CPU)[1]))


def test_a_learning_rate_of_0_is_noted(diagnose):
    (found,) = (finding for finding in diagnose(*ON_CPU, "--learning_rate", "0")[1] if "learning_rate" in finding.text)
    assert not found.is_problem and "no step changes the policy" in found.text


@pytest.mark.parametrize("text", ["a:\n\t- b\n", "", "- a\n"])
def test_a_launcher_that_is_no_yaml(text, tmp_path, diagnose):
    (tmp_path / "accelerate.yaml").write_text(text)
    (found,) = problems(diagnose(*ON_CPU, "--accelerate_config", tmp_path / "accelerate.yaml")[1])
    assert "accelerate.yaml" in found.text and "\n" not in found.text


def test_bf16_without_gpu_says_how_to_go_on(diagnose):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (found,) = problems(diagnose("--bf16", "true")[1])
    assert "set use_cpu=True and bf16=False" in found.text and "--hardware" in found.remedy
    (found,) = problems(diagnose("--bf16", "false")[1])
    assert "No GPU is here" in found.text and "trl-entropy configs cpu" in found.remedy


@pytest.mark.parametrize("settings", [{"distributed_type": "MULTI_CPU"}, {"distributed_type": "NO"}])
def test_launchers_that_start_one_process(settings, tmp_path, diagnose):
    path = accelerate_yaml(tmp_path, **settings, num_processes=2, use_cpu=True)
    report, found = diagnose(*ON_CPU, "--accelerate_config", path)
    assert "1 process, engine plain" in report
    assert ["starts ONE" in finding.text for finding in problems(found)] == [True]


def test_deepspeed_that_is_configured_twice(tmp_path, diagnose):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    deepspeed = {"deepspeed_config_file": str(tmp_path / "ds.json"), "zero_stage": 2}
    path = accelerate_yaml(tmp_path, distributed_type="DEEPSPEED", num_processes=2, deepspeed_config=deepspeed)
    report, found = diagnose(*GPUS, "--accelerate_config", path)
    assert "engine zero2" in report
    assert "sets zero_stage, mixed_precision" in problems(found)[0].text


def test_missing_deepspeed_is_a_problem_here_and_a_note_elsewhere(monkeypatch, diagnose):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find_spec(name))
    zero2 = ["--accelerate_config", "launch/zero2-cpu.yaml"]
    assert any("package deepspeed" in finding.text for finding in problems(diagnose(*ON_CPU, *zero2)[1]))
    found = diagnose(*GPUS, "--accelerate_config", "launch/zero2.yaml")[1]
    assert [finding.is_problem for finding in found if "package deepspeed" in finding.text] == [False]


def test_disk_that_is_too_small(monkeypatch, diagnose):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(GIB, GIB, 40 * 2**20))
    saves = ["--save_strategy", "steps", "--save_steps", "1", "--max_steps", "10"]
    _, found = diagnose(*ON_CPU, *saves)
    assert any("save_total_limit" in finding.remedy for finding in problems(found))
    # A checkpoint has 459,904 parameters of 4 bytes, and two moments: ten are above the 40 MiB that are free.
    assert problems(diagnose(*ON_CPU, "--save_strategy", "no")[1]) == []


@pytest.mark.parametrize("more, said", [
    ([], "checkpoints: 20 x "),
    (["--save_total_limit", "2"], "checkpoints: 3 x "),
    (["--save_total_limit", "1", "--metric_for_best_model", "reward"], "checkpoints: 3 x "),
    (["--save_total_limit", "2", "--evaluate_checkpoints", "wait"], "checkpoints: 3 x "),
    (["--save_total_limit", "2", "--evaluate_checkpoints", "background"], "checkpoints: at most 20 x "),
    (["--evaluate_checkpoints", "background"], "checkpoints: 20 x "),
])  # fmt: skip
def test_as_many_checkpoints_are_counted_as_training_keeps(diagnose, more, said):
    report, _ = diagnose(*ON_CPU, "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "20", *more)
    assert said in report
    assert ("stays until it is evaluated in the background" in " ".join(report.split())) == ("at most" in said)


def test_a_disk_that_slow_evaluations_could_fill_is_named(diagnose, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(GIB, GIB, 20 * 2**20))
    settings = [
        *ON_CPU,
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
        "--max_steps",
        "20",
        "--save_total_limit",
        "2",
    ]
    assert problems(diagnose(*settings)[1]) == []
    (found,) = problems(diagnose(*settings, "--evaluate_checkpoints", "background")[1])
    assert "can take, if evaluation is slower" in str(found) and "evaluate_checkpoints=wait" in found.remedy


def write_run(folder: Path, num_processes: int = 1, step: int = 0) -> None:
    state = {"global_step": step, "epoch": 0.5}
    for step in (9, 10):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        seal(checkpoint, {"step": step, "settings": {"world_size": num_processes}})
    (folder / "metrics.jsonl").write_text('{"step": 10}\n')
    (folder / "environment.json").write_text(json.dumps({"num_processes": num_processes}))


def test_directory_in_use_hides_no_other_problem(tmp_path, diagnose):
    write_run(tmp_path / "run")
    report, found = diagnose(*ON_CPU, "--task", "gsm8k", "--dataset_name", "./missing")
    assert re.search("already holds a run.*--resume_from_checkpoint", str(found[0]))
    assert len(problems(found)) == 2
    assert "holds a run of 10 steps, newest checkpoint" in " ".join(report.split())


def test_what_is_resumed(tmp_path, diagnose):
    write_run(tmp_path / "run")
    settings = tmp_path / "resume.yaml"
    settings.write_text("resume_from_checkpoint: true\n")
    report, found = diagnose("--config", settings, *ON_CPU)
    assert "checkpoint-10" in report.split("Resuming")[1] and problems(found) == []


@pytest.mark.parametrize("more, notes", [([], 1), (["--additional_steps", "5"], 0), (["--max_steps", "11"], 0)])
def test_resuming_a_finished_run_is_noted(tmp_path, diagnose, more, notes):
    write_run(tmp_path / "run", step=10)
    arguments = ["--resume_from_checkpoint", tmp_path / "run" / "checkpoint-10", "--max_steps", "10", *more]
    _, found = diagnose(*ON_CPU, *arguments)
    said = [finding for finding in found if "is already finished: checkpoint-10 is its last step" in finding.text]
    assert len(said) == notes and not any(finding.is_problem for finding in said)
    assert all("Nothing will be trained" in finding.text for finding in said)


@pytest.mark.parametrize("command", [[], ["--sft"]])
def test_a_full_disk_is_a_problem_and_what_is_free_is_said(command, monkeypatch, diagnose):
    given = ["--bf16", "false", "--use_cpu", "true", "--model_name_or_path", "embedded"] if command else ON_CPU
    for free, text, is_full in ((3 * GIB, "free: 3.00 GiB at", False), (1000, "free: 0.00 GiB at", True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(GIB, GIB, free))
        report, found = diagnose(*command, *given)
        assert text in report
        assert any("The disk of output_dir is full" in finding.text for finding in problems(found)) == is_full


def test_resuming_with_another_number_of_processes(tmp_path, diagnose):
    write_run(tmp_path / "run", num_processes=4)
    _, found = diagnose(*ON_CPU, "--resume_from_checkpoint", tmp_path / "run" / "checkpoint-10")
    assert "world_size was 4 and is 1" in str(problems(found)[0])


def test_local_model_without_tokenizer(tmp_path, diagnose):
    from transformers import Qwen2Config

    Qwen2Config(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=1).save_pretrained(tmp_path / "model")  # fmt: skip
    _, found = diagnose(*ON_CPU, "--model_name_or_path", tmp_path / "model")
    assert any("holds no tokenizer. Save it there" in str(finding) for finding in problems(found))
    from trl_entropy.models.embedded import build_tokenizer

    build_tokenizer().save_pretrained(tmp_path / "model")
    _, found = diagnose(*ON_CPU, "--model_name_or_path", tmp_path / "model")
    assert any("entries, the model 32 embeddings" in str(finding) for finding in problems(found))


def test_sequences_beyond_the_models_positions_are_noted(diagnose):
    _, found = diagnose(*ON_CPU, "--max_completion_length", "100")
    assert ["300 tokens, the model was made for 256" in finding.text for finding in found] == [True]
    assert not found[0].is_problem


@pytest.mark.parametrize("path", sorted((REPOSITORY / "launch").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_launcher_is_understood(path):
    if "distributed_type" not in path.read_text():
        pytest.skip("no accelerate YAML")
    launch = read_accelerate_config(path)
    expected = path.stem.removesuffix("-cpu").replace("cpu", "plain")
    assert launch.engine == expected
    assert launch.num_processes == launch.num_asked and not launch.duplicates


def test_launch_from_the_environment_of_accelerate():
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1", "LOCAL_WORLD_SIZE": "2"}
    launch = launch_from_environment(4, zero)
    assert (launch.engine, launch.num_processes, launch.num_machines) == ("zero1", 4, 2)
    assert launch_from_environment(2, {}).engine == "ddp" and launch_from_environment(1, {}).engine == "plain"


def test_short_report_at_the_start_of_training(tmp_path):
    task, args, model = train.parse([*ON_CPU, "--output_dir", str(tmp_path), "--num_prompts_per_step", "1"])
    lines, found = short_report(task, args, model)
    assert lines[0].startswith("a step: 1 prompt x 8 completions = 8, as 1 process x")
    assert re.match(r"memory: about 0\.\d GiB a process at the peak", lines[1])
    assert len(lines) == 2 and not [finding for finding in found if finding.stops]
