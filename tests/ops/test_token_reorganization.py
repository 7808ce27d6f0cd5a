"""Token reorganization: what is particular to these ops, beside the contract."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import contract
import pytest
import torch
import torch.nn.functional as F
import viops
from contract import BACKENDS, DTYPES, Backend, case_id, each_backend
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from viops.cases import Case, Draw, amid_nan
from viops.ops.token_reorganization import attention, cases, reference

pytestmark = pytest.mark.filterwarnings("ignore:.*taken away by the test:RuntimeWarning")

DRAW_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=case_id)

backend = each_backend(BACKENDS)


@pytest.fixture
def draw() -> Draw:
    return Draw(torch.float32)


# class_attention


@pytest.mark.parametrize("magnitude", [2.0**0, 2.0**6, 2.0**13, 2.0**50])
def test_softmax_attention_of_large_logits(backend: Backend, draw: Draw, magnitude: float) -> None:
    """Integers, so that the dot products are exact and the softmax alone can err."""
    q, k = (draw.integers(-4, 4, 2, 3, 70, 16) * magnitude for _ in range(2))
    v = draw.normal(2, 3, 70, 16)
    with backend.enter():
        out = viops.softmax_attention(q, k, v, scale=0.25)
    expected = reference.softmax_attention(q.double(), k.double(), v.double(), scale=0.25)
    assert (out.double() - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("case", cases.SOFTMAX_CASES, ids=case_id)
def test_the_softmax_kernel_at_every_level(backend: Backend, case: Case) -> None:
    """Also where torch's op is the usual choice: forced, forward and backward."""
    args, kwargs = case.inputs(torch.float32)
    if backend.backend != "cpu" or args[2].shape != args[0].shape:
        pytest.skip("the kernel alone is tested, which needs v of q's shape")
    with viops.use_backend("cpu"):
        result = contract.run(viops.softmax_attention, args, kwargs)
    doubles = tuple(arg.double() for arg in args)
    truth = contract.run(reference.softmax_attention, doubles, kwargs)
    pairs = list(zip(result.outputs, truth.outputs, strict=True))
    pairs += [(result.grads[i], truth.grads[i]) for i in range(3)]
    for got, expected in pairs:
        assert (got.double() - expected).norm() <= 2e-6 * expected.norm() + 1e-12


def test_softmax_attention_of_one_token_is_its_value(backend: Backend, draw: Draw) -> None:
    q, k, v = (draw.normal(2, 3, 1, 8) for _ in range(3))
    with backend.enter():
        torch.testing.assert_close(viops.softmax_attention(q, k, v), v, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_softmax_attention_hides_no_nan(
    backend: Backend, draw: Draw, name: str, value: float
) -> None:
    """What is NaN in the reference is NaN, and nothing else is."""
    tensors = {key: draw.normal(1, 2, 37, 8) for key in "qkv"}
    tensors[name][0, 1, 20, 3] = value
    with backend.enter():
        out = viops.softmax_attention(**tensors)
    expected = reference.softmax_attention(**{key: t.double() for key, t in tensors.items()})
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_class_attention_is_softmax_attention(backend: Backend, draw: Draw) -> None:
    """Against the formula written out, and not against the reference's own words."""
    q, k, v = (t.double() for t in cases.fused_qkv(draw, 2, 3, 11, 4))
    out, scores = viops.class_attention(q, k, v, num_prefix=2, scale=0.3)
    attention = torch.einsum("bhnd,bhmd->bhnm", q, k).mul(0.3).softmax(dim=-1)
    torch.testing.assert_close(out, torch.einsum("bhnm,bhmd->bhnd", attention, v))
    torch.testing.assert_close(scores, attention.mean(dim=1)[:, 0, 2:].float())


def test_class_attention_layout(backend: Backend, draw: Draw) -> None:
    for q, k, v in (cases.fused_qkv(draw, 2, 3, 11, 4), cases.queries(draw, 2, 3, 11, 4, count=3)):
        out, _ = viops.class_attention(q, k, v)
        flat = out.transpose(1, 2).reshape(2, 11, 12)
        assert flat.data_ptr() == out.data_ptr()
        assert flat.is_contiguous()


def test_class_attention_scores_are_its_second_output(backend: Backend, draw: Draw) -> None:
    q, k, v = cases.fused_qkv(draw, 2, 3, 11, 4)
    _, scores = viops.class_attention(q, k, v, num_prefix=2, scale=0.3)
    alone = viops.class_attention_scores(q, k, num_prefix=2, scale=0.3)
    torch.testing.assert_close(scores, alone)
    default = viops.class_attention_scores(q, k)
    torch.testing.assert_close(default, viops.class_attention_scores(q, k, scale=0.5))


@pytest.mark.parametrize("output", [0, 1], ids=["out", "scores"])
def test_class_attention_gradient_of_one_output(backend: Backend, draw: Draw, output: int) -> None:
    args = [t.double() for t in cases.fused_qkv(draw, 2, 3, 11, 4)]
    leaves = [t.detach().requires_grad_() for t in args]
    others = [t.detach().requires_grad_() for t in args]
    viops.class_attention(*leaves)[output].square().sum().backward()
    reference.class_attention(*others)[output].square().sum().backward()
    for leaf, other in zip(leaves, others, strict=True):
        if other.grad is None:
            assert leaf.grad is None
        else:
            torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-5, atol=1e-8)


def test_scores_sum_to_what_the_prefix_leaves(backend: Backend, draw: Draw) -> None:
    q, k = cases.queries(draw, 2, 3, 11, 4)
    whole = viops.class_attention_scores(q, k, num_prefix=1)
    fewer = viops.class_attention_scores(q, k, num_prefix=4)
    assert torch.equal(fewer, whole[:, 3:])  # not renormalised
    assert (whole.sum(dim=1) < 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=case_id)
def test_autocast_casts_class_attention(backend: Backend, draw: Draw, dtype: torch.dtype) -> None:
    q, k, v = cases.fused_qkv(draw, 2, 3, 19, 8)
    with torch.autocast("cpu", dtype=dtype):
        out, scores = viops.class_attention(q, k, v)
        expected = F.scaled_dot_product_attention(q, k, v)
    assert out.dtype is expected.dtype is dtype
    assert scores.dtype is torch.float32
    lower = viops.class_attention(q.to(dtype), k.to(dtype), v.to(dtype))
    torch.testing.assert_close(out, lower[0], rtol=0.02, atol=0.02)
    if backend.backend != "reference":
        assert torch.equal(scores, lower[1])


def test_autocast_leaves_the_other_ops_alone(backend: Backend, draw: Draw) -> None:
    q, k = cases.queries(draw, 2, 3, 23, 8)
    x, scores = cases.tokens_and_scores(draw, 2, 23, 7)

    def results() -> list[Tensor]:
        found = viops.class_attention_scores(q, k)
        tokens, index = viops.reorganize_tokens(x, scores, 11)
        return [found, tokens, index, viops.restore_tokens(tokens, index, 22)]

    expected = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for result, wanted in zip(results(), expected, strict=True):
            assert result.dtype == wanted.dtype
            assert torch.equal(result, wanted)


def test_autocast_with_gradient(backend: Backend, draw: Draw) -> None:
    """A block as mixed-precision training runs it: float32 parameters, bfloat16 tokens."""
    module = viops.nn.ClassAttention(24, num_heads=3)
    x = draw.normal(2, 17, 24).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, scores = module(x)
        tokens, _ = viops.reorganize_tokens(out, scores, 9)
    assert tokens.dtype is torch.bfloat16
    tokens.float().square().sum().backward()
    assert x.grad.dtype is torch.float32
    for parameter in (x, *module.parameters()):
        assert parameter.grad.isfinite().all()


# reorganize_tokens and restore_tokens


def test_order_is_that_of_a_stable_sort(backend: Backend) -> None:
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[0.0, nan, -0.0, inf, 1.0, -inf, nan, 1.0, 0.0, -1.0]])
    x = torch.arange(11.0).reshape(1, 11, 1)
    _, index = viops.reorganize_tokens(x, scores, 9)
    assert index.tolist() == [[1, 6, 3, 4, 7, 0, 2, 8, 9]]


@pytest.mark.parametrize("num_patches", [2, 31, 64, 129, 511, 512, 513, 1025, 4097])
@DRAW_DTYPES
def test_index_of_many_lengths(backend: Backend, num_patches: int, dtype: torch.dtype) -> None:
    draw = Draw(dtype, seed=num_patches)
    scores = draw.normal(3, num_patches)
    scores[1] = scores[1].round()  # many ties
    scores[2, ::3] = float("nan")
    x = draw.normal(3, num_patches + 1, 1)
    for keep in (1, num_patches // 2, num_patches - 1):
        _, index = viops.reorganize_tokens(x, scores, keep)
        order = scores.sort(dim=1, descending=True, stable=True).indices
        assert torch.equal(index, order[:, :keep])


def test_the_fused_token_is_the_weighted_sum(backend: Backend, draw: Draw) -> None:
    x, scores = cases.tokens_and_scores(draw, 2, 9, 5, num_prefix=2)
    tokens, index = viops.reorganize_tokens(x, scores, 3, num_prefix=2)
    for b in range(2):
        kept = index[b].tolist()
        dropped = [i for i in range(7) if i not in kept]
        fused = sum(scores[b, i] * x[b, 2 + i] for i in dropped)
        torch.testing.assert_close(tokens[b, -1], fused)
        assert torch.equal(tokens[b, :2], x[b, :2])
        assert torch.equal(tokens[b, 2:5], x[b, 2:][kept])


def test_keep_all_returns_x_itself(backend: Backend, draw: Draw) -> None:
    x, scores = cases.tokens_and_scores(draw, 2, 9, 5)
    for fuse in (False, True):
        tokens, index = viops.reorganize_tokens(x, scores, 8, fuse=fuse)
        assert tokens is x
        assert index.tolist() == [list(range(8))] * 2
        assert index.is_contiguous()


def test_round_trip(backend: Backend, draw: Draw) -> None:
    x, scores = cases.tokens_and_scores(draw, 2, 9, 5)
    for fuse in (False, True):
        tokens, index = viops.reorganize_tokens(x, scores, 3, fuse=fuse)
        restored = viops.restore_tokens(tokens, index, 8)
        for b in range(2):
            for place in range(8):
                if place in index[b]:
                    wanted = x[b, 1 + place]
                else:
                    wanted = tokens[b, -1] if fuse else torch.zeros(5)
                assert torch.equal(restored[b, 1 + place], wanted)
            assert torch.equal(restored[b, 0], x[b, 0])


def test_scores_take_gradient_through_the_fused_token_alone(backend: Backend, draw: Draw) -> None:
    x, scores = cases.tokens_and_scores(draw, 2, 9, 5)
    scores.requires_grad_()
    tokens, index = viops.reorganize_tokens(x, scores, 3)
    (grad,) = torch.autograd.grad(tokens.sum(), scores)
    expected = x[:, 1:].sum(dim=-1).scatter(1, index, 0)
    torch.testing.assert_close(grad, expected)
    tokens, _ = viops.reorganize_tokens(x.requires_grad_(), scores, 3, fuse=False)
    tokens.sum().backward()
    assert scores.grad is None
    assert x.grad is not None


def test_index_takes_no_gradient(backend: Backend, draw: Draw) -> None:
    x, scores = cases.tokens_and_scores(draw, 2, 9, 5)
    _, index = viops.reorganize_tokens(x.requires_grad_(), scores.requires_grad_(), 3)
    assert not index.requires_grad


def test_only_asked_gradients_are_computed(draw: Draw) -> None:
    """What the backward op is asked for: None and False stand for a gradient nobody wants."""
    x, scores = cases.tokens_and_scores(draw, 2, 9, 5)

    def asked_of_backward(x: Tensor, scores: Tensor) -> tuple[bool, bool]:
        with contract.Recorder() as recorder:
            viops.reorganize_tokens(x, scores, 3)[0].sum().backward()
        op, args = recorder.calls[-1]
        assert op.__name__.startswith("reorganize_tokens_backward")
        return args[5], args[1] is not None

    leaf = Tensor.requires_grad_
    assert asked_of_backward(leaf(x.clone()), scores) == (True, False)
    assert asked_of_backward(x, leaf(scores.clone())) == (False, True)
    assert asked_of_backward(leaf(x.clone()), leaf(scores.clone())) == (True, True)


def test_operation_counts(draw: Draw) -> None:
    q, k = cases.queries(draw, 2, 3, 17, 8)
    x, scores = cases.tokens_and_scores(draw, 2, 17, 5)

    def count(function: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    assert count(lambda: viops.class_attention_scores(q, k)) == 2 * 2 * 3 * 17 * 8
    assert count(lambda: viops.reorganize_tokens(x, scores, 6)) == 2 * 2 * 10 * 5
    assert count(lambda: viops.reorganize_tokens(x, scores, 6, fuse=False)) == 0
    x.requires_grad_()
    assert count(lambda: viops.reorganize_tokens(x, scores, 6)[0].sum().backward()) == 300


# modules


MODULES = [
    (
        lambda: viops.nn.ClassAttention(24, num_heads=3, qkv_bias=True, num_prefix=2),
        lambda draw: (draw.normal(2, 13, 24),),
        ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"],
    ),
    (
        lambda: viops.nn.TokenReorganization(0.5, num_prefix=2, fuse=False),
        lambda draw: cases.tokens_and_scores(draw, 2, 13, 24, num_prefix=2),
        [],
    ),
]


@pytest.mark.parametrize(("build", "inputs", "keys"), MODULES)
def test_modules_copy_pickle_and_load(
    build: Callable, inputs: Callable, keys: list[str], draw: Draw
) -> None:
    module = build().eval()
    args = inputs(draw)
    assert list(module.state_dict()) == keys
    expected = module(*args)
    loaded = build()
    loaded.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        for out, wanted in zip(other(*args), expected, strict=True):
            assert torch.equal(out, wanted)
    assert "0.5" in repr(module) or "ClassAttention" in repr(module)


def test_class_attention_module_is_the_attention_of_timm(draw: Draw) -> None:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    theirs = timm.layers.Attention(24, num_heads=3, qkv_bias=True).eval()
    ours = viops.nn.ClassAttention(24, num_heads=3, qkv_bias=True).eval()
    ours.load_state_dict(theirs.state_dict())
    x = draw.normal(2, 13, 24)
    torch.testing.assert_close(ours(x)[0], theirs(x))


def test_token_reorganization_module_rounds_up(draw: Draw) -> None:
    x, scores = cases.tokens_and_scores(draw, 2, 12, 5)
    tokens, index = viops.nn.TokenReorganization(0.7)(x, scores)
    assert index.shape == (2, 8)  # ceil(0.7 * 11)
    assert tokens.shape == (2, 10, 5)


@pytest.mark.parametrize(
    ("build", "argument"),
    [
        (lambda: viops.nn.ClassAttention(24, num_heads=5), "num_heads"),
        (lambda: viops.nn.ClassAttention(24, num_heads=0), "num_heads"),
        (lambda: viops.nn.TokenReorganization(0), "keep_rate"),
        (lambda: viops.nn.TokenReorganization(1.5), "keep_rate"),
    ],
)
def test_modules_refuse_bad_arguments(build: Callable, argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: expected"):
        build()


def test_what_torchs_kernels_on_a_gpu_need() -> None:
    """Rows at multiples of 16 bytes; a copy is the same on the CPU."""
    aligned = torch.randn(2, 3, 5, 8)
    assert attention._aligned(aligned) is aligned
    assert attention._aligned(aligned[:1, :, 1:2]).data_ptr() == aligned[:1, :, 1:2].data_ptr()
    for odd in (amid_nan(aligned), aligned.mT, aligned.half()[..., 4:]):
        copy = attention._aligned(odd)
        assert torch.equal(copy, odd)
        assert copy.is_contiguous()
        assert copy.data_ptr() != odd.data_ptr()


class _OnGpu(torch.Tensor):
    """Says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("scale", [-0.7, -0.0, 0.0, 0.3])
def test_the_factor_given_to_torchs_kernels_on_a_gpu(
    scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    expected = reference.softmax_attention(q, k, v, scale=scale)
    plain = torch.nn.functional.scaled_dot_product_attention

    def positive(*tensors: Tensor, scale: float) -> Tensor:
        assert scale > 0
        return plain(*tensors, scale=scale)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", positive)
    found = attention._torch_attention(q.as_subclass(_OnGpu), k, v, scale)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), expected)
