"""Which backend of an op is there on this machine, for info and doctor."""

from __future__ import annotations

import torch

from .. import catalog, dispatch


def device_of(backend: str) -> str | None:
    """The device type that a backend runs on, or None where the machine has no such device."""
    if backend in ("cpu", "reference"):
        return "cpu"
    return "cuda" if torch.cuda.is_available() else None


def absence(
    family: catalog.Family, op: str, backend: str, dtype: torch.dtype = torch.float32
) -> str | None:
    """Why a backend cannot run an op of the family on this machine, or None where it can."""
    if backend in family.lacks:
        return family.lacks[backend]
    device = device_of(backend)
    if device is None:
        return "torch sees no CUDA device"
    with dispatch.use_backend(backend):
        return dispatch.explain(op, torch.empty(0, dtype=dtype, device=device)).reasons.get(backend)
