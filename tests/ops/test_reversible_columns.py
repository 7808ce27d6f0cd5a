"""Reversible columns: what is particular to the step, beside the contract."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import viops
from contract import ALL_BACKENDS, Backend, case_id, has, num_threads
from tolerances import TOLERANCES, assert_matches
from torch import Tensor
from viops.cases import Draw
from viops.ops.reversible_columns import op, reference

pytestmark = pytest.mark.filterwarnings("ignore:.*taken away by the test:RuntimeWarning")

HERE = [row for row in ALL_BACKENDS if has(row, "reversible_step")]
LAYOUTS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["planes", "rows"]
)
NAN, INFINITY = math.nan, math.inf
#: alpha and the factor that it gives.
FACTORS = (
    (0.0, 1e-3),
    (-0.0, 1e-3),
    (1e-5, 1e-3),
    (-1e-5, -1e-3),
    (-9.9e-4, -1e-3),
    (1.1e-3, 1.1e-3),
    (-0.5, -0.5),
    (3.0, 3.0),
    (INFINITY, INFINITY),
    (NAN, NAN),
)


@pytest.fixture(params=HERE, ids=case_id)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in turn, on for the whole test."""
    with request.param.enter():
        yield request.param


@pytest.fixture
def draw(backend: Backend) -> Draw:
    return Draw(torch.float32, backend.device)


def operands(
    draw: Draw, *shape: int, memory_format: torch.memory_format = torch.contiguous_format
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f, x and a gradient of this shape; alpha, away from zero."""
    features = (draw.normal(*shape).contiguous(memory_format=memory_format) for _ in range(3))
    alpha = draw.normal(shape[1])
    return *features, alpha + 0.5 * alpha.sign()


# the factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@LAYOUTS
def test_the_magnitude_of_alpha_is_clamped(
    backend: Backend, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    alpha, a = torch.tensor(FACTORS, dtype=dtype, device=backend.device).unbind(dim=1)
    ones = torch.ones(2, len(alpha), 3, 5, dtype=dtype, device=backend.device)
    ones = ones.contiguous(memory_format=memory_format)
    wanted = a[:, None, None].expand_as(ones)
    zeros = torch.zeros_like(ones)
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(viops.reversible_step(zeros, ones, alpha), wanted, **same)
    x, grad_x, _ = viops.reversible_step_backward(ones, zeros, alpha, ones)
    torch.testing.assert_close(grad_x, wanted, **same)
    torch.testing.assert_close(x, 1 / wanted, **same)


def test_nan_stays_in_its_channel(draw: Draw) -> None:
    f, x, grad, alpha = operands(draw, 2, 5, 4, 3)
    alpha[2] = NAN
    others = [0, 1, 3, 4]
    out = viops.reversible_step(f, x, alpha)
    assert out[:, 2].isnan().all()
    assert out[:, others].isfinite().all()
    for result in viops.reversible_step_backward(out.nan_to_num(), f, alpha, grad)[::2]:
        by_channel = result.movedim(1, 0) if result.dim() > 1 else result
        assert by_channel[2].isnan().all()
        assert by_channel[others].isfinite().all()


def test_the_gradient_goes_past_the_clamp(draw: Draw) -> None:
    """As in the official code, which clamps the parameter: a clamped alpha can move away."""
    f, x, grad, _ = operands(draw, 2, 4, 3, 3)
    alpha = torch.tensor([0.0, 1e-5, -1e-5, 0.5], device=x.device, requires_grad=True)
    (found,) = torch.autograd.grad(viops.reversible_step(f, x, alpha), alpha, grad)
    assert_matches("grad_alpha", found, (grad.double() * x.double()).sum(dim=(0, 2, 3)))


# there and back


@pytest.mark.parametrize("shape", [(2, 16, 7, 5), (1, 3, 9), (5, 33), (2, 4, 3, 2, 5)])
@pytest.mark.parametrize("full", [False, True], ids=["[C]", "[1, C, 1]"])
def test_the_way_back_agrees_with_the_derivative(
    draw: Draw, shape: tuple[int, ...], full: bool
) -> None:
    f, x, grad, alpha = operands(draw, *shape)
    alpha = alpha.view(1, -1, *(1 for _ in shape[2:])) if full else alpha
    leaves = [t.clone().requires_grad_() for t in (f, x, alpha)]
    out = viops.reversible_step(*leaves)
    grad_f, *expected = torch.autograd.grad(out, leaves, grad)
    torch.testing.assert_close(grad_f, grad, rtol=0, atol=0)
    rebuilt, *found = viops.reversible_step_backward(out.detach(), f, alpha, grad)
    torch.testing.assert_close(rebuilt, x, rtol=1e-5, atol=1e-5)
    for result, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-4)
    assert found[1].shape == alpha.shape


def test_numbers_worked_out_by_hand(backend: Backend) -> None:
    f = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], device=backend.device)
    x = torch.tensor([[[2.0, 4.0], [1.0, 3.0]]], device=backend.device)
    alpha = torch.tensor([0.5, -2.0], device=backend.device)
    out = viops.reversible_step(f, x, alpha)
    assert out.tolist() == [[[2.0, 4.0], [1.0, -2.0]]]
    back = viops.reversible_step_backward(out, f, alpha, torch.ones_like(f))
    assert back[0].tolist() == x.tolist()
    assert back[1].tolist() == [[[0.5, 0.5], [-2.0, -2.0]]]
    assert back[2].tolist() == [6.0, 4.0]


def test_results_have_no_derivative(draw: Draw) -> None:
    f, x, grad, alpha = (t.requires_grad_() for t in operands(draw, 2, 3, 4, 4))
    assert viops.reversible_step(f, x, alpha).requires_grad
    assert not any(t.requires_grad for t in viops.reversible_step_backward(x, f, alpha, grad))


def test_what_is_kept_for_backward(draw: Draw) -> None:
    """x where alpha has a gradient, else alpha alone; nothing without gradients."""
    f, x, _, alpha = operands(draw, 2, 3, 4, 4)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    if backend_is_reference():
        pytest.skip("plain PyTorch keeps what its own operations do")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        viops.reversible_step(f.clone().requires_grad_(), x, alpha)
        assert kept == [alpha.data_ptr()]
        kept.clear()
        viops.reversible_step(f, x, alpha.clone().requires_grad_())
        assert len(kept) == 2
        assert x.data_ptr() in kept
        kept.clear()
        with torch.no_grad():
            viops.reversible_step(f.requires_grad_(), x, alpha)
        assert kept == []


def backend_is_reference() -> bool:
    return viops.dispatch.is_reference_forced()


# dtypes


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@LAYOUTS
def test_a_half_f_beside_float32(
    backend: Backend, memory_format: torch.memory_format, half: torch.dtype
) -> None:
    """What autocast makes: nothing is rounded to the half type on the way."""
    draw = Draw(torch.float32, backend.device)
    f, x, grad, alpha = operands(draw, 2, 13, 7, 6, memory_format=memory_format)
    f = f.to(half)
    leaves = [t.clone().requires_grad_() for t in (f, x, alpha)]
    out = viops.reversible_step(*leaves)
    a = alpha.double().view(-1, 1, 1)
    assert out.dtype is torch.float32
    assert_matches("out", out, f.double() + a * x.double())
    grads = torch.autograd.grad(out, leaves, grad)
    assert [g.dtype for g in grads] == [half, torch.float32, torch.float32]
    assert torch.equal(grads[0], grad.to(half))
    rebuilt, grad_x, grad_alpha = viops.reversible_step_backward(out.detach(), f, alpha, grad)
    assert {rebuilt.dtype, grad_x.dtype, grad_alpha.dtype} == {torch.float32}
    wide_x = (out.detach().double() - f.double()) / a
    assert_matches("x", rebuilt, wide_x)
    assert_matches("grad_alpha", grad_alpha, (grad.double() * wide_x).sum(dim=(0, 2, 3)))


FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("of_alpha", FLOATS, ids=case_id)
@pytest.mark.parametrize("of_x", FLOATS, ids=case_id)
@pytest.mark.parametrize("of_f", FLOATS, ids=case_id)
def test_dtypes_promote_as_in_the_formula(
    of_f: torch.dtype, of_x: torch.dtype, of_alpha: torch.dtype
) -> None:
    draw = Draw(torch.float32)
    f, x, grad, alpha = operands(draw, 2, 5, 3, 4)
    f, x, alpha = f.to(of_f), x.to(of_x), alpha.to(of_alpha)
    plain = f + alpha.view(1, -1, 1, 1) * x
    leaves = [t.clone().requires_grad_() for t in (f, x, alpha)]
    out = viops.reversible_step(*leaves)
    assert out.dtype is plain.dtype
    a = alpha.double().view(-1, 1, 1)
    assert_matches("out", out, f.double() + a * x.double())
    grads = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    assert [g.dtype for g in grads] == [of_f, of_x, of_alpha]
    back = viops.reversible_step_backward(x, f, alpha, grad.to(of_x))
    assert [t.dtype for t in back] == [of_x, of_x, of_alpha]
    assert_matches("x", back[0], (x.double() - f.double()) / a)
    assert_matches("grad_x", back[1], a * grad.to(of_x).double())


@pytest.mark.parametrize("dtype", FLOATS, ids=case_id)
def test_autocast_changes_nothing(backend: Backend, dtype: torch.dtype) -> None:
    draw = Draw(dtype, backend.device)
    f, x, grad, alpha = operands(draw, 2, 5, 3, 4)
    results = []
    for enabled in (False, True):
        with torch.autocast(backend.device, torch.bfloat16, enabled=enabled):
            out = viops.reversible_step(f, x, alpha)
            results.append((out, *viops.reversible_step_backward(out, f, alpha, grad)))
    for plain, cast in zip(*results, strict=True):
        torch.testing.assert_close(cast, plain, rtol=0, atol=0)


# layouts


@pytest.mark.parametrize("shape", [(2, 5, 7), (2, 5, 3, 4), (2, 5, 3, 4, 2)])
@pytest.mark.parametrize("first", ["planes", "rows"])
@pytest.mark.parametrize("second", ["planes", "rows"])
def test_results_lie_as_the_first_argument(
    draw: Draw, shape: tuple[int, ...], first: str, second: str
) -> None:
    def laid_out(x: Tensor, layout: str) -> Tensor:
        return x if layout == "planes" else x.movedim(1, -1).contiguous().movedim(-1, 1)

    f, x, grad, alpha = operands(draw, *shape)
    f, x, grad = laid_out(f, first), laid_out(x, second), laid_out(grad, second)
    out = viops.reversible_step(f, x, alpha)
    assert out.stride() == f.stride()
    assert_matches("out", out, reference.reversible_step(f.double(), x.double(), alpha.double()))
    for result in viops.reversible_step_backward(f, x, alpha, grad)[:2]:
        assert result.stride() == f.stride()


@LAYOUTS
def test_features_that_lie_alike_are_not_copied(
    memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    f, x, grad, alpha = operands(Draw(torch.float32), 2, 8, 5, 5, memory_format=memory_format)
    seen: list[int | None] = []

    def write(*tensors: Tensor | None) -> None:
        seen.extend(None if t is None else t.data_ptr() for t in tensors)

    op._forward(write, f, x, alpha)
    assert seen[:3] == [f.data_ptr(), x.data_ptr(), alpha.data_ptr()]
    seen.clear()
    op._backward(write, grad, x, f, alpha, True, True)
    assert seen[:4] == [grad.data_ptr(), x.data_ptr(), f.data_ptr(), alpha.data_ptr()]


# sums


@pytest.mark.parametrize("shape", [(64, 3, 56, 56), (1, 2, 1, 200_000), (5, 700), (1, 1, 300, 300)])
@LAYOUTS
def test_long_sums_keep_their_digits(
    draw: Draw, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    """All of one sign: what is added one after another would lose digits."""
    if len(shape) < 4:
        memory_format = torch.contiguous_format
    f, x, grad, alpha = operands(draw, *shape, memory_format=memory_format)
    out, grad = f.abs() + x.abs(), grad.abs()
    *_, found = viops.reversible_step_backward(out, f.abs(), alpha.abs(), grad)
    *_, wanted = reference.reversible_step_backward(
        out.double(), f.abs().double(), alpha.abs().double(), grad.double()
    )
    assert ((found - wanted).norm() / wanted.norm()).item() < TOLERANCES[torch.float32].norm


@pytest.mark.parametrize("shape", [(3, 5, 40, 41), (2, 64, 33, 31), (700, 70), (1, 2, 1, 50_000)])
@LAYOUTS
def test_same_bits_for_any_number_of_threads(
    draw: Draw, shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    if backend_is_reference() or viops.native.extension is None:
        pytest.skip("PyTorch's own operations")
    if len(shape) < 4:
        memory_format = torch.contiguous_format
    f, x, grad, alpha = operands(draw, *shape, memory_format=memory_format)
    results = []
    for threads in (1, 2, 3, 7):
        with num_threads(threads):
            results.append(viops.reversible_step_backward(x, f, alpha, grad))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
