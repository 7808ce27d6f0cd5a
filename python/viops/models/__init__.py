"""Whole models whose checkpoints are public; timm has them too, once this is imported."""

from . import ms_mlp, revcol, rmt, timm_registry
from .ms_mlp import MSMLP, ms_mlp_b, ms_mlp_s, ms_mlp_t
from .revcol import (
    RevCol,
    revcol_b,
    revcol_h,
    revcol_l,
    revcol_s,
    revcol_t,
    revcol_xl,
)
from .rmt import RMT, rmt_b, rmt_l, rmt_s, rmt_t

timm_registry.register()

__all__ = [
    "MSMLP",
    "RMT",
    "RevCol",
    "ms_mlp",
    "ms_mlp_b",
    "ms_mlp_s",
    "ms_mlp_t",
    "revcol",
    "revcol_b",
    "revcol_h",
    "revcol_l",
    "revcol_s",
    "revcol_t",
    "revcol_xl",
    "rmt",
    "rmt_b",
    "rmt_l",
    "rmt_s",
    "rmt_t",
]
