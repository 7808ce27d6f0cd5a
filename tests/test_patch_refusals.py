"""What viops.patch refuses, and what it says."""

import math

import pytest
import torch
import viops
from timm.models.vision_transformer import (
    Block,
    ParallelScalingBlock,
    ResPostBlock,
    VisionTransformer,
)
from tiny_vit import LAYERS, TOLERANCE, make_images, make_model, one_thread, plain_features  # noqa: F401
from torch import nn


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep_rate": 0.0}, ValueError, "keep_rate: expected above 0 and at most 1, got 0.0"),
        ({"keep_rate": 1.5}, ValueError, "keep_rate: expected above 0 and at most 1, got 1.5"),
        ({"keep_rate": math.nan}, ValueError, "keep_rate: expected above 0 .* got nan"),
        ({"keep_rate": "0.7"}, TypeError, "keep_rate: expected a number, got str"),
        ({"keep_rate": True}, TypeError, "keep_rate: expected a number, got bool"),
        ({"keep_rate": (0.7,)}, ValueError, "each of the 2 patched layers, got 1"),
        ({"keep_rate": (0.7, 2)}, ValueError, r"keep_rate\[1\]: expected above 0"),
    ],
)
def test_bad_keep_rates(arguments, error, message):
    model = make_model()
    with pytest.raises(error, match=message):
        viops.patch.evit(model, layers=LAYERS, **arguments)
    assert {type(module) for module in (model, *model.blocks)} == {VisionTransformer, Block}
    viops.patch.evit(model, layers=LAYERS)
    with pytest.raises(error, match=message):
        model(make_images(), **arguments)


@pytest.mark.parametrize(
    ("layers", "error", "message"),
    [
        ((1, 4), ValueError, r"each of 0 to 3 \(the model has 4 blocks\), got \(1, 4\)"),
        ((-1,), ValueError, r"each of 0 to 3"),
        ((), ValueError, "layers: expected at least one"),
        ((2, 1), ValueError, r"layers: expected a rising sequence, got \(2, 1\)"),
        ((1, 1), ValueError, "layers: expected a rising sequence"),
        ((1.5,), TypeError, "layers: expected a sequence of ints"),
        (3, TypeError, "layers: expected a sequence of ints, got 3"),
    ],
)
def test_bad_layers(layers, error, message):
    with pytest.raises(error, match=message):
        viops.patch.evit(make_model(), layers=layers)


class OtherForward(VisionTransformer):
    def forward_features(self, x, **kwargs):
        return super().forward_features(x, **kwargs)


class OtherAttention(nn.Linear):
    def __init__(self, dim, **options):
        super().__init__(dim, dim)


def differential_model() -> VisionTransformer:
    return make_model(attn_layer="diff")


def naflex_model() -> nn.Module:
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    return NaFlexVit(NaFlexVitCfg(embed_dim=32, depth=1, num_heads=2, pos_embed_grid_size=(4, 4)))


def eva_model() -> nn.Module:
    from timm.models.eva import Eva

    return Eva(img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=5)


def model_with_own_attention_forward() -> VisionTransformer:
    model = make_model()
    model.blocks[1].attn.forward = lambda x, **kwargs: x
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), TypeError, "expected timm's VisionTransformer.*Linear"),
        (lambda: nn.DataParallel(make_model()), TypeError, "before it is wrapped.*DataParallel"),
        (lambda: torch.compile(make_model()), TypeError, "before it is wrapped.*OptimizedModule"),
        (naflex_model, TypeError, "expected timm's VisionTransformer.*NaFlexVit"),
        (eva_model, TypeError, "expected timm's VisionTransformer.*Eva"),
        (
            lambda: make_model(class_token=False, global_pool="avg", reg_tokens=2),
            ValueError,
            "model: it has no class token",
        ),
        (lambda: make_model(OtherForward), TypeError, "another forward_features in .*OtherForward"),
        (
            lambda: make_model(block_fn=ResPostBlock),
            TypeError,
            r"model.blocks\[1\]: expected timm's Block.forward.*ResPostBlock",
        ),
        (lambda: make_model(block_fn=ParallelScalingBlock), TypeError, "ParallelScalingBlock"),
        (
            differential_model,
            TypeError,
            r"model.blocks\[1\].attn: expected timm's Attention.forward.*DiffAttention",
        ),
        (
            lambda: make_model(attn_layer=OtherAttention),
            TypeError,
            "another forward in .*OtherAttention",
        ),
        (model_with_own_attention_forward, TypeError, r"model.blocks\[1\].attn"),
        (
            lambda: viops.patch.evit(make_model(), layers=LAYERS),
            ValueError,
            "model: it is patched already",
        ),
    ],
)
def test_models_that_cannot_be_patched(make, error, message):
    with pytest.raises(error, match=message):
        viops.patch.evit(make(), layers=LAYERS)


def test_undo_of_a_model_that_is_not_patched():
    with pytest.raises(ValueError, match="has patched, got VisionTransformer"):
        viops.patch.undo(make_model())


@pytest.mark.parametrize("method", ["forward", "forward_features", "forward_intermediates"])
def test_attention_masks_are_refused(method):
    model = viops.patch.evit(make_model(), 0.7, LAYERS)
    call = getattr(model, method)
    with pytest.raises(ValueError, match="attn_mask: token reorganization takes no attention mask"):
        call(make_images(), attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="is_causal: token reorganization takes no"):
        call(make_images(), is_causal=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0, 1, 1, 1), "keep_rate: expected above 0"),
        ((0.7, -1, 1, 1), "warmup_epochs: expected at least 0"),
        ((0.7, 1, -1, 1), "decay_epochs: expected at least 0"),
        ((0.7, 1, 1, 0), "iterations_per_epoch: expected at least 1"),
        ((0.7, 1, 1, 1, 0.5), "max_keep_rate: expected at least keep_rate = 0.7, got 0.5"),
    ],
)
def test_bad_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        viops.patch.KeepRateSchedule(*arguments)
    with pytest.raises(ValueError, match="iteration: expected at least 0"):
        viops.patch.KeepRateSchedule(0.7, 1, 1, 1)(-1)
