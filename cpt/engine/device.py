"""Lets Megatron-core run on a machine without CUDA: the only file of the project that knows whether there is a GPU.

Megatron-core names the CUDA device in many places. `install` puts answers in their stead, once per process: functions
of `torch.cuda` give the CPU or do nothing, tensors that are asked for on "cuda" are made on the CPU, type names are
answered as Megatron-core compares them, and the random state of "the GPU" is the CPU generator's.
Single functions are replaced instead of entering a `TorchFunctionMode`, because a mode slows down every call of torch.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

CPU = torch.device("cpu")

# Functions that make a tensor on a named device, as Megatron-core calls them.
_FACTORIES: tuple[str, ...] = (
    "tensor",
    "as_tensor",
    "empty",
    "empty_like",
    "empty_strided",
    "zeros",
    "zeros_like",
    "ones",
    "ones_like",
)
_FACTORIES += ("full", "full_like", "arange", "linspace", "eye", "rand", "rand_like", "randn", "randn_like", "randint")

_installed = False


def install() -> torch.device:
    """The device of this rank; on a machine without CUDA, prepares torch and Megatron-core for the CPU first.

    Call before anything of Megatron-core is built. Calling it again does nothing.
    """
    global _installed
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if not _installed:
        _installed = True
        _answer_for_cuda()
        _make_tensors_on_cpu()
        _use_cpu_random_state()
        _allow_save_without_cuda()
    return CPU


def has_cuda() -> bool:
    """Whether ranks compute on GPUs."""
    return torch.cuda.is_available()


def backend() -> str:
    """Name of the torch.distributed backend for this machine."""
    return "nccl" if has_cuda() else "gloo"


class _Instant:
    """Stands for a CUDA stream or event: everything is done when a call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.cuda_stream = 0

    def record_event(self, event: Any = None) -> Any:
        return event or _Instant()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def _no_stream(stream: Any = None) -> Iterator[None]:
    yield


def _answer_for_cuda() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    # One function object for each name: torch's compiler refuses an object that it knows under two names.
    for name in ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.Stream, cuda.Event = type("Stream", (_Instant,), {}), type("Event", (_Instant,), {})
    cuda.current_stream = lambda *args, **kwargs: cuda.Stream()
    cuda.default_stream = lambda *args, **kwargs: cuda.Stream()
    cuda.stream = _no_stream

    tensor_type = torch.Tensor.type

    @functools.wraps(tensor_type)
    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # `param.type() == "torch.cuda.FloatTensor"` decides in the optimizers; other callers get the truth.
        answer = tensor_type(self, *args, **kwargs)
        if isinstance(answer, str) and sys._getframe(1).f_globals.get("__name__", "").startswith("megatron."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _make_tensors_on_cpu() -> None:
    def on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def made(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs and _is_cuda(kwargs["device"]):
                kwargs["device"] = CPU
                kwargs.pop("pin_memory", None)
            return make(*args, **kwargs)

        return made

    for name in _FACTORIES:
        setattr(torch, name, on_cpu(getattr(torch, name)))

    to = torch.Tensor.to

    @functools.wraps(to)
    def to_(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        return to(self, *args, **kwargs)

    torch.Tensor.to = to_  # type: ignore[method-assign, assignment]


def _use_cpu_random_state() -> None:
    from megatron.core.tensor_parallel import random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    cuda: Any = torch.cuda
    cuda.get_rng_state = cuda.random.get_rng_state = get_state
    cuda.set_rng_state = cuda.random.set_rng_state = set_state
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state


def _allow_save_without_cuda() -> None:
    """The saving process of a distributed checkpoint binds itself to GPU `rank % device_count`; there is one CPU."""
    cuda: Any = torch.cuda
    cuda.device_count = lambda: 1
