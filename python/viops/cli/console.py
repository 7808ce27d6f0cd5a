"""What the commands share: errors that are the user's to mend, tables, optional packages."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module, metadata
from types import ModuleType

import torch


class UserError(Exception):
    """Something that the user can mend: printed as one line, without a traceback."""


INSTALL_DEMO = (
    "in a checkout, pip install '.[demo]' installs what is missing; timm requires torchvision: "
    "choose the one that fits the torch that is there"
)


def require(module: str) -> ModuleType:
    """Imports a package of the `demo` extra; UserError with the command that installs it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"needs the package {error.name!r}: {INSTALL_DEMO}") from error


def version_of(distribution: str) -> str | None:
    """The installed version of a package, found without importing it; None where it is absent."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


_torchvision_schemas: torch.library.Library | None = None


def require_timm() -> ModuleType:
    """timm, also beside a torchvision that was built for another torch.

    timm imports torchvision, of which it uses plain Python alone.  A torchvision whose compiled
    part does not fit (built for CUDA, beside a CPU-only torch, say) fails on import because it
    describes two operators, nms and qnms, which that part defines.  Only then their schemas are
    declared here, without an implementation, and the import is tried again.
    """
    global _torchvision_schemas
    try:
        return require("timm")
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
    _torchvision_schemas = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        _torchvision_schemas.define(
            f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
    return require("timm")


def print_heading(text: str) -> None:
    print(f"\n{text}", flush=True)


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell, two spaces apart."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print(("  " + "  ".join(cells)).rstrip(), flush=True)
