"""
Cost of the exact Fisher kernel (T12) of N completions, relative to one plain forward and backward pass of the batch.

    python tests/benchmarks/fisher_kernel.py [--hidden 128 512 1024] [--num-sequences 32 128] [--rounds 6]

The model is a Qwen2 with 8 layers and LoRA of rank 16 on all linear layers; sequences have 60 tokens, in float32 on
the CPU. All methods except `plain` compute the (N, N) matrix grad S_i' M grad S_j, and are checked against each other
before the timing:

- plain:   one forward and backward pass of the batch, without a kernel;
- kernel:  as in `fisher_probe`: hooks replace autograd's weight gradients, and products are taken layer by layer;
- probe:   the same with everything else that the probe takes from this pass: K_ii by parameter, three dot products;
- loop:    a forward and backward pass for each sequence, then the product of the gradients;
- vmap:    torch.func.vmap over torch.func.grad, then the product of the gradients;
- dattri:  dattri-llm's hooks and its own product, with M = 1, which is less work; left out if not installed.
           To install: `pip install --no-deps --target DIR dattri-llm==0.1.0`, and add DIR to PYTHONPATH.

In each round every method runs once, in random order, so that changes of the machine's speed affect all of them. The
ratios are of times of the same round, with a 95 % interval (Student's t) over rounds: of CPU seconds of the process,
which depend less on other load, and of wall-clock seconds. Memory is the peak of torch's allocations above what was
allocated before.
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
    """The methods that compute the kernel, as functions without arguments."""

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
        """`plain` and the methods named in `ways`; all if it is None."""
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
    """Raise unless all methods agree with `loop` to 1e-4, relative to sqrt(K_ii K_jj)."""
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
    memory = {name: peak_memory(function) for name, function in functions.items()}  # this also warms up
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
    parser.add_argument("--ways", nargs="+", help="run only these methods and `plain` (default: all)")
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
