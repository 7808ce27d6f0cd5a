"""Whether Triton's kernels can run here, and on which device a launch goes."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

#: Whether Triton interprets kernels, on tensors of the CPU: TRITON_INTERPRET=1 (or another of the
#: words that Triton takes) when viops is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")

#: What Triton supports.
_MIN_CAPABILITY = (8, 0)


@functools.cache
def load_error() -> str | None:
    """Why Triton cannot be imported, or None; asked only where a call could run on it."""
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken or foreign build may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "triton is not installed"
        return f"triton cannot be imported: {str(error) or type(error).__name__}"
    if not INTERPRETED and not any(map(shutil.which, _compilers())):
        return (
            "Triton builds its launchers with a C compiler, and found none: set CC, or install gcc"
        )
    return None


def _compilers() -> list[str]:
    """Where Triton looks for one."""
    chosen = os.environ.get("CC")
    return [chosen] if chosen else ["gcc", "clang"]


def check_kernel(kernel: object) -> None:
    """Raises where a kernel was made for Triton's other way of running than viops goes by."""
    if (type(kernel).__name__ == "InterpretedFunction") != INTERPRETED:
        raise RuntimeError(
            "TRITON_INTERPRET was changed after viops was imported, which decides whether Triton's "
            "kernels are interpreted: set it before"
        )


@functools.cache
def device_error() -> str | None:
    """Why Triton cannot compile for every GPU that torch sees, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is not None:
        return None
    devices = range(torch.cuda.device_count())
    lowest = min(torch.cuda.get_device_capability(device) for device in devices)
    if lowest < _MIN_CAPABILITY:
        least, got = (".".join(map(str, pair)) for pair in (_MIN_CAPABILITY, lowest))
        return f"needs GPUs of compute capability {least} or newer, got {got}"
    return None


def on_device_of(tensor: Tensor) -> AbstractContextManager:
    """Makes the tensor's device the current one, on which Triton launches."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()  # a guard costs microseconds
    return torch.cuda.device(tensor.device)
