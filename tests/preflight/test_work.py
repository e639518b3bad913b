"""FLOPs and traffic of `preflight/work.py` against what torch does, counted operation by operation."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import ModelConfig

from trl_entropy.gradients.group_gradients import token_scores
from trl_entropy.gradients.scores import score
from trl_entropy.preflight.shapes import model_shape
from trl_entropy.preflight.work import Model
from trl_entropy.rollouts.completions import Completions

SIZES = {"vocab_size": 1500, "hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS, PROMPT, NEW = 3, 12, 20
LENGTH = PROMPT + NEW


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def model_and_sizes(request, tmp_path_factory):
    """A model as it scores, and what `preflight/work.py` knows of one of its shape."""
    folder = tmp_path_factory.mktemp("shape")
    config = Qwen2Config(**SIZES, tie_word_embeddings=False)
    config.save_pretrained(folder)
    model = Qwen2ForCausalLM(config)
    if request.param:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
        model.enable_input_require_grads()  # as TRL does for checkpointing
    asked = ModelConfig(model_name_or_path=str(folder), use_peft=request.param, lora_r=4, lora_target_modules=TARGETS)
    return model.eval(), Model.of(model_shape(asked))


def completions() -> Completions:
    ids, ones = torch.randint(0, SIZES["vocab_size"], (ROWS, LENGTH)), torch.ones(ROWS, LENGTH, dtype=torch.long)
    return Completions(ids, ones, ones[:, :NEW], torch.arange(ROWS), loss_mask=ones[:, :NEW])


def scoring(model: torch.nn.Module, order: int) -> Callable[[], object]:
    params = {name: param.detach() for name, param in model.named_parameters() if param.requires_grad}
    direction = {name: torch.randn_like(param) for name, param in params.items()}
    return lambda: score(model, completions(), 1.0, ROWS, params, direction if order else None, order)


def differentiated(model: torch.nn.Module) -> None:
    entropy, logps = token_scores(model, completions(), 1.0)
    torch.autograd.grad((entropy + logps).sum(), [param for param in model.parameters() if param.requires_grad])


class Moved(TorchDispatchMode):
    """Counts the bytes that operations other than matrix products and views read and write."""

    # Products, which the formulas leave out, and operations that look at no numbers.
    IGNORED = ("mm", "addmm", "bmm", "baddbmm", "_scaled", "embedding", "is_same_size", "_has_same_storage_numel",
               "_efficientzerotensor", "empty", "new_empty", "detach", "alias")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if not function.is_view and not name.startswith(self.IGNORED) and "view" not in name:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            # What is expanded is stored once
            self.num_bytes += sum(min(t.untyped_storage().nbytes(), t.numel() * t.itemsize) for t in tensors)
        return result


def counted(model: torch.nn.Module, call: Callable[[], object], order: int) -> tuple[int, int]:
    """FLOPs and bytes of a call. Attention is one kernel, which the counter of FLOPs does not see, unless derivatives
    are taken: so FLOPs are counted once more without it.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with FlopCounterMode(display=False) as flops, Moved() as moved:
        call()
    if order == 0:
        base.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as flops:
            call()
        base.set_attn_implementation("sdpa")
    return flops.get_total_flops(), moved.num_bytes


@pytest.mark.parametrize("order", [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_work_of_scores_and_their_derivatives_is_what_torch_does(model_and_sizes, order):
    model, sizes = model_and_sizes
    flops, moved = counted(model, scoring(model, order), order)
    work = sizes.forward(
        ROWS, LENGTH, NEW + 1, "float32", order
    )  # the logits before the first token are a column more
    assert work.flops["float32"] == pytest.approx(flops, rel=0.02)
    assert work.memory == pytest.approx(moved, rel=0.15)


def test_work_of_a_backward_pass_is_what_torch_does(model_and_sizes):
    model, sizes = model_and_sizes
    flops, moved = counted(model, lambda: differentiated(model), 0)
    work = sizes.forward(ROWS, LENGTH, NEW + 1, "float32") + sizes.backward(
        ROWS, LENGTH, NEW + 1, "float32", keeps_logits=True
    )
    assert work.flops["float32"] == pytest.approx(flops, rel=0.02)
    assert work.memory == pytest.approx(moved, rel=0.15)
