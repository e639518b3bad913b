"""Facts about accelerate, transformers, DeepSpeed and torch that `trl_entropy.engine` relies on.

A failure here says which fact changed upstream, before it shows as a wrong number.
"""

import inspect
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from torch import nn

# ---- accelerate


@pytest.fixture
def accelerator_in_bf16():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("boundary", [True, False])
def test_accelerate_steps_inside_backward_under_deepspeed(boundary: bool) -> None:
    engine = Mock()
    DeepSpeedEngineWrapper(engine).backward("loss", sync_gradients=boundary)
    step = [call.step()] if boundary else []
    expected = [call.set_gradient_accumulation_boundary(is_boundary=boundary), call.backward("loss"), *step]
    assert engine.mock_calls == expected, (
        "accelerate no longer calls engine.step inside backward, once at the accumulation boundary: "
        "ZeroEngine wraps that call to find the moment between the last backward and the update"
    )


def test_accelerate_keeps_the_deepspeed_engine() -> None:
    source = inspect.getsource(Accelerator._prepare_deepspeed)
    assert "self.deepspeed_engine_wrapped = DeepSpeedEngineWrapper(engine)" in source, (
        "Accelerator.deepspeed_engine_wrapped is gone; build_engine finds DeepSpeed's engine there"
    )
    assert DeepSpeedEngineWrapper("engine").engine == "engine", "DeepSpeedEngineWrapper.engine is gone"


def test_accelerate_replaces_forward_by_autocast(accelerator_in_bf16: Accelerator) -> None:
    model = nn.Linear(2, 2)
    original = model.forward
    prepared = accelerator_in_bf16.prepare(model)
    assert prepared is model
    assert vars(model)["_original_forward"] == original, (
        "accelerate no longer keeps the forward without autocast as `_original_forward`: fp32_strict needs it"
    )
    assert "forward" in vars(model), "accelerate no longer sets `forward` on the instance: fp32_strict puts it back"
    with torch.autocast("cpu", enabled=False):
        rounded = accelerator_in_bf16.unwrap_model(model)(torch.full((1, 2), 1 / 3))
    assert not torch.equal(rounded, original(torch.full((1, 2), 1 / 3))), (
        "an outer autocast(enabled=False) now reaches the unwrapped model: fp32_strict could be simpler"
    )


# ---- transformers


def test_order_of_transformers_events(tmp_path) -> None:
    """backward, [gradients_ready], clip, on_pre_optimizer_step, step, on_optimizer_step [update_done], scheduler."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 1)

        def forward(self, x, labels=None):
            return {"loss": 100 * (self.linear(x) - labels).square().mean()}

    seen = []

    def note(event: str) -> None:
        grad = model.linear.weight.grad
        norm = None if grad is None else round(float(torch.cat([grad.flatten(), model.linear.bias.grad]).norm()), 3)
        rate = trainer.optimizer.param_groups[0]["lr"]
        seen.append((event, trainer.accelerator.sync_gradients, norm, rate, model.linear.bias.item()))

    class Events(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            note("pre")

        def on_optimizer_step(self, *args, **kwargs):
            note("post")

        def on_step_end(self, *args, **kwargs):
            note("end")

    class Noting(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            note("backward")
            return loss

    torch.manual_seed(0)
    model = Regression()
    data = [{"x": torch.full((2,), float(i + 1)), "labels": torch.zeros(1)} for i in range(4)]
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        max_steps=2,
        max_grad_norm=0.5,
        learning_rate=0.1,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Noting(model=model, args=arguments, train_dataset=data, callbacks=[Events()])
    trainer.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()

    events = [event for event, *_ in seen]
    assert events == ["backward", "backward", "pre", "post", "end"] * 2, "the order of transformers' events changed"
    first, last, pre, post, end = seen[:5]
    assert [first[1], last[1]] == [False, True], (
        "accelerator.sync_gradients no longer marks the last micro-batch at the end of training_step, "
        "where the trainer calls engine.gradients_ready()"
    )
    assert last[2] > 0.5, "gradients are clipped before training_step returns: UpdateContext.gradient would be clipped"
    assert pre[2] == pytest.approx(0.5, abs=1e-3), "gradients are no longer clipped at on_pre_optimizer_step"
    assert pre[4] == last[4] != post[4], "on_optimizer_step is no longer called after the optimizer has stepped"
    assert post[3] == last[3] != end[3], "the scheduler now moves before on_optimizer_step"


# ---- torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.25, 100.0])
def test_how_torch_clips(max_norm: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.zeros(3, dtype=dtype)) for _ in range(2)]
    for param in params:
        param.grad = torch.randn(3).to(dtype)
    grads = [param.grad.clone() for param in params]
    norm = torch.nn.utils.get_total_norm(grads)
    assert torch.equal(torch.nn.utils.clip_grad_norm_(params, max_norm), norm)
    factor = torch.clamp(max_norm / (norm.float() + 1e-6), max=1.0)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    for param, grad in zip(params, grads, strict=True):
        torch.testing.assert_close(param.grad.float(), grad.float() * factor, rtol=tolerance, atol=0)


def test_assigning_data_of_another_dtype_loses_gradient_hooks() -> None:
    """Why swapped_parameters replaces the Parameter and never its `.data`."""
    param, calls = nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), []
    accumulator = param.expand_as(param).grad_fn.next_functions[0][0]
    accumulator.register_hook(lambda *unused: calls.append(1))
    param.data = param.data.float()
    param.sum().backward()
    assert not calls, "torch keeps gradient hooks over a change of dtype: swapped_parameters could be simpler"


def test_matmul_precision_can_be_set_and_put_back() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    assert not matmul.allow_tf32, "torch.backends.cuda.matmul.fp32_precision = 'ieee' no longer turns TF32 off"
    matmul.fp32_precision = before
    assert matmul.fp32_precision == before


def test_what_a_node_saved_can_be_read_in_a_hook_while_its_output_lives() -> None:
    """`SequenceGradients` keeps a layer's inputs so. The node alone is not enough in torch 2.11, and is in 2.13."""

    class Keep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, anchor, kept):
            ctx.save_for_backward(kept)
            return anchor.clone()

    read, layer = [], nn.Linear(2, 2)
    inputs = torch.ones(1, 2)
    output, kept = layer(inputs), Keep.apply(torch.zeros((), requires_grad=True), inputs)
    output.register_hook(lambda gradient: read.extend(kept.grad_fn.saved_tensors))
    output.sum().backward()
    assert len(read) == 1 and read[0].data_ptr() == inputs.data_ptr()


# ---- DeepSpeed

deepspeed_missing = "DeepSpeed is not installed"


@pytest.fixture(scope="module")
def deepspeed():
    return pytest.importorskip("deepspeed", reason=deepspeed_missing)


def test_deepspeed_engine_answers(deepspeed) -> None:
    asked = ["step", "is_gradient_accumulation_boundary", "was_step_applied", "gradient_clipping", "fp16_enabled"]
    asked += ["zero_optimization_stage", "zero_offload_optimizer", "zero_round_robin_gradients", "autotp_size"]
    asked += ["torch_autocast_enabled", "zero_offload_param", "zero_hpz_partition_size", "zero_quantized_weights"]
    asked += ["zero_quantized_nontrainable_weights", "is_deepcompile_enabled"]
    missing = [name for name in asked if not callable(getattr(deepspeed.DeepSpeedEngine, name, None))]
    assert not missing, f"DeepSpeedEngine has lost {missing}, which build_engine and ZeroEngine ask"
    source = inspect.getsource(deepspeed.DeepSpeedEngine)
    attributes = ["has_moe_layers", "sequence_parallel_size", "pipeline_parallelism", "basic_optimizer", "optimizer"]
    missing = [name for name in attributes if f"self.{name} = " not in source]
    assert not missing, f"DeepSpeedEngine no longer sets {missing}, which build_engine reads"


def test_deepspeed_links_each_parameter_to_the_slice_it_owns(deepspeed) -> None:
    """Three parameters of 4, 6 and 2 numbers over two ranks: rank 1 owns the last 4 of the second, and the third."""
    from deepspeed.utils import link_hp_params

    first, second, third = (nn.Parameter(torch.zeros(size)) for size in (4, 6, 2))
    partition = torch.arange(6.0, 12.0)
    gradients = {5: [torch.full((4,), 2.0), torch.full((2,), 3.0)]}
    link_hp_params(
        lp_param_list=[first, second, third],
        flat_hp_partition=partition,
        gradient_dict=gradients,
        offload_gradient_dict=None,
        use_offload=False,
        param_group_index=5,
        partition_start=6,
        partition_size=6,
        dp_group=None,
    )
    says = "deepspeed's `_hp_mapping` changed; ZeroEngine reads master, moments and gradient through it: "
    assert first._hp_mapping is None, says + "None where the rank owns nothing"
    mapping = second._hp_mapping
    assert mapping.param_group_index == 5, says + "param_group_index"
    assert (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel) == (2, 4), says + "lp address"
    assert (mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel) == (0, 4), says + "hp address"
    assert third._hp_mapping.hp_fragment_address.start == 4, says + "hp address"
    assert torch.equal(mapping.hp_fragment, partition[:4]), says + "hp_fragment"
    assert mapping.hp_fragment.data_ptr() == partition.data_ptr(), says + "hp_fragment is no view of the master"
    for param, value in ((second, 2.0), (third, 3.0)):
        grad = param._hp_mapping.get_lp_grad_fragment(param._index_in_param_group)
        assert set(grad.tolist()) == {value}, says + "get_lp_grad_fragment(_index_in_param_group)"


def test_deepspeed_optimizers_have_what_is_read(deepspeed) -> None:
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for kind, groups in ((DeepSpeedZeroOptimizer, "bit16_groups"), (BF16_Optimizer, "bf16_groups")):
        source = inspect.getsource(kind)
        for attribute in (groups, "optimizer", "dp_process_group"):
            assert f"self.{attribute} = " in source, f"{kind.__name__}.{attribute} is gone; ZeroEngine reads it"
        assert "param_group['params'] = [self." in source, (
            f"{kind.__name__} no longer gives its inner optimizer one flat partition per parameter group"
        )


@pytest.mark.parametrize("norm", [2.0, 0.1])
def test_how_deepspeed_clips(deepspeed, norm: float) -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer, grad = SimpleNamespace(clip_grad=0.5, loss_scale=1.0, device="cpu"), torch.ones(3)
    DeepSpeedZeroOptimizer.unscale_and_clip_grads(optimizer, [grad], torch.tensor(norm))
    assert grad.tolist() == pytest.approx([min(1.0, 0.5 / (norm + 1e-6))] * 3, rel=1e-6), (
        "DeepSpeed clips by another formula than UpdateContext.clip_factor says"
    )


def test_deepspeed_lays_slices_out_in_round_robin_order(deepspeed) -> None:
    """Why build_engine refuses `round_robin_gradients`: the slices are shuffled and the mapping is not."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    source = inspect.getsource(DeepSpeedZeroOptimizer._link_all_hp_params)
    assert "lp_param_list=self.bit16_groups[i]" in source, (
        "deepspeed may now link parameters in round-robin order: check whether build_engine can accept it"
    )


# ---- DeepSpeed ZeRO-3


def test_zero3_readers_of_the_local_slice_do_not_communicate(deepspeed) -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad, safe_get_local_optimizer_state

    param = SimpleNamespace(ds_id=0, _z3_optimizer=Mock())
    safe_get_local_fp32_param(param), safe_get_local_grad(param), safe_get_local_optimizer_state(param, "exp_avg")
    assert param._z3_optimizer.mock_calls == [
        call.get_local_fp32_param(param),
        call.get_local_fp32_grad_for_param(param),
        call.get_local_fp32_param(param, "exp_avg"),
    ], "deepspeed's safe_get_local_* read something else; Zero3Engine reads master, gradient and moments by them"
    for name in ("_get_fp32_opt_state_partition", "_get_fp32_grad_state_partition"):
        assert "dist." not in inspect.getsource(getattr(Stage3, name)), (
            f"{name} communicates now: Zero3Engine.theta, local_gradient and local_moment must stay local"
        )


def test_zero3_cuts_every_parameter_into_equal_slices(deepspeed) -> None:
    """Three numbers for two ranks, in slices of two: rank 1 owns the last, and padding."""
    from deepspeed.runtime.zero.partition_parameters import Init

    source = inspect.getsource(Init)
    for line in ("start = partition_size * self._partition_rank(param)", "param.ds_tensor.ds_numel = partition_size"):
        assert line in source, f"deepspeed no longer says `{line}`: Zero3Engine finds its slice of a parameter by it"
    init = SimpleNamespace(_partition_world_size=lambda param: 2)
    init._padding_size = lambda param: Init._padding_size(init, param)
    assert Init._aligned_size(init, SimpleNamespace(ds_numel=3)) == 4, "deepspeed pads by another rule"


def test_zero3_optimizer_has_what_is_read(deepspeed) -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    source = inspect.getsource(DeepSpeedZeroOptimizer_Stage3)
    attributes = ["fp16_groups", "fp32_partitioned_groups_flat", "sub_group_to_group_id", "parameter_offload"]
    missing = [name for name in [*attributes, "optimizer", "dp_process_group"] if f"self.{name} = " not in source]
    missing = [name for name in missing if f"self.{name}: " not in source]
    assert not missing, f"DeepSpeedZeroOptimizer_Stage3 no longer sets {missing}, which Zero3Engine reads"
    assert "self.optimizer.param_groups[param_group_id]['params'] = [fp32_param]" in source, (
        "ZeRO-3 no longer steps each flat partition in the parameter group of `sub_group_to_group_id`"
    )
    source = inspect.getsource(DeepSpeedZeRoOffload)
    for line in ("self.module_forward_pre_hook = ", "self.module_forward_post_hook = "):
        assert line in inspect.getsource(DeepSpeedEngine), f"DeepSpeedEngine no longer says `{line}`"
    for line in ("self.forward_hooks.append(", "self.backward_hooks.append(", "self.fwd_pre_hook = "):
        assert line in source, f"DeepSpeedZeRoOffload no longer says `{line}`: scoring takes its hooks out by it"


def test_a_module_hook_can_be_taken_out_by_its_handle() -> None:
    module = nn.Linear(1, 1)
    handle = module.register_forward_hook(lambda *unused: None)
    assert handle.hooks_dict_ref() is module._forward_hooks, "torch's RemovableHandle has changed"
    assert handle.id in module._forward_hooks, "torch's RemovableHandle has changed"


def test_zero3_replaces_linear_by_one_without_forward_mode(deepspeed) -> None:
    from deepspeed.runtime.zero.linear import zero3_linear_wrap
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Context

    source = inspect.getsource(Context._enable_mem_efficient_linear)
    assert "InsertPostInitMethodToModuleSubClasses.linear_bk = torch.nn.functional.linear" in source, (
        "deepspeed no longer keeps torch's linear as `linear_bk`: Zero3Engine puts it back for scoring"
    )
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 8, 8), torch.randn(8, 8), torch.randn(8)
    with pytest.raises(RuntimeError, match="forward"):
        torch.func.jvp(lambda w: zero3_linear_wrap(x, w), (weight,), (weight,))
    x, weight, bias = x.bfloat16(), weight.bfloat16(), bias.bfloat16()
    assert torch.equal(zero3_linear_wrap(x, weight, bias), x @ weight.t() + bias), (
        "ZeRO-3's linear no longer rounds before the bias: the tests' oracle in bf16 does"
    )


def test_adamw_is_an_adam_with_decoupled_decay() -> None:
    param = torch.ones(1)
    assert torch.optim.AdamW([param]).param_groups[0]["decoupled_weight_decay"] is True, (
        "check_adamw reads this option"
    )
    assert torch.optim.Adam([param]).param_groups[0]["decoupled_weight_decay"] is False, (
        "check_adamw reads this option"
    )
