"""Whole models whose checkpoints are public; timm has them too, once this is imported."""

from . import rmt, timm_registry
from .rmt import RMT, rmt_b, rmt_l, rmt_s, rmt_t

timm_registry.register()

__all__ = ["RMT", "rmt", "rmt_b", "rmt_l", "rmt_s", "rmt_t"]
