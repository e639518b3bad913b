"""The emulated device: what it refuses, what it passes, and what it records. torch's fake tensors are the oracle."""

import copy
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.devices.emulated import DEVICE, EmulatedDevice, MixedDevices


def tensors(*shape):
    """The same on the device and on the CPU."""
    return torch.ones(shape, device=DEVICE), torch.ones(shape)


def number(value=1.0):
    return torch.tensor(value)


REFUSED = {
    "sum": lambda device, cpu: device + cpu,
    "product": lambda device, cpu: cpu * device,
    "in place": lambda device, cpu: device.add_(cpu),
    "in place, on the CPU": lambda device, cpu: cpu.add_(device),
    "a number of the CPU, in place": lambda device, cpu: number().add_(device.sum()),
    "matrix product": lambda device, cpu: device @ cpu,
    "concatenation": lambda device, cpu: torch.cat([device, cpu]),
    "index_select": lambda device, cpu: device.index_select(0, torch.arange(2)),
    "index_add": lambda device, cpu: device.index_add(0, torch.arange(3), device),
    "mask": lambda device, cpu: device.where(cpu > 0, 0.0),
    "masked_fill": lambda device, cpu: device.masked_fill(cpu > 0, 0.0),
    "gather": lambda device, cpu: device.gather(0, torch.zeros(1, 3, dtype=torch.long)),
    "bucketize": lambda device, cpu: torch.bucketize(device, torch.tensor([0.5, 1.5])),
    "one number in a list": lambda device, cpu: device * torch.tensor([2.0]),
    "foreach": lambda device, cpu: torch._foreach_add([device], [cpu]),
}
ALLOWED = {
    "a number of the CPU": lambda device, cpu: device * number(2.0) + number(),
    "where, with numbers": lambda device, cpu: torch.where(device > 0, number(), number(0.0)),
    "filled with a number": lambda device, cpu: device.fill_(number()),
    "masked by a number": lambda device, cpu: device.masked_fill(device > 0, number()),
    "like the other": lambda device, cpu: device + torch.zeros_like(cpu, device=DEVICE) + device.new_zeros(3),
    "foreach with a number": lambda device, cpu: torch._foreach_mul([device], number()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operation_is_refused_as_torch_refuses_it(name):
    with FakeTensorMode(), pytest.raises(RuntimeError):
        REFUSED[name](*tensors(3, 3))
    with pytest.raises(MixedDevices, match=r"tests/devices/test_emulated\.py:\d+"), EmulatedDevice():
        REFUSED[name](*tensors(3, 3))


@pytest.mark.parametrize("name", ALLOWED)
def test_operation_passes_as_torch_lets_it_pass(name):
    with FakeTensorMode():
        ALLOWED[name](*tensors(3, 3))
    with EmulatedDevice():
        ALLOWED[name](*tensors(3, 3))


def test_copies_pass():
    """Fake tensors cannot tell: torch without CUDA does not run them."""
    with EmulatedDevice():
        on_device, on_cpu = tensors(3)
        on_device.copy_(on_cpu)
        assert (on_device + on_cpu.to(DEVICE) + on_cpu.to(on_device)).is_cuda
        assert (on_device.cpu() + on_cpu).is_cpu


def test_index_may_be_on_the_cpu_unless_what_it_indexes_is_there():
    rows = torch.arange(2)
    with EmulatedDevice() as device:
        on_device, on_cpu = tensors(3, 3)
        assert on_device[rows].is_cuda
        on_device[rows] = torch.zeros(2, 3, device=DEVICE)
        on_device[rows] = number()
        assert not device.mixed
        _ = on_cpu[rows.to(DEVICE)]
        on_device[rows] = on_cpu[:2]
        assert sum(device.mixed.values()) == 2
        device.mixed.clear()


def test_what_torch_refuses_outside_its_operations():
    with EmulatedDevice() as device:
        on_device, on_cpu = tensors(3)
        on_device.numpy()
        on_device.grad = on_cpu
        on_device.normal_(generator=torch.Generator())
        found = "\n".join(device.mixed)
        device.mixed.clear()
    for what in ("numpy", "gradient", "normal_.* with a generator of the CPU"):
        assert re.search(what, found)


def test_every_way_of_naming_a_device_is_followed():
    with EmulatedDevice():
        on_device, on_cpu = tensors(3)
        there = [
            torch.zeros(2, device="cuda"), torch.tensor([1.0], device=DEVICE), torch.as_tensor([1.0], device=0),
            on_cpu.to("cuda:0"), on_cpu.to(DEVICE, torch.float64), on_cpu.to(on_device), on_cpu.cuda(),
            torch.randn_like(on_cpu, device=DEVICE), on_device.new_zeros(2), on_device[1:], on_device.clone(),
            on_device.double(), torch.nn.Linear(2, 2).to(DEVICE).weight, copy.deepcopy(on_device),
            on_device.new_tensor([1.0]), torch.where(on_device > 0, 1.0, 0.0), on_device.sum(), on_device.unbind()[0],
            torch.func.jvp(lambda x: x.square(), (on_device,), (on_device,))[1],
            torch.func.vmap(lambda x: x + torch.arange(3, device=x.device))(torch.ones(2, 3, device=DEVICE)),
        ]  # fmt: skip
        here = [
            torch.zeros(2), on_device.cpu(), on_device.to("cpu"), torch.tensor([1.0]), on_cpu + 1,
            torch.zeros_like(on_device, device="cpu"), on_device.new_zeros(2, device="cpu"), torch.arange(3),
        ]  # fmt: skip
        assert [tensor.device for tensor in there] == [DEVICE] * len(there)
        assert [tensor.device.type for tensor in here] == ["cpu"] * len(here)


def test_backward_stays_on_the_device_and_its_hooks_are_watched():
    def in_hook(gradient):
        return gradient * torch.ones(3)

    with EmulatedDevice() as device:
        parameter = torch.ones(3, device=DEVICE, requires_grad=True)
        (parameter * 2).sum().backward()
        assert parameter.grad.is_cuda and not device.mixed
        torch.utils.checkpoint.checkpoint(torch.exp, parameter, use_reentrant=False).sum().backward()
        assert not device.mixed
        parameter.register_hook(in_hook)
        torch.autograd.grad((parameter * 2).sum(), parameter)
        assert [line.partition(" of tensors")[0] for line in device.mixed] == ["mul"]
        device.mixed.clear()


def test_a_file_keeps_where_its_tensors_were(tmp_path):
    with EmulatedDevice():
        torch.save(dict(zip(("there", "here"), tensors(3), strict=True)), tmp_path / "tensors.pt")
        for where, there, here in ((None, True, False), ("cpu", False, False), (DEVICE, True, True)):
            found = torch.load(tmp_path / "tensors.pt", map_location=where, weights_only=True)
            assert (found["there"].is_cuda, found["here"].is_cuda) == (there, here)


def test_the_device_has_a_random_state_of_its_own():
    with EmulatedDevice():
        torch.manual_seed(1)
        first = torch.rand(3)
        assert torch.equal(torch.rand(3, device=DEVICE).cpu(), first)  # drawing one has not moved the other
        with torch.random.fork_rng(devices=[0]):
            inside = torch.rand(3, device=DEVICE)
        assert torch.equal(torch.rand(3, device=DEVICE), inside)
        with torch.random.fork_rng(devices=[]):
            inside = torch.rand(3, device=DEVICE)
        assert not torch.equal(torch.rand(3, device=DEVICE), inside)


def test_copies_and_reads_are_recorded_with_their_place():
    with EmulatedDevice() as device:
        on_device, on_cpu = tensors(3)
        on_device.to("cpu"), on_cpu.to(DEVICE), on_cpu.copy_(on_device)
        on_device.sum().item(), float(on_device[0]), bool(on_device.any()), on_device.tolist(), on_device.nonzero()
        on_device[on_device > 0]
    assert [sum(n for what, n in device.copies.items() if part in what) for part in ("CPU", "device at")] == [2, 1]
    assert sum(device.reads.values()) == 6
    assert all("tests/devices/test_emulated.py:" in place for place in device.copies + device.reads)


def test_nothing_is_left_behind():
    before = torch.cuda.get_rng_state, torch.autograd._engine_run_backward, list(torch.serialization._package_registry)
    with pytest.raises(KeyError), EmulatedDevice():
        raise KeyError
    after = torch.cuda.get_rng_state, torch.autograd._engine_run_backward, list(torch.serialization._package_registry)
    assert before == after and not torch.ones(1).is_cuda
