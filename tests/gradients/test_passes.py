"""Passes over completions hold no tensor of all their logits, and take as many completions as memory allows."""

import pytest
import torch
from live_bytes import LiveBytes
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from trl_entropy.engine.parameters import evaluation_mode
from trl_entropy.estimators.rows.row_sums import RowTotal, SquaredNorms
from trl_entropy.gradients import head_chunks, memory
from trl_entropy.gradients.footprint import LayerSizes, Pass, rows_that_fit
from trl_entropy.gradients.group_gradients import group_rows
from trl_entropy.gradients.group_products import half_products
from trl_entropy.gradients.loss_coefficients import LossCoefficients
from trl_entropy.gradients.scores import score
from trl_entropy.gradients.sequence_products import consumed, gradients_of, weighted_entropies, weighted_logps
from trl_entropy.rollouts.completions import Completions

ROWS, PROMPT, WIDTH, VOCAB = 4, 3, 12, 50_000


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    adapter = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(Qwen2ForCausalLM(config), adapter).eval()


@pytest.fixture(scope="module")
def completions():
    ids = torch.randint(1, VOCAB, (ROWS, PROMPT + WIDTH), generator=torch.Generator().manual_seed(0))
    ones = torch.ones_like(ids)
    groups = torch.tensor([0, 0, 0, 0])
    return Completions(ids, ones, ones[:, :WIDTH], groups, loss_mask=ones[:, :WIDTH])


def direction_of(model):
    return {name: torch.ones_like(param) for name, param in model.named_parameters() if param.requires_grad}


PASSES = {
    **{
        f"derivatives of order {order}": lambda model, rows, order=order: score(
            model, rows, 0.7, None, None, direction_of(model), order
        )
        for order in (0, 1, 2)
    },
    "gradients": lambda model, rows: gradients_of(
        model, rows, [weighted_logps(torch.ones(ROWS, WIDTH)), weighted_entropies(torch.ones(ROWS, WIDTH))], 0.7, None
    ),
    "each completion": lambda model, rows: consumed(
        model, rows, weighted_logps(torch.ones(ROWS, WIDTH)), lambda: SquaredNorms(ROWS), 0.7, None
    ),
    "their sum": lambda model, rows: consumed(
        model, rows, weighted_entropies(torch.ones(ROWS, WIDTH)), RowTotal, 0.7, None
    ),
    "rows of groups": lambda model, rows: group_rows(
        model,
        rows,
        LossCoefficients.on_policy(torch.ones(ROWS), rows.loss_mask, ROWS, WIDTH),
        0.7,
        10.0,
        48.0,
        1,
        None,
    ),
    "halves of groups": lambda model, rows: half_products(model, rows, torch.arange(4.0), 0.7, WIDTH, None),
}


@pytest.mark.parametrize("name", PASSES)
def test_no_tensor_has_all_logits(name, model, completions, monkeypatch):
    """The hidden states that a head is applied to are far smaller; a chunk is one column, with its tangents."""
    monkeypatch.setattr(head_chunks, "LOGITS_AT_ONCE_ON_CPU", ROWS * VOCAB)
    assert head_chunks.can_split(model, completions)
    with evaluation_mode(model), LiveBytes() as live:
        PASSES[name](model, completions)
    assert live.largest < 4 * ROWS * WIDTH * VOCAB / 2
    assert live.peak < 24 * 4 * ROWS * VOCAB + 2**22  # of one column; all columns would have 12 times as much each


# ---- how many at a time


SIZES = LayerSizes(num_layers=2, hidden_size=64, intermediate_size=128, num_heads=4, kv_size=32, vocab_size=1000)


@pytest.mark.parametrize("order, backward", [(0, ""), (1, ""), (2, ""), (0, "logps"), (0, "entropies"), (0, "twice")])
def test_as_many_rows_as_the_budget_allows(order, backward):
    one = Pass(SIZES, length=40, completion_length=30, order=order, backward=backward)
    assert one.num_bytes(8) < one.num_bytes(16)
    assert rows_that_fit(one, one.num_bytes(64), 64) == 64
    assert rows_that_fit(one, one.num_bytes(64) - 1, 64) == 32
    assert rows_that_fit(one, 0, 64) == 1 and rows_that_fit(one, 1e12, 7) == 7


def test_the_pass_with_all_logits_needs_more(monkeypatch):
    whole = Pass(SIZES, length=40, completion_length=30, in_chunks=False)
    monkeypatch.setattr(head_chunks, "LOGITS_AT_ONCE_ON_CPU", 1000)
    in_chunks = Pass(SIZES, length=40, completion_length=30)
    assert whole.num_logits(8) == 8 * 31 * 1000 and in_chunks.num_logits(8) == 8 * 1000


def test_what_ran_out_of_memory_is_not_tried_again(model, completions, monkeypatch):
    sizes = []

    def needs_memory(size):
        sizes.append(size)
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return size

    monkeypatch.setattr(memory, "_LEARNED", type(memory._LEARNED)())
    assert memory.in_batches(needs_memory, model, completions, 4) == 1 and sizes == [4, 2, 1]
    assert memory.in_batches(needs_memory, model, completions, 4) == 1 and sizes == [4, 2, 1, 1]


def test_memory_that_others_have_taken_counts_on_a_cpu(model, completions, monkeypatch):
    monkeypatch.setattr(memory, "_LEARNED", type(memory._LEARNED)())
    one = memory.pass_over(model, completions, 0, "")
    monkeypatch.setattr(memory, "free_memory", lambda: one.num_bytes(2))
    assert memory.in_batches(lambda size: size, model, completions, None) == 2
    monkeypatch.setattr(memory, "free_memory", lambda: 1e12)
    assert memory.in_batches(lambda size: size, model, completions, None) == 2  # for the rest of the run


def test_the_plan_does_not_depend_on_what_is_free(model, completions, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 1 / 0)
    one, resident = memory.pass_over(model, completions, 1, ""), memory.resident(model)
    total = resident + one.num_bytes(2) / memory._PASS_SHARE
    monkeypatch.setattr(memory, "main_memory", lambda: total)
    assert memory.rows_at_once(model, completions, None, 1) == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.rows_at_once(model, completions, None, 1) == 1


def test_a_container_limits_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    whole = memory.main_memory()
    assert 0 < memory.free_memory() <= whole
    (tmp_path / "memory.max").write_text("4096\n")
    (tmp_path / "memory.current").write_text("1096\n")
    assert (memory.main_memory(), memory.free_memory()) == (4096, 3000)
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.main_memory() == whole


def test_what_is_trained_counts_five_times():
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    model[0].requires_grad_(False)
    assert memory.resident(model) == 4 * 200 + 16 * 100
    assert memory.rows_budget(10_000, 2400, None) == pytest.approx(0.6 * 7600)
    assert memory.rows_budget(10_000, 2400, asked_gib=1) == 2**30
