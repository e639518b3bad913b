"""Per-sequence gradients from hooks against one backward per sequence, and training left as it was."""

import contextlib
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl.trainer.utils import add_fused_lm_head

from trl_entropy.engine import trainable_parameters
from trl_entropy.estimators.rows import row_gradients
from trl_entropy.gradients.float64_reference import float64_reference
from trl_entropy.gradients.sequence_gradients import Consumer, DotProducts, Rows, SequenceGradients, SquaredNorms

VOCAB = 13


def build(architecture="qwen2", tied=True, bias=True, rank=0, seed=0, **overrides):
    """A Qwen2 or Llama of a few thousand parameters; `rank` 0 trains all of it."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "tie_word_embeddings": tied,
    }
    torch.manual_seed(seed)
    if architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes | overrides))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes | {"attention_bias": bias, "mlp_bias": bias} | overrides))
    for name, param in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            param.data += 0.3 * torch.randn_like(param)
    return lora(model, rank, bias) if rank else model


def lora(model, rank=3, bias=False, **overrides):
    config = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": "all-linear"}
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_bias=bias, **config | overrides))
    for name, param in model.named_parameters():
        if "lora_B" in name:
            param.data.normal_(std=0.3)
    return model


def tokens(num_sequences=4, length=6, seed=0):
    """Token ids with padding on the left; the padding token occurs among the others too."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (num_sequences, length), generator=generator)
    padding = torch.randint(length, (num_sequences, 1), generator=generator)
    return ids, (torch.arange(length) >= padding).long()


def losses(model, ids, mask, **kwargs):
    """Each sequence's share of a loss: the entropy of its next-token distributions."""
    logps = model(input_ids=ids, attention_mask=mask, use_cache=False, **kwargs).logits.log_softmax(-1)
    return -((logps.exp() * logps).sum(-1) * mask).sum(1)


def oracle(per_sequence, model):
    """The rows (B, D) by one backward per sequence: the definition."""
    params = list(trainable_parameters(model).values())
    rows = [torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True) for loss in per_sequence]
    flat = [[torch.zeros_like(p) if g is None else g for g, p in zip(row, params, strict=True)] for row in rows]
    return torch.stack([torch.cat([grad.detach().flatten() for grad in row]) for row in flat])


def by_name(flat, model):
    params = trainable_parameters(model)
    parts = flat.split([param.numel() for param in params.values()])
    return {name: part.view_as(param) for (name, param), part in zip(params.items(), parts, strict=True)}


def collect(model, consumers, per_sequence, rows=None, **options):
    """Gradients of one forward of `per_sequence()` in the consumers."""
    with SequenceGradients(model, *consumers, **options) as collector:
        values = per_sequence()
        with collector.batch(torch.arange(len(values)) if rows is None else rows):
            values.sum().backward()
    model.zero_grad()


def rows_of(model, per_sequence, **options):
    """The rows (B, D) in the model's dtype, float32 at least, from the hooks."""
    dtype = torch.promote_types(next(iter(model.parameters())).dtype, torch.float32)
    rows = Rows(len(per_sequence()), dtype)
    collect(model, [rows], per_sequence, **options)
    return rows.values


def assert_close(actual, expected, tolerance):
    """Relative to the norm of the largest row; each number of a vector is a row."""
    assert actual.shape == expected.shape
    error, scale = ((t.double().reshape(len(t), -1).norm(dim=1).max()) for t in (actual - expected, expected))
    assert error <= tolerance * scale, f"{float(error / scale):.2e}"


# --- The numbers -----------------------------------------------------------------------------------------------------


class Blocks(Consumer):
    """Keeps the last micro-batch's rows of every parameter, in the order of their numbers."""

    def __init__(self, blocks):
        self.blocks = blocks

    def add(self, name, gradients, rows):
        self.blocks[name] = gradients.whole.flatten(1)[rows.argsort()]


def check_everything(model, ids, mask, groups, tolerance, **options):
    """All consumers at once, on sequences and on groups."""
    per_sequence = lambda: losses(model, ids, mask)  # noqa: E731
    expected = oracle(per_sequence(), model)
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(2, expected.shape[1], generator=generator).to(expected)
    metric = torch.rand(expected.shape[1], generator=generator).to(expected)
    vectors, named = [by_name(direction, model) for direction in directions], by_name(metric, model)
    summed = expected.new_zeros(int(groups.max()) + 1, expected.shape[1]).index_add_(0, groups, expected)
    for index, wanted in ((torch.arange(len(ids)), expected), (groups, summed)):
        num_rows, blocks = len(wanted), {}
        norms, in_metric = SquaredNorms(num_rows), SquaredNorms(num_rows, named)
        dots, dot = DotProducts(num_rows, vectors), DotProducts(num_rows, vectors[:1])
        rows = Rows(num_rows, expected.dtype)
        scaled = Rows(num_rows, expected.dtype, {name: value.sqrt() for name, value in named.items()})
        keep = Blocks(blocks)
        collect(
            model,
            [norms, in_metric, dots, dot, rows, scaled, keep],
            lambda: losses(model, ids, mask),
            index,
            **options,
        )
        present = index.unique()
        assert_close(norms.values, wanted.double().square().sum(1), tolerance)
        assert_close(in_metric.values, (wanted.double().square() * metric).sum(1), tolerance)
        # By Cauchy and Schwarz: a dot product may vanish by itself
        scale = wanted.norm(dim=1).max() * directions.norm(dim=1).max()
        assert (dots.values - directions.double() @ wanted.double().T).abs().max() <= tolerance * scale
        assert (dot.values - directions[:1].double() @ wanted.double().T).abs().max() <= tolerance * scale
        assert_close(rows.values, wanted, tolerance)
        assert_close(scaled.values, wanted * metric.sqrt(), tolerance)
        assert_close(
            torch.cat([blocks[name] for name in trainable_parameters(model)], dim=1), wanted[present], tolerance
        )


@st.composite
def cases(draw):
    model = {
        "architecture": draw(st.sampled_from(["qwen2", "llama"])),
        "tied": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "rank": draw(st.sampled_from([0, 0, 1, 2, 5])),
    }
    num_sequences = draw(st.integers(1, 5))
    groups = draw(st.lists(st.integers(0, 2), min_size=num_sequences, max_size=num_sequences))
    batch = {"num_sequences": num_sequences, "length": draw(st.integers(1, 9)), "seed": draw(st.integers(0, 99))}
    return model, batch, torch.tensor(groups), draw(st.booleans())


@settings(max_examples=12, deadline=None)
@given(cases())
def test_everything_equals_one_backward_per_sequence_in_float64(case):
    settings, batch, groups, weight_gradients = case
    model = build(**settings)
    with float64_reference(model):
        check_everything(model, *tokens(**batch), groups, 1e-12, weight_gradients=weight_gradients)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(cases())
def test_everything_equals_one_backward_per_sequence_in_float32(case):
    settings, batch, groups, weight_gradients = case
    check_everything(build(**settings), *tokens(**batch), groups, 1e-5, weight_gradients=weight_gradients)


class Toy(nn.Module):
    """What the two architectures lack: LayerNorm, torch's RMSNorm, a layer used twice, one by keyword, features."""

    def __init__(self, reentrant=None, in_place=False):
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.layer_norm, self.rms_norm, self.plain = nn.LayerNorm(6), nn.RMSNorm(6), nn.LayerNorm(6, bias=False)
        self.shared, self.alias = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.alias.weight = self.shared.weight
        self.reentrant, self.in_place = reentrant, in_place

    def block(self, hidden):
        hidden = self.layer_norm(self.shared(hidden).tanh())
        again = self.shared(input=hidden)
        return self.rms_norm((again.relu_() if self.in_place else again.relu()) + self.alias(hidden))

    def forward(self, features):
        hidden = self.first(features)
        for _ in range(2):
            run = self.reentrant is not None and torch.is_grad_enabled()
            hidden = checkpoint(self.block, hidden, use_reentrant=self.reentrant) if run else self.block(hidden)
        return self.last(self.plain(hidden)).square().flatten(1).sum(1)


@pytest.mark.parametrize("weight_gradients", [True, False])
@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5), (3, 2, 4, 5)], ids=str)
def test_layers_used_more_than_once_and_any_number_of_axes(shape, reentrant, weight_gradients):
    torch.manual_seed(0)
    toy, features = Toy().double(), torch.randn(shape).double()
    expected = oracle(toy(features), toy)
    toy.reentrant = reentrant
    norms, rows = SquaredNorms(3), Rows(3, torch.float64)
    collect(toy, [norms, rows], lambda: toy(features), weight_gradients=weight_gradients)
    assert_close(rows.values, expected, 1e-12)
    assert_close(norms.values, expected.square().sum(1), 1e-12)


@pytest.mark.parametrize("weight_gradients", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rank", [0, 3])
def test_gradient_checkpointing(rank, reentrant, weight_gradients):
    model, batch = build(rank=rank).train(), tokens()
    expected = oracle(losses(model, *batch), model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    actual = rows_of(model, lambda: losses(model, *batch), weight_gradients=weight_gradients)
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_still_frees_the_inputs_of_layers(checkpointing):
    model = build().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = []
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(
                lambda module, args: inputs.append(weakref.ref(args[0].untyped_storage()))
            )
    with SequenceGradients(model, weight_gradients=False):
        graph = losses(model, *tokens())
    assert graph.requires_grad
    assert {storage() is None for storage in inputs} == {checkpointing}


@pytest.mark.parametrize("how", ["autocast", "module", "autocast around backward"])
@pytest.mark.parametrize("rank", [0, 3])
def test_bf16_is_summed_in_float32(rank, how):
    """Against bf16 autograd, a sequence at a time, which rounds each product of matrices: seen 1.3e-3 to 1.7e-3."""
    model, batch = build(rank=rank), tokens()
    if how == "module":
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how != "module"):
        per_sequence = losses(model, *batch)
        expected = oracle(per_sequence.float(), model)
    rows = Rows(4)
    with SequenceGradients(model, rows) as collector:
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=how != "module")
        with autocast:
            values = losses(model, *batch)
        around = torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast around backward")
        with collector.batch(torch.arange(4)), around:
            values.float().sum().backward()
    assert_close(rows.values, expected.float(), 2**-8)


def test_dropout_of_lora_and_two_losses_of_one_graph():
    model, batch = lora(build(), lora_dropout=0.5).train(), tokens()
    rows = Rows(8)
    with SequenceGradients(model, rows) as collector:
        first = losses(model, *batch)
        second = first.square()
        expected = torch.cat([oracle(first, model), oracle(second, model)])  # outside of any batch: not looked at
        for values, numbers in ((first, torch.arange(4)), (second, torch.arange(4, 8))):
            with collector.batch(numbers):
                torch.autograd.grad(values.sum(), list(trainable_parameters(model).values()), retain_graph=True)
    assert_close(rows.values, expected, 1e-5)
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("rank", [0, 3])
def test_micro_batches_make_no_difference(rank):
    model, (ids, mask) = build(rank=rank), tokens(6)
    groups = torch.tensor([2, 0, 0, 2, 1, 1])
    vector = {name: torch.randn_like(param) for name, param in trainable_parameters(model).items()}

    def collected(splits):
        norms, dots, rows = SquaredNorms(6), DotProducts(3, [vector]), Rows(6)
        used = torch.full((3, sum(parameter.numel() for parameter in trainable_parameters(model).values())), 7.0)
        group_rows = Rows(3, out=used)
        for consumers, index in (((norms, rows), torch.arange(6)), ((dots, group_rows), groups)):
            with SequenceGradients(model, *consumers, weight_gradients=False) as collector:
                for part in splits:
                    values = losses(model, ids[part], mask[part])
                    with collector.batch(index[part]):
                        values.sum().backward()
        return norms.values, dots.values, rows.values, group_rows.values

    whole = collected([torch.arange(6)])
    for splits in ([torch.tensor([3, 1]), torch.tensor([5, 0, 2, 4])], torch.arange(6).split(1)):
        for actual, expected in zip(collected(splits), whole, strict=True):
            assert_close(actual, expected, 1e-5)


def test_given_rows_only_in_a_bf16_buffer_and_small_chunks(monkeypatch):
    monkeypatch.setattr(row_gradients, "CHUNK_NUMEL", 300)
    model, batch = build(), tokens()
    expected = oracle(losses(model, *batch), model)
    rows = Rows(5, torch.bfloat16)
    collect(model, [rows], lambda: losses(model, *batch), torch.tensor([3, -1, 0, 4]))
    assert torch.equal(rows.values[[1, 2]], torch.zeros(2, expected.shape[1], dtype=torch.bfloat16))
    assert_close(rows.values[[3, 0, 4]].float(), expected[[0, 2, 3]], 2**-8)
    assert list(rows.columns) == list(trainable_parameters(model))
    again = Rows(5, out=rows.values)
    collect(model, [again], lambda: losses(model, *batch), torch.tensor([2, -1, 1, -1]))
    assert again.values is rows.values
    assert_close(rows.values[[3, 0, 4, 2, 1]].float(), expected[[0, 2, 3, 0, 2]], 2**-8)


def test_sequences_without_loss_have_no_gradient():
    model, (ids, mask) = build(), tokens()
    mask[1] = 0
    rows = rows_of(model, lambda: losses(model, ids, mask))
    assert torch.equal(rows[1], torch.zeros_like(rows[1]))
    assert (rows.norm(dim=1) > 0).tolist() == [True, False, True, True]


# --- Training stays as it was ----------------------------------------------------------------------------------------


def training_step(model, batch, autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = losses(model, *batch).mean()
    loss.backward()
    return [loss.detach(), *(param.grad for param in trainable_parameters(model).values())]


def state(model):
    """Every hook, flag and gradient."""
    hooks = [
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ]
    return hooks, [param.requires_grad for param in model.parameters()], [param.grad for param in model.parameters()]


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
def test_training_is_bit_identical(rank, autocast, reentrant):
    def model():
        model = build(rank=rank).train()
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        return model

    expected = training_step(model(), tokens(), autocast)
    hooked = model()
    before = state(hooked)[:2]
    with SequenceGradients(hooked, SquaredNorms(4), Rows(4)) as collector, collector.batch(torch.arange(4)):
        actual = training_step(hooked, tokens(), autocast)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert state(hooked)[:2] == before


@pytest.mark.parametrize("fails", [False, True])
def test_an_extra_pass_leaves_nothing_behind(fails):
    model = build(rank=3)
    before = state(model)
    with contextlib.suppress(KeyError), SequenceGradients(model, Rows(4), weight_gradients=False) as collector:
        values = losses(model, *tokens())
        with collector.batch(torch.arange(4)):
            values.sum().backward()
            if fails:
                raise KeyError
    assert state(model) == before


def test_generation_and_evaluation_in_between_are_not_looked_at():
    model, batch = build(), tokens()
    expected = oracle(losses(model, *batch), model)
    rows = Rows(4)
    with SequenceGradients(model, rows) as collector:
        values = losses(model, *batch)
        model.generate(batch[0][:2], attention_mask=batch[1][:2], max_new_tokens=3, do_sample=False)
        with torch.no_grad():
            losses(model, *tokens(2, 3))
        losses(model, *tokens(3, 5)).sum().backward()
        with collector.batch(torch.arange(4)):
            values.sum().backward()
    assert_close(rows.values, expected, 1e-5)


def test_partitioned_parameters_have_their_whole_shape_and_are_not_read():
    """As under ZeRO-3, where a parameter is empty but while its layer computes."""
    model, batch = build(), tokens()
    expected = oracle(losses(model, *batch), model)
    rows = Rows(4)
    full = {param: param.data for param in model.parameters()}
    for param in full:
        param.ds_shape, param.data = param.shape, torch.empty(0)
    collector = SequenceGradients(model, rows, SquaredNorms(4))
    for param, data in full.items():
        param.data = data
    with collector:
        values = losses(model, *batch)
        with collector.batch(torch.arange(4)):
            values.sum().backward()
    assert_close(rows.values, expected, 1e-5)


# --- It refuses what would be a wrong sum ----------------------------------------------------------------------------


class OwnParameter(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))


REFUSED = {
    "Conv1D": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=8, n_layer=1, n_head=2, n_positions=8)).eval(),
        r"'transformer\.h\.0\.attn\.c_attn\.weight'.* of class transformers\S+Conv1D is not among those known",
    ),
    "conv": (lambda: nn.Sequential(nn.Conv1d(2, 2, 1)), r"module '0' of class torch\S+Conv1d is not among"),
    "own parameter": (OwnParameter, r"'scale': module '\(the model itself\)' of class \S+OwnParameter .*Freeze it"),
    "embedding of LoRA": (lambda: lora(build(), target_modules=["embed_tokens"]), r"'\S+lora_embedding_A\S*"),
    "DoRA": (lambda: lora(build(), use_dora=True), r"lora_magnitude_vector\S+': module .*DoraLinearLayer"),
    "frequency": (lambda: nn.Embedding(3, 2, scale_grad_by_freq=True), "mix the sequences of a batch"),
    "two dimensions": (lambda: nn.LayerNorm((2, 3)), "normalises over 2 dimensions"),
    "frozen": (lambda: build().requires_grad_(False), "no trainable parameters"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_unknown_trainable_modules_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        SequenceGradients(make())


def test_frozen_modules_may_be_of_any_class():
    model = REFUSED["Conv1D"][0]().requires_grad_(False)
    model.transformer.ln_f.requires_grad_(True)
    expected = oracle(losses(model, *tokens()), model)
    assert_close(rows_of(model, lambda: losses(model, *tokens())), expected, 1e-5)


def test_a_head_that_is_used_without_being_called_is_refused():
    ids, mask = tokens()
    model = build()
    add_fused_lm_head(model)
    for frozen in (False, True):
        model.lm_head.requires_grad_(not frozen)
        with (
            contextlib.nullcontext()
            if frozen
            else pytest.raises(RuntimeError, match=r"'lm_head' got 0.*fused_lm_head")
        ):
            collect(
                model,
                [Rows(4)],
                lambda: model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True).log_probs.sum(1),
            )


def test_a_forward_outside_and_a_layer_over_other_rows_are_refused():
    model, batch = build(), tokens()
    values, refused = losses(model, *batch), pytest.raises(RuntimeError, match="got 0 gradients instead of 1: run the")
    with SequenceGradients(model, SquaredNorms(4)) as collector, refused, collector.batch(torch.arange(4)):
        values.sum().backward()
    with pytest.raises(ValueError, match=r"'lm_head'.*\(4, 6, 12\).* 3 sequences"):
        collect(model, [Rows(4)], lambda: losses(model, *batch), torch.arange(3))
    gpt2 = REFUSED["Conv1D"][0]().requires_grad_(False)
    gpt2.transformer.wpe.requires_grad_(True)
    with pytest.raises(ValueError, match=r"'transformer\.wpe' has inputs of shape \(1, 6\)"):
        collect(gpt2, [Rows(4)], lambda: losses(gpt2, *batch))


def test_a_call_whose_gradient_does_not_come_is_refused():
    """An output of three axes is a view of one of two: changed in place, it is no longer in the graph."""
    toy, features = Toy(in_place=True), torch.randn(3, 4, 5)
    with pytest.raises(RuntimeError, match=r"'shared' got 2 gradients instead of 4: .* in place"):
        collect(toy, [Rows(3)], lambda: toy(features))


def test_two_backwards_in_one_batch_are_refused():
    model, batch = build(rank=2), tokens()
    with SequenceGradients(model, Rows(4)) as collector:
        values = losses(model, *batch)
        with pytest.raises(RuntimeError, match="a second gradient came for"), collector.batch(torch.arange(4)):
            values.sum().backward(retain_graph=True)
            values.sum().backward()


def test_consumers_check_what_they_are_given():
    model, batch = build(rank=2), tokens()
    ones = {name: torch.ones_like(param) for name, param in trainable_parameters(model).items()}
    first = next(iter(ones))
    for wrong, message in (({}, "has nothing for"), (ones | {first: torch.ones(1)}, r"has shape \(1,\) for")):
        for consumer in (SquaredNorms(4, wrong), DotProducts(4, [ones, wrong]), Rows(4, scale=wrong)):
            with pytest.raises(ValueError, match=message):
                SequenceGradients(model, consumer)
    with pytest.raises(ValueError, match=r"out has shape \(4, 2\) for 4 rows of \d+ numbers"):
        SequenceGradients(model, Rows(4, out=torch.zeros(4, 2)))
    for consumer in (SquaredNorms(3), DotProducts(3, [ones]), Rows(3)):
        with pytest.raises(ValueError, match="row 3 of a consumer for 3 rows"):
            collect(model, [consumer], lambda: losses(model, *batch))
    with SequenceGradients(model, SquaredNorms(4)) as collector:
        for _ in range(2):
            values = losses(model, *batch)
            again = pytest.raises(ValueError, match=r"rows \[0, 1, 2, 3\] came in an earlier micro-batch")
            with again if _ else contextlib.nullcontext(), collector.batch(torch.arange(4)):
                values.sum().backward()
