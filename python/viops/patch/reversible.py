"""Residual branches as two-stream reversible blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from ..ops.reversible_columns.module import ReversibleBlocks


def reversible(blocks: Iterable[Sequence[nn.Module]], **options: Any) -> ReversibleBlocks:
    """A module of two streams from pairs of residual branches, such as a transformer block's two:

        x1 = x1 + first(x2);  x2 = x2 + second(x1)

    Training keeps the last pair's outputs alone, whatever the number of pairs.  It is another
    function than the branches' one stream, x = x + first(x); x = x + second(x): models are trained
    with it, as RevNets and reversible vision transformers are.

    Args:
        blocks: pairs of modules, each [B, ...] -> [B, ...] of the same shape, without the residual
            sum: for timm's vision transformers ``[(nn.Sequential(b.norm1, b.attn),
            nn.Sequential(b.norm2, b.mlp)) for b in model.blocks]``.
        options: of `viops.nn.ReversibleBlocks`.

    Returns:
        A module, called as ``y1, y2 = module(x1, x2)``; the branches are the given ones.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: RevNet (Gomez et al., NeurIPS 2017, arXiv:1707.04585), section 3.1.
    """
    return ReversibleBlocks(blocks, **options)
