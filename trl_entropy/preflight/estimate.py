"""The memory of a planned run, per process and phase of a step, from the formulas of `memory.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from trl_entropy.preflight import memory
from trl_entropy.preflight.plan import Plan
from trl_entropy.preflight.shapes import ModelShape
from trl_entropy.probes.noise_scale import MAX_ROWS_BYTES

ENGINES = ("plain", "ddp", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Estimate:
    """
    The bytes of one process by item: what is always there, and what each phase of a step adds. The phases follow one
    another, so the largest of them counts.
    """

    always: dict[str, int]
    phases: dict[str, dict[str, int]]

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
            "loss and backward": gradients | _loss(plan),
            "probes": gradients | probe_items(plan),
        },
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
    return 4 * shape_of(plan).num_trainable * (1 if plan.args.entropy_attribution == "none" else 2)


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
        "activations (estimate)": memory.activations(
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


def probe_items(plan: Plan) -> dict[str, int]:
    """What each enabled probe needs: float32 copies of all trained parameters on every process, and its scoring."""
    args, copy = plan.args, 4 * shape_of(plan).num_trainable
    items: dict[str, int] = {}
    if args.entropy_probe and args.entropy_probe_completions == "rollouts":
        items |= _rollouts_probe(plan, copy)
    elif args.entropy_probe:
        items |= _entropy_probe(plan, copy)
    if args.noise_scale_probe:
        items |= _noise_scale_probe(plan, copy)
    if args.fisher_probe:
        items |= _fisher_probe(plan, copy)
    if args.entropy_control != "none":
        items |= _entropy_control(plan, copy)
    if args.optimizer_state_probe:
        items["optimizer_state_probe"] = copy
    if items and (plan.engine.startswith("zero") or not args.entropy_probe):  # otherwise it is one of the copies above
        items["own share of the parameters"] = copy // memory.shards(plan.engine, "optimizer", plan.world_size)
    return items


def _entropy_probe(plan: Plan, copy: int) -> dict[str, int]:
    """Copies: parameters before and after, update; for the second order gradient and moments; three more for (T9)."""
    args, shape = plan.args, shape_of(plan)
    order = 2 if args.entropy_second_order else 1
    rows = min(args.probe_batch_size, max(1, args.num_entropy_completions() // plan.world_size))
    scored = memory.scoring(shape, rows, plan.sequence_length, args.max_completion_length, order)
    attributed = args.entropy_attribution != "none"
    if attributed:  # grad h, and by sequence every g_i, need a backward pass
        graph = memory.activations(shape, rows, plan.sequence_length, False, 4, plan.attention, checkpointing=False)
        scored = max(scored, graph)
    copies = 9 if attributed else 6 if args.entropy_second_order else 3
    return {
        "entropy_probe: parameters": copy * copies,
        "entropy_probe: scoring (estimate)": scored + memory.float32_base(shape, base_bytes(plan)),
    }


def _rollouts_probe(plan: Plan, copy: int) -> dict[str, int]:
    """Copies: parameters before and after, gradient, second moment, metric. Two per prompt group; a float32 graph."""
    args, shape = plan.args, shape_of(plan)
    groups = -(-args.per_device_train_batch_size * args.gradient_accumulation_steps // args.num_generations)
    rows = min(args.probe_batch_size, args.num_generations)
    graph = memory.activations(shape, rows, plan.sequence_length, False, 4, plan.attention, checkpointing=False)
    scored = memory.scoring(shape, rows, plan.sequence_length, args.max_completion_length, order=0)
    return {
        "entropy_probe: parameters": 5 * copy,
        "entropy_probe: group gradients (T17)": 2 * groups * copy,
        "entropy_probe: graph (estimate)": graph + scored + memory.float32_base(shape, base_bytes(plan)),
    }


def _entropy_control(plan: Plan, copy: int) -> dict[str, int]:
    """
    Copies: parameters before, update, gradient, second moment, metric without and with its floor, both halves of grad
    h, their mean, correction; with entropy_control_gradient_ema also running sums and means of the halves.
    """
    args, shape = plan.args, shape_of(plan)
    from_probe = args.entropy_control_completions == "probe"
    prompts = args.entropy_control_num_completions // plan.world_size if from_probe else plan.generation_rows
    rows = min(args.probe_batch_size, max(1, prompts // 2))
    graph = memory.activations(shape, rows, plan.sequence_length, False, 4, plan.attention, checkpointing=False)
    scored = memory.scoring(shape, rows, plan.sequence_length, args.max_completion_length, order=0)
    return {
        "entropy_control: copies": (14 if from_probe and args.entropy_control_gradient_ema else 10) * copy,
        "entropy_control: graph (estimate)": graph + scored + memory.float32_base(shape, base_bytes(plan)),
    }


def _noise_scale_probe(plan: Plan, copy: int) -> dict[str, int]:
    """Copies: gradient, second moment, metric; and one per prompt group, or M g, mean and graph of an extra pass."""
    args, shape = plan.args, shape_of(plan)
    if args.noise_scale_from == "micro_batches":
        return {}
    rows = -(-args.per_device_train_batch_size * args.gradient_accumulation_steps // args.num_generations) * copy
    from_training = plan.has_adapter and rows <= MAX_ROWS_BYTES
    items = {"noise_scale_probe: group gradients": rows} if from_training else {}
    if from_training and not args.noise_scale_within_prompt:
        return {"noise_scale_probe: copies": 3 * copy, **items}
    at_once = max(args.num_generations, min(args.probe_batch_size, args.per_device_train_batch_size))
    graph = memory.activations(shape, at_once, plan.sequence_length, False, 4, plan.attention, checkpointing=False)
    scored = memory.scoring(shape, at_once, plan.sequence_length, args.max_completion_length, order=0)
    return {
        "noise_scale_probe: copies": 6 * copy,
        **items,
        "noise_scale_probe: graph (estimate)": graph + scored + memory.float32_base(shape, base_bytes(plan)),
    }


def _fisher_probe(plan: Plan, copy: int) -> dict[str, int]:
    """Copies: parameters before and after, gradient, moments, M, 3 directions; one per completion; a float32 graph."""
    args, shape = plan.args, shape_of(plan)
    number = args.fisher_num_sequences // plan.world_size * (1 if args.weighs_tokens_alike() else 2)
    row = 8 * args.fisher_sketch_dim or copy
    at_once = min(args.probe_batch_size, number)
    graph = memory.activations(shape, at_once, plan.sequence_length, False, 4, plan.attention, checkpointing=False)
    scored = memory.scoring(shape, at_once, plan.sequence_length, args.max_completion_length, order=0)
    return {
        "fisher_probe: parameters": 9 * copy,
        "fisher_probe: rows (T12)": number * row * (2 if plan.world_size > 1 else 1),
        "fisher_probe: graph (estimate)": graph + scored + memory.float32_base(shape, base_bytes(plan)),
    }
