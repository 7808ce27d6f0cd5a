"""viops.models.ms_mlp against the official code's outputs, and as models that people use."""

from __future__ import annotations

from collections.abc import Callable

import model_checks
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


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return ms_mlp_golden.load()


def drawn(build: Callable[..., MSMLP] = models.ms_mlp_t, **options: object) -> MSMLP:
    """A model with the golden file's parameters, made without values that would be drawn anew."""
    model = model_checks.unfilled(build, **options)
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
    return model_checks.perturbed(model)


# the official models


@EACH_SIZE
def test_state_dict_is_the_official_ones(golden: dict[str, Tensor], size: str) -> None:
    state = model_checks.on_meta(SIZES[size]).state_dict()
    assert torch.equal(ms_mlp_golden.digest(state), golden[f"{size}_keys"])


@EACH_SIZE
def test_logits_are_the_official_ones(golden: dict[str, Tensor], size: str) -> None:
    model = drawn(SIZES[size])
    for shape in ms_mlp_golden.SIZES[size]:
        batch, height, width = map(int, shape.split("x"))
        images = ms_mlp_golden.draw_images(batch, 3, height, width)
        model_checks.check_logits(model, images, golden[f"{size}_{shape}"])


@pytest.mark.parametrize("backend", ["default", "reference"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 1e-3)])
def test_training_is_the_official_one(
    golden: dict[str, Tensor], dtype: torch.dtype, rtol: float, backend: str
) -> None:
    """In float32 the official code's gradients are off by up to 2e-4 as well."""
    model = drawn(drop_path_rate=0.0).train().to(dtype)
    images = ms_mlp_golden.draw_images(2, 3, 64, 96).to(dtype)
    weight = ms_mlp_golden.draw_images(2, 1000, seed=ms_mlp_golden.SEED + 2).to(dtype)
    logits, norms = model_checks.train_once(model, images, weight, backend)
    expected = golden["t_train_logits"].to(dtype)
    torch.testing.assert_close(logits, expected, rtol=0, atol=min(rtol, 1e-4))
    expected = golden["t_train_grad_norms"].to(dtype)
    torch.testing.assert_close(norms, expected, rtol=rtol, atol=0)


def test_sizes_are_those_of_the_paper() -> None:
    millions = {"t": 28, "s": 50, "b": 88}
    for size, build in SIZES.items():
        count = model_checks.count_parameters(build)
        assert count // 1e6 == millions[size]


@EACH_SIZE
def test_drop_path_rises_to_its_rate(size: str) -> None:
    count = {"t": 18, "s": 36, "b": 36}[size]
    last = {"t": 0.1, "s": 0.4, "b": 0.5}[size]
    model_checks.check_drop_paths(model_checks.on_meta(SIZES[size]), count, last)


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
    sizes = ((32, 32), (96, 64), (32, 160))
    model_checks.check_layouts(tiny(in_chans=2), sizes, channels=2)


def test_activations_stay_in_channels_last() -> None:
    """Each block sees and gives it, and so does each convolution between stages."""

    def is_chosen(module: nn.Module) -> bool:
        is_embedding = isinstance(module, nn.Conv2d) and module.groups == 1
        return is_embedding or isinstance(module, viops.nn.MixShiftBlock)

    model_checks.check_channels_last(tiny(), is_chosen, calls=4 + 5)


def test_features_and_head() -> None:
    model, features, pooled = model_checks.check_features_and_head(tiny)
    torch.testing.assert_close(pooled, model.norm(features.mean(dim=(2, 3))))


def test_intermediates_are_the_stages() -> None:
    model = tiny()
    images = torch.randn(2, 3, 64, 96)
    features, maps = model_checks.check_intermediates(model, images, channels=(12, 24, 48, 96))
    assert torch.equal(features, maps[-1])
    last = model.forward_intermediates(images, 1, output_fmt="NHWC", intermediates_only=True)
    assert torch.equal(last[0].permute(0, 3, 1, 2), maps[3])
    model_checks.check_pruning(model, images, maps)
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
    model_checks.check_copies(tiny())


def test_checkpointing_gives_the_same_gradients() -> None:
    model = tiny().train()
    model_checks.check_checkpointing(model, model.layers[2].blocks[1])


def test_half_precision() -> None:
    model_checks.check_half_precision(tiny())


def test_compile_without_graph_breaks() -> None:
    model = tiny().train()
    model_checks.check_compile(model, torch.randn(4, 3, 64, 32))


def test_int16_layers_in_it_are_called() -> None:
    model_checks.check_int16_layers_are_called(tiny())


# timm


def test_timm_creates_them() -> None:
    model_checks.check_timm_creates("ms_mlp_t", CONFIGS, MSMLP, crop_pct=0.875)


def test_timm_makes_them_backbones() -> None:
    model_checks.check_timm_backbone("ms_mlp_t", channels=(96, 384))
