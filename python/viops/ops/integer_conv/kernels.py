"""INT16 convolutions on backends that are not plain PyTorch: outputs made, kernels called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ... import native
from . import reference
from .dfp import DfpTensor

Window = tuple[Sequence[int], Sequence[int], Sequence[int], int]


def native_quantize(
    x: Tensor,
    bits: int,
    power_of_two: bool,
    rounding: int,
    noise: Tensor | None,
    largest: float | None = None,
) -> tuple[Tensor, Tensor]:
    data = torch.empty_like(x, dtype=torch.int16)
    x = _laid_out_like(data, x)
    if noise is not None:
        noise = _flat(_laid_out_like(data, noise))
    scale = torch.empty((), dtype=torch.float32)
    native.require().integer_conv_quantize(
        _flat(x), bits, power_of_two, rounding, noise, largest, _flat(data), scale
    )
    return data, scale


def _laid_out_like(other: Tensor, x: Tensor) -> Tensor:
    """x in memory as other, which is dense, is."""
    if x.stride() == other.stride():
        return x
    return x.new_empty_strided(other.shape, other.stride()).copy_(x)


def _flat(x: Tensor) -> Tensor:
    """The elements [N] of a dense tensor in the order of its memory."""
    return x.as_strided((x.numel(),), (1,))


def _as_images(x: Tensor) -> Tensor:
    """x in channels_last, whatever the strides of its axes of size 1."""
    return x.contiguous(memory_format=torch.channels_last)


#: Filters as the kernels read them, by the tensor of integers: as long as that lives.
_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed(w: Tensor, groups: int, window: Window, to_input: bool, w_bits: int, bits: int) -> Any:
    """Filters as the kernels read them, for operands of so many bits; kept for the next call."""
    version = 0 if w.is_inference() else w._version
    key = (native.cpu_level, version, *map(tuple, window[:3]), groups, to_input, w_bits, bits)
    kept = _packed.get(w) or {}
    found = kept.get(key)
    if found is None:
        found = native.require().PackedFilters(
            w.contiguous(), groups, *map(tuple, window[:3]), to_input, w_bits, bits
        )
        # of these very integers, at this level; others may be adding theirs at the same time
        same = {k: filters for k, filters in kept.items() if k[:2] == key[:2]}
        _packed[w] = {**same, key: found}
    return found


def native_conv2d(
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
    x_bits: int,
    w_bits: int,
    *_: object,
) -> Tensor:
    of_x, of_w = DfpTensor.trusted(x, x_scale, x_bits), DfpTensor.trusted(w, w_scale, w_bits)
    window, finish = (stride, padding, dilation, groups), (None, bias, None, False, False)
    return native_finished_conv2d(of_x, of_w, window, None, *finish)[0]


def native_input_gradient(
    grad: Tensor,
    scale: Tensor,
    bits: int,
    w: Tensor,
    w_scale: Tensor,
    w_bits: int,
    size: Size,
    window: Window,
) -> Tensor:
    """grad_x [B, C, H, W] float32 of integers grad [B, O, OH, OW]; size is H, W."""
    grad_x = _empty_input_gradient(grad, w, size, window)
    filters = packed(w, window[3], window, True, w_bits, bits)
    how = None, None, None, False, False, *size
    filters.convolve(_as_images(grad), scale, w_scale, bits, *how, grad_x)
    return grad_x


def native_weight_gradient(
    grad: Tensor,
    scale: Tensor,
    bits: int,
    x: Tensor,
    x_scale: Tensor,
    x_bits: int,
    shape: Size,
    window: Window,
) -> Tensor:
    """grad_w, float32 of this shape [O, C / groups, I, J], of integers grad and x."""
    grad_w = torch.empty(shape, dtype=torch.float32)
    native.require().integer_conv_weight_gradient(
        _as_images(grad),
        scale,
        bits,
        _as_images(x),
        x_scale,
        x_bits,
        window[3],
        *window[:3],
        grad_w,
    )
    return grad_w


def out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Places of a convolution's result along an axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def native_finished_conv2d(
    x: DfpTensor | Tensor,
    w: DfpTensor,
    window: Window,
    how: tuple[int, bool, int] | None,
    gain: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    read_next: bool,
) -> tuple[Tensor, float]:
    """y and its largest magnitude, NaN counting as the largest.

    x of floats becomes integers on its way, by `how`: bits, whether the scale is a power of two,
    and the rounding; filters then are of one tap, stride 1 and no padding.
    """
    gain, bias = (None if t is None else t.detach().float().contiguous() for t in (gain, bias))
    residual = None if residual is None else _as_images(residual.detach())
    finish = gain, bias, residual, relu, read_next
    if isinstance(x, Tensor):
        assert how is not None
        filters = packed(w.data, window[3], window, False, w.bits, how[0])
        y = empty_y(x, w.data, *window)
        return y, filters.convolve_floats(x.detach(), *how[1:], w.scale, *finish, y)
    filters = packed(w.data, window[3], window, False, w.bits, x.bits)
    y = empty_y(x.data, w.data, *window)
    images, size = _as_images(x.data), x.shape[2:]
    return y, filters.convolve(images, x.scale, w.scale, x.bits, *finish, *size, y)


def cuda_quantize(
    x: Tensor, bits: int, power_of_two: bool, rounding: int, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    data = torch.empty_like(x, dtype=torch.int16)
    x = _laid_out_like(data, x)
    if noise is not None:
        noise = _flat(_laid_out_like(data, noise))
    scale, scratch = x.new_empty((), dtype=torch.float32), x.new_empty(1, dtype=torch.float32)
    native.require().integer_conv_quantize(
        _flat(x), bits, power_of_two, rounding, noise, None, _flat(data), scale, scratch
    )
    # a kernel cannot raise, and makes the scale NaN: to look at it is to wait for the device
    if not bool(scale < torch.inf):
        raise ValueError("x: expected finite values, got infinity or NaN")
    return data, scale


def _with_depth_last(w: Tensor, to_input: bool) -> Tensor:
    """w [O, C / groups, I, J], the axis that a convolution sums over innermost in memory."""
    if to_input:
        return w.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    return w.contiguous(memory_format=torch.channels_last)


def cuda_conv2d(
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
    x_bits: int,
    w_bits: int,
    *_: object,
) -> Tensor:
    window = tuple(stride), tuple(padding), tuple(dilation)
    y = empty_y(x, w, *window, groups)
    bias = None if bias is None else bias.float().contiguous()
    filters = _with_depth_last(w, False)
    native.require().integer_conv_convolve(
        *(_as_images(x), x_scale, filters, w_scale, x_bits, w_bits, bias, groups, *window),
        *(False, x.shape[2], x.shape[3], y),
    )
    return y


def cuda_input_gradient(
    grad: Tensor,
    scale: Tensor,
    bits: int,
    w: Tensor,
    w_scale: Tensor,
    w_bits: int,
    size: Size,
    window: Window,
) -> Tensor:
    """As `native_input_gradient`."""
    grad_x = _empty_input_gradient(grad, w, size, window)
    of_filters = _with_depth_last(w, True), w_scale, bits, w_bits, None, window[3]
    native.require().integer_conv_convolve(
        _as_images(grad), scale, *of_filters, *map(tuple, window[:3]), True, *size, grad_x
    )
    return grad_x


def cuda_weight_gradient(
    grad: Tensor,
    scale: Tensor,
    bits: int,
    x: Tensor,
    x_scale: Tensor,
    x_bits: int,
    shape: Size,
    window: Window,
) -> Tensor:
    """As `native_weight_gradient`."""
    grad_w = x.new_empty(shape, dtype=torch.float32)
    scratch = torch.empty_like(grad_w, dtype=torch.int64)
    of_x = _as_images(x), x_scale, x_bits, window[3]
    native.require().integer_conv_weight_gradient(
        _as_images(grad), scale, bits, *of_x, *map(tuple, window[:3]), grad_w, scratch
    )
    return grad_w


def _backward_of(
    quantize: Callable, input_gradient: Callable, weight_gradient: Callable
) -> Callable:
    """The backward of a backend that has these."""

    def backward(
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
        window = stride, padding, dilation, groups
        noise = reference.seeded_noise(grad_y, seed)
        grad = *quantize(_as_images(grad_y), bits, power_of_two, rounding, noise), bits
        grad_x = grad_w = grad_y.new_empty(0, dtype=torch.float32)
        if need_x:
            grad_x = input_gradient(*grad, w, w_scale, w_bits, x.shape[2:], window)
        if need_w:
            grad_w = weight_gradient(*grad, x, x_scale, x_bits, w.shape, window)
        return grad_x, grad_w

    return backward


native_conv2d_backward = _backward_of(
    native_quantize, native_input_gradient, native_weight_gradient
)
cuda_conv2d_backward = _backward_of(cuda_quantize, cuda_input_gradient, cuda_weight_gradient)


def _empty_input_gradient(grad: Tensor, w: Tensor, size: Size, window: Window) -> Tensor:
    """[B, C, H, W], channels_last."""
    return torch.empty(
        (grad.shape[0], w.shape[1] * window[3], *size),
        dtype=torch.float32,
        device=grad.device,
        memory_format=torch.channels_last,
    )


def y_shape(
    x: Tensor | DfpTensor,
    w: Tensor | DfpTensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int, int, int]:
    """[B, O, OH, OW]."""
    batch, _, height, width = x.shape
    filters, _, down, across = w.shape
    return (
        batch,
        filters,
        out_size(height, down, stride[0], padding[0], dilation[0]),
        out_size(width, across, stride[1], padding[1], dilation[1]),
    )


def empty_y(
    x: Tensor,
    w: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """[B, O, OH, OW], channels_last."""
    return torch.empty(
        y_shape(x, w, stride, padding, dilation),
        dtype=torch.float32,
        device=x.device,
        memory_format=torch.channels_last,
    )


def empty_gradients(x: Tensor, w: Tensor, need_x: bool, need_w: bool) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    return (
        torch.empty(x.shape, memory_format=torch.channels_last, **options)
        if need_x
        else torch.empty(0, **options),
        torch.empty(w.shape if need_w else 0, **options),
    )
