"""Weight standardization: what is particular to it, beside the contract."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import viops
import weight_standardization_golden as official
from contract import ALL_BACKENDS, Backend, case_id, each_backend, has, num_threads
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from viops.cases import Draw
from viops.ops.weight_standardization import reference

pytestmark = pytest.mark.filterwarnings("ignore:.*taken away by the test:RuntimeWarning")

HERE = [row for row in ALL_BACKENDS if has(row, "standardize_weight")]
INSIDE = pytest.mark.parametrize("eps_inside", [True, False], ids=["inside", "outside"])
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}

backend = each_backend(HERE)


@pytest.fixture
def draw(backend: Backend) -> Draw:
    return Draw(torch.float32, backend.device)


def plain(weight: Tensor, eps: float, unbiased: bool, eps_inside: bool) -> Tensor:
    """The formula in float64, by torch's own mean and variance."""
    wide = weight.double()
    axes = tuple(range(1, weight.dim()))
    var = wide.var(dim=axes, keepdim=True, unbiased=unbiased)
    root = (var + eps).sqrt() if eps_inside else var.sqrt() + eps
    return (wide - wide.mean(dim=axes, keepdim=True)) / root


def relative(result: Tensor, truth: Tensor) -> float:
    return ((result.double() - truth.double()).norm() / truth.double().norm()).item()


# one weight


@INSIDE
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("shape", [(7, 5, 3, 3), (4, 300), (40, 1, 3, 3), (3, 10007)])
def test_the_formula(draw: Draw, shape: tuple[int, ...], unbiased: bool, eps_inside: bool) -> None:
    weight = draw.normal(*shape)
    out = viops.standardize_weight(weight, eps=0.1, unbiased=unbiased, eps_inside=eps_inside)
    assert relative(out, plain(weight, 0.1, unbiased, eps_inside)) < 1e-6


def test_numbers_worked_out_by_hand(backend: Backend) -> None:
    weight = torch.tensor([[1.0, 3, 5], [2, 2, 8]], device=backend.device)
    gain = torch.tensor([1.0, 10], device=backend.device)
    out = viops.standardize_weight(weight, eps=0, gain=gain)
    root = 12**0.5  # the second filter's deviation
    expected = torch.tensor([[-1.0, 0, 1], [-20 / root, -20 / root, 40 / root]])
    torch.testing.assert_close(out.cpu(), expected)
    biased = viops.standardize_weight(weight, eps=1, unbiased=False, eps_inside=False)
    row = torch.tensor([-2.0, 0, 2]) / ((8 / 3) ** 0.5 + 1)
    torch.testing.assert_close(biased[0].cpu(), row)


@pytest.mark.parametrize("name", list(official.SHAPES))
@INSIDE
def test_the_official_code(backend: Backend, name: str, eps_inside: bool) -> None:
    golden = official.load()
    form = "inside" if eps_inside else "outside"
    weight, coefficients = (t.to(backend.device) for t in official.draw(name))
    out = viops.standardize_weight(weight.requires_grad_(), eps_inside=eps_inside)
    torch.testing.assert_close(out.detach().cpu(), golden[f"{form}_{name}"], **TOLERANCE)
    (grad,) = torch.autograd.grad((out * coefficients).sum(), weight)
    assert relative(grad.cpu(), golden[f"{form}_grad_{name}"]) < 1e-5
    other = golden[f"{'outside' if eps_inside else 'inside'}_small"]
    assert relative(golden[f"{form}_small"], other) > 1e-3  # else the forms could not be told apart


def test_timms_standardized_convolution(draw: Draw, backend: Backend) -> None:
    conv = StdConv2d(6, 8, 3, padding=1, bias=True).to(backend.device)
    x = draw.normal(2, 6, 5, 7)
    expected = conv(x)
    grads = torch.autograd.grad(expected.sin().sum(), conv.weight)
    weight = viops.standardize_weight(conv.weight, eps=conv.eps, unbiased=False)
    out = F.conv2d(x, weight, conv.bias, padding=1)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    assert relative(torch.autograd.grad(out.sin().sum(), conv.weight)[0], grads[0]) < 1e-5


def test_timms_scaled_standardized_convolution(draw: Draw, backend: Backend) -> None:
    conv = ScaledStdConv2d(6, 8, 3, padding=1, gamma=1.7).to(backend.device)
    with torch.no_grad():
        conv.gain.copy_(draw.normal(8, 1, 1, 1))
    x = draw.normal(2, 6, 5, 7)
    expected = conv(x)
    grads = torch.autograd.grad(expected.sin().sum(), (conv.weight, conv.gain))
    gain = conv.gain * conv.scale
    weight = viops.standardize_weight(conv.weight, eps=conv.eps, unbiased=False, gain=gain)
    out = F.conv2d(x, weight, conv.bias, padding=1)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    found = torch.autograd.grad(out.sin().sum(), (conv.weight, conv.gain))
    for grad, wanted in zip(found, grads, strict=True):
        assert grad.shape == wanted.shape
        assert relative(grad, wanted) < 1e-5


@INSIDE
@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (6, 9), (6, 5000), (6, 9000)])
def test_zero_variance_is_finite(draw: Draw, shape: tuple[int, ...], eps_inside: bool) -> None:
    """Filters of one value, among them one whose mean is no float, and one of zeros."""
    weight = draw.normal(*shape)
    weight[1], weight[3], weight[5] = 0.1, 0, 1000.1
    gain = draw.normal(6).requires_grad_()
    out = viops.standardize_weight(weight.requires_grad_(), eps_inside=eps_inside, gain=gain)
    assert (out[1::2] == 0).all()
    grads = torch.autograd.grad((out * draw.normal(*shape)).sum(), (weight, gain))
    assert all(grad.isfinite().all() for grad in grads)
    truth = weight.detach().double().requires_grad_()
    wide_gain = gain.detach().double().requires_grad_()
    coefficients = Draw(torch.float32, weight.device.type)
    coefficients.normal(*shape), coefficients.normal(6)
    expected = reference.standardize_weight(truth, eps_inside=eps_inside, gain=wide_gain)
    wanted = torch.autograd.grad((expected * coefficients.normal(*shape)).sum(), (truth, wide_gain))
    for i in (1, 3, 5):
        assert relative(grads[0][i], wanted[0][i]) < 1e-5
    assert (grads[1][1::2] == 0).all()


@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (6, 9), (4, 4608), (3, 20000)])
@pytest.mark.parametrize("where", ["all", "first", "last"])
def test_weights_far_from_zero_and_from_each_other(
    draw: Draw, backend: Backend, shape: tuple[int, ...], where: str
) -> None:
    """Sums of squares would cancel, and so would distances to a first weight that lies apart."""
    weight = draw.normal(*shape)
    rows = weight.flatten(1)
    apart, far = {"all": (rows, 1000), "first": (rows[:, 0], 30), "last": (rows[:, -1], 1000)}[
        where
    ]
    apart.add_(far)
    weight.requires_grad_()
    out = viops.standardize_weight(weight)
    (grad,) = torch.autograd.grad(out, weight, coefficients := torch.randn_like(weight))
    wide = weight.detach().double().requires_grad_()
    expected = reference.standardize_weight(wide)
    (wanted,) = torch.autograd.grad(expected, wide, coefficients.double())
    if backend.backend == "reference" and where == "first":
        pytest.skip("plain PyTorch, which knows the mean relative to the first weight alone")
    assert relative(out, expected) < 2e-6
    if where == "all":  # else all but one of the gradients are nothing beside the one
        assert relative(grad, wanted) < 2e-6


def test_a_constant_gradient_changes_no_weight(draw: Draw, backend: Backend) -> None:
    if backend.backend == "reference":
        pytest.skip("plain PyTorch, whose sums do not cancel to the last bit")
    weight = draw.normal(5, 7, 3, 3).requires_grad_()
    (grad,) = torch.autograd.grad(viops.standardize_weight(weight).sum(), weight)
    assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)
def test_autocast_changes_nothing(draw: Draw, backend: Backend, dtype: torch.dtype) -> None:
    weight, gain = draw.normal(5, 7, 3, 3), draw.normal(5)
    expected = viops.standardize_weight(weight, gain=gain)
    with torch.autocast(backend.device, dtype=dtype):
        out = viops.standardize_weight(weight, gain=gain)
    assert out.dtype is torch.float32
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=case_id)
def test_gain_of_any_dtype(draw: Draw, dtype: torch.dtype) -> None:
    """It takes its gradient in its own dtype and shape."""
    weight = draw.normal(5, 7, 3, 3)
    gain = draw.normal(5, 1, 1, 1, dtype=dtype).requires_grad_()
    out = viops.standardize_weight(weight, gain=gain)
    assert out.dtype is torch.float32
    expected = plain(weight, 1e-5, True, True)
    torch.testing.assert_close(out.double(), expected * gain.double(), rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(out.square().sum(), gain)
    assert grad.dtype is dtype
    assert grad.shape == gain.shape
    wanted = 2 * gain.double() * expected.square().sum(dim=(1, 2, 3), keepdim=True)
    assert relative(grad, wanted) < 4 * torch.finfo(dtype).eps + 1e-6


def test_channels_last_is_kept_and_not_copied(draw: Draw, backend: Backend) -> None:
    weight = draw.normal(5, 7, 3, 3)
    last = weight.to(memory_format=torch.channels_last).requires_grad_()
    out = viops.standardize_weight(last)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, viops.standardize_weight(weight), rtol=1e-6, atol=1e-6)
    (grad,) = torch.autograd.grad(out.sin().sum(), last)
    if backend.backend != "reference":
        assert grad.is_contiguous(memory_format=torch.channels_last)


def test_the_result_does_not_depend_on_the_threads(draw: Draw) -> None:
    weight = draw.normal(67, 700)
    with num_threads(1):
        expected = viops.standardize_weight(weight)
    for threads in (2, 3, 7):
        with num_threads(threads):
            assert torch.equal(viops.standardize_weight(weight), expected)


def test_operation_count(backend: Backend, draw: Draw) -> None:
    if backend.name == "reference":
        pytest.skip("plain PyTorch, whose operations torch counts itself")
    weight = draw.normal(5, 7, 3, 3).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        viops.standardize_weight(weight).sum().backward()
    assert counter.get_total_flops() == (6 + 8) * weight.numel()


# many weights

SHAPES = [(7, 5, 3, 3), (40, 1, 3, 3), (0, 3, 3, 3), (5, 16, 4, 4), (3, 2), (2, 4099), (2, 9216)]


def many(draw: Draw, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list]:
    """Weights of many sizes, one of them in channels_last, and gains for every second."""
    weights = [draw.normal(*shape, dtype=dtype) for shape in SHAPES]
    weights[3] = weights[3].to(memory_format=torch.channels_last)
    gains = [draw.normal(len(w)) if i % 2 else None for i, w in enumerate(weights)]
    return [weight.requires_grad_() for weight in weights], gains


def one_by_one(weights: list[Tensor], gains: list, **options: object) -> list[Tensor]:
    return [
        viops.standardize_weight(weight, gain=gain, **options)
        for weight, gain in zip(weights, gains, strict=True)
    ]


def gradients(outs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(sum(out.sin().sum() for out in outs), leaves))


@INSIDE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=case_id)
def test_many_weights(draw: Draw, dtype: torch.dtype, eps_inside: bool) -> None:
    weights, gains = many(draw, dtype)
    leaves = [*weights, *(gain.requires_grad_() for gain in gains if gain is not None)]
    options = {"eps": 0.01, "unbiased": False, "eps_inside": eps_inside}
    outs = viops.standardize_weights(weights, gains=gains, **options)
    expected = one_by_one(weights, gains, **options)
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype is torch.bfloat16 else {}
    for out, wanted in zip(outs, expected, strict=True):
        assert out.stride() == wanted.stride()
        torch.testing.assert_close(out, wanted, **tolerance)
    found = gradients(outs, leaves)
    tolerance = tolerance or {"rtol": 1e-4, "atol": 1e-4}  # sums, which cancel, in another order
    for grad, wanted in zip(found, gradients(expected, leaves), strict=True):
        torch.testing.assert_close(grad, wanted, **tolerance)


def test_many_weights_of_several_dtypes(draw: Draw) -> None:
    weights = [draw.normal(4, 9, dtype=d) for d in (torch.float32, torch.float64) * 3]
    outs = viops.standardize_weights(weights)
    for out, wanted in zip(outs, one_by_one(weights, [None] * 6), strict=True):
        torch.testing.assert_close(out, wanted)


def test_many_weights_without_grad(draw: Draw) -> None:
    weights, gains = many(draw)
    expected = one_by_one(weights, gains)
    with torch.no_grad():
        outs = viops.standardize_weights(weights, gains=gains)
    for out, wanted in zip(outs, expected, strict=True):
        assert not out.requires_grad
        torch.testing.assert_close(out, wanted)
    assert viops.standardize_weights([]) == []
    assert torch.equal(
        viops.standardize_weights(weights[:1])[0], one_by_one(weights[:1], [None])[0]
    )


def test_one_of_many_weights_is_used(draw: Draw) -> None:
    """The others' gradients are none or zero."""
    weights, _ = many(draw)
    viops.standardize_weights(weights)[0].sin().sum().backward()
    (wanted,) = gradients([viops.standardize_weight(weights[0])], weights[:1])
    torch.testing.assert_close(weights[0].grad, wanted)
    assert all(weight.grad is None or not weight.grad.any() for weight in weights[1:])


def test_one_of_many_weights_is_asked_for(draw: Draw) -> None:
    weights, gains = many(draw)
    for weight in weights[1:]:
        weight.requires_grad_(False)
    outs = viops.standardize_weights(weights, gains=gains)
    (grad,) = gradients(outs, weights[:1])
    (wanted,) = gradients(one_by_one(weights, gains), weights[:1])
    torch.testing.assert_close(grad, wanted)


def test_many_weights_have_no_second_derivative_or_a_right_one(
    draw: Draw, backend: Backend
) -> None:
    weights = [draw.normal(4, 9).requires_grad_(), draw.normal(3, 20).requires_grad_()]

    def second(function: Callable) -> list[Tensor]:
        loss = sum(out.pow(3).sum() for out in function(weights))
        grads = torch.autograd.grad(loss, weights, create_graph=True)
        return list(torch.autograd.grad(sum(grad.square().sum() for grad in grads), weights))

    if backend.name != "reference":
        with pytest.raises(NotImplementedError, match="second derivative"):
            second(viops.standardize_weights)
        return
    expected = second(reference.standardize_weights)
    for grad, wanted in zip(second(viops.standardize_weights), expected, strict=True):
        torch.testing.assert_close(grad, wanted)


def test_a_weight_that_changed_before_backward_is_noticed(draw: Draw, backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("plain PyTorch, which keeps what it has made of the weight")
    weights, _ = many(draw)
    loss = sum(out.sin().sum() for out in viops.standardize_weights(weights))
    with torch.no_grad():
        weights[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_many_weights_under_compile_and_functorch(draw: Draw) -> None:
    weights = [draw.normal(4, 9), draw.normal(3, 4, 2, 2)]
    expected = viops.standardize_weights(weights)
    compiled = torch.compile(viops.standardize_weights, backend="aot_eager", fullgraph=True)
    for out, wanted in zip(compiled(weights), expected, strict=True):
        torch.testing.assert_close(out, wanted)

    def loss(first: Tensor, second: Tensor) -> Tensor:
        return sum(out.sin().sum() for out in viops.standardize_weights([first, second]))

    grads = torch.func.grad(loss, (0, 1))(*weights)
    leaves = [weight.clone().requires_grad_() for weight in weights]
    for grad, wanted in zip(grads, gradients(one_by_one(leaves, [None] * 2), leaves), strict=True):
        torch.testing.assert_close(grad, wanted)


def test_what_is_wrong_with_one_of_many_is_named(draw: Draw) -> None:
    good = draw.normal(4, 9)
    with pytest.raises(TypeError, match=r"^weights\[1\]: \S"):
        viops.standardize_weights([good, None])
    with pytest.raises(ValueError, match=r"^weights\[1\]: \S"):
        viops.standardize_weights([good, good[0]])
    with pytest.raises(ValueError, match=r"^gains\[1\]: \S"):
        viops.standardize_weights([good, good], gains=[None, good])
    with pytest.raises(ValueError, match=r"^gains: expected 2, one for each weight, got 1"):
        viops.standardize_weights([good, good], gains=[None])
    with pytest.raises(TypeError, match=r"^eps: "):
        viops.standardize_weights([good, good], eps="0")
