"""The memory of a planned run, per process and phase of a step, from the formulas of `memory.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trl_entropy.estimators.optimizer.known import SPLIT_IN_SLICES
from trl_entropy.gradients.footprint import Differentiated, Pass, activations, rows_that_fit
from trl_entropy.gradients.memory import GIB, MOST_ROWS, pass_budget, resident, rows_budget
from trl_entropy.preflight import memory
from trl_entropy.preflight.plan import Plan
from trl_entropy.preflight.shapes import ModelShape

ENGINES = ("plain", "ddp", "zero1", "zero2", "zero3", "fsdp2")


@dataclass(frozen=True)
class Estimate:
    """
    The bytes of one process by item: what is always there, and what each phase of a step adds. The phases follow one
    another, so the largest of them counts.

    Attributes:
        on_machine: bytes of each machine's main memory that its processes share while probes work.
    """

    always: dict[str, int]
    phases: dict[str, dict[str, int]]
    on_machine: int = 0

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak(self) -> int:
        return sum(self.always.values()) + sum(self.phases[self.peak_phase].values())


def estimate(plan: Plan) -> Estimate:
    """The estimate for a process of `plan`, which must have a `shape`."""
    gradients = _gradients(plan)
    return Estimate(
        always=_always(plan),
        phases={
            "generation": _generation(plan),
            "loss and backward": gradients | _loss(plan) | _waiting_rows(plan),
            **{probe: gradients | items for probe, items in probe_phases(plan).items()},
        },
        on_machine=on_machine(plan),
    )


def estimates_by_engine(plan: Plan) -> dict[str, Estimate]:
    """The estimate of the same run under each engine, with the plan's number of processes (at least 2)."""
    world_size = max(2, plan.world_size)
    launches = {
        engine: replace(plan.launch, engine=engine, num_processes=1 if engine == "plain" else world_size)
        for engine in ENGINES
    }
    return {engine: estimate(replace(plan, launch=launch)) for engine, launch in launches.items()}


def shape_of(plan: Plan) -> ModelShape:
    assert plan.shape is not None, "a plan without a shape has no estimate"
    return plan.shape


def base_bytes(plan: Plan) -> int:
    """Bytes per parameter of the base model; DeepSpeed converts it to bf16 when training is in bf16."""
    if plan.launch.zero_stage is not None and plan.args.bf16:
        return 2
    return memory.DTYPE_BYTES[plan.model.dtype or "float32"]


def trained_bytes(plan: Plan) -> int:
    """Bytes per trained parameter; peft keeps adapters in float32, TRL those of a quantised model in bf16."""
    if not plan.has_adapter or plan.launch.zero_stage is not None:
        return base_bytes(plan)
    return 4 if plan.quantisation == "none" else 2


def _mixed(plan: Plan) -> bool:
    """Whether weights are float32 and autocast computes in bf16."""
    return bool(plan.args.bf16) and base_bytes(plan) == 4


def _compute_bytes(plan: Plan) -> int:
    return 2 if plan.args.bf16 else base_bytes(plan)


def optimizer_bytes(plan: Plan) -> int:
    """Bytes of the optimizer's state on one process."""
    optim = str(getattr(plan.args.optim, "value", plan.args.optim))
    trained = shape_of(plan).num_trainable
    return memory.optimizer(trained, trained_bytes(plan), optim, plan.engine, plan.world_size)


def _always(plan: Plan) -> dict[str, int]:
    shape = shape_of(plan)
    base = memory.weights(shape, base_bytes(plan), plan.quantisation)
    shards = memory.shards(plan.engine, "weights", plan.world_size)
    items = {
        "weights": base // shards,
        "adapter": shape.num_adapter * trained_bytes(plan) // shards,
        "optimizer": optimizer_bytes(plan),
        "reference model (beta)": base // shards if plan.args.beta and not plan.has_adapter else 0,
    }
    if plan.args.kl_every and plan.args.beta == 0:
        items["start parameters (kl_every)"] = shape.num_trainable * trained_bytes(plan)
    if kept := kept_update(plan):
        items["last step, until it is measured"] = kept // memory.shards(plan.engine, "optimizer", plan.world_size)
    if plan.args.entropy_probe and plan.args.entropy_placebo:
        items["earlier update (entropy_placebo)"] = 4 * shape.num_trainable
    return {name: size for name, size in items.items() if size}


def kept_update(plan: Plan) -> int:
    """Bytes, over all processes, of what is kept of a step until the next completions have been drawn, and saved."""
    if not plan.args.entropy_probe or plan.args.entropy_probe_completions != "next_rollouts":
        return 0
    # Of AdamW's step a moment, of another's its metric and two parts
    of_rule = 1 if plan.args._optimizer_name() in SPLIT_IN_SLICES else 3
    return 4 * shape_of(plan).num_trainable * (1 + of_rule * (plan.args.entropy_attribution != "none"))


def _gradients(plan: Plan) -> dict[str, int]:
    trained, each = shape_of(plan).num_trainable, trained_bytes(plan)
    items = {
        "gradients": memory.gradients(trained, each, plan.engine, plan.world_size),
        "communication buffers": memory.communication(trained, each, plan.engine, plan.hardware.has_gpu),
    }
    return {name: size for name, size in items.items() if size}


def _generation(plan: Plan) -> dict[str, int]:
    if plan.args.use_vllm:
        return {}  # vLLM reserves memory of its own: vllm_gpu_memory_utilization
    shape, rows = shape_of(plan), plan.generation_rows
    gathered = memory.weights(shape, base_bytes(plan), plan.quantisation)
    return {
        "KV cache": memory.kv_cache(shape, rows, plan.sequence_length, _compute_bytes(plan)),
        "logits of a token": memory.generation_logits(shape, rows),
        **({"weights gathered (ZeRO-3)": gathered} if plan.engine == "zero3" else {}),
    }


def _loss(plan: Plan) -> dict[str, int]:
    shape, rows, args = shape_of(plan), plan.args.per_device_train_batch_size, plan.args
    items = {
        "activations (estimate)": activations(
            shape,
            rows,
            plan.sequence_length,
            _mixed(plan),
            _compute_bytes(plan),
            plan.attention,
            bool(args.gradient_checkpointing),
        ),
        "logits in the loss": memory.loss_head(shape, rows, args.max_completion_length, not plan.has_adapter),
        "bf16 copies (autocast)": memory.autocast_copies(shape, _mixed(plan), base_bytes(plan)),
    }
    return {name: size for name, size in items.items() if size}


# ---- probes

# What each probe reads of the step (`UpdateContext`), which is kept from the first reading until the step is over.
_ENTROPY = ("params_before", "params_after", "update")
_ADAMW = ("gradient", "exp_avg", "exp_avg_sq")


def probe_phases(plan: Plan) -> dict[str, dict[str, int]]:
    """
    What each probe and the control need while they work, one after the other: float32 copies of all trained parameters
    on every process, of which some stay from those before; gradients that are kept; and a pass over completions.

    Where parameters are sliced, what is read of the step lies in the machine's memory instead (`on_machine`).
    """
    phases, read = _probe_items(plan)
    copy = 4 * shape_of(plan).num_trainable
    everything = {name for names in read.values() for name in names}
    for probe, items in phases.items():
        if (others := len(everything - set(read[probe]))) and not plan.is_sliced:
            items["copies that others read"] = others * copy
        if plan.is_sharded or "params_before" not in read[probe]:  # otherwise it is one of the copies
            items["own share of the parameters"] = copy // memory.shards(plan.engine, "optimizer", plan.world_size)
        if plan.is_sliced:
            items[next(iter(items))] = _num_made(plan, probe) * copy
        if plan.is_sliced and not plan.hardware.has_gpu:
            items["of the machine's, shared"] = on_machine(plan) // plan.launch.num_local_processes
    return phases


def _num_made(plan: Plan, probe: str) -> int:
    """Copies that a probe makes of what it reads, which alone are whole on a device where parameters are sliced."""
    args = plan.args
    if probe == "entropy_probe" and args.entropy_probe_completions != "rollouts":
        return 3 if args.entropy_attribution != "none" else int(args.entropy_second_order)  # the predicted update
    averages = 4 * (args.entropy_control_completions == "probe" and bool(args.entropy_control_gradient_ema))
    made = {"entropy_probe": 3, "noise_scale_probe": 4, "fisher_probe": 4, "entropy_control": 6 + averages}
    return made.get(probe, 0)


def on_machine(plan: Plan) -> int:
    """
    Bytes of main memory that the processes of a machine share while probes work: where parameters are sliced the
    frozen ones in their own dtype, and in float32 the vectors over the trained ones that probes read of the step.
    """
    phases, read = _probe_items(plan)
    if not phases or not plan.is_sliced:
        return 0
    vectors = len({name for names in read.values() for name in names})
    vectors += 3 if plan.args.entropy_probe and plan.args.entropy_attribution != "none" else 0  # its own moments
    shape = shape_of(plan)
    return memory.num_frozen(shape) * base_bytes(plan) + 4 * shape.num_trainable * vectors


def _probe_items(plan: Plan) -> tuple[dict[str, dict[str, int]], dict[str, tuple[str, ...]]]:
    """The items of each phase, and what the probe reads of the step."""
    args, copy = plan.args, 4 * shape_of(plan).num_trainable
    phases: dict[str, dict[str, int]] = {}
    read: dict[str, tuple[str, ...]] = {}
    if args.entropy_probe and args.entropy_probe_completions == "rollouts":
        phases["entropy_probe"], read["entropy_probe"] = _rollouts_probe(plan, copy), (*_ENTROPY, "gradient")
    elif args.entropy_probe:
        more = _ADAMW if args.entropy_second_order or args.entropy_attribution != "none" else ()
        phases["entropy_probe"], read["entropy_probe"] = _entropy_probe(plan, copy), (*_ENTROPY, *more)
    if args.noise_scale_probe and args.noise_scale_from == "groups":
        phases["noise_scale_probe"] = _noise_scale_probe(plan, copy)
        read["noise_scale_probe"] = ("gradient", "exp_avg_sq")
    if args.fisher_probe:
        phases["fisher_probe"], read["fisher_probe"] = _fisher_probe(plan, copy), (*_ENTROPY, *_ADAMW)
    if args.entropy_control != "none":
        phases["entropy_control"] = _entropy_control(plan, copy)
        read["entropy_control"] = ("params_before", "update", "gradient", "exp_avg_sq")
    if args.token_control == "exchange":
        phases["token_control"] = _token_exchange(plan, copy)
        read["token_control"] = ("params_before", "gradient", "exp_avg_sq")
    if args.likelihood_probe:
        rows = num_groups(plan) * args.num_generations
        phases["likelihood_probe"] = {
            "likelihood_probe: parameters": 2 * copy,
            "likelihood_probe: pass (estimate)": _pass(plan, rows),
        }
        read["likelihood_probe"] = ("params_before", "params_after")
    if args.mutual_information_probe:
        rows = args.mutual_information_num_prompts // plan.world_size * args.num_generations
        phases["mutual_information_probe"] = {
            "mutual_information_probe: parameters": copy,
            "mutual_information_probe: pass (estimate)": _pass(plan, rows),
        }
        read["mutual_information_probe"] = ("params_before",)
    if args.optimizer_state_probe:
        largest = memory.largest(shape_of(plan), trained=True)
        phases["optimizer_state_probe"] = {
            "optimizer_state_probe": copy,
            "optimizer_state_probe: a tensor's bins": memory.bins(largest) + 4 * largest * plan.is_sliced,
        }
        read["optimizer_state_probe"] = ("exp_avg_sq",)
    return phases, read


def _resident(plan: Plan) -> int:
    return resident(shape_of(plan).module) // memory.shards(plan.engine, "weights", plan.world_size)


def rows_limit(plan: Plan) -> float:
    """Bytes of gradients of groups or completions that a process keeps, as training will say."""
    total = plan.hardware.memory_per_process(plan.launch.num_local_processes)
    return rows_budget(total // GIB * GIB, _resident(plan), plan.args.probe_rows_gib)


def num_groups(plan: Plan) -> int:
    """Prompt groups of a process in a step."""
    args = plan.args
    return -(-args.per_device_train_batch_size * args.gradient_accumulation_steps // args.num_generations)


def noise_scale_rows(plan: Plan) -> int:
    """Bytes of the groups' gradients that the noise scale takes from training's backward; 0 with an extra pass."""
    args, rows = plan.args, 4 * num_groups(plan) * shape_of(plan).num_trainable
    from_training = args.noise_scale_probe and args.noise_scale_from == "groups" and plan.has_adapter
    return rows if from_training and rows <= rows_limit(plan) else 0


def rows_at_once(plan: Plan, most: int, order: int = 0, backward: Differentiated = "") -> tuple[int, int]:
    """How many of `most` completions a pass takes at a time, as training will plan, and the bytes of the pass."""
    shape, args, on_cpu = shape_of(plan), plan.args, not plan.hardware.has_gpu
    one = Pass(
        shape,
        plan.sequence_length,
        args.max_completion_length,
        order,
        backward,
        on_cpu,
        attention=plan.attention,
        trains_head=not plan.has_adapter,
    )
    total = plan.hardware.memory_per_process(plan.launch.num_local_processes)
    asked = MOST_ROWS if args.probe_batch_size is None else args.probe_batch_size
    rows = rows_that_fit(one, pass_budget(total, _resident(plan)), min(asked, max(1, most)))
    return rows, one.num_bytes(rows)


def _pass(plan: Plan, most: int, order: int = 0, backward: Differentiated = "") -> int:
    """
    Bytes of a pass, with a float32 copy of narrower frozen parameters. Of sliced ones the largest alone, and of the
    trained ones too, with its direction; but a backward pass has all that it differentiates by.
    """
    shape, one_pass = shape_of(plan), rows_at_once(plan, most, order, backward)[1]
    if not plan.is_sliced:
        return one_pass + memory.float32_base(shape, base_bytes(plan))
    frozen = memory.largest(shape, trained=False) * (4 + (base_bytes(plan) if base_bytes(plan) < 4 else 0))
    with_direction = 2 if order else 1
    trained = shape.num_trainable if backward else memory.largest(shape, trained=True) * with_direction
    return one_pass + max(frozen, 4 * trained) + (frozen if backward else 0)


def _entropy_probe(plan: Plan, copy: int) -> dict[str, int]:
    """Copies: parameters before and after, update; for the second order gradient and moments; three more for (T9)."""
    args, most = plan.args, plan.args.num_entropy_completions() // plan.world_size
    order = 2 if args.entropy_second_order else 1 if args.entropy_prediction != "none" else 0
    scored = _pass(plan, most, order)
    attributed = args.entropy_attribution != "none"
    if attributed:  # grad h, and by sequence every g_i, need a backward pass
        scored = max(scored, _pass(plan, most, backward="entropies"))
    copies = 9 if attributed else 6 if args.entropy_second_order else 3
    return {"entropy_probe: parameters": copy * copies, "entropy_probe: pass (estimate)": scored}


def _rollouts_probe(plan: Plan, copy: int) -> dict[str, int]:
    """Copies: parameters before and after, gradient, second moment, metric. Two or three per kept prompt group."""
    each = copy * (3 if plan.world_size > 1 else 2)
    kept = min(num_groups(plan), int(rows_limit(plan) // each))
    return {
        "entropy_probe: parameters": 5 * copy,
        "entropy_probe: group gradients (T17)": kept * each,
        "entropy_probe: pass (estimate)": _pass(plan, plan.args.num_generations, backward="twice"),
        **_waiting_rows(plan),
    }


def _waiting_rows(plan: Plan) -> dict[str, int]:
    """The group gradients of the noise scale, while probes before it work."""
    rows = noise_scale_rows(plan)
    return {"noise_scale_probe: group gradients": rows} if rows else {}


def _entropy_control(plan: Plan, copy: int) -> dict[str, int]:
    """
    Copies: parameters before, update, gradient, second moment, metric without and with its floor, both halves of grad
    h, their mean, correction; with entropy_control_gradient_ema also running sums and means of the halves.
    """
    args = plan.args
    from_probe = args.entropy_control_completions == "probe"
    prompts = args.entropy_control_num_completions // plan.world_size if from_probe else plan.generation_rows
    return {
        "entropy_control: copies": (14 if from_probe and args.entropy_control_gradient_ema else 10) * copy,
        "entropy_control: pass (estimate)": _pass(plan, max(1, prompts // 2), backward="entropies"),
    }


def _token_exchange(plan: Plan, copy: int) -> dict[str, int]:
    """
    Copies: parameters before, gradient, second moment, metric without and with its floor, grad h and grad J, both in
    that metric; with token_control_gradient_ema also their running sums and means.
    """
    rows = plan.generation_rows
    passes = _pass(plan, rows, backward="entropies"), _pass(plan, rows, order=1)
    return {
        "token_control: copies": (13 if plan.args.token_control_gradient_ema else 9) * copy,
        "token_control: pass (estimate)": max(passes),
    }


def control_state(plan: Plan) -> int:
    """Bytes of the vectors that controls keep from step to step, on every process and in a checkpoint."""
    args, vectors = plan.args, 0
    if args.entropy_control != "none" and args.entropy_control_completions == "probe":
        vectors += 2 * bool(args.entropy_control_gradient_ema)
    if args.token_control == "exchange":
        vectors += 4 if args.token_control_gradient_ema else 2
    return 4 * vectors * shape_of(plan).num_trainable


def _noise_scale_probe(plan: Plan, copy: int) -> dict[str, int]:
    """Copies: gradient, second moment, metric; and one per prompt group, or M g, mean and graph of an extra pass."""
    args, rows = plan.args, _waiting_rows(plan)
    if rows and not args.noise_scale_within_prompt:
        return {"noise_scale_probe: copies": 3 * copy, **rows}
    groups = num_groups(plan) * args.num_generations
    at_once = max(args.num_generations, rows_at_once(plan, groups, backward="logps")[0])
    return {
        "noise_scale_probe: copies": 6 * copy,
        **rows,
        "noise_scale_probe: pass (estimate)": _pass(plan, at_once, backward="logps"),
    }


def _fisher_probe(plan: Plan, copy: int) -> dict[str, int]:
    """Copies: parameters before and after, gradient, moments, M, 3 directions; one per completion; a float32 graph."""
    args = plan.args
    number = args.fisher_num_sequences // plan.world_size * (1 if args.weighs_tokens_alike() else 2)
    row = 8 * args.fisher_sketch_dim or copy
    return {
        "fisher_probe: parameters": 9 * copy,
        "fisher_probe: rows (T12)": number * row * (2 if plan.world_size > 1 else 1),
        "fisher_probe: pass (estimate)": _pass(plan, number, backward="logps"),
    }
