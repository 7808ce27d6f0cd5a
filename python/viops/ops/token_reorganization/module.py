"""Modules of token reorganization, for models that are written anew."""

from __future__ import annotations

import math

from torch import Tensor, nn

from .op import class_attention, reorganize_tokens


class ClassAttention(nn.Module):
    """Multi-head self-attention over [B, N, C] that also returns the class token's attention.

    The parameters are those of EViT's and timm's Attention: ``qkv.weight``, ``qkv.bias``,
    ``proj.weight``, ``proj.bias``.

    Args:
        dim: channels C.
        num_heads: heads; must divide dim.
        qkv_bias: whether the qkv projection has a bias.
        num_prefix: how many tokens lead the patches.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, qkv_bias: bool = False, num_prefix: int = 1
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim = {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.num_prefix = num_prefix
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, N, C] -> out [B, N, C], scores [B, N - num_prefix] float32."""
        batch, num_tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, num_tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, N, D]
        out, scores = class_attention(q, k, v, num_prefix=self.num_prefix)
        return self.proj(out.transpose(1, 2).reshape(batch, num_tokens, dim)), scores


class TokenReorganization(nn.Module):
    """Keeps ceil(keep_rate * P) patch tokens and fuses the others.

    Args:
        keep_rate: share of the patch tokens that stays, above 0 and at most 1.
        num_prefix: how many tokens lead the patches.
        fuse: whether the dropped tokens become one, or are lost.
    """

    def __init__(self, keep_rate: float = 0.7, num_prefix: int = 1, fuse: bool = True) -> None:
        super().__init__()
        if not 0 < keep_rate <= 1:
            raise ValueError(f"keep_rate: expected above 0 and at most 1, got {keep_rate}")
        self.keep_rate = keep_rate
        self.num_prefix = num_prefix
        self.fuse = fuse

    def forward(self, x: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, N, C], scores [B, P] -> tokens, index, as viops.reorganize_tokens gives them."""
        keep = math.ceil(self.keep_rate * scores.shape[1])
        return reorganize_tokens(x, scores, keep, num_prefix=self.num_prefix, fuse=self.fuse)

    def extra_repr(self) -> str:
        return f"keep_rate={self.keep_rate}, num_prefix={self.num_prefix}, fuse={self.fuse}"


__all__ = ["ClassAttention", "TokenReorganization"]
