"""Decayed attention: what is particular to it, beside the contract."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import viops
from contract import BACKENDS, Backend, Recorder, case_id, each_backend
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from viops.cases import Draw
from viops.ops.decayed_attention import cases

pytestmark = pytest.mark.filterwarnings("ignore:.*taken away by the test:RuntimeWarning")

AXIAL = pytest.mark.parametrize("axial", [False, True], ids=["whole", "axial"])

backend = each_backend(BACKENDS)


@pytest.fixture
def draw() -> Draw:
    return Draw(torch.float32)


# the op


def rotated(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Each pair of channels as a complex number, turned."""
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turns = torch.complex(cos[..., ::2].double(), sin[..., ::2].double())
    return torch.view_as_real(pairs * turns).flatten(-2)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None
) -> Tensor:
    """torch's own attention with a mask of decays."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def plain(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, axial: bool, scale: float | None = None
) -> Tensor:
    """The formula in float64, and not in the reference's own words."""
    q, k, v, log_decay = (t.double() for t in (q, k, v, log_decay))
    height, width = q.shape[2:4]
    y, x = torch.arange(height), torch.arange(width)
    far_y, far_x = (y[:, None] - y).abs(), (x[:, None] - x).abs()
    decay = log_decay[:, None, None, None]
    if axial:
        rows = masked_attention(
            *(t.flatten(0, 1).transpose(0, 1) for t in (q, k, v)),
            (decay[:, 0] * far_x).repeat(q.shape[0], 1, 1),
            scale,
        )
        rows = rows.transpose(0, 1).unflatten(0, q.shape[:2])
        columns = masked_attention(
            *(t.flatten(0, 1).permute(2, 0, 1, 3) for t in (q, k, rows)),
            (decay[:, 0] * far_y).repeat(q.shape[0], 1, 1),
            scale,
        )
        return columns.permute(1, 2, 0, 3).unflatten(0, q.shape[:2])
    far = far_y[:, None, :, None] + far_x[None, :, None, :]  # [h, w, h, w]
    mask = log_decay[:, None, None] * far.reshape(height * width, height * width)
    out = masked_attention(*(t.flatten(2, 3) for t in (q, k, v)), mask, scale)
    return out.unflatten(2, (height, width))


@AXIAL
def test_the_formula(backend: Backend, draw: Draw, axial: bool) -> None:
    q, k, v, log_decay = cases.inputs(draw, 2, 3, 5, 7, 8, 6)
    sin, cos = cases.angles(5, 7, 8)(draw)
    out = viops.decayed_attention(q, k, v, log_decay, axial=axial)
    expected = plain(q, k, v, log_decay, axial)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    options = {"rotation": (sin, cos), "scale": 0.9, "axial": axial}
    out = viops.decayed_attention(q, k, v, log_decay, **options)
    expected = plain(rotated(q, sin, cos), rotated(k, sin, cos), v, log_decay, axial, 0.9)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


@AXIAL
def test_numbers_worked_out_by_hand(backend: Backend, axial: bool) -> None:
    """A grid of 1 x 3 with equal dot products: weights 1/2, 1/4, ... by the distance alone."""
    q = torch.zeros(1, 1, 1, 3, 2)
    v = torch.tensor([8.0, 16.0, 32.0]).reshape(1, 1, 1, 3, 1)
    log_decay = torch.tensor([0.5]).log()
    for t, shape in ((v, (1, 3)), (v.transpose(2, 3), (3, 1))):
        zeros = q.reshape(1, 1, *shape, 2)
        out = viops.decayed_attention(zeros, zeros, t, log_decay, axial=axial)
        expected = torch.tensor([96 / 7, 18.0, 168 / 7])
        torch.testing.assert_close(out.flatten(), expected)


@AXIAL
def test_gradient_of_the_decay_against_differences(backend: Backend, axial: bool) -> None:
    draw = Draw(torch.float64)
    q, k, v, log_decay = cases.inputs(draw, 2, 3, 4, 5, 8)
    weight = draw.normal(2, 3, 4, 5, 8)

    def loss(decay: Tensor) -> Tensor:
        return (viops.decayed_attention(q, k, v, decay, axial=axial) * weight).sum()

    (grad,) = torch.autograd.grad(loss(log_decay.requires_grad_()), log_decay)
    for head in range(3):
        step = torch.zeros(3, dtype=torch.float64)
        step[head] = 1e-5
        change = (loss(log_decay.detach() + step) - loss(log_decay.detach() - step)) / 2e-5
        torch.testing.assert_close(grad[head], change, rtol=1e-7, atol=1e-8)


@AXIAL
def test_the_result_flattens_for_free(backend: Backend, draw: Draw, axial: bool) -> None:
    for value_dim in (8, 5):
        q, k, v, log_decay = cases.inputs(draw, 2, 3, 4, 5, 8, value_dim)
        for contiguous in (False, True):
            if contiguous:
                q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            out = viops.decayed_attention(q, k, v, log_decay, axial=axial)
            flat = out.permute(0, 2, 3, 1, 4).flatten(-2)
            assert flat.data_ptr() == out.data_ptr()
            assert flat.is_contiguous()


@AXIAL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)
def test_autocast_casts_as_torchs_attention(
    backend: Backend, draw: Draw, dtype: torch.dtype, axial: bool
) -> None:
    q, k, v, log_decay = cases.inputs(draw, 2, 3, 4, 5, 8)
    rotation = cases.angles(4, 5, 8)(draw)
    with torch.autocast("cpu", dtype=dtype):
        out = viops.decayed_attention(q, k, v, log_decay, axial=axial, rotation=rotation)
    assert out.dtype is dtype
    lower = viops.decayed_attention(
        q.to(dtype), k.to(dtype), v.to(dtype), log_decay, axial=axial, rotation=rotation
    )
    torch.testing.assert_close(out, lower, rtol=0.02, atol=0.02)
    if backend.backend != "reference":
        assert torch.equal(out, lower)


def test_no_decay_gradient_is_computed_unless_asked(draw: Draw) -> None:
    *tensors, log_decay = cases.inputs(draw, 2, 3, 4, 5, 8)
    leaves = [t.detach().requires_grad_() for t in tensors]
    for asked in (False, True):
        with Recorder() as recorder:
            viops.decayed_attention(*leaves, log_decay.requires_grad_(asked)).sum().backward()
        op, args = recorder.calls[-1]
        assert op.__name__.startswith("decayed_attention_backward")
        assert args[-1] is asked


def test_operation_count(draw: Draw) -> None:
    q, k, v, log_decay = cases.inputs(draw, 2, 3, 4, 5, 8, 6)
    for axial, pairs in ((False, 20 * 20), (True, 20 * 9)):
        with FlopCounterMode(display=False) as counter:
            out = viops.decayed_attention(q.requires_grad_(), k, v, log_decay, axial=axial)
        assert counter.get_total_flops() == 2 * 2 * 3 * pairs * (8 + 6)
        with FlopCounterMode(display=False) as counter:
            out.sum().backward()
        assert counter.get_total_flops() == 2 * 2 * 3 * pairs * (3 * 8 + 2 * 6)


# modules


def modules(
    axial: bool = False, **options: object
) -> tuple[viops.nn.ManhattanSelfAttention, viops.nn.RelativePosition2d]:
    torch.manual_seed(0)
    attention = viops.nn.ManhattanSelfAttention(24, 3, axial=axial, **options)
    return attention, viops.nn.RelativePosition2d(24, 3, initial_value=2, heads_range=4)


def gradients(module: torch.nn.Module, out: Tensor) -> list[Tensor]:
    module.zero_grad()
    out.square().sum().backward()
    return [parameter.grad for parameter in module.parameters()]


def test_state_dict_keys() -> None:
    attention, position = modules()
    layers = ("q_proj", "k_proj", "v_proj", "lepe.conv", "out_proj")
    keys = [f"{layer}.{name}" for layer in layers for name in ("weight", "bias")]
    assert list(attention.state_dict()) == keys
    assert list(position.state_dict()) == ["angle", "decay"]
    position(4, 5)
    assert list(position.state_dict()) == ["angle", "decay"]
    learnable, _ = modules(learnable_decay=True)
    assert set(learnable.state_dict()) == {*keys, "log_exponent"}


def test_value_factor(backend: Backend, draw: Draw) -> None:
    attention, position = modules(value_factor=2)
    x = draw.normal(2, 4, 5, 24)
    assert attention.v_proj.weight.shape == attention.out_proj.weight.T.shape == (48, 24)
    assert attention(x, position(4, 5)).shape == x.shape
    assert attention.lepe.conv.weight.shape == (48, 1, 5, 5)


@AXIAL
def test_learnable_decay(backend: Backend, draw: Draw, axial: bool) -> None:
    """It begins as the fixed one, takes a gradient, and makes decays that are still decays."""
    attention, position = modules(axial)
    learnable, _ = modules(axial, learnable_decay=True)
    learnable.load_state_dict(attention.state_dict(), strict=False)
    x = draw.normal(2, 4, 5, 24)
    assert torch.equal(learnable(x, position(4, 5)), attention(x, position(4, 5)))
    learnable(x, position(4, 5)).square().sum().backward()
    assert learnable.log_exponent.grad.shape == (3,)
    assert (learnable.log_exponent.grad != 0).all()
    with torch.no_grad():
        learnable.log_exponent.fill_(torch.tensor(2.0).log())  # squares the decays
        squared = position(4, 5)._replace(log_decay=position.decay * 2)
        torch.testing.assert_close(learnable(x, position(4, 5)), attention(x, squared))


def test_positions(draw: Draw) -> None:
    """Tokens turn by their number times the angle, row by row; decays are logarithms."""
    _, position = modules()
    (sin, cos), log_decay = position(4, 5)
    assert sin.shape == cos.shape == (4, 5, 8)
    angles = torch.tensor([10000.0 ** -(i // 2 / 3) for i in range(8)])
    for row, column in ((0, 0), (0, 4), (3, 2)):
        torch.testing.assert_close(sin[row, column], (angles * (5 * row + column)).sin())
        torch.testing.assert_close(cos[row, column], (angles * (5 * row + column)).cos())
    decays = torch.tensor([1 - 2.0 ** -(2 + 4 * head / 3) for head in range(3)])
    torch.testing.assert_close(log_decay.exp(), decays)


def test_tables_are_kept_and_forgotten() -> None:
    _, position = modules()
    (sin, _), _ = position(4, 5)
    assert position(4, 5).rotation[0] is sin
    assert position(5, 4).rotation[0] is not sin
    assert position.double()(4, 5).rotation[0].dtype is torch.float64
    state = {name: value * 2 for name, value in position.state_dict().items()}
    position.load_state_dict(state)
    torch.testing.assert_close(position(4, 5).rotation[0][0, 1], position.angle.sin())
    for width in range(1, 30):
        position(1, width)
    assert len(position._tables) <= 8
    copied = copy.deepcopy(position)
    assert not copied._tables
    assert torch.equal(copied(4, 5).rotation[1], position(4, 5).rotation[1])


def test_tables_made_in_inference_mode_serve_training(backend: Backend, draw: Draw) -> None:
    attention, position = modules()
    x = draw.normal(2, 4, 5, 24)
    with torch.inference_mode():
        expected = attention(x, position(4, 5))
    out = attention(x, position(4, 5))
    out.sum().backward()
    torch.testing.assert_close(out, expected.clone())


def test_tables_of_a_trace_are_not_kept() -> None:
    _, position = modules()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        position(4, 5)
    torch.func.vmap(lambda x: x + position(4, 5).rotation[0])(torch.zeros(2, 1))
    assert not position._tables
    assert type(position(4, 5).rotation[0]) is Tensor


def test_half_precision_keeps_angles_and_decays() -> None:
    """In bfloat16 an angle of 1e-4 and place 1,000 are off by more than a token."""
    _, position = modules()
    wide = position(30, 40)
    for dtype in (torch.bfloat16, torch.float16):
        narrow = copy.deepcopy(position).to(dtype)(30, 40)
        assert torch.equal(narrow.rotation[0], wide.rotation[0])
        assert torch.equal(narrow.log_decay, wide.log_decay)
    attention, _ = modules()
    x = torch.randn(1, 30, 40, 24, generator=torch.Generator().manual_seed(0))
    expected = attention(x, wide)
    out = attention.bfloat16()(x.bfloat16(), position.bfloat16()(30, 40))
    assert out.dtype is torch.bfloat16
    assert (out - expected).norm() < 0.02 * expected.norm()
    assert position.double().angle.dtype is torch.float64
    assert position.half().angle.dtype is torch.float32


@AXIAL
def test_modules_copy_pickle_and_load(backend: Backend, draw: Draw, axial: bool) -> None:
    attention, position = modules(axial, learnable_decay=True)
    x = draw.normal(2, 4, 5, 24)
    expected = attention(x, position(4, 5))
    loaded, _ = modules(axial, learnable_decay=True)
    loaded.load_state_dict(attention.state_dict())
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention)), loaded):
        moved = pickle.loads(pickle.dumps(position))
        assert torch.equal(other(x, moved(4, 5)), expected)
    assert f"num_heads=3, axial={axial}" in repr(attention)
    assert "initial_value=2, heads_range=4" in repr(position)


@AXIAL
def test_checkpointing_gives_the_same_gradients(backend: Backend, draw: Draw, axial: bool) -> None:
    attention, position = modules(axial, learnable_decay=True)
    x = draw.normal(2, 4, 5, 24).requires_grad_()
    expected = gradients(attention, attention(x, position(4, 5)))
    for reentrant in (False, True):
        out = torch.utils.checkpoint.checkpoint(
            attention, x, position(4, 5), use_reentrant=reentrant
        )
        for got, grad in zip(gradients(attention, out), expected, strict=True):
            assert torch.equal(got, grad)


@pytest.mark.parametrize(
    ("compiler", "axial"), [("aot_eager", False), ("aot_eager", True), ("inductor", True)]
)
def test_compile_without_graph_breaks(compiler: str, draw: Draw, axial: bool) -> None:
    """The position in the graph too; the official axial form fails in inductor of torch 2.13."""
    attention, position = modules(axial, learnable_decay=True)

    def call(x: Tensor) -> Tensor:
        return attention(x, position(4, 5))

    x = draw.normal(2, 4, 5, 24)
    expected = call(x)
    grads = gradients(attention, expected)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    for _ in range(2):
        out = compiled(x)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
        for got, grad in zip(gradients(attention, out), grads, strict=True):
            torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: viops.nn.ManhattanSelfAttention(24, 5), "num_heads"),
        (lambda: viops.nn.ManhattanSelfAttention(24, 0), "num_heads"),
        (lambda: viops.nn.RelativePosition2d(24, 5, 2, 4), "num_heads"),
        (lambda: viops.nn.RelativePosition2d(9, 3, 2, 4), "embed_dim"),
    ],
)
def test_modules_refuse_bad_arguments(build: Callable, argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: expected"):
        build()
