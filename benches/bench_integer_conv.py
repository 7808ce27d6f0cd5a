"""INT16 convolutions against torch's float32 ones, which on a CPU are oneDNN's.

Bars are ratios to the faster of two: `conv2d` of channels_last tensors, and the same with filters
that oneDNN has reordered before.  Filters of viops are packed before too, as layers keep them.
A layer is timed on one thread and on two.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
import viops
from harness import Harness
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from viops.cases import Draw
from viops.ops.integer_conv import kernels

FLOAT32 = torch.float32
on_cpu = pytest.mark.device("cpu")
on_cuda = pytest.mark.device("cuda")
threads = pytest.mark.parametrize("num_threads", [1, 2])

#: What computes in float32: its results differ by the rounding to 13 bits.
ROUNDED_OTHERWISE = ("conv2d", "conv2d, prepacked")


class Layer(NamedTuple):
    """A convolution of square images, padded so that they keep their size but for the stride."""

    size: int
    channels: int
    filters: int
    kernel: int
    stride: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def window(self) -> kernels.Window:
        return (self.stride,) * 2, (self.padding,) * 2, (1, 1), 1

    def __str__(self) -> str:
        stride = f", stride {self.stride}" * (self.stride > 1)
        kernel = f"{self.kernel}x{self.kernel}"
        return f"{self.size}x{self.size} {self.channels}->{self.filters} {kernel}{stride}"

    def tensors(self, draw: Draw, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, w and a gradient to y."""
        out = -(-self.size // self.stride)
        fan_in = self.channels * self.kernel**2
        x = draw.normal(batch, self.channels, self.size, self.size)
        w = draw.normal(self.filters, self.channels, self.kernel, self.kernel) / fan_in**0.5
        grad = draw.normal(batch, self.filters, out, out)
        return tuple(t.contiguous(memory_format=torch.channels_last) for t in (x, w, grad))

    def macs(self, batch: int) -> int:
        out = -(-self.size // self.stride)
        return batch * out**2 * self.filters * self.channels * self.kernel**2


THREE = (Layer(56, 64, 64, 3), Layer(28, 128, 128, 3), Layer(14, 256, 256, 3))
ONE = (Layer(56, 256, 64, 1), Layer(7, 512, 2048, 1))
OTHERS = (Layer(56, 64, 256, 1), Layer(7, 512, 512, 3), Layer(112, 3, 64, 7))
STRIDED = (Layer(56, 128, 128, 3, 2),)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


def prepacked(layer: Layer, x: Tensor, w: Tensor) -> Callable[[Tensor], Tensor]:
    """oneDNN's convolution with filters in the order that it prefers for such images."""
    stride, padding, dilation, groups = layer.window
    reorder = torch._C._nn.mkldnn_reorder_conv2d_weight
    reordered = reorder(w.to_mkldnn(), padding, stride, dilation, groups, list(x.shape))
    convolve = torch.ops.mkldnn._convolution_pointwise
    return lambda x: convolve(x, reordered, None, padding, stride, dilation, groups, "none", [], "")


def compare(
    harness: Harness, title: str, contenders: dict, limit: float | None, macs: int, **options: Any
) -> None:
    """The bar holds against each of the float32 contenders."""
    bars = {} if limit is None else {n: ("<=", limit) for n in contenders if n != "viops"}
    names = [name for name in contenders if name != "viops"]
    with torch.no_grad():
        record = harness.compare(
            title, contenders, bars={"cpu": bars}, other_result=names, **options
        )
    rates = [f"{n} {macs / row['best'] / 1e9:.0f}" for n, row in record["contenders"].items()]
    record["notes"]["1e9 multiply-adds/s"] = ", ".join(rates)


def with_limits(limits: dict) -> list:
    return [(layer, limit) for layers, limit in limits.items() for layer in layers]


@on_cpu
@threads
@pytest.mark.parametrize(
    ("layer", "limit"), with_limits({THREE: 0.68, ONE: 0.7, STRIDED: 0.75, OTHERS: None})
)
def bench_integer_conv2d(
    harness: Harness, layer: Layer, limit: float | None, num_threads: int
) -> None:
    x, w, _ = layer.tensors(Draw(FLOAT32), 8)
    integers, filters = viops.quantize_dfp(x), viops.quantize_dfp(w)
    stride, padding = layer.stride, layer.padding
    with on_threads(num_threads):
        compare(
            harness,
            f"integer_conv2d of integers, B8 {layer}, {num_threads} threads",
            {
                "viops": lambda _: viops.integer_conv2d(integers, filters, None, stride, padding),
                "conv2d": lambda x: F.conv2d(x, w, None, stride, padding),
                "conv2d, prepacked": prepacked(layer, x, w),
            },
            limit,
            layer.macs(8),
            inputs=[(x,)],
        )


@on_cpu
@threads
@pytest.mark.parametrize(
    ("layer", "limit"), with_limits({THREE: 0.72, ONE: 0.9, STRIDED: None, OTHERS: None})
)
def bench_integer_conv2d_of_floats(
    harness: Harness, layer: Layer, limit: float | None, num_threads: int
) -> None:
    """With the search for the largest magnitude and the rounding of the images."""
    x, w, _ = layer.tensors(Draw(FLOAT32), 8)
    filters = viops.quantize_dfp(w)
    stride, padding = layer.stride, layer.padding
    with on_threads(num_threads):
        compare(
            harness,
            f"integer_conv2d of floats, B8 {layer}, {num_threads} threads",
            {
                "viops": lambda x: viops.integer_conv2d(x, filters, None, stride, padding),
                "conv2d": lambda x: F.conv2d(x, w, None, stride, padding),
                "conv2d, prepacked": prepacked(layer, x, w),
            },
            limit,
            layer.macs(8),
            inputs=[(x,)],
        )


def float_backward(layer: Layer, w: Tensor, need_x: bool) -> Callable[[Tensor, Tensor], Tensor]:
    stride, padding, dilation, groups = layer.window
    mask = [need_x, not need_x, False]

    def run(grad: Tensor, x: Tensor) -> Tensor:
        found = torch.ops.aten.convolution_backward(
            grad, x, w, None, stride, padding, dilation, False, [0, 0], groups, mask
        )
        return found[0 if need_x else 1]

    return run


@on_cpu
@threads
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("need_x", [True, False])
@pytest.mark.parametrize(("layer", "limit"), with_limits({THREE: 0.75, ONE + STRIDED: None}))
def bench_integer_conv2d_backward(
    harness: Harness,
    layer: Layer,
    limit: float | None,
    need_x: bool,
    quantized: bool,
    num_threads: int,
) -> None:
    """The gradient to the images or to the filters, of a gradient in integers or in floats."""
    x, w, grad = layer.tensors(Draw(FLOAT32), 8)
    integers, filters, grads = map(viops.quantize_dfp, (x, w, grad))
    window = layer.window
    of_grad = *grads, grads.bits

    def of_integers(grad: Tensor, x: Tensor) -> Tensor:
        if need_x:
            of_filters = *filters, filters.bits
            return kernels.native_input_gradient(*of_grad, *of_filters, x.shape[2:], window)
        return kernels.native_weight_gradient(*of_grad, *integers, 13, w.shape, window)

    def of_floats(grad: Tensor, x: Tensor) -> Tensor:
        bits = 13, 13, 13
        return kernels.native_conv2d_backward(
            grad, *integers, *filters, *window, *bits, True, 0, None, need_x, not need_x
        )[0 if need_x else 1]

    kind = "integers" if quantized else "floats"
    with on_threads(num_threads):
        compare(
            harness,
            f"integer_conv2d, gradient to {'x' if need_x else 'w'} from {kind}, B8 {layer}, "
            f"{num_threads} threads",
            {
                "viops": of_integers if quantized else of_floats,
                "conv2d": float_backward(layer, w, need_x),
            },
            limit,
            layer.macs(8),
            inputs=[(grad, x)],
        )


@on_cpu
@pytest.mark.parametrize("bits", [7, 13, 14, 15])
def bench_integer_conv2d_bits(harness: Harness, bits: int) -> None:
    """More bits, shorter chains: what more of their ends cost."""
    layer = Layer(14, 256, 256, 3)
    x, w, _ = layer.tensors(Draw(FLOAT32), 8)
    integers, filters = viops.quantize_dfp(x, bits), viops.quantize_dfp(w, bits)
    compare(
        harness,
        f"integer_conv2d of {bits} bits, B8 {layer}",
        {
            "viops": lambda _: viops.integer_conv2d(integers, filters, None, 1, 1),
            "conv2d": lambda x: F.conv2d(x, w, None, 1, 1),
        },
        None,
        layer.macs(8),
        inputs=[(x,)],
    )


def resnet50s(scaling: str = "power_of_two") -> dict[str, nn.Module]:
    """The same network twice."""
    torch.manual_seed(0)
    plain = timm.create_model("resnet50").to(memory_format=torch.channels_last)
    return {
        "viops": viops.patch.int16(copy.deepcopy(plain), scaling=scaling),
        "float32": plain,
    }


def with_norms_folded(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose batch norms are in the weights before them: float32 at its best."""
    folded = copy.deepcopy(model).eval()
    for module in folded.modules():
        children = list(module._modules.items())
        for (name, conv), (after, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                module._modules[name] = fuse_conv_bn_eval(conv, norm)
                module._modules[after] = nn.Identity()
    return folded.to(memory_format=torch.channels_last)


def training_step(model: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    """The loss and the gradients of all parameters; weights are new in each step."""
    for module in model.modules():
        if isinstance(module, (viops.nn.Int16Conv2d, viops.nn.Int16Linear)):
            module.forget()
    classes = torch.arange(len(images))
    loss = F.cross_entropy(model(images), classes)
    return loss, *torch.autograd.grad(loss, list(model.parameters()))


@on_cpu
@pytest.mark.parametrize(
    ("training", "bars"),
    [(False, {"float32": (">=", 1.25)}), (True, {"float32": (">=", 1.2)})],
)
def bench_resnet50(harness: Harness, training: bool, bars: dict) -> None:
    batch = 8
    images = torch.randn(batch, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    models = {name: model.train(training) for name, model in resnet50s().items()}
    if not training:
        models["float32, norms folded"] = with_norms_folded(models["float32"])
    run = training_step if training else lambda model, images: model(images)
    with torch.set_grad_enabled(training):
        record = harness.compare(
            f"ResNet-50 in INT16, {'training step' if training else 'forward'}, 224x224, B{batch}",
            {name: functools.partial(run, model) for name, model in models.items()},
            inputs=[(images,)],
            bars={"cpu": bars},
            other_result=[name for name in models if name != "viops"],
        )
    rates = [f"{n} {batch / row['best']:.3g}" for n, row in record["contenders"].items()]
    record["notes"]["images/s"] = ", ".join(rates)


@on_cpu
def bench_resnet50_logits(harness: Harness) -> None:
    """Rounded to 13 bits, scaling "max": how far logits are from float32's."""
    images = torch.randn(2, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    models = {name: model.eval() for name, model in resnet50s("max").items()}
    with torch.no_grad():
        logits, expected = (models[name](images) for name in ("viops", "float32"))
        error = ((logits - expected).norm() / expected.norm()).item()
        record = harness.compare(
            'ResNet-50 in INT16, scaling "max", forward, 224x224, B2',
            {name: functools.partial(model, images) for name, model in models.items()},
            other_result=["float32"],
        )
    record["notes"]["relative difference of logits"] = f"{error:.1e} (at most 1e-3)"


@on_cpu
@pytest.mark.parametrize("requires_grad", [False, True])
def bench_integer_conv2d_overhead(harness: Harness, requires_grad: bool) -> None:
    draw = Draw(FLOAT32)
    x = viops.quantize_dfp(draw.normal(2, 4, 3, 3))
    w = viops.quantize_dfp(draw.normal(4, 4, 3, 3).requires_grad_(requires_grad))
    harness.compare(
        f"integer_conv2d{' with requires_grad' * requires_grad}, a tiny call: integers B2 C4 3x3",
        {"viops": lambda: viops.integer_conv2d(x, w, None, 1, 1)},
        calls=1000,
        bars={"cpu": {"viops": ("<=", 30e-6 if requires_grad else 12e-6)}},
    )


@on_cuda
@pytest.mark.parametrize("bits", [13, 15])
def bench_integer_conv2d_on_gpu(harness: Harness, bits: int) -> None:
    """At least 250e12 INT16 operations a second on an H100: two for a multiply-add."""
    layer = Layer(14, 256, 256, 3)
    x, w, _ = layer.tensors(Draw(FLOAT32, str(harness.device)), 256)
    integers, filters = viops.quantize_dfp(x, bits), viops.quantize_dfp(w, bits)
    half_x, half_w = x.bfloat16(), w.bfloat16()
    seconds = 2 * layer.macs(256) / 250e12
    with torch.no_grad():
        record = harness.compare(
            f"integer_conv2d of {bits} bits, B256 {layer}",
            {
                "viops": lambda: viops.integer_conv2d(integers, filters, None, 1, 1),
                "conv2d": lambda: F.conv2d(x, w, None, 1, 1),
                "conv2d in bfloat16": lambda: F.conv2d(half_x, half_w, None, 1, 1),
            },
            bars={"cuda": {"viops": ("<=", seconds)} if bits == 13 else {}},
            other_result=["conv2d", "conv2d in bfloat16"],
            calls=20,
        )
    rates = [
        f"{n} {2 * layer.macs(256) / row['best'] / 1e12:.0f}"
        for n, row in record["contenders"].items()
    ]
    record["notes"]["1e12 operations/s"] = ", ".join(rates)
