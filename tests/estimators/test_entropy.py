"""Token entropies against loops and whole-outcome probabilities; the chunked form against the plain one."""

import functools
import math
import weakref

import pytest
import torch
from tiny_policy import TinyPolicy
from torch.utils._python_dispatch import TorchDispatchMode

from trl_entropy.estimators.entropy_change.entropy import chunked_entropy_and_logps, entropy_and_logps

NUM_TOKENS, HIDDEN, VOCAB = 12, 4, 7


@pytest.fixture
def head():
    """Hidden states, head weight, token ids, and directions for both."""
    generator = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
    ids = torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)
    return draw(NUM_TOKENS, HIDDEN), draw(VOCAB, HIDDEN), ids, (draw(NUM_TOKENS, HIDDEN), draw(VOCAB, HIDDEN))


def chunked(hidden, weight, ids, recompute=True, chunk_size=5):
    return chunked_entropy_and_logps(hidden, lambda h: h @ weight.T, ids, 0.8, chunk_size, recompute)


def plain(hidden, weight, ids):
    return entropy_and_logps(hidden @ weight.T, ids, 0.8)


def mixed(statistics):
    """A scalar with curvature in both outputs."""
    entropy, logps = statistics
    weights = torch.arange(1.0, 1.0 + len(entropy), dtype=entropy.dtype)
    return (weights * entropy.square() * logps).sum()


def test_against_loops():
    logits, ids, temperature = torch.tensor([[0.3, -1.0, 2.0], [0.0, 0.5, 0.1]]).double(), torch.tensor([1, 2]), 0.7
    entropy, logps = entropy_and_logps(logits, ids, temperature)
    for row in range(2):
        scores = [math.exp(float(x) / temperature) for x in logits[row]]
        probabilities = [score / sum(scores) for score in scores]
        assert float(entropy[row]) == pytest.approx(-sum(p * math.log(p) for p in probabilities), rel=1e-14)
        assert float(logps[row]) == pytest.approx(math.log(probabilities[ids[row]]), rel=1e-14)


def test_uniform_and_certain():
    logits = torch.stack([torch.zeros(50), torch.full((50,), -500.0).index_fill(0, torch.tensor(3), 500.0)])
    entropy, logps = entropy_and_logps(logits, torch.tensor([3, 3]))
    assert entropy.tolist() == pytest.approx([math.log(50), 0.0], rel=1e-6)
    assert logps.tolist() == pytest.approx([-math.log(50), 0.0], rel=1e-6)


@pytest.mark.parametrize(
    ("given", "returned"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_precision(given, returned):
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)).to(given)
    entropy, logps = entropy_and_logps(logits, torch.zeros(3, dtype=torch.long))
    assert (entropy.dtype, logps.dtype) == (returned, returned)
    exact = entropy_and_logps(logits.double(), torch.zeros(3, dtype=torch.long))[0]
    assert entropy.double().tolist() == pytest.approx(exact.tolist(), rel=1e-6)  # bf16 logits lose nothing more


def test_token_entropies_and_surprisals_add_up_to_the_entropy_of_outcomes():
    """E[sum H] = E[-sum S] = -sum_o p(o) log p(o); the Rao-Blackwell form varies less."""
    policy = TinyPolicy()
    logits = policy.features @ policy.theta.view(policy.features.shape[-1], -1)
    entropy, logps = entropy_and_logps(logits, policy.token_ids)
    p = policy.probabilities(policy.theta)
    exact = -(p * (p * policy.num_prompts).log()).sum()
    sums = [(values * policy.completion_mask).sum(1) for values in (entropy, -logps)]
    assert [float(p @ s) for s in sums] == pytest.approx([float(exact)] * 2, rel=1e-12)
    rao_blackwell, sampled = (float(p @ s.square() - (p @ s).square()) for s in sums)
    assert rao_blackwell < 0.5 * sampled


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("chunk_size", [1, 5, 100])
def test_chunks_change_neither_values_nor_gradients(head, recompute, chunk_size):
    hidden, weight, ids, _ = head
    results = []
    for function in (plain, functools.partial(chunked, recompute=recompute, chunk_size=chunk_size)):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        statistics = function(*leaves, ids)
        mixed(statistics).backward()
        results.append([*statistics, *(leaf.grad for leaf in leaves)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_batch_shape_is_kept(head):
    hidden, weight, ids, _ = head
    entropy, logps = chunked(hidden.view(3, 4, HIDDEN), weight, ids.view(3, 4))
    torch.testing.assert_close(entropy, plain(hidden, weight, ids)[0].view(3, 4))
    assert logps.shape == (3, 4)


@pytest.mark.parametrize("recompute", [True, False])
def test_double_backward(head, recompute):
    hidden, weight, ids, _ = head
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    products = []
    for function in (plain, functools.partial(chunked, recompute=recompute)):
        gradients = torch.autograd.grad(mixed(function(*leaves, ids)), leaves, create_graph=True)
        inner = sum((g * d).sum() for g, d in zip(gradients, head[3], strict=True))
        products.append(torch.autograd.grad(inner, leaves))
    torch.testing.assert_close(products[1], products[0], rtol=1e-11, atol=1e-12)
    assert all(product.abs().max() > 0.1 for product in products[0])


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("order", [1, 2])
def test_forward_mode_of_first_and_second_order(head, recompute, order):
    hidden, weight, ids, directions = head

    def along(function):
        def moved(h, w):
            return function(h, w, ids)

        for _ in range(order):
            moved = functools.partial(lambda inner, h, w: torch.func.jvp(inner, (h, w), directions)[1], moved)
        return moved(hidden, weight)

    expected, got = along(plain), along(functools.partial(chunked, recompute=recompute))
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_reverse_transforms_of_torch_func_need_recompute_off(head):
    hidden, weight, ids, _ = head
    expected = torch.func.grad(lambda h: mixed(plain(h, weight, ids)))(hidden)
    got = torch.func.grad(lambda h: mixed(chunked(h, weight, ids, recompute=False)))(hidden)
    torch.testing.assert_close(got, expected)
    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(lambda h: mixed(chunked(h, weight, ids)))(hidden)


class LogitsAlive(TorchDispatchMode):
    """Counts the elements of tensors with a vocabulary axis that are alive at once."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and tensor.shape[-1] == VOCAB:
                storage = tensor.untyped_storage()
                self.alive[storage.data_ptr()] = (weakref.ref(storage), tensor.numel())
        self.alive = {key: pair for key, pair in self.alive.items() if pair[0]() is not None}
        self.peak = max(self.peak, sum(numel for _, numel in self.alive.values()))
        return result


@pytest.mark.parametrize(("recompute", "grows"), [(True, False), (False, True)])
def test_recomputation_keeps_the_logits_of_one_chunk(head, recompute, grows):
    weight, peaks = head[1].requires_grad_(), []
    for num_chunks in (4, 16):
        hidden = torch.randn(num_chunks * 5, HIDDEN, dtype=torch.float64)
        ids = torch.zeros(num_chunks * 5, dtype=torch.long)
        with LogitsAlive() as logits:
            sum(s.sum() for s in chunked(hidden, weight, ids, recompute)).backward()
        peaks.append(logits.peak)
    assert (peaks[1] > 2 * peaks[0]) == grows
    assert peaks[0] > 0
