"""Patched models under torch.compile, export, autocast, checkpointing and DDP."""

from pathlib import Path

import conftest  # noqa: F401  spawned ranks import this file without pytest
import pytest
import torch
import viops
from tiny_vit import LAYERS, TOLERANCE, make_images, make_model, one_thread, plain_features  # noqa: F401
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint


def test_compile_without_graph_breaks_and_without_recompiling_for_a_batch():
    model = viops.patch.evit(make_model(reg_tokens=1, depth=3), 0.7, LAYERS)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (2, 3, 7, 5):
        compiled(make_images(batch))
    assert counter.frame_count == 2  # the first size, and one graph for all that follow
    with torch.no_grad():
        out, kept = compiled(make_images(3), return_index=True)
    expected, expected_kept = model(make_images(3), return_index=True)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    for (index, num_patches), other in zip(kept, expected_kept, strict=True):
        assert torch.equal(index, other.index)
        assert num_patches == other.num_patches


def test_compile_without_recompiling_for_a_keep_rate():
    model = viops.patch.evit(make_model(img_size=64, depth=3), 0.7, LAYERS)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    images = make_images(height=64, width=64)
    for keep_rate in (0.9, 0.8, 0.6, 0.5):
        out = compiled(images, keep_rate=keep_rate)
        torch.testing.assert_close(out, model(images, keep_rate=keep_rate), **TOLERANCE)
    assert counter.frame_count == 2


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_compiled_training_equals_eager(checkpointing):
    model = viops.patch.evit(make_model(depth=2), 0.7, layers=(0, 1))
    model.set_grad_checkpointing(checkpointing)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images = make_images()
    model(images).square().sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    compiled(images).square().sum().backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-5)


def test_export():
    model = viops.patch.evit(make_model(), 0.7, LAYERS)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (make_images(3),), dynamic_shapes={"x": {0: batch}})
    images = make_images(5)
    torch.testing.assert_close(program.module()(images), model(images), **TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}], ids=["", "qk_norm"])
def test_autocast(options):
    plain, model = make_model(**options), viops.patch.evit(make_model(**options), 0.7, LAYERS)
    images = make_images()
    with torch.autocast("cpu", torch.bfloat16):
        features = model.forward_features(images)
        out = model(images)
        expected = plain_features(plain, images, dict.fromkeys(LAYERS, 0.7))
    assert out.dtype is torch.bfloat16
    assert features.dtype == expected.dtype
    error = (features[:, 0] - expected[:, 0]).float().norm() / expected[:, 0].float().norm()
    assert error < 0.05  # kept patches with nearly equal scores may change places
    out.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


class Float32Norm(nn.LayerNorm):
    """What a LayerNorm is under autocast on a GPU."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


def test_autocast_where_norms_of_q_and_k_give_float32():
    model = viops.patch.evit(make_model(qk_norm=True, norm_layer=Float32Norm), 0.7, LAYERS)
    images = make_images()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).dtype is torch.bfloat16


def test_half_precision_weights():
    model = viops.patch.evit(make_model(), 0.7, LAYERS).bfloat16()
    assert model(make_images().bfloat16()).dtype is torch.bfloat16


def test_channels_last_input():
    model = viops.patch.evit(make_model(), 0.7, LAYERS)
    images = make_images()
    out = model(images.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(out, model(images), **TOLERANCE)


def gradients(model: nn.Module, out: Tensor) -> list[Tensor]:
    model.zero_grad()
    out.square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


def test_checkpointing_gives_the_same_gradients():
    model = viops.patch.evit(make_model(drop_path_rate=0.3), 0.7, LAYERS).train()
    images = make_images().requires_grad_()

    def run(call) -> list[Tensor]:
        torch.manual_seed(3)
        return gradients(model, call())

    expected = run(lambda: model(images))
    for use_reentrant in (False, True):
        got = run(lambda: checkpoint(model, images, use_reentrant=use_reentrant))  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    model.set_grad_checkpointing()
    for call in (lambda: model(images), lambda: model(images, return_index=True)[0]):
        assert all(torch.equal(a, b) for a, b in zip(run(call), expected, strict=True))


def test_checkpointing_runs_blocks_again_in_backward():
    model = viops.patch.evit(make_model(), 0.7, LAYERS)
    model.set_grad_checkpointing()
    calls = []
    model.blocks[1].attn.register_forward_hook(lambda module, args, out: calls.append(1))
    out = model(make_images())
    assert len(calls) == 1
    out.sum().backward()
    assert len(calls) == 2


def test_distributed_data_parallel_on_one_process():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = viops.patch.evit(make_model(), 0.7, LAYERS)
        images = make_images()
        expected = gradients(model, model(images, keep_rate=0.5))
        parallel = DistributedDataParallel(model)
        for _ in range(2):
            out, kept = parallel(images, keep_rate=0.5, return_index=True)
            assert [tuple(each.index.shape) for each in kept] == [(2, 8), (2, 5)]
            for got, grad in zip(gradients(parallel, out), expected, strict=True):
                torch.testing.assert_close(got, grad, rtol=1e-5, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


def _train_rank(rank: int, world_size: int, store: str, folder: str) -> None:
    """One rank's step of DDP on its share of the batch; saves logits and gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
    )
    try:
        model = viops.patch.evit(make_model(), 0.7, LAYERS)
        if rank > 0:  # DDP is to bring rank 0's weights here
            with torch.no_grad():
                model.head.weight.zero_()
        parallel = DistributedDataParallel(model)
        images = make_images(2 * world_size).chunk(world_size)[rank]
        logits = parallel(images)
        saved = {"gradients": gradients(parallel, logits), "logits": logits.detach()}
        torch.save(saved, f"{folder}/rank{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_distributed_data_parallel_on_two_processes(tmp_path: Path):
    world_size = 2
    torch.multiprocessing.spawn(
        _train_rank, (world_size, str(tmp_path / "store"), str(tmp_path)), nprocs=world_size
    )
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(world_size)]
    for first, second in zip(*(rank["gradients"] for rank in ranks), strict=True):
        assert torch.equal(first, second)

    model = viops.patch.evit(make_model(), 0.7, LAYERS)
    logits = model(make_images(2 * world_size))
    expected = gradients(model, logits)
    torch.testing.assert_close(torch.cat([rank["logits"] for rank in ranks]), logits, **TOLERANCE)
    for got, grad in zip(ranks[0]["gradients"], expected, strict=True):
        # DDP averages over ranks what one process sums over the batch
        torch.testing.assert_close(got * world_size, grad, rtol=1e-4, atol=1e-5)
