"""Ways in which the weight of a layer changes, for layers that keep what they make of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Negated(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return -weight


class ThroughData(torch.optim.Optimizer):
    """An optimizer as they were once written: what it does is unseen by the version counter."""

    def __init__(self, parameters: object) -> None:
        super().__init__(parameters, {})

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.5).add_(torch.randn_like(parameter))


def sharded_step(layer: nn.Module) -> None:
    """As fully sharded training does: a shard is stepped, and gathered into memory that was freed
    and taken again, which leaves version and maybe address as they were."""
    shard = nn.Parameter(layer.weight.detach().clone())
    shard.grad = torch.randn_like(shard)
    storage, size = layer.weight.untyped_storage(), layer.weight.untyped_storage().size()
    torch.optim.SGD([shard], 0.1).step()
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(layer.weight):
        storage.resize_(0)
        storage.resize_(size)
        layer.weight.copy_(shard)


def in_place(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight))


def in_inference_mode(layer: nn.Module) -> None:
    with torch.inference_mode():
        layer.weight.add_(torch.randn_like(layer.weight))


def stepped(make_optimizer: Callable) -> Callable[[nn.Module], None]:
    def step(layer: nn.Module) -> None:
        for parameter in layer.parameters():
            parameter.grad = torch.randn_like(parameter)
        make_optimizer(layer.parameters()).step()

    return step


def with_new_data(layer: nn.Module) -> None:
    layer.weight.data = torch.randn_like(layer.weight)


def with_turned_data(layer: nn.Module) -> None:
    layer.weight.data = layer.weight.data.unflatten(0, (2, 3)).transpose(0, 1).flatten(0, 1)


def with_new_parameter(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def loaded(**options: bool) -> Callable[[nn.Module], None]:
    def load(layer: nn.Module) -> None:
        state = {key: torch.randn_like(value) for key, value in layer.state_dict().items()}
        layer.load_state_dict(state, **options)

    return load


def from_a_vector(layer: nn.Module) -> None:
    size = sum(parameter.numel() for parameter in layer.parameters())
    vector = torch.randn(size, dtype=layer.weight.dtype)
    nn.utils.vector_to_parameters(vector, layer.parameters())


#: Of layers whose weight has six filters or rows.
CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": in_place,
    "in inference mode": in_inference_mode,
    "sgd": stepped(lambda p: torch.optim.SGD(p, 0.1)),
    "foreach adam": stepped(lambda p: torch.optim.Adam(p, 0.1, foreach=True)),
    "fused adam": stepped(lambda p: torch.optim.Adam(p, 0.1, fused=True)),
    "through data": stepped(ThroughData),
    "sharded": sharded_step,
    "new data": with_new_data,
    "turned data": with_turned_data,
    "new parameter": with_new_parameter,
    "loaded": loaded(),
    "assigned": loaded(assign=True),
    "init": lambda layer: nn.init.kaiming_normal_(layer.weight),
    "vector": from_a_vector,
}
