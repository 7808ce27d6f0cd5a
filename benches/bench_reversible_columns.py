"""The reversible step and its way back against the formula in eager PyTorch and torch.compile, and
the floor of the machine: one read of each operand, one write of each result; and RevCol, whole,
against the authors' formulation, and against itself with all features stored.

The bars on the CPU are those of two threads and float32.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import viops
from eager_revcol import EagerRevCol
from harness import Floor, Harness
from torch import Tensor, nn
from viops.cases import Draw
from viops.cli.measure import held_bytes
from viops.models.revcol import CONFIGS, RevCol
from viops.ops.reversible_columns import carry
from viops.ops.reversible_columns.reference import tilt

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
PLANES, ROWS = torch.contiguous_format, torch.channels_last

on_cpu = pytest.mark.device("cpu")
on_cuda = pytest.mark.device("cuda")

#: The first level of a tiny network's columns, and its last.
FIRST = (8, 64, 56, 56)
LAST = (8, 512, 7, 7)
#: The first level of a small network's, at the batch of a GPU.
FIRST_ON_GPU = (64, 64, 56, 56)

#: Calls queued in one sample on a GPU, where one is shorter than its launch.
CALLS_ON_GPU = 20


def step(f: Tensor, x: Tensor, alpha: Tensor) -> Tensor:
    """As the authors' column writes it, alpha clamped before."""
    return f + alpha.view(1, -1, 1, 1) * x


def step_backward(
    out: Tensor, f: Tensor, alpha: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    a = alpha.view(1, -1, 1, 1)
    x = (out - f) / a
    return x, a * grad_out, (grad_out * x).sum(dim=(0, 2, 3))


def split(v: Tensor) -> tuple[Tensor, Tensor]:
    rounded = (v * tilt(FLOAT32)).float()
    return rounded, (v - rounded.double()).float()


def step_with_rest(f: Tensor, x: Tensor, x_rest: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """As one would write it: in float64, the result in two parts."""
    return split(f.double() + alpha.double().view(1, -1, 1, 1) * (x.double() + x_rest.double()))


def step_with_rest_backward(
    out: Tensor, out_rest: Tensor, f: Tensor, alpha: Tensor, grad_out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = alpha.double().view(1, -1, 1, 1)
    x, x_rest = split((out.double() + out_rest.double() - f.double()) / a)
    grad = grad_out.double()
    grad_alpha = (grad * x.double()).sum(dim=(0, 2, 3)).float()
    return x, x_rest, (a * grad).float(), grad_alpha


@dataclass(frozen=True)
class Form:
    """The step or its way back; `planes` counts features read and written, f among them."""

    name: str
    operands: str
    planes: int
    run: Callable
    formula: Callable

    def contenders(self) -> dict[str, Callable]:
        compiled = torch.compile(self.formula, dynamic=False)
        return {"viops": self.run, "eager": self.formula, "compile": compiled}

    def draw(
        self,
        harness: Harness,
        shape: tuple[int, ...],
        memory_format: torch.memory_format = PLANES,
        dtype: torch.dtype = FLOAT32,
        f_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> tuple[Tensor, ...]:
        draw = Draw(dtype, str(harness.device), seed)

        def operand(name: str) -> Tensor:
            if name == "alpha":
                return draw.normal(shape[1]).abs() + 0.5
            values = draw.normal(*shape, dtype=f_dtype if name == "f" else dtype)
            values = values * 2.0**-26 if name == "rest" else values
            return values.contiguous(memory_format=memory_format)

        return tuple(operand(name) for name in self.operands.split())


BARE = [
    Form("reversible_step", "f x alpha", 3, viops.reversible_step, step),
    Form(
        "reversible_step_backward",
        "out f alpha grad_out",
        5,
        viops.reversible_step_backward,
        step_backward,
    ),
]
#: What a chain runs.
WITH_REST = [
    Form("step with rest", "f x rest alpha", 5, carry.step, step_with_rest),
    Form(
        "step with rest, backward",
        "out rest f alpha grad_out",
        7,
        carry.step_backward,
        step_with_rest_backward,
    ),
]
EACH_BARE = pytest.mark.parametrize("form", BARE, ids=lambda form: form.name)
EACH_FORM = pytest.mark.parametrize("form", BARE + WITH_REST, ids=lambda form: form.name)


def compare(
    harness: Harness,
    form: Form,
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    bars: dict,
    dtype: torch.dtype = FLOAT32,
    f_dtype: torch.dtype | None = None,
    graph: bool = False,
) -> None:
    """Cold sets: between a column's step and its way back lies the rest of the network."""
    f_dtype = f_dtype or dtype
    draw = functools.partial(form.draw, harness, shape, memory_format, dtype, f_dtype)
    inputs = harness.input_sets(lambda seed: draw(seed=seed), cold=True)
    layout = "channels_last" if memory_format is ROWS else "contiguous"
    names = [str(name).removeprefix("torch.") for name in (dtype, f_dtype)]
    mixed = f", f {names[1]}" * (f_dtype is not dtype)
    moved = (form.planes - 1) * dtype.itemsize + f_dtype.itemsize
    harness.compare(
        f"{form.name}, {list(shape)} {layout} {names[0]}{mixed}{', as a CUDA graph' * graph}",
        form.contenders(),
        inputs=inputs,
        floor=Floor(bytes=math.prod(shape) * moved),
        bars=bars,
        other_result=("eager", "compile") if dtype is BFLOAT16 else (),  # they round on the way
        calls=CALLS_ON_GPU if graph else len(inputs),
        graph=graph,
    )


@on_cpu
@pytest.mark.parametrize(
    ("shape", "bars"),
    [(FIRST, {"floor": ("<=", 1.3), "compile": (">=", 1.0)}), (LAST, {})],
    ids=["first", "last"],
)
@pytest.mark.parametrize("memory_format", [PLANES, ROWS], ids=["planes", "rows"])
@EACH_FORM
def bench_reversible_step(
    harness: Harness,
    form: Form,
    memory_format: torch.memory_format,
    shape: tuple[int, ...],
    bars: dict,
) -> None:
    compare(harness, form, shape, memory_format, {"cpu": bars})


@on_cpu
@pytest.mark.parametrize(
    ("dtype", "f_dtype"), [(BFLOAT16, BFLOAT16), (FLOAT32, BFLOAT16)], ids=["bfloat16", "mixed"]
)
@EACH_BARE
def bench_reversible_step_of_half_types(
    harness: Harness, form: Form, dtype: torch.dtype, f_dtype: torch.dtype
) -> None:
    compare(harness, form, FIRST, ROWS, {}, dtype, f_dtype)


@on_cuda
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("memory_format", [PLANES, ROWS], ids=["planes", "rows"])
@EACH_BARE
def bench_reversible_step_on_gpu(
    harness: Harness, form: Form, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    """As a CUDA graph, so that kernels and not launches are timed: at least 0.75 of the copy."""
    bars = {"floor": ("<=", 1 / 0.75), "compile": (">=", 1.0)}
    compare(harness, form, FIRST_ON_GPU, memory_format, {"cuda": bars}, dtype, graph=True)


@on_cuda
@pytest.mark.parametrize("form", WITH_REST, ids=lambda form: form.name)
def bench_reversible_step_with_rest_on_gpu(harness: Harness, form: Form) -> None:
    compare(harness, form, FIRST_ON_GPU, ROWS, {"cuda": {"floor": ("<=", 1 / 0.75)}}, graph=True)


def compare_tiny(harness: Harness, title: str, form: Form, inputs: tuple, most: float) -> None:
    harness.compare(
        f"{title}, a tiny call: [1, 4, 2, 2] float32",
        {"viops": form.run, "eager": form.formula},
        inputs=[inputs],
        bars={"cpu": {"viops": ("<=", most)}},
        calls=100,
    )


@on_cpu
@EACH_FORM
def bench_reversible_step_overhead(harness: Harness, form: Form) -> None:
    compare_tiny(harness, form.name, form, form.draw(harness, (1, 4, 2, 2)), 12e-6)


@on_cpu
def bench_reversible_step_overhead_with_grad(harness: Harness) -> None:
    form = BARE[0]
    inputs = tuple(t.requires_grad_() for t in form.draw(harness, (1, 4, 2, 2)))
    compare_tiny(harness, f"{form.name} with requires_grad", form, inputs, 30e-6)


def revcol(num_columns: int | None, name: str = "revcol_t", **options: object) -> RevCol:
    """Of that size, with so many columns or its own; what branches compute is to be seen."""
    torch.manual_seed(0)
    config = CONFIGS[name]
    model = RevCol(replace(config, num_columns=num_columns or config.num_columns), **options)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("gamma"):
                parameter.fill_(0.1)
    return model.train()


def stored(model: RevCol) -> RevCol:
    other = copy.deepcopy(model)
    other.reversible = False
    return other


def loss_of(model: nn.Module, images: Tensor, dtype: torch.dtype = FLOAT32) -> Tensor:
    with torch.autocast(images.device.type, dtype, enabled=dtype is not FLOAT32):
        return model(images).float().square().mean()


@pytest.mark.parametrize(
    ("name", "batch", "dtype", "bars"),
    [
        pytest.param(
            "revcol_t",
            *(4, FLOAT32),
            {"official form": (">=", 1.15), "stored": ("<=", 1.35)},
            marks=on_cpu,
        ),
        pytest.param("revcol_s", 64, BFLOAT16, {"official form": (">=", 1.4)}, marks=on_cuda),
    ],
)
def bench_revcol(harness: Harness, name: str, batch: int, dtype: torch.dtype, bars: dict) -> None:
    """A training step without the optimizer; the official form is reversible column by column."""
    model = revcol(None, name, drop_path_rate=0.0).to(harness.device)
    images = torch.randn(batch, 3, 224, 224, device=harness.device)
    models = {
        "viops": model,
        "stored": stored(model),
        "official form": EagerRevCol(model),
        "official form, stored": EagerRevCol(model, reversible=False),
        "official form, viops' linear layers": EagerRevCol(model, grid_linear=True),
    }

    def step(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
        """The loss, and the gradient to the stem's convolution."""
        model.zero_grad(set_to_none=True)
        loss = loss_of(model, images, dtype)
        loss.backward()
        return loss.detach(), model.stem[0].weight.grad

    record = harness.compare(
        f"{name} training step, 224x224, B{batch}, {str(dtype).removeprefix('torch.')}",
        {key: functools.partial(step, value) for key, value in models.items()},
        inputs=[(images,)],
        bars={harness.device.type: bars},
        # reversible in float32, errors grow with the columns; in bfloat16 all of them round
        other_result=[key for key in models if key != "viops" and dtype is BFLOAT16],
        patience=3,  # by its operations alone it would take 4/3 of the stored form's time
    )
    rates = [f"{key} {batch / row['best']:.3g}" for key, row in record["contenders"].items()]
    record["notes"]["images/s"] = ", ".join(rates)


@on_cpu
def bench_revcol_activations(harness: Harness) -> None:
    """What waits for backward between the passes, with random states for stochastic depth."""
    images = torch.randn(1, 3, 224, 224)
    short, long = revcol(4), revcol(16)
    models = {
        "viops": long,
        "viops, 4 columns": short,
        "stored": stored(long),
        "official form": EagerRevCol(long),
    }
    harness.compare_numbers(
        "RevCol-T with 16 columns, forward in training, 224x224, B1 float32",
        {
            name: functools.partial(held_bytes, functools.partial(loss_of, model, images), "cpu")
            for name, model in models.items()
        },
        what="what tensors hold until backward",
        unit="bytes",
        bars={
            "cpu": {
                "viops, 4 columns": ("<=", 1.01),
                "stored": ("<=", 1 / 12),
                "official form": ("<=", 1 / 4),
            }
        },
    )


def error_of(model: nn.Module, images: Tensor, truth: nn.Module) -> float:
    """norm(difference) / norm(truth) of the gradients to all parameters."""

    def gradients(model: nn.Module) -> Tensor:
        model.zero_grad(set_to_none=True)
        loss_of(model, images).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return torch.cat([grads[name].flatten().double() for name in sorted(grads)])

    wanted = gradients(truth)
    return ((gradients(model) - wanted).norm() / wanted.norm()).item()


@on_cpu
@pytest.mark.parametrize("num_columns", [8, 16])
def bench_revcol_gradient_error(harness: Harness, num_columns: int) -> None:
    """Every alpha is 0.5, as at the beginning; the official form against its own stored one."""
    images = torch.randn(2, 3, 64, 64)
    model = revcol(num_columns, drop_path_rate=0.0)
    official = EagerRevCol(model), EagerRevCol(model, reversible=False)
    harness.compare_numbers(
        f"RevCol-T with {num_columns} columns, gradients against stored, 64x64, B2 float32",
        {
            "viops": lambda: error_of(model, images, stored(model)),
            "official form": lambda: error_of(official[0], images, official[1]),
        },
        what="norm(difference) / norm(stored) of all parameters' gradients",
        unit="",
        bars={"cpu": {"viops": ("<=", 1e-4)}} if num_columns == 8 else {},
    )
