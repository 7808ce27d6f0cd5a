"""Loads the compiled extension `viops._C`, and keeps the reason when it cannot be loaded."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch

#: What this version of the package calls before any op does.
_EXPECTED = ("build_info", "cpu_level", "cpu_levels", "threads")


#: The least compute capability that the CUDA part is built for.
MIN_CAPABILITY = (8, 0)


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("viops._C")
    except Exception as error:  # a broken or stale build may raise anything
        return None, f"viops._C cannot be loaded: {str(error) or type(error).__name__}"
    lacking = [name for name in _EXPECTED if not hasattr(module, name)]
    if lacking:
        return None, (
            "viops._C cannot be loaded: it is from another version of viops, "
            f"without {', '.join(lacking)}"
        )
    return module, None


#: The extension module, or None.
extension, load_error = _load()


#: The type of device whose tensors the CUDA part takes.
cuda_device_type = "cuda"

#: The CPU level that the extension took when it was loaded, or None.
cpu_level: str | None = None if extension is None else extension.cpu_level()


def require() -> ModuleType:
    """The extension module; RuntimeError with the reason where there is none."""
    if extension is None:
        raise RuntimeError(load_error)
    return extension


@functools.cache
def _cuda_devices_error() -> str | None:
    """Why a device of this machine cannot run the CUDA part, or None."""
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if capability < MIN_CAPABILITY:
            return (
                f"needs devices of compute capability {_version(MIN_CAPABILITY)} or newer, "
                f"cuda:{device} has {_version(capability)}"
            )
    return None


def cuda_error() -> str | None:
    """Why the CUDA part cannot run, or None."""
    if extension is None:
        return load_error
    build = extension.build_info()
    if not build["cuda_architectures"]:
        return f"the extension has no CUDA part: {build['cuda_reason']}"
    return _cuda_devices_error()


def set_cpu_level(name: str) -> None:
    """Makes the extension use this CPU level; ValueError for one that the machine lacks."""
    global cpu_level
    require().set_cpu_level(name)
    cpu_level = name
