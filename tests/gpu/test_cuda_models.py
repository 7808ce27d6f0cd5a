"""Patched models on a GPU: autocast, torch.compile, half precision, graphs."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import viops
from contract import case_id
from tiny_vit import LAYERS, make_images, make_model, plain_features
from torch import Tensor

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=case_id)
#: As long as a kernel and a matrix product of float32 differ by no more than their own rounding.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Convolutions in TF32 would move scores enough to change which patches are kept."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def patched_and_plain(**options: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    plain = make_model(**options).to(DEVICE)
    return viops.patch.evit(copy.deepcopy(plain), 0.7, LAYERS), plain


def test_a_patched_model_equals_the_plain_computation() -> None:
    model, plain = patched_and_plain()
    images = make_images().to(DEVICE)
    expected = plain_features(plain, images, dict.fromkeys(LAYERS, 0.7))
    torch.testing.assert_close(model.forward_features(images), expected, **TOLERANCE)
    on_host = model.to("cpu").forward_features(images.cpu())
    torch.testing.assert_close(expected.cpu(), on_host, rtol=1e-3, atol=1e-3)


@HALF
def test_autocast_of_class_attention(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 197, 3, 6, 64, generator=generator).to(DEVICE).requires_grad_()
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    with torch.autocast(DEVICE, dtype):
        out, scores = viops.class_attention(q, k, v)
        with viops.use_backend("reference"):
            wanted_out, wanted_scores = viops.class_attention(q, k, v)
    assert out.dtype == wanted_out.dtype == dtype
    assert scores.dtype is torch.float32
    for result, wanted in ((out, wanted_out), (scores, wanted_scores)):
        error = (result - wanted).float().norm() / wanted.float().norm()
        assert error < 1e-2
    (grad,) = torch.autograd.grad(out.float().square().sum() + scores.square().sum(), qkv)
    assert grad.dtype is torch.float32
    assert grad.isfinite().all()


@HALF
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}], ids=["", "qk_norm"])
def test_autocast_of_a_patched_model(dtype: torch.dtype, options: dict) -> None:
    model, plain = patched_and_plain(**options)
    images = make_images().to(DEVICE)
    with torch.autocast(DEVICE, dtype):
        features, out = model.forward_features(images), model(images)
        expected = plain_features(plain, images, dict.fromkeys(LAYERS, 0.7))
    assert out.dtype is dtype
    assert features.dtype == expected.dtype
    error = (features[:, 0] - expected[:, 0]).float().norm() / expected[:, 0].float().norm()
    assert error < 0.05  # kept patches with nearly equal scores may change places
    out.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def gradients(model: torch.nn.Module, images: Tensor, call) -> list[Tensor]:
    model.zero_grad()
    call(images).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compiled_forward_and_backward(training: bool) -> None:
    model, _ = patched_and_plain(reg_tokens=1)
    model.train(training)
    compiled = torch.compile(model, fullgraph=True)
    for batch in (2, 3, 5):
        images = make_images(batch).to(DEVICE)
        torch.testing.assert_close(compiled(images), model(images), **TOLERANCE)
        expected = gradients(model, images, model)
        for grad, wanted in zip(gradients(model, images, compiled), expected, strict=True):
            error = (grad - wanted).norm() / wanted.norm().clamp_min(1e-6)
            assert error < 1e-3


@HALF
def test_compiled_under_autocast(dtype: torch.dtype) -> None:
    model, _ = patched_and_plain()
    compiled = torch.compile(model, fullgraph=True)
    images = make_images(4).to(DEVICE)
    with torch.autocast(DEVICE, dtype), torch.no_grad():
        out, wanted = compiled(images), model(images)
    assert out.dtype is dtype
    assert (out - wanted).float().norm() / wanted.float().norm() < 0.05


def test_a_cuda_graph_of_a_training_step() -> None:
    model, _ = patched_and_plain()
    images, others = make_images(3).to(DEVICE), make_images(6).to(DEVICE)[3:]

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(images).square().sum()
        loss.backward()
        return loss

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    found = [parameter.grad for parameter in model.parameters()]
    images.copy_(others)
    graph.replay()
    torch.cuda.synchronize()
    replayed, found = loss.clone(), [grad.clone() for grad in found]
    expected = step()
    torch.testing.assert_close(replayed, expected, **TOLERANCE)
    for grad, parameter in zip(found, model.parameters(), strict=True):
        error = (grad - parameter.grad).norm() / parameter.grad.norm().clamp_min(1e-6)
        assert error < 1e-3


def test_deit_in_bfloat16() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    plain = timm.create_model("deit_small_patch16_224").eval().to(DEVICE, torch.bfloat16)
    model = viops.patch.evit(copy.deepcopy(plain), keep_rate=0.7, layers=(3, 6, 9))
    images = torch.randn(16, 3, 224, 224, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        out, kept = model(images, return_index=True)
        same = model(images, keep_rate=1)
        expected = plain(images)
    assert out.shape == expected.shape
    assert out.dtype is torch.bfloat16
    assert out.isfinite().all()
    assert [tuple(each.index.shape) for each in kept] == [(16, 138), (16, 98), (16, 70)]
    for index, num_patches in kept:
        in_order = index.sort(dim=1).values
        assert (in_order[:, 1:] > in_order[:, :-1]).all()
        assert in_order.min() >= 0
        assert in_order.max() < num_patches
    torch.testing.assert_close(same, expected)
    assert ((out - expected).float().norm() / expected.float().norm()) < 1
    model.train()
    model(images).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
