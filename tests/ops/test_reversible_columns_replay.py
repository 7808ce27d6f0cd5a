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
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
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


def test_hooks_of_parameters_that_a_level_holds_elsewhere_too() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((4, 1, 1), 0.9))
            self.held = [self.weight]

        def forward(self, below: Tensor, above: Tensor | None) -> Tensor:
            return torch.tanh(below if above is None else below + above) * self.held[0]

    network = columns_of(Holds, count=2)
    calls: list[Tensor] = []

    def double(grad: Tensor) -> Tensor:
        calls.append(grad)
        return grad * 2

    found = []
    for reversible in (True, False):
        network.reversible = reversible
        handle = network.columns[1].level1.weight.register_hook(double)
        found.append(gradients(network))
        handle.remove()
    assert len(calls) == 2
    assert_same(*found)


def test_modules_that_are_replaced_between_the_passes() -> None:
    def switched(form: ReversibleColumns) -> Callable[[Tensor], Tensor]:
        def loss(x: Tensor) -> Tensor:
            value = loss_of(form(x))
            form.columns[1].level1.extra = nn.Identity()
            form.columns[0].level2.down = nn.Conv2d(6, 8, 3, 2, 1).requires_grad_(False).double()
            return value

        return loss

    network = make(3, lambda _: nn.ReLU())
    other = stored(network)
    leaves = [dict(form.named_parameters()) for form in (network, other)]
    for form in (network, other):
        switched(form)(images()).backward()
    assert_same(*({name: leaf.grad for name, leaf in named.items()} for named in leaves))
    assert all(isinstance(form.columns[1].level1.extra, nn.Identity) for form in (network, other))


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


class Views(nn.Module):
    """A buffer that is a part of another's memory, and written through."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("whole", torch.ones(4, dtype=torch.float64))
        self.register_buffer("part", self.whole[1:3])

    def forward(self, x: Tensor) -> Tensor:
        self.part.add_(0.5)
        return x * self.whole.sum() / 8


def test_buffers_that_share_memory() -> None:
    found = []
    for reversible in (True, False):
        network = make(2, lambda _: Views())
        for part in network.modules():
            if isinstance(part, Views):  # .double() has copied each
                part.part = part.whole[1:3]
        network.reversible = reversible
        found.append(gradients(network))
        assert all(buffer.max() == 1.5 for buffer in network.buffers())
    assert_same(*found)


def test_buffers_that_inference_mode_has_made() -> None:
    class Caches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", None)

        def forward(self, x: Tensor) -> Tensor:
            if self.cache is None:
                self.cache = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype)
            return x + self.cache

    network = make(2, lambda _: Caches())
    with torch.inference_mode():
        network(images())
    found = gradients(network)
    network.reversible = False
    assert_same(found, gradients(network))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_script_modules_are_refused() -> None:
    """Whose flags and buffers nobody can exchange."""
    network = make(2, lambda channels: torch.jit.script(nn.BatchNorm2d(channels)))
    with pytest.raises(TypeError, match=r"0\.level0: .* got a torch\.jit\.ScriptModule"):
        network(images().requires_grad_())
    network.reversible = False
    loss_of(network(images())).backward()


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


class PrivatelyNoisy(nn.Module):
    """Its generators lie deeper, in an attribute that is private."""

    def __init__(self, generators: list) -> None:
        super().__init__()
        self._sources = {"all": [generators]}

    def forward(self, x: Tensor) -> Tensor:
        for source in self._sources["all"][0]:
            x = x * torch.rand(x.shape, generator=source, dtype=x.dtype)
        return x


@pytest.mark.parametrize(
    "noise",
    [
        lambda g: NoisyOf(list(g)),
        lambda g: NoisyOf(tuple(g)),
        lambda g: NoisyOf(dict(enumerate(g))),
        PrivatelyNoisy,
    ],
    ids=["list", "tuple", "dict", "private"],
)
def test_generators_in_containers(noise: Callable) -> None:
    generators = [torch.Generator(), torch.Generator()]
    network = make(3, lambda _: noise(generators))
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


def test_what_tracers_and_trackers_see() -> None:
    network, x = make(2).float(), images().float()
    other = stored(network)
    with torch.no_grad():  # a traced node would have no graph
        expected = other(x)
    traced = make_fx(lambda x: network(x)[2].detach())(x)
    torch.testing.assert_close(traced(2 * x), other(2 * x)[2].detach())
    torch.testing.assert_close(traced(x), expected[2])
    counts = []
    for form in (network, other):
        with FlopCounterMode(display=False) as counter:
            loss_of(form(x.requires_grad_())).backward()
        counts.append(counter.get_total_flops())
    assert 1.2 * counts[1] < counts[0] < 1.4 * counts[1]


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
    network.columns[1].forward = lambda below, previous: previous
    with pytest.raises(ValueError, match=r"columns\[1\]: expected ReversibleColumn's forward"):
        network(images())
    del network.columns[1].forward
    with pytest.raises(TypeError, match=r"previous\[0\]: expected a torch\.Tensor, got NoneType"):
        network.columns[1](images(), [None] * 3)
