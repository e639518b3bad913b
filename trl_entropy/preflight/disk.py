"""The files of a planned run in bytes: checkpoints, files of probes, tables of completions, and lines of metrics."""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass

from trl_entropy.config.quantities import DEFAULT_QUANTITIES
from trl_entropy.models.embedded import build_tokenizer
from trl_entropy.models.loading import EMBEDDED_MODEL
from trl_entropy.preflight import memory
from trl_entropy.preflight.estimate import (
    base_bytes,
    control_state,
    kept_update,
    optimizer_bytes,
    shape_of,
    trained_bytes,
)
from trl_entropy.preflight.plan import Plan
from trl_entropy.runs.retention import retained
from trl_entropy.tasks.arguments import TaskArguments
from trl_entropy.tasks.prompts import token_ids
from trl_entropy.tasks.registry import load_task

# Numbers that a step logs, by what logs them; counted in a run of every probe.
_LOGGED = {"entropy": 92, "quantity": 79, "reward_attribution": 22, "second_order": 29, "attribution": 38,
           "noise_scale": 25, "fisher": 46, "control": 16, "effective_sample_size": 3, "optimizer_state": 12,
           "likelihood": 3, "mutual_information": 11, "training": 39}  # fmt: skip
_LINE, _EVENT, _STATE = 52, 75, 63  # bytes of a logged number in metrics.jsonl, TensorBoard and trainer_state.json
_HEADER, _TENSOR = 150, 70  # bytes of the header of a probe file, and what a tensor adds to it
_TABLE, _TEXT = 5_000, 1.6  # bytes of an empty table of completions, and of a token of text, compressed (a guess)
_TOKENIZER = 75  # bytes of an entry of the tokenizer in a checkpoint


@dataclass(frozen=True)
class StepFiles:
    """
    Files of some steps.

    Attributes:
        each: bytes of a step.
        at_most, at_end: how many steps have them at most while the run goes on, and at its end.
    """

    each: int
    at_most: int
    at_end: int

    @classmethod
    def kept(cls, each: int, num_steps: int, every: int, keep: int | None) -> StepFiles:
        """Of every `every`-th step, of which `keep` are kept ([`retained`])."""
        steps = range(every, num_steps + 1, every)
        return cls(each, len(steps) if keep is None else min(len(steps), keep), len(retained(steps, keep)))


@dataclass(frozen=True)
class Disk:
    """The bytes of a run by kind of file; completions' tables depend on their texts, so that theirs is a guess."""

    checkpoints: StepFiles
    probes: dict[str, StepFiles]
    completions: StepFiles
    evaluations: StepFiles
    logs: int

    @property
    def at_end(self) -> int:
        return self.logs + sum(files.each * files.at_end for files in self._files())

    @property
    def at_most(self) -> int:
        return self.logs + sum(files.each * files.at_most for files in self._files())

    @property
    def probes_at_end(self) -> int:
        return sum(files.each * files.at_end for files in self.probes.values())

    @property
    def probes_at_most(self) -> int:
        return sum(files.each * files.at_most for files in self.probes.values())

    def _files(self) -> list[StepFiles]:
        return [self.checkpoints, self.completions, self.evaluations, *self.probes.values()]


def disk(plan: Plan) -> Disk:
    """The estimate for `plan`, which must have a `shape`. Completions of full length are assumed."""
    args, steps = plan.args, plan.num_steps
    saves = num_checkpoints(plan)
    limit = args.save_total_limit or saves
    kept = args.completions_files_keep
    logging_steps = plan.every(args.logging_steps)
    tables = StepFiles.kept(_completions_bytes(plan), steps, logging_steps, kept)
    lines = steps * _LINE + (steps // logging_steps) * _EVENT * ("tensorboard" in (args.report_to or []))
    return Disk(
        StepFiles(checkpoint_bytes(plan), saves, min(saves, limit)),
        _probe_files(plan),
        tables if args.log_completions else StepFiles(0, 0, 0),
        _evaluations(plan) if args.log_completions else StepFiles(0, 0, 0),
        _num_logged(plan) * lines,
    )


# ---- checkpoints


def checkpoint_bytes(plan: Plan) -> int:
    """Bytes of a checkpoint: weights, optimizer unless `save_only_model`, tokenizer, and what was logged so far."""
    base = memory.weights(shape_of(plan), base_bytes(plan), plan.quantisation)
    of_all_processes = optimizer_bytes(plan) * memory.shards(plan.engine, "optimizer", plan.world_size)
    saved = memory.checkpoint(
        base,
        shape_of(plan).num_trainable,
        trained_bytes(plan),
        plan.has_adapter,
        0 if plan.args.save_only_model else of_all_processes + kept_update(plan) + control_state(plan),
    )
    lines, saves = plan.num_steps // plan.every(plan.args.logging_steps), num_checkpoints(plan)
    mean = 1.0 if plan.args.save_total_limit else (saves + 1) / (2 * max(saves, 1))  # the last ones have all lines
    return saved + _TOKENIZER * shape_of(plan).vocab_size + round(_num_logged(plan) * _STATE * lines * mean)


def num_checkpoints(plan: Plan) -> int:
    """
    The most checkpoints on the disk: one more than `save_total_limit`, while the newest is being written; the best one
    may be kept beside the newest. All of them, where they are kept until they are evaluated in the background.
    """
    strategy = str(getattr(plan.args.save_strategy, "value", plan.args.save_strategy))
    if strategy == "no":
        return 0
    saves = -(-plan.num_steps // plan.every(plan.args.save_steps)) if strategy == "steps" else 1
    if not plan.args.save_total_limit or waits_for_evaluation(plan):
        return saves
    return min(saves, max(plan.args.save_total_limit, 2 if plan.args.metric_for_best_model else 1) + 1)


def waits_for_evaluation(plan: Plan) -> bool:
    """Whether old checkpoints are kept until they are evaluated, however long that takes."""
    return bool(plan.args.save_total_limit) and plan.args.evaluate_checkpoints == "background"


# ---- files of probes


def _probe_files(plan: Plan) -> dict[str, StepFiles]:
    """
    By probe. U are the step's completions, E those of the entropy probe; L tokens with the prompt, T without. A token
    id has 4 bytes, a mask 1, a number of a token 4; whatever there is once for a completion has 8 at most.
    """
    args, keep = plan.args, plan.args.probe_files_keep
    tokens, rows = args.max_completion_length, plan.completions_per_step
    length = _prompt_width(plan) + tokens
    on_rollouts = args.entropy_probe_completions == "rollouts"
    found: dict[str, tuple[int, int]] = {}  # bytes and cadence
    if args.entropy_probe:
        scored = rows if on_rollouts else args.num_entropy_completions()
        of_training = args.entropy_probe_completions == "next_rollouts" and args.use_vllm
        sampled = 4 * tokens if of_training or (args.entropy_probe_sampler == "vllm" and not on_rollouts) else 0
        found["entropy"] = (_file(8, scored * (5 * length + 17 * tokens + sampled + 8)), args.entropy_probe_every)
        if args.entropy_attribution != "none":
            of_token = (
                (17 + 4 * args.reward_attribution) * tokens if args.entropy_attribution == "token" else 5 * tokens + 8
            )
            found["attribution"] = (_file(7, rows * (of_token + 12)), args.entropy_probe_every)
    if args.noise_scale_probe and args.noise_scale_from == "groups":
        found["noise_scale"] = (_file(7, 40 * round(plan.prompts_per_step) + 16), args.noise_scale_probe_every)
    if args.fisher_probe:
        found["fisher"] = (_fisher_file(plan), args.fisher_probe_every)
    if args.likelihood_probe:
        found["likelihood"] = (_file(6, rows * (17 * tokens + 8)), args.likelihood_probe_every)
    if found:
        advantages = 4 * (tokens if args.token_control != "none" else 1)
        of_rollouts = _file(6, rows * (5 * length + tokens + advantages + 12))
        found["rollouts"] = (of_rollouts, min(every for _, every in found.values()))
    if keep == 0:
        return {}
    return {name: StepFiles.kept(each, plan.num_steps, every, keep) for name, (each, every) in found.items()}


def _file(num_tensors: int, data: int) -> int:
    return _HEADER + _TENSOR * num_tensors + data


def _fisher_file(plan: Plan) -> int:
    """The kernel, the norms of each trained tensor, whose names stand in the metadata, and 11 numbers of each row."""
    number = plan.args.fisher_num_sequences
    names = [name for name, param in shape_of(plan).module.named_parameters() if param.requires_grad]
    data = 8 * number * (number + len(names)) + 76 * number
    return _file(14, data + len(json.dumps(json.dumps(names))))


def _prompt_width(plan: Plan) -> int:
    """The longest training prompt in tokens, counted where the tokenizer is here; else the longest allowed."""
    if str(plan.model.model_name_or_path) != EMBEDDED_MODEL:
        return plan.prompt_length
    return _longest_prompt(json.dumps(asdict(plan.task)), plan.args.seed) or plan.prompt_length


@functools.lru_cache
def _longest_prompt(task: str, seed: int) -> int | None:
    """In tokens of the embedded tokenizer; None if the prompts cannot be read, which is a finding of its own."""
    tokenizer = build_tokenizer()
    try:
        prompts = load_task(TaskArguments(**json.loads(task)), tokenizer, seed)[0]["prompt"]
        return max(map(len, token_ids(list(prompts), tokenizer)))
    except (OSError, ValueError):
        return None


# ---- what is logged


def _completions_bytes(plan: Plan) -> int:
    rows, prompts = plan.completions_per_step, round(plan.prompts_per_step)
    return round(_TABLE + _TEXT * (rows * plan.args.max_completion_length + prompts * _prompt_width(plan)))


def _evaluations(plan: Plan) -> StepFiles:
    """Tables of evaluated completions, of which TRL logs as many as a generation has at most."""
    args = plan.args
    if getattr(args.eval_strategy, "value", args.eval_strategy) != "steps":
        return StepFiles(0, 0, 0)
    every = plan.every(args.eval_steps or args.logging_steps)
    return StepFiles.kept(_completions_bytes(plan), plan.num_steps, every, args.completions_files_keep)


def _num_logged(plan: Plan) -> int:
    """Numbers that a step logs, averaged over steps with and without a probe."""
    args = plan.args
    quantities = {*(args.change_of or DEFAULT_QUANTITIES)} - {"entropy"}
    entropy = {"entropy": True, "second_order": args.entropy_second_order,
               "attribution": args.entropy_attribution != "none",
               "reward_attribution": args.reward_attribution}  # fmt: skip
    total = _LOGGED["training"] + _LOGGED["control"] * (args.entropy_control != "none")
    total += (
        sum(_LOGGED[name] for name, on in entropy.items() if on and args.entropy_probe) // args.entropy_probe_every
    )
    if args.entropy_probe and args.entropy_probe_completions != "rollouts":
        total += _LOGGED["quantity"] * len(quantities) // args.entropy_probe_every
    of_probes = "noise_scale", "fisher", "likelihood", "mutual_information", "effective_sample_size", "optimizer_state"
    for name in of_probes:
        if getattr(args, f"{name}_probe"):
            total += _LOGGED[name] // getattr(args, f"{name}_probe_every")
    return total
