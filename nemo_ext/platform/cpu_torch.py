"""torch without CUDA: "cuda" means the CPU, streams and events do nothing, the CUDA random state is the CPU's."""

from __future__ import annotations

import contextlib
import functools
import sys
import time

import torch
import torch.utils._device

CPU = torch.device("cpu")
FACTORIES = (
    "empty zeros ones full tensor arange rand randn randint as_tensor linspace eye empty_like zeros_like ones_like full_like "
    "rand_like randn_like empty_strided tril_indices triu_indices"
).split()
NEW_METHODS = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")
TENSOR_TYPES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")


def install() -> None:
    """Redirect torch's CUDA entry points to the CPU, in this process."""
    torch.utils._device._device_constructors()  # remembers torch's own, which `with torch.device("meta")` looks for
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for name in NEW_METHODS:
        setattr(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    for cls in (torch.Tensor, torch.nn.Module):
        cls.to = _to_cpu(cls.to)
        cls.cuda = lambda self, *args, **kwargs: self
    torch.Tensor.record_stream = lambda self, *args, **kwargs: None
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self
    torch.Tensor.type = _type_as_cuda(torch.Tensor.type)
    _redirect_cuda_module()
    _redirect_amp()
    declare_torchvision_ops()


def names_cuda(device: object) -> bool:
    """Whether a device argument means a CUDA device: "cuda", "cuda:1", torch.device("cuda"), or an ordinal."""
    if isinstance(device, str):
        return device.split(":")[0] == "cuda"
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _on_cpu(function):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if kwargs:
            if (device := kwargs.get("device")) is not None and names_cuda(device):
                kwargs["device"] = CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return wrapped


def _to_cpu(method):
    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        if args and names_cuda(args[0]):
            args = (CPU, *args[1:])
        if names_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return method(self, *args, **kwargs)

    return wrapped


def _type_as_cuda(method):
    """Megatron's optimizers refuse a parameter whose `type()` is not a CUDA one: answer them, and only them, so."""

    @functools.wraps(method)
    def wrapped(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        if not args and not kwargs and "megatron/core/optimizer" in sys._getframe(1).f_code.co_filename:
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    return wrapped


class Event:
    """A CUDA event on a device without queues: the wall clock."""

    def __init__(self, *args, **kwargs) -> None:
        self.record()

    def record(self, *args, **kwargs) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, other: Event) -> float:
        """Milliseconds from this event to `other`."""
        return (other.seconds - self.seconds) * 1e3

    def query(self) -> bool:
        return True

    def wait(self, *args, **kwargs) -> None:
        """Nothing is ever pending."""

    synchronize = wait


class Stream(contextlib.nullcontext):
    """A CUDA stream on a device that runs everything in order."""

    device, cuda_stream, stream_id = CPU, 0, 0

    def __init__(self, *args, **kwargs) -> None:
        super().__init__()

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def query(self) -> bool:
        return True

    def wait_stream(self, *args, **kwargs) -> None:
        """Nothing is ever pending."""

    wait_event = synchronize = wait_stream


def _redirect_cuda_module() -> None:
    cuda, stream = torch.cuda, Stream()

    cuda.current_device = lambda: CPU
    for module, names in (
        (cuda, ("set_device", "synchronize", "empty_cache", "ipc_collect")),
        (cuda.nvtx, ("range_push", "range_pop")),
    ):
        for name in names:  # a function each: torch.compile's tables want one rule an object
            setattr(module, name, lambda *args, **kwargs: None)
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: stream
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.default_generator.manual_seed
    cuda.nvtx.range = lambda *args, **kwargs: contextlib.nullcontext()
    for kind in TENSOR_TYPES:
        setattr(cuda, f"{kind}Tensor", getattr(torch, f"{kind}Tensor"))


def _redirect_amp() -> None:
    custom_fwd, custom_bwd = torch.amp.custom_fwd, torch.amp.custom_bwd

    def fwd(fwd=None, *, device_type="cpu", cast_inputs=None):
        return custom_fwd(fwd, device_type="cpu", cast_inputs=cast_inputs)

    def bwd(bwd=None, *, device_type="cpu"):
        return custom_bwd(bwd, device_type="cpu")

    class Autocast(torch.amp.autocast):
        def __init__(self, device_type="cpu", *args, **kwargs):
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    torch.amp.custom_fwd, torch.amp.custom_bwd, torch.autocast = fwd, bwd, Autocast


def declare_torchvision_ops() -> None:
    """torchvision's wheel is a CUDA build whose C operators do not load beside a CPU torch: declaring the two it registers
    Python code for is enough for everything else it does."""
    try:
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:  # a torchvision that matches this torch has them
        return
    declare_torchvision_ops.library = library  # the schemas live as long as this object
