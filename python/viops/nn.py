"""The modules of all op families."""

from .ops.decayed_attention.module import ManhattanSelfAttention, RelativePosition2d
from .ops.token_reorganization.module import ClassAttention, TokenReorganization

__all__ = [
    "ClassAttention",
    "ManhattanSelfAttention",
    "RelativePosition2d",
    "TokenReorganization",
]
