"""Calls of the extension's functions, good and bad, by the names of their arguments."""

from __future__ import annotations

import numpy
import pytest
import torch
from viops import native


class NoCapsule:
    """Its DLPack is none."""

    def __dlpack__(self) -> int:
        return 7


EACH_NO_TENSOR = pytest.mark.parametrize(
    "value",
    [1.5, "text", [1.0], object(), NoCapsule(), numpy.float32(1), torch.float32],
    ids=lambda value: type(value).__name__,
)


def call(name: str, arguments: dict) -> None:
    """The function of this name, of arguments in its order."""
    getattr(native.require(), name)(*arguments.values())


def check_refusal(
    name: str, arguments: dict, changes: dict, errors: type | tuple, *others: str
) -> None:
    """Good arguments with these changes raise one of these errors, which names one of them.

    A good tensor may be blamed for not fitting the bad one.  `others` are further names.
    """
    with pytest.raises(errors, match=rf"^({'|'.join([*arguments, *others])}): \S"):
        call(name, {**arguments, **changes})


def check_counts(name: str, arguments: dict) -> None:
    """Too few arguments and too many are refused."""
    values = list(arguments.values())
    for bad in (values[:-1], [*values, 1], []):
        with pytest.raises(TypeError):
            getattr(native.require(), name)(*bad)
