"""
What is done with each command of the documents: it is run with more settings that make it short, another test runs it,
or a sentence says why nothing does. Patterns match a whole command as `normal` writes it.
"""

import re
from typing import NamedTuple

_HEAD = "--num_prompts_per_step 4 --num_generations 4 --per_device_train_batch_size 16 --num_train_problems 64 "
_SHORT = (
    f"--max_steps 1 {_HEAD}--num_eval_problems 8 --per_device_eval_batch_size 8 --num_generations_eval 1 "
    "--save_strategy no --report_to none --disable_tqdm true"
)
_PROBED = f"{_SHORT} --entropy_probe_num_completions 8"
_TRAIN = r"trl-entropy train --config (?:configs/)?"

# Run by test_commands_run.py in a folder where RUN, runs/first and the like are a real run of three steps.
HERE = {
    rf"{_TRAIN}quickstart\.yaml --fisher_probe .*": f"{_SHORT} --fisher_num_sequences 12",
    rf"{_TRAIN}quickstart\.yaml .*--entropy_probe false.*": _SHORT,
    rf"{_TRAIN}(?:quickstart(?:\.yaml)?|CONFIG|FILE)(?: .*)?": _PROBED,
    rf"{_TRAIN}entropy-study\.yaml.*": _PROBED,
    rf"{_TRAIN}gsm8k-embedded\.yaml": _PROBED,
    rf"{_TRAIN}calculator-agent\.yaml.*": "--max_steps 1 --num_train_problems 64 --num_eval_problems 4",
    r"trl-entropy train --help": "",
    r"trl-entropy doctor .*--config .*": "",
    r"trl-entropy report [\w/.][\w/.-]*(?: RUN2)?": "",
    r"trl-entropy watch [\w/.-]+": "--once",
    r"trl-entropy best RUN .*": "",
    r"trl-entropy new [\w-]+": "",
    r"trl-entropy archive \S+ \S+": "",
    r"trl-entropy configs": "",
    r"trl-entropy experiment kernel runs/quickstart-kernel .*": "--steps 2 3",
    r"python -m tests\.benchmarks\.interval_coverage .*": "--repeats 4 --sizes 4",
    r"python -m tests\.benchmarks\.quantity_cost.*": "--steps 1 --completions 16",
    r"python tests/benchmarks/score_cost\.py": "--rounds 3",
    r"python tests/benchmarks/shared_prompts\.py .*": "--rounds 1",
    r"python tests/benchmarks/fisher_kernel\.py": "--hidden 128 --num-sequences 4 --rounds 2",
    r"python tests/benchmarks/generate_modes\.py .*": "--problems 2 --samples 2 --batch-sizes 2 --rounds 1",
    r"python -m benchmarks\.page_of_a_long_run": "--steps 4 --completions 16 --files 2 --tokens 8",
    r"trl-entropy train --config gsm8k-embedded .*": _PROBED,
    r"python tests/benchmarks/next_rollouts\.py .*": "--seeds 0 --steps 4 --held-out 8",
}
_REST_OF_BENCHMARKS = "|".join(
    (
        *("prompt_selection", "entropy_control", "entropy_control_cell", "control_study", "entropy_sources"),
        *("step_time", "fisher_rows", "pass_memory", "run_size", "computed_cost"),
    )
)
HELP = {  # half a minute to hours: their options are read, and their modules imported
    rf"python tests/benchmarks/(?:{_REST_OF_BENCHMARKS}|peak_memory)\.py(?: .*)?",
    r"python -m (?:tests\.)?benchmarks\.(?:probe_memory|reward_sum|template_collapse) .*",
}
_EXPERIMENT = "experiments/test_experiment.py::test_{}_from_end_to_end"
TESTS = {
    r"trl-entropy demo": "commands/test_shipped.py::test_the_demo_trains_evaluates_and_reports",
    r"trl-entropy (?:experiment )?[\w-]+|trl-entropy COMMAND --help":
        "commands/test_shipped.py::test_help_works_without_what_training_needs",
    r"trl-entropy report .*--watch.*": "reporting/test_following.py::test_the_page_grows_with_the_run",
    r"trl-entropy evaluate --run .*": "evaluation/test_evaluate.py::test_evaluate_again_and_after_a_failure",
    r"trl-entropy check-model NAME.*":
        "preflight/test_conformance.py::test_the_command_prints_a_table_and_its_status_says_whether_all_is_right",
    r"trl-entropy sft --config CONFIG":
        "commands/test_sft.py::test_the_command_leaves_adapter_tokenizer_settings_and_the_merged_model",
    r"trl-entropy convert-gguf FILE FOLDER":
        "commands/test_convert_gguf.py::test_what_was_read_from_gguf_can_be_saved_and_is_the_same",
    r"trl-entropy experiment agreement .+": "probes/test_agreement.py::test_command_prints_tables_and_draws",
    r"trl-entropy experiment predictors .+":
        "experiments/test_predictors.py::test_the_predictor_that_made_the_changes_is_found",
    r"trl-entropy experiment claims --list":
        "experiments/test_claims.py::test_the_list_shows_everything_without_a_run",
    r"trl-entropy experiment claims --runs .* --train.*":
        "experiments/test_claims.py::test_training_takes_every_command",
    r"trl-entropy experiment branch --checkpoint .*": "experiments/test_branch.py::test_a_small_one_from_end_to_end",
    r"trl-entropy experiment exchange --checkpoint .*": _EXPERIMENT.format("exchange"),
    r"trl-entropy experiment exchange .*":
        "experiments/test_exchange_of_runs.py::test_the_command_prints_the_table_and_writes_numbers_and_figure",
    **{
        rf"trl-entropy experiment {name} --checkpoint .*": _EXPERIMENT.format(name)
        for name in ("influence", "linearity", "conditioning", "calibration")
    },
    r"trl-entropy experiment NAME --trainer_factory .*":
        "experiments/test_own_task.py::test_the_run_of_a_script_through_the_function_that_makes_its_trainer",
    r"trl-entropy config\.document": "config/test_settings.py::",
    r"python docs/make/tables\.py": "docs/test_site.py::test_pages_from_tables_are_up_to_date",
    r"python docs/make/two_tokens\.py": "docs/test_two_tokens.py::test_the_page_is_up_to_date",
    r"python docs/make/one_step\.py .*":
        "docs/test_site.py::test_the_step_is_walked_through_with_the_runs_own_numbers",
    r"python tests/preflight/family_table\.py":
        "preflight/test_conformance.py::test_the_table_of_families_is_what_is_found",
    r"python tests/preflight/optimizer_table\.py": "preflight/test_optimizer_table.py::",
    r"bash launch/(?:quickstart|smollm2)\.sh.*": "commands/test_train.py::test_what_the_scripts_start_is_read",
    r"bash launch/sync\.sh HOST list": "launch/test_sync.py::test_list",
    r"bash launch/sync\.sh HOST pull .*": "launch/test_sync.py::test_one_run_whatever_its_name",
    r"bash launch/sync\.sh --metrics-only .*": "launch/test_sync.py::test_metrics_only",
    r"bash launch/sync\.sh --remote-root .*": "launch/test_sync.py::test_all_runs",
    r"bash launch/gpu-check\.sh --device cpu": "devices/test_gpu_check.py::test_whole_script_runs_without_a_gpu",
    r"bash launch/gpu-check\.sh": "devices/test_gpu_check.py::test_whole_script_passes_on_the_gpu",
    r"sbatch launch/slurm\.sbatch .*": "launch/test_cluster_scripts.py::test_job_starts_training_on_every_node",
    r"sky launch .*": "launch/test_cluster_scripts.py::test_skypilot_starts_warm_start_once_then_training",
    r"python -m fuzz\.cases": "fuzz/test_fuzz.py::test_new_cases_end_in_one_line",
    r"python -m faults\.harness": "faults/test_faults.py::test_no_fault_loses_anything",
    r"python -m mutants": "mutants/test_listed.py::test_an_error_is_noticed_by_its_test_and_not_by_another",
    r"accelerate launch --config_file launch/<engine>-cpu\.yaml":
        "distributed/test_user_launch.py::test_metrics_are_those_of_one_process",
}  # fmt: skip
_TWO_GPUS = (
    "Needs two GPUs, Qwen2.5-1.5B and GSM8K. Every shipped config passes doctor on its hardware "
    "(test_every_shipped_config_passes_on_its_hardware), and training with two processes of the same engine is "
    "run on a CPU (test_metrics_are_those_of_one_process)."
)
REASONS = {
    r"(?:nohup )?accelerate launch --config_file launch/(?:zero2|ddp)\.yaml .*": _TWO_GPUS,
    r"trl-entropy sft --config configs/sft-qwen.*": _TWO_GPUS,
    r"trl-entropy (?:train|sft) --config configs/(?:sft-)?smollm2-135m\.yaml.*":
        "Trains SmolLM2-135M for most of an hour, and its weights come from a package index. The settings are read by "
        "test_every_shipped_config_is_read.",
    r"trl-entropy evaluate --sampler vllm .*|bash launch/test-vllm\.sh":
        "Needs vLLM's CPU build, which is downloaded: 0.85 GB. By hand, with its date there.",
    r"trl vllm-serve .*": "A command of TRL that needs a GPU and vLLM; the client's side is tested with a stand-in.",
    r"pip install .*": "Installs from a package index; launch/test-install.sh does it in fresh environments.",
    r"(?:git clone|python3 -m venv|\. |EXTRAS=\S+ \. |cd|export|tmux|ssh|tail|ls|column) ?.*":
        "Of the shell alone: it gets, enters or shows what other lines make.",
    r"python -c 'import torch; .*": "Shows the GPUs of the machine.",
    r"kill .*": "Needs a run that was started with nohup; a signal to a launched run is sent by "
        "test_sigterm_ends_a_launched_run_with_a_checkpoint_from_which_it_goes_on.",
    r"sky down .*": "Gives a rented machine back.",
    r"tensorboard --logdir .*": "A command of TensorBoard that serves until it is stopped.",
    r"accelerate launch(?: \.\.\. .*)?": "The name of accelerate's command, which is run with every engine.",
    r"python -m pytest .*|bash launch/test\.sh|ruff check .*": "This suite and its static checks.",
    r"bash launch/test-versions\.sh .*": "Installs other versions, three minutes each: by hand, with its date there.",
    r"bash launch/docs\.sh": "Installs the site's tools at its first start, and is a step of the checks itself.",
    r"python tests/benchmarks/sliced_memory\.py .*": "Two minutes and two processes for each probe.",
    r"python tests/benchmarks/any_module\.py": "Three minutes, and no options; its model is built by no other.",
}  # fmt: skip


class Decided(NamedTuple):
    """What is done with a command: `kind` is here, help, test or reason; `what` the settings, the test, the reason."""

    kind: str
    what: str
    pattern: str


def normal(command: str) -> str:
    """The command without environment and redirection; in one process `trl-entropy NAME`, however it is started."""
    command = re.split(r" (?:>>?|2>&1)(?: |$)", re.sub(r"^(?:(?!EXTRAS)[A-Z_]+=\S+ )+", "", command))[0]
    start = r"(?:python -m trl_entropy|accelerate launch --config_file launch/cpu\.yaml -m trl_entropy)\."
    return re.sub(rf"^{start}", "trl-entropy ", command)


def decided(command: str) -> Decided | None:
    """What the tables say of a command, the first that matches; None if nothing does."""
    tables = (("here", HERE), ("help", dict.fromkeys(HELP, "--help")), ("test", TESTS), ("reason", REASONS))
    for kind, table in tables:
        for pattern, what in table.items():
            if re.fullmatch(pattern, normal(command)):
                return Decided(kind, what, pattern)
    return None
