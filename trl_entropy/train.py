"""Train: `accelerate launch --config_file launch/cpu.yaml -m trl_entropy.train --config configs/quickstart.yaml`."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trl_entropy.config.command_line import parse
from trl_entropy.config.quantities import keys_of_quantities
from trl_entropy.config.resume_contract import contract_settings
from trl_entropy.config.settings_file import one_line, sentence
from trl_entropy.models.loading import (
    EMBEDDED_AGENT,
    EMBEDDED_MODELS,
    is_adapter,
    load_adapter,
    load_tokenizer,
    model_init_kwargs,
    model_settings,
)
from trl_entropy.runs import checkpoints
from trl_entropy.runs.console import describe_evaluation, plain_text, quiet_libraries, saying_once
from trl_entropy.runs.counted import counted
from trl_entropy.runs.directory import RunDirectory
from trl_entropy.runs.file_errors import check_writable, describe, ending_in_one_line, remedy
from trl_entropy.tasks.arguments import TaskArguments
from trl_entropy.tasks.completion_functions import (
    metric_functions,
    planned_functions,
    reward_functions,
    training_files,
    tried,
)
from trl_entropy.tasks.named import files_of
from trl_entropy.tasks.registry import load_task, task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import ModelConfig

    from trl_entropy.config.dr_grpo import DrGRPOConfig
    from trl_entropy.trainer.dr_grpo import DrGRPOTrainer


def build_trainer(task: TaskArguments, args: DrGRPOConfig, model: ModelConfig) -> DrGRPOTrainer:
    """Build the trainer from the settings: with model, data and reward functions."""
    from trl import get_peft_config, get_quantization_config

    from trl_entropy.engine.fsdp2_on_cpu import shard_on_cpu_if_asked
    from trl_entropy.trainer.dataset_checks import check_datasets
    from trl_entropy.trainer.dr_grpo import DrGRPOTrainer

    shard_on_cpu_if_asked()
    train_dataset, eval_dataset = load_task(task, tokenizer_of(args, model), args.seed)
    check_datasets(args, train_dataset, eval_dataset)
    functions, metrics = reward_functions(task), metric_functions(task)
    if args.change_of is not None:  # a wrong name ends here, before a model is loaded
        keys_of_quantities(args.change_of, [one.short for one in functions], [one.short for one in metrics])
    episodes = task_of(task).episodes(task)
    tried(functions + metrics, list(train_dataset.select(range(min(3, len(train_dataset))))))
    policy, tokenizer = load_policy(args, model)
    trainer = DrGRPOTrainer(
        model=policy,
        reward_funcs=[one.function for one in functions],
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model) if isinstance(policy, str) else None,
        tools=episodes.tools or None,
        environment_factory=episodes.environment_factory,
        metric_funcs=metrics,
    )
    trainer.function_files = training_files(task)
    files = files_of(task.own_functions())
    own = {"function_files": files} if files else {}
    trainer.run_log.settings = {**dataclasses.asdict(task), **model_settings(model), **own}
    return trainer


def tokenizer_of(args: DrGRPOConfig, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, before the model is loaded (or made, as the embedded one)."""
    from trl_entropy.models.embedded import build_tokenizer
    from trl_entropy.models.embedded_agent import build_agent_tokenizer

    name = str(model.model_name_or_path)
    if name in EMBEDDED_MODELS:
        return build_agent_tokenizer() if name == EMBEDDED_AGENT else build_tokenizer()
    return load_tokenizer(name, **tokenizer_kwargs(args, model))


def tokenizer_kwargs(args: DrGRPOConfig, model: ModelConfig) -> dict[str, Any]:
    """Which of the model's tokenizers is loaded: of the same revision, folder and code as the model."""
    given = args.model_init_kwargs or {}
    same = {name: given[name] for name in ("subfolder", "trust_remote_code", "code_revision") if name in given}
    return {"revision": model.model_revision, "trust_remote_code": args.trust_remote_code, **same}


def load_policy(args: DrGRPOConfig, model: ModelConfig) -> tuple[PreTrainedModel | str, PreTrainedTokenizerBase]:
    """The initial policy as TRL's trainer takes it (a name, or an adapter on its base model), and its tokenizer."""
    from transformers import AutoTokenizer
    from trl import get_quantization_config

    name = str(model.model_name_or_path)
    if name in EMBEDDED_MODELS:
        from trl_entropy.models.warm_start import warm_start

        name = str(warm_start(seed=args.seed, name=name))
    kwargs = tokenizer_kwargs(args, model)
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", truncation_side="left", **kwargs)
    init_kwargs = {**(args.model_init_kwargs or {}), **model_init_kwargs(model)}
    if is_adapter(name):
        zero3 = args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3
        quantization = get_quantization_config(model)
        args.model_init_kwargs = None
        return load_adapter(name, quantization, keep_dtype=zero3 and quantization is None, **init_kwargs), tokenizer
    args.model_init_kwargs = init_kwargs
    return name, tokenizer


@saying_once(checkpoints.__name__)
def main(argv: list[str] | None = None) -> None:
    """Parse the settings, build the trainer, train, and write the report."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("trl_entropy").setLevel(logging.INFO)
    quiet_libraries()
    try:
        task, args, model = parse(argv)
        settings = contract_settings(args, **planned_functions(task), dtype=None)
        found = checkpoints.check_before_loading(
            args.resume_from_checkpoint, Path(args.output_dir), settings, args.resume_allow_changes
        )
    except (ValueError, ImportError) as error:
        sys.exit(f"Error in the settings: {sentence(error)}")
    if found and not args.additional_steps and checkpoints.is_finished(found, args.max_steps, args.num_train_epochs):
        if int(os.environ.get("RANK", "0")) == 0:
            print(checkpoints.describe_finished(found))
        return
    if int(os.environ.get("RANK", "0")) > 0:
        logging.getLogger("trl_entropy").setLevel(logging.WARNING)
    _preflight(task, args, model)
    try:
        check_writable(Path(args.output_dir))
        trainer = build_trainer(task, args, model)
    except OSError as error:
        sys.exit(f"Error: {sentence(describe(error))}")
    except (ValueError, ImportError, RuntimeError) as error:
        _exit(_out_of_memory(error, task, args, model) or error)
    from trl_entropy.engine import OtherRankFailed

    _say_start(trainer)
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    except OSError as error:  # while saving that is a CheckpointError
        sys.exit(_advice_on(error, Path(args.output_dir)))
    # A CheckpointError; what a probe refuses in a model; what no engine reads
    except (ValueError, OtherRankFailed, NotImplementedError) as error:
        _exit(error)
    except RuntimeError as error:
        if (said := _out_of_memory(error, task, args, model)) is None:
            raise
        _exit(said)
    if trainer.is_world_process_zero():
        with ending_in_one_line():
            _say_end(trainer)


def _exit(said: object) -> NoReturn:
    """End with one line, an error or what is said about it; the traceback goes to the log at level DEBUG."""
    logging.getLogger("trl_entropy").debug("%s", said, exc_info=True)
    sys.exit(f"Error: {sentence(said)}")


def _out_of_memory(error: Exception, task: TaskArguments, args: DrGRPOConfig, model: ModelConfig) -> str | None:
    """One line that says what to do, in doctor's words, if memory has run out; None of any other error."""
    from accelerate.utils.memory import should_reduce_batch_size

    from trl_entropy.preflight import memory_remedy

    if not should_reduce_batch_size(error):
        return None
    return f"memory ran out: {one_line(error)[:200]}. {memory_remedy(task, args, model)}"


def _advice_on(error: OSError, run: Path) -> str:
    """One line that says what to do if a file could not be written or read while training."""
    newest, advice = checkpoints.newest_complete(run, checksums=False), remedy(error)
    go_on = f"{newest} is complete: {advice}, then --resume_from_checkpoint latest"
    if newest is None:
        go_on = f"{advice}, then begin anew with --resume_from_checkpoint latest_or_new"
    return f"Error: {one_line(error)}. Training stopped; {go_on}."


def _preflight(task: TaskArguments, args: DrGRPOConfig, model: ModelConfig) -> None:
    """
    Log the short report of `trl-entropy doctor`: batch plan, memory and disk, problems. What training would end with
    for certain ends it here, in doctor's words; of an estimate it is told, and starts.
    """
    from trl_entropy.preflight import short_report

    for name in task.own_functions():
        logging.getLogger("trl_entropy").info("imported %s", name)
    lines, found = short_report(task, args, model)
    stopping = next((finding for finding in found if finding.stops), None)
    lines += [f"{'problem' if one.is_problem else 'note'}: {one}" for one in found if one is not stopping]
    for line in lines:
        logging.getLogger("trl_entropy").info(line)
    if stopping is not None:
        sys.exit(f"Error: {sentence(stopping)}")


def _say_start(trainer: DrGRPOTrainer) -> None:
    args, accelerator = trainer.args, trainer.accelerator
    prompts = args.per_device_train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    controls = {name: getattr(args, name) for name in ("entropy_control", "token_control")}
    changing = "".join(f"; {name}: {value}" for name, value in controls.items() if value != "none")
    logging.getLogger("trl_entropy").info(
        "Dr-GRPO: %s of %s x %d completions on %s, %s; run directory %s; probes: %s%s",
        _length_of(args),
        counted(prompts // args.num_generations, "prompt"),
        args.num_generations,
        counted(accelerator.num_processes, "process"),
        accelerator.device,
        args.output_dir,
        ", ".join(args.enabled_probes()) or "none",
        changing,
    )


def _length_of(args: DrGRPOConfig) -> str:
    if args.additional_steps:
        return counted(args.additional_steps, "more step")
    if args.max_steps > 0:
        return counted(args.max_steps, "step")
    return f"{counted(args.num_train_epochs, 'epoch')} in steps"


def _say_end(trainer: DrGRPOTrainer) -> None:
    """Write the figure; print the evaluations, a completion, and the paths of metrics, figure and page."""
    from trl_entropy.reporting.write import write_report_of_finished_run
    from trl_entropy.tasks.rewards import completion_text

    run = RunDirectory(trainer.args.output_dir)
    evaluation = run.evaluation()
    if len(evaluation) > 1:
        for row in (evaluation[0], evaluation[-1]):
            print(f"held out after step {row['step']:>3}: {describe_evaluation(row)}")
    if trainer._logs["completion"]:
        completion = trainer._logs["completion"][-1]
        print(f"a completion: {plain_text(completion_text(completion))[:300].strip()}")
    print(f"metrics {run.metrics_path}")
    if figure := write_report_of_finished_run(Path(run.path)):
        print(f"figure  {figure}\npage    {run.report_path / 'index.html'}")


if __name__ == "__main__":
    from accelerate import PartialState

    main()
    PartialState().destroy_process_group()  # otherwise its threads may abort the interpreter at exit
