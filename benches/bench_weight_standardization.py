"""Weight standardization against the official formulation in eager PyTorch and torch.compile, and
the floor of the machine: one read and one write of the weights.

The bars on the CPU are those of two threads and float32.  Forward and backward together, too, are
counted in floors of the forward.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import viops
from harness import Floor, Harness
from torch import Tensor
from viops.cases import Draw
from viops.ops.weight_standardization import reference

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16

on_cpu = pytest.mark.device("cpu")
on_cuda = pytest.mark.device("cuda")

#: A convolution of 3 x 3 and one of 1 x 1 from a ResNet-50's last stage; short filters.
LARGE = (512, 512, 3, 3)
POINTWISE = (2048, 512, 1, 1)
DEPTHWISE = (4096, 1, 3, 3)

#: Calls queued in one sample on a GPU, where one is shorter than its launch.
CALLS_ON_GPU = 20


def official(weight: Tensor) -> Tensor:
    """[O, C, kh, kw] as the authors' Conv2d takes it: means axis by axis, then var's root."""
    mean = weight.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
    centred = weight - mean
    std = (centred.flatten(1).var(dim=1) + 1e-5).sqrt().view(-1, 1, 1, 1)
    return centred / std.expand_as(centred)


def contenders() -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "viops": viops.standardize_weight,
        "eager": official,
        "compile": torch.compile(official, dynamic=False),
    }


def forward_backward(function: Callable) -> Callable[..., object]:
    """Gradients to the weights for those of the outputs."""

    def run(weight: Tensor, grad_out: Tensor) -> object:
        return torch.autograd.grad(function(weight), weight, grad_out)

    return run


def inputs_of(
    harness: Harness, shape: tuple[int, ...], dtype: torch.dtype, backward: bool
) -> list[tuple]:
    """Sets of a weight and, for the backward, a gradient of its shape.

    Large ones are cold, as a network's are: it has more than caches hold, and takes each once.
    """

    def make(seed: int) -> tuple[Tensor, ...]:
        draw = Draw(dtype, str(harness.device), seed)
        weight = draw.normal(*shape).requires_grad_(backward)
        return (weight, draw.normal(*shape)) if backward else (weight,)

    return harness.input_sets(make, cold=True)


def title(shape: tuple[int, ...], dtype: torch.dtype, backward: bool, graph: bool = False) -> str:
    what = f"standardize_weight forward{' + backward' * backward}"
    name = str(dtype).removeprefix("torch.")
    return f"{what}, {list(shape)} {name}{', as a CUDA graph' * graph}"


@on_cpu
@pytest.mark.parametrize(
    ("shape", "backward", "bars"),
    [
        (LARGE, False, {"floor": ("<=", 1.1)}),
        (LARGE, True, {"floor": ("<=", 2.5)}),
        (POINTWISE, False, {"floor": ("<=", 1.1)}),
        (POINTWISE, True, {"floor": ("<=", 2.5)}),
        (DEPTHWISE, False, {}),
        (DEPTHWISE, True, {}),
    ],
)
def bench_standardize_weight(
    harness: Harness, shape: tuple[int, ...], backward: bool, bars: dict
) -> None:
    inputs = inputs_of(harness, shape, FLOAT32, backward)
    functions = contenders()
    harness.compare(
        title(shape, FLOAT32, backward),
        {name: forward_backward(f) for name, f in functions.items()} if backward else functions,
        inputs=inputs,
        floor=Floor(bytes=2 * inputs[0][0].nbytes),
        bars={"cpu": bars},
        calls=len(inputs),
    )


@on_cuda
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("shape", [LARGE, POINTWISE])
def bench_standardize_weight_on_gpu(
    harness: Harness, shape: tuple[int, ...], dtype: torch.dtype, backward: bool
) -> None:
    """As a CUDA graph, so that kernels and not launches are timed: at least 0.75 of the copy."""
    inputs = inputs_of(harness, shape, dtype, backward)
    functions = contenders()
    read_and_written = 5 if backward else 2
    harness.compare(
        title(shape, dtype, backward, graph=True),
        {name: forward_backward(f) for name, f in functions.items()} if backward else functions,
        inputs=inputs,
        floor=Floor(bytes=read_and_written * inputs[0][0].nbytes),
        bars={"cuda": {"floor": ("<=", 1 / 0.75), "compile": (">=", 1.3)}},
        other_result=("eager", "compile") if dtype is BFLOAT16 else (),  # they round on the way
        calls=CALLS_ON_GPU,
        graph=True,
    )


def resnet50_shapes() -> list[tuple[int, int, int, int]]:
    """The convolutions' weights of a ResNet-50: 53 of them, 23.5 million elements."""
    shapes = [(64, 3, 7, 7)]
    channels = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(depth):
            shapes += [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, channels, 1, 1))
            channels = 4 * width
    return shapes


@pytest.mark.parametrize("backward", [False, True])
def bench_standardize_weights(harness: Harness, backward: bool) -> None:
    """All of a ResNet-50's weights, each in a call of its own and all in one."""
    draw = Draw(FLOAT32, str(harness.device))
    weights = [draw.normal(*shape).requires_grad_(backward) for shape in resnet50_shapes()]
    grads = [torch.randn_like(weight) for weight in weights]
    functions: dict[str, Callable[[], list[Tensor]]] = {
        "viops": lambda: viops.standardize_weights(weights),
        "a loop of viops": lambda: [viops.standardize_weight(weight) for weight in weights],
        "eager": lambda: [official(weight) for weight in weights],
    }
    if backward:
        functions = {
            name: lambda call=call: torch.autograd.grad(call(), weights, grads)
            for name, call in functions.items()
        }
    num_bytes = sum(weight.nbytes for weight in weights)
    what = f"forward{' + backward' * backward}, ResNet-50's {len(weights)} float32"
    harness.compare(
        f"standardize_weights {what}",
        functions,
        floor=Floor(bytes=(5 if backward else 2) * num_bytes),
        calls=CALLS_ON_GPU if harness.on_gpu else 1,
    )


@on_cpu
@pytest.mark.parametrize(("requires_grad", "limit"), [(False, 12e-6), (True, 30e-6)])
def bench_standardize_weight_overhead(harness: Harness, requires_grad: bool, limit: float) -> None:
    weight = Draw(FLOAT32, str(harness.device)).normal(4, 4, 3, 3).requires_grad_(requires_grad)
    suffix = " with requires_grad" if requires_grad else ""
    harness.compare(
        f"standardize_weight forward{suffix}, a tiny call: [4, 4, 3, 3] float32",
        {
            "viops": lambda: viops.standardize_weight(weight),
            "eager": lambda: official(weight),
            "reference": lambda: reference.standardize_weight(weight),
        },
        calls=1000,
        bars={"cpu": {"viops": ("<=", limit)}},
    )
