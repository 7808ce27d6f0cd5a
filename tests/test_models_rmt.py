"""viops.models.rmt against the official code's outputs, and as models that people use."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import model_checks
import pytest
import rmt_golden
import torch
from torch import Tensor, nn
from viops import models
from viops.models.rmt import CONFIGS, RMT, DropPath
from viops.nn import RelativePosition2d

SIZES = {"t": models.rmt_t, "s": models.rmt_s, "b": models.rmt_b, "l": models.rmt_l}
EACH_SIZE = pytest.mark.parametrize("size", SIZES)


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return rmt_golden.load()


def drawn(build: Callable[..., RMT] = models.rmt_t, **options: object) -> RMT:
    """A model with the golden file's parameters, made without values that would be drawn anew."""
    model = model_checks.unfilled(build, **options)
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
    return model_checks.perturbed(model)


# the official models


@EACH_SIZE
def test_state_dict_is_the_official_ones(golden: dict[str, Tensor], size: str) -> None:
    state = model_checks.on_meta(SIZES[size]).state_dict()
    assert torch.equal(rmt_golden.digest(state), golden[f"{size}_keys"])


@EACH_SIZE
def test_logits_are_the_official_ones(golden: dict[str, Tensor], size: str) -> None:
    model = drawn(SIZES[size])
    for height, width in ((64, 64), (96, 64)):
        images = rmt_golden.draw_images(2, 3, height, width)
        model_checks.check_logits(model, images, golden[f"{size}_{height}x{width}"])


@pytest.mark.parametrize("backend", ["default", "reference"])
def test_training_is_the_official_one(golden: dict[str, Tensor], backend: str) -> None:
    model = drawn(drop_path_rate=0.0).train()
    images = rmt_golden.draw_images(4, 3, 64, 64)
    weight = rmt_golden.draw_images(4, 1000, seed=rmt_golden.SEED + 2)
    logits, norms = model_checks.train_once(model, images, weight, backend)
    torch.testing.assert_close(logits, golden["t_train_logits"], **model_checks.LOGITS)
    state = model.state_dict()
    running = [state[name].norm() for name in sorted(state) if "running" in name]
    torch.testing.assert_close(torch.stack(running), golden["t_train_running"])
    # biases before a batch norm have a gradient of zero, and rounding errors
    expected = golden["t_train_grad_norms"]
    torch.testing.assert_close(norms, expected, rtol=1e-4, atol=1e-6 * expected.max().item())


def test_sizes_are_those_of_the_paper() -> None:
    millions = {"t": 14.3, "s": 27.0, "b": 54.2, "l": 95.5}
    for size, build in SIZES.items():
        count = model_checks.count_parameters(build)
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
    model_checks.check_drop_paths(model_checks.on_meta(models.rmt_s), count=29, last=0.15)
    model = tiny(drop_path_rate=0.9).train()
    images = torch.randn(4, 3, 64, 64)
    torch.manual_seed(0)
    first = model(images)
    torch.manual_seed(0)
    assert torch.equal(model(images), first)
    assert not torch.equal(model(images), first)


# as models that people use


def test_any_image_size_and_layout() -> None:
    sizes = ((32, 32), (33, 70), (1, 1), (64, 4))
    model_checks.check_layouts(tiny(in_chans=2), sizes, channels=2)


def test_no_stage_copies_its_tokens_for_a_convolution() -> None:
    """Each depthwise convolution sees a channels_last view, and gives one."""

    def is_depthwise(module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and module.groups > 1

    # pos, lepe and dwconv of five blocks
    model_checks.check_channels_last(tiny(), is_depthwise, calls=3 * 5)


def test_features_and_head() -> None:
    model_checks.check_features_and_head(tiny)


def test_intermediates_are_the_stages() -> None:
    model = tiny()
    images = torch.randn(2, 3, 64, 96)
    outputs: list[Tensor] = []
    for stage in model.layers:
        stage.register_forward_hook(lambda _, __, out: outputs.append(out))
    _, maps = model_checks.check_intermediates(model, images, channels=(8, 16, 16, 24))
    for stage, each in zip(outputs, maps, strict=False):
        assert torch.equal(stage.permute(0, 3, 1, 2), each)
    for indices in ([1], (0, -2), 2):
        chosen = [2, 3] if indices == 2 else [i % 4 for i in indices]
        outputs.clear()
        taken = model.forward_intermediates(
            images, indices, stop_early=True, output_fmt="NHWC", intermediates_only=True
        )
        assert len(outputs) == max(chosen) + 1
        for index, each in zip(chosen, taken, strict=True):
            assert torch.equal(each.permute(0, 3, 1, 2), maps[index])
    model_checks.check_pruning(model, images, maps)
    assert len(model.layers) == 2
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
    model_checks.check_copies(model)
    exponents = {key for key in model.state_dict() if key.endswith("log_exponent")}
    assert model.no_weight_decay() == exponents
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
    model_checks.check_checkpointing(model, model.layers[2].blocks[1])


def test_half_precision() -> None:
    model_checks.check_half_precision(tiny())


def test_compile_without_graph_breaks() -> None:
    model = drawn()
    for block in model.layers[2].blocks:
        block.drop_path.train()
    model_checks.check_compile(model, rmt_golden.draw_images(4, 3, 64, 32))


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
    model_checks.check_timm_creates("rmt_t", CONFIGS, RMT, crop_pct=0.9)


def test_timm_makes_them_backbones() -> None:
    model_checks.check_timm_backbone("rmt_t", channels=(64, 256))


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
