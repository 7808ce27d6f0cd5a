"""viops.patch.manhattan: decayed attention in timm models."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import viops
from contract import BACKENDS, Backend, case_id, each_backend
from test_patch import VARIANTS
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, VisionTransformer
from tiny_vit import LAYERS, TOLERANCE, make_images, make_model, one_thread  # noqa: F401
from tolerances import TOLERANCES, assert_matches
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from viops.ops.decayed_attention.prefix import attention_with_prefix

pytestmark = pytest.mark.filterwarnings("ignore:.*taken away by the test:RuntimeWarning")

DECAY = (-0.3, 0.0, -1.5, -40.0)

backend = each_backend(BACKENDS)


def distances(num_prefix: int, height: int, width: int) -> Tensor:
    """[N, N], token by token."""
    places = [None] * num_prefix + [(y, x) for y in range(height) for x in range(width)]
    return torch.tensor(
        [
            [0 if a is None or b is None else abs(a[0] - b[0]) + abs(a[1] - b[1]) for b in places]
            for a in places
        ]
    )


def masked_features(
    model: VisionTransformer, images: Tensor, decay: tuple[float, ...], layers: tuple[int, ...]
) -> Tensor:
    """What a patched model's forward_features is to give: timm's own attention with a mask."""
    height, width = model.patch_embed.grid_size
    far = distances(model.num_prefix_tokens, height, width)
    mask = torch.tensor(decay)[:, None, None] * far  # [H, N, N]
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for i, block in enumerate(model.blocks):
        out = block.attn(block.norm1(x), attn_mask=mask if i in layers else None)
        x = x + block.drop_path1(block.ls1(out))
        x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return model.norm(x)


PATCHABLE = {
    **{name: options for name, options in VARIANTS.items() if name not in ("dynamic", "one_head")},
    "no_class_token": {"class_token": False, "global_pool": "avg"},
    "not_square": {"img_size": (24, 40)},
}


@pytest.mark.parametrize("variant", PATCHABLE)
def test_patched_model_equals_timms_with_a_mask(backend: Backend, variant: str) -> None:
    options = PATCHABLE[variant]
    plain, model = make_model(**options), make_model(**options)
    images = make_images(2, *plain.patch_embed.img_size)
    viops.patch.manhattan(model, DECAY, layers=(0, 2, 3))
    expected = masked_features(plain, images, DECAY, (0, 2, 3))
    features = model.forward_features(images)
    torch.testing.assert_close(features, expected, **TOLERANCE)
    torch.testing.assert_close(model(images), plain.forward_head(expected), **TOLERANCE)
    assert not torch.allclose(features, plain.forward_features(images), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("variant", PATCHABLE)
def test_zero_decay_changes_nothing(backend: Backend, variant: str) -> None:
    options = PATCHABLE[variant]
    plain, model = make_model(**options), make_model(**options)
    images = make_images(2, *plain.patch_embed.img_size)
    viops.patch.manhattan(model, torch.zeros(4))
    torch.testing.assert_close(model(images), plain(images), **TOLERANCE)


@pytest.mark.parametrize("variant", ["registers", "no_class_token"])
def test_gradients_equal_those_with_a_mask(backend: Backend, variant: str) -> None:
    options = {"init_values": 0.5, **PATCHABLE[variant]}
    plain, model = make_model(**options), make_model(**options)
    viops.patch.manhattan(model, DECAY)
    images = make_images().requires_grad_()
    model(images).square().sum().backward()
    grad_images, images.grad = images.grad, None
    features = masked_features(plain, images, DECAY, (0, 1, 2, 3))
    plain.forward_head(features).square().sum().backward()
    torch.testing.assert_close(grad_images, images.grad, rtol=1e-4, atol=1e-5)
    for (name, got), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        error = (got.grad - expected.grad).norm() / expected.grad.norm().clamp_min(1e-4)
        assert error < 1e-4, name


# attention over a grid and a prefix


def joint_attention(
    q: Tensor, k: Tensor, v: Tensor, pk: Tensor, pv: Tensor, log_decay: Tensor, scale: float
) -> Tensor:
    """One matrix of logits, in the dtype of the inputs."""
    num_prefix, (height, width) = pk.shape[2], q.shape[2:4]
    mask = log_decay[:, None, None] * distances(num_prefix, height, width)[num_prefix:]
    keys, values = torch.cat([pk, k.flatten(2, 3)], 2), torch.cat([pv, v.flatten(2, 3)], 2)
    logits = q.flatten(2, 3) @ keys.mT * scale + mask
    return (logits.softmax(dim=-1) @ values).unflatten(2, (height, width))


def prefix_inputs(dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, prefix_k, prefix_v and log_decay."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    grids = [normal(2, 5, 7, 3, 8).permute(0, 3, 1, 2, 4) for _ in range(3)]
    log_decay = torch.tensor([-0.25, -4.0, 0.0], dtype=dtype)
    return [*grids, normal(2, 3, 2, 8), normal(2, 3, 2, 8), log_decay]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=case_id)
def test_prefix_attention(backend: Backend, dtype: torch.dtype) -> None:
    inputs = prefix_inputs(dtype)
    *leaves, log_decay = [t.detach().requires_grad_() for t in inputs]
    others = [t.detach().double().requires_grad_() for t in leaves]
    out = attention_with_prefix(*leaves, log_decay.detach(), 0.4)
    expected = joint_attention(*others, log_decay.detach().double(), 0.4)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads = torch.autograd.grad(out, leaves, weight)
    wanted = torch.autograd.grad(expected, others, weight.double())
    assert out.dtype is dtype
    names = ("out", "q", "k", "v", "prefix_k", "prefix_v")
    for name, got, true in zip(names, (out, *grads), (expected, *wanted), strict=True):
        assert_matches(name, got, true)
    with pytest.raises(ValueError, match=r"^log_decay: expected a constant"):
        attention_with_prefix(*leaves, log_decay, 0.4)


def test_prefix_attention_where_one_part_has_it_all(backend: Backend) -> None:
    """Logits of thousands: no exponential overflows, and none of nothing makes NaN."""
    q, k, v, pk, pv, log_decay = prefix_inputs(torch.float32)
    q[..., 0], k[..., 0] = 100.0, 0.0
    pk = pk[:, :, :1].contiguous()
    for first, expected in (
        (-100.0, viops.decayed_attention(q, k, v, log_decay, scale=0.4)),
        (100.0, pv[:, :, :1, None].expand(2, 3, 5, 7, 8)),
    ):
        pk[..., 0] = first
        leaves = [t.detach().requires_grad_() for t in (q, k, v, pk, pv[:, :, :1])]
        out = attention_with_prefix(*leaves, log_decay, 0.4)
        torch.testing.assert_close(out, expected)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), leaves))


def test_prefix_attention_stores_no_matrix() -> None:
    """What autograd keeps is as long as the tokens, at any number of them."""
    *tensors, log_decay = prefix_inputs(torch.float32)
    q, k, v, pk, pv = (t.requires_grad_() for t in tensors)
    sizes: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        attention_with_prefix(q, k, v, pk, pv, log_decay, 0.4)
    assert sizes
    assert max(sizes) == q.numel()


def test_prefix_attention_under_transforms(backend: Backend) -> None:
    inputs = [t.double() for t in prefix_inputs(torch.float64)]
    expected = attention_with_prefix(*inputs, 0.4)

    def loss(q: Tensor) -> Tensor:
        return attention_with_prefix(q, *inputs[1:], 0.4).square().sum()

    leaf = inputs[0].clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(inputs[0]), grad)
    mapped = torch.func.vmap(lambda q: attention_with_prefix(q, *inputs[1:], 0.4))
    both = mapped(torch.stack([inputs[0], 2 * inputs[0]]))
    torch.testing.assert_close(both[0], expected)


def test_second_derivatives_are_right_or_refused() -> None:
    *tensors, log_decay = prefix_inputs(torch.float64)
    inputs = [*(t.requires_grad_() for t in tensors), log_decay]

    def second(function: Callable) -> Tensor:
        (grad,) = torch.autograd.grad(
            function(*inputs, 0.4).square().sum(), inputs[0], create_graph=True
        )
        return torch.autograd.grad(grad.square().sum(), inputs[1])[0]

    with viops.use_backend("reference"):
        torch.testing.assert_close(second(attention_with_prefix), second(joint_attention))
    with pytest.raises(NotImplementedError, match="no second derivative"):
        second(attention_with_prefix)


# the patch


def test_undo_leaves_nothing_behind() -> None:
    model = make_model(VisionTransformerDistilled)
    images = make_images()
    classes = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    text, out, keys = repr(model), model(images), list(model.state_dict())

    assert viops.patch.manhattan(model, layers=[1, 3]) is model
    assert not torch.allclose(model(images), out)
    assert repr(model).count("log_decay=[-0.2877, -0.1335, -0.0645, -0.0317]") == 2
    assert list(model.state_dict()) == keys
    make_model(VisionTransformerDistilled).load_state_dict(model.state_dict())

    assert viops.patch.undo(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert not any(module._non_persistent_buffers_set for module in model.modules())
    assert repr(model) == text
    assert torch.equal(model(images), out)
    with pytest.raises(ValueError, match="has patched, got VisionTransformerDistilled"):
        viops.patch.undo(model)
    viops.patch.manhattan(model)


def test_before_token_reorganization() -> None:
    """Decays in blocks that still have the whole grid, and one undo for both."""
    model, images = make_model(), make_images()
    out = model(images)
    viops.patch.manhattan(model, layers=(0, 1))
    viops.patch.evit(model, 0.5, layers=(2,))
    assert model.forward_features(images).shape[1] == 1 + 8 + 1
    viops.patch.undo(model)
    assert type(model) is VisionTransformer
    assert torch.equal(model(images), out)
    viops.patch.manhattan(model, layers=(3,))
    viops.patch.evit(model, 0.5, layers=(2,))
    with pytest.raises(ValueError, match=r"x: expected 1 \+ 4 \* 4 tokens, .*, got 10"):
        model(images)


def test_copies_are_patched_and_independent() -> None:
    model, images = viops.patch.manhattan(make_model(), DECAY), make_images()
    out = model(images)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other.blocks[0].attn) is type(model.blocks[0].attn)
        assert torch.equal(other(images), out)
        assert other.blocks[0].attn.grid_of[0] is other
        viops.patch.undo(other)
        assert torch.equal(other(images), make_model()(images))
        assert torch.equal(model(images), out)


def test_the_grid_follows_set_input_size() -> None:
    plain, model = make_model(), viops.patch.manhattan(make_model(), DECAY)
    for each in (plain, model):
        each.set_input_size(img_size=(16, 64))  # as many patches on another grid
    images = make_images(2, 16, 64)
    expected = masked_features(plain, images, DECAY, (0, 1, 2, 3))
    torch.testing.assert_close(model.forward_features(images), expected, **TOLERANCE)


def test_the_grid_follows_a_new_patch_embed() -> None:
    model = viops.patch.manhattan(make_model())
    model.patch_embed = copy.deepcopy(model.patch_embed)
    model.set_input_size(img_size=(16, 64))
    undone = viops.patch.undo(copy.deepcopy(model))
    viops.patch.manhattan(undone)
    images = make_images(2, 16, 64)
    torch.testing.assert_close(model(images), undone(images))


def test_decays_survive_the_meta_device() -> None:
    model = viops.patch.manhattan(make_model(), DECAY)
    with torch.device("meta"):
        other = make_model()
    viops.patch.manhattan(other, DECAY)
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    for block in other.blocks:
        assert block.attn.log_decay.tolist() == pytest.approx(DECAY)


def test_intermediates() -> None:
    model = viops.patch.manhattan(make_model(), DECAY)
    final, maps = model.forward_intermediates(make_images(), norm=True)
    torch.testing.assert_close(final, model.forward_features(make_images()))
    assert torch.equal(maps[3].flatten(2).mT, final[:, 1:])


def test_half_precision_and_autocast() -> None:
    model, images = viops.patch.manhattan(make_model(qk_norm=True)), make_images()
    out = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images)
    mixed.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    half = model.bfloat16()
    assert half.blocks[0].attn.log_decay.dtype is torch.float32
    for lower in (mixed, half(images.bfloat16())):
        assert lower.dtype is torch.bfloat16
        assert (lower - out).norm() < 0.05 * out.norm()


def test_compile_without_graph_breaks_and_without_recompiling_for_a_batch() -> None:
    model = viops.patch.manhattan(make_model(reg_tokens=1, depth=2), DECAY)
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch in (2, 3, 7, 5):
        images = make_images(batch)
        torch.testing.assert_close(compiled(images), model(images), **TOLERANCE)
    assert counter.frame_count == 2  # the first size, and one graph for all that follow


def test_compiled_and_checkpointed_training_equal_eager() -> None:
    model = viops.patch.manhattan(make_model(depth=2), DECAY)
    images = make_images().requires_grad_()

    def gradients(call: Callable) -> list[Tensor]:
        model.zero_grad()
        call(images).square().sum().backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients(model)
    model.set_grad_checkpointing()
    got = [gradients(model)]
    model.set_grad_checkpointing(False)
    got.append(gradients(torch.compile(model, fullgraph=True, backend="aot_eager")))
    got.append(gradients(lambda x: checkpoint(model, x, use_reentrant=False)))
    for grads in got:
        for grad, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


class OwnForward(Attention):
    def forward(self, x: Tensor, **options: object) -> Tensor:
        return super().forward(x, **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), TypeError, "^model: expected timm's VisionTransformer.*Linear"),
        (lambda: torch.compile(make_model()), TypeError, "before it is wrapped.*OptimizedModule"),
        (lambda: make_model(attn_layer=OwnForward), TypeError, r"^model.blocks\[0\].attn: .*OwnFo"),
        (lambda: make_model(attn_layer="diff"), TypeError, "another forward in .*DiffAttention"),
        (lambda: make_model(attn_drop_rate=0.1), ValueError, "expected attn_drop = 0, got 0.1"),
        (lambda: make_model(dynamic_img_size=True), ValueError, "^model: with dynamic_img_size"),
        (lambda: viops.patch.manhattan(make_model()), ValueError, "^model: it is patched already"),
        (
            lambda: viops.patch.evit(make_model(), 0.7, LAYERS),
            ValueError,
            "^model: it is patched already",
        ),
    ],
)
def test_models_that_cannot_be_patched(
    make: Callable, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        viops.patch.manhattan(make())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"log_decay": [0.0] * 3}, r"^log_decay: expected \[H\] = \[4\], got shape \[3\]"),
        ({"log_decay": [0.0, 0.1, 0.0, 0.0]}, "^log_decay: expected at most 0"),
        ({"log_decay": [float("nan")] * 4}, "^log_decay: expected at most 0"),
        ({"layers": ()}, "^layers: expected different ints"),
        ({"layers": (4,)}, r"^layers: .* 0 to 3 \(the model has 4 blocks\), got \(4,\)"),
        ({"layers": (1, 1)}, "^layers: expected different ints"),
        ({"layers": 2}, "^layers: expected different ints"),
        ({"layers": (1.5,)}, "^layers: expected different ints"),
    ],
)
def test_bad_arguments(options: dict, message: str) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=message):
        viops.patch.manhattan(model, **options)
    assert not any("log_decay" in name for name, _ in model.named_buffers())


def test_masks_and_lost_patches_are_refused() -> None:
    model = viops.patch.manhattan(make_model(patch_drop_rate=0.5))
    with pytest.raises(ValueError, match=r"^attn_mask: decayed attention takes no"):
        model(make_images(), attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^is_causal: decayed attention takes no"):
        model(make_images(), is_causal=True)
    with pytest.raises(ValueError, match=r"^x: expected 1 \+ 4 \* 4 tokens"):
        model.train()(make_images())
