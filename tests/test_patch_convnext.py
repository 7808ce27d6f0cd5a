"""viops.patch.convnext: depthwise convolution and norm as one op in timm's ConvNeXt."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
import viops
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from viops.patch.convnext import FusedConvNeXtBlock

pytestmark = pytest.mark.filterwarnings("ignore:.*without a kernel of its own:RuntimeWarning")


def narrow(name: str, **options: object) -> Callable[..., nn.Module]:
    """One of timm's ConvNeXts with few channels and blocks."""
    options = {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_classes": 10, **options}
    return functools.partial(timm.create_model, name, **options)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "atto": functools.partial(timm.create_model, "convnext_atto", num_classes=10),
    "linear_mlp": narrow("convnext_tiny"),
    "conv_mlp": narrow("convnext_atto"),
    "overlapping_stem": narrow("convnext_atto_ols"),
    "head_norm_first": narrow("convnext_tiny_hnf"),
    "v2_linear_mlp": narrow("convnextv2_tiny"),
    "v2_conv_mlp": narrow("convnextv2_atto"),
    "no_layer_scale": narrow("convnext_tiny", ls_init_value=None),
    "no_biases": narrow("convnext_tiny", conv_bias=False),
    "other_kernels": narrow("convnext_tiny", kernel_sizes=(3, 5, 9, 11)),
    "dilated": narrow("convnext_tiny", output_stride=8),
    "relu_and_eps": narrow("convnext_tiny", act_layer="relu", norm_eps=0.1),
}
#: Blocks of each that are not patched, all others are.
STAY = {"dilated": 3}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def models_of(name: str, **options: object) -> tuple[nn.Module, nn.Module]:
    """A network with parameters that are not trivial, and the same patched."""
    torch.manual_seed(0)
    plain = MODELS[name](**options)
    with torch.no_grad():
        for key, parameter in plain.named_parameters():
            if key.endswith("gamma"):
                parameter.fill_(1)
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain.eval()
    return plain, viops.patch.convnext(copy.deepcopy(plain))


def images(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 3, 64, 96)), generator=torch.Generator().manual_seed(1))


def fused(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, FusedConvNeXtBlock)]


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Logits, and the gradients of their weighted sum, with a seed of their own."""
    torch.manual_seed(3)
    x = x.detach().requires_grad_()
    logits = model(x)
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(logits.dtype)
    named = {"x": x, **dict(model.named_parameters())}
    grads = torch.autograd.grad(logits, list(named.values()), weight)
    return {"logits": logits, **dict(zip(named, grads, strict=True))}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    for key, value in expected.items():
        scale = value.norm().clamp(min=1e-3 * expected["logits"].norm())
        assert (got[key] - value).norm() < bound * scale, key


def test_logits_equal_timms(name: str) -> None:
    plain, patched = models_of(name)
    blocks = [module for module in plain.modules() if isinstance(module, ConvNeXtBlock)]
    assert len(fused(patched)) == len(blocks) - STAY.get(name, 0)
    for shape in ((2, 3, 64, 96), (1, 3, 70, 33)):
        x = images(*shape)
        torch.testing.assert_close(patched(x), plain(x), rtol=1e-4, atol=1e-5)
        channels_last = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(patched(channels_last), plain(x), rtol=1e-4, atol=1e-5)


def test_gradients_equal_timms(name: str) -> None:
    plain, patched = models_of(name)
    assert_same(step(patched, images()), step(plain, images()), 1e-4)
    expected = step(plain.double(), images().double())
    assert_same(step(patched.double(), images().double()), expected, 1e-12)


@pytest.mark.parametrize("name", ["linear_mlp", "v2_conv_mlp"])
def test_training_with_drop_path_equals_timms(name: str) -> None:
    plain, patched = models_of(name, drop_path_rate=0.5, drop_rate=0.2)
    x = images(8, 3, 64, 64)
    still = step(plain, x)["logits"]
    expected = step(plain.train(), x)
    assert not torch.allclose(expected["logits"], still, atol=1e-2)
    assert_same(step(patched.train(), x), expected, 1e-4)


def test_state_dict_stays_and_undo_restores_bits(name: str) -> None:
    plain, _ = models_of(name)
    expected, keys = plain(images()), list(plain.state_dict())
    parameters = dict(plain.named_parameters())
    attributes = [(type(module), set(vars(module))) for module in plain.modules()]
    assert viops.patch.convnext(plain) is plain
    assert fused(plain)
    assert list(plain.state_dict()) == keys
    assert all(parameters[key] is value for key, value in plain.named_parameters())
    assert viops.patch.undo(plain) is plain
    assert attributes == [(type(module), set(vars(module))) for module in plain.modules()]
    assert torch.equal(plain(images()), expected)


def test_copies_and_pickles(name: str) -> None:
    _, patched = models_of(name)
    expected = patched(images())
    for other in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert len(fused(other)) == len(fused(patched))
        assert torch.equal(other(images()), expected)
        assert not fused(viops.patch.undo(other))


@pytest.mark.parametrize("name", ["linear_mlp", "conv_mlp", "v2_linear_mlp", "v2_conv_mlp"])
def test_activations_stay_in_channels_last(name: str) -> None:
    """All that follows the first block's input: MLPs get views, and nothing is laid out anew."""
    _, patched = models_of(name)
    seen = []

    def check_grid(block: nn.Module, args: tuple, out: Tensor) -> None:
        assert out.is_contiguous(memory_format=torch.channels_last)
        seen.append(block)

    def check_mlp(mlp: nn.Module, args: tuple, out: Tensor) -> None:
        is_conv = isinstance(mlp.fc1, nn.Conv2d)
        layout = torch.channels_last if is_conv else torch.contiguous_format
        for tensor in (args[0], out):
            assert tensor.is_contiguous(memory_format=layout)
        seen.append(mlp)

    for block in fused(patched):
        block.register_forward_hook(check_grid)
        block.mlp.register_forward_hook(check_mlp)
    patched(images())
    assert len(seen) == 2 * 5


@pytest.mark.parametrize("name", ["linear_mlp", "v2_conv_mlp"])
def test_half_precision(name: str) -> None:
    plain, patched = models_of(name)
    expected = plain(images())
    with torch.autocast("cpu", torch.bfloat16):
        mixed, wanted = patched(images()), plain(images())
    assert mixed.dtype is wanted.dtype
    patched.bfloat16()
    for out in (mixed, patched(images().bfloat16())):
        assert (out - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", ["linear_mlp", "v2_conv_mlp"])
def test_compile_without_graph_breaks(name: str) -> None:
    _, patched = models_of(name)
    torch._dynamo.reset()
    compiled = torch.compile(patched, fullgraph=True, backend="aot_eager")
    expected = patched(images())
    torch.testing.assert_close(compiled(images()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["linear_mlp"])
def test_checkpointing_gives_the_same_gradients(name: str) -> None:
    _, patched = models_of(name, drop_path_rate=0.3)
    patched.train()
    expected = step(patched, images())
    patched.set_grad_checkpointing()
    assert_same(step(patched, images()), expected, 1e-6)
    block = fused(patched)[0].eval()
    x = images(2, 8, 5, 7).requires_grad_()
    torch.testing.assert_close(checkpoint(block, x, use_reentrant=False), block(x))


def test_features_and_pruned_models() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("convnext_atto", features_only=True, out_indices=(0, 2)).eval()
    patched = viops.patch.convnext(copy.deepcopy(plain))
    assert fused(patched)
    for got, expected in zip(patched(images()), plain(images()), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_blocks_alone_and_strided() -> None:
    """A block may be the model; one that downsamples by itself stays."""
    torch.manual_seed(0)
    block = ConvNeXtBlock(8, ls_init_value=1.0).eval()
    x = images(2, 8, 9, 7)
    expected = block(x)
    viops.patch.convnext(block)
    torch.testing.assert_close(block(x), expected)
    assert type(viops.patch.undo(block)) is ConvNeXtBlock
    pair = nn.Sequential(ConvNeXtBlock(8, ls_init_value=1.0), ConvNeXtBlock(8, 16, stride=2))
    expected = pair.eval()(x)
    viops.patch.convnext(pair)
    assert [isinstance(block, FusedConvNeXtBlock) for block in pair] == [True, False]
    torch.testing.assert_close(pair(x), expected)


def test_names_in_skip_stay() -> None:
    model = viops.patch.convnext(MODELS["linear_mlp"](), skip=["stages.0", "stages.2.blocks.1"])
    patched = [name for name, module in model.named_modules() if module in fused(model)]
    assert patched == ["stages.1.blocks.0", "stages.2.blocks.0", "stages.3.blocks.0"]


def test_layers_that_change_afterwards_are_called() -> None:
    plain, patched = models_of("linear_mlp")
    expected = plain(images())
    block = fused(patched)[2]
    for part in (block.conv_dw, block.norm):
        seen: list[nn.Module] = []
        handle = part.register_forward_hook(lambda module, _, __, to=seen: to.append(module))
        torch.testing.assert_close(patched(images()), expected, rtol=1e-4, atol=1e-5)
        handle.remove()
        assert seen == [part]
    block.norm, fused(patched)[3].conv_dw = nn.Identity(), nn.Identity()
    blocks = [module for module in plain.modules() if isinstance(module, ConvNeXtBlock)]
    blocks[2].norm, blocks[3].conv_dw = nn.Identity(), nn.Identity()
    torch.testing.assert_close(patched(images()), plain(images()), rtol=1e-4, atol=1e-5)


def test_with_int16_over_it() -> None:
    """Convolutions that are no longer torch's are called, and both patches come out."""
    plain, patched = models_of("linear_mlp")
    expected = plain(images())
    viops.patch.int16(patched, scaling="max")
    with torch.no_grad():
        error = (patched(images()) - expected).norm() / expected.norm()
    assert 0 < error < 1e-2
    viops.patch.undo(patched)
    assert torch.equal(patched(images()), expected)
    assert [type(m) for m in patched.modules()] == [type(m) for m in plain.modules()]


class OtherBlock(ConvNeXtBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x


def hooked(part: str) -> nn.Module:
    model = MODELS["linear_mlp"]()
    model.stages[2].blocks[1].get_submodule(part).register_forward_hook(lambda *_: None)
    return model


def without_affine() -> nn.Module:
    block = ConvNeXtBlock(8)
    block.norm = timm.layers.LayerNorm(8, affine=False)
    return nn.Sequential(block)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: "convnext", TypeError, "^model: expected a torch.nn.Module, got str"),
        (
            lambda: models_of("linear_mlp")[1],
            ValueError,
            "^model: it is patched already; expected one that is not: viops.patch.undo takes",
        ),
        (
            lambda: timm.create_model("resnet18"),
            ValueError,
            "^model: expected one with timm's ConvNeXtBlocks, .*, got timm.*ResNet without any$",
        ),
        (
            narrow("convnext_atto_rms"),
            ValueError,
            "ConvNeXt whose stages.0.blocks.0 has norm = timm.layers.norm.RmsNorm2d: ",
        ),
        (without_affine, ValueError, "whose 0 has norm = timm.layers.norm.LayerNorm: LayerN"),
        (
            lambda: ConvNeXtBlock(8, stride=2),
            ValueError,
            r"whose block has conv_dw = Conv2d\(8, 8, .* stride=\(2, 2\)",
        ),
        (lambda: nn.Sequential(OtherBlock(8)), ValueError, "got torch.nn.*Sequential without any"),
        (lambda: hooked("conv_dw"), ValueError, r"^stages.2.blocks.1.conv_dw: it has hooks"),
        (lambda: hooked("norm"), ValueError, r"^stages.2.blocks.1.norm: it has hooks"),
    ],
)
def test_models_that_are_refused(
    call: Callable[[], nn.Module], error: type[Exception], message: str
) -> None:
    model = call()
    before = [type(module) for module in model.modules()] if isinstance(model, nn.Module) else []
    with pytest.raises(error, match=message):
        viops.patch.convnext(model)
    if before:
        assert [type(module) for module in model.modules()] == before


def test_arguments_that_are_refused() -> None:
    model = MODELS["linear_mlp"]()
    with pytest.raises(TypeError, match=r"^skip: expected a sequence of names"):
        viops.patch.convnext(model, skip="stages")
    with pytest.raises(ValueError, match=r"^skip: 'no' is no module of the model"):
        viops.patch.convnext(model, skip=["no"])
    with pytest.raises(ValueError, match=r"ConvNeXt without any$"):
        viops.patch.convnext(model, skip=["stages"])
    with pytest.raises(ValueError, match=r"^model: expected one that viops.patch has patched"):
        viops.patch.undo(model)
    assert not fused(model)
    model = hooked("norm")
    assert len(fused(viops.patch.convnext(model, skip=["stages.2.blocks.1"]))) == 4
