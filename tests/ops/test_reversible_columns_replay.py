"""The second run of a level: with what the first one found, and with no effect of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from reversible_networks import (
    assert_same,
    gradients,
    images,
    levels,
    loss_of,
    make,
    rebuilt_to_the_bit,
    stored,
)
from torch import Tensor, nn
from viops.nn import ReversibleColumn, ReversibleColumns


class Sum(nn.Module):
    """Linear in both inputs: autograd gives each the gradient that it was given itself."""

    def forward(self, below: Tensor, above: Tensor | None) -> Tensor:
        return below if above is None else below + above


def columns_of(level: Callable[[], nn.Module], channels: int = 4, count: int = 3) -> nn.Module:
    columns = [ReversibleColumn([level() for _ in range(3)], [channels] * 3) for _ in range(count)]
    return ReversibleColumns(columns).double()


def test_a_gradient_that_is_handed_in_stays_as_it_is() -> None:
    network = columns_of(Sum)
    x = images().requires_grad_()
    for i in range(3):
        grad = torch.ones_like(x)
        (found,) = torch.autograd.grad(network(x)[i], x, grad)
        assert torch.equal(grad, torch.ones_like(x))
        network.reversible = False
        (wanted,) = torch.autograd.grad(network(x)[i], x, grad)
        network.reversible = True
        torch.testing.assert_close(found, wanted)
    (found,) = torch.autograd.grad(network(x)[0].sum(), x)  # an expanded gradient
    assert found.isfinite().all()


def test_hooks_of_parameters_see_a_gradient_once() -> None:
    network = make(3)
    network.columns[2].level1 = network.columns[1].level1  # one that two columns use
    other = stored(network)
    for form in (network, other):
        for name, parameter in form.named_parameters():
            if name.endswith("weight"):
                parameter.register_hook(lambda grad: grad.sign() + 2 * grad)
    assert_same(gradients(network), gradients(other))
    calls = []
    parameter = network.columns[1].level0.down.weight
    parameter.register_hook(lambda grad: calls.append(grad))
    loss_of(network(images())).backward()
    assert len(calls) == 1


def test_parameters_that_the_forward_pass_was_given() -> None:
    """torch.func.functional_call: other tensors, which need be no leaves."""
    network = make(2)
    leaves = {
        name: (torch.randn_like(p) * 0.1).requires_grad_() for name, p in network.named_parameters()
    }

    def grads(form: nn.Module) -> list[Tensor]:
        given = {name: leaf * 2 for name, leaf in leaves.items()}
        loss = loss_of(torch.func.functional_call(form, given, (images(),)))
        return list(torch.autograd.grad(loss, list(leaves.values())))

    for found, wanted in zip(grads(network), grads(stored(network)), strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_parameter_that_is_replaced_between_the_passes() -> None:
    def grad(form: ReversibleColumns) -> Tensor:
        loss = loss_of(form(images()))
        layer = form.columns[1].level1.down
        before, layer.weight = layer.weight, nn.Parameter(torch.zeros_like(layer.weight))
        loss.backward()
        assert layer.weight.grad is None
        return before.grad

    network = make()
    other = stored(network)
    torch.testing.assert_close(grad(network), grad(other))


@pytest.mark.parametrize("extra", [lambda _: nn.Dropout(0.4), nn.BatchNorm2d], ids=["drop", "norm"])
@pytest.mark.parametrize("training", [True, False])
def test_training_flags_are_those_of_the_forward_pass(extra: Callable, training: bool) -> None:
    network = make(3, extra).train(training)
    other = stored(network)

    def switched(form: nn.Module) -> Callable[[Tensor], Tensor]:
        def loss(x: Tensor) -> Tensor:
            value = loss_of(form(x))
            form.train(not training)
            return value

        return loss

    assert_same(gradients(network, switched(network)), gradients(other, switched(other)))
    assert all(part.training is not training for part in network.modules())
    for buffer, wanted in zip(network.buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, wanted)


def test_backward_in_inference_mode_raises() -> None:
    loss = loss_of(make()(images()))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference"):
        loss.backward()


class Buffers(nn.Module):
    """Counts in a buffer that is None at first, and in one that it shares with others."""

    def __init__(self, shared: Tensor) -> None:
        super().__init__()
        self.register_buffer("own", None)
        self.register_buffer("shared", shared)
        self.register_buffer("again", shared)

    def forward(self, x: Tensor) -> Tensor:
        y = x * (self.shared if self.own is None else self.own).clone()
        self.own = self.shared + 1
        self.again.mul_(1.5)
        return y


def test_buffers_that_are_none_or_shared() -> None:
    shared = torch.tensor(0.5, dtype=torch.float64)
    network = make(3, lambda _: Buffers(shared))
    other = stored(network)
    assert_same(gradients(network), gradients(other))
    for buffer, wanted in zip(network.buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, wanted)


def test_a_buffer_that_is_changed_between_the_passes_raises() -> None:
    network = make(2, nn.BatchNorm2d).eval()
    loss = loss_of(network(images()))
    network.get_buffer("1.level1.extra.running_mean").add_(1)
    with pytest.raises(RuntimeError, match=r"1\.level1: .* modified by an inplace operation"):
        loss.backward()


def test_a_level_that_changes_its_inputs_raises() -> None:
    class Changes(nn.Module):
        def forward(self, below: Tensor, above: Tensor | None) -> Tensor:
            return below if above is None else below + above.mul_(2)

    with pytest.raises(RuntimeError, match=r"1\.level0: it modifies its inputs in place"):
        columns_of(Changes)(images().requires_grad_())


def test_a_level_that_returns_what_it_holds() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("held", torch.ones(2, 4, 9, 7))

        def forward(self, below: Tensor, above: Tensor | None) -> Tensor:
            return self.held

    network = columns_of(Holds, count=1)
    for feature in network(images().requires_grad_()):
        feature.sum()
    assert not network.columns[0].level0.held.requires_grad
    copy.deepcopy(network)


def test_a_tensor_that_begins_to_need_a_gradient_raises() -> None:
    scale = torch.ones((), dtype=torch.float64)

    class Scales(Sum):
        def forward(self, below: Tensor, above: Tensor | None) -> Tensor:
            return super().forward(below, above) * scale

    network = columns_of(Scales)
    x = images().requires_grad_()
    loss_of(network(x)).backward()
    scale.requires_grad_()
    with pytest.raises(RuntimeError, match="requires a gradient and is no parameter"):
        loss_of(network(x)).backward()


class NoisyOf(nn.Module):
    def __init__(self, generators: object) -> None:
        super().__init__()
        self.sources = generators

    def forward(self, x: Tensor) -> Tensor:
        sources = self.sources.values() if isinstance(self.sources, dict) else self.sources
        for source in sources:
            x = x * torch.rand(x.shape, generator=source, dtype=x.dtype)
        return x


@pytest.mark.parametrize("kind", [list, tuple, lambda g: dict(enumerate(g))])
def test_generators_in_containers(kind: Callable) -> None:
    generators = [torch.Generator(), torch.Generator()]
    network = make(3, lambda _: NoisyOf(kind(generators)))
    found = []
    for reversible in (True, False):
        network.reversible = reversible
        for seed, generator in enumerate(generators):
            generator.manual_seed(seed)
        found.append(gradients(network))
    assert_same(*found)


def test_lazy_parameters_run_stored_once() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.LazyConv2d(4, 1, dtype=torch.float64)

        def forward(self, below: Tensor, above: Tensor | None) -> Tensor:
            return self.conv(below)

    network = ReversibleColumns([ReversibleColumn([Lazy(), Lazy()], [4, 4]) for _ in range(2)])
    network(images())
    assert_same(gradients(network), gradients(stored(network)))


def test_streams_of_growing_dtypes_are_rebuilt_to_the_bit() -> None:
    """Under autocast the first column's features are half, and the others float32."""
    network = make(6).float()
    with rebuilt_to_the_bit(levels(network)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(network(images().float().requires_grad_()))
        loss.backward()


def test_features_of_two_axes() -> None:
    class Linear(nn.Linear):
        def forward(self, below: Tensor, above: Tensor | None) -> Tensor:
            return super().forward(below if above is None else below + above).tanh()

    network = columns_of(lambda: Linear(4, 4))
    x = torch.randn(5, 4, dtype=torch.float64)
    assert_same(gradients(network, x=x), gradients(stored(network), x=x))


def test_hooks_on_columns_and_missing_features_raise() -> None:
    network = make(2)
    handle = network.columns[1].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"columns\[1\]: expected hooks on its levels"):
        network(images())
    handle.remove()
    with pytest.raises(TypeError, match=r"previous\[0\]: expected a torch\.Tensor, got NoneType"):
        network.columns[1](images(), [None] * 3)
