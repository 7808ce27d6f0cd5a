"""Decayed attention's Triton kernels: what the contract does not see."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import triton_compiled
import viops
from tolerances import assert_matches
from triton_compiled import run_python
from viops import dispatch, triton_runtime
from viops.cases import Draw
from viops.ops.decayed_attention import cases, reference
from viops.tensors import accumulation_dtype

OP = "decayed_attention"

pytest.importorskip("triton", reason="triton is not installed")
interpreted = pytest.mark.skipif(
    not triton_runtime.INTERPRETED,
    reason="Triton compiles here: the contract's rows run on the GPU",
)


@pytest.fixture
def draw() -> Draw:
    return Draw(torch.float32)


def results(inputs: tuple, backend: str, **options: object) -> list[torch.Tensor]:
    """out and the gradients to all inputs."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    with viops.use_backend(backend):
        out = viops.decayed_attention(*inputs, **options)
        return [out, *torch.autograd.grad(out.sin().sum(), inputs)]


def test_the_kernels_are_imported_at_their_first_call_alone() -> None:
    code = """
import sys, torch, viops
kernels = "viops.ops.decayed_attention.triton_kernels"
q, decay = torch.ones(1, 2, 3, 4, 8), -torch.ones(2)
with viops.use_backend("reference"):
    viops.decayed_attention(q, q, q, decay)
viops.explain("decayed_attention", q, q, q, decay)
assert kernels not in sys.modules
with viops.use_backend("triton"):
    viops.decayed_attention(q, q, q, decay)
assert kernels in sys.modules
"""
    run_python(code, TRITON_INTERPRET="1")


@interpreted
@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 20), (33, 4)])
def test_a_launch_for_each_pass_gives_what_one_launch_gives(
    draw: Draw, monkeypatch: pytest.MonkeyPatch, height: int, width: int
) -> None:
    from viops.ops.decayed_attention import triton_kernels

    monkeypatch.setattr(triton_kernels, "_INTERPRETED_TOKENS", 16)  # several tiles a pass
    inputs = cases.inputs(draw, 2, 3, height, width, 8)
    options = {"axial": True, "rotation": cases.angles(height, width, 8)(draw)}
    one = results(inputs, "triton", **options)
    monkeypatch.setattr(triton_kernels, "_num_multiprocessors", lambda device: 1000)
    two = results(inputs, "triton", **options)
    for a, b in zip(one[:-1], two[:-1], strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(one[-1], two[-1])  # summed in another order
    for a, b in zip(two, results(inputs, "reference", **options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize(("height", "width"), [(64, 3), (65, 3), (3, 64), (3, 65)])
def test_lines_around_what_is_short(draw: Draw, height: int, width: int) -> None:
    inputs = cases.inputs(draw, 1, 1, height, width, 8)
    for a, b in zip(
        results(inputs, "triton", axial=True), results(inputs, "reference", axial=True), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@interpreted
@pytest.mark.parametrize(
    ("axial", "height", "width"), [(False, 9, 10), (True, 5, 7), (True, 3, 90)]
)
def test_what_is_beyond_the_queries_adds_nothing(
    draw: Draw, axial: bool, height: int, width: int
) -> None:
    """Far beyond, where a rising decay is more than float32 holds."""
    inputs = (*cases.inputs(draw, 1, 1, height, width, 8)[:3], torch.tensor([5.0]))
    for a, b in zip(
        results(inputs, "triton", axial=axial), results(inputs, "cpu", axial=axial), strict=True
    ):
        assert a.isfinite().all()
        assert (a - b).norm() <= 1e-2 * b.norm()  # a softmax that is all but one-hot


@interpreted
@pytest.mark.parametrize("axial", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_logsumexp_is_natural_and_inner_is_kept(dtype: torch.dtype, axial: bool) -> None:
    draw = Draw(dtype)
    q, k, v, log_decay = cases.inputs(draw, 2, 3, 4, 5, 8)
    log_decay = log_decay.to(accumulation_dtype(dtype)).expand(2, 3)
    found = dispatch._kernels[OP]["triton"].forward(q, k, v, log_decay, None, None, axial, 0.5)
    wide = (tensor.double() for tensor in (q, k, v, log_decay))
    expected = reference.decayed_attention_forward(*wide, None, None, axial, 0.5)
    dtypes = dtype, accumulation_dtype(dtype), dtype
    names = "out", "logsumexp", "inner"
    for name, a, b, wanted in zip(names, found, expected, dtypes, strict=True):
        assert a.dtype == wanted
        assert_matches(name, a, b, dtype)


@interpreted
def test_a_shared_and_a_mapped_rotation_are_read_alike(draw: Draw) -> None:
    q, k, v, log_decay = cases.inputs(draw, 2, 3, 4, 5, 8)
    sin, cos = (t.expand(2, 1, 4, 5, 8) for t in cases.angles(4, 5, 8)(draw))
    forward = dispatch._kernels[OP]["triton"].forward
    log_decay = log_decay.expand(2, 3)
    shared = forward(q, k, v, log_decay, sin, cos, True, 0.5)
    mapped = forward(q, k, v, log_decay, sin.clone(), cos, True, 0.5)
    for a, b in zip(shared, mapped, strict=True):
        assert torch.equal(a, b)


BAD = [
    (0, lambda t: t[0], ValueError, "q: expected"),
    (1, lambda t: t[:, :, :-1], ValueError, "k: expected shape"),
    (1, lambda t: t.double(), TypeError, "k: expected torch.float32"),
    (2, lambda t: t[..., :0], ValueError, "v: expected"),
    (2, lambda t: t.to("meta"), ValueError, "v: expected a tensor on cpu"),
    (3, lambda t: t[0], ValueError, "log_decay: expected shape"),
    (4, lambda t: t[:1], ValueError, "sin: expected shape"),
    (5, lambda t: None, TypeError, "cos: expected a tensor"),
    (5, lambda t: t.double(), TypeError, "cos: expected torch.float32"),
]
BAD_RESULTS = [
    (0, lambda t: t[:, 1:], ValueError, "grad_out: expected shape"),
    (7, lambda t: t.double(), TypeError, "out: expected"),
    (8, lambda t: t[:, :1], ValueError, "logsumexp: expected shape"),
    (9, lambda t: t[:, :, :0], ValueError, "inner: expected shape"),
]


def changed(args: tuple, place: int, change: object) -> tuple:
    return *args[:place], change(args[place]), *args[place + 1 :]


@interpreted
@pytest.mark.parametrize(("place", "change", "error", "message"), BAD)
def test_the_kernels_are_guarded_without_the_public_function(
    draw: Draw, place: int, change, error: type[Exception], message: str
) -> None:
    q, k, v, log_decay = cases.inputs(draw, 2, 3, 4, 5, 8)
    sin, cos = (t.expand(2, 1, 4, 5, 8) for t in cases.angles(4, 5, 8)(draw))
    forward, backward = dispatch._kernels[OP]["triton"][:2]
    args = q, k, v, log_decay.expand(2, 3), sin, cos
    saved = forward(*args, True, 0.5)
    bad = changed(args, place, change)
    with pytest.raises(error, match=f"^{message}"):
        forward(*bad, True, 0.5)
    with pytest.raises(error, match=f"^{message}"):
        backward(v, *bad, *saved, True, 0.5, True)


@interpreted
@pytest.mark.parametrize(("place", "change", "error", "message"), BAD_RESULTS)
def test_backward_is_guarded(
    draw: Draw, place: int, change, error: type[Exception], message: str
) -> None:
    q, k, v, log_decay = cases.inputs(draw, 2, 3, 4, 5, 8)
    forward, backward = dispatch._kernels[OP]["triton"][:2]
    args = q, k, v, log_decay.expand(2, 3), None, None
    args = (v, *args, *forward(*args, True, 0.5))
    with pytest.raises(error, match=f"^{message}"):
        backward(*changed(args, place, change), True, 0.5, True)


# The kernels compiled for a GPU that need not be there.

DEFINITIONS = """
from viops.ops.decayed_attention import cases, op, triton_blocks, triton_kernels, triton_lines
from viops.tensors import accumulation_dtype
modules = [triton_blocks, triton_lines]

def call(dtype, axial, shape, head_dim, value_dim=None):
    compiled.clear()
    draw = Draw(dtype)
    q, k, v, log_decay = cases.inputs(draw, *shape, head_dim, value_dim)
    wide = accumulation_dtype(dtype)
    log_decay = log_decay.to(wide).expand(q.shape[:2])
    sin, cos = None, None
    if head_dim % 2 == 0:
        angles = cases.angles(*shape[2:], head_dim)(draw)
        sin, cos = (t.to(wide).expand(shape[0], 1, *t.shape) for t in angles)
    args = q, k, v, log_decay, sin, cos
    results = op._triton_forward(*args, axial, 0.25)
    op._triton_backward(results[0], *args, *results, axial, 0.25, True)
    return list(compiled)
"""
run_compiled = functools.partial(triton_compiled.run_compiled, DEFINITIONS)


def test_a_new_batch_or_grid_compiles_nothing(tmp_path: Path) -> None:
    body = """
call(torch.bfloat16, False, (2, 4, 14, 14), 32)
call(torch.bfloat16, True, (2, 4, 14, 14), 32)
first = variants()
for shape in ((1, 4, 14, 14), (3, 4, 16, 9), (5, 4, 11, 13), (16, 4, 7, 7), (2, 4, 1, 1)):
    call(torch.bfloat16, False, shape, 32)
    call(torch.bfloat16, True, shape, 32)
print(first, variants())
"""
    first, after = map(int, run_compiled(body, tmp_path).split())
    assert first == after == 5


@pytest.mark.parametrize("capability", [80, 90])
def test_half_precision_runs_on_tensor_cores_and_hardly_spills(
    tmp_path: Path, capability: int
) -> None:
    body = """
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for axial, shape in ((False, (2, 4, 14, 14)), (True, (2, 4, 56, 56)), (True, (2, 4, 14, 14))):
    for head_dim in (16, 32):
        for kernel in call(torch.bfloat16, axial, shape, head_dim):
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(kernel.asm["cubin"])
                file.flush()
                done = subprocess.run([tool, "-res-usage", file.name], capture_output=True)
            stack = re.search(r"STACK:(\\d+)", done.stdout.decode()).group(1)
            print(kernel.metadata.name, head_dim, "mma" in kernel.asm["ptx"], stack)
"""
    lines = run_compiled(body, tmp_path, capability).splitlines()
    assert len(lines) == 2 * (3 + 2 + 2)
    for line in lines:
        name, head_dim, on_tensor_cores, stack = line.split()
        assert on_tensor_cores == "True", line
        # on sm_80 a line of 64 tokens backward is more than registers hold, by an eighth
        spills = (capability, name[18:], head_dim) == (80, "lines_backward_kernel", "32")
        assert int(stack) <= (136 if spills else 8), line


@pytest.mark.parametrize(("capability", "limit"), [(86, 101376), (90, 232448)])
def test_shared_memory_suffices(tmp_path: Path, capability: int, limit: int) -> None:
    """Of a GPU with as little as one of this capability may have."""
    body = f"""
triton_kernels._shared_bytes = lambda device: {limit}
square = (2, 4, 14, 14)
calls = [
    (dtype, False, square, *dims)
    for dtype in (torch.bfloat16, torch.float32, torch.float64)
    for dims in ((64, 128), (128, 128), (129, 32))
]
calls += [(torch.bfloat16, True, (2, 4, 56, 56), 128), (torch.float32, True, (2, 4, 56, 56), 64)]
for arguments in calls:
    for kernel in call(*arguments):
        print(*arguments, kernel.metadata.name, kernel.metadata.shared)
"""
    lines = run_compiled(body, tmp_path, capability).splitlines()
    assert len(lines) == 9 * 3 + 2 * 2  # three kernels of blocks, two of lines
    assert [line for line in lines if int(line.split()[-1]) > limit] == []


def test_products_of_float32_are_not_in_tf32(tmp_path: Path) -> None:
    body = """
for axial in (False, True):
    for kernel in call(torch.float32, axial, (2, 4, 14, 14), 32):
        assert "tf32" not in kernel.asm["ptx"] and "mma" not in kernel.asm["ptx"]
        print("checked")
"""
    assert run_compiled(body, tmp_path) == "checked\n" * 5


def test_float64_keeps_its_scale_and_its_width(tmp_path: Path) -> None:
    body = """
for axial in (False, True):
    for kernel in call(torch.float64, axial, (2, 4, 14, 14), 32):
        narrowed = r"cvt[.\\w]*[.]f64[.]f32|cvt[.\\w]*[.]f32[.]f64"
        assert not re.search(narrowed, kernel.asm["ptx"]), kernel.metadata.name
        print(kernel.src.signature["scale"])
"""
    assert run_compiled(body, tmp_path).split() == ["fp64"] * 5
