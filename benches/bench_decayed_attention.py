"""Decayed attention against the official formulation in eager PyTorch and torch.compile, and the
floor of the machine.

The bars are those of two threads and float32.  Forward and backward together, too, are counted in
floors of the forward: their own operations are 3.5 of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import eager_rmt
import pytest
import torch
import torch.nn.functional as F
import viops
from harness import Floor, Harness
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from viops.cases import Draw
from viops.ops.decayed_attention import cases, reference

Function = Callable[[Tensor, Tensor, Tensor], Tensor]

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16

on_cpu = pytest.mark.device("cpu")
on_cuda = pytest.mark.device("cuda")

#: Batch, heads, side of the grid, channels a head, of the stages of the RMT models.
STAGES = {
    "stage 1": (8, 4, 56, 16),
    "stage 2": (8, 4, 28, 32),
    "stage 3 axial": (8, 8, 14, 32),
    "stage 3": (8, 8, 14, 32),
}


class Official:
    """Decayed attention as the RMT authors write it: permutes, masks and matrix products.

    The masks are made once, beforehand, as their models make them once for a stage.
    """

    def __init__(self, log_decay: Tensor, rotation: tuple[Tensor, Tensor], side: int) -> None:
        self.rotation = rotation  # sin and cos, each [h, w, D]
        self.line_mask = eager_rmt.line_mask(log_decay, side)  # [H, side, side]
        self.grid_mask = eager_rmt.grid_mask(log_decay, side, side)  # [H, N, N]

    def axial(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, h, w, D] each."""
        masks = (self.line_mask, self.line_mask)
        return eager_rmt.attend_axially(q, k, v, self.rotation, masks)

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return eager_rmt.attend_whole(q, k, v, self.rotation, self.grid_mask)

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = eager_rmt.rotated(q, k, self.rotation)
        q, k, values = (t.flatten(2, 3) for t in (*turned, v))
        out = F.scaled_dot_product_attention(q, k, values, attn_mask=self.grid_mask, scale=1.0)
        return out.reshape(v.shape)


def contenders(official: Official, log_decay: Tensor, axial: bool) -> dict[str, Function]:
    eager = official.axial if axial else official.whole
    rotation = official.rotation
    functions = {
        "viops": lambda q, k, v: viops.decayed_attention(
            q, k, v, log_decay, axial=axial, rotation=rotation
        ),
        "eager": eager,
        "compile": torch.compile(eager, dynamic=False),
    }
    return functions if axial else {**functions, "sdpa with a mask": official.sdpa}


def forward_backward(function: Function) -> Callable[..., object]:
    """Gradients to q, k and v for that of the output, the last argument."""

    def run(q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor) -> object:
        return torch.autograd.grad(function(q, k, v), (q, k, v), grad_out)

    return run


@on_cpu
@pytest.mark.parametrize(
    ("stage", "backward", "bars"),
    [
        ("stage 1", False, {"floor": ("<=", 2.2)}),
        ("stage 1", True, {"floor": ("<=", 6.2), "eager": (">=", 3.2)}),
        ("stage 2", False, {"floor": ("<=", 2.2)}),
        ("stage 2", True, {"floor": ("<=", 7.2), "eager": (">=", 2.6)}),
        ("stage 3 axial", False, {"floor": ("<=", 2.6)}),
        ("stage 3 axial", True, {"floor": ("<=", 9), "eager": (">=", 3)}),
        ("stage 3", False, {"floor": ("<=", 1.4)}),
        ("stage 3", True, {"floor": ("<=", 4.4), "eager": (">=", 1.9)}),
    ],
)
def bench_decayed_attention(harness: Harness, stage: str, backward: bool, bars: dict) -> None:
    batch, num_heads, side, head_dim = STAGES[stage]
    axial = stage != "stage 3"
    draw = Draw(torch.float32, str(harness.device))
    log_decay = cases.log_decays(draw, num_heads)
    rotation = cases.angles(side, side, head_dim)(draw)
    functions = contenders(Official(log_decay, rotation, side), log_decay, axial)

    def make(seed: int) -> tuple[Tensor, ...]:
        """q, k, v and, for the backward, grad_out: [B, H, h, w, D]."""
        draw = Draw(torch.float32, str(harness.device), seed)
        made = cases.projected(draw, batch, num_heads, side, side, head_dim, 3 + backward)
        return tuple(t.detach().requires_grad_(backward and i < 3) for i, t in enumerate(made))

    inputs = harness.input_sets(make)
    q = inputs[0][0]
    pairs = q.numel() // head_dim * (2 * side if axial else side**2)
    harness.compare(
        f"decayed_attention {'axial' if axial else 'whole'} forward{' + backward' * backward}, "
        f"B{batch} H{num_heads} {side}x{side} D{head_dim} float32",
        {name: forward_backward(f) for name, f in functions.items()} if backward else functions,
        inputs=inputs,
        floor=Floor(bytes=4 * q.nbytes, flops=4 * pairs * head_dim),
        bars={"cpu": bars},
    )


class OnGpu:
    """What stands for decayed attention in torch's fused attention; nothing is rotated."""

    def __init__(self, log_decay: Tensor, side: int) -> None:
        self.side = side
        self.log_decay = log_decay  # [H]
        self.line_mask = eager_rmt.line_mask(log_decay, side).bfloat16()  # [H, side, side]

    def flex(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, h, w, D] each: the whole form, with the decay as a score_mod."""
        log_decay, side = self.log_decay, self.side

        def decay(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            rows = (query // side - key // side).abs()
            columns = (query % side - key % side).abs()
            return score + log_decay[h] * (rows + columns)

        out = flex_attention(*(t.flatten(2, 3) for t in (q, k, v)), score_mod=decay)
        return out.reshape(v.shape)

    def axial(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """scaled_dot_product_attention of rows, then of columns, with masks."""
        rows = (t.permute(0, 2, 1, 3, 4).flatten(0, 1) for t in (q, k, v))  # [B h, H, w, D]
        inner = F.scaled_dot_product_attention(*rows, attn_mask=self.line_mask)
        inner = inner.unflatten(0, (q.shape[0], -1)).transpose(1, 2)  # [B, H, h, w, D]
        columns = (t.permute(0, 3, 1, 2, 4).flatten(0, 1) for t in (q, k, inner))
        out = F.scaled_dot_product_attention(*columns, attn_mask=self.line_mask)  # [B w, H, h, D]
        return out.unflatten(0, (q.shape[0], -1)).permute(0, 2, 3, 1, 4)


@on_cuda
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("batch", "num_heads", "side", "head_dim", "axial"),
    [
        (64, 8, 14, 32, False),
        (16, 8, 28, 32, False),
        (4, 8, 56, 32, False),
        (64, 4, 56, 16, True),
        (64, 4, 28, 32, True),
        (64, 8, 14, 32, True),
    ],
)
def bench_decayed_attention_bfloat16(
    harness: Harness,
    batch: int,
    num_heads: int,
    side: int,
    head_dim: int,
    axial: bool,
    backward: bool,
) -> None:
    log_decay = cases.log_decays(Draw(torch.float32, str(harness.device)), num_heads)
    torchs = OnGpu(log_decay, side)
    functions: dict[str, Function] = {
        "viops": lambda q, k, v: viops.decayed_attention(q, k, v, log_decay, axial=axial)
    }
    if axial:
        functions["sdpa with a mask"] = torchs.axial
    else:
        functions["flex"] = torch.compile(torchs.flex, dynamic=False)

    def make(seed: int) -> tuple[Tensor, ...]:
        draw = Draw(BFLOAT16, str(harness.device), seed)
        made = cases.projected(draw, batch, num_heads, side, side, head_dim, 3 + backward)
        return tuple(t.detach().requires_grad_(backward and i < 3) for i, t in enumerate(made))

    inputs = harness.input_sets(make)
    q = inputs[0][0]
    pairs = q.numel() // head_dim * (2 * side if axial else side**2)
    harness.compare(
        f"decayed_attention {'axial' if axial else 'whole'} forward{' + backward' * backward}, "
        f"B{batch} H{num_heads} {side}x{side} D{head_dim} bfloat16",
        {name: forward_backward(f) for name, f in functions.items()} if backward else functions,
        inputs=inputs,
        floor=Floor(bytes=4 * q.nbytes, flops=4 * pairs * head_dim, dtype=BFLOAT16),
        bars={"cuda": {"sdpa with a mask": (">=", 3)} if axial else {"flex": (">=", 1.2)}},
        calls=20,
    )


@on_cpu
def bench_decayed_attention_memory(harness: Harness) -> None:
    """The whole form at a size at which matrices of logits are large."""
    batch, num_heads, side, head_dim = 8, 8, 28, 32
    draw = Draw(torch.float32, str(harness.device))
    log_decay = cases.log_decays(draw, num_heads)
    rotation = cases.angles(side, side, head_dim)(draw)
    functions = contenders(Official(log_decay, rotation, side), log_decay, axial=False)
    made = cases.projected(draw, batch, num_heads, side, side, head_dim, 4)
    harness.compare_memory(
        f"decayed_attention whole forward + backward, peak memory, "
        f"B{batch} H{num_heads} {side}x{side} D{head_dim} float32",
        {name: forward_backward(functions[name]) for name in ("viops", "eager")},
        inputs=tuple(t.detach().requires_grad_(i < 3) for i, t in enumerate(made)),
        bars={"cpu": {"eager": ("<=", 0.25)}},
    )


@pytest.mark.parametrize(
    ("name", "batch", "dtype", "training", "bars"),
    [
        pytest.param("rmt_t", 4, FLOAT32, False, {"eager": (">=", 1.5)}, marks=on_cpu),
        pytest.param("rmt_t", 4, FLOAT32, True, {"eager": (">=", 1.4)}, marks=on_cpu),
        pytest.param("rmt_s", 64, BFLOAT16, False, {}, marks=on_cuda),
        pytest.param("rmt_s", 64, BFLOAT16, True, {"eager": (">=", 1.5)}, marks=on_cuda),
    ],
)
def bench_rmt(
    harness: Harness, name: str, batch: int, dtype: torch.dtype, training: bool, bars: dict
) -> None:
    """A whole model, or a training step of it without the optimizer."""
    torch.manual_seed(0)
    model = getattr(viops.models, name)(drop_path_rate=0.0).to(harness.device)
    images = torch.randn(batch, 3, 224, 224, device=harness.device)
    models = {"viops": model, "eager": eager_rmt.eager_rmt(model)}
    for contender in models.values():
        contender.train(training)

    def forward(contender: torch.nn.Module, images: Tensor) -> Tensor:
        with torch.autocast(harness.device.type, dtype, enabled=dtype is not FLOAT32):
            return contender(images)

    def step(contender: torch.nn.Module, images: Tensor) -> tuple[Tensor, ...]:
        """The loss, and of the gradients of all parameters that to the classifier's weight."""
        loss = forward(contender, images).float().square().mean()
        parameters = dict(contender.named_parameters())
        grads = torch.autograd.grad(loss, list(parameters.values()))
        return loss, grads[list(parameters).index("head.weight")]

    run = step if training else forward
    with torch.set_grad_enabled(training):
        record = harness.compare(
            f"{name} {'training step' if training else 'forward'}, 224x224, B{batch}, "
            f"{str(dtype).removeprefix('torch.')}",
            {key: functools.partial(run, contender) for key, contender in models.items()},
            inputs=[(images,)],
            bars={harness.device.type: bars},
        )
    rates = [f"{n} {batch / row['best']:.3g}" for n, row in record["contenders"].items()]
    record["notes"]["images/s"] = ", ".join(rates)


@on_cpu
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("requires_grad", "limit"), [(False, 12e-6), (True, 30e-6)])
def bench_decayed_attention_overhead(
    harness: Harness, requires_grad: bool, limit: float, rotated: bool
) -> None:
    draw = Draw(torch.float32, str(harness.device))
    q, k, v, log_decay = cases.inputs(draw, 1, 1, 2, 2, 8)
    q, k, v = (t.detach().requires_grad_(requires_grad) for t in (q, k, v))
    rotation = cases.angles(2, 2, 8)(draw) if rotated else None
    suffix = f"{' with requires_grad' * requires_grad}{', rotated' * rotated}"
    harness.compare(
        f"decayed_attention whole forward{suffix}, a tiny call: B1 H1 2x2 D8 float32",
        {
            "viops": lambda: viops.decayed_attention(q, k, v, log_decay, rotation=rotation),
            "eager": lambda: reference.decayed_attention(q, k, v, log_decay, rotation=rotation),
        },
        calls=1000,
        bars={"cpu": {} if rotated else {"viops": ("<=", limit)}},
    )
