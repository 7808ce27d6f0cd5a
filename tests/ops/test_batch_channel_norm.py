"""Batch channel norm beyond the contract: what it equals, what it moves, and its modules."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import viops
from contract import ALL_BACKENDS, Backend, case_id, each_backend, has
from tolerances import TOLERANCES, assert_matches
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*taken away by the test:RuntimeWarning",
    "ignore:.*without a kernel of its own:RuntimeWarning",
)

ON_CPU = [
    backend
    for backend in ALL_BACKENDS
    if backend.device == "cpu" and has(backend, "batch_channel_norm")
]

backend = each_backend(ON_CPU)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def make(*shape: int, dtype: torch.dtype = torch.float64, **options: object) -> nn.Module:
    """A norm of x of this shape, with parameters and statistics that are not those of the start."""
    cls = {2: "1d", 3: "1d", 4: "2d", 5: "3d"}[len(shape)]
    options = {"num_groups": 3, **options}
    norm = getattr(viops.nn, f"BatchChannelNorm{cls}")(shape[1], dtype=dtype, **options)
    for i, (name, value) in enumerate(norm.state_dict().items()):
        if "num_batches" not in name:
            drawn = normal(*value.shape, seed=i + 1)
            value.copy_(drawn.abs() + 0.5 if "var" in name or "speed" in name else drawn)
    if norm.estimate:
        norm.bn.estbn_moving_speed.fill_(0.3)
    return norm


def by_hand(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """torch's batch norm, group norm without an affine, the affine of the groups."""
    out = norm.bn(x)
    out = nn.functional.group_norm(out, norm.num_groups, eps=norm.bn.eps)
    grouped = out.reshape(len(x), norm.num_groups, -1) * norm.weight + norm.bias
    out = grouped.reshape(x.shape)
    if residual is not None:
        out = out + residual
    return out.relu() if norm.activation == "relu" else out


SHAPES = [(4, 6), (4, 6, 5), (3, 6, 4, 5), (2, 6, 2, 3, 4)]


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_batch_norm_then_group_norm(
    backend: Backend, shape: tuple[int, ...], training: bool, activation: str | None
) -> None:
    norm = make(*shape, activation=activation).train(training)
    other = copy.deepcopy(norm)
    for step in range(3):
        x, residual = (normal(*shape, seed=2 * step + i).requires_grad_() for i in range(2))
        y, expected = norm(x, residual), by_hand(other, x, residual)
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
        weight = normal(*shape, seed=99)
        grads = torch.autograd.grad(y, [x, residual, *norm.parameters()], weight)
        wanted = torch.autograd.grad(expected, [x, residual, *other.parameters()], weight)
        for grad, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-10)
    for (name, got), want in zip(
        norm.state_dict().items(), other.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(got, want, msg=name)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=case_id)
def test_dtypes(backend: Backend, dtype: torch.dtype) -> None:
    """Parameters stay in float32 beside half types."""
    wide = torch.promote_types(dtype, torch.float32)
    norm = make(3, 6, 4, 5, dtype=wide, activation="relu")
    x, residual = (normal(3, 6, 4, 5, seed=i, dtype=dtype) for i in range(2))
    y = norm(x, residual)
    assert y.dtype is dtype
    assert norm.bn.running_mean.dtype is wide
    assert_matches(
        "y", y, by_hand(make(3, 6, 4, 5, activation="relu"), x.double(), residual.double())
    )


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0, None])
def test_running_statistics_are_those_of_batch_norm(
    backend: Backend, momentum: float | None
) -> None:
    norm = viops.nn.BatchChannelNorm2d(6, 2, momentum=momentum, dtype=torch.float64)
    other = nn.BatchNorm2d(6, momentum=momentum, dtype=torch.float64)
    for step in range(4):
        x = normal(2 + step, 6, 4, 5, seed=step) * 3 + 100
        norm(x)
        other(x)
        for name, value in other.state_dict().items():
            torch.testing.assert_close(norm.bn.state_dict()[name], value, msg=name)
    norm.eval()(x)
    torch.testing.assert_close(norm.bn.running_mean, other.running_mean)


def test_estimates_move_first_and_then_normalise(backend: Backend) -> None:
    """The official form, step by step; no gradient goes through the statistics."""
    norm = make(3, 6, 4, 5, estimate=True)
    mean, var = norm.bn.running_mean.clone(), norm.bn.running_var.clone()
    for step in range(3):
        x = (normal(3, 6, 4, 5, seed=step) * 2 + 1).requires_grad_()
        y = norm(x)
        planes = x.detach().transpose(0, 1).flatten(1)  # [C, B S]
        spread = (planes - mean[:, None]).square().mean(dim=1)
        mean = 0.7 * mean + 0.3 * planes.mean(dim=1)
        var = 0.7 * var + 0.3 * spread
        torch.testing.assert_close(norm.bn.running_mean, mean)
        torch.testing.assert_close(norm.bn.running_var, var)
        constant = copy.deepcopy(norm).eval()  # they are what it normalises by
        expected = by_hand(constant, x)
        torch.testing.assert_close(y, expected)
        (grad,) = torch.autograd.grad(y.square().sum(), x)
        (want,) = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(grad, want)
    assert norm.bn.num_batches_tracked == 3
    norm.bn.estbn_moving_speed.zero_()
    norm(x)
    assert torch.equal(norm.bn.running_mean, mean) or torch.allclose(norm.bn.running_mean, mean)


def test_speed_is_zero_at_first() -> None:
    norm = viops.nn.BatchChannelNorm2d(6, 3, estimate=True)
    before = copy.deepcopy(norm.state_dict())
    norm(normal(2, 6, 4, 4, dtype=torch.float32) + 7)
    for name, value in norm.state_dict().items():
        assert torch.equal(value, before[name]) or name == "bn.num_batches_tracked"


# modules


def test_state_dict_keys() -> None:
    norm = viops.nn.BatchChannelNorm2d(8, 4)
    assert {name: list(value.shape) for name, value in norm.state_dict().items()} == {
        "weight": [1, 4, 1],
        "bias": [1, 4, 1],
        "bn.weight": [8],
        "bn.bias": [8],
        "bn.running_mean": [8],
        "bn.running_var": [8],
        "bn.num_batches_tracked": [],
    }
    estimated = viops.nn.BatchChannelNorm2d(8, 4, estimate=True).state_dict()
    assert set(estimated) == {*norm.state_dict(), "bn.estbn_moving_speed"}
    assert list(estimated["bn.estbn_moving_speed"].shape) == [1]


def test_representation() -> None:
    norm = viops.nn.BatchChannelNorm2d(8, 4, estimate=True, activation="relu")
    assert "num_groups=4, estimate=True, activation='relu'" in repr(norm)
    assert norm.num_features == 8


@pytest.mark.parametrize(
    ("make_norm", "error", "message"),
    [
        (
            lambda: viops.nn.BatchChannelNorm2d(8, 3),
            ValueError,
            "num_groups: expected a divisor of",
        ),
        (lambda: viops.nn.BatchChannelNorm2d(8, 0), ValueError, "num_groups: expected at least 1"),
        (
            lambda: viops.nn.BatchChannelNorm2d(0, 1),
            ValueError,
            "num_features: expected at least 1",
        ),
        (lambda: viops.nn.BatchChannelNorm2d(8, 4, eps="0"), TypeError, "eps: expected a number"),
        (
            lambda: viops.nn.BatchChannelNorm2d(8, 4, activation="gelu"),
            ValueError,
            "activation: expected None or 'relu', got 'gelu'",
        ),
        (
            lambda: viops.nn.BatchChannelNorm2d(8, 4)(torch.zeros(2, 8, 3)),
            ValueError,
            r"x: expected 4 axes, got shape \[2, 8, 3\]",
        ),
        (
            lambda: viops.nn.BatchChannelNorm1d(8, 4)(torch.zeros(2, 8, 3, 3)),
            ValueError,
            r"x: expected 2 or 3 axes, got shape",
        ),
        (
            lambda: nn.SyncBatchNorm.convert_sync_batchnorm(viops.nn.BatchChannelNorm2d(8, 4))(
                torch.zeros(2, 8, 3, 3)
            ),
            TypeError,
            "bn: torch's SyncBatchNorm has taken its place",
        ),
    ],
)
def test_what_modules_refuse(make_norm: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        make_norm()


def test_frozen_channel_statistics() -> None:
    """The usual way to freeze batch norm: its eval mode within a model that trains."""
    norm = make(3, 6, 4, 5)
    x = normal(3, 6, 4, 5)
    norm.bn.eval()
    before = copy.deepcopy(norm.state_dict())
    y = norm(x)
    assert all(torch.equal(v, before[k]) for k, v in norm.state_dict().items())
    torch.testing.assert_close(y, norm.eval()(x))


def test_copies_and_pickles() -> None:
    norm, x = make(3, 6, 4, 5, estimate=True), normal(3, 6, 4, 5)
    others = copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))
    y = norm(x)
    for other in others:
        assert torch.equal(other(x), y)
        for name, value in norm.state_dict().items():
            assert torch.equal(other.state_dict()[name], value)


def test_reset_parameters() -> None:
    norm = make(3, 6, 4, 5)
    norm.reset_parameters()
    fresh = viops.nn.BatchChannelNorm2d(6, 3, dtype=torch.float64)
    for name, value in fresh.state_dict().items():
        assert torch.equal(norm.state_dict()[name], value)


@pytest.mark.parametrize("options", [{}, {"estimate": True}, {"momentum": None}], ids=str)
def test_compile_without_graph_breaks_and_without_recompiling_for_a_batch(options: dict) -> None:
    norm = make(3, 6, 4, 5, activation="relu", **options)
    other = copy.deepcopy(norm)
    torch._dynamo.reset()  # what it knows of another test's sizes
    counter = CompileCounter()
    compiled = torch.compile(norm, fullgraph=True, backend=counter)
    for batch in (2, 3, 7, 5):
        x, residual = normal(batch, 6, 4, 5), normal(batch, 6, 4, 5, seed=1)
        torch.testing.assert_close(compiled(x, residual), other(x, residual))
        for name, value in other.state_dict().items():
            torch.testing.assert_close(norm.state_dict()[name], value, msg=name)
    assert counter.frame_count == 2  # the first size, and one graph for all that follow


def test_compiled_and_checkpointed_training_equal_eager() -> None:
    x, residual = (normal(3, 6, 4, 5, seed=i).requires_grad_() for i in range(2))

    def gradients(wrap: Callable) -> list[Tensor]:
        norm = make(3, 6, 4, 5, activation="relu")
        y = wrap(norm)(x, residual)
        return list(torch.autograd.grad(y.square().sum(), [x, residual, *norm.parameters()]))

    expected = gradients(lambda norm: norm)
    compiled = gradients(lambda norm: torch.compile(norm, fullgraph=True, backend="aot_eager"))
    kept = gradients(lambda norm: lambda *args: checkpoint(norm, *args, use_reentrant=False))
    for grads in (compiled, kept):
        for grad, want in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, want)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [{}, {"estimate": True}, {"momentum": None}], ids=str)
def test_a_checkpoint_moves_statistics_once(options: dict, reentrant: bool) -> None:
    norm = make(3, 6, 4, 5, **options)
    other = copy.deepcopy(norm)
    x, grad = normal(3, 6, 4, 5).requires_grad_(), normal(3, 6, 4, 5, seed=1)
    expected = torch.autograd.grad(norm(x), [x, *norm.parameters()], grad)
    for kept in (norm, other):
        kept.zero_grad()
    own = x.detach().requires_grad_()
    checkpoint(other, own, use_reentrant=reentrant).backward(grad)
    found = [own.grad, *(p.grad for p in other.parameters())]
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(other.buffers(), norm.buffers(), strict=True):
        assert torch.equal(got, want)


def test_a_lone_value_far_away_takes_no_digits_of_the_others(backend: Backend) -> None:
    """Wherever it is: means are relative to a median."""
    for place in (0, 3 * 8 * 9 - 1, 100):
        x = normal(3, 6, 8, 9, dtype=torch.float32)
        x.transpose(0, 1).flatten(2)[:, place // 72, place % 72] = 1e4
        state = [None] * 6
        y = viops.batch_channel_norm(x, 2, *state, training=True)
        with viops.use_backend("reference"):
            expected = viops.batch_channel_norm(x.double(), 2, *state, training=True)
        for own, want in zip(y, expected, strict=True):
            if want.abs().max() < 5:
                torch.testing.assert_close(own.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_a_group_of_one_constant_plane_is_zero(backend: Backend, training: bool) -> None:
    """Nothing of its size is left, which 1 / sqrt(eps) would enlarge."""
    x = (1e3 * normal(2, 6, 1, 1, dtype=torch.float32)).expand(2, 6, 5, 7)
    state = torch.rand(6), torch.rand(6), torch.rand(6), torch.rand(6) + 0.5, None, None
    y = viops.batch_channel_norm(x, 6, *state, training=training)
    assert y.abs().max() <= (0.1 if backend.backend == "reference" else 1e-4)  # float32 sums


def test_variances_that_overflow_are_finite(backend: Backend) -> None:
    x = (normal(3, 6, 8, 9, dtype=torch.float32) * 1e20).bfloat16()
    assert viops.batch_channel_norm(x, 2, *[None] * 6, training=True).isfinite().all()


def test_captured_statistics_move_within_func_grad(backend: Backend) -> None:
    x = normal(3, 6, 4, 5)

    def loss(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        y = viops.batch_channel_norm(x, 2, None, None, mean, var, None, None, training=True)
        return (y * normal(3, 6, 4, 5, seed=1)).sum()

    expected = [torch.zeros(6).double(), torch.ones(6).double()]
    loss(x, *expected)
    found = [torch.zeros(6).double(), torch.ones(6).double()]
    torch.func.grad(lambda x: loss(x, *found))(x)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)
    if backend.backend != "reference":
        with pytest.raises(ValueError, match=r"^running_mean: \S"):
            torch.vmap(lambda x: loss(x, *found))(x.expand(2, *x.shape))


@pytest.mark.parametrize("dim", [0, 4])
def test_vmap_over_the_residual_alone_and_over_nothing(backend: Backend, dim: int) -> None:
    x, residuals = normal(2, 6, 4, 5), normal(3, 2, 6, 4, 5, seed=1)

    def call(x: Tensor, residual: Tensor) -> Tensor:
        return viops.batch_channel_norm(x, 2, *[None] * 6, training=True, residual=residual)

    expected = torch.stack([call(x, residual) for residual in residuals])
    found = torch.vmap(call, (None, dim))(x, residuals.movedim(0, dim))
    torch.testing.assert_close(found, expected)
    if backend.backend != "reference":
        none = torch.vmap(call, (0, None))(x.new_empty(0, *x.shape), residuals[0])
        assert none.shape == (0, *x.shape)


def test_reset_parameters_sets_the_speed_back() -> None:
    norm = make(3, 6, 4, 5, estimate=True)
    norm.reset_parameters()
    fresh = viops.nn.BatchChannelNorm2d(6, 3, estimate=True)
    for got, want in zip(norm.state_dict().values(), fresh.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, check_dtype=False)


@pytest.mark.parametrize(
    ("make_norm", "x", "argument"),
    [
        (lambda: viops.nn.BatchChannelNorm2d(6, 3, 1e-5, True), None, "momentum"),
        (lambda: viops.nn.BatchChannelNorm2d(6, 3, momentum="x"), None, "momentum"),
        (lambda: viops.nn.BatchChannelNorm2d(6, 3, eps=-1.0), None, "eps"),
        (lambda: viops.nn.BatchChannelNorm2d(6, 3, estimate="no"), None, "estimate"),
        (lambda: viops.nn.BatchChannelNorm2d(6, 3), None, "x"),
        (lambda: viops.nn.BatchChannelNorm2d(6, 3), torch.zeros(2, 5, 4, 4), "x"),
        (lambda: viops.nn.SyncBatchChannelNorm(6, 3), torch.zeros(6), "x"),
    ],
)
def test_what_modules_refuse_to_take(make_norm: Callable, x: Tensor | None, argument: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"^{argument}: \S"):
        make_norm()(x)


def test_autocast_changes_nothing() -> None:
    norm, other = (make(3, 6, 4, 5, dtype=torch.float32) for _ in range(2))
    x = normal(3, 6, 4, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert torch.equal(y, other(x))
    assert y.dtype is torch.bfloat16
