"""Stochastic depth, from Huang et al., arXiv:1603.09382."""

from __future__ import annotations

from torch import Tensor, nn


class DropPath(nn.Module):
    """In training, drops a branch for each image with this probability, and scales what stays."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """x [B, ...] -> [B, ...]."""
        if not self.training or self.probability == 0:
            return x
        keep = 1 - self.probability
        kept = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep)
        return x * (kept / keep if keep > 0 else kept)

    def extra_repr(self) -> str:
        return f"probability={self.probability:.3g}"
