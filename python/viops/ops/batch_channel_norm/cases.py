"""Inputs of batch_channel_norm: what tests, benches and the doctor run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...cases import BadCase, Case, Draw, amid_nan, axes_swapped, every_second


def inputs(draw: Draw, num_groups: int, *shape: int, running: bool = False) -> tuple:
    """x of this shape, num_groups, and all parameters; running statistics where they are asked for.

    Parameters are at least as wide as float32, as models in half types hold them.
    """
    dtype = torch.promote_types(draw.dtype, torch.float32)
    channels = shape[1]

    def positive(size: int) -> Tensor:
        return draw.normal(size, dtype=dtype).abs() + 0.5

    x = draw.normal(*shape)
    statistics = (
        (draw.normal(channels, dtype=dtype), positive(channels)) if running else (None,) * 2
    )
    affine = positive(num_groups).reshape(1, -1, 1), draw.normal(1, num_groups, 1, dtype=dtype)
    bn_bias = draw.normal(channels, dtype=dtype)
    return x, num_groups, positive(channels), bn_bias, *statistics, *affine


def _laid_out(change: Callable[[Tensor], Tensor], num_groups: int, *shape: int) -> Callable:
    """make() of inputs of this shape, x changed in its layout."""

    def make(draw: Draw) -> tuple:
        x, *others = inputs(draw, num_groups, *shape)
        return change(x), *others

    return make


def _channels_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def _residual(*shape: int) -> Callable[[Draw], Tensor]:
    return lambda d: d.normal(*shape)


def _far(draw: Draw) -> tuple:
    """Means of 1000 deviations: sums of squares would cancel.  Few bits of half types are left."""
    x, *others = inputs(draw, 2, 3, 4, 9, 11)
    wide = torch.finfo(draw.dtype).eps < 1e-6
    return x + 1000 * draw.normal(4, 1, 1) if wide else x + 4, *others


def _lone_channels(draw: Draw) -> tuple:
    x, num_groups, bn_weight, _, *others = inputs(draw, 5, 3, 5, 4, 7)
    return x, num_groups, bn_weight, None, *others


def _flat(draw: Draw) -> tuple:
    """Channels of one value each, whose variance is zero, beside others."""
    x, *others = inputs(draw, 2, 3, 4, 5, 7)
    x = torch.cat((x[:, :1, :1, :1].mean(dim=0).expand(3, 1, 5, 7), x[:, 1:]), dim=1)
    return x, *others


def _without(draw: Draw) -> tuple:
    """No parameters at all."""
    return inputs(draw, 2, 3, 4, 5, 7)[0], 2, None, None, None, None, None, None


def _case(name: str, make: Callable[[Draw], tuple], **options: object) -> Case:
    return Case("batch_channel_norm", name, make, {"training": True, **options})


def _running(name: str, num_groups: int, *shape: int, **options: object) -> Case:
    return _case(name, lambda d: inputs(d, num_groups, *shape, running=True), **options)


CASES = (
    _running("deit", 8, 2, 64, 14, 14, training=False),
    _case("large", lambda d: inputs(d, 16, 8, 128, 28, 28)),
    _case("prime", lambda d: inputs(d, 2, 3, 6, 5, 7)),
    _case("long", lambda d: inputs(d, 2, 2, 6, 67, 79)),
    _case("very long", lambda d: inputs(d, 1, 1, 2, 40009)),
    _running("eval", 2, 3, 6, 5, 7, training=False),
    # a share of zero: the running statistics stay, and calls can be repeated
    _running("estimate", 2, 3, 6, 5, 7, estimate=True, momentum=0.0),
    _running("estimate in eval", 2, 3, 6, 5, 7, estimate=True, training=False),
    _running("running", 2, 3, 6, 5, 7, momentum=0.0),
    _case("relu", lambda d: inputs(d, 2, 3, 6, 5, 7), activation="relu"),
    _running("relu in eval", 2, 3, 6, 5, 7, training=False, activation="relu"),
    _case("residual", lambda d: inputs(d, 2, 3, 6, 5, 7), residual=_residual(3, 6, 5, 7)),
    _case(
        "residual and relu",
        lambda d: inputs(d, 2, 3, 6, 5, 7),
        residual=_residual(3, 6, 5, 7),
        activation="relu",
    ),
    _case("one group", lambda d: inputs(d, 1, 3, 5, 4, 7)),
    # group norm undoes what batch norm does to a lone channel, but for eps
    _case("a group a channel", _lone_channels, eps=0.5),
    _case("one image", lambda d: inputs(d, 2, 1, 6, 5, 7)),
    _case("no axes", lambda d: inputs(d, 2, 9, 6)),
    _case("one axis", lambda d: inputs(d, 2, 3, 6, 17)),
    _case("three axes", lambda d: inputs(d, 2, 3, 6, 2, 3, 5)),
    _case("one place", lambda d: inputs(d, 2, 5, 6, 1, 1)),
    _case("eps", lambda d: inputs(d, 2, 3, 6, 5, 7), eps=0.1),
    _case("no parameters", _without),
    _case("no batch", lambda d: inputs(d, 2, 0, 6, 5, 7)),
    _case("no places", lambda d: inputs(d, 2, 3, 6, 0, 7)),
    _running("no batch in eval", 2, 0, 6, 5, 7, training=False),
    _case("strided", _laid_out(every_second, 2, 3, 6, 5, 14)),
    _case("channels last", _laid_out(_channels_last, 2, 3, 6, 5, 7)),
    _case("channels last wide", _laid_out(_channels_last, 4, 2, 72, 9, 11)),
    _case(
        "channels last relu",
        _laid_out(_channels_last, 2, 3, 6, 5, 7),
        activation="relu",
        residual=_residual(3, 6, 5, 7),
    ),
    _case("axes swapped", _laid_out(lambda t: axes_swapped(t, 2, 3), 2, 3, 6, 5, 7)),
    _case("expanded", _laid_out(lambda t: t[:, :, :1].expand_as(t), 2, 3, 6, 5, 7)),
    _case("amid nan", _laid_out(amid_nan, 2, 3, 6, 5, 7)),
    _case("far from zero", _far),
    _case("a flat channel", _flat),
    _case("large values", _laid_out(lambda t: t * torch.finfo(t.dtype).max ** 0.25, 2, 3, 6, 5, 7)),
)


def _bad(
    argument: str,
    error: type[Exception],
    name: str,
    make: Callable[[Draw], tuple],
    **options: object,
) -> BadCase:
    name, options = f"{argument} {name}", {"training": True, **options}
    return BadCase("batch_channel_norm", name, make, options, error, argument)


_NAMES = "x num_groups bn_weight bn_bias running_mean running_var weight bias".split()


def _good(draw: Draw, **changes: object) -> tuple:
    """Good arguments but for those named."""
    good = dict(zip(_NAMES, inputs(draw, 2, 3, 6, 5, 7, running=True), strict=True))
    return tuple({**good, **changes}.values())


BAD_CASES = (
    _bad("x", TypeError, "none", lambda d: _good(d, x=None)),
    _bad("x", ValueError, "rank", lambda d: _good(d, x=d.normal(6))),
    _bad("x", TypeError, "int", lambda d: _good(d, x=d.normal(3, 6, 5).long())),
    _bad("x", TypeError, "sparse", lambda d: _good(d, x=d.normal(3, 6, 5, 7).to_sparse())),
    _bad("x", ValueError, "one value", lambda d: _good(d, x=d.normal(1, 6, 1, 1))),
    _bad("num_groups", ValueError, "divisor", lambda d: _good(d, num_groups=4)),
    _bad("num_groups", ValueError, "zero", lambda d: _good(d, num_groups=0)),
    _bad("num_groups", TypeError, "float", lambda d: _good(d, num_groups=2.0)),
    _bad("bn_weight", ValueError, "size", lambda d: _good(d, bn_weight=d.normal(5))),
    _bad("bn_bias", TypeError, "number", lambda d: _good(d, bn_bias=0.0)),
    _bad("weight", ValueError, "size", lambda d: _good(d, weight=d.normal(6))),
    _bad("bias", TypeError, "int", lambda d: _good(d, bias=torch.zeros(2, dtype=torch.int64))),
    _bad("running_mean", TypeError, "none", lambda d: _good(d, running_mean=None)),
    _bad("running_var", TypeError, "none", lambda d: _good(d, running_var=None)),
    _bad(
        "running_mean",
        TypeError,
        "none in eval",
        lambda d: _good(d, running_mean=None, running_var=None),
        training=False,
    ),
    _bad(
        "running_mean",
        ValueError,
        "device",
        lambda d: _good(d, running_mean=torch.zeros(6, device="meta")),
    ),
    _bad("activation", ValueError, "name", _good, activation="gelu"),
    _bad("eps", TypeError, "text", _good, eps="0"),
    _bad("residual", ValueError, "shape", _good, residual=lambda d: d.normal(3, 6, 7, 5)),
    _bad("residual", TypeError, "number", _good, residual=1.0),
)
