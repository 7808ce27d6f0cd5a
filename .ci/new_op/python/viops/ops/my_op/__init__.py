"""My op: see README.md beside this file."""

from .op import my_op

__all__ = ["my_op"]
