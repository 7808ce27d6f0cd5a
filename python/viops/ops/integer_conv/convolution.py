"""Convolutions and linear layers of INT16 integers: the public functions and their checks.

Source: Das et al., "Mixed Precision Training of Convolutional Neural Networks using Integer
Operations", ICLR 2018, arXiv:1802.00930, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ... import checks, dispatch
from ...tensor_state import state_of
from . import kernels, reference
from .dfp import DfpTensor
from .op import carry, check_options, quantize_operand, run_conv2d
from .reference import ROUNDINGS


def _pair(name: str, value: Any, low: int) -> tuple[int, int]:
    """One integer of an axis, or one for each of both."""
    if type(value) is int and low <= value <= _LARGEST:  # by far the most calls
        return value, value
    if isinstance(value, (list, tuple)):
        if len(value) not in (1, 2):
            raise ValueError(f"{name}: expected an int or two, got {value!r}")
        first, second = (*value, *value)[:2]
    else:
        first = second = value
    if (
        type(first) is int is type(second)
        and min(first, second) >= low
        and first + second < _LARGEST
    ):
        return first, second
    return (
        checks.check_int(name, first, low, _LARGEST, "2**20"),
        checks.check_int(name, second, low, _LARGEST, "2**20"),
    )


#: No stride, padding or dilation is larger: so no product of sizes passes 64 bits.
_LARGEST = 2**20


def _as_operand(name: str, value: Any, rank: int, axes: str, options: tuple) -> DfpTensor:
    if isinstance(value, DfpTensor):
        if value.data.dim() != rank:
            raise ValueError(f"{name}: expected [{axes}], got shape {list(value.shape)}")
        return value
    checks.check_float_tensor(name, value, axes)
    return quantize_operand(name, value, *options)


def _check_vector(name: str, value: Any, filters: int, x: DfpTensor | Tensor) -> None:
    checks.check_float_tensor(name, value, "O")
    checks.check_same("size", name, value.shape[0], "w", filters)
    checks.check_same("device", name, value.device, "x", x.device)


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
    """A convolution of INT16 integers, exact up to one rounding to float32.

    Args:
        x: [B, C, H, W], floating-point or a DfpTensor; channels_last is the fast path.
        w: [O, C / groups, I, J], floating-point or a DfpTensor.  What the kernels make of a
            DfpTensor's integers is kept with them for the next call.
        bias: [O], floating-point, or None.
        stride, padding, dilation, groups: as in torch.nn.functional.conv2d; padding also "valid",
            or "same" where the stride is 1.
        bits, scaling, rounding, generator: how floating-point operands are brought into dynamic
            fixed point, as in `quantize_dfp`, and in the backward pass the gradient.
        gain: [O], floating-point, that each filter's result is multiplied with before the bias is
            added, such as a batch norm's; or None.
        residual: [B, O, OH, OW], float32, added after the bias; or None.
        activation: "relu" applies it to all of that, None nothing.
        emit: whether the result is brought into dynamic fixed point, as a next layer takes it.
            Where no gradient is asked for, gain, residual, activation and the search for the
            largest magnitude cost no pass over memory on the CPU.

    Returns:
        y [B, O, OH, OW], float32, channels_last: the exact sum of integer products, rounded to
        float32, times the product of the scales, times gain, plus bias, plus residual.  All
        kernels give the same bits.  With emit, a DfpTensor whose carrier is y.  Gradients to
        floating-point operands and to DfpTensors' carriers are integer
        convolutions too: of y's gradient, brought into dynamic fixed point.

    Raises:
        TypeError, ValueError: an argument is not as above; sums could pass 2**46.

    Source: Das et al., arXiv:1802.00930, section 3.
    """
    options = check_options(bits, scaling, rounding, generator), scaling, rounding, generator
    if activation not in (None, "relu"):
        raise ValueError(f"activation: expected None or 'relu', got {activation!r}")
    checks.check_bool("emit", emit)
    window = stride, padding, dilation, groups
    finish = Finish(gain, bias, residual, activation == "relu", emit)
    if not _may_stay_floats(x, w, window, finish, rounding):
        x = _as_operand("x", x, 4, "B C H W", options)
    w = _as_operand("w", w, 4, "O C/groups I J", options)
    if isinstance(x, DfpTensor) and finish == Finish(None, bias, None, False, False):
        return _convolve(x, w, bias, *window, options)
    return _convolve_and_finish(x, w, window, finish, options)


def _may_stay_floats(x: Any, w: Any, window: tuple, finish: Finish, rounding: str) -> bool:
    """Whether x becomes integers within the convolution, of one tap, and nowhere else."""
    return (
        isinstance(x, Tensor)
        and dispatch.is_plain_eager(x)
        and x.dim() == 4
        and x.dtype is torch.float32
        and x.layout is torch.strided
        and x.is_contiguous(memory_format=torch.channels_last)
        and isinstance(w, (Tensor, DfpTensor))
        and w.dim() == 4
        and tuple(w.shape[1:]) == (x.shape[1], 1, 1)
        and w.shape[0] * w.shape[1] > 1
        and window[0] in (1, (1, 1), [1, 1])
        and window[1] in (0, (0, 0), [0, 0])
        and window[3] == 1
        and finish.is_inference_on_cpu(x, w, rounding)
    )


class Finish(NamedTuple):
    """What follows a convolution."""

    gain: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    relu: bool
    emit: bool

    def apply(self, y: Tensor, options: tuple) -> Tensor | DfpTensor:
        """To the result of a convolution without bias, step by step."""
        if self.gain is not None:
            y = y * self.gain.float()[:, None, None]
        if self.bias is not None:
            y = y + self.bias.float()[:, None, None]
        if self.residual is not None:
            y = y + self.residual
        if self.relu:
            y = y.relu()
        if not self.emit:
            return y
        return quantize_operand("y", y, *options).with_carrier(y)

    def is_inference_on_cpu(
        self, x: DfpTensor | Tensor, w: DfpTensor | Tensor, rounding: str
    ) -> bool:
        """Whether one kernel does it all: no derivative is asked for."""
        operands = (
            part
            for value in (x, w)
            for part in ((value,) if isinstance(value, Tensor) else (*value, value.carrier))
        )
        tensors = [
            t for t in (*operands, self.gain, self.bias, self.residual) if isinstance(t, Tensor)
        ]
        return (
            dispatch.is_plain_eager(*tensors)
            and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
            and rounding != "stochastic"
            and dispatch.choose("integer_conv2d", x.device.type, torch.int16)[0] == "cpu"
        )


def _convolve_and_finish(
    x: DfpTensor | Tensor, w: DfpTensor, window: tuple, finish: Finish, options: tuple
) -> Tensor | DfpTensor:
    bits, scaling, rounding, _ = options
    x, window = _check_convolution(x, w, finish.bias, *window)
    _check_sums(x, w, window[3], bits)
    shape = kernels.y_shape(x, w, *window[:3])
    if finish.gain is not None:
        _check_vector("gain", finish.gain, w.shape[0], x)
    residual = finish.residual
    if residual is not None:
        checks.check_float_tensor("residual", residual, "B O OH OW")
        checks.check_same("shape", "residual", tuple(residual.shape), "the result", shape)
        checks.check_same("dtype", "residual", residual.dtype, "the result", torch.float32)
        checks.check_same("device", "residual", residual.device, "x", x.device)
    if isinstance(x, DfpTensor) and not finish.is_inference_on_cpu(x, w, rounding):
        return finish.apply(_run(x, w, None, window, options), options)
    how = bits, scaling == "power_of_two", ROUNDINGS.index(rounding)
    y, largest = kernels.native_finished_conv2d(x, w, window, how, *finish)
    if not finish.emit:
        return y
    if not largest < math.inf:
        raise ValueError("y: expected finite values to emit, got infinity or NaN")
    data, scale = kernels.native_quantize(y, *how, None, largest)
    return DfpTensor.trusted(data, scale, bits, y)


def _convolve(
    x: DfpTensor,
    w: DfpTensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    options: tuple,
) -> Tensor:
    x, window = _check_convolution(x, w, bias, stride, padding, dilation, groups)
    _check_sums(x, w, groups, options[0])
    return _run(x, w, bias, window, options)


def _check_convolution(
    x: DfpTensor | Tensor,
    w: DfpTensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> tuple[Any, kernels.Window]:
    """x, and stride, padding and dilation of both axes, and groups."""
    checks.check_same("device", "w", w.device, "x", x.device)
    stride, dilation = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    if type(groups) is not int or groups < 1:
        checks.check_int("groups", groups, 1, None, "")
    if 0 in w.shape:
        raise ValueError(f"w: expected no axis of size 0, got shape {list(w.shape)}")
    if w.shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of O = {w.shape[0]}, got {groups}")
    if x.shape[1] != groups * w.shape[1]:
        raise ValueError(
            f"x: expected C = groups * {w.shape[1]} = {groups * w.shape[1]} channels as w has, "
            f"got shape {list(x.shape)}"
        )
    if bias is not None:
        _check_vector("bias", bias, w.shape[0], x)
    kernel = w.shape[2:]
    if isinstance(padding, str) and isinstance(x, DfpTensor):
        x, padding = _padded(x, padding, kernel, stride, dilation)
    else:
        padding = _pair("padding", padding, 0)
    _, _, height, width = kernels.y_shape(x, w, stride, padding, dilation)
    if height < 1 or width < 1 or 0 in x.shape[2:]:
        raise ValueError(
            f"x: expected images, padding included, of at least the extent of the filters, "
            f"got shape {list(x.shape)} for w's {list(w.shape)}"
        )
    return x, (stride, padding, dilation, groups)


def _check_sums(x: DfpTensor | Tensor, w: DfpTensor, groups: int, bits: int) -> None:
    """Sums of so many products fit into the words that kernels hold them in.

    `bits` are those of floats: of x, if it is one, and of gradients.
    """
    taps = math.prod(w.shape[2:])
    x_bits = x.bits if isinstance(x, DfpTensor) else bits
    sums = [("", w.shape[1] * taps, x_bits)]
    if isinstance(x, DfpTensor) and x.carrier is not None:
        sums.append((" for the gradient to x", w.shape[0] // groups * taps, bits))
    for purpose, count, other in sums:
        if count * (2**other - 1) * (2**w.bits - 1) >= 2**46:
            raise ValueError(
                f"w: sums of {count} products of {w.bits} and {other} bits{purpose} may pass 2^46: "
                f"expected fewer channels, taps or bits, got shape {list(w.shape)}"
            )


def _run(
    x: DfpTensor, w: DfpTensor, bias: Tensor | None, window: kernels.Window, options: tuple
) -> Tensor:
    bits, scaling, rounding, generator = options
    seed = None
    if rounding == "stochastic":
        seed = torch.randint(2**62, (), generator=generator, device=x.device)
    if dispatch.is_reference_forced():
        how = {"bits": bits, "scaling": scaling, "rounding": rounding, "generator": generator}
        return reference.integer_conv2d(x, w, bias, *window, **how)  # type: ignore[return-value]
    return run_conv2d(
        x.data,
        x.scale,
        carry(x),
        w.data,
        w.scale,
        carry(w),
        bias,
        *window,
        x.bits,
        w.bits,
        bits,
        scaling == "power_of_two",
        ROUNDINGS.index(rounding),
        seed,
    )


def _padded(
    x: DfpTensor, padding: str, kernel: Size, stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[DfpTensor, tuple[int, int]]:
    """x and the padding that "valid" or "same" stands for; x is padded where sides differ."""
    if padding == "valid":
        return x, (0, 0)
    if padding != "same":
        raise ValueError(f"padding: expected ints, 'valid' or 'same', got {padding!r}")
    if stride != (1, 1):
        raise ValueError(f"padding: expected ints where stride is {stride}, got 'same'")
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if totals[0] % 2 or totals[1] % 2:
        extra = (0, totals[1] % 2, 0, totals[0] % 2)
        carrier = x.carrier
        x = DfpTensor.trusted(
            torch.nn.functional.pad(x.data, extra),
            x.scale,
            x.bits,
            None if carrier is None else torch.nn.functional.pad(carrier, extra),
        )
    return x, (totals[0] // 2, totals[1] // 2)


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
    """A linear layer of INT16 integers, exact up to one rounding to float32.

    Args:
        x: [..., K], floating-point or a DfpTensor.
        w: [O, K], floating-point or a DfpTensor.
        bias: [O], floating-point, or None.
        bits, scaling, rounding, generator: as in `integer_conv2d`.

    Returns:
        y [..., O], float32: as `integer_conv2d` of images of one pixel.

    Raises:
        TypeError, ValueError: an argument is not as above; sums could pass 2**46.

    Source: Das et al., arXiv:1802.00930, section 3.
    """
    options = check_options(bits, scaling, rounding, generator), scaling, rounding, generator
    if not isinstance(x, (Tensor, DfpTensor)):
        raise TypeError(
            f"x: expected a torch.Tensor [... K] or a DfpTensor, got {type(x).__name__}"
        )
    if x.dim() < 1:
        raise ValueError(f"x: expected [... K], got shape {list(x.shape)}")
    x = _as_operand("x", x, x.dim(), " ".join("." * (x.dim() - 1) + "K"), options)
    w = _as_operand("w", w, 2, "O K", options)
    if x.shape[-1] != w.shape[1]:
        raise ValueError(f"x: expected K = {w.shape[1]} as w has, got shape {list(x.shape)}")
    size = x.shape[:-1]
    y = _convolve(
        x.reshape(math.prod(size), x.shape[-1], 1, 1),
        _as_filters(w),
        bias,
        1,
        0,
        1,
        1,
        options,
    )
    return y.reshape(*size, w.shape[0])


#: Filters [O, K, 1, 1] of integers [O, K], so that what is kept with the former lives as long.
_filters: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _as_filters(w: DfpTensor) -> DfpTensor:
    """[O, K] -> [O, K, 1, 1]: the same tensor for the same integers, which keeps its packing."""
    shape = *w.shape, 1, 1
    if dispatch.is_plain_eager(w.data) and not w.data.is_inference():
        key = state_of(w.data)
        kept = _filters.get(w.data)
        if kept is None or kept[0] != key:
            # no view: of one the other would be the base, and live as long
            with torch.inference_mode(False), torch.no_grad():  # training may take it next
                kept = _filters[w.data] = key, w.data.clone().view(shape)
        data = kept[1]
    else:
        data = w.data.reshape(shape)
    carrier = None if w.carrier is None else w.carrier.reshape(shape)
    return DfpTensor.trusted(data, w.scale, w.bits, carrier)
