"""Puts ops into models that exist, and takes them out again."""

from typing import TypeVar as _TypeVar

from torch import nn as _nn

from .evit import evit, kept_masks
from .int16 import int16
from .int16 import is_patched as _is_int16
from .int16 import undo as _undo_int16
from .manhattan import manhattan
from .manhattan import undo as _undo_vision_transformer
from .micro_batch import is_patched as _is_micro_batch
from .micro_batch import micro_batch
from .micro_batch import undo as _undo_micro_batch
from .schedule import KeepRateSchedule
from .vision_transformer import KeptTokens, Patched

_Model = _TypeVar("_Model", bound=_nn.Module)


def undo(model: _Model) -> _Model:
    """Takes out of the model what viops.patch put in, in place; returns the same model.

    Raises:
        ValueError: the model is not patched.
    """
    if _is_int16(model):
        _undo_int16(model)
        if not (_is_micro_batch(model) or any(isinstance(m, Patched) for m in model.modules())):
            return model
    if _is_micro_batch(model):
        _undo_micro_batch(model)
        if not any(isinstance(module, Patched) for module in model.modules()):
            return model
    return _undo_vision_transformer(model)


__all__ = [
    "KeepRateSchedule",
    "KeptTokens",
    "evit",
    "int16",
    "kept_masks",
    "manhattan",
    "micro_batch",
    "undo",
]
