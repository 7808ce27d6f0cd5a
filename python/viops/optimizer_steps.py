"""How many steps optimizers have taken: one that writes through `.data` leaves no other trace."""

from __future__ import annotations

import functools

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

_count = 0


def _after_step(*_: object) -> None:
    global _count
    if not torch.compiler.is_compiling():
        _count += 1


@functools.cache
def start() -> None:
    """Counts steps from now on."""
    register_optimizer_step_post_hook(_after_step)


def count() -> int:
    """Steps that all optimizers of the process have taken since `start`."""
    return _count
