"""
Cost of the exact Fisher kernel (T12) of N completions, as a ratio to one plain forward and backward of the same batch.

    python tests/benchmarks/fisher_kernel.py [--hidden 128 512 1024] [--num-sequences 32 128] [--rounds 6]

Qwen2 with 8 layers and LoRA of rank 16 on all linear layers, sequences of 60 tokens, float32 on the CPU. All but
`plain` end with the (N, N) matrix grad S_i' M grad S_j and are checked against each other before anything is timed:

- kernel:  what `fisher_probe` does: hooks in place of autograd's weight gradients, products as they come;
- probe:   the same with all else that the probe takes from that pass: K_ii by parameter, three dot products;
- loop:    a forward and a backward per sequence, then the product of the rows;
- vmap:    torch.func.vmap over torch.func.grad, then the product of the rows;
- dattri:  dattri-llm's hooks and its own product, which knows no M (M = 1: less work); left out if not installed.
           `pip install --no-deps --target DIR dattri-llm==0.1.0`, and DIR on PYTHONPATH.

In each round every way runs once, in random order, so that a change of the machine's speed hits all of them. Ratios
are of a round's times, with Student's 95 % interval over rounds: of CPU seconds of the process, which a busy machine
stretches less, and of the clock's. Memory is that of torch's allocations at their peak above what stood before.
"""

from __future__ import annotations

import argparse
import random
import statistics
import warnings
from collections.abc import Callable

import torch
from measuring import interval, peak_memory, seconds
from sequence_gradients import Ways, build
from torch import Tensor

from trl_entropy.estimators.kernel.row_kernels import Gram, ParameterNorms, blockwise_gram
from trl_entropy.estimators.rows.row_sums import DotProducts, Several

try:
    from dattri_llm import HookManager, HookManagerConfig
except ImportError:
    HookManager = None


class Kernels(Ways):
    """The ways to the kernel, each a function without arguments."""

    def __init__(self, hidden: int, num_sequences: int) -> None:
        super().__init__(build(hidden), num_sequences)
        generator = torch.Generator().manual_seed(2)

        def random_like(offset: float) -> dict[str, Tensor]:
            return {name: torch.rand(p.shape, generator=generator) + offset for name, p in self.parameters.items()}

        self.metric, self.vectors = random_like(0.1), [random_like(-0.5) for _ in range(3)]
        self.root = torch.cat([m.flatten() for m in self.metric.values()]).sqrt()
        if HookManager is not None:
            names = [name.removesuffix(".weight") for name in self.parameters]
            config = HookManagerConfig(hook_types=dict.fromkeys(names, "linear_io"))
            self._manager = HookManager(self.model, config=config)
            self._manager.remove()

    def functions(self, ways: list[str] | None) -> dict[str, Callable[[], Tensor | None]]:
        """`plain` and those of these `ways`, or all."""
        names = ["plain", "kernel", "probe", "kernel_loop", "kernel_vmap"] + ["dattri"] * (HookManager is not None)
        functions = {name.removeprefix("kernel_"): getattr(self, name) for name in names}
        return {name: f for name, f in functions.items() if ways is None or name in ("plain", *ways)}

    def kernel(self) -> Tensor:
        gram = Gram(len(self.ids), self.metric)
        self._collect(gram, weight_gradients=False)
        return gram.values

    def probe(self) -> Tensor:
        number = len(self.ids)
        gram = Gram(number, self.metric)
        norms, dots = ParameterNorms(number, self.metric), DotProducts(number, self.vectors)
        self._collect(Several(gram, norms, dots), weight_gradients=False)
        return gram.values

    def kernel_loop(self) -> Tensor:
        self.loop()
        return self._product()

    def kernel_vmap(self) -> Tensor:
        self.vmap()
        return self._product()

    def dattri(self) -> Tensor:
        with self._manager.collect(deregister_on_exit=True):
            self._losses(self.ids).sum().backward()
            gradient = self._manager.get_gradient()
            kernel = gradient.similarity(gradient, reduce="all")
        for param in self.parameters.values():
            param.grad = None
        return kernel

    def _product(self) -> Tensor:
        self.buffer *= self.root
        return blockwise_gram(self.buffer, self.buffer)


def check(kernels: Kernels, functions: dict[str, Callable[[], Tensor | None]]) -> None:
    """All agree with the loop to 1e-4 of sqrt(K_ii K_jj)."""
    expected = kernels.kernel_loop()
    for name in functions.keys() - {"plain", "dattri", "loop"}:
        assert_close(functions[name](), expected, name)
    if "dattri" in functions:
        gram = Gram(len(kernels.ids), {name: torch.ones_like(m) for name, m in kernels.metric.items()})
        kernels._collect(gram, weight_gradients=False)
        assert_close(functions["dattri"](), gram.values, "dattri")


def assert_close(kernel: Tensor, expected: Tensor, name: str) -> None:
    norms = expected.diagonal().sqrt()
    error = float(((kernel - expected).abs() / norms.outer(norms)).max())
    if not error < 1e-4:
        raise SystemExit(f"{name} differs from the expected kernel by {error:.1e} of sqrt(K_ii K_jj)")


def measure(functions: dict[str, Callable[[], Tensor | None]], rounds: int) -> None:
    memory = {name: peak_memory(function) for name, function in functions.items()}  # warms up too
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name in random.sample(list(functions), len(functions)):
            times[name].append(seconds(functions[name]))
    for name, pairs in times.items():
        texts = []
        for clock, label in enumerate(("CPU", "wall")):
            ratios = [pair[clock] / plain[clock] for pair, plain in zip(pairs, times["plain"], strict=True)]
            mean, low, high = interval(ratios)
            texts.append(f"{label} {mean:.3f} [{low:.3f}, {high:.3f}]")
        median = statistics.median(cpu for cpu, _ in pairs)
        print(f"  {name:7} {', '.join(texts)} of plain; {median:.2f} CPU s; peak {memory[name]:.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--num-sequences", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--ways", nargs="+", help="leave the others out, `plain` apart")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for hidden in options.hidden:
        for number in options.num_sequences:
            kernels = Kernels(hidden, number)
            functions = kernels.functions(options.ways)
            check(kernels, functions)
            rows = kernels.buffer.nbytes / 2**20
            print(
                f"hidden {hidden}, N = {number}: {kernels.buffer.shape[1]} trainable numbers, {rows:.0f} MiB of rows; "
                f"{options.rounds} rounds; {torch.get_num_threads()} thread(s)"
            )
            measure(functions, options.rounds)


if __name__ == "__main__":
    main()
