"""Mix-shift beyond the contract: what it equals, layouts, dtypes, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import viops
from contract import ALL_BACKENDS, DTYPES, Backend, case_id, each_backend
from tolerances import assert_matches, coarser
from torch import Tensor, nn
from viops import native
from viops.cases import axes_swapped, every_second
from viops.ops.mix_shift import reference

pytestmark = pytest.mark.filterwarnings("ignore:.*taken away by the test:RuntimeWarning")

#: But not the CUDA kernels on the CPU, which take too long.
ON_CPU = [row for row in ALL_BACKENDS if row.backend in ("cpu", "reference")]

backend = each_backend(ON_CPU)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class Parameters(NamedTuple):
    """All that follows x."""

    weights_lr: list[Tensor]
    biases_lr: list[Tensor]
    weights_td: list[Tensor]
    biases_td: list[Tensor]
    shifts: list[int]

    def to(self, dtype: torch.dtype) -> Parameters:
        return Parameters(*([t.to(dtype) for t in part] for part in self[:4]), self.shifts)

    def tensors(self) -> list[Tensor]:
        return [tensor for part in self[:4] for tensor in part]

    def require_grad(self) -> Parameters:
        for tensor in self.tensors():
            tensor.requires_grad_()
        return self


def parameters(
    channels: int,
    kernels: tuple[int, ...],
    shifts: tuple[int, ...],
    dtype: torch.dtype = torch.float64,
) -> Parameters:
    """Such that results are about 1."""
    sizes = [part.shape[0] for part in torch.zeros(channels).chunk(len(kernels))]
    seeds = iter(range(1, 10000))

    def direction() -> tuple[list[Tensor], list[Tensor]]:
        pairs = list(zip(sizes, kernels, strict=True))
        weights = [normal(n, 1, k, k, seed=next(seeds), dtype=dtype) / k for n, k in pairs]
        return weights, [normal(n, seed=next(seeds), dtype=dtype) for n in sizes]

    return Parameters(*direction(), *direction(), list(shifts))


def official(x: Tensor, values: Parameters) -> Tensor:
    """chunk, roll, conv2d, cat of both directions, sum: as the authors' block has it."""
    groups = x.chunk(len(values.shifts), dim=1)

    def direction(weights: list[Tensor], biases: list[Tensor], axis: int) -> Tensor:
        mixed = []
        for group, weight, bias, shift in zip(groups, weights, biases, values.shifts, strict=True):
            rolled, padding = torch.roll(group, shift, axis), weight.shape[-1] // 2
            mixed.append(F.conv2d(rolled, weight, bias, 1, padding, 1, group.shape[1]))
        return torch.cat(mixed, dim=1)

    along_width = direction(values.weights_lr, values.biases_lr, 3)
    return along_width + direction(values.weights_td, values.biases_td, 2)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "strided": every_second,
    "axes swapped": lambda x: axes_swapped(x, 1, 3),
    "cropped": lambda x: F.pad(x, (2, 1, 1, 1))[:, :, 1:-1, 2:-1],
}


class Geometry(NamedTuple):
    shape: tuple[int, int, int, int]
    kernels: tuple[int, ...]
    shifts: tuple[int, ...]


def draw_geometries(count: int) -> list[Geometry]:
    """Of all kinds, by seed."""
    generator = torch.Generator().manual_seed(7)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    drawn: list[Geometry] = []
    while len(drawn) < count:
        groups, channels = integer(1, 6), integer(1, 41)
        if len(torch.zeros(channels).chunk(groups)) != groups:
            continue
        kernels = tuple(2 * integer(0, 4) + 1 for _ in range(groups))
        shifts = tuple(integer(-12, 12) for _ in range(groups))
        drawn.append(
            Geometry((integer(1, 3), channels, integer(1, 20), integer(1, 35)), kernels, shifts)
        )
    return drawn


GEOMETRIES = draw_geometries(60)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_official_form(backend: Backend, layout: str) -> None:
    for seed, (shape, kernels, shifts) in enumerate(GEOMETRIES):
        x = LAYOUTS[layout](normal(*shape, seed=seed)).requires_grad_()
        values = parameters(shape[1], kernels, shifts).require_grad()
        y, expected = viops.mix_shift(x, *values), official(x, values)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        weight, leaves = normal(*shape, seed=99), [x, *values.tensors()]
        grads = torch.autograd.grad(y, leaves, weight)
        wanted = torch.autograd.grad(expected, leaves, weight)
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=case_id)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_official_form_in_other_dtypes(
    backend: Backend, layout: str, dtype: torch.dtype
) -> None:
    """Half types are rounded once, whatever lies between: the truth is that of float64."""
    for seed, (shape, kernels, shifts) in enumerate(GEOMETRIES[:20]):
        x = LAYOUTS[layout](normal(*shape, seed=seed).to(dtype))
        values = parameters(shape[1], kernels, shifts, dtype)
        y = viops.mix_shift(x, *values)
        assert y.dtype is dtype
        wide = values.to(torch.float64)
        assert_matches(f"y of {shape} {kernels} {shifts}", y, official(x.double(), wide))


@pytest.mark.parametrize("shift", [0, 1, -1, 4, -6, 7, -9, 63, -630, 10**12, -(10**15)])
def test_shifts_count_modulo_the_size(backend: Backend, shift: int) -> None:
    x = normal(2, 6, 9, 7).requires_grad_()
    values = parameters(6, (3, 5), (shift, -shift))
    near = values._replace(shifts=[shift % 63, -shift % 63])  # 63 is 9 rows, and 7 columns
    y, expected = viops.mix_shift(x, *values), viops.mix_shift(x, *near)
    assert torch.equal(y, expected)
    grads = [torch.autograd.grad(out, x, normal(2, 6, 9, 7, seed=1))[0] for out in (y, expected)]
    assert torch.equal(*grads)
    assert_matches("y", y, official(x.detach(), near))


@pytest.mark.parametrize(
    ("channels", "sizes"),
    [(5, [1, 1, 1, 1, 1]), (9, [2, 2, 2, 2, 1]), (19, [4, 4, 4, 4, 3]), (20, [4] * 5)],
)
def test_groups_are_those_of_chunk(backend: Backend, channels: int, sizes: list[int]) -> None:
    """A group's weight moves that group's channels alone."""
    values = parameters(channels, (1,) * 5, (0,) * 5)
    assert [len(weight) for weight in values.weights_lr] == sizes
    x = normal(1, channels, 3, 4)
    plain = viops.mix_shift(x, *values)
    begin = 0
    for g, size in enumerate(sizes):
        moved = list(values.weights_lr)
        moved[g] = moved[g] + 1
        change = viops.mix_shift(x, *values._replace(weights_lr=moved)) - plain
        expected = torch.zeros_like(x)
        expected[:, begin : begin + size] = x[:, begin : begin + size]
        torch.testing.assert_close(change, expected)
        begin += size


def strides(shape: tuple[int, ...], layout: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(shape).contiguous(memory_format=layout).stride()


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 6, 5, 7), (2, 6, 1, 7), (2, 6, 5, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_the_result(
    backend: Backend, layout: str, shape: tuple[int, int, int, int], normed: bool
) -> None:
    x = LAYOUTS[layout](normal(*shape)).requires_grad_()
    norm = {"norm_weight": normal(6), "norm_bias": normal(6)} if normed else {}
    y = viops.mix_shift(x, *parameters(6, (3, 5), (1, -1)), **norm)
    last = x.permute(0, 2, 3, 1).is_contiguous() and not x.is_contiguous()
    if last or normed:
        assert y.permute(0, 2, 3, 1).is_contiguous()
    else:
        assert y.is_contiguous()
    layout_of_x = torch.channels_last if last else torch.contiguous_format
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    if backend.name != "reference":  # which leaves that to torch's autograd
        assert grad.is_contiguous(memory_format=layout_of_x)


@pytest.mark.parametrize("shape", [(2, 1, 5, 7), (2, 6, 1, 1), (1, 1, 1, 1)], ids=str)
def test_layout_where_both_are_the_same(backend: Backend, shape: tuple[int, ...]) -> None:
    """What is contiguous and channels_last at once stays both."""
    values = parameters(shape[1], (3,), (1,))
    for x in (normal(*shape), normal(*shape).contiguous(memory_format=torch.channels_last)):
        y = viops.mix_shift(x, *values)
        assert y.is_contiguous()
        assert y.permute(0, 2, 3, 1).is_contiguous()


# dtypes


def gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weight = normal(*y.shape, seed=5, dtype=torch.float32)
    return list(torch.autograd.grad(y, leaves, weight.to(y.dtype)))


def test_autocast(backend: Backend) -> None:
    x = normal(2, 19, 6, 7, dtype=torch.float32).requires_grad_()
    values = parameters(19, (1, 3, 3, 5, 7), (-2, -1, 0, 1, 2), torch.float32).require_grad()
    leaves = [x, *values.tensors()]
    with torch.autocast("cpu", torch.bfloat16):
        y = viops.mix_shift(x, *values)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, viops.mix_shift(x.bfloat16(), *values))
    grads = gradients(y, leaves)
    assert [grad.dtype for grad in grads] == [torch.float32] * len(leaves)
    for grad, want in zip(
        grads, gradients(viops.mix_shift(x.bfloat16(), *values), leaves), strict=True
    ):
        assert torch.equal(grad, want)


@pytest.mark.parametrize("of_parameters", DTYPES, ids=case_id)
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_parameters_of_another_dtype(
    backend: Backend, dtype: torch.dtype, of_parameters: torch.dtype
) -> None:
    """The result has x's dtype, each gradient its parameter's."""
    x = normal(2, 11, 6, 7).to(dtype).requires_grad_()
    values = parameters(11, (3, 5), (1, -2), of_parameters).require_grad()
    norm = normal(11, seed=50).abs().to(of_parameters), normal(11, seed=51).to(of_parameters)
    leaves = [x, *values.tensors(), *(part.requires_grad_() for part in norm)]
    y = viops.mix_shift(x, *values, norm_weight=norm[0], norm_bias=norm[1])
    assert y.dtype is dtype
    grads = gradients(y, leaves)
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    lists = [wide[1 + 2 * i : 3 + 2 * i] for i in range(4)]
    u = official(wide[0], Parameters(*lists, values.shifts))
    expected = F.layer_norm(u.permute(0, 2, 3, 1), (11,), *wide[-2:], 1e-6).permute(0, 3, 1, 2)
    assert_matches("y", y, expected.detach())
    weight = normal(*y.shape, seed=5, dtype=torch.float32).to(dtype).double()
    for grad, want, leaf in zip(
        grads, torch.autograd.grad(expected, wide, weight), leaves, strict=True
    ):
        assert_matches("gradient", grad, want, coarser(dtype, leaf.dtype))


def test_biases_that_are_none(backend: Backend) -> None:
    x = normal(2, 6, 5, 7)
    values = parameters(6, (3, 5), (1, -1))
    zeros = [torch.zeros(3, dtype=torch.float64)] * 2
    first, second = values.biases_lr
    for given, meant in [
        (None, zeros),
        ([None, None], zeros),
        ([first, None], [first, zeros[0]]),
        ([None, second], [zeros[0], second]),
    ]:
        expected = official(x, values._replace(biases_lr=meant))
        assert_matches("y", viops.mix_shift(x, *values._replace(biases_lr=given)), expected)
        none = values._replace(biases_lr=given, biases_td=None)
        expected = official(x, values._replace(biases_lr=meant, biases_td=zeros))
        assert_matches("y", viops.mix_shift(x, *none), expected)


# values


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_windows(backend: Backend, value: float) -> None:
    x = normal(2, 6, 9, 17)
    x[1, 2, 3, 5] = value  # of the group that is 3 x 3 and rolled by 3
    y = viops.mix_shift(x, *parameters(6, (3, 5), (3, -2)))
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[1, 2, 2:5, 7:10] = True  # rolled along the width
    expected[1, 2, 5:8, 4:7] = True  # and along the height
    assert torch.equal(~y.isfinite(), expected)


def test_what_is_not_finite_does_not_come_round_the_border(backend: Backend) -> None:
    """Zeros lie around what was rolled: windows end where the rolled image does."""
    x = normal(1, 2, 9, 17)
    x[0, 0, 4, 16] = torch.nan
    y = viops.mix_shift(x, *parameters(2, (3,), (1,)))
    expected = torch.zeros_like(x, dtype=torch.bool)
    expected[0, 0, 3:6, 0:2] = True  # rolled to column 0
    expected[0, 0, 4:7, 15:17] = True  # rolled to row 5
    assert torch.equal(y.isnan(), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_norm_is_the_layer_norm_of_what_comes_without(
    backend: Backend, with_bias: bool, eps: float, layout: str
) -> None:
    x = LAYOUTS[layout](normal(2, 19, 6, 7)).requires_grad_()
    values = parameters(19, (1, 3, 3, 5, 7), (-2, -1, 0, 1, 2)).require_grad()
    weight = normal(19, seed=1).requires_grad_()
    bias = normal(19, seed=2).requires_grad_() if with_bias else None
    y = viops.mix_shift(x, *values, norm_weight=weight, norm_bias=bias, eps=eps)
    u = viops.mix_shift(x, *values).permute(0, 2, 3, 1)
    expected = F.layer_norm(u, (19,), weight, bias, eps).permute(0, 3, 1, 2)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    leaves = [x, *values.tensors(), weight, *([] if bias is None else [bias])]
    for grad, want in zip(gradients(y, leaves), gradients(expected, leaves), strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-10)


# what the op takes


def test_sequences_of_other_types(backend: Backend) -> None:
    x, values = normal(2, 6, 5, 7), parameters(6, (3, 5), (1, -1))
    expected = viops.mix_shift(x, *values)
    assert torch.equal(viops.mix_shift(x, *map(tuple, values)), expected)
    lists = [nn.ParameterList(part) for part in values[:4]]
    y = viops.mix_shift(x, *lists, (1, -1))
    assert torch.equal(y, expected)
    y.sum().backward()
    assert all(parameter.grad is not None for part in lists for parameter in part)


def test_parameters_of_any_strides(backend: Backend) -> None:
    x, values = normal(2, 6, 5, 7), parameters(6, (3, 5), (1, -1))
    spread = Parameters(*([every_second(t) for t in part] for part in values[:4]), values.shifts)
    norm = normal(6, seed=1), normal(6, seed=2)
    options = [
        dict(zip(("norm_weight", "norm_bias"), n, strict=True))
        for n in (norm, [every_second(part) for part in norm])
    ]
    expected = viops.mix_shift(x, *values, **options[0])
    assert torch.equal(viops.mix_shift(x, *spread, **options[1]), expected)
    weight = normal(6, 1, 3, 3, seed=3)
    expected = viops.depthwise_norm(x, weight, norm[0], *norm)
    strided = viops.depthwise_norm(
        x, axes_swapped(weight, 0, 3), *map(every_second, (norm[0], *norm))
    )
    assert torch.equal(strided, expected)


@pytest.mark.skipif(native.extension is None, reason="there is no extension")
def test_explain() -> None:
    x, values = normal(2, 6, 5, 7), parameters(6, (3, 5), (1, -1))
    of_mixing = viops.explain("mix_shift", x, *values)
    explained = viops.explain("depthwise_norm", x, normal(6, 1, 3, 3), None, normal(6), None)
    assert of_mixing.backend == explained.backend == "cpu"
    assert explained.op == of_mixing.op == "mix_shift"
    assert explained.others == ()
    with viops.use_backend("reference"):
        explained = viops.explain("depthwise_norm", x, normal(6, 1, 3, 3), None, normal(6), None)
    assert explained.backend == "reference"


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
def test_the_reference_gives_the_same(dtype: torch.dtype) -> None:
    """Forced, and as the public function's own formula."""
    x, values = normal(2, 19, 6, 7).to(dtype), parameters(19, (1, 3, 3, 5, 7), (-2, -1, 0, 1, 2))
    values = values.to(dtype)
    norm = normal(19, seed=1).abs().to(dtype) + 0.5, normal(19, seed=2).to(dtype)
    weight = normal(19, 1, 5, 5, seed=3).to(dtype) / 5
    for function, arguments, options in [
        ("mix_shift", (x, *values), {}),
        ("mix_shift", (x, *values), {"norm_weight": norm[0], "norm_bias": norm[1]}),
        ("depthwise_norm", (x, weight, norm[1], *norm), {}),
    ]:
        y = getattr(viops, function)(*arguments, **options)
        with viops.use_backend("reference"):
            forced = getattr(viops, function)(*arguments, **options)
        assert torch.equal(forced, getattr(reference, function)(*arguments, **options))
        assert forced.stride() == y.stride()
        assert forced.dtype is y.dtype
        assert_matches(function, y, forced.double())
