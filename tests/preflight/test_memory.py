"""Formulas of memory against parameters, adapters, optimizers, caches and tensors that really exist."""

import io

import pytest
import torch
from live_bytes import LiveBytes
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
from trl import ModelConfig
from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE
from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

from trl_entropy.config.command_line import parse
from trl_entropy.gradients.footprint import Pass, activations
from trl_entropy.gradients.scores import score
from trl_entropy.models.embedded import build_model, build_tokenizer
from trl_entropy.preflight import memory, shapes
from trl_entropy.preflight.estimate import kept_update
from trl_entropy.preflight.hardware import this_machine
from trl_entropy.preflight.launch import launch_from_options
from trl_entropy.preflight.plan import Plan
from trl_entropy.preflight.shapes import ModelShape, UnknownShape, model_shape
from trl_entropy.rollouts.completions import Completions

PUBLISHED = {  # numbers of parameters on the models' cards
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
}
TINY = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip


def tiny_config(**changes) -> Qwen2Config:
    return Qwen2Config(**{**TINY, **changes})


@pytest.fixture
def shape_of(tmp_path):
    """shape_of(config): the shape of the model that a folder with this config.json holds."""

    def shape_of(config: Qwen2Config) -> ModelShape:
        config.save_pretrained(tmp_path)
        return model_shape(ModelConfig(model_name_or_path=str(tmp_path)))

    return shape_of


def test_embedded_model_is_counted_exactly():
    model, shape = build_model(build_tokenizer()), model_shape(ModelConfig(model_name_or_path="embedded"))
    assert shape.num_parameters == shape.num_trainable == sum(p.numel() for p in model.parameters()) == 459_904
    assert all(p.is_meta for p in shape.module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_built_in_shapes_have_the_published_number_of_parameters(name):
    assert set(PUBLISHED) == set(shapes.KNOWN_SHAPES)
    shape = model_shape(ModelConfig(model_name_or_path=f"{name}-Instruct"))
    assert shape.num_parameters == PUBLISHED[name]
    assert shape.source.startswith("built-in table")


def by_hand(c: Qwen2Config) -> int:
    """Parameters of a Qwen2 from its sizes: q, k, v have biases, the embeddings are tied."""
    h, f, kv = c.hidden_size, c.intermediate_size, c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    layer = (h * h + h) + 2 * (h * kv + kv) + h * h + 3 * h * f + 2 * h
    return c.vocab_size * h + c.num_hidden_layers * layer + h


@pytest.mark.parametrize(
    "targets", [None, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]]
)
def test_local_model_and_new_adapter_are_counted_as_peft_does(tmp_path, targets):
    config = tiny_config(tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    shape = model_shape(
        ModelConfig(model_name_or_path=str(tmp_path), use_peft=True, lora_r=4, lora_target_modules=targets)
    )
    model = get_peft_model(Qwen2ForCausalLM(config), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trainable, everything = model.get_nb_trainable_parameters()
    assert (shape.num_trainable, shape.num_parameters + shape.num_adapter) == (trainable, everything)
    assert shape.num_parameters == by_hand(config)
    assert shape.num_quantised == sum(
        m.weight.numel() for n, m in Qwen2ForCausalLM(config).named_modules()
        if isinstance(m, torch.nn.Linear) and n != "lm_head"
    )  # fmt: skip


def test_saved_adapter_is_counted_as_trainable(tmp_path):
    tiny_config().save_pretrained(tmp_path / "base")
    model = Qwen2ForCausalLM(tiny_config())
    model.config._name_or_path = str(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    shape = model_shape(ModelConfig(model_name_or_path=str(tmp_path / "adapter")))
    assert shape.num_adapter == shape.num_trainable == adapted.get_nb_trainable_parameters()[0] > 0


def test_unknown_model_is_refused_with_the_known_ones():
    with pytest.raises(UnknownShape, match=r"nobody/nothing is no folder here"):
        model_shape(ModelConfig(model_name_or_path="nobody/nothing"))


def test_weights_gradients_and_adamw_are_those_of_a_real_step(shape_of):
    model = Qwen2ForCausalLM(tiny_config())
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4, dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    number = sum(p.numel() for p in model.parameters())
    assert memory.weights(shape_of(tiny_config()), 4, "none") == sum(p.nbytes for p in model.parameters())
    assert memory.gradients(number, 4, "plain", 1) == sum(p.grad.nbytes for p in model.parameters())
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert memory.optimizer(number, 4, "adamw_torch_fused", "plain", 1) == sum(t.nbytes for t in moments)
    written = io.BytesIO()
    torch.save(optimizer.state_dict(), written)
    expected = memory.checkpoint(number * 4, number, 4, False, memory.optimizer(number, 4, "adamw_torch", "plain", 1))
    assert len(written.getvalue()) + number * 4 == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("engine", "weights", "gradients", "optimizer"),
    [("plain", 1, 1, 1), ("ddp", 1, 1, 1), ("zero1", 1, 1, 4), ("zero2", 1, 4, 4), ("zero3", 4, 4, 4)],
)
def test_zero_divides_what_its_paper_says(engine, weights, gradients, optimizer):
    assert memory.shards(engine, "weights", 4) == weights
    assert memory.gradients(1000, 2, engine, 4) == 2000 // gradients
    per_number = 12 if engine.startswith("zero") else 4  # bf16 parameters without master, or 4 + 8
    assert memory.optimizer(1000, 2, "adamw_torch", engine, 4) == per_number * 1000 // optimizer


def test_kv_cache_is_that_of_transformers(shape_of):
    config, cache = tiny_config(), DynamicCache()
    Qwen2ForCausalLM(config)(torch.ones(2, 7, dtype=torch.long), past_key_values=cache, use_cache=True)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert memory.kv_cache(shape_of(config), 2, 7, 4) == real


def test_tile_of_the_fused_head_is_trls():
    assert (memory.HEAD_TOKENS, memory.HEAD_ENTRIES) == (TOKEN_CHUNK_SIZE, _CHUNKED_LOGPROB_CHUNK_SIZE)


WIDE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("changes", [{}, WIDE])
def test_activations_are_within_the_stated_factor(shape_of, attention, checkpointing, mixed, changes):
    """What autograd saves in a forward pass; with checkpointing the layer that is recomputed comes on top."""
    rows, length = 2, 55  # 110 tokens, which is no side of a weight
    config = tiny_config(attn_implementation=attention, **changes)
    saved = saved_bytes(config, rows, length, mixed, checkpointing)
    if checkpointing:
        one_layer = tiny_config(attn_implementation=attention, **{**changes, "num_hidden_layers": 1})
        saved += saved_bytes(one_layer, rows, length, mixed, False)
    formula = activations(shape_of(config), rows, length, mixed, 2 if mixed else 4, attention, checkpointing)
    assert 1 / 1.3 < formula / saved < 1.3


def saved_bytes(config: Qwen2Config, rows: int, length: int, mixed: bool, checkpointing: bool) -> int:
    model = Qwen2ForCausalLM(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes_of_weights = {p.shape for p in model.parameters()} | {p.T.shape for p in model.parameters() if p.ndim == 2}
    saved: dict[int, int] = {}
    kept = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape not in shapes_of_weights:  # nor autocast's copies
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    mask = torch.ones(rows, length, dtype=torch.long)
    mask[:, :3] = 0
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=mixed),
    ):
        kept.append(model.model(input_ids=torch.ones_like(mask), attention_mask=mask, use_cache=False))
    return sum(saved.values())


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize(
    ("changes", "rows", "prompt", "completion"),
    [
        ({"vocab_size": 4000}, 8, 16, 32),
        ({}, 4, 150, 50),
        ({**WIDE, "vocab_size": 512}, 16, 40, 32),
        ({"vocab_size": 2000, "num_attention_heads": 8}, 4, 100, 60),
    ],
)
def test_scoring_is_within_the_stated_factor(shape_of, changes, rows, prompt, completion, order):
    config = tiny_config(**changes)
    model = Qwen2ForCausalLM(config)
    completions = Completions(
        torch.ones(rows, prompt + completion, dtype=torch.long),
        torch.ones(rows, prompt + completion, dtype=torch.long),
        torch.ones(rows, completion, dtype=torch.long),
        torch.arange(rows),
        loss_mask=torch.ones(rows, completion, dtype=torch.long),
    )
    direction = {name: torch.ones_like(param) for name, param in model.named_parameters()}
    with LiveBytes() as live:
        score(model, completions, 1.0, rows, None, direction, order)
    formula = Pass(shape_of(config), prompt + completion, completion, order).num_bytes(rows)
    assert 1 / 1.35 < formula / live.peak < 1.35


@pytest.mark.parametrize(("optim", "attribution", "copies"), [
    ("adamw_torch", "none", 1), ("adamw_torch", "token", 2), ("sgd", "none", 1), ("sgd", "token", 4),
])  # fmt: skip
def test_what_is_kept_of_a_step_until_it_is_measured(tmp_path, optim, attribution, copies):
    given = ["--model_name_or_path", "embedded", "--output_dir", str(tmp_path), "--optim", optim, "--use_cpu", "True"]
    given += ["--entropy_probe", "True", "--entropy_attribution", attribution, "--bf16", "False"]
    given += ["--num_prompts_per_step", "2", "--num_generations", "4", "--per_device_train_batch_size", "8"]
    task, args, model = parse(given)
    launch = launch_from_options(1, None, True)
    plan = Plan(task, args, model, launch, this_machine(use_cpu=True), model_shape(model))
    assert kept_update(plan) == copies * 4 * 459_904
