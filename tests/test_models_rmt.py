"""viops.models.rmt against the official code's outputs, and as models that people use."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import rmt_golden
import torch
import viops
from torch import Tensor, nn
from viops import models
from viops.models.rmt import CONFIGS, RMT, DropPath
from viops.nn import RelativePosition2d

SIZES = {"t": models.rmt_t, "s": models.rmt_s, "b": models.rmt_b, "l": models.rmt_l}
EACH_SIZE = pytest.mark.parametrize("size", SIZES)
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return rmt_golden.load()


def drawn(build: Callable[..., RMT] = models.rmt_t, **options: object) -> RMT:
    """A model with the golden file's parameters, made without values that would be drawn anew."""
    with torch.device("meta"):
        model = build(**options)
    model.to_empty(device="cpu")
    for stage, dim in zip(model.layers, model.config.embed_dims, strict=True):
        made = stage.Relpos
        stage.Relpos = RelativePosition2d(dim, made.num_heads, made.initial_value, made.heads_range)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked.zero_()
    model.load_state_dict(rmt_golden.draw_state(model.state_dict()))
    return model.eval()


def tiny(**options: object) -> RMT:
    """A model with all that the sizes have, and few channels."""
    torch.manual_seed(0)
    config = CONFIGS["rmt_b"].__class__(
        embed_dims=(8, 16, 16, 24),
        depths=(1, 1, 2, 1),
        num_heads=(2, 2, 4, 2),
        heads_ranges=(4, 4, 6, 6),
        mlp_ratios=(2, 2, 2, 2),
        axial=(True, True, True, False),
        drop_path_rate=0.2,
        layer_scales=(None, None, 0.5, 0.5),
    )
    model = RMT(config, **{"num_classes": 5, **options})
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
    assert torch.equal(rmt_golden.digest(model.state_dict()), golden[f"{size}_keys"])


@EACH_SIZE
def test_logits_are_the_official_ones(golden: dict[str, Tensor], size: str) -> None:
    model = drawn(SIZES[size])
    for height, width in ((64, 64), (96, 64)):
        with torch.no_grad():
            logits = model(rmt_golden.draw_images(2, 3, height, width))
        expected = golden[f"{size}_{height}x{width}"]
        assert expected.std() > 0.5
        torch.testing.assert_close(logits[:, ::4], expected, **TOLERANCE)


@pytest.mark.parametrize("backend", ["default", "reference"])
def test_training_is_the_official_one(golden: dict[str, Tensor], backend: str) -> None:
    model = drawn(drop_path_rate=0.0).train()
    weight = rmt_golden.draw_images(4, 1000, seed=rmt_golden.SEED + 2)
    with viops.use_backend(backend) if backend != "default" else nullcontext():
        logits = model(rmt_golden.draw_images(4, 3, 64, 64))
        (logits * weight).sum().backward()
    torch.testing.assert_close(logits[:, ::4], golden["t_train_logits"], **TOLERANCE)
    state = model.state_dict()
    running = [state[name].norm() for name in sorted(state) if "running" in name]
    torch.testing.assert_close(torch.stack(running), golden["t_train_running"])
    grads = dict(model.named_parameters())
    norms = torch.stack([grads[name].grad.norm() for name in sorted(grads)])
    # biases before a batch norm have a gradient of zero, and rounding errors
    expected = golden["t_train_grad_norms"]
    torch.testing.assert_close(norms, expected, rtol=1e-4, atol=1e-6 * expected.max().item())


def test_sizes_are_those_of_the_paper() -> None:
    millions = {"t": 14.3, "s": 27.0, "b": 54.2, "l": 95.5}
    for size, build in SIZES.items():
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in build().parameters())
        assert round(count / 1e6, 1) == millions[size]


def test_drop_path_draws_what_timm_draws() -> None:
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    x = torch.randn(64, 3, 2, 5)
    for probability in (0.0, 0.3, 1.0):
        ours, theirs = DropPath(probability), layers.DropPath(probability)
        torch.manual_seed(3)
        out = ours(x)
        torch.manual_seed(3)
        torch.testing.assert_close(out, theirs(x))
        assert torch.equal(ours.eval()(x), x)


def test_drop_path_rises_to_its_rate() -> None:
    with torch.device("meta"):
        model = models.rmt_s()
    rates = [block.drop_path.probability for stage in model.layers for block in stage.blocks]
    assert len(rates) == 29
    assert rates == pytest.approx([0.15 * i / 28 for i in range(29)])
    model = tiny(drop_path_rate=0.9).train()
    images = torch.randn(4, 3, 64, 64)
    torch.manual_seed(0)
    first = model(images)
    torch.manual_seed(0)
    assert torch.equal(model(images), first)
    assert not torch.equal(model(images), first)


# as models that people use


def test_any_image_size_and_layout() -> None:
    model = tiny(in_chans=2)
    for height, width in ((32, 32), (33, 70), (1, 1), (64, 4)):
        images = torch.randn(2, 2, height, width)
        logits = model(images)
        assert logits.shape == (2, 5)
        channels_last = images.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model(channels_last), logits, rtol=1e-4, atol=1e-5)
        assert model(images[:0]).shape == (0, 5)


def test_no_stage_copies_its_tokens_for_a_convolution() -> None:
    """Each depthwise convolution sees a channels_last view, and gives one."""
    model = tiny()
    seen = []

    def check(module: nn.Module, args: tuple, out: Tensor) -> None:
        for tensor in (args[0], out):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
        seen.append(module)

    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.register_forward_hook(check)
    model(torch.randn(2, 3, 64, 96))
    assert len(seen) == 3 * 5  # pos, lepe and dwconv of five blocks


def test_features_and_head() -> None:
    model = tiny()
    images = torch.randn(2, 3, 64, 96)
    features = model.forward_features(images)
    assert features.shape == (2, model.num_features, 2, 3)
    torch.testing.assert_close(model.forward_head(features), model(images))
    pooled = model.forward_head(features, pre_logits=True)
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
    outputs: list[Tensor] = []
    for stage in model.layers:
        stage.register_forward_hook(lambda _, __, out: outputs.append(out))
    features, maps = model.forward_intermediates(images)
    assert torch.equal(features, model.forward_features(images))
    shapes = [(2, 8, 16, 24), (2, 16, 8, 12), (2, 16, 4, 6), (2, 24, 2, 3)]
    assert [tuple(each.shape) for each in maps] == shapes
    for stage, each in zip(outputs, maps, strict=False):
        assert torch.equal(stage.permute(0, 3, 1, 2), each)
    for info, each in zip(model.feature_info, maps, strict=True):
        assert (info["num_chs"], info["reduction"]) == (each.shape[1], 64 // each.shape[2])
    for indices in ([1], (0, -2), 2):
        chosen = [2, 3] if indices == 2 else [i % 4 for i in indices]
        outputs.clear()
        taken = model.forward_intermediates(
            images, indices, stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        assert len(outputs) == max(chosen) + 1
        for index, each in zip(chosen, taken, strict=True):
            assert torch.equal(each.permute(0, 3, 1, 2), maps[index])
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.layers) == 2
    taken = model.forward_intermediates(images, [0, 1], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(taken, maps, strict=False))
    assert not any("downsample" in name for name in model.layers[1].state_dict())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m.forward_intermediates(x, norm=True), "^norm: expected False"),
        (lambda m, x: m.forward_intermediates(x, output_fmt="NLC"), "^output_fmt: expected"),
        (lambda m, x: m.forward_intermediates(x, [4]), r"^indices: expected .* got \[4\]"),
        (lambda m, x: m.forward_intermediates(x, []), "^indices: expected"),
        (lambda m, x: m.reset_classifier(3, "max"), "^global_pool: expected"),
    ],
)
def test_bad_arguments(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tiny(), torch.randn(1, 3, 32, 32))


def test_copies_and_pickles() -> None:
    model = tiny(learnable_decay=True)
    images = torch.randn(2, 3, 64, 96)
    expected = model(images)
    keys = list(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), expected)
        assert list(other.state_dict()) == keys
    assert model.no_weight_decay() == {key for key in keys if key.endswith("log_exponent")}
    assert len(model.no_weight_decay()) == 5


def test_official_checkpoints_load_where_decays_are_learnt() -> None:
    learnable, fixed = tiny(learnable_decay=True), tiny()
    missing, unexpected = learnable.load_state_dict(fixed.state_dict(), strict=False)
    assert set(missing) == learnable.no_weight_decay()
    assert not unexpected


def test_checkpointing_gives_the_same_gradients() -> None:
    model = tiny().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
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
    model = drawn()
    for block in model.layers[2].blocks:
        block.drop_path.train()
    images = rmt_golden.draw_images(4, 3, 64, 32)
    torch.manual_seed(2)
    expected = model(images)
    grads = gradients(model, expected)
    assert not torch.allclose(model(images), expected)  # something was dropped
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    out = compiled(images)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for got, grad in zip(gradients(model, out), grads, strict=True):
        assert (got - grad).norm() <= 1e-3 * grad.norm() + 1e-4


def test_compile_by_inductor() -> None:
    """Two stages, an axial and a whole one: inductor takes a second for each kernel."""
    whole, images = tiny(), torch.randn(2, 3, 32, 16)
    whole.layers = nn.ModuleList([whole.layers[0], whole.layers[3]])
    whole.layers[0].downsample = models.rmt.Downsample(8, 24).eval()
    torch._dynamo.reset()
    compiled = torch.compile(whole, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), whole(images), rtol=1e-4, atol=1e-5)


# timm


def test_timm_creates_them() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    assert {f"viops_{size}" for size in CONFIGS} <= set(timm.list_models("viops_*"))
    model = timm.create_model(
        "viops_rmt_t", num_classes=7, in_chans=1, drop_rate=0.1, drop_path_rate=0.3
    ).eval()
    assert isinstance(model, RMT)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 7)
    assert model.head_drop.p == 0.1
    assert model.layers[3].blocks[1].drop_path.probability == pytest.approx(0.3)
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)


def test_timm_makes_them_backbones() -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    backbone = timm.create_model("viops_rmt_t", features_only=True, out_indices=(0, 2)).eval()
    assert backbone.feature_info.channels() == [64, 256]
    assert backbone.feature_info.reduction() == [4, 16]
    maps = backbone(torch.randn(1, 3, 64, 32))
    assert [tuple(each.shape) for each in maps] == [(1, 64, 16, 8), (1, 256, 4, 2)]


RUN_ALONE = """
import sys, warnings
import viops
assert "viops.models" not in sys.modules and "timm" not in sys.modules
{before}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert viops.models.rmt_t
print([str(w.message) for w in caught if "viops" in str(w.message)])
"""


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("sys.modules['timm.models'] = None", "timm does not load"),
        (
            "import importlib.util as u; own = u.find_spec\n"
            "u.find_spec = lambda name, *a: None if name == 'timm' else own(name, *a)",
            "[]",
        ),
    ],
    ids=["broken", "missing"],
)
def test_without_timm(before: str, message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALONE.format(before=before)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert message in done.stdout
