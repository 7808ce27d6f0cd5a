"""Token reorganization against eager PyTorch, torch.compile, and the floor of the machine.

The bars on the CPU are those of two threads and float32, those on a GPU of an H100 and bfloat16.
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

FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16

full = pytest.mark.full
on_cpu, on_cuda = pytest.mark.device("cpu"), pytest.mark.device("cuda")
#: As calls, and as a CUDA graph, which shows the kernels without their launches.
CALLED, GRAPH = False, True
#: Calls in a sample of what takes microseconds on a GPU.
CALLS_ON_GPU = 20


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


def distinct_scores(batch: int, num_patches: int, generator: torch.Generator) -> Tensor:
    """[B, P], positive and 1 in sum; without ties, so that all contenders keep the same patches."""
    device = generator.device
    order = torch.rand(batch, num_patches, generator=generator, device=device).argsort(dim=1)
    return (order + 0.5) * (2 / num_patches**2)


def reorganize_inputs(
    harness: Harness, batch: int, num_tokens: int, channels: int, dtype: torch.dtype = FLOAT32
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Makes x [B, N, C] and scores [B, N - 1] from a seed."""

    def make(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(harness.device).manual_seed(seed)
        x = torch.randn(
            batch, num_tokens, channels, generator=generator, device=harness.device, dtype=dtype
        )
        return x, distinct_scores(batch, num_tokens - 1, generator)

    return make


def num_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def with_gradients(
    make: Callable[[int], tuple], call: Callable[..., object]
) -> Callable[[int], tuple]:
    """Inputs as leaves, and after them a gradient for each floating-point output of the call."""

    def make_both(seed: int) -> tuple:
        inputs = tuple(t.requires_grad_(t.is_floating_point()) for t in make(seed))
        outputs = call(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return *inputs, *(torch.randn_like(out) for out in outputs if out.is_floating_point())

    return make_both


def forward_backward(call: Callable[..., object], num_grads: int = 1) -> Callable[..., object]:
    """Forward and backward; the last arguments are the gradients of the call's first outputs."""

    def run(*args: Tensor) -> object:
        inputs, grads = args[:-num_grads], args[-num_grads:]
        outputs = call(*inputs)
        outputs = outputs[:num_grads] if isinstance(outputs, tuple) else (outputs,)
        leaves = [tensor for tensor in inputs if tensor.requires_grad]
        return torch.autograd.grad(outputs, leaves, grads[: len(outputs)])

    return run


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def size(*values: object, dtype: torch.dtype, graph: bool = CALLED) -> str:
    """Such as "B8 N197 C384 float32, CUDA graph"."""
    words = [str(value) for value in values] + [name_of(dtype)]
    return " ".join(words) + (", CUDA graph" if graph else "")


OF_COPY = {"floor": ("<=", 1 / 0.75)}  # moves at least 0.75 of the bytes that a copy moves


@pytest.mark.parametrize(
    ("batch", "num_tokens", "channels", "keep", "dtype", "graph", "bars"),
    [
        pytest.param(32, 197, 384, 137, FLOAT32, CALLED, {"floor": ("<=", 1.4)}, marks=on_cpu),
        pytest.param(1, 197, 384, 137, FLOAT32, CALLED, {}, marks=(full, on_cpu)),
        pytest.param(8, 577, 768, 404, FLOAT32, CALLED, {}, marks=(full, on_cpu)),
        pytest.param(32, 197, 384, 137, BFLOAT16, CALLED, {}, marks=(full, on_cpu)),
        pytest.param(
            *(256, 197, 384, 137, BFLOAT16, CALLED),
            {**OF_COPY, "eager": (">=", 8), "compile": (">=", 3)},
            marks=on_cuda,
        ),
        pytest.param(256, 197, 384, 137, BFLOAT16, GRAPH, OF_COPY, marks=on_cuda),
        pytest.param(256, 197, 384, 137, FLOAT16, CALLED, {}, marks=(full, on_cuda)),
        pytest.param(256, 197, 384, 137, FLOAT32, CALLED, {}, marks=(full, on_cuda)),
        pytest.param(1, 197, 384, 137, BFLOAT16, GRAPH, {}, marks=(full, on_cuda)),
        pytest.param(64, 577, 768, 404, BFLOAT16, GRAPH, {}, marks=(full, on_cuda)),
    ],
)
def bench_reorganize_forward(
    harness: Harness,
    batch: int,
    num_tokens: int,
    channels: int,
    keep: int,
    dtype: torch.dtype,
    graph: bool,
    bars: dict,
) -> None:
    inputs = harness.input_sets(reorganize_inputs(harness, batch, num_tokens, channels, dtype))
    compiled_reference = compiled(reference.reorganize_tokens)
    sizes = (f"B{batch}", f"N{num_tokens}", f"C{channels}", f"keep {keep}")
    contenders = {
        "viops": lambda x, scores: viops.reorganize_tokens(x, scores, keep),
        "eager": lambda x, scores: reference.reorganize_tokens(x, scores, keep),
        "compile": lambda x, scores: compiled_reference(x, scores, keep),
        "topk+gather": lambda x, scores: topk_gather(x, scores, keep),
    }
    if graph:
        del contenders["topk+gather"]  # nonzero waits for the GPU
    calls = CALLS_ON_GPU if harness.on_gpu else 20 if batch == 1 else 1
    harness.compare(
        f"reorganize_tokens forward, {size(*sizes, dtype=dtype, graph=graph)}",
        contenders,
        inputs=inputs,
        floor=Floor(num_bytes(*inputs[0], *viops.reorganize_tokens(*inputs[0], keep))),
        bars={harness.device.type: bars},
        calls=calls,
        graph=graph,
    )


@pytest.mark.parametrize(
    ("batch", "dtype", "graph"),
    [
        pytest.param(32, FLOAT32, CALLED, marks=on_cpu),
        pytest.param(256, BFLOAT16, CALLED, marks=on_cuda),
        pytest.param(256, BFLOAT16, GRAPH, marks=on_cuda),
        pytest.param(256, FLOAT16, CALLED, marks=(full, on_cuda)),
        pytest.param(256, FLOAT32, CALLED, marks=(full, on_cuda)),
    ],
)
def bench_reorganize_backward(
    harness: Harness, batch: int, dtype: torch.dtype, graph: bool
) -> None:
    keep = 137
    compiled_reference = compiled(reference.reorganize_tokens)
    calls = {
        "viops": lambda x, scores: viops.reorganize_tokens(x, scores, keep),
        "eager": lambda x, scores: reference.reorganize_tokens(x, scores, keep),
        "compile": lambda x, scores: compiled_reference(x, scores, keep),
        "topk+gather": lambda x, scores: topk_gather(x, scores, keep),
    }
    if graph:
        del calls["topk+gather"]
    make = reorganize_inputs(harness, batch, 197, 384, dtype)
    inputs = harness.input_sets(with_gradients(make, calls["viops"]))
    x, scores, grad_tokens = inputs[0]
    tokens, index = calls["viops"](x, scores)
    dropped = num_bytes(x) * (scores.shape[1] - keep) // x.shape[1]
    forward_bytes = num_bytes(x, scores, tokens, index)
    backward_bytes = num_bytes(grad_tokens, scores, index) + dropped + num_bytes(x, scores)
    sizes = (f"B{batch}", "N197", "C384", f"keep {keep}")
    harness.compare(
        f"reorganize_tokens forward + backward, {size(*sizes, dtype=dtype, graph=graph)}",
        {name: forward_backward(call) for name, call in calls.items()},
        inputs=inputs,
        floor=Floor(forward_bytes + backward_bytes),
        bars={"cpu": {"eager": (">=", 8), "compile": (">=", 5)}},
        calls=CALLS_ON_GPU if harness.on_gpu else 1,
        graph=graph,
    )


@pytest.mark.parametrize(("requires_grad", "limit"), [(False, 12e-6), (True, 30e-6)])
def bench_reorganize_overhead(harness: Harness, requires_grad: bool, limit: float) -> None:
    x, scores = (t.requires_grad_(requires_grad) for t in reorganize_inputs(harness, 1, 5, 8)(0))
    suffix = " with requires_grad" if requires_grad else ""
    harness.compare(
        f"reorganize_tokens forward{suffix}, a tiny call: B1 N5 C8 keep 2 float32",
        {
            "viops": lambda: viops.reorganize_tokens(x, scores, 2),
            "eager": lambda: reference.reorganize_tokens(x, scores, 2),
            "topk+gather": lambda: topk_gather(x, scores, 2),
        },
        bars={"cpu": {"viops": ("<=", limit)}},
        calls=1000,
    )


@full
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("batch", "dtype"),
    [
        pytest.param(32, FLOAT32, marks=on_cpu),
        pytest.param(256, BFLOAT16, marks=on_cuda),
    ],
)
def bench_restore(harness: Harness, batch: int, dtype: torch.dtype, backward: bool) -> None:
    compiled_reference = compiled(reference.restore_tokens)
    calls = {
        "viops": lambda tokens, index: viops.restore_tokens(tokens, index, 196),
        "eager": lambda tokens, index: reference.restore_tokens(tokens, index, 196),
        "compile": lambda tokens, index: compiled_reference(tokens, index, 196),
    }

    def make(seed: int) -> tuple[Tensor, Tensor]:
        """tokens [B, 139, 384] and index [B, 137]."""
        made = reorganize_inputs(harness, batch, 197, 384, dtype)(seed)
        return viops.reorganize_tokens(*made, 137)

    inputs = harness.input_sets(with_gradients(make, calls["viops"]) if backward else make)
    moved = num_bytes(*inputs[0][:2], calls["viops"](*inputs[0][:2]))
    what = "forward + backward" if backward else "forward"
    sizes = (f"B{batch}", "N197", "C384", "keep 137")
    harness.compare(
        f"restore_tokens {what}, {size(*sizes, dtype=dtype)}",
        {name: forward_backward(call) for name, call in calls.items()} if backward else calls,
        inputs=inputs,
        floor=Floor(2 * moved if backward else moved),
        calls=CALLS_ON_GPU if harness.on_gpu else 1,
    )


def fused_qkv(
    harness: Harness, batch: int, num_heads: int, num_tokens: int, dtype: torch.dtype = FLOAT32
) -> Callable[[int], tuple[Tensor]]:
    """Makes [B, N, 3 * H * 64] from a seed, as a fused qkv linear gives it."""

    def make(seed: int) -> tuple[Tensor]:
        generator = torch.Generator(harness.device).manual_seed(seed)
        shape = (batch, num_tokens, 3 * num_heads * 64)
        qkv = torch.randn(shape, generator=generator, device=harness.device, dtype=dtype)
        return (qkv,)

    return make


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """q, k, v [B, H, N, D]: views of qkv [B, N, 3 * H * D]."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def attention_flops(batch: int, num_heads: int, num_tokens: int) -> int:
    return 4 * batch * num_heads * num_tokens**2 * 64


def attention_calls(num_heads: int) -> dict[str, Callable[[Tensor], object]]:
    """The contenders of class_attention, as functions of qkv."""
    compiled_reference = compiled(reference.class_attention)
    functions = {
        "viops": viops.class_attention,
        "sdpa alone": F.scaled_dot_product_attention,
        "eager": reference.class_attention,
        "compile": compiled_reference,
    }
    return {
        name: lambda qkv, function=function: function(*split_heads(qkv, num_heads))
        for name, function in functions.items()
    }


SDPA_AND = {"sdpa alone": ("<=", 1.06)}


@pytest.mark.parametrize(
    ("batch", "num_heads", "num_tokens", "dtype", "graph", "keep_heap", "bars"),
    [
        pytest.param(
            *(8, 6, 197, FLOAT32, CALLED, False), {**SDPA_AND, "eager": (">=", 1.25)}, marks=on_cpu
        ),
        # the full matrix takes 128 MB here: once as users meet it, once without its page faults
        pytest.param(
            *(8, 12, 577, FLOAT32, CALLED, False), {**SDPA_AND, "eager": (">=", 3)}, marks=on_cpu
        ),
        pytest.param(
            *(8, 12, 577, FLOAT32, CALLED, True), {**SDPA_AND, "eager": (">=", 3)}, marks=on_cpu
        ),
        pytest.param(
            *(256, 6, 197, BFLOAT16, CALLED, False), {"sdpa alone": ("<=", 1.15)}, marks=on_cuda
        ),
        pytest.param(256, 6, 197, BFLOAT16, GRAPH, False, {}, marks=on_cuda),
        pytest.param(256, 6, 197, FLOAT16, CALLED, False, {}, marks=(full, on_cuda)),
        pytest.param(256, 6, 197, FLOAT32, CALLED, False, {}, marks=(full, on_cuda)),
    ],
)
def bench_class_attention_forward(
    harness: Harness,
    batch: int,
    num_heads: int,
    num_tokens: int,
    dtype: torch.dtype,
    graph: bool,
    keep_heap: bool,
    bars: dict,
) -> None:
    sizes = (f"B{batch}", f"H{num_heads}", f"N{num_tokens}", "D64")
    suffix = ", heap kept" if keep_heap else ""
    harness.compare(
        f"class_attention forward, {size(*sizes, dtype=dtype, graph=graph)}{suffix}",
        attention_calls(num_heads),
        inputs=harness.input_sets(fused_qkv(harness, batch, num_heads, num_tokens, dtype)),
        floor=Floor(flops=attention_flops(batch, num_heads, num_tokens), dtype=dtype),
        bars={harness.device.type: bars},
        other_result=("sdpa alone",),
        calls=CALLS_ON_GPU if harness.on_gpu else 1,
        graph=graph,
        keep_heap=keep_heap,
    )


@on_cuda
@pytest.mark.parametrize("graph", [CALLED, GRAPH])
def bench_class_attention_scores(harness: Harness, graph: bool) -> None:
    """What class_attention adds to torch's attention."""
    make = fused_qkv(harness, 256, 6, 197, BFLOAT16)
    q, k, _ = split_heads(*make(0), 6)
    read = num_bytes(q[:, :, 0], k)  # of the queries, those of the class token alone
    scores = viops.class_attention_scores(q, k)
    compiled_reference = compiled(reference.class_attention_scores)
    functions = {
        "viops": viops.class_attention_scores,
        "eager": reference.class_attention_scores,
        "compile": compiled_reference,
    }
    sizes = ("B256", "H6", "N197", "D64")
    harness.compare(
        f"class_attention_scores forward, {size(*sizes, dtype=BFLOAT16, graph=graph)}",
        {
            name: lambda qkv, function=function: function(*split_heads(qkv, 6)[:2])
            for name, function in functions.items()
        },
        inputs=harness.input_sets(make, touched=read),
        floor=Floor(read + num_bytes(scores)),
        calls=CALLS_ON_GPU,
        graph=graph,
    )


@pytest.mark.parametrize(("requires_grad", "limit"), [(False, 12e-6), (True, 30e-6)])
def bench_class_attention_overhead(harness: Harness, requires_grad: bool, limit: float) -> None:
    """Two ops a call: the scores and the attention."""
    (qkv,) = fused_qkv(harness, 1, 1, 5)(0)
    q, k, v = (t.requires_grad_(requires_grad) for t in split_heads(qkv, 1))
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
@pytest.mark.parametrize(
    ("batch", "dtype", "graph"),
    [
        pytest.param(8, FLOAT32, CALLED, marks=on_cpu),
        pytest.param(256, BFLOAT16, CALLED, marks=on_cuda),
        pytest.param(256, BFLOAT16, GRAPH, marks=on_cuda),
        pytest.param(256, FLOAT16, CALLED, marks=on_cuda),
        pytest.param(256, FLOAT32, CALLED, marks=on_cuda),
    ],
)
def bench_class_attention_backward(
    harness: Harness, batch: int, dtype: torch.dtype, graph: bool
) -> None:
    calls = attention_calls(6)
    make = fused_qkv(harness, batch, 6, 197, dtype)
    harness.compare(
        "class_attention forward + backward, "
        + size(f"B{batch}", "H6", "N197", "D64", dtype=dtype, graph=graph),
        {name: forward_backward(call, num_grads=2) for name, call in calls.items()},
        inputs=harness.input_sets(with_gradients(make, calls["viops"])),
        floor=Floor(flops=3 * attention_flops(batch, 6, 197), dtype=dtype),
        other_result=("sdpa alone",),
        calls=CALLS_ON_GPU if harness.on_gpu else 1,
        graph=graph,
    )


@pytest.mark.parametrize(
    ("batch", "dtype", "compiles"),
    [
        pytest.param(8, FLOAT32, False, marks=on_cpu),
        pytest.param(256, BFLOAT16, False, marks=on_cuda),
        pytest.param(256, BFLOAT16, True, marks=on_cuda),
    ],
)
def bench_deit_forward(harness: Harness, batch: int, dtype: torch.dtype, compiles: bool) -> None:
    timm = pytest.importorskip("timm", reason="the DeiT-S bench takes the model from timm")
    torch.manual_seed(0)
    unpatched = timm.create_model("deit_small_patch16_224").eval().to(harness.device, dtype)
    patched = timm.create_model("deit_small_patch16_224").eval().to(harness.device, dtype)
    patched.load_state_dict(unpatched.state_dict())
    viops.patch.evit(patched, keep_rate=0.7, layers=(3, 6, 9))
    images = torch.randn(batch, 3, 224, 224, device=harness.device, dtype=dtype)

    def eager(images: Tensor) -> Tensor:
        with viops.use_backend("reference"):
            return patched(images)

    contenders = {"viops": patched, "unpatched": unpatched, "eager": eager}
    if compiles:
        contenders = {"viops": compiled(patched), "unpatched": compiled(unpatched)}
    # rounded to bfloat16, scores tie, and the reference keeps other patches
    others = ("unpatched",) if dtype is FLOAT32 or compiles else ("unpatched", "eager")
    with torch.no_grad():
        if compiles:
            check_compiled(contenders["viops"](images), patched(images), unpatched(images))
        flops = count_flops(patched, images)
        record = harness.compare(
            f"DeiT-S/16{' compiled' * compiles} forward, 224x224, B{batch}, "
            f"keep 0.7 at layers 3, 6, 9, {name_of(dtype)}",
            contenders,
            inputs=[(images,)],
            floor=Floor(flops=flops, dtype=dtype),
            bars={device: {"unpatched": (">=", 1.45)} for device in ("cpu", "cuda")},
            other_result=others,
            calls=3 if harness.on_gpu else 1,
            notes={"operations": f"1/{count_flops(unpatched, images) / flops:.2f} of unpatched's"},
        )
    rates = [f"{n} {batch / row['best']:.3g}" for n, row in record["contenders"].items()]
    record["notes"]["images/s"] = ", ".join(rates)


def check_compiled(result: Tensor, eager: Tensor, unpatched: Tensor) -> None:
    """Other roundings let a few patches change places, which is far less than keeping them all."""
    difference = (result.double() - eager.double()).norm()
    whole = (unpatched.double() - eager.double()).norm()
    if not difference < whole / 2:  # true for NaN too
        raise AssertionError(
            f"compiled: differs from eager viops by {difference:.3g}, and the unpatched model by "
            f"{whole:.3g}"
        )


def count_flops(model: torch.nn.Module, images: Tensor) -> int:
    # torch counts attention on the CPU only where it is made of matrix products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images)
    return counter.get_total_flops()
