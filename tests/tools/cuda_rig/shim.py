"""Answers for torch.cuda where there is no card: a 24 GiB card that is asked, while every tensor stays on the CPU.

from tests.tools.cuda_rig import shim; shim.enter()       # before unsloth is imported; a process that did this is spoilt for anything else
"""

import contextlib
import types

import torch
from torch.overrides import TorchFunctionMode

GIB = 2**30
CALLS = {"reset_peak_memory_stats": 0, "empty_cache": 0}
"""How often the toolkit asked for what leaves no other trace here."""
ANSWERS = {
    "get_device_properties": types.SimpleNamespace(
        name="a card that is not there", total_memory=24 * GIB, major=8, minor=9, multi_processor_count=128,
        is_integrated=False, warp_size=32, shared_memory_per_block=49152,
    ),
    "mem_get_info": (20 * GIB, 24 * GIB),
    "get_device_capability": (8, 9),
    "get_device_name": "a card that is not there",
    "current_device": 0,
    "device_count": 1,
    "memory_allocated": 0,
    "memory_reserved": 0,
    "max_memory_reserved": 1,
    "synchronize": None,
    "is_bf16_supported": True,
    "get_rng_state_all": [],
    "set_rng_state_all": None,
}  # fmt: skip


class Event:
    def __init__(self, *args, **kwargs):  # torch's signature
        pass

    def record(self, *args, **kwargs):  # noqa: ARG002 - as above
        return self

    def wait(self, *args, **kwargs):
        pass

    def synchronize(self):
        pass


class Stream(Event):
    device, cuda_stream = torch.device("cpu"), 0

    def wait_stream(self, *args):
        pass

    def wait_event(self, *args):
        pass

    def record_event(self, *args):  # noqa: ARG002 - torch's signature
        return Event()


class OnTheCPU(TorchFunctionMode):
    """Wherever a tensor is asked onto a card, it stays."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if "device" in kwargs:
            kwargs["device"] = _cpu(kwargs["device"])
        if name == "to":
            keep = bool, torch.dtype, torch.Tensor
            args = (args[0], *(a if isinstance(a, keep) else _cpu(a) for a in args[1:]))
        if func is torch.device and isinstance(_cpu(args[0]), torch.device):
            return torch.device("cpu")
        if name in ("cuda", "pin_memory"):
            return args[0]
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


def _cpu(device):
    is_cuda = isinstance(device, str) and device.startswith("cuda")
    is_cuda |= isinstance(device, torch.device) and device.type == "cuda"
    return torch.device("cpu") if is_cuda or (isinstance(device, int) and not isinstance(device, bool)) else device


def enter() -> None:
    """Take torch.cuda over for the rest of this process; `torch.cuda.is_available()` stays False: see `with_card`."""
    for name, answer in ANSWERS.items():
        setattr(torch.cuda, name, lambda *args, _answer=answer, **kwargs: _answer)  # noqa: ARG005 - torch's signatures
    for name in CALLS:
        setattr(torch.cuda, name, lambda *args, _name=name: CALLS.update({_name: CALLS[_name] + 1}))  # noqa: ARG005
    torch.cuda.Event, torch.cuda.Stream = Event, Stream
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *args: Stream()  # noqa: ARG005 - as above
    torch.cuda.stream = lambda *args: contextlib.nullcontext()  # noqa: ARG005 - as above
    torch._C._cuda_getCurrentRawStream = lambda _: 0
    torch.random.fork_rng = lambda *args, **kwargs: contextlib.nullcontext()  # noqa: ARG005 - as above
    OnTheCPU().__enter__()


@contextlib.contextmanager
def with_card():
    """A block in which `torch.cuda.is_available()` says yes."""
    real, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        yield
    finally:
        torch.cuda.is_available = real
