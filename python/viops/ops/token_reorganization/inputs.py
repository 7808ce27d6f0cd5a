"""Draws that the cases of token reorganization are made of."""

from __future__ import annotations

from torch import Tensor

from ...cases import Draw


def fused_qkv(
    draw: Draw, batch: int, num_heads: int, num_tokens: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, N, D]: the views that a fused qkv linear gives."""
    qkv = draw.normal(batch, num_tokens, 3, num_heads, head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return q, k, v


def queries(
    draw: Draw, batch: int, num_heads: int, num_tokens: int, head_dim: int, count: int = 2
) -> tuple[Tensor, ...]:
    """q, k (and v), each [B, H, N, D] and contiguous."""
    shape = (batch, num_heads, num_tokens, head_dim)
    return tuple(draw.normal(*shape) for _ in range(count))


def tokens_and_scores(
    draw: Draw, batch: int, num_tokens: int, channels: int, num_prefix: int = 1
) -> tuple[Tensor, Tensor]:
    """x [B, N, C] and scores [B, N - num_prefix] as attention gives them."""
    x = draw.normal(batch, num_tokens, channels)
    return x, draw.probabilities(batch, num_tokens - num_prefix)


def tokens_and_index(
    draw: Draw,
    batch: int,
    num_patches: int,
    channels: int,
    keep: int,
    num_prefix: int = 1,
    fuse: bool = True,
) -> tuple[Tensor, Tensor, int]:
    """tokens [B, M, C], index [B, keep] and num_patches."""
    tokens = draw.normal(batch, num_prefix + keep + fuse, channels)
    return tokens, draw.choices(batch, num_patches, keep), num_patches
