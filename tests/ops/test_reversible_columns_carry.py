"""Reversible columns: the step on features with their rests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
import viops
from contract import ALL_BACKENDS, Backend, case_id, has, num_threads
from tolerances import assert_matches
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from viops import triton_runtime
from viops.cases import Draw
from viops.ops.reversible_columns import carry, reference

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*taken away by the test:RuntimeWarning",
    "ignore:.*(encountered in|cast):RuntimeWarning",  # the interpreter's, of infinities
)

HERE = [row for row in ALL_BACKENDS if has(row, "reversible_step")]
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
#: Of all features, and of f.
DTYPES = [
    (FLOAT32, FLOAT32),
    (BFLOAT16, BFLOAT16),
    (FLOAT16, FLOAT16),
    (FLOAT32, BFLOAT16),
    (FLOAT32, FLOAT16),
]
EACH_DTYPE = pytest.mark.parametrize("dtypes", DTYPES, ids=case_id)
LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
SHAPE = (3, 5, 7, 6)
#: What a rest in float32 keeps of what it stands for, and what a sum in float64 does.
REST_EPS, WIDE_EPS = 2.0**-24, 2.0**-52


@pytest.fixture(params=HERE, ids=case_id)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each backend in turn, on for the whole test."""
    with request.param.enter():
        yield request.param


def skip_what_the_interpreter_cuts(backend: Backend, dtype: torch.dtype) -> None:
    """A GPU rounds to bfloat16; Triton's interpreter cuts bits off, and loses subnormals."""
    if dtype is BFLOAT16 and backend.backend == "triton" and triton_runtime.INTERPRETED:
        pytest.skip("Triton's interpreter does not round to bfloat16")


def laid_out(x: Tensor, last: bool) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


def operands(
    draw: Draw, shape: tuple[int, ...], last: bool = False, f_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """f, x, a rest as x could have it, and alpha of both signs in [0.3, 1.5]."""
    f = laid_out(draw.normal(*shape, dtype=f_dtype), last)
    x = laid_out(draw.normal(*shape), last)
    share = laid_out(draw.normal(*shape, dtype=torch.float64), last).tanh()
    rest = 0.25 * torch.finfo(x.dtype).eps * x.double() * share
    sizes = draw.integers(0, 1200, shape[1]).float() / 1000 + 0.3
    alpha = sizes * draw.normal(shape[1]).sign()
    return f, x, rest.float(), alpha.to(x.dtype)


def rounding_of(value: Tensor, dtype: torch.dtype, *terms: Tensor) -> Tensor:
    """How far a feature and its rest may lie from the value that is a sum of these terms."""
    bound = value.abs() * torch.finfo(dtype).eps * REST_EPS
    return bound + WIDE_EPS * sum(term.abs() for term in (value, *terms))


# what they compute


@EACH_DTYPE
def test_a_feature_and_its_rest_are_the_exact_sum(
    backend: Backend, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    skip_what_the_interpreter_cuts(backend, dtypes[0])
    draw = Draw(dtypes[0], backend.device)
    f, x, x_rest, alpha = operands(draw, (2, 3, 37), f_dtype=dtypes[1])
    for rest in (x_rest, None):
        out, out_rest = carry.step(f, x, rest, alpha)
        given = [f, x, out, out_rest, torch.zeros_like(x) if rest is None else rest]
        factors = [Fraction(a) for a in alpha.tolist()]
        rows = zip(*(t.flatten(0, 1).tolist() for t in given), strict=True)
        for plane, row in enumerate(rows):
            for values in zip(*row, strict=True):
                f_, x_, out_, out_rest_, rest_ = map(Fraction, values)
                shortcut = factors[plane % 3] * (x_ + rest_)
                exact = f_ + shortcut
                eps = Fraction(torch.finfo(dtypes[0]).eps)
                off_ties = Fraction(reference.tilt(dtypes[0])) - 1
                assert abs(out_ - exact) <= abs(exact) * (eps / 2 * (1 + eps) + off_ties)
                bound = abs(exact) * eps * Fraction(REST_EPS)
                bound += Fraction(WIDE_EPS) * (abs(f_) + abs(shortcut))
                assert abs(out_ + out_rest_ - exact) <= bound


def test_the_rest_of_float32_is_that_of_46_bits(backend: Backend) -> None:
    f, x, x_rest, alpha = operands(Draw(FLOAT32, backend.device), (4, 8, 301))
    f = f.abs().copysign(alpha[:, None] * x)  # nothing cancels
    out, out_rest = carry.step(f, x, x_rest, alpha)
    truth = f.double() + alpha.double()[:, None] * (x.double() + x_rest.double())
    error = (out.double() + out_rest.double() - truth).abs() / truth.abs()
    assert error.max() <= 2.0**-46
    assert ((out.double() - truth).abs() / truth.abs()).max() > 2.0**-26


@EACH_DTYPE
@LAYOUTS
@pytest.mark.parametrize("shape", [SHAPE, (2, 67, 3, 3), (1, 3, 1031), (4, 19)], ids=str)
def test_the_way_back_is_the_formula(
    backend: Backend,
    shape: tuple[int, ...],
    last: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    draw = Draw(dtypes[0], backend.device)
    f, out, out_rest, alpha = operands(draw, shape, last, dtypes[1])
    grad_out = laid_out(draw.normal(*shape), last)
    x, x_rest, grad_x, grad_alpha = carry.step_backward(out, out_rest, f, alpha, grad_out)
    a = alpha.double().view(1, -1, *(1 for _ in shape[2:]))
    value = (out.double() + out_rest.double() - f.double()) / a
    error = (x.double() + x_rest.double() - value).abs()
    assert (error <= rounding_of(value, x.dtype, out / a, f / a) + 1e-45).all()
    assert_matches("x", x, value)
    assert_matches("grad_x", grad_x, a * grad_out.double())
    axes = [axis for axis in range(len(shape)) if axis != 1]
    assert_matches("grad_alpha", grad_alpha, (grad_out.double() * x.double()).sum(axes))
    assert x.stride() == x_rest.stride() == grad_x.stride() == out.stride()
    # what is not asked for changes nothing of the others
    for grad, need_rest in ((None, True), (None, False), (grad_out, False)):
        found = carry.step_backward(out, out_rest, f, alpha, grad, need_rest)
        assert torch.equal(found[0], x)
        assert torch.equal(found[1], x_rest) if need_rest else found[1] is None
        for other, wanted in zip(found[2:], (grad_x, grad_alpha), strict=True):
            assert other is None if grad is None else torch.equal(other, wanted)


@EACH_DTYPE
@LAYOUTS
@pytest.mark.parametrize("shape", [SHAPE, (1, 17, 3, 3)], ids=str)
def test_chains_are_undone_to_the_bit(
    backend: Backend,
    shape: tuple[int, ...],
    last: bool,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> None:
    """All of what was, wherever no boundary between two values is as near as the error bound."""
    skip_what_the_interpreter_cuts(backend, dtypes[0])
    draw = Draw(dtypes[0], backend.device)
    x, rest, steps, kept = operands(draw, shape, last)[1], None, [], []
    for _ in range(12):
        f, _, _, alpha = operands(draw, shape, last, dtypes[1])
        kept.append((x, rest))
        steps.append((f, alpha))
        x, rest = carry.step(f, x, rest, alpha)
    kept.append((x, rest))
    sums = [a.double() + (0 if b is None else b.double()) for a, b in kept]
    certain, count = 0, 0
    for length in range(1, len(steps) + 1):
        (x, rest), bound = kept[length], torch.zeros_like(sums[0])
        for place in reversed(range(length)):
            f, alpha = steps[place]
            a = alpha.double().view(1, -1, 1, 1)
            x, rest, _, _ = carry.step_backward(x, rest, f, alpha, None)
            before = sums[place]
            rounding = rounding_of(sums[place + 1], x.dtype, f.double(), a * before)
            bound = (bound + 2 * rounding) / a.abs() + rounding_of(before, x.dtype) + 1e-45
            assert ((x.double() + rest.double() - before).abs() <= bound).all()
            # in whichever direction the error goes, it rounds to what was there
            is_certain = (before - bound).to(x.dtype) == (before + bound).to(x.dtype)
            assert torch.equal(x[is_certain], kept[place][0][is_certain])
            certain, count = certain + int(is_certain.sum()), count + is_certain.numel()
        assert torch.equal(x, kept[0][0])  # what had no rest lies far from any boundary
    assert certain >= (0.999 if dtypes[0] is FLOAT32 else 0.985) * count


def test_drift_is_gone(backend: Backend) -> None:
    """Of float32 features that chains without rests end far from."""
    draw, kept, wrong, count = Draw(FLOAT32, backend.device), [], 0, 0
    x, rest = operands(draw, (2, 64, 3, 5))[1], None
    for _ in range(12):
        f, _, _, alpha = operands(draw, x.shape)
        kept.append((f, alpha, x))
        x, rest = carry.step(f, x, rest, alpha)
    drifted = x
    for f, alpha, was in reversed(kept):
        x, rest, _, _ = carry.step_backward(x, rest, f, alpha, None)
        wrong, count = wrong + int((x != was).sum()), count + x.numel()
        assert (x - was).abs().max() <= torch.finfo(FLOAT32).eps * was.abs().max()
        drifted = (drifted - f) / alpha.view(1, -1, 1, 1)
    assert torch.equal(x, kept[0][2])
    assert wrong <= 1e-4 * count  # values on the boundary between two of float32
    assert (drifted != x).float().mean() > 0.9


# values at the ends of what there is

EXTREMES = [0.0, -0.0, 1e-45, -3e-42, 1.2e-38, 6e-8, 1.0, 65504.0, 1e30, -3.4e38]
SPECIAL = [*EXTREMES, math.inf, -math.inf, math.nan]


@EACH_DTYPE
@LAYOUTS
def test_extreme_values(
    backend: Backend, last: bool, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Every pair of them with small and large alphas: as in the plain formula."""
    skip_what_the_interpreter_cuts(backend, dtypes[0])
    values = torch.tensor(SPECIAL, dtype=torch.float64)
    alpha = torch.tensor([0.0, -0.0, 1e-5, -9e-4, 0.5, -1.5, 1e30, math.inf, math.nan])
    f, x = (t.flatten() for t in torch.meshgrid(values, values, indexing="ij"))
    f, x = (t.expand(2, len(alpha), -1) for t in (f, x))
    f = laid_out(f.to(dtypes[1]).contiguous(), last).to(backend.device)
    x = laid_out(x.to(dtypes[0]).contiguous(), last).to(backend.device)
    alpha = alpha.to(backend.device, dtypes[0])
    out, out_rest = found = carry.step(f, x, None, alpha)
    same = {"rtol": 2**-22, "atol": 0, "equal_nan": True}
    expected = reference.step_with_rest(f, x, None, alpha)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0, equal_nan=True)
    assert_rests_agree(*found, expected[1])
    assert (out_rest[~out.isfinite()] == 0).all()
    rest = torch.zeros_like(out_rest)
    grad = torch.ones_like(x)
    found = carry.step_backward(x, rest, f, alpha, grad)
    expected = reference.step_with_rest_backward(x, rest, f, alpha, grad, True)
    for place in (0, 2, 3):
        torch.testing.assert_close(found[place], expected[place], **same)
    assert_rests_agree(*found[:2], expected[1])


def assert_rests_agree(feature: Tensor, rest: Tensor, wanted: Tensor) -> None:
    """Finite, and those of the plain formula but for the rounding of float64."""
    assert rest.isfinite().all()
    finite = feature.double().nan_to_num(0, 0, 0).abs()
    assert ((rest.double() - wanted.double()).abs() <= WIDE_EPS * finite + 1e-45).all()


def test_finite_values_stay_finite(backend: Backend) -> None:
    values = torch.tensor(EXTREMES[:-1], device=backend.device).expand(1, 3, -1).contiguous()
    alpha = torch.tensor([0.5, -1.5, 1.0], device=backend.device)
    out, rest = carry.step(values, values, None, alpha)
    assert out.isfinite().all()
    x, _, _, _ = carry.step_backward(out, rest, values, alpha, None)
    torch.testing.assert_close(x, values, rtol=1e-6, atol=3e-45)


# layouts, shapes, dtypes


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=case_id)
def test_any_strides(backend: Backend, dtype: torch.dtype) -> None:
    draw = Draw(dtype, backend.device)
    f, x, rest, alpha = operands(draw, SHAPE)
    grad = draw.normal(*SHAPE)
    step, back = carry.step(f, x, rest, alpha), carry.step_backward(x, rest, f, alpha, grad)

    def every_second(t: Tensor) -> Tensor:
        return t.new_zeros(*t.shape, 2)[..., 0].copy_(t)

    changes = (every_second, lambda t: laid_out(t, True), lambda t: t.mT.contiguous().mT)
    for place in range(4):
        for change in changes:
            args = [f, x, rest, grad]
            args[place] = change(args[place])
            found = carry.step(*args[:3], alpha)
            for other, wanted in zip(found, step, strict=True):
                assert torch.equal(other, wanted)
                assert other.stride() == viops.reversible_step(args[0], x, alpha).stride()
            found = carry.step_backward(args[1], args[2], args[0], alpha, args[3])
            for other, wanted in zip(found[:3], back[:3], strict=True):
                assert torch.equal(other, wanted)
            assert_matches("grad_alpha", found[3], back[3].double())
    full = every_second(alpha.view(1, -1, 1, 1))
    assert torch.equal(carry.step(f, x, rest, full)[0], step[0])
    assert carry.step_backward(x, rest, f, full, grad)[3].shape == full.shape


def test_views_that_negate(backend: Backend) -> None:
    draw = Draw(FLOAT32, backend.device)
    values = (*operands(draw, SHAPE), draw.normal(*SHAPE))

    def both(f: Tensor, x: Tensor, rest: Tensor, alpha: Tensor, grad: Tensor) -> list[Tensor]:
        return [*carry.step(f, x, rest, alpha), *carry.step_backward(x, rest, f, alpha, grad)]

    for place in range(len(values)):
        views, copies = list(values), list(values)
        views[place], copies[place] = torch._neg_view(values[place]), -values[place]
        for found, wanted in zip(both(*views), both(*copies), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("shape", [(), (7,), (4, 19), SHAPE, (2, 3, *(1, 2) * 4)], ids=str)
@LAYOUTS
def test_no_alpha_is_one_and_any_rank(backend: Backend, last: bool, shape: tuple) -> None:
    draw = Draw(FLOAT32, backend.device)
    f, x = (draw.normal(*shape) for _ in range(2))
    if len(shape) > 2:
        f, x = laid_out(f, last), laid_out(x, last)
    out, rest = carry.step(f, x, None, None)
    assert (out - (f + x)).abs().max() <= torch.finfo(FLOAT32).eps * (f + x).abs().max()
    assert (out.double() + rest.double() == f.double() + x.double()).all()
    more, more_rest = carry.step(f, out, rest, None)
    assert more.shape == shape
    grad = torch.ones_like(f)
    back, back_rest, grad_x, grad_alpha = carry.step_backward(more, more_rest, f, None, grad)
    assert torch.equal(back, out)
    assert back_rest.shape == shape
    assert grad_x is grad
    assert grad_alpha is None


def test_more_axes_than_kernels_take(backend: Backend) -> None:
    shape = (2, 3, *(1, 2) * 4)
    draw = Draw(FLOAT32, backend.device)
    f, x, rest, alpha = operands(draw, shape)
    grad = draw.normal(*shape)
    flat = [t.flatten(2) for t in (f, x, rest, grad)]
    for found, wanted in zip(
        (*carry.step(f, x, rest, alpha), *carry.step_backward(x, rest, f, alpha, grad)),
        (
            *carry.step(*flat[:3], alpha),
            *carry.step_backward(flat[1], flat[2], flat[0], alpha, flat[3]),
        ),
        strict=True,
    ):
        assert torch.equal(found.flatten(2) if found.dim() > 2 else found, wanted)
    assert carry.step(f, x, None, alpha)[0].shape == shape
    x, rest, *grads = carry.step_backward(x, rest, f, alpha, None, need_rest=False)
    assert x.shape == shape
    assert rest is None
    assert grads == [None, None]


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0), (0, 3)], ids=str)
def test_empty_features(backend: Backend, shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=backend.device)
    alpha = torch.ones(shape[1], device=backend.device)
    for factors in (alpha, None):
        out, rest = carry.step(x, x, x, factors)
        assert out.shape == rest.shape == shape
        x_back, _, _, grad_alpha = carry.step_backward(out, rest, x, factors, x)
        assert x_back.shape == shape
        assert grad_alpha is None if factors is None else (grad_alpha == 0).all()


def test_dtypes_are_promoted_as_torch_does(backend: Backend) -> None:
    f, x, rest, alpha = operands(Draw(FLOAT32, backend.device), SHAPE)
    for dtypes in ((BFLOAT16, FLOAT16, BFLOAT16), (FLOAT32, BFLOAT16, FLOAT16), (FLOAT16,) * 3):
        given = [t.to(dtype) for t, dtype in zip((f, x, alpha), dtypes, strict=True)]
        wide = [t.double() for t in given]
        result = viops.reversible_step(*given).dtype
        out, out_rest = carry.step(*given[:2], rest, given[2])
        assert out.dtype is result
        truth = wide[0] + wide[2].view(1, -1, 1, 1) * (wide[1] + rest)
        bound = rounding_of(truth, result, wide[0], truth - wide[0])
        assert ((out.double() + out_rest.double() - truth).abs() <= bound).all()
        found = carry.step_backward(out, out_rest, given[0], given[2], torch.ones_like(out))
        assert [t.dtype for t in found] == [result, FLOAT32, result, dtypes[2]]
        assert_matches("x", found[0], wide[1] + rest, given[1].dtype)


# backends, threads


@pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
def test_threads_change_no_bit(last: bool) -> None:
    draw = Draw(FLOAT32)
    f, out, rest, alpha = operands(draw, (5, 24, 41, 37), last)
    grad = laid_out(draw.normal(*f.shape), last)
    runs = []
    for count in (1, 2, 3, 7):
        with num_threads(count):
            runs.append(
                (*carry.step(f, out, rest, alpha), *carry.step_backward(out, rest, f, alpha, grad))
            )
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


def test_the_backend_is_that_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    f, x, rest, alpha = operands(Draw(FLOAT32), SHAPE)
    calls = []
    for name, (step, back) in carry._FUNCTIONS.items():
        watched = tuple(
            lambda *args, name=name, run=run: calls.append(name) or run(*args)
            for run in (step, back)
        )
        monkeypatch.setitem(carry._FUNCTIONS, name, watched)
    for name in ("reference", "cpu"):
        with viops.use_backend(name):
            carry.step(f, x, rest, alpha)
            carry.step_backward(x, rest, f, alpha, None)
    assert calls == ["reference"] * 2 + ["cpu"] * 2
    with viops.use_backend("cpu"), FlopCounterMode(display=False):  # which kernels would pass by
        carry.step(f, x, rest, alpha)
        carry.step_backward(x, rest, f, alpha, None)
    assert calls[4:] == ["reference"] * 2
    with viops.use_backend("cuda"), pytest.raises(viops.BackendError, match="cuda"):
        carry.step(f, x, rest, alpha)
    without = next(row for row in HERE if row.name == "fallback")
    monkeypatch.setenv("VIOPS_STRICT", "1")
    with without.enter(), pytest.raises(viops.BackendError, match="VIOPS_STRICT"):
        carry.step_backward(x, rest, f, alpha, None)


# what is refused


def bad_steps() -> dict[str, tuple[type[Exception], dict]]:
    x, alpha = torch.zeros(2, 5, 3), torch.ones(5)
    return {
        "f": (TypeError, {"f": None}),
        "f ": (TypeError, {"f": x.double()}),
        "f  ": (ValueError, {"f": x[0, 0]}),
        "x": (ValueError, {"x": x[:1]}),
        "x ": (TypeError, {"x": x.int()}),
        "x  ": (TypeError, {"x": x.double()}),
        "x_rest": (TypeError, {"x_rest": x.double()}),
        "x_rest ": (ValueError, {"x_rest": x[..., :1]}),
        "x_rest  ": (ValueError, {"x_rest": x.to("meta")}),
        "alpha": (ValueError, {"alpha": alpha[1:]}),
        "alpha ": (TypeError, {"alpha": 0.5}),
        "alpha  ": (TypeError, {"alpha": alpha.double()}),
    }


def bad_ways_back() -> dict[str, tuple[type[Exception], dict]]:
    x, alpha = torch.zeros(2, 5, 3), torch.ones(5)
    return {
        "out": (TypeError, {"out": 1.0}),
        "out ": (TypeError, {"out": x.double()}),
        "out  ": (TypeError, {"out": x.half(), "grad_out": x.half()}),  # f's is wider
        "out_rest": (TypeError, {"out_rest": None}),
        "out_rest ": (TypeError, {"out_rest": x.half()}),
        "out_rest  ": (ValueError, {"out_rest": x[:, :1]}),
        "f": (ValueError, {"f": x[:1]}),
        "f ": (TypeError, {"f": x.double()}),
        "alpha": (ValueError, {"alpha": alpha[:, None]}),
        "grad_out": (TypeError, {"grad_out": x.half()}),
        "grad_out ": (ValueError, {"grad_out": x[:1]}),
    }


@pytest.mark.parametrize("name", bad_steps())
def test_bad_steps_are_refused(backend: Backend, name: str) -> None:
    error, changes = bad_steps()[name]
    x = torch.zeros(2, 5, 3)
    good = {"f": x, "x": x, "x_rest": x, "alpha": torch.ones(5)}
    with pytest.raises(error, match=rf"^{name.strip()}: \S"):
        carry.step(**{**good, **changes})


@pytest.mark.parametrize("name", bad_ways_back())
def test_bad_ways_back_are_refused(backend: Backend, name: str) -> None:
    error, changes = bad_ways_back()[name]
    x = torch.zeros(2, 5, 3)
    good = {"out": x, "out_rest": x, "f": x, "alpha": torch.ones(5), "grad_out": x}
    with pytest.raises(error, match=rf"^{name.strip()}: \S"):
        carry.step_backward(**{**good, **changes})
