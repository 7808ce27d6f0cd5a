"""What autocast does to the inputs of ops, and references that it leaves alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def to_autocast_dtype(x: Tensor) -> Tensor:
    """x in the dtype of autocast where that is on, as torch's conv2d and attention cast theirs.

    float64, integers and what is no tensor are left as they are.
    """
    if not torch._C._is_any_autocast_enabled() or not isinstance(x, Tensor):
        return x
    device = x.device.type
    if not x.is_floating_point() or x.dtype is torch.float64:
        return x
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """The function, with its matrix products in the dtypes of their operands.

    The device is that of the first argument.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        with torch.autocast(args[0].device.type, enabled=False):  # type: ignore[attr-defined]
            return function(*args, **kwargs)

    return run
