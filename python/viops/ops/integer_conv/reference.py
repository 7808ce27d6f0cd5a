"""Plain PyTorch for INT16 convolutions: the yardstick of the kernels and the fallback.

Source: Das et al., "Mixed Precision Training of Convolutional Neural Networks using Integer
Operations", ICLR 2018, arXiv:1802.00930, section 3.

Integer sums are taken in float64, where they are exact below 2**53.  The public functions are
differentiable by autograd, with the straight-through estimate; ``*_backward`` is the same
derivative written out, for callers that stand below autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .dfp import DfpTensor

#: Ways to round, in the order of csrc/integer_conv/integer_conv.h.
ROUNDINGS = ("nearest", "stochastic", "truncate")
SCALINGS = ("power_of_two", "max")
#: No scale is smaller, so that neither it nor its reciprocal is subnormal or infinite.
SMALLEST_SCALE = 2.0**-126


def scale_of(largest: Tensor, bits: int, power_of_two: bool) -> Tensor:
    """The scale [] of a tensor whose largest magnitude [] this is, float32; NaN if not finite."""
    if power_of_two:
        _, exponent = torch.frexp(largest)  # largest = m * 2**exponent, m in [0.5, 1)
        scale = torch.ldexp(torch.ones_like(largest, dtype=torch.float64), exponent - bits)
    else:
        scale = largest / (2**bits - 1)
    scale = scale.float().clamp(min=SMALLEST_SCALE)
    scale = torch.where(largest == 0, torch.ones_like(scale), scale)
    return torch.where(largest < torch.inf, scale, torch.nan)


def quantize_dfp_forward(
    x: Tensor, bits: int, power_of_two: bool, rounding: int, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """data int16, of x's shape and strides, and scale [] float32."""
    wide = x.float()
    largest = wide.abs().amax() if x.numel() else wide.new_zeros(())
    if not is_traced(largest) and not bool(largest < torch.inf):
        raise ValueError("x: expected finite values, got infinity or NaN")
    scale = scale_of(largest, bits, power_of_two)
    values = wide * (1 / scale)
    if ROUNDINGS[rounding] == "nearest":
        values = values.round()
    elif ROUNDINGS[rounding] == "truncate":
        values = values.trunc()
    else:
        whole = values.floor()
        values = whole + (noise < values - whole)  # type: ignore[operator]
    limit = 2**bits - 1
    integers = values.clamp(-limit, limit).nan_to_num().to(torch.int16)
    return torch.empty_like(x, dtype=torch.int16).copy_(integers), scale


def is_traced(value: Tensor) -> bool:
    """Whether its value cannot be looked at: within a trace or a transform."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or value.is_meta
    )


def quantize_dfp(
    x: Tensor,
    bits: int = 13,
    *,
    scaling: str = "power_of_two",
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
) -> DfpTensor:
    """As one writes it by hand."""
    data, scale = quantize_dfp_forward(
        x.detach(),
        bits,
        scaling == "power_of_two",
        ROUNDINGS.index(rounding),
        draw_noise(x, rounding, generator),
    )
    return DfpTensor.trusted(data, scale, bits, carrier_of(x))


def draw_noise(x: Tensor, rounding: str, generator: torch.Generator | None) -> Tensor | None:
    """Uniform in [0, 1), of x's shape, for stochastic rounding."""
    if rounding != "stochastic":
        return None
    return torch.rand(x.shape, generator=generator, device=x.device)


def carrier_of(x: Tensor) -> Tensor | None:
    """x where a derivative may be asked for."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return x if forward_mode or (x.requires_grad and torch.is_grad_enabled()) else None


def factors(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """factor and shift [], float32, whose product is that of two scales: no subnormal between."""
    product = first.double() * second.double()
    small, large = product < 2.0**-126, product >= 2.0**127
    shift = torch.where(small, 2.0**-126, torch.where(large, 2.0**127, 1.0))
    factor = product * torch.where(small, 2.0**126, torch.where(large, 2.0**-127, 1.0))
    return factor.float(), shift.float()


def scaled(sums: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Exact integer sums, in float64, times two scales, as float32."""
    factor, shift = factors(first, second)
    return (sums.float() + 0.0) * factor * shift  # no integer is -0


class _RoundedSums(torch.autograd.Function):
    """float32 of exact sums in float64: the derivative is not to be rounded twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(sums: Tensor) -> Tensor:
        return sums.float().double() + 0.0  # no integer is -0

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent


class _QuantizedGradient(torch.autograd.Function):
    """The identity, whose gradient is brought into dynamic fixed point on its way back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, bits: int, scaling: str, rounding: str, generator: Any) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, *ctx.options = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        bits, scaling, rounding, generator = ctx.options
        quantized = quantize_dfp(
            grad.detach(), bits, scaling=scaling, rounding=rounding, generator=generator
        )
        values = quantized.data.double() * quantized.scale.double()
        wide = grad.double()
        return values + (wide - wide.detach()).nan_to_num(), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent.clone()


def _integers(quantized: DfpTensor) -> Tensor:
    """In float64, with a derivative to the carrier as if data were carrier / scale."""
    values, carrier = quantized.data.double(), quantized.carrier
    if carrier is None:
        return values
    wide = carrier.double()
    return values + (wide - wide.detach()).nan_to_num() / quantized.scale.double()


def _as_dfp(
    value: Tensor | DfpTensor,
    bits: int,
    scaling: str,
    rounding: str,
    generator: torch.Generator | None,
) -> DfpTensor:
    if isinstance(value, DfpTensor):
        return value
    return quantize_dfp(value, bits, scaling=scaling, rounding=rounding, generator=generator)


def integer_conv2d(
    x: Tensor | DfpTensor,
    w: Tensor | DfpTensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    bits: int = 13,
    scaling: str = "power_of_two",
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
    gain: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    emit: bool = False,
) -> Tensor | DfpTensor:
    """As one writes it by hand: a convolution of the integers, in float64."""
    options = bits, scaling, rounding, generator
    x, w = _as_dfp(x, *options), _as_dfp(w, *options)
    window = stride, padding, dilation, groups
    sums = F.conv2d(_integers(x), _integers(w), None, *window)  # type: ignore[arg-type]
    factor, shift = factors(x.scale, w.scale)
    y = _RoundedSums.apply(sums) * factor.double()
    y = _QuantizedGradient.apply(y * shift.double(), *options).float()
    y = y if gain is None else y * gain.float()[:, None, None]
    y = y if bias is None else y + bias.float()[:, None, None]
    y = y if residual is None else y + residual.float()
    y = y if activation is None else y.relu()
    y = y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)  # channels_last
    if not emit:
        return y
    how = {"bits": bits, "scaling": scaling, "rounding": rounding, "generator": generator}
    return quantize_dfp(y, **how).with_carrier(y)  # type: ignore[arg-type]


def integer_linear(
    x: Tensor | DfpTensor,
    w: Tensor | DfpTensor,
    bias: Tensor | None = None,
    *,
    bits: int = 13,
    scaling: str = "power_of_two",
    rounding: str = "nearest",
    generator: torch.Generator | None = None,
) -> Tensor:
    """A convolution of images of one pixel."""
    y: Any = integer_conv2d(
        x.reshape(-1, x.shape[-1], 1, 1),
        w.reshape(*w.shape, 1, 1),
        bias,
        bits=bits,
        scaling=scaling,
        rounding=rounding,
        generator=generator,
    )
    return y.reshape(*x.shape[:-1], w.shape[0])


def integer_conv2d_forward(
    x: Tensor,
    x_scale: Tensor,
    x_carrier: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    w_carrier: Tensor | None,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *bits_and_rounding: object,
) -> Tensor:
    """y [B, O, OH, OW] float32, of integers x [B, C, H, W] and w [O, C / groups, I, J]."""
    sums = F.conv2d(x.double(), w.double(), None, stride, padding, dilation, groups)
    y = scaled(sums, x_scale, w_scale)
    if bias is not None:
        y = y + bias.float()[:, None, None]
    return y.contiguous(memory_format=torch.channels_last)


def integer_conv2d_backward(
    grad_y: Tensor,
    x: Tensor,
    x_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_bits: int,
    w_bits: int,
    bits: int,
    power_of_two: bool,
    rounding: int,
    seed: Tensor | None,
    need_x: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients to x and w, float32; empty where not needed."""
    noise = seeded_noise(grad_y, seed)
    data, scale = quantize_dfp_forward(grad_y, bits, power_of_two, rounding, noise)
    grad_x = grad_w = grad_y.new_empty(0, dtype=torch.float32)
    window = stride, padding, dilation, groups
    if need_x:
        sums = conv2d_input(x.shape, w.double(), data.double(), *window)
        grad_x = scaled(sums, scale, w_scale).contiguous(memory_format=torch.channels_last)
    if need_w:
        sums = conv2d_weight(x.double(), w.shape, data.double(), *window)
        grad_w = scaled(sums, scale, x_scale).contiguous()
    return grad_x, grad_w


def seeded_noise(grad_y: Tensor, seed: Tensor | None) -> Tensor | None:
    """Uniform in [0, 1), of grad_y's shape, the same for the same seed []."""
    if seed is None:
        return None
    generator = torch.Generator(grad_y.device).manual_seed(int(seed))
    return torch.rand(grad_y.shape, generator=generator, device=grad_y.device)
