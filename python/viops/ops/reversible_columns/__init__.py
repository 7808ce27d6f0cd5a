"""Reversible columns, from RevCol: the step from column to column, and its way back."""

from .op import reversible_step, reversible_step_backward

__all__ = ["reversible_step", "reversible_step_backward"]
