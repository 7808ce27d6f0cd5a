"""Puts ops into models that exist, and takes them out again."""

from .evit import evit, kept_masks
from .manhattan import manhattan, undo
from .schedule import KeepRateSchedule
from .vision_transformer import KeptTokens

__all__ = ["KeepRateSchedule", "KeptTokens", "evit", "kept_masks", "manhattan", "undo"]
