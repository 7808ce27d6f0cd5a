"""MixShiftBlock and ConvNeXtBlock against their formulas, and as modules that people use."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import ms_mlp_golden
import pytest
import torch
import torch.nn.functional as F
import viops
from tolerances import assert_matches
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from viops.nn import ConvNeXtBlock, MixShiftBlock
from viops.ops.mix_shift import module as module_of_blocks
from viops.plain_modules import are_watched

pytestmark = pytest.mark.filterwarnings("ignore:.*without a kernel of its own:RuntimeWarning")

Block = MixShiftBlock | ConvNeXtBlock
SHIFTS, SIZES = (-2, -1, 0, 1, 2), (1, 3, 3, 5, 7)

BLOCKS: dict[str, Callable[..., Block]] = {
    "mix_shift": lambda **options: MixShiftBlock(19, SHIFTS, SIZES, 3.0, **options),
    "convnext": lambda **options: ConvNeXtBlock(19, 5, 3.0, **options),
}


@pytest.fixture(params=BLOCKS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def make(name: str, gamma: float = 0.7, **options: object) -> Block:
    """A block with values that are not trivial, in eval mode."""
    torch.manual_seed(0)
    block = BLOCKS[name](layer_scale_init_value=gamma, **options)
    with torch.no_grad():
        for key, parameter in block.named_parameters():
            if key.startswith(("norm", "gamma")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return block.eval()


def grids(*shape: int, dtype: torch.dtype = torch.float32, last: bool = True) -> Tensor:
    """[B, C, H, W]; of 9 x 11 by default, enough places for gamma to be folded."""
    x = torch.randn(*(shape or (3, 19, 9, 11)), generator=torch.Generator().manual_seed(1))
    return x.to(dtype, memory_format=torch.channels_last if last else torch.contiguous_format)


def mixed(block: Block, x: Tensor) -> Tensor:
    """Before the norm, as the papers have it."""

    def conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
        return F.conv2d(x, conv.weight, conv.bias, 1, conv.weight.shape[-1] // 2, 1, x.shape[1])

    if isinstance(block, ConvNeXtBlock):
        return conv(block.dwconv, x)
    groups = list(enumerate(x.chunk(len(SHIFTS), dim=1)))
    along_width = [conv(block.dwconv_lr[g], part.roll(SHIFTS[g], 3)) for g, part in groups]
    along_height = [conv(block.dwconv_td[g], part.roll(SHIFTS[g], 2)) for g, part in groups]
    return torch.cat(along_width, dim=1) + torch.cat(along_height, dim=1)


def formula(block: Block, x: Tensor) -> Tensor:
    """The whole block, as the papers have it."""
    norm, first, second = block.norm, block.pwconv1, block.pwconv2
    out = F.layer_norm(mixed(block, x).permute(0, 2, 3, 1), (19,), norm.weight, norm.bias, 1e-6)
    out = F.linear(F.gelu(F.linear(out, first.weight, first.bias)), second.weight, second.bias)
    out = out if block.gamma is None else block.gamma * out
    return x + out.permute(0, 3, 1, 2)


def gradients(block: nn.Module, x: Tensor, out: Tensor) -> dict[str, Tensor]:
    """Of a weighted sum of out, to x and all parameters."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    named = {"x": x, **dict(block.named_parameters())}
    return dict(zip(named, torch.autograd.grad(out, list(named.values()), weight), strict=True))


# values


@pytest.mark.parametrize("gamma", [0.7, 0.0])
@pytest.mark.parametrize("shape", [(3, 19, 9, 11), (1, 19, 4, 5), (2, 19, 1, 1), (0, 19, 4, 5)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(name: str, dtype: torch.dtype, shape: tuple, gamma: float) -> None:
    block = make(name, gamma).to(dtype)
    truth = copy.deepcopy(block).double()
    assert (block.gamma is None) == (gamma == 0)
    x, other = grids(*shape, dtype=dtype).requires_grad_(), grids(*shape).double().requires_grad_()
    out, expected = block(x), formula(truth, other)
    assert_matches("out", out, expected)
    wanted = gradients(truth, other, expected)
    for key, grad in gradients(block, x, out).items():
        error = (grad.double() - wanted[key]).norm() / wanted[key].norm().clamp(min=1)
        assert error < (1e-13 if dtype is torch.float64 else 1e-5), key


def test_block_and_op_are_the_official_ones() -> None:
    golden = ms_mlp_golden.load()
    block = MixShiftBlock(**ms_mlp_golden.BLOCK)
    block.load_state_dict(ms_mlp_golden.draw_state(block.state_dict()))
    x = ms_mlp_golden.draw_images(*ms_mlp_golden.BLOCK_SHAPE).requires_grad_()
    lr, td = block.dwconv_lr, block.dwconv_td
    values = [[getattr(c, n) for c in convs] for convs in (lr, td) for n in ("weight", "bias")]
    out = viops.mix_shift(x, *values, block.shift_dist)
    assert_matches("mixed", out, golden["block_mixed"], torch.float32)
    out = block(x)
    assert_matches("out", out, golden["block_out"], torch.float32)
    seed = ms_mlp_golden.SEED + 2
    out.backward(ms_mlp_golden.draw_images(*ms_mlp_golden.BLOCK_SHAPE, seed=seed))
    for key, value in {"x": x, **dict(block.named_parameters())}.items():
        expected = golden[f"block_grad_{key}"]
        error = (value.grad - expected).norm()
        # a convolution's bias moves no norm's input but by its part that is not in all channels
        assert error <= 1e-5 * expected.norm() + 1e-5, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    block = make(name).to(dtype)
    x = grids(dtype=dtype)
    assert_matches("out", block(x), formula(copy.deepcopy(block).double(), x.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 19, 9, 11), (1, 19, 4, 5)])
def test_autocast(name: str, dtype: torch.dtype, shape: tuple) -> None:
    block, x = make(name), grids(*shape).requires_grad_()
    expected = formula(block, x)
    wanted = gradients(block, x, expected)
    with torch.autocast("cpu", dtype):
        out = block(x)
    assert out.dtype is torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert (out - expected).norm() < 1e-2 * expected.norm()
    for key, grad in gradients(block, x, out).items():
        assert grad.dtype is torch.float32
        assert (grad - wanted[key]).norm() < 4e-2 * wanted[key].norm() + 1e-3, key


@pytest.mark.parametrize("autocast", [False, True])
def test_a_small_gamma_leaves_gradients_in_float16(name: str, autocast: bool) -> None:
    """Its product with a weight would be zero."""
    block = make(name, 1e-6)
    with torch.no_grad():
        block.gamma.fill_(1e-6)
    truth, x = copy.deepcopy(block).double(), grids()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)) * 8192
    formula(truth, x.double()).backward(weight.double())
    if autocast:
        with torch.autocast("cpu", torch.float16):
            out = block(x)
    else:
        block, x = block.half(), x.half()
        out = block(x)
    out.backward(weight.to(out.dtype))
    grad, wanted = block.pwconv1.weight.grad.double(), truth.pwconv1.weight.grad
    assert (grad - wanted).norm() < 0.1 * wanted.norm()


# layouts


@pytest.mark.parametrize("gamma", [0.7, 0.0])
@pytest.mark.parametrize("training", [False, True])
def test_any_layout_gives_channels_last(name: str, training: bool, gamma: float) -> None:
    block = make(name, gamma, drop_path=0.5 if training else 0.0).train(training)
    x = grids()
    layouts = {
        "channels_last": x,
        "contiguous": x.contiguous(),
        "strided": torch.stack([x, x], dim=-1).flatten(3)[..., ::2],
        "transposed": x.mT.contiguous().mT,
    }
    results = []
    for layout, value in layouts.items():
        torch.manual_seed(0)
        results.append(block(value))
        assert results[-1].is_contiguous(memory_format=torch.channels_last), layout
        torch.testing.assert_close(results[-1], results[0])


def test_nothing_is_copied_after_the_mixing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the mixing and the sum there are two products, GELU and views."""
    calls: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.name().removeprefix("aten::").split(".")[0])
            return func(*args, **(kwargs or {}))

    op = "mix_shift" if name == "mix_shift" else "depthwise_norm"
    given = grids().add(1)

    def mixing(x: Tensor, *args: object, **options: object) -> Tensor:
        return given

    monkeypatch.setattr(module_of_blocks, op, mixing)
    block = make(name)
    with torch.inference_mode(False), torch.no_grad(), Watch():
        block(grids())
    begin = calls.index("permute")  # after the input has been drawn
    assert not {"clone", "copy_", "_to_copy", "contiguous"} & set(calls[begin:])
    assert calls[begin:].count("addmm") == 2
    assert calls[begin:].count("mul") == 2  # gamma by a weight and a bias
    assert calls[begin:].count("add") == 1


@pytest.mark.parametrize("training", [False, True])
def test_without_gradients_the_block_overwrites_what_is_its_own(name: str, training: bool) -> None:
    """And nothing else; the bits are those that there are with gradients."""
    block, x = make(name, drop_path=0.5).train(training), grids()
    before = x.clone()
    torch.manual_seed(0)
    expected = block(x)
    torch.manual_seed(0)
    with torch.no_grad(), torch.profiler.profile() as profile:
        out = block(x)
    assert {"aten::gelu_", "aten::add_"} <= {event.key for event in profile.key_averages()}
    assert torch.equal(out, expected)
    assert out.stride() == expected.stride()
    assert torch.equal(x, before)
    for key in ("pwconv1", "act", "pwconv2", "drop_path"):
        block, kept = make(name, drop_path=0.5).train(training), []
        block.get_submodule(key).register_forward_hook(
            lambda _, __, out, kept=kept: kept.append((out, out.clone()))
        )
        with torch.no_grad():
            block(x)
        ((seen, as_it_was),) = kept
        assert torch.equal(seen, as_it_was), key


def test_without_gradients_a_smaller_branch_is_broadcast_as_ever() -> None:
    block, x = make("convnext"), grids()
    block.dwconv = nn.AdaptiveAvgPool2d(1)
    expected = block(x)
    with torch.no_grad():
        assert torch.equal(block(x), expected)
    assert expected.shape == x.shape


# modules within


def test_gamma_is_folded_where_that_is_cheaper(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = make(name)
    called = []

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        called.append(layer)
        return layer(x)

    monkeypatch.setattr(module_of_blocks, "call_linear", call)
    for shape, layers in (
        ((3, 19, 9, 11), [block.pwconv1]),
        ((1, 19, 4, 5), [block.pwconv1, block.pwconv2]),
    ):
        called.clear()
        block(grids(*shape))
        assert called == layers


@pytest.mark.parametrize("shape", [(3, 19, 9, 11), (1, 19, 4, 5)])
def test_hooks_are_called(name: str, shape: tuple) -> None:
    block, x = make(name), grids(*shape)
    expected = block(x)
    layers = [key for key, module in block.named_modules() if key and not module._modules]
    assert len(layers) == (15 if name == "mix_shift" else 6)
    for key in layers:
        seen: list[nn.Module] = []
        layer = block.get_submodule(key)
        handle = layer.register_forward_hook(lambda module, _, __, to=seen: to.append(module))
        out = block(x)
        handle.remove()
        assert seen == [layer]
        torch.testing.assert_close(out, expected)
        assert out.is_contiguous(memory_format=torch.channels_last)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, __: seen.append(module)
    )
    assert are_watched()
    try:
        torch.testing.assert_close(block(x), expected)
    finally:
        handle.remove()
    assert {block.get_submodule(key) for key in layers} < set(seen)


def test_hooks_change_results(name: str) -> None:
    block, x = make(name), grids()
    block.norm.register_forward_hook(lambda _, __, out: out * 0)
    hidden = F.gelu(block.pwconv1.bias)
    branch = block.gamma * block.pwconv2(hidden)
    torch.testing.assert_close(block(x), x + branch[:, None, None])


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("key", ["conv", "norm", "pwconv2"])
def test_parametrized_layers(name: str, key: str) -> None:
    block, x = make(name), grids()
    if key == "conv":
        key = "dwconv_lr.3" if name == "mix_shift" else "dwconv"
    doubled = copy.deepcopy(block)
    with torch.no_grad():
        doubled.get_submodule(key).weight.mul_(2)
    nn.utils.parametrize.register_parametrization(block.get_submodule(key), "weight", Doubled())
    torch.testing.assert_close(block(x), doubled(x))


def test_replaced_layers(name: str) -> None:
    block, x = make(name), grids()
    block.norm, block.pwconv2, block.act = nn.Identity(), nn.Identity(), nn.ReLU()
    block.pwconv1 = nn.Linear(19, 19)
    out = F.relu(block.pwconv1(mixed(block, x).permute(0, 2, 3, 1)))
    torch.testing.assert_close(block(x), x + (block.gamma * out).permute(0, 3, 1, 2))
    block.norm = nn.LayerNorm(19, eps=0.5, bias=False)
    out = F.layer_norm(mixed(block, x).permute(0, 2, 3, 1), (19,), block.norm.weight, eps=0.5)
    out = F.relu(block.pwconv1(out))
    torch.testing.assert_close(block(x), x + (block.gamma * out).permute(0, 3, 1, 2))


def test_convolutions_of_another_kind() -> None:
    """What a block of its constructor never has: other sides, padding and no bias."""
    block, x = make("mix_shift"), grids()
    block.dwconv_td[1] = nn.Conv2d(4, 4, 7, padding=3, groups=4, bias=False)
    lr, td = (
        torch.cat(
            [
                conv(x_g.roll(s, axis))
                for conv, x_g, s in zip(convs, x.chunk(5, 1), SHIFTS, strict=True)
            ],
            1,
        )
        for convs, axis in ((block.dwconv_lr, 3), (block.dwconv_td, 2))
    )
    out = block.pwconv2(block.act(block.pwconv1(block.norm((lr + td).permute(0, 2, 3, 1)))))
    torch.testing.assert_close(block(x), x + (block.gamma * out).permute(0, 3, 1, 2))
    other = make("convnext")
    other.dwconv.padding_mode = "circular"
    other.dwconv._reversed_padding_repeated_twice = [2] * 4
    assert not torch.allclose(other(x), formula(other, x))


# drop path


def test_drop_path_drops_branches_by_image(name: str) -> None:
    block = make(name, drop_path=0.3)
    x = grids(512, 19, 3, 4)
    branch = block(x) - x
    torch.manual_seed(0)
    dropped = block.train()(x) - x
    norms = dropped.flatten(1).norm(dim=1)
    kept = norms > 0
    assert 0.6 < kept.float().mean() < 0.8
    assert (norms[~kept] == 0).all()
    torch.testing.assert_close(dropped[kept], branch[kept] / 0.7, rtol=1e-4, atol=1e-5)
    assert torch.equal(block.eval()(x) - x, branch)
    always = make(name, drop_path=1.0).train()
    assert torch.equal(always(x), x)


# as modules that people use


def test_state_dict_has_the_official_names() -> None:
    pointwise = [
        f"{layer}.{n}" for layer in ("norm", "pwconv1", "pwconv2") for n in ("weight", "bias")
    ]
    convs = [
        f"dwconv_{d}.{g}.{n}" for d in ("lr", "td") for g in range(5) for n in ("weight", "bias")
    ]
    assert list(make("mix_shift").state_dict()) == ["gamma", *convs, *pointwise]
    assert list(make("mix_shift", 0.0).state_dict()) == [*convs, *pointwise]
    single = ["dwconv.weight", "dwconv.bias"]
    assert list(make("convnext").state_dict()) == ["gamma", *single, *pointwise]
    assert MixShiftBlock(96).gamma[0] == ConvNeXtBlock(96).gamma[0] == torch.tensor(1e-6)
    assert ConvNeXtBlock(96).dwconv.weight.shape == (96, 1, 7, 7)
    assert MixShiftBlock(96).pwconv1.out_features == ConvNeXtBlock(96).pwconv1.out_features == 384


def test_copies_pickles_and_state_dicts(name: str) -> None:
    block, x = make(name), grids()
    expected = block(x)
    stream = io.BytesIO()
    torch.save(block, stream)
    stream.seek(0)
    loaded = make(name, 0.1)
    loaded.load_state_dict(block.state_dict())
    for other in (
        copy.deepcopy(block),
        pickle.loads(pickle.dumps(block)),
        torch.load(stream, weights_only=False),
        loaded,
    ):
        assert torch.equal(other(x), expected)


@pytest.mark.parametrize("shape", [(3, 19, 9, 11), (1, 19, 4, 5)])
def test_compile(name: str, shape: tuple) -> None:
    block, x = make(name, drop_path=0.4).train(), grids(*shape).requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for run in (block, compiled):
        torch.manual_seed(3)
        out = run(x)
        results.append({"out": out, **gradients(block, x, out)})
    for key, value in results[1].items():
        torch.testing.assert_close(value, results[0][key], rtol=1e-4, atol=1e-4)


def test_compile_does_not_recompile_for_batch_sizes(name: str) -> None:
    block = make(name)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch in (2, 3, 5, 9):
            x = grids(batch, 19, 9, 11)
            torch.testing.assert_close(compiled(x), block(x))
    assert counter.frame_count <= 2  # the first size alone, then any


def test_checkpoint(name: str) -> None:
    block, x = make(name, drop_path=0.4).train(), grids().requires_grad_()
    torch.manual_seed(3)
    expected = gradients(block, x, block(x))
    for use_reentrant in (False, True):
        block.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        out = checkpoint(block, x, use_reentrant=use_reentrant)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
        out.backward(weight)
        for key, value in {"x": x, **dict(block.named_parameters())}.items():
            torch.testing.assert_close(value.grad, expected[key])


def test_meta_device_and_vmap(name: str) -> None:
    with torch.device("meta"):
        block = BLOCKS[name]()
        out = block(torch.empty(2, 19, 5, 7))
    assert out.is_meta
    assert out.shape == (2, 19, 5, 7)
    block, x = make(name), grids()
    torch.testing.assert_close(torch.vmap(lambda x: block(x[None])[0])(x), block(x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: MixShiftBlock(0), ValueError, "^dim: expected at least 1, got 0"),
        (lambda: MixShiftBlock(6.5), TypeError, "^dim: expected an int, got float"),
        (lambda: MixShiftBlock(6), ValueError, "^mix_size: expected 3 entries, .* got 5"),
        (
            lambda: MixShiftBlock(8, (1, 2), (1, 3, 5)),
            ValueError,
            "^shift_dist: expected 3 entries",
        ),
        (lambda: MixShiftBlock(8, (1, 0), (1, 4)), ValueError, r"^mix_size\[1\]: expected an odd"),
        (
            lambda: MixShiftBlock(8, (1, 0), (1, -1)),
            ValueError,
            r"^mix_size\[1\]: expected at leas",
        ),
        (
            lambda: MixShiftBlock(8, (1, 0.5), (1, 3)),
            TypeError,
            r"^shift_dist\[1\]: expected an in",
        ),
        (lambda: MixShiftBlock(8, 1, (1, 3)), TypeError, "^shift_dist: expected a sequence"),
        (lambda: MixShiftBlock(8, (), ()), ValueError, "^shift_dist: expected 1 to 64 entries"),
        (lambda: ConvNeXtBlock(8, 6), ValueError, "^kernel_size: expected an odd number, got 6"),
        (
            lambda: ConvNeXtBlock(8, mlp_ratio=0.1),
            ValueError,
            "^mlp_ratio: expected one that gives",
        ),
        (
            lambda: ConvNeXtBlock(8, drop_path=1.5),
            ValueError,
            "^drop_path: expected 0 to 1, got 1.5",
        ),
        (lambda: ConvNeXtBlock(8)(None), TypeError, "^x: expected a torch.Tensor"),
        (
            lambda: ConvNeXtBlock(8)(torch.ones(2, 8, 3)),
            ValueError,
            r"^x: .* got shape \[2, 8, 3\]",
        ),
        (lambda: MixShiftBlock(9)(torch.ones(2, 8, 3, 3)), ValueError, "^x: .* C = 9, got shape"),
    ],
)
def test_bad_arguments(call: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
