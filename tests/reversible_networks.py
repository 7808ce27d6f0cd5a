"""Small reversible columns, and their gradients, for the tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from viops.nn import ReversibleColumn, ReversibleColumns

CHANNELS = (4, 6, 8)
#: Of float64: what rounding leaves after a few columns.
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


class Level(nn.Module):
    """A convolution of the level below, one of the level above, and `extra` after both."""

    def __init__(self, index: int, first: bool, extra: nn.Module) -> None:
        super().__init__()
        below = CHANNELS[max(index - 1, 0)]
        stride = 1 if index == 0 else 2
        self.down = nn.Conv2d(below, CHANNELS[index], 3, stride, 1)
        if not first and index < len(CHANNELS) - 1:
            self.up = nn.Conv2d(CHANNELS[index + 1], CHANNELS[index], 1)
        self.extra = extra

    def forward(self, below: Tensor, above: Tensor | None) -> Tensor:
        x = self.down(below)
        if above is not None:
            x = x + nn.functional.interpolate(self.up(above), x.shape[2:])
        return self.extra(torch.tanh(x))


def make(
    num_columns: int = 3,
    extra: Callable[[int], nn.Module] = lambda channels: nn.Identity(),
    **options: object,
) -> ReversibleColumns:
    """Columns of three levels, float64, weights by seed, `extra(channels)` at each level's end."""
    torch.manual_seed(3)
    columns = []
    for i in range(num_columns):
        levels = [Level(j, i == 0, extra(channels)) for j, channels in enumerate(CHANNELS)]
        columns.append(ReversibleColumn(levels, CHANNELS))
    network = ReversibleColumns(columns, **options).double()
    for alpha in alphas(network):
        nn.init.uniform_(alpha, 0.4, 1.2)
    return network


def alphas(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for name, parameter in network.named_parameters() if "alpha" in name]


def levels(network: ReversibleColumns) -> list[nn.Module]:
    return [level for column in network.columns for level in column.levels]


@contextmanager
def rebuilt_to_the_bit(levels: list[nn.Module]) -> Iterator[None]:
    """A pass forward and back, in which each level is called again with the inputs that it had."""
    seen: dict[nn.Module, list[Tensor | None]] = {}
    again: list[nn.Module] = []

    def note(level: nn.Module, inputs: tuple[Tensor | None, ...]) -> None:
        kept = [t if t is None else t.detach().clone() for t in inputs]
        if level not in seen:
            seen[level] = kept
            return
        for before, now in zip(seen[level], kept, strict=True):
            assert (before is None and now is None) or torch.equal(before, now)
        again.append(level)

    handles = [level.register_forward_pre_hook(note) for level in levels]
    yield
    assert again == levels[::-1]
    for handle in handles:
        handle.remove()


def images(batch: int = 2) -> Tensor:
    return torch.randn(
        batch, CHANNELS[0], 9, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5)
    )


def loss_of(features: list[Tensor]) -> Tensor:
    """Of all features, each with other weights."""
    return sum((feature.cos() * (i + 1)).sum() for i, feature in enumerate(features))


def gradients(
    network: nn.Module, loss: Callable[[Tensor], Tensor] | None = None, x: Tensor | None = None
) -> dict[str, Tensor | None]:
    """The loss, and gradients to the input and all parameters, after torch.manual_seed(11)."""
    x = (images() if x is None else x).detach().clone().requires_grad_()
    network.zero_grad()
    torch.manual_seed(11)
    value = loss_of(network(x)) if loss is None else loss(x)
    value.backward()
    found = {name: parameter.grad for name, parameter in network.named_parameters()}
    return {"loss": value.detach(), "x": x.grad, **found}


def stored(network: ReversibleColumns) -> ReversibleColumns:
    """A copy that keeps all features."""
    other = copy.deepcopy(network)
    other.reversible = False
    return other


def assert_same(found: dict, expected: dict, **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        if wanted is None:
            assert found[name] is None, name
            continue
        label = f"{name}: "
        torch.testing.assert_close(found[name], wanted, **(tolerance or CLOSE), msg=label.__add__)
