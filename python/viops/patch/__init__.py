"""Puts ops into models that exist, and takes them out again."""

from typing import TypeVar as _TypeVar

from torch import nn as _nn

from . import convnext as _convnext
from . import int16 as _int16
from . import manhattan as _vision_transformer
from . import micro_batch as _micro_batch
from .convnext import convnext
from .evit import evit, kept_masks
from .int16 import int16
from .manhattan import manhattan
from .micro_batch import micro_batch
from .reversible import reversible
from .schedule import KeepRateSchedule
from .vision_transformer import KeptTokens

_Model = _TypeVar("_Model", bound=_nn.Module)

#: Those that were put in last come out first.
_PATCHES = tuple(
    (patch.is_patched, patch.undo)
    for patch in (_int16, _micro_batch, _convnext, _vision_transformer)
)


def undo(model: _Model) -> _Model:
    """Takes out of the model what viops.patch put in, in place; returns the same model.

    Raises:
        ValueError: the model is not patched.
    """
    was_patched = False
    for is_patched, take_out in _PATCHES:
        if is_patched(model):
            take_out(model)
            was_patched = True
    if not was_patched:
        raise ValueError(
            f"model: expected one that viops.patch has patched, got {type(model).__name__}"
        )
    return model


__all__ = [
    "KeepRateSchedule",
    "KeptTokens",
    "convnext",
    "evit",
    "int16",
    "kept_masks",
    "manhattan",
    "micro_batch",
    "reversible",
    "undo",
]
