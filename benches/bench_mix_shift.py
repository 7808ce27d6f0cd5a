"""Mix-shift and the depthwise convolution with layer norm, against the authors' formulation in
eager PyTorch and torch.compile, and the floor of the machine; and MS-MLP, whole.

The bars on the CPU are those of two threads and float32.  The floor is the longer of one read and
one write of x, and two operations for each tap of each place at the rate of torch's matrix product;
forward and backward together have that of the forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import eager_ms_mlp
import pytest
import timm
import torch
import viops
from harness import Floor, Harness
from torch import Tensor, nn
from viops.cases import Draw
from viops.ops.mix_shift import cases

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last

on_cpu = pytest.mark.device("cpu")
on_cuda = pytest.mark.device("cuda")

#: Of MS-MLP-T's first and third stage at 224: the shape, and the kernels of the issue's bars.
LARGE = (8, 96, 56, 56), (1, 1, 3, 5, 7)
SMALL = (8, 384, 14, 14), (1, 5, 5, 5, 7)


def compare(
    harness: Harness,
    title: str,
    shape: tuple[int, ...],
    functions: dict[str, Callable[..., Tensor]],
    parameters: list,
    *,
    backward: bool,
    bars: dict,
    dtype: torch.dtype = FLOAT32,
    memory_format: torch.memory_format = CONTIGUOUS,
    calls: int = 1,
) -> None:
    """Times functions of x of this shape and the parameters, lists of tensors among them."""

    def make(seed: int) -> tuple[Tensor, ...]:
        draw = Draw(dtype, str(harness.device), seed)
        x, *grads = (
            draw.normal(*shape).contiguous(memory_format=memory_format) for _ in range(1 + backward)
        )
        return x.requires_grad_(backward), *grads

    leaves = [
        tensor.requires_grad_(backward)
        for group in parameters
        for tensor in (group if isinstance(group, list) else [group])
        if isinstance(tensor, Tensor)
    ]

    def forward(function: Callable[..., Tensor], x: Tensor) -> Tensor:
        return function(x, *parameters)

    def forward_backward(
        function: Callable[..., Tensor], x: Tensor, grad_y: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients to x and all parameters for that of the output."""
        return torch.autograd.grad(function(x, *parameters), (x, *leaves), grad_y)

    run = forward_backward if backward else forward
    taps = sum(tensor.numel() for tensor in leaves if tensor.dim() == 4)
    flops = 2 * taps * shape[0] * shape[2] * shape[3]
    inputs = harness.input_sets(make, cold=True)
    layout = "channels_last" if memory_format is CHANNELS_LAST else "contiguous"
    size = f"B{shape[0]} C{shape[1]} {shape[2]}x{shape[3]} {str(dtype).removeprefix('torch.')}"
    with torch.set_grad_enabled(backward):
        harness.compare(
            f"{title} forward{' + backward' * backward}, {size}, {layout}",
            {name: functools.partial(run, function) for name, function in functions.items()},
            inputs=inputs,
            floor=Floor(bytes=2 * inputs[0][0].nbytes, flops=flops, dtype=dtype),
            bars=bars,
            calls=calls,
        )


def contenders(ours: Callable[..., Tensor], eager: Callable[..., Tensor]) -> dict:
    return {"viops": ours, "eager": eager, "compile": torch.compile(eager, dynamic=False)}


def _title(kernels: Sequence[int]) -> str:
    return f"mix_shift {','.join(map(str, kernels))}"


@on_cpu
@pytest.mark.parametrize(
    ("work", "memory_format", "backward", "bars"),
    [
        (LARGE, CONTIGUOUS, False, {"floor": ("<=", 2.4)}),
        (LARGE, CHANNELS_LAST, False, {"floor": ("<=", 3.2)}),
        (LARGE, CONTIGUOUS, True, {"eager": (">=", 3), "compile": (">=", 2.5)}),
        (LARGE, CHANNELS_LAST, True, {"eager": (">=", 3), "compile": (">=", 2.5)}),
        (SMALL, CONTIGUOUS, False, {"floor": ("<=", 3.0)}),
        (SMALL, CHANNELS_LAST, False, {"floor": ("<=", 3.0)}),
        (SMALL, CONTIGUOUS, True, {"eager": (">=", 2.5), "compile": (">=", 2.5)}),
        (SMALL, CHANNELS_LAST, True, {"eager": (">=", 2.5), "compile": (">=", 2.5)}),
    ],
    ids=str,
)
def bench_mix_shift(
    harness: Harness,
    work: tuple,
    memory_format: torch.memory_format,
    backward: bool,
    bars: dict,
) -> None:
    shape, kernels = work
    _, *parameters = cases.inputs(Draw(FLOAT32), (1, *shape[1:]), kernels)

    def planes(x: Tensor, *parameters: list) -> Tensor:
        return eager_ms_mlp.mix_shift(x.contiguous(), *parameters)

    functions = contenders(viops.mix_shift, eager_ms_mlp.mix_shift)
    if memory_format is CHANNELS_LAST:
        functions["eager, made contiguous"] = planes
    compare(
        harness,
        _title(kernels),
        shape,
        functions,
        parameters,
        backward=backward,
        bars={"cpu": bars},
        memory_format=memory_format,
    )


@on_cpu
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("shape", [(8, 96, 56, 56), (8, 384, 14, 14)], ids=str)
def bench_depthwise_norm(harness: Harness, shape: tuple[int, ...], backward: bool) -> None:
    """x is channels_last, as ConvNeXt's blocks hand it over; torch's in their better format."""
    _, *parameters = cases.depthwise_inputs(Draw(FLOAT32), (1, *shape[1:]), 7)

    def planes(x: Tensor, *parameters: Tensor) -> Tensor:
        return eager_ms_mlp.depthwise_norm(x.contiguous(), *parameters)

    bars = {"eager": (">=", 1.8), "eager, made contiguous": (">=", 1.8)}
    compare(
        harness,
        "depthwise_norm 7x7",
        shape,
        {
            **contenders(viops.depthwise_norm, eager_ms_mlp.depthwise_norm),
            "eager, made contiguous": planes,
        },
        parameters,
        backward=backward,
        bars={"cpu": bars if shape[1] == 96 and not backward else {}},
        memory_format=CHANNELS_LAST,
    )


@on_cpu
def bench_depthwise_norm_of_planes(harness: Harness) -> None:
    """x is contiguous, for which torch's convolution is another."""
    shape = (8, 96, 56, 56)
    _, *parameters = cases.depthwise_inputs(Draw(FLOAT32), (1, *shape[1:]), 7)
    compare(
        harness,
        "depthwise_norm 7x7",
        shape,
        contenders(viops.depthwise_norm, eager_ms_mlp.depthwise_norm),
        parameters,
        backward=False,
        bars={"cpu": {"eager": (">=", 1.8)}},
    )


@on_cuda
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("memory_format", [CONTIGUOUS, CHANNELS_LAST], ids=str)
@pytest.mark.parametrize("work", [((64, *LARGE[0][1:]), LARGE[1]), ((64, *SMALL[0][1:]), SMALL[1])])
def bench_mix_shift_on_gpu(
    harness: Harness, work: tuple, memory_format: torch.memory_format, backward: bool
) -> None:
    shape, kernels = work
    _, *parameters = cases.inputs(Draw(BFLOAT16, str(harness.device)), (1, *shape[1:]), kernels)
    bars: dict[str, tuple[str, float]] = {"eager": (">=", 5), "compile": (">=", 3)}
    if not backward:
        bars["floor"] = ("<=", 1 / 0.6)
    compare(
        harness,
        _title(kernels),
        shape,
        contenders(viops.mix_shift, eager_ms_mlp.mix_shift),
        parameters,
        backward=backward,
        bars={"cuda": bars},
        dtype=BFLOAT16,
        memory_format=memory_format,
        calls=20,
    )


@pytest.mark.parametrize(
    ("batch", "dtype", "training", "bars"),
    [
        pytest.param(4, FLOAT32, False, {"eager": (">=", 1.3)}, marks=on_cpu),
        pytest.param(4, FLOAT32, True, {"eager": (">=", 1.3)}, marks=on_cpu),
        pytest.param(64, BFLOAT16, True, {"eager": (">=", 1.5)}, marks=on_cuda),
    ],
)
def bench_ms_mlp(
    harness: Harness, batch: int, dtype: torch.dtype, training: bool, bars: dict
) -> None:
    """A whole model, or a training step of it without the optimizer."""
    torch.manual_seed(0)
    model = viops.models.ms_mlp_t(drop_path_rate=0.0)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)  # what blocks compute is to be seen in the result
    model = model.to(harness.device).train(training)
    _compare_models(
        harness,
        "MS-MLP-T",
        {
            "viops": model,
            "eager": eager_ms_mlp.EagerMSMLP(model).train(training),
            "eager, viops' linear layers": eager_ms_mlp.EagerMSMLP(model, True).train(training),
        },
        "head.weight",
        batch,
        dtype,
        training,
        bars,
    )


@pytest.mark.parametrize(
    ("batch", "dtype", "training"),
    [
        pytest.param(4, FLOAT32, False, marks=on_cpu),
        pytest.param(4, FLOAT32, True, marks=on_cpu),
        pytest.param(64, BFLOAT16, True, marks=on_cuda),
    ],
)
def bench_convnext(harness: Harness, batch: int, dtype: torch.dtype, training: bool) -> None:
    """timm's convnext_tiny, patched and as it is."""
    torch.manual_seed(0)
    plain = timm.create_model("convnext_tiny", ls_init_value=1.0).to(harness.device)
    patched = timm.create_model("convnext_tiny", ls_init_value=1.0).to(harness.device)
    patched.load_state_dict(plain.state_dict())
    _compare_models(
        harness,
        "convnext_tiny",
        {"viops": viops.patch.convnext(patched).train(training), "timm": plain.train(training)},
        "head.fc.weight",
        batch,
        dtype,
        training,
        {"timm": (">=", 1.0)},
    )


def _compare_models(
    harness: Harness,
    title: str,
    models: dict[str, nn.Module],
    classifier: str,
    batch: int,
    dtype: torch.dtype,
    training: bool,
    bars: dict,
) -> None:
    images = torch.randn(batch, 3, 224, 224, device=harness.device)

    def forward(model: nn.Module, images: Tensor) -> Tensor:
        with torch.autocast(harness.device.type, dtype, enabled=dtype is not FLOAT32):
            return model(images)

    def step(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
        """The loss, and of the gradients of all parameters that to the classifier's weight."""
        loss = forward(model, images).float().square().mean()
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(loss, list(parameters.values()))
        return loss, grads[list(parameters).index(classifier)]

    with torch.set_grad_enabled(training):
        record = harness.compare(
            f"{title} {'training step' if training else 'forward'}, 224x224, B{batch}, "
            f"{str(dtype).removeprefix('torch.')}",
            {
                name: functools.partial(step if training else forward, model)
                for name, model in models.items()
            },
            inputs=[(images,)],
            bars={harness.device.type: bars},
        )
    rates = [f"{n} {batch / row['best']:.3g}" for n, row in record["contenders"].items()]
    record["notes"]["images/s"] = ", ".join(rates)


@on_cpu
@pytest.mark.parametrize(("requires_grad", "limit"), [(False, 12e-6), (True, 30e-6)])
def bench_depthwise_norm_overhead(harness: Harness, requires_grad: bool, limit: float) -> None:
    x, *parameters = cases.depthwise_inputs(Draw(FLOAT32), (1, 4, 3, 3), 3)
    x.requires_grad_(requires_grad)
    harness.compare(
        f"depthwise_norm forward{' with requires_grad' * requires_grad}, "
        "a tiny call: B1 C4 3x3 float32",
        {
            "viops": lambda: viops.depthwise_norm(x, *parameters),
            "eager": lambda: eager_ms_mlp.depthwise_norm(x, *parameters),
        },
        calls=1000,
        bars={"cpu": {"viops": ("<=", limit)}},
    )


@on_cpu
def bench_mix_shift_overhead(harness: Harness) -> None:
    """Five groups of two directions: twenty tensors to check, and to bring together."""
    x, *parameters = cases.inputs(Draw(FLOAT32), (1, 5, 3, 3), (1, 1, 1, 1, 1))
    harness.compare(
        "mix_shift 1,1,1,1,1 forward, a tiny call: B1 C5 3x3 float32",
        {
            "viops": lambda: viops.mix_shift(x, *parameters),
            "eager": lambda: eager_ms_mlp.mix_shift(x, *parameters),
        },
        calls=1000,
    )
