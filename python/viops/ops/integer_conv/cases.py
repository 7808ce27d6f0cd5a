"""Inputs of integer_conv: what tests, benches and the doctor run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...cases import BadCase, Case, Draw, amid_nan, every_second
from .dfp import DfpTensor

Shape = tuple[int, ...]


def _quantize(name: str, make: Callable[[Draw], tuple], **options: object) -> Case:
    return Case("quantize_dfp", name, make, options)


def _conv(
    name: str, x: Shape, w: Shape, has_bias: bool = False, *window: object, **options: object
) -> Case:
    """Of normal values; `window` is stride, padding, dilation, groups, as far as they are given."""

    def make(draw: Draw) -> tuple:
        bias = draw.normal(w[0]) if has_bias else None
        return draw.normal(*x), draw.normal(*w), bias, *window

    return Case("integer_conv2d", name, make, options, precision=torch.float32)


def _linear(name: str, make: Callable[[Draw], tuple], **options: object) -> Case:
    return Case("integer_linear", name, make, options, precision=torch.float32)


def _altered(name: str, of_x: Callable[[Tensor], Tensor], of_w: Callable[[Tensor], Tensor]) -> Case:
    """A convolution of operands in other memory, or of other values."""

    def make(draw: Draw) -> tuple:
        return of_x(draw.normal(2, 6, 7, 9)), of_w(draw.normal(5, 6, 3, 3)), None, 1, 1

    return Case("integer_conv2d", name, make, {}, precision=torch.float32)


def _integers(draw: Draw, bits: int, *shape: int) -> DfpTensor:
    """All integers of so many bits, the largest of both signs included."""
    limit = 2**bits - 1
    data = draw.integers(-limit, limit, *shape, dtype=torch.float64).to(torch.int16)
    data.view(-1)[:2] = torch.tensor([limit, -limit], dtype=torch.int16)
    return DfpTensor(data, torch.tensor(2.0**-bits, device=data.device), bits)


def _largest(draw: Draw, bits: int, sign: int, *shape: int) -> DfpTensor:
    """The largest magnitude everywhere: sums as large as they can be."""
    data = torch.full(shape, sign * (2**bits - 1), dtype=torch.int16, device=draw.device)
    return DfpTensor(data, torch.tensor(2.0**-bits, device=draw.device), bits)


def _of_integers(bits: int) -> Case:
    def make(draw: Draw) -> tuple:
        return _integers(draw, bits, 2, 6, 7, 9), _integers(draw, bits, 5, 6, 3, 3), None, 1, 1

    return Case("integer_conv2d", f"integers of {bits} bits", make, {}, precision=torch.float32)


def _of_largest(bits: int, sign: int) -> Case:
    def make(draw: Draw) -> tuple:
        x = _largest(draw, bits, sign, 1, 70, 3, 4)
        return x, _largest(draw, bits, 1, 9, 70, 3, 3), None, 1, 1

    kind = "equal" if sign > 0 else "opposite"
    return Case(
        "integer_conv2d",
        f"largest of {bits} bits and {kind} signs",
        make,
        {},
        precision=torch.float32,
    )


_IMAGES = (2, 3, 16, 16)

CASES = (
    _quantize("deit", lambda d: (d.normal(*_IMAGES),)),
    _quantize("large", lambda d: (d.normal(4, 64, 28, 28),)),
    _quantize("prime", lambda d: (d.normal(3, 5, 7, 11),)),
    _quantize("long", lambda d: (d.normal(100_003),)),
    _quantize("one value", lambda d: (d.normal(1),)),
    _quantize("no axis", lambda d: (d.normal(1)[0],)),
    _quantize("zeros", lambda d: (d.normal(3, 5) * 0,)),
    _quantize("no batch", lambda d: (d.normal(0, 5, 7),)),
    _quantize("strided", lambda d: (every_second(d.normal(3, 5, 7)),)),
    _quantize("expanded", lambda d: (d.normal(1, 5, 7).expand(3, 5, 7),)),
    _quantize("transposed", lambda d: (d.normal(3, 5, 7).mT,)),
    _quantize(
        "channels last", lambda d: (d.normal(*_IMAGES).to(memory_format=torch.channels_last),)
    ),
    _quantize("amid nan", lambda d: (amid_nan(d.normal(3, 67)),)),
    _quantize("large values", lambda d: (d.normal(3, 67) * (torch.finfo(d.dtype).max ** 0.1),)),
    _quantize("small values", lambda d: (d.normal(3, 67) * (torch.finfo(d.dtype).tiny * 4),)),
    _quantize("powers of two", lambda d: (d.tensor([[2.0**-e for e in range(16)]]),)),
    _quantize("halves", lambda d: (d.integers(-9, 9, 77) / 2,), bits=4),
    _quantize("max", lambda d: (d.normal(3, 67),), scaling="max"),
    _quantize("truncate", lambda d: (d.normal(3, 67),), rounding="truncate"),
    _quantize("max, truncate", lambda d: (d.normal(67),), scaling="max", rounding="truncate"),
    _quantize("1 bit", lambda d: (d.normal(3, 67),), bits=1),
    _quantize("15 bits", lambda d: (d.normal(3, 67),), bits=15),
    _quantize("15 bits, max", lambda d: (d.normal(3, 67),), bits=15, scaling="max"),
    _conv("deit", _IMAGES, (8, 3, 4, 4), True, 4),
    _conv("large", (2, 64, 14, 14), (72, 64, 3, 3), False, 1, 1),
    _conv("prime", (3, 5, 7, 11), (7, 5, 3, 3), True, 1, 1),
    _conv("long", (1, 515, 3, 5), (17, 515, 3, 3), False, 1, 1),
    _conv("no batch", (0, 5, 7, 11), (7, 5, 3, 3), True, 1, 1),
    _conv("one pixel", (2, 40, 1, 1), (19, 40, 1, 1)),
    _conv("pointwise", (2, 24, 5, 6), (35, 24, 1, 1), True),
    _conv("pointwise, stride 2", (2, 24, 5, 7), (16, 24, 1, 1), False, 2),
    _conv("7 x 7, stride 2", (1, 3, 19, 20), (16, 3, 7, 7), False, 2, 3),
    _conv("3 x 3, stride 2", (2, 16, 9, 10), (32, 16, 3, 3), False, 2, 1),
    _conv("stride 3", (1, 8, 10, 11), (6, 8, 2, 2), False, 3),
    _conv("no square", (1, 6, 8, 9), (5, 6, 1, 4), True, (2, 1), (0, 2), (1, 2)),
    _conv("dilated", (1, 6, 11, 12), (5, 6, 3, 3), False, 1, 2, 2),
    _conv("dilated, stride 2", (1, 6, 11, 12), (5, 6, 3, 3), False, 2, 3, 3),
    _conv("padded beyond", (1, 4, 2, 2), (3, 4, 3, 3), False, 1, 3),
    _conv("groups", (2, 12, 7, 6), (20, 3, 3, 3), True, 1, 1, 1, 4),
    _conv("depthwise", (2, 21, 7, 6), (21, 1, 3, 3), True, 1, 1, 1, 21),
    _conv("depthwise, stride 2", (2, 21, 7, 6), (21, 1, 5, 5), False, 2, 2, 1, 21),
    _conv("depthwise, widened", (1, 6, 5, 5), (12, 1, 3, 3), False, 1, 1, 1, 6),
    _conv("same", (1, 4, 6, 7), (3, 4, 2, 3), False, 1, "same", (1, 2)),
    _conv("valid", (1, 4, 6, 7), (3, 4, 2, 3), False, 2, "valid"),
    _conv("max", (2, 6, 7, 9), (5, 6, 3, 3), True, 1, 1, scaling="max"),
    _conv("truncate", (2, 6, 7, 9), (5, 6, 3, 3), True, 1, 1, rounding="truncate"),
    _conv("4 bits", (2, 6, 7, 9), (5, 6, 3, 3), False, 1, 1, bits=4),
    _conv("15 bits", (2, 6, 7, 9), (5, 6, 3, 3), False, 1, 1, bits=15, scaling="max"),
    _conv("depthwise of 15 bits", (2, 6, 7, 9), (6, 1, 5, 5), False, 1, 2, 1, 6, bits=15),
    _altered("strided", every_second, every_second),
    _altered("expanded", lambda x: x[:1].expand(x.shape), lambda w: w[:1].expand(w.shape)),
    _altered(
        "channels last",
        lambda x: x.to(memory_format=torch.channels_last),
        lambda w: w.to(memory_format=torch.channels_last),
    ),
    _altered("amid nan", amid_nan, amid_nan),
    _altered("large values", lambda x: x * torch.finfo(x.dtype).max ** 0.1, lambda w: w * 1000),
    _altered("zeros", lambda x: x * 0, lambda w: w),
    *(_of_integers(bits) for bits in (1, 7, 8, 13, 14, 15)),
    *(_of_largest(bits, sign) for bits in (7, 13, 14, 15) for sign in (1, -1)),
    _linear("deit", lambda d: (d.normal(2, 17, 24), d.normal(32, 24), d.normal(32))),
    _linear("prime", lambda d: (d.normal(3, 7, 13), d.normal(11, 13), d.normal(11))),
    _linear("one axis", lambda d: (d.normal(13), d.normal(11, 13))),
    _linear("no batch", lambda d: (d.normal(0, 13), d.normal(11, 13))),
    _linear("strided", lambda d: (every_second(d.normal(5, 13)), d.normal(13, 11).T)),
    _linear("max", lambda d: (d.normal(5, 13), d.normal(11, 13)), scaling="max", bits=15),
)


def _bad(
    op: str,
    argument: str,
    error: type[Exception],
    name: str,
    make: Callable[[Draw], tuple],
    **options: object,
) -> BadCase:
    return BadCase(op, f"{argument} {name}", make, options, error, argument)


def _with(values: dict[int, float], tensor: Tensor) -> Tensor:
    for place, value in values.items():
        tensor.view(-1)[place] = value
    return tensor


def _x_and_w(draw: Draw) -> tuple[Tensor, Tensor]:
    return draw.normal(1, 4, 5, 5), draw.normal(6, 2, 3, 3)


BAD_CASES = (
    _bad("quantize_dfp", "x", TypeError, "none", lambda d: (None,)),
    _bad("quantize_dfp", "x", TypeError, "int", lambda d: (d.normal(3).int(),)),
    _bad("quantize_dfp", "x", TypeError, "sparse", lambda d: (d.normal(3, 3).to_sparse(),)),
    _bad("quantize_dfp", "x", ValueError, "nan", lambda d: (_with({5: torch.nan}, d.normal(70)),)),
    _bad(
        "quantize_dfp", "x", ValueError, "inf", lambda d: (_with({69: -torch.inf}, d.normal(70)),)
    ),
    _bad(
        "quantize_dfp",
        "x",
        ValueError,
        "too large for float32",
        lambda d: (d.normal(3, dtype=torch.float64) * 1e300,),
    ),
    _bad("quantize_dfp", "bits", ValueError, "zero", lambda d: (d.normal(3), 0)),
    _bad("quantize_dfp", "bits", ValueError, "many", lambda d: (d.normal(3), 16)),
    _bad("quantize_dfp", "bits", TypeError, "float", lambda d: (d.normal(3), 8.0)),
    _bad("quantize_dfp", "scaling", ValueError, "name", lambda d: (d.normal(3),), scaling="min"),
    _bad("quantize_dfp", "rounding", ValueError, "name", lambda d: (d.normal(3),), rounding="up"),
    _bad("quantize_dfp", "generator", TypeError, "int", lambda d: (d.normal(3),), generator=3),
    _bad("integer_conv2d", "x", TypeError, "none", lambda d: (None, d.normal(6, 4, 3, 3))),
    _bad(
        "integer_conv2d", "x", ValueError, "rank", lambda d: (d.normal(4, 5), d.normal(6, 4, 3, 3))
    ),
    _bad("integer_conv2d", "x", ValueError, "channels", _x_and_w),
    _bad(
        "integer_conv2d",
        "x",
        ValueError,
        "nan",
        lambda d: (_with({3: torch.nan}, d.normal(1, 2, 5, 5)), d.normal(6, 2, 3, 3)),
    ),
    _bad(
        "integer_conv2d",
        "x",
        ValueError,
        "smaller than the filters",
        lambda d: (d.normal(1, 4, 2, 5), d.normal(6, 4, 3, 3)),
    ),
    _bad("integer_conv2d", "w", TypeError, "list", lambda d: (d.normal(1, 4, 5, 5), [1.0])),
    _bad(
        "integer_conv2d", "w", ValueError, "rank", lambda d: (d.normal(1, 4, 5, 5), d.normal(6, 4))
    ),
    _bad(
        "integer_conv2d",
        "w",
        ValueError,
        "inf",
        lambda d: (d.normal(1, 2, 5, 5), _with({3: torch.inf}, d.normal(6, 2, 3, 3))),
    ),
    _bad(
        "integer_conv2d",
        "w",
        ValueError,
        "no filters",
        lambda d: (d.normal(1, 4, 5, 5), d.normal(0, 4, 3, 3)),
    ),
    _bad(
        "integer_conv2d",
        "w",
        ValueError,
        "device",
        lambda d: (
            d.normal(1, 4, 5, 5),
            DfpTensor.trusted(
                torch.zeros(6, 4, 3, 3, dtype=torch.int16, device="meta"),
                torch.ones((), device="meta"),
                13,
            ),
        ),
    ),
    _bad(
        "integer_conv2d",
        "groups",
        ValueError,
        "divisor",
        lambda d: (*_x_and_w(d), None, 1, 0, 1, 4),
    ),
    _bad(
        "integer_conv2d", "groups", ValueError, "zero", lambda d: (*_x_and_w(d), None, 1, 0, 1, 0)
    ),
    _bad(
        "integer_conv2d", "stride", ValueError, "zero", lambda d: (*_x_and_w(d), None, 0, 0, 1, 2)
    ),
    _bad(
        "integer_conv2d", "stride", TypeError, "float", lambda d: (*_x_and_w(d), None, 1.5, 0, 1, 2)
    ),
    _bad(
        "integer_conv2d",
        "stride",
        ValueError,
        "three",
        lambda d: (*_x_and_w(d), None, (1, 1, 1), 0, 1, 2),
    ),
    _bad(
        "integer_conv2d",
        "padding",
        ValueError,
        "negative",
        lambda d: (*_x_and_w(d), None, 1, -1, 1, 2),
    ),
    _bad(
        "integer_conv2d",
        "padding",
        ValueError,
        "name",
        lambda d: (*_x_and_w(d), None, 1, "full", 1, 2),
    ),
    _bad(
        "integer_conv2d",
        "padding",
        ValueError,
        "same with a stride",
        lambda d: (*_x_and_w(d), None, 2, "same", 1, 2),
    ),
    _bad(
        "integer_conv2d", "dilation", ValueError, "zero", lambda d: (*_x_and_w(d), None, 1, 0, 0, 2)
    ),
    _bad(
        "integer_conv2d",
        "bias",
        ValueError,
        "size",
        lambda d: (*_x_and_w(d), d.normal(5), 1, 0, 1, 2),
    ),
    _bad("integer_conv2d", "bias", TypeError, "number", lambda d: (*_x_and_w(d), 1.0, 1, 0, 1, 2)),
    _bad(
        "integer_conv2d",
        "bits",
        ValueError,
        "many",
        lambda d: (*_x_and_w(d), None, 1, 0, 1, 2),
        bits=16,
    ),
    _bad("integer_linear", "x", TypeError, "none", lambda d: (None, d.normal(3, 4))),
    _bad("integer_linear", "x", ValueError, "no axis", lambda d: (d.normal(1)[0], d.normal(3, 4))),
    _bad("integer_linear", "x", ValueError, "size", lambda d: (d.normal(2, 5), d.normal(3, 4))),
    _bad("integer_linear", "w", ValueError, "rank", lambda d: (d.normal(2, 4), d.normal(4))),
    _bad(
        "integer_linear", "w", ValueError, "no filters", lambda d: (d.normal(2, 4), d.normal(0, 4))
    ),
    _bad(
        "integer_linear",
        "bias",
        ValueError,
        "size",
        lambda d: (d.normal(2, 4), d.normal(3, 4), d.normal(4)),
    ),
)
