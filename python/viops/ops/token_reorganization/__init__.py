"""Token reorganization, from EViT (Liang et al., ICLR 2022): see README.md beside this file."""

from .op import (
    class_attention,
    class_attention_scores,
    reorganize_tokens,
    restore_tokens,
    softmax_attention,
)

__all__ = [
    "class_attention",
    "class_attention_scores",
    "reorganize_tokens",
    "restore_tokens",
    "softmax_attention",
]
