"""
The time of a planned run's step, its probes and its controls, from the FLOPs and bytes of `work.py`: computed.

Everything is that of one process with completions and prompts of full length, since the slowest decides. Left out are
what hardly depends on the model: rewards, files, the time to launch kernels (most of it in generation, so that a step
takes rather longer than is computed here), and evaluations and checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from trl_entropy.preflight import memory
from trl_entropy.preflight.estimate import base_bytes, noise_scale_rows, shape_of, trained_bytes
from trl_entropy.preflight.plan import Plan
from trl_entropy.preflight.work import Model, Work

PRECISIONS = ("float32", "tf32")
# Times that a token of context goes through the memory when one more is drawn: transformers' cache is read and written
# as it grows by `torch.cat`, and read by attention; vLLM's is only read.
_CACHE_PASSES = {"transformers": 3, "vllm": 1}
# Bytes of sampling for each logit: a float32 copy, softmax, a draw (2 + 4, 4 + 4, 4); 8 more with a temperature.
_DRAW_BYTES = 18
# Bytes of the optimizer for each trained parameter: AdamW reads parameter, gradient and moments; it writes three.
_OPTIMIZER_BYTES = 28
# Bytes of the optimizer state's percentiles for each parameter: about 12 operations on float32 for either moment.
_PERCENTILE_BYTES = 2 * 12 * 8
_NOISE_FLOOR_EVERY = 10  # probed steps, as in `probes/entropy_change.py`


class Item(NamedTuple):
    """A phase of a step, or a probe or control: its work each time it runs, and every how many steps it does."""

    name: str
    every: float
    work: Work


@dataclass(frozen=True)
class Cost:
    """The phases of a step, and the probes and controls of a run, scored in `precision` where a probe scores."""

    phases: list[Item]
    probes: list[Item]
    precision: str


def cost(plan: Plan, precision: str) -> Cost | None:
    """
    The work of a step and of what is measured beside it.

    Args:
        precision: of the products in the first derivatives and the attribution of the entropy probe, `float32` or
            `tf32`. All else that a probe scores or differentiates is float32.

    Returns:
        None if the shape of the model is not known, or the model is a mixture of experts.
    """
    model = Model.of(plan.shape) if plan.shape is not None else None
    if model is None:
        return None
    counted = _Counted(plan, model, precision)
    return Cost(list(counted.phases()), list(counted.probes()), precision)


@dataclass(frozen=True)
class _Counted:
    plan: Plan
    model: Model
    probe_precision: str

    # ---- sizes

    @property
    def training_precision(self) -> str:
        return "bfloat16" if self.plan.args.bf16 or base_bytes(self.plan) == 2 else "float32"

    @property
    def rows(self) -> int:
        """Completions of a process in a step."""
        return self.plan.args.per_device_train_batch_size * self.plan.args.gradient_accumulation_steps

    @property
    def lengths(self) -> tuple[int, int]:
        return self.plan.sequence_length, self.plan.args.max_completion_length

    @property
    def entropy_rows(self) -> int:
        """Completions of a process that the entropy probe measures on."""
        return max(1, self.plan.args.num_entropy_completions() // self.plan.world_size)

    # ---- the step

    def phases(self) -> Iterator[Item]:
        args = self.plan.args
        at_once = args.per_device_train_batch_size * args.steps_per_generation
        yield Item("generation", 1, self.rows / at_once / args.num_iterations * self.generated(at_once, args.use_vllm))
        if scorings := self._scorings():
            yield Item("scoring by TRL", 1, scorings * self._trained_forward(self.rows))
        yield Item("loss and backward", 1, self._loss())
        yield Item("optimizer", 1, self._optimizer())
        if self.plan.world_size > 1:
            yield Item("communication", 1, self._communication())

    def generated(self, rows: int, vllm: bool, per_prompt: int | None = None) -> Work:
        """`rows` completions at once; with vLLM's cache of prefixes a prompt is read once for its completions."""
        plan, length = self.plan, self.plan.prompt_length
        each = 2 if self.training_precision == "bfloat16" else 4
        prompts = rows / (per_prompt or plan.args.num_generations) if vllm else rows
        cache = memory.kv_cache(shape_of(plan), 1, 1, each) * _CACHE_PASSES["vllm" if vllm else "transformers"]
        weights = memory.weights(shape_of(plan), base_bytes(plan), plan.quantisation)
        draw = _DRAW_BYTES + (8 if plan.args.temperature != 1 else 0)
        new, precision = plan.args.max_completion_length, self.training_precision
        read = self.model.prefill(prompts, length, precision)
        return read + self.model.decoding(rows, length, new, precision, weights, cache, draw)

    def _scorings(self) -> float:
        """Passes by TRL without a gradient, for each of the step's completions."""
        args = self.plan.args
        # TRL: the policy's log-probabilities as it sampled, where later steps use them too, or where vLLM sampled
        again = args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) != 0
        return (bool(again or args.use_vllm) + (args.beta != 0)) / args.num_iterations

    def _trained_forward(self, rows: float) -> Work:
        return self.model.forward(rows, *self.lengths, self.training_precision)

    def _loss(self) -> Work:
        work = self._trained_forward(self.rows) + self.model.backward(
            self.rows, *self.lengths, self.training_precision
        )
        if self.plan.args.gradient_checkpointing:
            work += self.model.layers_again(self.rows, self.lengths[0], self.training_precision)
        # A micro-batch's gradients are added to those before it: two reads and a write
        number = shape_of(self.plan).num_trainable * self.plan.args.gradient_accumulation_steps
        return work + Work(memory=3 * number * trained_bytes(self.plan))

    def _optimizer(self) -> Work:
        shards = memory.shards(self.plan.engine, "optimizer", self.plan.world_size)
        return Work(memory=_OPTIMIZER_BYTES * shape_of(self.plan).num_trainable / shards)

    def _communication(self) -> Work:
        """
        DDP and ZeRO-1 add gradients up once a step, ZeRO-2 and 3 in every micro-batch, to the process that owns them;
        ZeRO collects the parameters after the step, ZeRO-3 in each pass of the layers and for generation.

        Source: Rajbhandari et al. 2020 (arXiv 1910.02054), section 7.
        """
        plan, args = self.plan, self.plan.args
        stage, micro_batches = plan.launch.zero_stage or 0, args.gradient_accumulation_steps
        trained = shape_of(plan).num_trainable * trained_bytes(plan)
        whole = memory.weights(shape_of(plan), base_bytes(plan), plan.quantisation)
        # Each is half of an all-reduce: a reduce-scatter or an all-gather
        gradients = trained * (micro_batches if stage >= 2 else 1)
        passes = micro_batches * (3 if args.gradient_checkpointing else 2) + 1
        collected = whole * passes if stage == 3 or plan.engine.startswith("fsdp") else trained
        return self._collective(gradients + collected)

    def _collective(self, num_bytes: float) -> Work:
        """A reduce-scatter or an all-gather: in a ring within the machines, then between them."""
        launch = self.plan.launch
        local, machines = launch.num_local_processes, launch.num_machines
        link = num_bytes * (local - 1) / local
        return Work(link=link, network=num_bytes * (machines - 1) / machines)

    # ---- probes and controls

    def probes(self) -> Iterator[Item]:
        args = self.plan.args
        if args.entropy_probe:
            rollouts = args.entropy_probe_completions == "rollouts"
            yield Item("entropy_probe", args.entropy_probe_every, self._rollouts() if rollouts else self._entropy())
            if args.entropy_attribution != "none":
                name = f"entropy_attribution: {args.entropy_attribution}"
                yield Item(name, args.entropy_probe_every, self._attribution())
        if args.kl_every and args.beta == 0:
            yield Item("kl_every", args.kl_every, self._trained_forward(self.rows))
        if args.noise_scale_probe:
            yield Item("noise_scale_probe", args.noise_scale_probe_every, self._noise_scale())
        if args.fisher_probe:
            yield Item("fisher_probe", args.fisher_probe_every, self._fisher())
        if args.likelihood_probe:
            work = 2 * self.score(self.rows) + 2 * self._float32_copy()
            yield Item("likelihood_probe", args.likelihood_probe_every, work)
        if args.mutual_information_probe:
            yield Item("mutual_information_probe", args.mutual_information_probe_every, self._mutual_information())
        if args.optimizer_state_probe:
            number = shape_of(self.plan).num_trainable
            yield Item(
                "optimizer_state_probe", args.optimizer_state_probe_every, Work(memory=_PERCENTILE_BYTES * number)
            )
        if args.effective_sample_size_probe:
            yield Item("effective_sample_size_probe", args.effective_sample_size_probe_every, Work())
        if args.entropy_control != "none":
            yield Item(f"entropy_control: {args.entropy_control}", 1, self._entropy_control())
        if args.token_control != "none":
            yield Item(f"token_control: {args.token_control}", 1, self._token_control())

    def score(self, rows: float, order: int = 0) -> Work:
        """A first derivative in the probes' precision has its values scored in float32 beside it, if that differs."""
        if order != 1 or self.probe_precision == "float32":
            return self.model.forward(rows, *self.lengths, "float32", order)
        return self.model.forward(rows, *self.lengths, self.probe_precision, order) + self.score(rows)

    def differentiated(self, rows: float, num: int = 1, weights: bool = True, precision: str = "float32") -> Work:
        """A forward pass and `num` backward passes."""
        forward = self.model.forward(rows, *self.lengths, precision)
        return forward + self.model.backward(rows, *self.lengths, precision, num, weights)

    def _entropy(self) -> Work:
        args, rows = self.plan.args, self.entropy_rows
        before, after = {"none": (0, 0), "linear": (1, 0), "trapezoid": (1, 1)}[args.entropy_prediction]
        work = self.score(rows, before) + self.score(rows, after) + (1 / _NOISE_FLOOR_EVERY) * self.score(rows)
        if self.training_precision == "bfloat16":  # the change of the model in training's precision
            work += 2 * self._trained_forward(rows)
        if args.entropy_placebo:
            work += self.score(rows, 1)
        if args.entropy_second_order:
            work += self.score(rows, 2)
        if args.entropy_probe_completions in ("held_out", "eval"):
            work += self.generated(rows, args.entropy_probe_sampler == "vllm", per_prompt=1)
        return work + 2 * self._float32_copy()

    def _rollouts(self) -> Work:
        """(T17): before and after the step, and two gradients of every prompt group."""
        return 2 * self.score(self.rows) + self.differentiated(self.rows, num=2) + 3 * self._float32_copy()

    def _attribution(self) -> Work:
        """(T9): grad h, and the step's own completions by backward passes, or by a derivative along it."""
        args = self.plan.args
        precision = self.probe_precision
        work = self.differentiated(self.entropy_rows, precision=precision) + 2 * self._float32_copy()
        times = 2 if args.reward_attribution else 1  # the reward's gradient takes all of it again
        if args.entropy_attribution == "token":
            return times * (work + self.score(self.rows, 1))
        passes = self.differentiated(self.rows, weights=False, precision=precision)
        by_sequence = (1 + (args.beta != 0)) * (passes + self._sequence_gradients(self.rows, precision))
        return times * (work + by_sequence)

    def _noise_scale(self) -> Work:
        args, trainable = self.plan.args, shape_of(self.plan).num_trainable
        halves = self.differentiated(self.rows) + self._float32_copy() if args.noise_scale_within_prompt else Work()
        if args.noise_scale_from == "micro_batches":
            return halves + Work(memory=8 * trainable * args.gradient_accumulation_steps)
        groups = -(-self.rows // args.num_generations)
        products = Work(memory=6 * 4 * groups * trainable)  # written, and read for norms and products in two metrics
        if noise_scale_rows(self.plan):
            return halves + products + self._sequence_gradients(self.rows, self.training_precision)
        return halves + products + self.differentiated(self.rows) + self._float32_copy()

    def _fisher(self) -> Work:
        """(T12): rows of all gradients, their Gram matrix, and scores before and after the step."""
        args = self.plan.args
        number = args.fisher_num_sequences
        rows, trainable = number / self.plan.world_size, shape_of(self.plan).num_trainable
        gram = Work({"float32": 2 * rows * number * (args.fisher_sketch_dim or trainable)}, 3 * 4 * rows * trainable)
        gradients = self.differentiated(rows, weights=False) + self._sequence_gradients(rows)
        return gradients + gram + 2 * self.score(rows) + 3 * self._float32_copy()

    def _mutual_information(self) -> Work:
        """(T23): the completions of some prompts scored under all of these."""
        number = self.plan.args.mutual_information_num_prompts
        rows = number * self.plan.args.num_generations / self.plan.world_size
        return number * self.score(rows) + self._float32_copy()

    def _sequence_gradients(self, rows: float, precision: str = "float32") -> Work:
        """The gradient of each completion by itself: the products that make a weight's gradient, not summed."""
        flops = 2 * rows * self.lengths[0] * self.model.trained
        return Work({precision: flops}, 3 * 4 * rows * shape_of(self.plan).num_trainable)

    def _entropy_control(self) -> Work:
        """(T19): the entropy and its gradient on a batch that is drawn, or on the step's completions."""
        args, copies = self.plan.args, 2 * self._float32_copy()
        if args.entropy_control_completions == "rollouts":
            half = 0.5 * self.differentiated(self.rows)  # of the loss, on every second prompt
            return self.score(self.rows) + self.differentiated(self.rows) + half + copies
        rows = max(1, args.entropy_control_num_completions // self.plan.world_size)
        drawn = self.generated(rows, vllm=False)
        return drawn + self.score(rows) + self.differentiated(rows) + copies

    def _token_control(self) -> Work:
        """The scores that covariances are of; of exchange (T24) two gradients, and a derivative along each."""
        args = self.plan.args
        if args.token_control == "exchange":  # below its floor
            gradients = self.differentiated(self.rows, num=2) + 2 * self.score(self.rows, 1)
            return gradients + 2 * self._float32_copy()
        of_step, centred = args.token_control_scope == "optimizer_batch", args.token_control_centre == "distribution"
        return int(of_step and (centred or not self._scorings())) * self._trained_forward(self.rows)

    def _float32_copy(self) -> Work:
        """Frozen parameters read in their own dtype and written in float32, each time a probe scores."""
        each = base_bytes(self.plan)
        frozen = memory.float32_base(shape_of(self.plan), each) / 4
        return Work(memory=(each + 4) * frozen)
