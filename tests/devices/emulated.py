"""
A device that is emulated on a CPU, so that tensors on two devices in one operation are found without a GPU.

    with EmulatedDevice() as device:                # torch.device("cuda:0") is now an emulated device
        train(...)                                  # with use_cpu=False; data is the CPU's, and so are the numbers
    device.copies, device.reads                     # how often each place copied between devices, or read a number

Every storage is on the emulated device or on the CPU. `tensor.device` says which one, `to`, `torch.zeros(device=...)`,
`torch.load(map_location=...)` and so on decide it, and every other operation passes it on. Leaving the context raises
`MixedDevices` with file and line of each operation that CUDA would refuse. The emulated device draws from a random
state of its own, as a GPU does, so that a probe that forgets to restore it changes training here too.

torch's own stand-ins do not serve: tensors of `FakeTensorMode` and of the meta device are refused in the same
operations, but have no values, and so neither sampling nor `item()` nor a resumed run; a PrivateUse1 backend that has
them needs a C++ extension, which takes minutes to build.

What it cannot find: kernels that CUDA lacks, another order of sums, memory, autocast, and streams.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.devices.device_rules import INDEXING, is_a_read, is_refused, name_of, tensors_in

DEVICE, CPU = torch.device("cuda", 0), torch.device("cpu")
ROOT = str(Path(__file__).parents[2]) + "/"
_NOT_THE_CALLER = ("/torch/", "/jaxtyping/", "/contextlib.py", "/unittest/mock.py")

_FROM_DATA = {"tensor", "as_tensor", "asarray", "from_numpy", "frombuffer"}
# Functions that make a tensor on the CPU if they get no device.
_FACTORIES = {
    "zeros", "ones", "empty", "full", "rand", "randn", "randint", "arange", "eye", "linspace", "logspace", "randperm",
    "scalar_tensor", "empty_strided", "normal", "tril_indices", "triu_indices",
}  # fmt: skip


class MixedDevices(AssertionError):
    """Operations with tensors on two devices, which CUDA would have refused: one line for each place."""


class EmulatedDevice(contextlib.AbstractContextManager):
    """
    Emulates `torch.device("cuda:0")` inside the context; see the module.

    Attributes:
        mixed: what CUDA would have refused: a sentence with file and line, and how often it happened.
        copies: copies between CPU and device, by kind and place.
        reads: operations after which the CPU waits for the device's result, by operation and place.
    """

    def __init__(self) -> None:
        self.mixed: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.random_state = torch.Generator().manual_seed(0).get_state()
        # Storages on the device. A weak reference keeps the address from being used again.
        self._storages: dict[int, StorageWeakRef] = {}
        self._num_looked_at = 0
        # Of the functions that are running: their arguments, or where they make what they make from no tensor.
        self._running: list[object] = [False]

    def __enter__(self) -> EmulatedDevice:
        self._undo = contextlib.ExitStack()
        for change in (_patched(self), _packages(self), _Operations(self), _Functions(self)):
            self._undo.enter_context(change)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._undo.close()
        if self.mixed and kind is None:
            raise MixedDevices("\n".join(f"{what} ({number} times)" for what, number in self.mixed.items()))

    # ---- where a tensor is

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the emulated device."""
        storage = _storage(tensor)
        return storage is not None and storage._cdata in self._storages

    def place(self, tensor: Tensor, on_device: bool) -> None:
        """Say where a new tensor's storage is."""
        if (storage := _storage(tensor)) is not None:
            self.place_storage(storage, on_device)

    def place_storage(self, storage: torch.UntypedStorage, on_device: bool) -> None:
        if on_device:
            self._storages[storage._cdata] = StorageWeakRef(storage)
        else:
            self._storages.pop(storage._cdata, None)
        self._num_looked_at += 1
        if self._num_looked_at % 20_000 == 0:
            self._storages = {key: ref for key, ref in self._storages.items() if not ref.expired()}

    def any_on_device(self, values: object) -> bool:
        return any(self.holds(value) for value in tensors_in(values))

    def moved(self, tensor: Tensor, on_device: bool, dtype: torch.dtype | None = None, copy: bool = False) -> Tensor:
        """What `tensor.to(device, dtype)` returns."""
        now = self.holds(tensor)
        result = tensor if dtype is None else tensor.to(dtype)
        if now == on_device and not (copy and result is tensor):
            return result
        if now != on_device:
            self.copies[f"to the {'device' if on_device else 'CPU'} at {caller()}"] += 1
        result = result.clone() if result is tensor else result
        self.place(result, on_device)
        return result

    # ---- what is recorded

    def refuse(self, what: str) -> None:
        self.mixed[f"{what} at {caller()}"] += 1

    # ---- where an operation without tensors makes its result

    def run(self, function: Callable[..., Any], args: Any, kwargs: Any, given: object) -> Any:
        """
        Call a function. `given` says where operations without tensors make their result meanwhile: True is the device,
        False the CPU, and arguments are the device if any of them is there.
        """
        self._running.append(given)
        try:
            return function(*args, **kwargs)
        finally:
            self._running.pop()

    def makes_on_device(self) -> bool:
        given = self._running[-1]
        return given if isinstance(given, bool) else self.any_on_device(given)


# ---- below Python: what each operation gets and returns


class _Operations(TorchDispatchMode):
    """Checks the tensors of every operation, and says where its results are."""

    def __init__(self, device: EmulatedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self._run(operation, args, kwargs or {})

    def _run(self, operation: Any, args: Any, kwargs: Any) -> Any:
        device, name = self.device, name_of(operation)
        given = [tensor for tensor in tensors_in([*args, *kwargs.values()]) if not tensor._is_zerotensor()]
        on_device = [device.holds(tensor) for tensor in given]
        on_any = any(on_device)
        if is_refused(operation, args, given, on_device):
            cpu = [str(list(tensor.shape)) for tensor, on in zip(given, on_device, strict=True) if not on]
            device.refuse(f"{name} of tensors on the device and on the CPU (of shape {', '.join(cpu)})")
        if on_any and is_a_read(operation, args, kwargs):
            device.reads[f"{name} at {caller()}"] += 1
        target = on_device[0] if name in INDEXING else on_any or (not given and device.makes_on_device())
        if target and torch.Tag.nondeterministic_seeded in operation.tags:
            with _own_random_state(device):
                result = operation(*args, **kwargs)
        else:
            result = operation(*args, **kwargs)
        if name == "copy_":
            if on_device[0] != on_device[1]:
                device.copies[f"copy_ to the {'device' if on_device[0] else 'CPU'} at {caller()}"] += 1
            return result
        known = {_storage_key(tensor) for tensor in given}
        for made in tensors_in(result):
            if _storage_key(made) not in known:
                device.place(made, target)
        return result


@contextlib.contextmanager
def _own_random_state(device: EmulatedDevice) -> Iterator[None]:
    kept = torch.default_generator.get_state()
    torch.default_generator.set_state(device.random_state)
    try:
        yield
    finally:
        device.random_state = torch.default_generator.get_state()
        torch.default_generator.set_state(kept)


# ---- in Python: functions that name a device, or ask for one


class _Functions(TorchFunctionMode):
    """Answers what asks for a tensor's device, and follows what names one."""

    def __init__(self, device: EmulatedDevice) -> None:
        super().__init__()
        self.device = device
        self.own: dict[Any, Callable[..., Any]] = {
            Tensor.device.__get__: lambda tensor: DEVICE if device.holds(tensor) else tensor.device,
            Tensor.is_cuda.__get__: device.holds,
            Tensor.is_cpu.__get__: lambda tensor: tensor.is_cpu and not device.holds(tensor),
            Tensor.get_device: lambda tensor: 0 if device.holds(tensor) else -1,
            Tensor.cpu: lambda tensor, *args, **kwargs: device.moved(tensor, on_device=False),
            Tensor.cuda: lambda tensor, *args, **kwargs: device.moved(tensor, on_device=True),
            Tensor.to: self._to,
            Tensor.backward: self._backward,
            Tensor.numpy: self._numpy,
            Tensor.tolist: self._tolist,
            Tensor.__deepcopy__: self._deepcopy,
            Tensor.grad.__set__: self._set_grad,
        }

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device, kwargs = self.device, kwargs or {}
        if (own := self.own.get(function)) is not None:
            return own(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name == "__get__":
            return function(*args)
        wanted = kwargs.get("device")
        target = None if wanted is None else _is_emulated(wanted)
        if target:
            kwargs = kwargs | {"device": CPU}
        if name in _FROM_DATA:
            return self._from_data(function, name, target, args, kwargs)
        given = (name not in _FACTORIES and (args, kwargs)) if target is None else target
        if kwargs.get("generator") is not None and (given is True or (given and device.any_on_device(given))):
            device.refuse(f"{name} of a tensor on the device with a generator of the CPU")
        result = device.run(function, args, kwargs, given)
        if name == "new_tensor" and target is None:
            target = device.holds(args[0])
        if target is not None and (name.startswith("new_") or name.endswith("_like")):
            device.place(result, target)
        return result

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = bool(kwargs.pop("copy", False))
        like = [other for other in args if isinstance(other, Tensor)]
        if like or "other" in kwargs:
            other = like[0] if like else kwargs["other"]
            return self.device.moved(tensor, self.device.holds(other), other.dtype, copy)
        wanted, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if wanted is not None and wanted.type == "meta":
            return tensor.to(*args, copy=copy, **kwargs)
        on_device = self.device.holds(tensor) if wanted is None else _is_emulated(wanted)
        return self.device.moved(tensor, on_device, dtype, copy)

    def _from_data(self, function: Any, name: str, target: bool | None, args: Any, kwargs: Any) -> Tensor:
        """A tensor from a list, an array or another tensor; a list cannot be on the device."""
        data = args[0] if args else kwargs.get("data")
        if isinstance(data, Tensor) and target is None:
            target = self.device.holds(data)
        result = self.device.run(function, args, kwargs, False)
        if isinstance(data, Tensor):
            return self.device.moved(result, bool(target)) if name != "tensor" else self._placed(result, bool(target))
        return self.device.moved(result, True) if target else result

    def _placed(self, tensor: Tensor, on_device: bool) -> Tensor:
        self.device.place(tensor, on_device)
        return tensor

    def _backward(self, *args: Any, **kwargs: Any) -> None:
        """Backward with this mode on, so that functions in hooks and in a recomputed forward pass come here too."""
        given = inspect.signature(Tensor.backward).bind(*args, **kwargs)
        given.apply_defaults()
        tensor, *rest = given.arguments.values()
        with self:
            torch.autograd.backward(tensor, rest[0], rest[1], rest[2], inputs=rest[3])

    def _numpy(self, tensor: Tensor, **kwargs: Any) -> Any:
        if self.device.holds(tensor):
            self.device.refuse("numpy() of a tensor on the device")
        return tensor.numpy(**kwargs)

    def _tolist(self, tensor: Tensor) -> Any:
        if self.device.holds(tensor):
            self.device.reads[f"tolist at {caller()}"] += 1
        return tensor.tolist()

    def _deepcopy(self, tensor: Tensor, memo: Any) -> Tensor:
        return self._placed(Tensor.__deepcopy__(tensor, memo), self.device.holds(tensor))

    def _set_grad(self, tensor: Tensor, value: Tensor | None) -> None:
        if value is not None and self.device.holds(value) != self.device.holds(tensor):
            self.device.refuse("a gradient is set that is not on its tensor's device")
        tensor.grad = value


def _is_emulated(device: Any) -> bool:
    return (torch.device("cuda", device) if isinstance(device, int) else torch.device(device)).type == "cuda"


# ---- what else of torch knows devices


@contextlib.contextmanager
def _patched(device: EmulatedDevice) -> Iterator[None]:
    """torch's functions that would call CUDA, and accelerate's choice of a device."""
    run_backward = torch.autograd._engine_run_backward

    def backward(roots: Any, *args: Any, **kwargs: Any) -> Any:
        return device.run(run_backward, (roots, *args), kwargs, device.any_on_device(roots))

    def seed(number: int) -> None:
        device.random_state = torch.Generator().manual_seed(number).get_state()

    def set_state(state: Tensor, *args: Any) -> None:
        device.random_state = state.clone()

    cuda: dict[str, Callable[..., Any]] = {
        "get_rng_state": lambda *args: device.random_state.clone(),
        "get_rng_state_all": lambda: [device.random_state.clone()],
        "set_rng_state": set_state,
        "set_rng_state_all": lambda states: set_state(states[0]),
        "manual_seed": seed,
        "manual_seed_all": seed,
        "synchronize": lambda *args: None,
        "empty_cache": lambda: None,
        "set_device": lambda *args: None,
        "get_device_name": lambda *args: "emulated",
        "get_device_properties": lambda *args: SimpleNamespace(total_memory=16 * 2**30),
    }
    with contextlib.ExitStack() as undo:
        # accelerate keeps the device that it first found for the process.
        undo.callback(AcceleratorState._reset_state, reset_partial_state=True)
        undo.enter_context(mock.patch.dict("os.environ", {"ACCELERATE_TORCH_DEVICE": str(DEVICE)}))
        undo.enter_context(mock.patch.multiple(torch.cuda, **cuda))
        # `grad` and `backward` would otherwise be handed to the mode, which is off in what they call.
        undo.enter_context(mock.patch.object(torch.autograd, "has_torch_function", lambda tensors: False))
        undo.enter_context(mock.patch.object(torch.autograd, "_engine_run_backward", backward))
        undo.enter_context(mock.patch.object(torch.utils.checkpoint, "_infer_device_type", lambda *args: "cpu"))
        checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
        undo.enter_context(mock.patch.dict(checks, default=lambda tensor: None))  # it reads devices below this mode
        yield


@contextlib.contextmanager
def _packages(device: EmulatedDevice) -> Iterator[None]:
    """`torch.save` writes, and `torch.load` reads, which storages are on the device."""

    def location(storage: Any) -> str | None:
        return str(DEVICE) if storage._cdata in device._storages else None

    def restored(storage: Any, where: str) -> Any:
        if not where.startswith("cuda"):
            return None
        device.place_storage(storage, on_device=True)
        return storage

    registry = torch.serialization._package_registry
    kept = list(registry)
    torch.serialization.register_package(0, location, restored)
    try:
        yield
    finally:
        registry[:] = kept


# ---- tensors and places


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    """The storage of the tensor inside the wrappers of torch.func; None if it has none."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    try:
        return tensor.untyped_storage()
    except NotImplementedError:  # an efficient zero tensor, or a sparse one
        return None


def _storage_key(tensor: Tensor) -> int | None:
    storage = _storage(tensor)
    return None if storage is None else storage._cdata


def caller() -> str:
    """File and line of the innermost code outside torch, and of the package's code that called it."""
    places = []
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name != __file__ and not name.startswith("<") and not any(part in name for part in _NOT_THE_CALLER):
            ours = name.startswith(ROOT + "trl_entropy/")
            if ours or not places:
                places.append(f"{name.split('site-packages/')[-1].removeprefix(ROOT)}:{frame.f_lineno}")
            if ours:
                break
        frame = frame.f_back
    return ", called from ".join(places)
