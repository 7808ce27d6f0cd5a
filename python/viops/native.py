"""Loads the compiled extension `viops._C`, and keeps the reason when it cannot be loaded."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Sequence
from types import ModuleType

import torch

#: What this version of the package calls before any op does.
_EXPECTED = ("build_info", "cpu_level", "cpu_levels", "threads")


def serves(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code built for these, in CMake's names, runs on a device of this capability."""
    for name in architectures:
        match = re.fullmatch(r"(\d+)(\d)([a-z]?)(-real|-virtual)?", name)
        if match is None:
            continue
        version = int(match[1]), int(match[2])
        if match[3] and version != capability:  # sm_90a and the like run on that device alone
            continue
        has_machine_code, has_ptx = match[4] != "-virtual", match[4] != "-real"
        if has_machine_code and version[0] == capability[0] and version <= capability:
            return True
        if has_ptx and version <= capability:
            return True
    return False


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
def _cuda_devices_error(architectures: tuple[str, ...]) -> str | None:
    """Why code built for these cannot run on a device of this machine, or None."""
    if torch.cuda.device_count():
        try:
            require().cuda_devices()
        except RuntimeError as error:  # a driver older than the toolkit of the build, say
            return str(error)
    for device in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(device)
        if not serves(architectures, capability):
            has = ".".join(map(str, capability))
            built = ", ".join(architectures)
            return f"the CUDA part is built for {built}, and cuda:{device} has capability {has}"
    return None


def cuda_error() -> str | None:
    """Why the CUDA part cannot run, or None."""
    if extension is None:
        return load_error
    build = extension.build_info()
    if not build["cuda_architectures"]:
        return f"the extension has no CUDA part: {build['cuda_reason']}"
    return _cuda_devices_error(tuple(build["cuda_architectures"]))


def set_cpu_level(name: str) -> None:
    """Makes the extension use this CPU level; ValueError for one that the machine lacks."""
    global cpu_level
    require().set_cpu_level(name)
    cpu_level = name
