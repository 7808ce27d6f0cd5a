"""The modules of all op families."""

from .ops.token_reorganization.module import ClassAttention, TokenReorganization

__all__ = ["ClassAttention", "TokenReorganization"]
