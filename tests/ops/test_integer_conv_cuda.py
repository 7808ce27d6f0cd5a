"""Integer convolutions' CUDA kernels, bit for bit against the reference.

On a GPU where there is one, else executed on the CPU by tests/cuda_on_host.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import poison
import pytest
import torch
import viops
from cuda_on_host import builds
from cuda_on_host.here import DEVICE, ON_GPU, extension
from poison import surroundings
from torch import Tensor
from viops import dispatch, native
from viops.ops.integer_conv import kernels, reference
from viops.ops.integer_conv.reference import ROUNDINGS

ORDERS = [("forward", 0), ("reverse", 0), ("random", 1)]
if ON_GPU or builds.kind_here() != "plain":
    ORDERS = [("random", 2)]


@pytest.fixture(params=ORDERS, ids=lambda order: order[0])
def order(request: pytest.FixtureRequest) -> None:
    """The order in which the kernels' threads run on the CPU."""
    if not ON_GPU:
        extension().set_thread_order(*request.param)


@pytest.fixture(autouse=True)
def _on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Calls of ops run on the CUDA kernels."""
    monkeypatch.setattr(dispatch, "_choices", {})
    if not ON_GPU:
        monkeypatch.setattr(native, "cuda_device_type", "cpu")
        monkeypatch.setattr(native, "extension", extension())
    with viops.use_backend("cuda"):
        yield


class Shape(NamedTuple):
    """Sizes of a convolution."""

    x: tuple[int, int, int, int]
    w: tuple[int, int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def window(self) -> tuple:
        return self.stride, self.padding, self.dilation, self.groups


SHAPES = {
    "one value": Shape((1, 1, 1, 1), (1, 1, 1, 1)),
    "3x3": Shape((2, 16, 9, 7), (24, 16, 3, 3), padding=(1, 1)),
    "more than a tile": Shape((1, 24, 9, 9), (72, 24, 3, 3), padding=(1, 1)),
    "odd channels": Shape((2, 5, 7, 6), (7, 5, 3, 2), padding=(0, 1)),
    "odd filters": Shape((1, 8, 6, 5), (3, 8, 2, 3)),
    "1x1": Shape((3, 16, 5, 3), (8, 16, 1, 1)),
    "1x1, stride 2": Shape((1, 16, 7, 6), (8, 16, 1, 1), (2, 2)),
    "stem": Shape((2, 3, 13, 11), (8, 3, 7, 7), (2, 2), (3, 3)),
    "stride 2": Shape((2, 8, 9, 7), (16, 8, 3, 3), (2, 2), (1, 1)),
    "stride 3": Shape((1, 8, 10, 11), (8, 8, 3, 3), (3, 3), (1, 1)),
    "strides of its own": Shape((1, 3, 9, 11), (2, 3, 2, 5), (3, 2), (1, 2)),
    "patches": Shape((1, 3, 13, 12), (8, 3, 4, 4), (4, 4)),
    "stride beyond the image": Shape((1, 2, 3, 4), (3, 2, 1, 2), (7, 9)),
    "dilation": Shape((1, 8, 9, 9), (8, 8, 3, 3), (1, 1), (2, 2), (2, 2)),
    "dilation and stride": Shape((1, 2, 13, 16), (3, 2, 3, 3), (2, 3), (4, 1), (4, 2)),
    "groups": Shape((2, 16, 5, 6), (32, 8, 3, 3), (1, 1), (1, 1), (1, 1), 2),
    "odd groups": Shape((1, 6, 7, 5), (9, 2, 3, 3), (2, 1), (1, 1), (1, 1), 3),
    "depthwise": Shape((1, 4, 7, 8), (4, 1, 3, 3), (1, 1), (1, 1), (1, 1), 4),
    "depthwise, stride 2": Shape((2, 3, 8, 7), (3, 1, 3, 3), (2, 2), (1, 1), (1, 1), 3),
    "much padding": Shape((1, 2, 2, 3), (2, 2, 2, 2), (1, 1), (5, 4)),
}
EACH_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
#: Of x, w and the gradient.
BITS = pytest.mark.parametrize("bits", [(13, 13, 13), (7, 14, 15)], ids=["13 bits", "7, 14, 15"])


def integers(bits: int, *shape: int, seed: int = 0) -> Tensor:
    """Of at most so many bits, some of them the largest there are."""
    generator = torch.Generator().manual_seed(seed)
    limit = 2**bits - 1
    # each second one within 1.25 times the limit, cut off there
    values = torch.randint(-limit * 5 // 4, limit * 5 // 4 + 1, shape, generator=generator)
    small = torch.randint(-130, 131, shape, generator=generator)
    chosen = torch.where(torch.rand(shape, generator=generator) < 0.5, values, small)
    return chosen.clamp(-limit, limit).to(torch.int16)


def moved(args: tuple) -> tuple:
    """On the device."""
    return tuple(arg.to(DEVICE) if isinstance(arg, Tensor) else arg for arg in args)


def check_forward(
    shape: Shape, x: Tensor, w: Tensor, bits: tuple[int, int, int], bias: bool
) -> None:
    scales = torch.tensor(2.0**-9), torch.tensor(0.0123)
    offsets = torch.randn(w.shape[0], generator=torch.Generator().manual_seed(1)) if bias else None
    args = (x, scales[0], None, w, scales[1], None, offsets, *shape.window, *bits, True, 0, None)
    y = kernels.cuda_conv2d(*moved(args)).cpu()
    wanted = reference.integer_conv2d_forward(*args)
    assert torch.equal(y, wanted)
    assert y.is_contiguous(memory_format=torch.channels_last)


def check_backward(
    shape: Shape, grad_y: Tensor, x: Tensor, w: Tensor, bits: tuple[int, int, int]
) -> None:
    scales = torch.tensor(0.37), torch.tensor(2.0**-9)
    args = (grad_y, x, scales[0], w, scales[1], *shape.window, *bits, False, 0, None, True, True)
    grads = kernels.cuda_conv2d_backward(*moved(args))
    wanted = reference.integer_conv2d_backward(*args)
    for grad, of_reference in zip(grads, wanted, strict=True):
        assert torch.equal(grad.cpu(), of_reference)


def out_shape(shape: Shape) -> tuple[int, ...]:
    return kernels.empty_y(torch.empty(shape.x), torch.empty(shape.w), *shape.window).shape


def operands(shape: Shape, bits: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    x = integers(bits[0], *shape.x).contiguous(memory_format=torch.channels_last)
    return x, integers(bits[1], *shape.w, seed=1)


@BITS
@EACH_SHAPE
@pytest.mark.usefixtures("order")
def test_results_are_the_references(shape: Shape, bits: tuple[int, int, int]) -> None:
    x, w = operands(shape, bits)
    check_forward(shape, x, w, bits, bias=bits[0] == 13)
    grad_y = torch.randn(out_shape(shape), generator=torch.Generator().manual_seed(2))
    check_backward(shape, grad_y, x, w, bits)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [1, 7, 8, 12, 13, 14, 15])
def test_sums_of_the_largest_integers(bits: int, sign: int) -> None:
    shape = Shape((2, 16, 5, 4), (8, 16, 3, 3), padding=(1, 1))
    limit = 2**bits - 1
    x = torch.full(shape.x, limit, dtype=torch.int16)
    w = torch.full(shape.w, sign * limit, dtype=torch.int16)
    check_forward(shape, x, w, (bits, bits, bits), bias=False)
    check_backward(shape, torch.full(out_shape(shape), -1.0), x, w, (bits, bits, bits))


@pytest.mark.parametrize("bits", [13, 15])
def test_every_integer(bits: int) -> None:
    """All of them times those about the bounds of digits."""
    limit = 2**bits - 1
    x = torch.arange(-limit, limit + 1).to(torch.int16)[None, None, None]
    about = [0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 255, 256, 8127, 8128, 8191, limit]
    w = torch.tensor([sign * value for value in about for sign in (1, -1)]).to(torch.int16)
    w = w[:, None, None, None]
    if not ON_GPU:
        keep = torch.rand(x.shape[3], generator=torch.Generator().manual_seed(0)) < 0.05
        near = ((x[0, 0, 0].int() + 64) % 128 < 2) | ((x[0, 0, 0].int() + 65) % 128 < 2)
        x = x[..., keep | near | (x[0, 0, 0].abs() > limit - 70)]
    check_forward(Shape(tuple(x.shape), tuple(w.shape)), x, w, (bits, bits, bits), bias=False)


CHAIN = 32768  # of csrc/integer_conv/cuda_digits.cuh
LONG = CHAIN + 23 * 64 + 5  # without an end, int32 would not hold a chain of the largest digits


@pytest.mark.parametrize("bits", [13, 15])
def test_sums_beyond_a_chain(bits: int) -> None:
    """Of the largest integers, of one sign."""
    limit = 2**bits - 1
    x = torch.full((1, LONG, 1, 2), limit, dtype=torch.int16)
    x[:, ::3, :, 1] = 0
    w = torch.full((3, LONG, 1, 1), limit, dtype=torch.int16)
    w[1] = -limit
    w[2] = integers(bits, LONG, 1, 1)
    shape = Shape(tuple(x.shape), tuple(w.shape))
    check_forward(shape, x, w, (bits, bits, bits), bias=True)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("bits", [13, 15])
def test_a_weight_gradient_over_many_pixels(bits: int, split: bool) -> None:
    limit = 2**bits - 1
    width = (LONG if bits == 13 else LONG + CHAIN) // 3  # two chains, or three
    x = integers(bits, 1, 2, 3, width).contiguous(memory_format=torch.channels_last)
    x[:, 0] = limit
    grad = torch.full((1, 3, 3, width), limit, dtype=torch.int16)
    grad[:, 2] = -limit
    grad = grad.contiguous(memory_format=torch.channels_last)
    scales = torch.tensor(0.5), torch.tensor(0.3)
    grad_w = torch.full((3, 2, 1, 1), torch.nan, device=DEVICE)
    scratch = torch.full_like(grad_w, 2**60, dtype=torch.int64) if split else None
    extension().integer_conv_weight_gradient(
        *moved((grad, scales[0], bits, x, scales[1], bits)),
        1,
        (1, 1),
        (0, 0),
        (1, 1),
        grad_w,
        scratch,
    )
    sums = torch.einsum("bohw,bchw->oc", grad.double(), x.double())[:, :, None, None]
    assert torch.equal(grad_w.cpu(), reference.scaled(sums, *scales))


@pytest.mark.parametrize("scale", [2.0**-126, 1e-20, 3e19])
def test_scales_whose_product_is_far_from_1(scale: float) -> None:
    shape = SHAPES["1x1"]
    x, w = operands(shape, (13, 13, 13))
    args = (x, torch.tensor(scale), None, w, torch.tensor(scale), None, None, *shape.window)
    y = kernels.cuda_conv2d(*moved(args), 13, 13).cpu()
    assert torch.equal(y, reference.integer_conv2d_forward(*args))


def test_no_images() -> None:
    shape = Shape((0, 16, 5, 3), (8, 16, 3, 3), padding=(1, 1))
    x, w = operands(shape, (13, 13, 13))
    check_forward(shape, x, w, (13, 13, 13), bias=True)
    grads = kernels.cuda_conv2d_backward(
        *moved((torch.empty(out_shape(shape)), x, torch.tensor(1.0), w, torch.tensor(1.0))),
        *(*shape.window, 13, 13, 13, True, 0, None, True, True),
    )
    assert grads[0].shape == x.shape
    assert torch.equal(grads[1].cpu(), torch.zeros(shape.w))


amid = functools.partial(poison.amid, device=DEVICE)


def arguments_of(name: str) -> dict[str, object]:
    """Good arguments, by the names that errors have, all of whose tensors lie amid others."""
    shape = Shape((2, 8, 5, 4), (16, 4, 3, 3), (2, 1), (1, 0), (1, 1), 2)
    x, w = operands(shape, (13, 13, 13))
    y = torch.full(out_shape(shape), torch.nan).contiguous(memory_format=torch.channels_last)
    grad = integers(13, *y.shape, seed=2).contiguous(memory_format=torch.channels_last)
    grad_x = torch.full_like(x, torch.nan, dtype=torch.float32)
    window = {key: getattr(shape, key) for key in ("groups", "stride", "padding", "dilation")}
    scale, w_scale = amid(torch.tensor([0.5]), 7), amid(torch.tensor([0.3]), 7)
    if name == "integer_conv_quantize":
        return {
            "x": amid(torch.linspace(-3, 2, 301), 100),
            "bits": 13,
            "power_of_two": True,
            "rounding": 1,
            "noise": amid(torch.linspace(0, 0.99, 301), -5),
            "largest": None,
            "data": amid(torch.full((301,), -7, dtype=torch.int16), -7),
            "scale": amid(torch.full((1,), torch.nan), torch.nan),
            "scratch": amid(torch.full((1,), torch.nan), torch.nan),
        }
    if name == "integer_conv_weight_gradient":
        return {
            "grad_y": amid(grad, 3),
            "grad_scale": scale,
            "bits_grad": 13,
            "x": amid(x, 3),
            "x_scale": w_scale,
            "bits_x": 13,
            **window,
            "grad_w": amid(torch.full(shape.w, torch.nan), torch.nan),
            "scratch": amid(torch.full(shape.w, -7), -7),
        }
    to_input = name == "to input"
    return {
        "x": amid(grad if to_input else x, 3),
        "x_scale": scale,
        "w": amid(w, 3),
        "w_scale": w_scale,
        "bits_x": 13,
        "bits_w": 13,
        "bias": amid(torch.linspace(-1, 1, 8 if to_input else 16), torch.nan),
        **window,
        "to_input": to_input,
        "height": 5,
        "width": 4,
        "y": amid(grad_x if to_input else y, torch.nan),
    }


CALLS = ("integer_conv_quantize", "forward", "to input", "integer_conv_weight_gradient")
OUTPUTS = {"y": torch.nan, "grad_w": torch.nan, "data": -7, "scale": torch.nan, "scratch": None}
EACH_CALL = pytest.mark.parametrize("name", CALLS)


def call(name: str, arguments: dict[str, object]) -> None:
    convolves = name in ("forward", "to input")
    function = "integer_conv_convolve" if convolves else name
    getattr(extension(), function)(*arguments.values())


def expected_of(name: str, arguments: dict) -> dict[str, Tensor]:
    args = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    if name == "integer_conv_quantize":
        options = (args[key] for key in ("x", "bits", "power_of_two", "rounding", "noise"))
        data, scale = reference.quantize_dfp_forward(*options)
        return {"data": data, "scale": scale.reshape(1)}
    window = args["stride"], args["padding"], args["dilation"], args["groups"]
    if name == "forward":
        sums = torch.nn.functional.conv2d(args["x"].double(), args["w"].double(), None, *window)
    elif name == "to input":
        sums = torch.nn.grad.conv2d_input(
            args["y"].shape, args["w"].double(), args["x"].double(), *window
        )
    else:
        sums = torch.nn.grad.conv2d_weight(
            args["x"].double(), args["grad_w"].shape, args["grad_y"].double(), *window
        )
        return {"grad_w": reference.scaled(sums, args["grad_scale"], args["x_scale"])}
    y = reference.scaled(sums, args["x_scale"], args["w_scale"])
    return {"y": y + args["bias"][:, None, None]}


@EACH_CALL
@pytest.mark.usefixtures("order")
def test_writes_every_element_and_none_beside(name: str) -> None:
    arguments = arguments_of(name)
    expected = expected_of(name, arguments)
    call(name, arguments)
    for key, wanted in expected.items():
        assert torch.equal(arguments[key].cpu(), wanted)
        untouched = surroundings(arguments[key])
        fill = OUTPUTS[key]
        assert (untouched.isnan() if fill != fill else untouched == fill).all()


@EACH_CALL
def test_bad_tensors_are_refused(name: str) -> None:
    arguments = arguments_of(name)
    for key, value in arguments.items():
        if not isinstance(value, Tensor):
            continue
        bad = [
            value.to("meta"),
            value.to(torch.int32),
            torch.cat([value, value], dim=-1),
            value[None],
        ]
        if value.dim() == 1 and value.shape[0] > 1:
            bad.append(value[::2])
        if ON_GPU:
            bad.append(value.cpu())
        for wrong in bad:
            with pytest.raises((ValueError, TypeError), match=r"^\w+[\w ,]*: \S"):
                call(name, {**arguments, key: wrong})


def test_what_only_cuda_takes() -> None:
    arguments = arguments_of("integer_conv_quantize")
    with pytest.raises(TypeError, match=r"^scratch: "):
        call("integer_conv_quantize", {**arguments, "scratch": None})
    with pytest.raises(ValueError, match=r"^largest: "):
        call("integer_conv_quantize", {**arguments, "largest": 1.0})


def test_sums_that_may_pass_the_bound() -> None:
    arguments = arguments_of("forward")
    x = torch.empty(1, 2**17, 1, 1, dtype=torch.int16, device=DEVICE)
    w = torch.empty(1, 2**17, 1, 1, dtype=torch.int16, device=DEVICE)
    window = {"groups": 1, "stride": (1, 1), "padding": (0, 0), "height": 1, "width": 1}
    wide = {**arguments, "x": x, "w": w, "bits_x": 15, "bits_w": 15, "bias": None, **window}
    with pytest.raises(ValueError, match=r"^w: sums of so many products .* may pass 2\^46"):
        call("forward", {**wide, "y": torch.empty(1, 1, 1, 1, device=DEVICE)})


VALUES = {
    "normal": lambda n: torch.randn(n, generator=torch.Generator().manual_seed(0)),
    "halves": lambda n: torch.arange(n) / 2 - 8,
    "zeros": lambda n: torch.zeros(n),
    "tiny": lambda n: torch.linspace(-3e-39, 2e-39, n, dtype=torch.float64),
    "huge": lambda n: torch.linspace(-3e38, 3.4e38, n, dtype=torch.float64),
    "one below a power": lambda n: torch.full((n,), 2.0 - 2.0**-23),
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("dtype", dispatch.FLOAT_DTYPES, ids=str)
@pytest.mark.usefixtures("order")
def test_quantize(values: object, dtype: torch.dtype) -> None:
    for size in (1, 33, 1031):
        x = values(size).to(dtype)
        if not x.isfinite().all():
            x = (values(size) / 1e35).to(dtype)
        for bits in (1, 7, 13, 15):
            for power_of_two in (True, False):
                for rounding, name in enumerate(ROUNDINGS):
                    noise = reference.draw_noise(x, name, torch.Generator().manual_seed(1))
                    args = x, bits, power_of_two, rounding, noise
                    data, scale = kernels.cuda_quantize(*moved(args))
                    wanted, wanted_scale = reference.quantize_dfp_forward(*args)
                    assert torch.equal(data.cpu(), wanted)
                    assert torch.equal(scale.cpu(), wanted_scale)


def test_quantize_many_values_and_strides() -> None:
    x = torch.randn(7, 301, 33, generator=torch.Generator().manual_seed(0))
    for view in (x, x.permute(2, 0, 1), x[:, ::2], x[1:, 5:, 3].expand(4, 6, 296), x[:, :0]):
        noise = torch.rand(view.shape, generator=torch.Generator().manual_seed(1))
        for rounding in (0, 1):
            args = view, 13, False, rounding, noise if rounding else None
            data, scale = kernels.cuda_quantize(*moved(args))
            wanted, wanted_scale = reference.quantize_dfp_forward(*args)
            assert torch.equal(data.cpu(), wanted)
            assert torch.equal(scale.cpu(), wanted_scale)


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 40, 299])
@pytest.mark.parametrize("dtype", dispatch.FLOAT_DTYPES, ids=str)
def test_values_that_are_not_finite(dtype: torch.dtype, place: int, value: float) -> None:
    x = torch.ones(300, dtype=dtype, device=DEVICE)
    x[place] = value
    with pytest.raises(ValueError, match=r"^x: expected finite values, got infinity or NaN$"):
        viops.quantize_dfp(x)
    data = torch.full((300,), -7, dtype=torch.int16, device=DEVICE)
    scale, scratch = x.new_zeros(1, dtype=torch.float32), x.new_empty(1, dtype=torch.float32)
    extension().integer_conv_quantize(x, 13, True, 0, None, None, data, scale, scratch)
    assert scale.isnan().all()
    assert not data.any()


def test_a_float64_that_no_float32_holds() -> None:
    with pytest.raises(ValueError, match=r"^x: expected finite values"):
        viops.quantize_dfp(torch.tensor([1.0, 1e39], dtype=torch.float64, device=DEVICE))


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
def test_a_call_and_its_derivative(rounding: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 7, 6, generator=generator)
    w = torch.randn(6, 4, 3, 3, generator=generator)
    bias = torch.randn(6, generator=generator)
    grad_y = torch.randn(2, 6, 4, 3, generator=generator)

    def run(device: str) -> list[Tensor]:
        leaves = [t.detach().to(device).requires_grad_() for t in (x, w, bias)]
        y = viops.integer_conv2d(*leaves, 2, 1, groups=2, rounding=rounding)
        return [y, *torch.autograd.grad(y, leaves, grad_y.to(device))]

    explanation = viops.explain("integer_conv2d", x.to(DEVICE))
    assert [explanation.backend, *(part.backend for part in explanation.others)] == ["cuda"] * 2
    found = run(DEVICE)
    with viops.use_backend("reference"):
        wanted = run("cpu")
    assert torch.equal(found[0].cpu(), wanted[0])
    for grad, of_reference in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(grad.cpu(), of_reference, rtol=1e-6, atol=1e-7)


def test_a_linear_layer() -> None:
    x = torch.randn(3, 5, 17, generator=torch.Generator().manual_seed(0))
    w = torch.randn(9, 17, generator=torch.Generator().manual_seed(1))
    y = viops.integer_linear(x.to(DEVICE), w.to(DEVICE), bits=15).cpu()
    assert torch.equal(y, reference.integer_linear(x, w, bits=15))


@pytest.mark.skipif(native.extension is None, reason="viops._C is not there")
def test_cpu_tensors_are_refused() -> None:
    module = native.require() if ON_GPU else _PLAIN
    arguments = {
        k: v.cpu() if isinstance(v, Tensor) else v for k, v in arguments_of("forward").items()
    }
    with pytest.raises(TypeError, match=r"^x: expected a tensor on a CUDA device"):
        module.integer_conv_convolve(*arguments.values())


#: The extension as users have it.
_PLAIN = native.extension
