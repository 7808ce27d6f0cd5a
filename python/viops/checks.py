"""Argument checks that all backends share: each names the argument, what came, what is accepted."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_FLOATS = "float32, float64, bfloat16 or float16"


def check_float_tensor(name: str, value: object, axes: str) -> None:
    """A floating-point tensor with these axes, as in "B N C"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor [{axes}], got {type(value).__name__}")
    if value.dim() != axes.count(" ") + 1:
        raise ValueError(f"{name}: expected [{axes}], got shape {list(value.shape)}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected {_FLOATS}, got {value.dtype}")
    check_layout(name, value)


def check_layout(name: str, value: Tensor) -> None:
    """Strided, and not nested."""
    if value.layout is not torch.strided or value.is_nested:
        _refuse_layout(name, value)


def check_index_tensor(name: str, value: object, axes: str) -> None:
    """An int64 tensor with these axes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor [{axes}], got {type(value).__name__}")
    if value.dim() != axes.count(" ") + 1:
        raise ValueError(f"{name}: expected [{axes}], got shape {list(value.shape)}")
    if value.dtype is not torch.int64:
        raise TypeError(f"{name}: expected int64, got {value.dtype}")
    if value.layout is not torch.strided or value.is_nested:
        _refuse_layout(name, value)


def _refuse_layout(name: str, value: Tensor) -> None:
    kind = "a nested one" if value.is_nested else value.layout
    raise TypeError(f"{name}: expected a strided tensor, got {kind}")


def check_scale(name: str, value: object) -> float:
    """A real number; a tensor would lose its gradient."""
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number or None, got {type(value).__name__}")
    return float(value)


def check_eps(name: str, value: object) -> float:
    """A finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    value = float(value)
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")
    return value


def check_rate(name: str, value: object) -> float:
    """A probability."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    value = float(value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected 0 to 1, got {value}")
    return value


def check_finite(name: str, value: object) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return float(value)


def check_list(name: str, value: object, what: str) -> list[Any]:
    """The entries of something that has some, which a string and a tensor are not taken for."""
    if isinstance(value, (str, Tensor)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected {what}, got {type(value).__name__}")
    return list(value)


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_int(name: str, value: Any, low: int, high: int | None, meaning: str) -> int:
    """An integer within [low, high]; `meaning` says what the upper bound is."""
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got bool")
    if not isinstance(value, (int, torch.SymInt)):
        try:
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None
    if value < low or (high is not None and value > high):
        upper = "" if high is None else f" and at most {high} ({meaning})"
        raise ValueError(f"{name}: expected at least {low}{upper}, got {value}")
    return value


def check_same(what: str, name: str, got: object, other: str, expected: object) -> None:
    """Two arguments that must agree in device, dtype or the size of an axis."""
    if got != expected:
        raise ValueError(f"{name}: {what} {got} differs from {other}'s {expected}")
