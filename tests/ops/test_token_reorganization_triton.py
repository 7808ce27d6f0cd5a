"""Token reorganization's Triton kernels: what the contract does not see."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
import triton_compiled
import viops
from triton_compiled import run_python
from viops import dispatch, native, triton_runtime
from viops.cases import Draw
from viops.ops.token_reorganization import cases

OP = "class_attention_scores"

pytest.importorskip("triton", reason="triton is not installed")
DEVICE = "cpu" if triton_runtime.INTERPRETED else "cuda"
interpreted = pytest.mark.skipif(
    not triton_runtime.INTERPRETED,
    reason="Triton compiles here: it runs on no tensors of the CPU",
)


@pytest.fixture
def draw() -> Draw:
    return Draw(torch.float32)


@pytest.fixture(autouse=True)
def no_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(dispatch, "_warned", set())


@interpreted
def test_the_interpreter_is_never_chosen_by_itself(
    draw: Draw, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k = cases.queries(draw, 2, 3, 11, 4)
    assert dispatch.choose(OP, "cpu", torch.float32)[0] == "cpu"
    assert "only where it is asked for" in viops.explain(OP, q, k).reasons["triton"]
    with viops.use_backend("triton"):
        assert dispatch.choose(OP, "cpu", torch.float32)[0] == "triton"
        assert viops.explain(OP, q, k).backend == "triton"
    assert dispatch.choose(OP, "cpu", torch.float32)[0] == "cpu"
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(native, "extension", None)
    monkeypatch.setattr(native, "load_error", "taken away by the test")
    with pytest.warns(RuntimeWarning, match="only where it is asked for"):
        assert dispatch.choose(OP, "cpu", torch.float32)[0] == "reference"


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    refuses = dispatch.refuses_triton
    monkeypatch.setattr(triton_runtime, "INTERPRETED", True)
    assert refuses("cuda", torch.float32) == "TRITON_INTERPRET=1 needs tensors on the CPU, got cuda"
    assert refuses("cpu", torch.float32) is None
    assert "got torch.int32" in refuses("cpu", torch.int32)
    monkeypatch.setattr(triton_runtime, "load_error", lambda: "triton is not installed")
    assert refuses("cpu", torch.float32) == "triton is not installed"
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    assert refuses("cpu", torch.float32) == "needs tensors on a GPU, got cpu"
    monkeypatch.setattr(triton_runtime, "device_error", lambda: None)
    assert refuses("cuda", torch.float32) == "triton is not installed"


def test_devices_that_triton_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    device_error = triton_runtime.device_error.__wrapped__
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_error() == "torch sees no CUDA device"
    capabilities = [(9, 0), (7, 5)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert device_error() == "needs GPUs of compute capability 8.0 or newer, got 7.5"
    capabilities[1] = (8, 0)
    assert device_error() is None


def test_a_missing_or_broken_triton_is_told_apart() -> None:
    code = """
import sys
from viops import triton_runtime  # torch imports triton too
class Refuse:
    def find_spec(name, path=None, target=None):
        if name == "triton":
            raise {}
sys.meta_path.insert(0, Refuse)
sys.modules.pop("triton", None)
print(triton_runtime.load_error())
"""
    missing = run_python(code.format("ModuleNotFoundError('No module', name='triton')"))
    assert missing == "triton is not installed\n"
    broken = run_python(code.format("OSError('libtriton.so: no such file')"))
    assert broken == "triton cannot be imported: libtriton.so: no such file\n"


def test_the_kernels_are_imported_at_their_first_call_alone() -> None:
    code = """
import sys, torch, viops
from viops import dispatch
kernels = "viops.ops.token_reorganization.triton_kernels"
q = torch.ones(1, 2, 3, 4)
viops.class_attention_scores(q, q)
viops.explain("class_attention_scores", q, q)
assert kernels not in sys.modules
dispatch._kernels["class_attention_scores"]["triton"].forward(q[:0], q[:0], 1, 0.5)
assert kernels in sys.modules
"""
    run_python(code, TRITON_INTERPRET="1")


@pytest.mark.parametrize(("before", "after"), [("0", "1"), ("true", "0")])
def test_the_interpreter_cannot_be_switched_after_the_import(before: str, after: str) -> None:
    code = f"""
import os, torch, viops
from viops import dispatch, triton_runtime
assert triton_runtime.INTERPRETED == {before == "true"}
os.environ["TRITON_INTERPRET"] = "{after}"
q = torch.ones(0, 2, 3, 4)
try:
    dispatch._kernels["class_attention_scores"]["triton"].forward(q, q, 1, 0.5)
except RuntimeError as error:
    print(error)
"""
    assert "changed after viops was imported" in run_python(code, TRITON_INTERPRET=before)


def test_a_missing_compiler_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    load_error = triton_runtime.load_error.__wrapped__
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    monkeypatch.setenv("CC", "no_such_compiler")
    assert "with a C compiler, and found none" in load_error()
    monkeypatch.setenv("CC", sys.executable)
    assert load_error() is None


def test_only_the_scores_run_on_triton(draw: Draw) -> None:
    q, k, v = cases.fused_qkv(draw, 1, 2, 5, 4)
    with viops.use_backend("triton"):
        with pytest.raises(viops.BackendError, match="torch's scaled_dot_product_attention runs"):
            viops.softmax_attention(q, k, v)
        with pytest.raises(viops.BackendError, match="exact sort within a block"):
            viops.reorganize_tokens(torch.ones(1, 3, 4), torch.ones(1, 2), 1)


BAD_FORWARD = [
    (lambda q, k: (q, k[:, :, :-1], 1), "k: shape"),
    (lambda q, k: (q[0], k[0], 1), "q: expected"),
    (lambda q, k: (q[..., :0], k[..., :0], 1), "q: expected H and D"),
    (lambda q, k: (q, k.double(), 1), "k: dtype"),
    (lambda q, k: (q, k.to("meta"), 1), "k: device"),
    (lambda q, k: (q, k, 0), "num_prefix: expected"),
    (lambda q, k: (q, k, 6), "num_prefix: expected"),
]


@interpreted
@pytest.mark.parametrize(("arguments", "message"), BAD_FORWARD)
def test_the_kernels_are_guarded_without_the_public_function(
    draw: Draw, arguments, message: str
) -> None:
    q, k = cases.queries(draw, 2, 3, 5, 4)
    forward = dispatch._kernels[OP]["triton"].forward
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        forward(*arguments(q, k), 0.5)


@interpreted
def test_backward_is_guarded(draw: Draw) -> None:
    q, k = cases.queries(draw, 2, 3, 5, 4)
    forward, backward = dispatch._kernels[OP]["triton"][:2]
    scores, probabilities = forward(q, k, 1, 0.5)
    for bad, message in (
        ((scores[:, 1:], q, k, probabilities), "grad_scores: expected shape"),
        ((scores, q, k, probabilities[:, :2]), "probabilities: expected shape"),
        ((scores.to("meta"), q, k, probabilities), "grad_scores: device"),
        ((scores, q, k[:1], probabilities), "k: shape"),
    ):
        with pytest.raises(ValueError, match=f"^{message}"):
            backward(*bad, 1, 0.5)


@pytest.mark.parametrize("num_tokens", [255, 256, 257, 1024, 1025])
def test_lengths_around_a_tile(num_tokens: int) -> None:
    """Of 256 rows of 64 channels, and of 1,024 tokens at a time."""
    q, k = cases.queries(Draw(torch.float32, DEVICE), 1, 2, num_tokens, 64)
    with viops.use_backend("reference"):
        expected = viops.class_attention_scores(q, k)
    with viops.use_backend("triton"):
        torch.testing.assert_close(viops.class_attention_scores(q, k), expected)


def test_channels_farther_apart_than_32_bits() -> None:
    """k [D, B, H, N] in memory, of which only virtual memory is large."""
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GB of free GPU memory")
    stride = 2**31 // 8 + 64
    storage = torch.empty(17 * stride, dtype=torch.float16, device=DEVICE)
    k = storage.as_strided((1, 2, 5, 16), (10, 5, 1, stride))
    values = Draw(torch.float16, DEVICE).normal(1, 2, 5, 16)
    k.copy_(values)
    q = values.flip(2)
    with viops.use_backend("reference"):
        expected = viops.class_attention_scores(q, values)
    with viops.use_backend("triton"):
        torch.testing.assert_close(viops.class_attention_scores(q, k), expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of numpy's
@pytest.mark.parametrize("num_tokens", [17, 300])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_come_out_as_in_the_reference(num_tokens: int, value: float) -> None:
    q, k = cases.queries(Draw(torch.float32, DEVICE), 2, 3, num_tokens, 64)
    k[1, 2, num_tokens - 3, 5] = value
    found = {}
    for backend in ("triton", "reference"):
        with viops.use_backend(backend):
            found[backend] = viops.class_attention_scores(q, k)
    torch.testing.assert_close(found["triton"], found["reference"], equal_nan=True)


# The kernels compiled for a GPU that need not be there.

DEFINITIONS = """
from viops.ops.token_reorganization import cases, triton_kernels
modules = [triton_kernels]

def call(dtype, batch, num_tokens):
    compiled.clear()
    q, k, _ = cases.fused_qkv(Draw(dtype), batch, 6, num_tokens, 64)
    scores, probabilities = triton_kernels.class_attention_scores_forward(q, k, 1, 0.125)
    triton_kernels.class_attention_scores_backward(scores, q, k, probabilities, 1, 0.125)
    return list(compiled)
"""
run_compiled = functools.partial(triton_compiled.run_compiled, DEFINITIONS)


@pytest.mark.parametrize("capability", [80, 90])
def test_rows_of_k_are_read_by_16_bytes(tmp_path: Path, capability: int) -> None:
    """k as the view of a fused qkv linear: loads into registers, or copies into shared memory."""
    body = """
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for kernel in call(dtype, 2, 197) + call(dtype, 2, 4099):
        ptx = kernel.asm["ptx"]
        wide = len(re.findall(r"ld\\.global[.\\w:]*\\.v4\\.b32", ptx))
        wide += len(re.findall(r"cp\\.async\\.cg\\.shared\\.global ", ptx))  # always 16 bytes
        print(kernel.metadata.name, wide)
"""
    lines = run_compiled(body, tmp_path, capability).splitlines()
    assert len(lines) == 3 * 4
    for line in lines:
        name, wide = line.split()
        assert int(wide) >= 4, f"{name}: {line}"


def test_a_new_batch_or_token_count_compiles_nothing(tmp_path: Path) -> None:
    body = """
call(torch.bfloat16, 2, 197)
first = variants()
for batch, num_tokens in ((1, 197), (3, 50), (16, 128), (7, 97), (2, 256), (5, 1)):
    call(torch.bfloat16, batch, num_tokens)
print(first, variants())
call(torch.float16, 2, 197)
print(variants())
"""
    first, after, other_dtype = map(int, run_compiled(body, tmp_path).split())
    assert first == after == 2
    assert other_dtype == 4


def test_nothing_spills(tmp_path: Path) -> None:
    body = """
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for kernel in call(torch.bfloat16, 2, 197) + call(torch.float32, 2, 197):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    print(kernel.metadata.name, *re.search(r"REG:(\\d+) STACK:(\\d+)", text.stdout).groups())
"""
    lines = run_compiled(body, tmp_path).splitlines()
    assert len(lines) == 4
    for line in lines:
        name, registers, stack = line.split()
        assert int(stack) == 0, f"{name} has a stack frame of {stack} bytes"
        assert int(registers) <= 128, f"{name} takes {registers} registers"


def test_the_sum_is_not_in_tf32(tmp_path: Path) -> None:
    body = """
for kernel in call(torch.float32, 2, 197):
    assert "tf32" not in kernel.asm["ptx"] and "mma" not in kernel.asm["ptx"]
print("checked", len(compiled))
"""
    assert run_compiled(body, tmp_path) == "checked 2\n"


def test_float64_keeps_its_scale(tmp_path: Path) -> None:
    """Triton takes a Python number as float32 unless told otherwise; its interpreter does not."""
    body = """
for kernel in call(torch.float64, 2, 197):
    print(kernel.src.signature["scale"])
"""
    assert run_compiled(body, tmp_path).split() == ["fp64", "fp64"]


def test_strides_of_the_fused_view_are_multiples(draw: Draw) -> None:
    """What the 16-byte loads rest on."""
    from viops.ops.token_reorganization import triton_kernels

    _, k, _ = cases.fused_qkv(draw, 2, 6, 197, 64)
    strides, unit = triton_kernels._strides_of(k, k)
    assert unit == 16
    assert tuple(unit * stride for stride in strides[3:6]) == k.stride()[:3]
    odd = draw.normal(2, 3, 5, 7)
    strides, unit = triton_kernels._strides_of(odd, odd)
    assert (unit, strides[3:6]) == (1, odd.stride()[:3])
