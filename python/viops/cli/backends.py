"""Which backend of an op is there on this machine, for info and doctor."""

from __future__ import annotations

import os

import torch

from .. import catalog, dispatch, triton_runtime
from .console import UserError

#: The environment variables that viops heeds, and what holds where one is not set.
_VARIABLES = {
    "VIOPS_BACKEND": "each call takes the fastest backend that can run it",
    "VIOPS_STRICT": "a fallback to the reference warns",
    "VIOPS_CPU_LEVEL": "the highest that the machine has",
    "TRITON_INTERPRET": "Triton compiles its kernels for the GPU",
}


def check_forced() -> None:
    """UserError where VIOPS_BACKEND names no backend."""
    name = forced_backend()
    if name is not None and name not in catalog.BACKENDS:
        raise UserError(
            f"VIOPS_BACKEND: {name!r} is not a backend; unset it, or choose one of "
            f"{', '.join(catalog.BACKENDS)}"
        )


def forced_backend() -> str | None:
    """What VIOPS_BACKEND says, or None."""
    return os.environ.get("VIOPS_BACKEND") or None


def environment() -> list[tuple[str, str]]:
    """Each environment variable that viops heeds, with its value or what holds without."""
    return [
        (name, os.environ.get(name) or f"not set: {usual}") for name, usual in _VARIABLES.items()
    ]


def device_of(backend: str) -> str | None:
    """The device type that a backend runs on, or None where the machine has no such device."""
    if backend not in ("cuda", "triton") or (backend == "triton" and triton_runtime.INTERPRETED):
        return "cpu"
    return "cuda" if torch.cuda.is_available() else None


def absence(op: str, backend: str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a backend, asked for, cannot run an op on this machine, or None where it can."""
    parts = dispatch.PARTS.get(op, (op,))
    for part in parts:
        if backend in catalog.lacks_of(part):
            return catalog.lacks_of(part)[backend]
    device = device_of(backend)
    if device is None:
        return "torch sees no CUDA device"
    reasons = (dispatch.refusal(part, backend, device, dtype, backend) for part in parts)
    return next((reason for reason in reasons if reason is not None), None)
