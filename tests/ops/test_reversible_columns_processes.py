"""Reversible columns under DistributedDataParallel and under FSDP2, over gloo."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from reversible_networks import CLOSE, assert_same, images, levels, loss_of, make
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard


class Model(nn.Module):
    """A stem before the columns, as models have it; `network` is what varies."""

    def __init__(self, reversible: bool) -> None:
        super().__init__()
        self.network = make(3, reversible=reversible)
        self.stem = nn.Conv2d(4, 4, 1).double()

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.network(self.stem(x))


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Gradients after two accumulated passes."""
    for _ in range(2):
        loss_of(model(x)).backward()
    return [p.grad for p in model.parameters()]


def run_process(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(Model(reversible=True))
    ready: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: ready.append(name))
    with model.no_sync():
        loss_of(model(images(4)[2 * rank :][:2])).backward()
    loss_of(model(images(4)[2 * rank :][:2])).backward()
    names = [name for name, _ in model.named_parameters()]
    grads = {name: p.grad for name, p in model.module.named_parameters()}
    torch.save([grads, sorted(ready) == sorted(names * 2)], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    """The means of both processes' gradients, each ready once a pass."""
    torch.multiprocessing.spawn(run_process, (str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = Model(reversible=False)
    for _ in range(2):
        loss_of(alone(images(4))).backward()
    expected = {name: parameter.grad / 2 for name, parameter in alone.named_parameters()}
    for grads, once in results:
        assert once
        assert_same(grads, expected)


@pytest.fixture
def one_process(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("parts", ["whole", "columns' container", "levels"])
@pytest.mark.parametrize("reshard", [True, False])
def test_fully_sharded(one_process: None, parts: str, reshard: bool) -> None:
    model, alone = Model(reversible=True), Model(reversible=False)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    if parts == "levels":
        for level in levels(model.network):
            fully_shard(level, mesh=mesh, reshard_after_forward=reshard)
    elif parts != "whole":
        fully_shard(model.network, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    optimizer, other = (torch.optim.SGD(m.parameters(), 0.01) for m in (model, alone))
    for _ in range(3):
        for m, o in ((model, optimizer), (alone, other)):
            o.zero_grad()
            step(m, images())
            o.step()
        for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert p.grad is not None, name
            torch.testing.assert_close(p.grad.full_tensor(), q.grad, **CLOSE)
            torch.testing.assert_close(p.full_tensor(), q, **CLOSE)
