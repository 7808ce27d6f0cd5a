"""Mix-shift: schema, fake, derivative and public functions.

Source: Zheng et al., "Mixing and Shifting: Exploiting Global and Local Dependencies in Vision
MLPs", arXiv:2202.06510, section 3; Liu et al., "A ConvNet for the 2020s", arXiv:2201.03545.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor
from torch._utils import _flatten_dense_tensors
from torch.utils.flop_counter import register_flop_formula

from ... import autocast, checks, dispatch, native
from ...dispatch import Kernels
from ...tensors import accumulation_dtype
from . import reference
from .reference import Gradients, empty_gradients, empty_y

MOST_GROUPS = 64
_PLACES_OF_A_PIECE = 64  # at least, of sums on CUDA
_MOST_SHIFT = 2**62  # so that sums of a shift and a place stay within int64


def _native_forward(
    x: Tensor,
    weight_lr: Tensor,
    weight_td: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[int],
    shifts: Sequence[int],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    y = empty_y(x, norm_weight is not None)
    weights, norm = _dense(weight_lr, weight_td, bias), _dense(norm_weight, norm_bias)
    native.require().mix_shift_forward(x, *weights, kernels, shifts, *norm, eps, y)
    return y


def _native_backward(
    grad_y: Tensor,
    x: Tensor,
    weight_lr: Tensor,
    weight_td: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[int],
    shifts: Sequence[int],
    norm_weight: Tensor | None,
    eps: float,
    need_x: bool,
    need_weights: bool,
    need_norm: bool,
) -> Gradients:
    weights = weight_lr, weight_td, bias = _dense(weight_lr, weight_td, bias)
    (norm_weight,) = _dense(norm_weight)
    grads = empty_gradients(
        x, weight_lr, weight_td, bias, norm_weight, need_x, need_weights, need_norm
    )
    grad_x, grad_lr, grad_td, grad_bias, *of_norm = grads
    extension = native.require()
    groups = kernels, shifts
    if norm_weight is not None:
        grad_u = torch.empty_like(x, memory_format=torch.channels_last)
        if not need_norm:  # the kernels sum them on their way
            of_norm = [torch.empty_like(norm_weight) for _ in range(2)]
        extension.mix_shift_norm_backward(
            *(grad_y, x, *weights, *groups, norm_weight, eps),
            *(grad_u, *of_norm, _scratch(x, 2 * x.shape[1], 256)),
        )
        grad_y = grad_u
    if need_x:
        extension.mix_shift_input_gradient(grad_y, weight_lr, weight_td, *groups, grad_x)
    if need_weights:
        extension.mix_shift_weight_gradient(
            *(grad_y, x, *groups, grad_lr),
            None if weight_td is None else grad_td,
            None if bias is None else grad_bias,
            _scratch(x, 2 * weight_lr.shape[0] + x.shape[1], 64),
        )
    return grads


def _dense(*tensors: Any) -> tuple:
    """Those that a functorch transform has cut out of larger ones are copied."""
    return tuple(t if t is None or t.is_contiguous() else t.contiguous() for t in tensors)


def _scratch(x: Tensor, size: int, most: int) -> Tensor | None:
    """[P, size] for the sums of CUDA kernels, None where the kernels are the CPU's.

    P, at most `most`, is how many pieces work is cut into: the norm's blocks have all channels, and
    need more of them than those of weights, which are cut by channels too.
    """
    if x.device.type != native.cuda_device_type:
        return None
    places = x.shape[0] * x.shape[2] * x.shape[3]
    pieces = max(1, min(most, places // _PLACES_OF_A_PIECE))
    return x.new_empty(pieces, size, dtype=accumulation_dtype(x.dtype))


for _backend, _kernels in {
    "reference": Kernels(
        reference.mix_shift_forward, reference.mix_shift_backward, dispatch.refuses_dtype
    ),
    "cpu": Kernels(_native_forward, _native_backward, dispatch.refuses_native),
    "cuda": Kernels(_native_forward, _native_backward, dispatch.refuses_cuda),
}.items():
    dispatch.register("mix_shift", _backend, _kernels)


def _fake(
    x: Tensor,
    weight_lr: Tensor,
    weight_td: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[int],
    shifts: Sequence[int],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    return empty_y(x, norm_weight is not None)


def _backward_fake(
    grad_y: Tensor,
    x: Tensor,
    weight_lr: Tensor,
    weight_td: Tensor | None,
    bias: Tensor | None,
    kernels: Sequence[int],
    shifts: Sequence[int],
    norm_weight: Tensor | None,
    eps: float,
    need_x: bool,
    need_weights: bool,
    need_norm: bool,
) -> Gradients:
    return empty_gradients(
        x, weight_lr, weight_td, bias, norm_weight, need_x, need_weights, need_norm
    )


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight_lr, weight_td, bias, ctx.kernels, ctx.shifts, norm_weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight_lr, weight_td, bias, norm_weight)


def _backward(ctx: Any, grad_y: Tensor) -> tuple:
    *tensors, norm_weight = ctx.saved_tensors
    need_x, *need_weights = ctx.needs_input_grad[:4]
    need_norm = ctx.needs_input_grad[6:8]
    grads = _mix_shift.run_backward(
        *(grad_y, *tensors, ctx.kernels, ctx.shifts, norm_weight, ctx.eps),
        *(need_x, any(need_weights), any(need_norm)),
    )
    *of_mixing, of_norm_weight, of_norm_bias = grads
    gradients = (*of_mixing, None, None, of_norm_weight, of_norm_bias, None)
    return tuple(
        grad if needed else None
        for grad, needed in zip(gradients, ctx.needs_input_grad, strict=True)
    )


_mix_shift = dispatch.Op(
    "mix_shift",
    "(Tensor x, Tensor weight_lr, Tensor? weight_td, Tensor? bias, int[] kernels, int[] shifts,"
    " Tensor? norm_weight, Tensor? norm_bias, float eps) -> Tensor",
    _fake,
    "(Tensor grad_y, Tensor x, Tensor weight_lr, Tensor? weight_td, Tensor? bias, int[] kernels,"
    " int[] shifts, Tensor? norm_weight, float eps, bool need_x, bool need_weights,"
    " bool need_norm)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    _setup,
    _backward,
    vmap="loop",
)


@register_flop_formula(torch.ops.viops.mix_shift)
def _flops(
    x_shape: Size, lr_shape: Size, td_shape: Size | None, *args: object, **kwargs: object
) -> int:
    """Two for each tap of each place."""
    batch, _, height, width = x_shape
    taps = math.prod(lr_shape) + (0 if td_shape is None else math.prod(td_shape))
    return 2 * batch * height * width * taps


@register_flop_formula(torch.ops.viops.mix_shift_backward)
def _backward_flops(
    grad_shape: Size,
    x_shape: Size,
    lr_shape: Size,
    td_shape: Size | None,
    bias_shape: Size | None,
    kernels: Sequence[int],
    shifts: Sequence[int],
    norm_shape: Size | None,
    eps: float,
    need_x: bool,
    need_weights: bool,
    need_norm: bool,
    **kwargs: object,
) -> int:
    passes = need_x + need_weights + (norm_shape is not None)
    return passes * _flops(x_shape, lr_shape, td_shape, out_val=None)


def _check_sequence(name: str, value: object, length: int | None) -> None:
    if not isinstance(value, Sequence) and not isinstance(value, torch.nn.ParameterList):
        raise TypeError(f"{name}: expected a sequence, got {type(value).__name__}")
    if length is not None and len(value) != length:
        raise ValueError(f"{name}: expected {length} entries, as weights_lr, got {len(value)}")


def _check_parameters(
    name: str, values: Sequence, shapes: Sequence[tuple], axes: str, x: Tensor
) -> None:
    """Each of the shape of its place; None passes where `axes` is "C": a bias."""
    device = x.device
    for g, (value, shape) in enumerate(zip(values, shapes, strict=True)):
        if value is None and axes == "C":
            continue
        if (  # what is good passes without a call: there are many of them
            not isinstance(value, Tensor)
            or value.shape != shape
            or value.dtype not in checks.FLOAT_DTYPES
            or value.device != device
            or value.layout is not torch.strided
        ):
            _check_parameter(f"{name}[{g}]", value, shape, axes, x)


def _check_parameter(name: str, value: object, shape: tuple, axes: str, x: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor [{axes}], got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(
            f"{name}: expected [{axes}] = {list(shape)}, got shape {list(value.shape)}"
        )
    if value.dtype not in checks.FLOAT_DTYPES:
        raise TypeError(f"{name}: expected a floating-point tensor, got {value.dtype}")
    checks.check_layout(name, value)
    checks.check_same("device", name, value.device, "x", x.device)


def _side_of(name: str, value: object, channels: int) -> int:
    """k of filters [channels, 1, k, k], whose other axes are still to be checked."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    size = value.shape[-1] if value.dim() == 4 else 0
    if size % 2 == 0 or size > 32767:
        raise ValueError(
            f"{name}: expected [{channels}, 1, k, k], k odd and at most 32767, "
            f"got shape {list(value.shape)}"
        )
    return size


def _check_images(x: object) -> None:
    checks.check_float_tensor("x", x, "B C H W")
    assert isinstance(x, Tensor)
    if 0 in x.shape[1:]:
        raise ValueError(f"x: expected C, H and W of at least 1, got shape {list(x.shape)}")


def _check_norm(norm_weight: object, norm_bias: object, x: Tensor) -> None:
    _check_parameter("norm_weight", norm_weight, (x.shape[1],), "C", x)
    if norm_bias is not None:
        _check_parameter("norm_bias", norm_bias, (x.shape[1],), "C", x)


def _group_sizes(channels: int, count: int) -> list[int]:
    """Channels of each group, as torch.chunk deals them."""
    size = -(-channels // count)
    return [min(size, channels - begin) for begin in range(0, channels, size)]


def _check_groups(
    x: Tensor,
    weights: tuple[Sequence, Sequence],
    biases: tuple[Sequence | None, Sequence | None],
    shifts: Sequence[int],
) -> tuple[list[int], list[int]]:
    """Kernel size and shift of each group."""
    _check_sequence("weights_lr", weights[0], None)
    count = len(weights[0])
    if not 1 <= count <= MOST_GROUPS:
        raise ValueError(f"weights_lr: expected 1 to {MOST_GROUPS} groups, got {count}")
    _check_sequence("weights_td", weights[1], count)
    sizes = _group_sizes(x.shape[1], count)
    if len(sizes) != count:
        raise ValueError(
            f"weights_lr: expected {len(sizes)} groups, into which torch.chunk cuts the "
            f"{x.shape[1]} channels of x when asked for {count}, got {count}"
        )
    kernels = [
        _side_of(f"weights_lr[{g}]", weight, sizes[g]) for g, weight in enumerate(weights[0])
    ]
    shapes = [(size, 1, k, k) for size, k in zip(sizes, kernels, strict=True)]
    _check_parameters("weights_lr", weights[0], shapes, "C, 1, k, k", x)
    _check_parameters("weights_td", weights[1], shapes, "C, 1, k, k", x)
    for name, values in zip(("biases_lr", "biases_td"), biases, strict=True):
        if values is not None:
            _check_sequence(name, values, count)
            _check_parameters(name, values, [(size,) for size in sizes], "C", x)
    _check_sequence("shifts", shifts, count)
    checked = [
        checks.check_int(f"shifts[{g}]", shift, -_MOST_SHIFT, _MOST_SHIFT, "of 64 bits")
        for g, shift in enumerate(shifts)
    ]
    return kernels, checked


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All elements of these, one tensor after the other, in this dtype."""
    if dispatch.is_plain_eager():
        flat = _flatten_dense_tensors(tuple(tensors))  # one call, where reshaping each is many
    else:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    return flat if flat.dtype is dtype else flat.to(dtype)


def _flat_biases(
    biases: Sequence[Tensor | None] | None, x: Tensor, count: int, dtype: torch.dtype
) -> Tensor | None:
    """[C], zeros for groups without; None where none has any."""
    if biases is None:
        return None
    missing = sum(bias is None for bias in biases)
    if missing == count:
        return None
    if missing:
        sizes = _group_sizes(x.shape[1], count)
        biases = [
            x.new_zeros(size) if bias is None else bias
            for size, bias in zip(sizes, biases, strict=True)
        ]
    return _flat(biases, dtype)  # type: ignore[arg-type]


def mix_shift(
    x: Tensor,
    weights_lr: Sequence[Tensor],
    biases_lr: Sequence[Tensor | None] | None,
    weights_td: Sequence[Tensor],
    biases_td: Sequence[Tensor | None] | None,
    shifts: Sequence[int],
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Channel groups rolled along width and along height, mixed by depthwise convolutions, summed.

    For group g of G, of the channels that torch.chunk(x, G, dim=1) gives it::

        dwconv(roll(x_g, shifts[g], dim=3), weights_lr[g])
        + dwconv(roll(x_g, shifts[g], dim=2), weights_td[g])

    plus biases; rolls are circular, as torch.roll's, and zeros lie around what was rolled.

    Args:
        x: [B, C, H, W], float32, float64, bfloat16 or float16, any strides; contiguous and
            channels_last are the fast paths.
        weights_lr, weights_td: for each of the 1 to 64 groups [Cg, 1, k, k], k odd and the same in
            both; of any of these dtypes.
        biases_lr, biases_td: for each group [Cg] or None, or None for no biases at all.
        shifts: an integer for each group, of either sign, up to 2**62.
        norm_weight: [C], or None; where it is given, the layer norm over channels that follows in
            the block of the paper is part of the op, and the result channels_last.
        norm_bias: [C], or None for zeros.
        eps: added to the variance of the norm.

    Returns:
        y [B, C, H, W], in x's dtype, channels_last where x is or where it is normed, else
        contiguous.  Gradients go to all tensors.  Sums are held in float32, or float64 for
        float64; between the gradients of norm and convolution half types round once, as eager's
        do.  Under autocast x is cast as conv2d would cast it.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: MS-MLP (Zheng et al., arXiv:2202.06510), section 3.
    """
    _check_images(x)
    kernels, checked_shifts = _check_groups(
        x, (weights_lr, weights_td), (biases_lr, biases_td), shifts
    )
    if norm_weight is not None:
        _check_norm(norm_weight, norm_bias, x)
    elif norm_bias is not None:
        kind = type(norm_bias).__name__
        raise ValueError(f"norm_bias: expected None where norm_weight is None, got {kind}")
    eps = checks.check_eps("eps", eps)
    x = autocast.to_autocast_dtype(x)
    if dispatch.is_reference_forced():
        return reference.mix_shift(
            *(x, weights_lr, biases_lr, weights_td, biases_td, checked_shifts),
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=eps,
        )
    dtype = accumulation_dtype(x.dtype)
    bias_lr = _flat_biases(biases_lr, x, len(kernels), dtype)
    bias_td = _flat_biases(biases_td, x, len(kernels), dtype)
    return _mix_shift(
        x,
        _flat(weights_lr, dtype),
        _flat(weights_td, dtype),
        bias_lr if bias_td is None else bias_td if bias_lr is None else bias_lr + bias_td,
        kernels,
        checked_shifts,
        _vector(norm_weight, dtype),
        _vector(norm_bias, dtype),
        eps,
    )


def _vector(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if value is None:
        return None
    value = value if value.dtype is dtype else value.to(dtype)
    return value if value.is_contiguous() else value.contiguous()


def depthwise_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    eps: float = 1e-6,
) -> Tensor:
    """Depthwise convolution, then layer norm over the channels: the first half of ConvNeXt's block.

    Args:
        x: [B, C, H, W], float32, float64, bfloat16 or float16, any strides; contiguous and
            channels_last are the fast paths.
        weight: [C, 1, k, k], k odd; zeros lie around x, k // 2 at each side.
        bias: [C], or None.
        norm_weight: [C].
        norm_bias: [C], or None for zeros.
        eps: added to the variance.

    Returns:
        y [B, C, H, W], in x's dtype, channels_last: ``y.permute(0, 2, 3, 1)`` is contiguous, ready
        for linear layers.  Gradients go to all tensors.  Sums are held in float32, or float64 for
        float64; between the gradients of norm and convolution half types round once, as eager's
        do.  Under autocast x is cast as conv2d would cast it.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Source: ConvNeXt (Liu et al., arXiv:2201.03545), section 2.
    """
    _check_images(x)
    channels = x.shape[1]
    kernel = _side_of("weight", weight, channels)
    _check_parameter("weight", weight, (channels, 1, kernel, kernel), "C, 1, k, k", x)
    if bias is not None:
        _check_parameter("bias", bias, (x.shape[1],), "C", x)
    _check_norm(norm_weight, norm_bias, x)
    eps = checks.check_eps("eps", eps)
    x = autocast.to_autocast_dtype(x)
    if dispatch.is_reference_forced():
        return reference.depthwise_norm(x, weight, bias, norm_weight, norm_bias, eps)
    dtype = accumulation_dtype(x.dtype)
    return _mix_shift(
        x,
        _flat([weight], dtype) if weight.dtype is not dtype else weight.reshape(-1),
        None,
        _vector(bias, dtype),
        [kernel],
        [0],
        _vector(norm_weight, dtype),
        _vector(norm_bias, dtype),
        eps,
    )
