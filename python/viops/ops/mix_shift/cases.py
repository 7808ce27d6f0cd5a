"""Inputs of mix_shift and depthwise_norm: what tests, benches and the doctor run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...cases import BadCase, Case, Draw, amid_nan, axes_swapped, every_second

#: Of MS-MLP at every resolution.
SHIFTS = (-2, -1, 0, 1, 2)


def inputs(
    draw: Draw, shape: Sequence[int], kernels: Sequence[int], shifts: Sequence[int] = SHIFTS
) -> tuple:
    """x of this shape, weights and biases of both directions, and the shifts.

    Weights are such that results are about 1.
    """
    x = draw.normal(*shape)
    sizes = [part.shape[0] for part in torch.zeros(shape[1]).chunk(len(kernels))]

    def direction() -> tuple[list[Tensor], list[Tensor]]:
        weights = [draw.normal(n, 1, k, k) / k for n, k in zip(sizes, kernels, strict=True)]
        return weights, [draw.normal(n) for n in sizes]

    return x, *direction(), *direction(), list(shifts)


def depthwise_inputs(draw: Draw, shape: Sequence[int], kernel: int) -> tuple:
    """x of this shape, and all parameters of depthwise_norm."""
    channels = shape[1]
    weight = draw.normal(channels, 1, kernel, kernel) / kernel
    norm = draw.normal(channels).abs() + 0.5, draw.normal(channels)
    return draw.normal(*shape), weight, draw.normal(channels), *norm


def channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def _laid_out(
    change: Callable[[Tensor], Tensor], make: Callable[..., tuple], *args: object
) -> Callable[[Draw], tuple]:
    """make() of inputs, x changed in its layout."""

    def laid_out(draw: Draw) -> tuple:
        x, *others = make(draw, *args)
        return change(x), *others

    return laid_out


def _norm(channels: int) -> dict[str, Callable[[Draw], Tensor]]:
    return {
        "norm_weight": lambda d: d.normal(channels).abs() + 0.5,
        "norm_bias": lambda d: d.normal(channels),
    }


def _mix(name: str, shape: Sequence[int], kernels: Sequence[int], *shifts: int) -> Case:
    shifts = shifts or SHIFTS
    return Case("mix_shift", name, lambda d: inputs(d, shape, kernels, shifts))


def _mix_laid_out(name: str, change: Callable[[Tensor], Tensor], *shape: int) -> Case:
    make = _laid_out(change, inputs, shape, (1, 3, 3, 5, 7))
    return Case("mix_shift", name, make)


def _mix_normed(name: str, change: Callable[[Tensor], Tensor], *shape: int) -> Case:
    make = _laid_out(change, inputs, shape, (1, 3, 3, 5, 7))
    return Case("mix_shift", name, make, _norm(shape[1]))


def _depthwise(name: str, kernel: int, *shape: int, **options: object) -> Case:
    return Case("depthwise_norm", name, lambda d: depthwise_inputs(d, shape, kernel), options)


def _depthwise_laid_out(name: str, change: Callable[[Tensor], Tensor], *shape: int) -> Case:
    return Case("depthwise_norm", name, _laid_out(change, depthwise_inputs, shape, 7))


def _same(x: Tensor) -> Tensor:
    return x


def _without_biases(draw: Draw) -> tuple:
    x, weights_lr, _, weights_td, _, shifts = inputs(draw, (2, 6, 5, 7), (3, 5), (1, -1))
    return x, weights_lr, None, weights_td, None, shifts


def _with_some_biases(draw: Draw) -> tuple:
    x, weights_lr, biases_lr, weights_td, _, shifts = inputs(draw, (2, 6, 5, 7), (3, 5), (1, -1))
    return x, weights_lr, [None, biases_lr[1]], weights_td, None, shifts


def _large(change: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x * torch.finfo(x.dtype).max ** change


CASES = (
    _mix("deit", (2, 64, 14, 14), (1, 3, 3, 5, 7)),
    _mix("large", (4, 96, 28, 28), (1, 1, 3, 5, 7)),
    _mix("prime", (5, 11, 7, 5), (1, 3, 5), -1, 0, 2),
    _mix("long", (1, 6, 5, 211), (3, 7), 2, -3),
    _mix("tall", (1, 6, 211, 5), (3, 7), 2, -3),
    _mix("one group", (2, 5, 7, 9), (3,), 1),
    _mix("groups that do not divide", (2, 19, 6, 7), (1, 3, 3, 5, 7)),
    _mix("many channels", (2, 83, 5, 6), (3, 5), 1, -1),
    _mix("a channel a group", (2, 4, 6, 7), (1, 3, 5, 7), 1, 0, -1, 2),
    _mix("no shift", (2, 6, 9, 7), (5, 7), 0, 0),
    _mix("shift of the width", (2, 6, 9, 7), (3, 5, 7), 7, -7, 14),
    _mix("shift of the height", (2, 6, 9, 7), (3, 5, 7), 9, -9, 18),
    _mix("shifts beyond the image", (2, 6, 4, 5), (3, 5, 7), 23, -39, 1 << 40),
    _mix("smaller than a kernel", (2, 6, 3, 2), (5, 7), 1, -1),
    _mix("one place", (2, 6, 1, 1), (3, 7), 1, -1),
    _mix("kernels of any size", (1, 6, 13, 12), (9, 11, 15), 1, 0, -2),
    _mix("no batch", (0, 6, 5, 7), (3, 5), 1, -1),
    Case("mix_shift", "no biases", _without_biases),
    Case("mix_shift", "some biases", _with_some_biases),
    _mix_laid_out("strided", every_second, 2, 19, 6, 7),
    _mix_laid_out("channels last", channels_last, 2, 19, 6, 7),
    _mix_laid_out("channels last wide", channels_last, 2, 180, 9, 11),
    *(  # as many channels as a vector has lanes, at one of the levels
        Case(
            "mix_shift",
            f"channels last {n}",
            _laid_out(channels_last, inputs, (2, n, 6, 7), (7,), (2,)),
        )
        for n in (8, 16)
    ),
    _mix_laid_out("axes swapped", lambda x: axes_swapped(x, 2, 3), 2, 19, 6, 7),
    _mix_laid_out("expanded", lambda x: x[:, :, :1].expand_as(x), 2, 19, 6, 7),
    _mix_laid_out("amid nan", amid_nan, 2, 19, 6, 7),
    _mix_laid_out("amid nan channels last", lambda x: _amid_nan_last(x), 2, 19, 6, 7),
    _mix_laid_out("large values", _large(0.5), 2, 19, 6, 7),
    _mix_normed("norm", _same, 2, 19, 6, 7),
    _mix_normed("norm channels last", channels_last, 2, 19, 6, 7),
    _mix_normed("norm strided", every_second, 2, 19, 6, 7),
    _depthwise("deit", 7, 2, 64, 14, 14),
    _depthwise("large", 7, 4, 96, 28, 28),
    _depthwise("prime", 5, 3, 11, 7, 5),
    _depthwise("long", 3, 1, 6, 5, 211),
    _depthwise("one tap", 1, 2, 6, 5, 7),
    _depthwise("two channels", 3, 2, 2, 5, 7, eps=0.5),
    _depthwise("smaller than a kernel", 7, 2, 6, 3, 2),
    _depthwise("any size", 9, 1, 6, 13, 12),
    _depthwise("no batch", 7, 0, 6, 5, 7),
    _depthwise("eps", 7, 2, 6, 5, 7, eps=0.1),
    _depthwise_laid_out("strided", every_second, 2, 19, 6, 7),
    _depthwise_laid_out("channels last", channels_last, 2, 19, 6, 7),
    _depthwise_laid_out("expanded", lambda x: x[:, :, :1].expand_as(x), 2, 19, 6, 7),
    _depthwise_laid_out("large values", _large(0.25), 2, 19, 6, 7),
)


def _amid_nan_last(x: Tensor) -> Tensor:
    return amid_nan(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


_MIX_NAMES = "x weights_lr biases_lr weights_td biases_td shifts".split()
_DEPTHWISE_NAMES = "x weight bias norm_weight norm_bias".split()


def _good(draw: Draw, **changes: object) -> tuple:
    """Good arguments of mix_shift but for those named."""
    good = dict(zip(_MIX_NAMES, inputs(draw, (2, 6, 5, 7), (3, 5), (1, -1)), strict=True))
    return tuple({**good, **changes}.values())


def _good_depthwise(draw: Draw, **changes: object) -> tuple:
    good = dict(zip(_DEPTHWISE_NAMES, depthwise_inputs(draw, (2, 6, 5, 7), 3), strict=True))
    return tuple({**good, **changes}.values())


def _bad(
    argument: str,
    error: type[Exception],
    name: str,
    make: Callable[[Draw], tuple],
    **options: object,
) -> BadCase:
    return BadCase("mix_shift", f"{argument} {name}", make, options, error, argument)


def _bad_depthwise(
    argument: str,
    error: type[Exception],
    name: str,
    make: Callable[[Draw], tuple],
    **options: object,
) -> BadCase:
    return BadCase("depthwise_norm", f"{argument} {name}", make, options, error, argument)


def _weights(draw: Draw, *sizes: int) -> list[Tensor]:
    return [draw.normal(3, 1, size, size) for size in sizes]


BAD_CASES = (
    _bad("x", TypeError, "none", lambda d: _good(d, x=None)),
    _bad("x", ValueError, "rank", lambda d: _good(d, x=d.normal(6, 5, 7))),
    _bad("x", TypeError, "int", lambda d: _good(d, x=d.normal(2, 6, 5, 7).long())),
    _bad("x", TypeError, "sparse", lambda d: _good(d, x=d.normal(2, 6, 5, 7).to_sparse())),
    _bad("x", ValueError, "no channels", lambda d: _good(d, x=d.normal(2, 0, 5, 7))),
    _bad("x", ValueError, "no rows", lambda d: _good(d, x=d.normal(2, 6, 0, 7))),
    _bad("weights_lr", TypeError, "tensor", lambda d: _good(d, weights_lr=d.normal(6, 1, 3, 3))),
    _bad("weights_lr", ValueError, "none", lambda d: _good(d, weights_lr=[])),
    _bad("weights_lr", ValueError, "groups", lambda d: _good(d, x=d.normal(2, 1, 5, 7))),
    _bad(r"weights_lr\[1\]", ValueError, "even", lambda d: _good(d, weights_lr=_weights(d, 3, 4))),
    _bad(r"weights_lr\[0\]", TypeError, "number", lambda d: _good(d, weights_lr=[1.0, 2.0])),
    _bad(
        r"weights_lr\[0\]",
        ValueError,
        "channels",
        lambda d: _good(d, weights_lr=[d.normal(4, 1, 3, 3), d.normal(2, 1, 5, 5)]),
    ),
    _bad("weights_td", ValueError, "count", lambda d: _good(d, weights_td=_weights(d, 3))),
    _bad(r"weights_td\[1\]", ValueError, "size", lambda d: _good(d, weights_td=_weights(d, 3, 7))),
    _bad("biases_lr", ValueError, "count", lambda d: _good(d, biases_lr=[d.normal(3)])),
    _bad(r"biases_td\[0\]", ValueError, "size", lambda d: _good(d, biases_td=[d.normal(4), None])),
    _bad(
        r"biases_lr\[1\]",
        TypeError,
        "int",
        lambda d: _good(d, biases_lr=[None, torch.zeros(3, dtype=torch.int64)]),
    ),
    _bad("shifts", ValueError, "count", lambda d: _good(d, shifts=[1])),
    _bad("shifts", TypeError, "int", lambda d: _good(d, shifts=1)),
    _bad(r"shifts\[0\]", TypeError, "float", lambda d: _good(d, shifts=[1.0, 2])),
    _bad(r"shifts\[1\]", ValueError, "large", lambda d: _good(d, shifts=[1, 1 << 63])),
    _bad("norm_weight", ValueError, "size", _good, norm_weight=lambda d: d.normal(5)),
    _bad("norm_bias", ValueError, "alone", _good, norm_bias=lambda d: d.normal(6)),
    _bad("eps", ValueError, "negative", _good, eps=-1.0),
    _bad(
        r"weights_td\[0\]",
        ValueError,
        "device",
        lambda d: _good(d, weights_td=[torch.zeros(3, 1, 3, 3, device="meta"), *_weights(d, 5)]),
    ),
    _bad_depthwise("x", ValueError, "rank", lambda d: _good_depthwise(d, x=d.normal(6, 5, 7))),
    _bad_depthwise(
        "weight", ValueError, "channels", lambda d: _good_depthwise(d, weight=d.normal(6, 2, 3, 3))
    ),
    _bad_depthwise(
        "weight",
        ValueError,
        "not square",
        lambda d: _good_depthwise(d, weight=d.normal(6, 1, 3, 5)),
    ),
    _bad_depthwise("bias", ValueError, "size", lambda d: _good_depthwise(d, bias=d.normal(5))),
    _bad_depthwise(
        "norm_weight", TypeError, "none", lambda d: _good_depthwise(d, norm_weight=None)
    ),
    _bad_depthwise("norm_bias", TypeError, "number", lambda d: _good_depthwise(d, norm_bias=0.0)),
    _bad_depthwise("eps", TypeError, "text", _good_depthwise, eps="0"),
)
