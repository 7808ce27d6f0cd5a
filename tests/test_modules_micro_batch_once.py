"""The modules of weight standardization compute a weight once, and never keep an old one."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import changed_weights
import pytest
import torch
import torch.nn.functional as F
import viops
from changed_weights import Negated, in_place
from test_modules_micro_batch import by_hand, functional, make
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from viops.ops.weight_standardization import op

pytestmark = pytest.mark.filterwarnings("ignore:.*without a kernel of its own:RuntimeWarning")


class Counting:
    """The op, counting how often forward runs."""

    def __init__(self, op: Callable) -> None:
        self.op = op
        self.calls = 0

    def __call__(self, *args: object) -> object:
        self.calls += 1
        return self.op(*args)

    def first(self, *args: object) -> object:
        self.calls += 1
        return self.op.first(*args)

    def __getattr__(self, name: str) -> object:
        return getattr(self.op, name)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counting:
    counting = Counting(op._standardize_weight)
    monkeypatch.setattr(op, "_standardize_weight", counting)
    return counting


def gradient(layer: nn.Module) -> Tensor:
    grad, layer.weight.grad = layer.weight.grad, None
    return grad


@pytest.mark.parametrize("name", ["conv2d", "transpose2d", "linear"])
def test_gradient_accumulation_computes_once(counted: Counting, name: str) -> None:
    layer, x = make(name)
    layer(x).square().sum().backward()
    once = gradient(layer)
    for _ in range(3):
        layer(x).square().sum().backward()
    assert counted.calls == 1
    torch.testing.assert_close(gradient(layer), 3 * once)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    layer(x)
    assert counted.calls == 2


def test_several_uses_compute_once(counted: Counting) -> None:
    layer, x = make()
    (layer(x).square().sum() + 2 * layer(x).square().sum()).backward()
    several = gradient(layer)
    loss = layer(x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert counted.calls == 1
    torch.testing.assert_close(several / 3 * 2, gradient(layer))


def test_without_gradients_nothing_is_kept(counted: Counting) -> None:
    """Another process may write the weights of a network that only infers."""
    layer, x = make(gain=True)
    with torch.inference_mode():
        first = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), first)
        layer.weight.data.mul_(torch.rand_like(layer.weight))
        fresh = by_hand(layer, layer.weight, layer.gain)
        torch.testing.assert_close(layer.standardized_weight(), fresh)
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    assert counted.calls == 4


def test_what_is_frozen_gets_no_gradient(counted: Counting) -> None:
    layer, x = make(gain=True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    layer.weight.requires_grad_(False)
    layer.weight.grad = layer.gain.grad = None
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.gain.grad is not None
    assert counted.calls == 1


def test_what_a_user_writes_into_the_result_does_not_stay(counted: Counting) -> None:
    layer, _ = make()
    with torch.no_grad():
        fresh = layer.standardized_weight()
    for _ in range(2):
        own = layer.standardized_weight()
        torch.testing.assert_close(own.detach(), fresh)
        with torch.no_grad():
            own.mul_(100.0)


def test_memory_that_processes_share_is_read_each_time(counted: Counting) -> None:
    layer, x = make()
    layer.share_memory()
    layer(x), layer(x)
    assert counted.calls == 2


def test_batched_gradients(counted: Counting) -> None:
    layer, x = make()
    y = layer(x)
    grads = torch.randn(3, *y.shape, dtype=y.dtype)
    (found,) = torch.autograd.grad(y, layer.weight, grads, is_grads_batched=True, retain_graph=True)
    for grad, got in zip(grads, found, strict=True):
        (want,) = torch.autograd.grad(y, layer.weight, grad, retain_graph=True)
        torch.testing.assert_close(got, want)


def test_a_checkpoint_may_recompute_by_another_way(counted: Counting) -> None:
    layer, x = make()
    x.requires_grad_()
    (want,) = torch.autograd.grad(layer(x).square().sum(), layer.weight)
    with FlopCounterMode(display=False):
        y = checkpoint(layer, x, use_reentrant=False)
    y.square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, want)


CHANGES = {
    **changed_weights.CHANGES,
    "gain": lambda layer: nn.init.normal_(layer.gain),
    "eps": lambda layer: setattr(layer, "eps", 0.5),
    "float32": lambda layer: layer.float(),
    "forget": lambda layer: (
        layer.weight.data.add_(torch.rand(1)[0] * layer.weight.data**2),
        layer.forget(),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("training", [True, False])
def test_a_changed_weight_is_standardised_anew(
    counted: Counting, change: str, training: bool
) -> None:
    layer, _ = make(gain=True)
    with torch.set_grad_enabled(training):
        before = layer.standardized_weight().detach().clone()
        CHANGES[change](layer)
        calls = counted.calls
        after = layer.standardized_weight().detach()
    assert counted.calls == calls + 1
    fresh = by_hand(layer, layer.weight, layer.gain)
    torch.testing.assert_close(after, fresh, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after.to(before.dtype), before, rtol=1e-3, atol=1e-3) or (
        change == "float32"
    )


def test_freed_memory_that_comes_back_is_no_old_weight() -> None:
    """A new parameter may lie where one lay that is gone."""
    layer, _ = make()
    for _ in range(50):
        layer.weight = None
        layer.weight = nn.Parameter(torch.randn(6, 4, 3, 2, dtype=torch.float64))
        fresh = by_hand(layer, layer.weight, None)
        torch.testing.assert_close(layer.standardized_weight(), fresh)


def test_a_backward_after_the_weight_has_changed_is_refused() -> None:
    layer, x = make()
    loss = layer(x).square().sum()
    in_place(layer)
    layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_are_right_or_refused() -> None:
    layer, x = make()

    def second() -> Tensor:
        (grad,) = torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), layer.weight)[0]

    with pytest.raises(NotImplementedError, match="no second derivative"):
        second()
    with viops.use_backend("reference"):
        got = second()
    hand = functional(layer, x, by_hand(layer, layer.weight, None)).square().sum()
    (grad,) = torch.autograd.grad(hand, layer.weight, create_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(grad.square().sum(), layer.weight)[0])


def test_copies_are_independent() -> None:
    layer, x = make()
    y = layer(x)
    for other in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._computed is None
        assert torch.equal(other(x), y)
    other = copy.deepcopy(layer)
    in_place(other)
    assert not torch.allclose(other(x), y)
    assert torch.equal(layer(x), y)


def test_swapped_parameters() -> None:
    """Conversions that swap the tensors themselves, which nothing may refer to weakly."""
    layer, x = make()
    y = layer(x).detach()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        layer.float()
        layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert layer(x.float()).dtype is torch.float32
    torch.testing.assert_close(layer(x.float()) - 1, y.float(), rtol=1e-4, atol=1e-4)


def test_transforms() -> None:
    layer, x = make(gain=True)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    layer(x).square().sum().backward()
    grads = torch.func.grad(loss)(parameters)
    for name, p in layer.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)
    doubled = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    both = torch.func.vmap(loss)(doubled)
    torch.testing.assert_close(both[1], loss({name: 2 * p for name, p in parameters.items()}))
    torch.testing.assert_close(loss(parameters), layer(x).square().sum())


def test_parametrized_and_computed_weights() -> None:
    layer, x = make()
    fresh = layer(x)
    nn.utils.parametrize.register_parametrization(layer, "weight", Negated())
    torch.testing.assert_close(
        layer(x) - layer.bias.view(-1, 1, 1), -(fresh - layer.bias.view(-1, 1, 1))
    )
    layer(x).square().sum().backward()
    assert layer.parametrizations.weight.original.grad.norm() > 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(use_reentrant: bool) -> None:
    layer, x = make(gain=True)
    x.requires_grad_()
    layer(x).square().sum().backward()
    expected = [x.grad, *(p.grad for p in layer.parameters())]
    for warm in (True, False):  # whether the first forward computes the weight
        x.grad = None
        layer.zero_grad()
        if not warm:
            layer.forget()
        y = checkpoint(layer, x, use_reentrant=use_reentrant)
        layer.forget()  # the second forward does
        y.square().sum().backward()
        for grad, want in zip(
            [x.grad, *(p.grad for p in layer.parameters())], expected, strict=True
        ):
            torch.testing.assert_close(grad, want)


def test_compiled_layers_never_hold_an_old_weight() -> None:
    layer, x = make("conv2d", gain=True)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(4):
        torch.testing.assert_close(
            compiled(x), functional(layer, x, by_hand(layer, layer.weight, layer.gain))
        )
        compiled(x).square().sum().backward()
        optimizer.step()
    assert counter.frame_count == 1


def test_compiled_training_equals_eager() -> None:
    layer, x = make(gain=True)
    layer(x).square().sum().backward()
    expected = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    for parameter, want in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, want)


def test_autocast_keeps_the_statistics_exact() -> None:
    layer, x = make()
    layer, x = layer.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        weight = layer.standardized_weight()
        y = layer(x)
    assert weight.dtype is torch.float32
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype is torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)


def test_half_precision() -> None:
    layer, x = make(gain=True)
    y = layer(x)
    half = copy.deepcopy(layer).bfloat16()
    got = half(x.bfloat16())
    got.sum().backward()
    assert half.weight.grad.dtype is half.gain.grad.dtype is torch.bfloat16
    assert (got - y).norm() < 0.02 * y.norm()


def test_meta_and_fake_tensors() -> None:
    layer = viops.nn.WSConv2d(4, 6, 3, device="meta")
    assert layer(torch.empty(2, 4, 5, 5, device="meta")).shape == (2, 6, 3, 3)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(torch.randn(2, 4, 5, 5)).isfinite().all()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(torch.randn(2, 4, 5, 5))).shape == (2, 6, 3, 3)
    assert layer(torch.randn(2, 4, 5, 5)).isfinite().all()


def test_channels_last_weights() -> None:
    layer, x = make(gain=True)
    y = layer(x)
    y.square().sum().backward()
    expected = gradient(layer)
    layer.to(memory_format=torch.channels_last)
    assert layer.standardized_weight().is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x), y)
    layer(x).square().sum().backward()
    torch.testing.assert_close(gradient(layer), expected)


def test_threads_share_a_layer() -> None:
    layer = viops.nn.WSLinear(64, 64)
    x = torch.randn(4, 64)
    wrong: list[float] = []

    def use() -> None:
        for _ in range(20):
            y = layer(x)
            y.sum().backward()
            error = (y - expected).abs().max().item()
            if not error < 1e-4:
                wrong.append(error)

    for _ in range(5):
        in_place(layer)
        expected = F.linear(x, by_hand(layer, layer.weight, None), layer.bias).detach()
        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
