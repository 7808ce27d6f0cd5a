"""viops.models.ms_mlp against the official code's outputs, and as models that people use."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext

import ms_mlp_golden
import pytest
import torch
import viops
from torch import Tensor, nn
from viops import models
from viops.models.ms_mlp import CONFIGS, MSMLP, Config

pytestmark = pytest.mark.filterwarnings("ignore:.*without a kernel of its own:RuntimeWarning")

SIZES = {"t": models.ms_mlp_t, "s": models.ms_mlp_s, "b": models.ms_mlp_b}
EACH_SIZE = pytest.mark.parametrize("size", SIZES)
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return ms_mlp_golden.load()


def drawn(build: Callable[..., MSMLP] = models.ms_mlp_t, **options: object) -> MSMLP:
    """A model with the golden file's parameters, made without values that would be drawn anew."""
    with torch.device("meta"):
        model = build(**options)
    model.to_empty(device="cpu")
    model.load_state_dict(ms_mlp_golden.draw_state(model.state_dict()))
    return model.eval()


def tiny(**options: object) -> MSMLP:
    """A model with all that the sizes have, and few channels."""
    torch.manual_seed(0)
    config = Config(
        embed_dim=12,
        depths=(1, 1, 2, 1),
        drop_path_rate=0.2,
        shift_dist=(-1, 0, 2),
        mix_sizes=((1, 3, 5), (3, 3, 5), (1, 5, 7), (3, 3, 3)),
        mlp_ratio=2.0,
        layer_scale=0.5,
    )
    model = MSMLP(config, **{"num_classes": 5, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def gradients(model: nn.Module, out: Tensor) -> list[Tensor]:
    model.zero_grad()
    out.square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


# the official models


@EACH_SIZE
def test_state_dict_is_the_official_ones(golden: dict[str, Tensor], size: str) -> None:
    with torch.device("meta"):
        model = SIZES[size]()
    assert torch.equal(ms_mlp_golden.digest(model.state_dict()), golden[f"{size}_keys"])


@EACH_SIZE
def test_logits_are_the_official_ones(golden: dict[str, Tensor], size: str) -> None:
    model = drawn(SIZES[size])
    for shape in ms_mlp_golden.SIZES[size]:
        batch, height, width = map(int, shape.split("x"))
        with torch.no_grad():
            logits = model(ms_mlp_golden.draw_images(batch, 3, height, width))
        expected = golden[f"{size}_{shape}"]
        assert expected.std() > 0.5
        torch.testing.assert_close(logits[:, ::4], expected, **TOLERANCE)


@pytest.mark.parametrize("backend", ["default", "reference"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_training_is_the_official_one(
    golden: dict[str, Tensor], dtype: torch.dtype, rtol: float, backend: str
) -> None:
    """In float32 the official code's gradients are off by up to 2e-4 as well."""
    model = drawn(drop_path_rate=0.0).train().to(dtype)
    images = ms_mlp_golden.draw_images(2, 3, 64, 96).to(dtype)
    weight = ms_mlp_golden.draw_images(2, 1000, seed=ms_mlp_golden.SEED + 2).to(dtype)
    with viops.use_backend(backend) if backend != "default" else nullcontext():
        logits = model(images)
        (logits * weight).sum().backward()
    expected = golden["t_train_logits"].to(dtype)
    torch.testing.assert_close(logits[:, ::4], expected, rtol=0, atol=min(rtol, 1e-4))
    parameters = dict(model.named_parameters())
    norms = torch.stack([parameters[name].grad.norm() for name in sorted(parameters)])
    expected = golden["t_train_grad_norms"].to(dtype)
    torch.testing.assert_close(norms, expected, rtol=rtol, atol=0)


def test_sizes_are_those_of_the_paper() -> None:
    millions = {"t": 28, "s": 50, "b": 88}
    for size, build in SIZES.items():
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in build().parameters())
        assert count // 1e6 == millions[size]


@EACH_SIZE
def test_drop_path_rises_to_its_rate(size: str) -> None:
    with torch.device("meta"):
        model = SIZES[size]()
    rates = [block.drop_path.probability for stage in model.layers for block in stage.blocks]
    last = {"t": 0.1, "s": 0.4, "b": 0.5}[size]
    assert rates == pytest.approx([last * i / (len(rates) - 1) for i in range(len(rates))])


# as models that people use


def test_training_steps_lower_the_loss() -> None:
    model = tiny(drop_path_rate=0.1, drop_rate=0.1).train()
    images = torch.randn(8, 3, 32, 64)
    labels = torch.arange(8) % 5
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_any_image_size_that_32_divides_in_any_layout() -> None:
    model = tiny(in_chans=2)
    for height, width in ((32, 32), (96, 64), (32, 160)):
        images = torch.randn(2, 2, height, width)
        logits = model(images)
        assert logits.shape == (2, 5)
        channels_last = images.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(channels_last), logits, rtol=1e-4, atol=1e-5)
        strided = torch.randn(2, 2, height, 2 * width)[..., ::2].copy_(images)
        torch.testing.assert_close(model(strided), logits, rtol=1e-4, atol=1e-5)
        assert model(images[:0]).shape == (0, 5)


def test_activations_stay_in_channels_last() -> None:
    """Each block sees and gives it, and so does each convolution between stages."""
    model = tiny()
    seen = []

    def check(module: nn.Module, args: tuple, out: Tensor) -> None:
        for tensor in (args[0], out):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
        seen.append(module)

    for module in model.modules():
        is_embedding = isinstance(module, nn.Conv2d) and module.groups == 1
        if is_embedding or isinstance(module, viops.nn.MixShiftBlock):
            module.register_forward_hook(check)
    model(torch.randn(2, 3, 64, 96))
    assert len(seen) == 4 + 5


def test_features_and_head() -> None:
    model = tiny()
    images = torch.randn(2, 3, 64, 96)
    features = model.forward_features(images)
    assert features.shape == (2, model.num_features, 2, 3)
    torch.testing.assert_close(model.forward_head(features), model(images))
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, model.norm(features.mean(dim=(2, 3))))
    torch.testing.assert_close(model.head(pooled), model(images))
    model.reset_classifier(0)
    assert torch.equal(model(images), pooled)
    assert tiny(num_classes=0)(images).shape == pooled.shape
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    assert model.get_classifier().out_features == model.num_classes == 7


def test_intermediates_are_the_stages() -> None:
    model = tiny()
    images = torch.randn(2, 3, 64, 96)
    features, maps = model.forward_intermediates(images)
    assert torch.equal(features, model.forward_features(images))
    assert torch.equal(features, maps[-1])
    shapes = [(2, 12, 16, 24), (2, 24, 8, 12), (2, 48, 4, 6), (2, 96, 2, 3)]
    assert [tuple(each.shape) for each in maps] == shapes
    for info, each in zip(model.feature_info, maps, strict=True):
        assert (info["num_chs"], info["reduction"]) == (each.shape[1], 64 // each.shape[2])
    last = model.forward_intermediates(images, 1, output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(last[0].permute(0, 3, 1, 2), maps[3])
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    taken = model.forward_intermediates(images, [0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(taken, maps, strict=False))
    assert model(images[..., :8, :24]).shape == (2, 24)  # the stride is 8 now


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.randn(1, 3, 48, 64)), "^x: .* that 32 divides, got 48 and 64$"),
        (lambda m: m(torch.randn(1, 3, 64, 65)), "^x: .* that 32 divides, got 64 and 65$"),
        (lambda m: m(torch.randn(1, 3, 0, 64)), "^x: .* that 32 divides, got 0 and 64$"),
        (lambda m: m(torch.randn(1, 4, 32, 32)), r"^x: .* C = 3, got shape \[1, 4, 32, 32\]$"),
        (lambda m: m(torch.randn(3, 32, 32)), r"^x: .* got shape \[3, 32, 32\]$"),
        (lambda m: m.forward_intermediates(torch.randn(1, 3, 32, 32), norm=True), "^norm: "),
        (lambda m: m.reset_classifier(3, "max"), "^global_pool: expected"),
        (lambda m: tiny(global_pool="max"), "^global_pool: expected"),
    ],
)
def test_bad_arguments(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tiny())


def test_copies_and_pickles() -> None:
    model = tiny()
    images = torch.randn(2, 3, 64, 96)
    expected = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), expected)
        assert list(other.state_dict()) == list(model.state_dict())


def test_checkpointing_gives_the_same_gradients() -> None:
    model = tiny().train()
    images = torch.randn(2, 3, 64, 64)
    torch.manual_seed(1)
    expected = gradients(model, model(images))
    calls: list[int] = []
    model.layers[2].blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    model.set_grad_checkpointing()
    torch.manual_seed(1)
    for got, grad in zip(gradients(model, model(images)), expected, strict=True):
        torch.testing.assert_close(got, grad)
    assert len(calls) == 2


def test_half_precision() -> None:
    model, images = tiny(), torch.randn(2, 3, 64, 64)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images)
    for out in (mixed, copy.deepcopy(model).bfloat16()(images.bfloat16())):
        assert out.dtype is torch.bfloat16
        assert (out - expected).norm() < 0.05 * expected.norm()
    assert all(grad.isfinite().all() for grad in gradients(model, mixed.float()))


def test_compile_without_graph_breaks() -> None:
    """Training with drop path, which draws what it draws in eager mode."""
    model, images = tiny().train(), torch.randn(4, 3, 64, 32)
    torch.manual_seed(2)
    expected = model(images)
    grads = gradients(model, expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    out = compiled(images)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for got, grad in zip(gradients(model, out), grads, strict=True):
        assert (got - grad).norm() <= 1e-3 * grad.norm() + 1e-4


def test_int16_layers_in_it_are_called() -> None:
    """Convolutions that are no longer torch's own are not read, but called."""
    model, images = tiny(), torch.randn(2, 3, 64, 64)
    expected = model(images)
    viops.patch.int16(model, scaling="max")
    with torch.no_grad():
        error = (model(images) - expected).norm() / expected.norm()
    assert 0 < error < 5e-3
    assert torch.equal(viops.patch.undo(model)(images), expected)


# timm


def test_timm_creates_them() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    assert {f"viops_{size}" for size in CONFIGS} <= set(timm.list_models("viops_*"))
    model = timm.create_model(
        "viops_ms_mlp_t", num_classes=7, in_chans=1, drop_rate=0.1, drop_path_rate=0.3
    ).eval()
    assert isinstance(model, MSMLP)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 7)
    assert model.head_drop.p == 0.1
    assert model.layers[3].blocks[2].drop_path.probability == pytest.approx(0.3)
    cfg = model.pretrained_cfg
    assert (cfg["input_size"], cfg["crop_pct"]) == ((3, 224, 224), 0.875)
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()


def test_timm_makes_them_backbones() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    backbone = timm.create_model("viops_ms_mlp_t", features_only=True, out_indices=(0, 2)).eval()
    assert backbone.feature_info.channels() == [96, 384]
    assert backbone.feature_info.reduction() == [4, 16]
    maps = backbone(torch.randn(1, 3, 64, 32))
    assert [tuple(each.shape) for each in maps] == [(1, 96, 16, 8), (1, 384, 4, 2)]
