"""Batch channel norm over several processes."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import viops
from ops.test_batch_channel_norm import make, normal
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*without a kernel of its own:RuntimeWarning",
)

SYNC_CASES = [
    (shape, activation, estimate, sizes)
    for shape in ((6,), (6, 4, 5))
    for activation in (None, "relu")
    for estimate in (False, True)
    for sizes in ((2, 2), (3, 1), (4, 0))
]


def shared_norm(shape: tuple, activation: str | None, estimate: bool) -> nn.Module:
    """A norm with drawn values that shares its statistics."""
    norm = make(1, *shape, activation=activation, estimate=estimate)
    norm.dims = None
    return norm


def run_case(norm: nn.Module, case: tuple, part: slice) -> dict[str, Tensor]:
    """Output, gradients and buffers after two steps on a part of the joined batch."""
    shape, *_, sizes = case
    total, results = sum(sizes), {}
    for step in range(2):
        x, residual, grad = (normal(total, *shape, seed=3 * step + i) for i in range(3))
        x = x * 2 + 100
        x, residual = (t[part].clone().requires_grad_() for t in (x, residual))
        y = norm(x, residual)
        grads = torch.autograd.grad(y, [x, residual, *norm.parameters()], grad[part])
        names = ["x", "residual", *(name for name, _ in norm.named_parameters())]
        results |= {f"{name}{step}": g for name, g in zip(names, grads, strict=True)}
        results[f"y{step}"] = y.detach()
    return {**results, **dict(norm.named_buffers())}


def run_process(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    results = []
    for case in SYNC_CASES:
        shape, activation, estimate, sizes = case
        part = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], None)
        norm = viops.nn.convert_sync_batch_channel_norm(shared_norm(shape, activation, estimate))
        assert type(norm) is viops.nn.SyncBatchChannelNorm
        results.append(run_case(norm, case, part))
    torch.save([results, train_distributed(rank), far(rank), nothing()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        viops.nn.WSConv2d(3, 8, 3),
        viops.nn.BatchChannelNorm2d(8, 4, activation="relu"),
        nn.Flatten(),
        nn.Linear(8 * 16, 5),
    ).double()


def train(model: nn.Module, parts: list[Tensor]) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x in parts:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [*model.state_dict().values()]


def train_distributed(rank: int) -> list[Tensor]:
    """A few steps of DistributedDataParallel, each process with its half of the batch."""
    model = viops.nn.convert_sync_batch_channel_norm(small_model())
    model = nn.parallel.DistributedDataParallel(model)
    return train(model, [normal(4, 3, 6, 6, seed=i)[2 * rank :][:2] for i in range(3)])


MEANS = (1e3, 1e5, 1e6)


def far_inputs(mean: float) -> tuple[Tensor, Tensor]:
    return normal(4, 6, 9, 5, dtype=torch.float32) + mean, normal(4, 6, 9, 5, seed=1).float()


def far(rank: int | None) -> list[Tensor]:
    """In float32 and far from zero output and gradients; None is for all processes' parts."""
    results = []
    for mean in MEANS:
        norm = make(4, 6, 9, 5, dtype=torch.float32, activation=None)
        if rank is not None:
            norm = viops.nn.convert_sync_batch_channel_norm(norm)
        part = slice(None) if rank is None else slice(2 * rank, 2 * rank + 2)
        x, grad = (t[part] for t in far_inputs(mean))
        y = norm(x.requires_grad_())
        results += [y.detach(), *torch.autograd.grad(y, [x, *norm.parameters()], grad)]
    return results


def nothing() -> list[Tensor]:
    """Buffers after a step of which no process has images."""
    buffers = []
    for estimate in (False, True):
        norm = shared_norm((6, 4, 5), None, estimate)
        norm = viops.nn.convert_sync_batch_channel_norm(norm)
        norm(torch.zeros(0, 6, 4, 5, dtype=torch.float64))
        buffers += norm.buffers()
    return buffers


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list:
    """What two processes have computed: results of all cases, and a trained model."""
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(run_process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("i", range(len(SYNC_CASES)), ids=lambda i: str(SYNC_CASES[i]))
def test_two_processes_equal_one_on_the_joined_batch(processes: list, i: int) -> None:
    case = SYNC_CASES[i]
    parts = [results[0][i] for results in processes]
    expected = run_case(shared_norm(*case[:3]), case, slice(None))
    buffers = {name for name in expected if name.startswith("bn.") and not name[-1].isdigit()}
    assert parts[0].keys() == parts[1].keys() == expected.keys()
    for name, want in expected.items():
        first, second = (part[name] for part in parts)
        if name in buffers:
            assert torch.equal(first, second), name
            got = first
        elif name.rstrip("01") in ("x", "residual", "y"):
            got = torch.cat((first, second))
        else:  # of a parameter: each process has that of its part
            got = first + second
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9, msg=f"{name}")


def test_distributed_training_equals_that_of_one_process(processes: list) -> None:
    expected = train(small_model(), [normal(4, 3, 6, 6, seed=i) for i in range(3)])
    for _, state, *_ in processes:
        for got, want in zip(state, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_alone_a_shared_norm_is_the_plain_one() -> None:
    plain, x = make(3, 6, 4, 5, activation="relu"), normal(3, 6, 4, 5)
    model = nn.ModuleDict({"norm": copy.deepcopy(plain), "other": nn.BatchNorm2d(6)})
    parameters = list(model.parameters())
    converted = viops.nn.convert_sync_batch_channel_norm(model)
    assert converted is model
    assert type(model["norm"]) is viops.nn.SyncBatchChannelNorm
    assert type(model["other"]) is nn.BatchNorm2d
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model["norm"](x), plain(x))
    assert torch.equal(copy.deepcopy(model["norm"]).eval()(x), plain.eval()(x))
    assert viops.nn.SyncBatchChannelNorm(6, 3)(x.float()[:, :, 0]).shape == (3, 6, 5)


def test_float32_far_from_zero(processes: list) -> None:
    one = far(None)
    for i, (first, second, want) in enumerate(
        zip(processes[0][2], processes[1][2], one, strict=True)
    ):
        of_images = first.shape[0] == 2 and first.dim() == 4
        got = torch.cat((first, second)) if of_images else first + second
        scale = want.abs().max().item()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * scale, msg=f"{i}")


def test_where_no_process_has_images_statistics_stay(processes: list) -> None:
    wanted = [
        value
        for estimate in (False, True)
        for name, value in shared_norm((6, 4, 5), None, estimate).named_buffers()
        if "num_batches" not in name
    ]
    for results in processes:
        found = [value for value in results[3] if value.is_floating_point()]
        for got, want in zip(found, wanted, strict=True):
            assert torch.equal(got, want)


def test_shared_modules_stay_shared_and_parametrized_ones_are_refused() -> None:
    model = nn.Module()
    model.a = viops.nn.BatchChannelNorm2d(6, 3)
    model.b = model.a
    model.inner = nn.Sequential(model.a)
    viops.nn.convert_sync_batch_channel_norm(model)
    assert type(model.a) is viops.nn.SyncBatchChannelNorm
    assert model.a is model.b is model.inner[0]
    norm = viops.nn.BatchChannelNorm2d(6, 3)
    nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
    with pytest.raises(ValueError, match=r"^module: \S"):
        viops.nn.convert_sync_batch_channel_norm(nn.Sequential(norm))
