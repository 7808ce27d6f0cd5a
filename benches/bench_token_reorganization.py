"""Token reorganization against eager PyTorch, torch.compile, and the floor of the machine.

The bars are those of two threads and float32.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import viops
from harness import Floor, Harness
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from viops.ops.token_reorganization import reference


def topk_gather(x: Tensor, scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The reorganization as one writes it by hand: topk, its complement, two gathers, a sum."""
    channels = x.shape[2]
    index = scores.topk(keep, dim=1).indices  # [B, keep]
    is_dropped = torch.ones_like(scores, dtype=torch.bool).scatter_(1, index, False)
    dropped = is_dropped.nonzero()[:, 1].view(len(x), -1)  # [B, P - keep]
    patches = x[:, 1:]  # [B, P, C]
    kept = patches.gather(1, index.unsqueeze(-1).expand(-1, -1, channels))
    others = patches.gather(1, dropped.unsqueeze(-1).expand(-1, -1, channels))
    fused = (others * scores.gather(1, dropped).unsqueeze(-1)).sum(dim=1, keepdim=True)
    return torch.cat([x[:, :1], kept, fused.to(x.dtype)], dim=1), index


def reorganize_inputs(
    harness: Harness, batch: int, num_tokens: int, channels: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """x [B, N, C] and scores [B, N - 1], as a softmax gives them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, num_tokens, channels, generator=generator).to(harness.device, dtype)
    scores = torch.randn(batch, num_tokens - 1, generator=generator).softmax(dim=1)
    return x, scores.to(harness.device)


def num_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def gradients(
    call: Callable[..., object], inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]
) -> Callable[[], object]:
    """Forward and backward of a call that returns as many tensors as there are grads, or more."""
    leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)

    def run() -> object:
        outputs = call(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs[: len(grads)], leaves, grads)

    return run


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


full = pytest.mark.full
REORGANIZE_SIZES = [
    pytest.param(
        *(32, 197, 384, 137, torch.float32),
        {"floor": ("<=", 1.4)},
        id="B32-N197-C384-float32",
    ),
    pytest.param(1, 197, 384, 137, torch.float32, {}, id="B1-N197-C384-float32", marks=full),
    pytest.param(8, 577, 768, 404, torch.float32, {}, id="B8-N577-C768-float32", marks=full),
    pytest.param(32, 197, 384, 137, torch.bfloat16, {}, id="B32-N197-C384-bfloat16", marks=full),
]


@pytest.mark.parametrize(
    ("batch", "num_tokens", "channels", "keep", "dtype", "bars"), REORGANIZE_SIZES
)
def bench_reorganize_forward(
    harness: Harness,
    batch: int,
    num_tokens: int,
    channels: int,
    keep: int,
    dtype: torch.dtype,
    bars: dict,
) -> None:
    x, scores = reorganize_inputs(harness, batch, num_tokens, channels, dtype)
    compiled_reference = compiled(reference.reorganize_tokens)
    size = f"B{batch} N{num_tokens} C{channels} keep {keep} {str(dtype).removeprefix('torch.')}"
    harness.compare(
        f"reorganize_tokens forward, {size}",
        {
            "viops": lambda: viops.reorganize_tokens(x, scores, keep),
            "eager": lambda: reference.reorganize_tokens(x, scores, keep),
            "compile": lambda: compiled_reference(x, scores, keep),
            "topk+gather": lambda: topk_gather(x, scores, keep),
        },
        floor=Floor(bytes=num_bytes(x, scores, *viops.reorganize_tokens(x, scores, keep))),
        bars={"cpu": bars},
        calls=20 if batch == 1 else 1,
    )


def bench_reorganize_backward(harness: Harness) -> None:
    keep = 137
    x, scores = reorganize_inputs(harness, 32, 197, 384)
    tokens, index = viops.reorganize_tokens(x, scores, keep)
    grad_tokens = torch.randn_like(tokens)
    compiled_reference = compiled(reference.reorganize_tokens)

    def contender(function: Callable) -> Callable[[], object]:
        return gradients(lambda x, s: function(x, s, keep), (x, scores), (grad_tokens,))

    dropped = num_bytes(x) * (scores.shape[1] - keep) // x.shape[1]
    forward_bytes = num_bytes(x, scores, tokens, index)
    backward_bytes = num_bytes(grad_tokens, scores, index) + dropped + num_bytes(x, scores)
    harness.compare(
        "reorganize_tokens forward + backward, B32 N197 C384 keep 137 float32",
        {
            "viops": contender(viops.reorganize_tokens),
            "eager": contender(reference.reorganize_tokens),
            "compile": contender(compiled_reference),
            "topk+gather": contender(topk_gather),
        },
        floor=Floor(bytes=forward_bytes + backward_bytes),
        bars={"cpu": {"eager": (">=", 8), "compile": (">=", 5)}},
    )


def bench_reorganize_overhead(harness: Harness) -> None:
    x, scores = reorganize_inputs(harness, 1, 5, 8)
    harness.compare(
        "reorganize_tokens forward, a tiny call: B1 N5 C8 keep 2 float32",
        {
            "viops": lambda: viops.reorganize_tokens(x, scores, 2),
            "eager": lambda: reference.reorganize_tokens(x, scores, 2),
            "topk+gather": lambda: topk_gather(x, scores, 2),
        },
        bars={"cpu": {"viops": ("<=", 12e-6)}},
        calls=1000,
    )


def bench_reorganize_overhead_with_gradient(harness: Harness) -> None:
    x, scores = (t.requires_grad_() for t in reorganize_inputs(harness, 1, 5, 8))
    harness.compare(
        "reorganize_tokens forward with requires_grad, a tiny call: B1 N5 C8 keep 2 float32",
        {
            "viops": lambda: viops.reorganize_tokens(x, scores, 2),
            "eager": lambda: reference.reorganize_tokens(x, scores, 2),
            "topk+gather": lambda: topk_gather(x, scores, 2),
        },
        bars={"cpu": {"viops": ("<=", 30e-6)}},
        calls=1000,
    )


def restore_inputs(harness: Harness) -> tuple[Tensor, Tensor]:
    """tokens [32, 139, 384] and index [32, 137]."""
    return viops.reorganize_tokens(*reorganize_inputs(harness, 32, 197, 384), 137)


@full
def bench_restore_forward(harness: Harness) -> None:
    tokens, index = restore_inputs(harness)
    compiled_reference = compiled(reference.restore_tokens)
    harness.compare(
        "restore_tokens forward, B32 N197 C384 keep 137 float32",
        {
            "viops": lambda: viops.restore_tokens(tokens, index, 196),
            "eager": lambda: reference.restore_tokens(tokens, index, 196),
            "compile": lambda: compiled_reference(tokens, index, 196),
        },
        floor=Floor(bytes=num_bytes(tokens, index, viops.restore_tokens(tokens, index, 196))),
    )


@full
def bench_restore_backward(harness: Harness) -> None:
    tokens, index = restore_inputs(harness)
    x = viops.restore_tokens(tokens, index, 196)
    grad_x = torch.randn_like(x)
    compiled_reference = compiled(reference.restore_tokens)

    def contender(function: Callable) -> Callable[[], object]:
        return gradients(lambda t: function(t, index, 196), (tokens,), (grad_x,))

    harness.compare(
        "restore_tokens forward + backward, B32 N197 C384 keep 137 float32",
        {
            "viops": contender(viops.restore_tokens),
            "eager": contender(reference.restore_tokens),
            "compile": contender(compiled_reference),
        },
        floor=Floor(bytes=2 * num_bytes(tokens, index, x)),
    )


def fused_qkv(harness: Harness, batch: int, num_heads: int, num_tokens: int) -> Tensor:
    """[B, N, 3 * H * 64], as a fused qkv linear gives it."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(batch, num_tokens, 3 * num_heads * 64, generator=generator)
    return qkv.to(harness.device)


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """q, k, v [B, H, N, D]: views of qkv [B, N, 3 * H * D]."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attention_flops(batch: int, num_heads: int, num_tokens: int) -> int:
    return 4 * batch * num_heads * num_tokens**2 * 64


@pytest.mark.parametrize(
    ("num_heads", "num_tokens", "keep_heap", "bars"),
    [
        pytest.param(6, 197, False, {"eager": (">=", 1.25)}, id="B8-H6-N197-D64"),
        # the full matrix takes 128 MB here: once as users meet it, once without its page faults
        pytest.param(12, 577, False, {"eager": (">=", 3)}, id="B8-H12-N577-D64"),
        pytest.param(12, 577, True, {"eager": (">=", 3)}, id="B8-H12-N577-D64-keep-heap"),
    ],
)
def bench_class_attention_forward(
    harness: Harness, num_heads: int, num_tokens: int, keep_heap: bool, bars: dict
) -> None:
    q, k, v = split_heads(fused_qkv(harness, 8, num_heads, num_tokens), num_heads)
    compiled_reference = compiled(reference.class_attention)
    suffix = ", heap kept" if keep_heap else ""
    harness.compare(
        f"class_attention forward, B8 H{num_heads} N{num_tokens} D64 float32{suffix}",
        {
            "viops": lambda: viops.class_attention(q, k, v),
            "sdpa alone": lambda: F.scaled_dot_product_attention(q, k, v),
            "eager": lambda: reference.class_attention(q, k, v),
            "compile": lambda: compiled_reference(q, k, v),
        },
        floor=Floor(flops=attention_flops(8, num_heads, num_tokens)),
        bars={"cpu": {"sdpa alone": ("<=", 1.06), **bars}},
        other_result=("sdpa alone",),
        keep_heap=keep_heap,
    )


@pytest.mark.parametrize(("requires_grad", "limit"), [(False, 12e-6), (True, 30e-6)])
def bench_class_attention_overhead(harness: Harness, requires_grad: bool, limit: float) -> None:
    """Two ops a call: the scores and the attention."""
    q, k, v = (t.requires_grad_(requires_grad) for t in split_heads(fused_qkv(harness, 1, 1, 5), 1))
    suffix = " with requires_grad" if requires_grad else ""
    harness.compare(
        f"class_attention forward{suffix}, a tiny call: B1 H1 N5 D64 float32",
        {
            "viops": lambda: viops.class_attention(q, k, v),
            "eager": lambda: reference.class_attention(q, k, v),
        },
        bars={"cpu": {"viops": ("<=", limit)}},
        calls=1000,
    )


@full
def bench_class_attention_backward(harness: Harness) -> None:
    num_heads = 6
    qkv = fused_qkv(harness, 8, num_heads, 197)
    out, scores = viops.class_attention(*split_heads(qkv, num_heads))
    grads = (torch.randn_like(out), torch.randn_like(scores))
    compiled_reference = compiled(reference.class_attention)

    def contender(function: Callable) -> Callable[[], object]:
        return gradients(lambda qkv: function(*split_heads(qkv, num_heads)), (qkv,), grads)

    def sdpa(*qkv: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*qkv)

    def sdpa_alone() -> Callable[[], object]:
        return gradients(lambda qkv: sdpa(*split_heads(qkv, num_heads)), (qkv,), grads[:1])

    harness.compare(
        "class_attention forward + backward, B8 H6 N197 D64 float32",
        {
            "viops": contender(viops.class_attention),
            "sdpa alone": sdpa_alone(),
            "eager": contender(reference.class_attention),
            "compile": contender(compiled_reference),
        },
        floor=Floor(flops=3 * attention_flops(8, num_heads, 197)),
        other_result=("sdpa alone",),
    )


def bench_deit_forward(harness: Harness) -> None:
    timm = pytest.importorskip("timm", reason="the DeiT-S bench takes the model from timm")
    torch.manual_seed(0)
    unpatched = timm.create_model("deit_small_patch16_224").eval().to(harness.device)
    patched = timm.create_model("deit_small_patch16_224").eval().to(harness.device)
    patched.load_state_dict(unpatched.state_dict())
    viops.patch.evit(patched, keep_rate=0.7, layers=(3, 6, 9))
    images = torch.randn(8, 3, 224, 224, device=harness.device)

    def eager() -> Tensor:
        with viops.use_backend("reference"):
            return patched(images)

    with torch.no_grad():
        flops = count_flops(patched, images)
        record = harness.compare(
            "DeiT-S/16 forward, 224x224, B8, keep 0.7 at layers 3, 6, 9, float32",
            {
                "viops": lambda: patched(images),
                "unpatched": lambda: unpatched(images),
                "eager": eager,
            },
            floor=Floor(flops=flops),
            bars={"cpu": {"unpatched": (">=", 1.45)}},
            other_result=("unpatched",),
            notes={"operations": f"1/{count_flops(unpatched, images) / flops:.2f} of unpatched's"},
        )
    rates = [f"{n} {8 / row['best']:.3g}" for n, row in record["contenders"].items()]
    record["notes"]["images/s"] = ", ".join(rates)


def count_flops(model: torch.nn.Module, images: Tensor) -> int:
    # torch counts attention on the CPU only where it is made of matrix products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images)
    return counter.get_total_flops()
