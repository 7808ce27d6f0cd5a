"""Modules of my_op, for models that are written anew."""

from __future__ import annotations

from torch import Tensor, nn

from .op import my_op


class MyOp(nn.Module):
    """Multiplies each element by a number.

    Args:
        scale: the factor.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, C] -> y [B, N, C], as the function gives it."""
        return my_op(x, scale=self.scale)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


__all__ = ["MyOp"]
