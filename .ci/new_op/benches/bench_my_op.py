"""My op against eager PyTorch, torch.compile, and the floor.

Bars, once there are some, are those of two threads and float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import viops
from harness import Floor, Harness
from torch import Tensor
from viops.ops.my_op import reference

SIZE = "B32 N197 C384 float32"


def make_input(harness: Harness) -> Tensor:
    """x [B, N, C] of the size above: 9.7 MB."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(32, 197, 384, generator=generator).to(harness.device)


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def bench_forward(harness: Harness) -> None:
    x = make_input(harness)
    compiled_reference = compiled(reference.my_op)
    harness.compare(
        f"my_op forward, {SIZE}",
        {
            "viops": lambda: viops.my_op(x, scale=0.7),
            "eager": lambda: reference.my_op(x, scale=0.7),
            "compile": lambda: compiled_reference(x, scale=0.7),
        },
        floor=Floor(bytes=2 * x.nbytes),
    )


def bench_backward(harness: Harness) -> None:
    x = make_input(harness).requires_grad_()
    grad_y = torch.randn_like(x)
    compiled_reference = compiled(reference.my_op)

    def contender(function: Callable) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(x, scale=0.7), x, grad_y)

    harness.compare(
        f"my_op forward + backward, {SIZE}",
        {
            "viops": contender(viops.my_op),
            "eager": contender(reference.my_op),
            "compile": contender(compiled_reference),
        },
        floor=Floor(bytes=4 * x.nbytes),
    )
