"""viops.patch: token reorganization in timm models."""

import copy
import io
import math
import pickle

import pytest
import torch
import viops
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, VisionTransformer
from tiny_vit import LAYERS, TOLERANCE, make_images, make_model, one_thread, plain_features  # noqa: F401


class GatedAttention(Attention):
    def __init__(self, *args, **options):
        super().__init__(*args, gated=True, **options)


VARIANTS = {
    "vit": {},
    "distilled": {"cls": VisionTransformerDistilled},
    "registers": {"reg_tokens": 3},
    "registers_no_embed_class": {"reg_tokens": 3, "no_embed_class": True},
    "qk_norm": {"qk_norm": True},
    "scale_norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "gated": {"attn_layer": GatedAttention},
    "layer_scale": {"init_values": 0.5},
    "pre_norm": {"pre_norm": True},
    "no_qkv_bias": {"qkv_bias": False},
    "no_pos_embed": {"pos_embed": "none"},
    "avg": {"global_pool": "avg"},
    "max": {"global_pool": "max"},
    "map": {"global_pool": "map"},
    "dynamic": {"dynamic_img_size": True},
    "one_head": {"num_heads": 1},
}


@pytest.mark.parametrize("fuse", [True, False], ids=["fuse", "drop"])
@pytest.mark.parametrize("fused_attn", [True, False], ids=["sdpa", "matrix"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_patched_model_equals_the_plain_computation(variant, fused_attn, fuse):
    plain, model = make_model(**VARIANTS[variant]), make_model(**VARIANTS[variant])
    for block in model.blocks:
        block.attn.fused_attn = fused_attn
    images = make_images()
    viops.patch.evit(model, keep_rate=(0.7, 0.4), layers=LAYERS, fuse=fuse)
    expected = plain_features(plain, images, dict(zip(LAYERS, (0.7, 0.4), strict=True)), fuse)
    features = model.forward_features(images)
    patches = math.ceil(0.4 * (math.ceil(0.7 * 16) + fuse)) + fuse
    assert features.shape == (2, plain.num_prefix_tokens + patches, 32)
    torch.testing.assert_close(features, expected, **TOLERANCE)
    torch.testing.assert_close(model(images), plain.forward_head(expected), **TOLERANCE)
    torch.testing.assert_close(
        model.forward_head(features, pre_logits=True),
        plain.forward_head(expected, pre_logits=True),
        **TOLERANCE,
    )


def test_gradients_equal_those_of_the_plain_computation():
    plain, model = make_model(init_values=0.5), make_model(init_values=0.5)
    viops.patch.evit(model, 0.6, LAYERS)
    images = make_images().requires_grad_()
    model(images).square().sum().backward()
    grad_images, images.grad = images.grad, None
    features = plain_features(plain, images, dict.fromkeys(LAYERS, 0.6))
    plain.forward_head(features).square().sum().backward()
    torch.testing.assert_close(grad_images, images.grad, rtol=1e-4, atol=1e-5)
    for (name, got), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        error = (got.grad - expected.grad).norm() / expected.grad.norm().clamp_min(1e-6)
        assert error < 1e-4, name


@pytest.mark.parametrize(
    "name", ["drop_path_rate", "proj_drop_rate", "patch_drop_rate", "drop_rate"]
)
def test_training_draws_what_timm_draws(name):
    options = {name: 0.4}
    plain, model = make_model(**options).train(), make_model(**options).train()
    viops.patch.evit(model, 0.7, LAYERS)
    images = make_images(batch=8)
    torch.manual_seed(2)
    out = model(images)
    torch.manual_seed(2)
    features = plain_features(plain, images, dict.fromkeys(LAYERS, 0.7))
    torch.testing.assert_close(out, plain.forward_head(features), **TOLERANCE)
    assert not torch.equal(out, model.eval()(images))  # something was dropped


def test_scores_come_from_the_softmax_before_dropout():
    model = viops.patch.evit(make_model(attn_drop_rate=0.5, depth=1), 0.5, layers=(0,))
    images = make_images()
    _, kept = model(images, return_index=True)
    out_eval, _ = model.forward_features(images, return_index=True)
    model.train()
    out, kept_in_training = model.forward_features(images, return_index=True)
    assert torch.equal(kept_in_training[0].index, kept[0].index)
    assert not torch.allclose(out, out_eval)  # while what attention returns is dropped from


def test_where_all_tokens_stay_the_model_is_timms():
    plain, model = make_model(), viops.patch.evit(make_model(), 0.7, LAYERS)
    images = make_images()
    assert torch.equal(model(images, keep_rate=1), plain(images))
    assert torch.equal(model(images, keep_rate=0.95), plain(images))  # ceil(0.95 * 16) is 16
    out, kept = model(images, keep_rate=1.0, return_index=True)
    assert torch.equal(out, plain(images))
    for index, num_patches in kept:
        assert num_patches == 16
        assert torch.equal(index, torch.arange(16).expand(2, 16))


def test_keep_rates_by_the_call():
    plain, model = make_model(), viops.patch.evit(make_model(), 0.7, LAYERS)
    images = make_images()
    before = model(images)
    for keep_rate in (0.5, (0.5, 0.25), [1.0, 0.3]):
        rates = keep_rate if isinstance(keep_rate, (tuple, list)) else (keep_rate,) * 2
        expected = plain_features(plain, images, dict(zip(LAYERS, rates, strict=True)))
        features = model.forward_features(images, keep_rate=keep_rate)
        torch.testing.assert_close(features, expected, **TOLERANCE)
        out = model(images, keep_rate=keep_rate)
        torch.testing.assert_close(out, plain.forward_head(expected), **TOLERANCE)
    assert torch.equal(model(images), before)


@pytest.mark.parametrize("fuse", [True, False], ids=["fuse", "drop"])
def test_kept_indices_can_be_chained_back_to_the_image(fuse):
    model = viops.patch.evit(make_model(reg_tokens=2), 0.6, layers=(0, 1, 3), fuse=fuse)
    images = make_images()
    out, kept = model(images, return_index=True)
    assert torch.equal(out, model(images))
    num_patches = 16
    for index, patches_before in kept:
        keep = math.ceil(0.6 * num_patches)
        assert patches_before == num_patches
        assert index.shape == (2, keep)
        assert index.dtype is torch.int64
        num_patches = keep + fuse

    tokens = model.forward_features(images)
    last = tokens[:, 3:]
    for index, patches_before in reversed(kept):
        tokens = viops.restore_tokens(tokens, index, patches_before, num_prefix=3)
    assert tokens.shape == (2, 19, 32)
    assert torch.equal(tokens[:, :3], model.forward_features(images)[:, :3])
    masks = viops.patch.kept_masks(kept)
    for image in range(2):
        groups = [[place] for place in range(16)]  # the patches that each token stands for
        alone = set(range(16))
        for (index, _), mask in zip(kept, masks, strict=True):
            chosen = index[image].tolist()
            dropped = [group for i, group in enumerate(groups) if i not in chosen]
            groups = [groups[i] for i in chosen]
            alone -= {place for group in dropped for place in group}
            if fuse:
                groups.append([place for group in dropped for place in group])
            assert set(mask[image].nonzero().flatten().tolist()) == alone
        expected = torch.zeros(16, 32)
        for group, token in zip(groups, last[image], strict=True):
            expected[group] = token
        assert torch.equal(tokens[image, 3:], expected)


def test_undo_leaves_nothing_behind():
    model = make_model(VisionTransformerDistilled)
    images = make_images()
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    text, out, keys = repr(model), model(images), list(model.state_dict())
    parameters = list(model.parameters())

    assert viops.patch.evit(model, 0.5, LAYERS) is model
    assert not torch.allclose(model(images), out)
    assert repr(model) != text
    assert "keep_rate=0.5, num_prefix=2, fuse=True" in repr(model)
    assert isinstance(model, VisionTransformerDistilled)
    assert list(model.state_dict()) == keys
    make_model(VisionTransformerDistilled).load_state_dict(model.state_dict())
    model.load_state_dict(make_model(VisionTransformerDistilled).state_dict())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))

    assert viops.patch.undo(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert repr(model) == text
    assert torch.equal(model(images), out)
    viops.patch.evit(model, 0.5, LAYERS)


def test_copies_are_patched_and_independent():
    model = viops.patch.evit(make_model(), 0.5, LAYERS)
    images = make_images()
    out = model(images)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [pickle.loads(pickle.dumps(model, protocol)) for protocol in (2, 5)]
    copies += [copy.deepcopy(model), torch.load(stream, weights_only=False)]
    for other in copies:
        assert type(other) is type(model)
        assert torch.equal(other(images), out)
        viops.patch.undo(other)
        assert type(other) is VisionTransformer
        assert torch.equal(other(images), make_model()(images))
        assert torch.equal(model(images), out)


def test_hooks_of_blocks_and_attention_still_run():
    model = make_model()
    calls = []
    model.blocks[1].register_forward_hook(lambda module, args, out: calls.append(out.shape))
    model.blocks[1].attn.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    viops.patch.evit(model, 0.5, LAYERS)
    model(make_images())
    assert calls == [(2, 17, 32), (2, 10, 32)]


def test_distilled_training_returns_both_heads():
    model = make_model(VisionTransformerDistilled)
    model.set_distilled_training()
    viops.patch.evit(model, 0.5, LAYERS).train()
    (logits, logits_dist), kept = model(make_images(), return_index=True)
    assert logits.shape == logits_dist.shape == (2, 5)
    assert len(kept) == 2


def test_dynamic_resolution_counts_the_patches_of_each_input():
    options = {"dynamic_img_size": True}
    plain, model = make_model(**options), viops.patch.evit(make_model(**options), 0.7, LAYERS)
    for height, width in ((32, 32), (24, 56), (64, 40)):
        images = make_images(height=height, width=width)
        expected = plain_features(plain, images, dict.fromkeys(LAYERS, 0.7))
        torch.testing.assert_close(model.forward_features(images), expected, **TOLERANCE)


def test_forward_intermediates_has_every_patch_in_its_place():
    plain, model = make_model(reg_tokens=1), viops.patch.evit(make_model(reg_tokens=1), 0.5, LAYERS)
    images = make_images()
    for options in (
        {},
        {"indices": 2, "norm": True, "return_prefix_tokens": True},
        {"indices": [0, 2], "output_fmt": "NLC", "stop_early": True, "intermediates_only": True},
        {"output_dict": True, "return_prefix_tokens": True},
    ):
        torch.testing.assert_close(
            model.forward_intermediates(images, keep_rate=1.0, **options),
            plain.forward_intermediates(images, **options),
            rtol=0,
            atol=0,
        )

    features, kept = model.forward_features(images, return_index=True)
    final, maps = model.forward_intermediates(images, norm=True)
    assert torch.equal(final, features)
    assert [tuple(each.shape) for each in maps] == [(2, 32, 4, 4)] * 4
    for index, num_patches in reversed(kept):
        features = viops.restore_tokens(features, index, num_patches, num_prefix=2)
    assert torch.equal(maps[3].flatten(2).transpose(1, 2), features[:, 2:])
    (tokens,) = model.get_intermediate_layers(images, 1, norm=True)
    assert torch.equal(tokens, features[:, 2:])


def test_schedule_follows_the_official_formula():
    schedule = viops.patch.KeepRateSchedule(
        0.5, warmup_epochs=2, decay_epochs=4, iterations_per_epoch=10
    )
    # base + (1 - base) * (cos(pi * (iteration - 20) / 40) + 1) / 2 between epochs 2 and 6
    expected = {
        0: 1.0,
        19: 1.0,
        20: 1.0,
        25: 0.9809698831278217,
        30: 0.9267766952966369,
        40: 0.75,
        50: 0.5732233047033631,
        59: 0.500770666566718,
        60: 0.5,
        10_000: 0.5,
    }
    for iteration, rate in expected.items():
        assert schedule(iteration) == pytest.approx(rate, abs=1e-12), iteration
    assert pickle.loads(pickle.dumps(schedule)) == schedule

    capped = viops.patch.KeepRateSchedule(0.5, 1, 2, 10, max_keep_rate=0.8)
    assert [capped(i) for i in (9, 10, 20, 30)] == pytest.approx([1.0, 0.8, 0.65, 0.5], abs=1e-12)
    at_once = viops.patch.KeepRateSchedule(0.7, 0, 0, 10)
    assert at_once(0) == 0.7


def test_schedule_drives_a_model():
    model = viops.patch.evit(make_model(), 0.5, LAYERS)
    schedule = viops.patch.KeepRateSchedule(
        0.5, warmup_epochs=1, decay_epochs=2, iterations_per_epoch=4
    )
    counts = []
    for iteration in range(13):
        _, kept = model(make_images(), keep_rate=schedule(iteration), return_index=True)
        counts.append(kept[0].index.shape[1])
    assert counts == [16, 16, 16, 16, 16, 16, 15, 14, 12, 11, 10, 9, 8]
