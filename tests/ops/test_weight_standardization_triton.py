"""Weight standardization's Triton kernels: what the contract does not see."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import triton_compiled
import viops
from contract import DTYPES, case_id
from tolerances import assert_matches
from triton_compiled import run_python
from viops import dispatch, triton_runtime
from viops.cases import Draw
from viops.ops.weight_standardization import op, reference
from viops.tensors import accumulation_dtype

OP = "standardize_weight"
OPTIONS = (0.1, True, True)

pytest.importorskip("triton", reason="triton is not installed")
interpreted = pytest.mark.skipif(
    not triton_runtime.INTERPRETED,
    reason="Triton compiles here: the contract's rows run on the GPU",
)


@pytest.fixture
def draw() -> Draw:
    return Draw(torch.float32)


def test_the_kernels_are_imported_at_their_first_call_alone() -> None:
    code = """
import sys, torch, viops
kernels = "viops.ops.weight_standardization.triton_kernels"
weight = torch.randn(2, 3, 3, 3)
with viops.use_backend("reference"):
    viops.standardize_weights([weight, weight])
viops.explain("standardize_weight", weight)
assert kernels not in sys.modules
with viops.use_backend("triton"):
    viops.standardize_weight(weight)
assert kernels in sys.modules
"""
    run_python(code, TRITON_INTERPRET="1")


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("eps_inside", [True, False])
@pytest.mark.parametrize("size", [2, 16, 17, 100, 2048, 2049, 8192, 8193, 10000])
def test_blocks_and_pieces(
    monkeypatch: pytest.MonkeyPatch, size: int, eps_inside: bool, dtype: torch.dtype
) -> None:
    """Filters around the sizes at which a launch is cut otherwise, in blocks as a GPU has them."""
    from viops.ops.weight_standardization import triton_kernels

    monkeypatch.setattr(triton_kernels, "_INTERPRETED_BLOCK", 2048)
    draw = Draw(dtype)
    weight, grad = draw.normal(5, size), draw.normal(5, size)
    gain = draw.normal(5, dtype=accumulation_dtype(dtype))
    options = 0.1, False, eps_inside
    forward, backward, _, _ = dispatch._kernels[OP]["triton"]
    found = forward(weight, gain, *options)
    found = *found, *backward(grad, weight, gain, *found[1:], *options, True)
    wide = (weight.double(), gain.double())
    expected = reference.standardize_weight_forward(*wide, *options)
    saved = expected[1:]
    expected = (
        *expected,
        *reference.standardize_weight_backward(grad.double(), *wide, *saved, *options, True),
    )
    names = "out", "mean", "factor", "grad_weight", "grad_gain"
    for name, result, truth in zip(names, found, expected, strict=True):
        assert_matches(name, result, truth, dtype if name.startswith("grad") else None)


@interpreted
def test_many_weights_are_one_launch_each_way(draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    from viops.ops.weight_standardization import triton_kernels

    launched = []
    for name in [name for name in vars(triton_kernels) if name.endswith("_kernel")]:
        kernel = getattr(triton_kernels, name)

        class Noting:
            def __getitem__(self, grid: tuple, name: str = name, kernel: object = kernel) -> object:
                launched.append((name, grid))
                return kernel[grid]

        monkeypatch.setattr(triton_kernels, name, Noting())
    # 128 columns and 16 filters, 512 and 4, 2048 and 1, 8192 and 1, pieces of one
    shapes = [(20, 100), (5, 512), (3, 33, 7, 1), (2, 4608), (3, 9216), (0, 5), (2, 513)]
    programs = 2 + 2 + 3 + 2 + 3 + 0 + 2
    weights = [draw.normal(*shape).requires_grad_() for shape in shapes]
    with viops.use_backend("triton"):
        outs = viops.standardize_weights(weights)
        torch.autograd.grad(sum(out.sum() for out in outs), weights)
    kernels = [f"standardize_weights_{way}_kernel" for way in ("forward", "backward")]
    assert launched == [(name, (programs,)) for name in kernels]


@interpreted
def test_weights_at_odd_addresses(draw: Draw) -> None:
    """Which no load of several elements at once may read."""
    storage = draw.normal(4 * 512 + 1 + 4 * 64)
    weights = [storage[1 : 4 * 512 + 1].view(4, 512), storage[-4 * 64 :].view(4, 64)]
    with viops.use_backend("triton"):
        outs = viops.standardize_weights(weights)
    for out, weight in zip(outs, weights, strict=True):
        torch.testing.assert_close(out, reference.standardize_weight(weight))
    from viops.ops.weight_standardization import triton_kernels

    table, _, _ = triton_kernels._table(weights, outs, [None] * 2, weights, True, True)
    assert table[triton_kernels._KIND.value].tolist() == [triton_kernels._IN_PIECES.value, 0]


BAD = [
    (0, lambda t: t[0], ValueError, "weight: expected"),
    (0, lambda t: t[:, ::2], ValueError, "weight: expected a contiguous"),
    (1, lambda t: t[1:], ValueError, "gain: expected shape"),
    (1, lambda t: t.double(), TypeError, "gain: expected torch.float32"),
    (1, lambda t: t.to("meta"), ValueError, "gain: expected a tensor on cpu"),
    (1, lambda t: t[:1].expand(5), ValueError, "gain: expected a contiguous"),
]
BAD_RESULTS = [
    (0, lambda t: t[1:], ValueError, "grad_out: expected shape"),
    (0, lambda t: t.double(), TypeError, "grad_out: expected torch.float32"),
    (3, lambda t: t[1:], ValueError, "mean: expected shape"),
    (3, lambda t: t.double(), TypeError, "mean: expected torch.float32"),
    (4, lambda t: t[:1].expand(5), ValueError, "factor: expected a contiguous"),
]


def changed(args: tuple, place: int, change: object) -> tuple:
    return *args[:place], change(args[place]), *args[place + 1 :]


@interpreted
@pytest.mark.parametrize(("place", "change", "error", "message"), BAD)
def test_the_kernels_are_guarded_without_the_public_function(
    draw: Draw, place: int, change, error: type[Exception], message: str
) -> None:
    forward, backward, _, _ = dispatch._kernels[OP]["triton"]
    args = draw.normal(5, 21), draw.normal(5)
    saved = forward(*args, *OPTIONS)
    bad = changed(args, place, change)
    with pytest.raises(error, match=f"^{message}"):
        forward(*bad, *OPTIONS)
    with pytest.raises(error, match=f"^{message}"):
        backward(saved[0], *bad, *saved[1:], *OPTIONS, True)


@interpreted
@pytest.mark.parametrize(("place", "change", "error", "message"), BAD_RESULTS)
def test_backward_is_guarded(
    draw: Draw, place: int, change, error: type[Exception], message: str
) -> None:
    forward, backward, _, _ = dispatch._kernels[OP]["triton"]
    args = draw.normal(5, 21), draw.normal(5)
    out, mean, factor = forward(*args, *OPTIONS)
    args = out, *args, mean, factor
    with pytest.raises(error, match=f"^{message}"):
        backward(*changed(args, place, change), *OPTIONS, True)


def test_what_the_op_returns_shares_no_memory(draw: Draw) -> None:
    """torch refuses custom ops whose results alias each other."""
    for backend in ("reference", "triton" if triton_runtime.INTERPRETED else "reference"):
        with viops.use_backend(backend):
            results = op._standardize_weight(draw.normal(5, 21), None, *OPTIONS)
        assert len({result.untyped_storage().data_ptr() for result in results}) == 3


# The kernels compiled for a GPU that need not be there.

DEFINITIONS = """
from viops.ops.weight_standardization import op, triton_kernels
from viops.tensors import accumulation_dtype
modules = [triton_kernels]

def call(dtype, filters, size, eps_inside=True):
    compiled.clear()
    weight = torch.empty(filters, size, dtype=dtype)
    gain = torch.empty(filters, dtype=accumulation_dtype(dtype))
    out, mean, factor = op._triton_forward(weight, gain, 1e-5, True, eps_inside)
    op._triton_backward(out, weight, gain, mean, factor, 1e-5, True, eps_inside, True)
    return list(compiled)

def call_many(dtype, shapes, eps_inside=True):
    compiled.clear()
    weights = [torch.empty(shape, dtype=dtype) for shape in shapes]
    none, options = [None] * len(weights), (1e-5, True, eps_inside)
    outs, mean, factor = op._forward_together(weights, none, options)
    op._backward_together(outs, weights, none, mean, factor, options, True)
    return list(compiled)

def stack(kernel):
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True)
    return int(re.search(r"STACK:(\\d+)", done.stdout.decode()).group(1))
"""
run_compiled = functools.partial(triton_compiled.run_compiled, DEFINITIONS)


def test_a_new_size_of_the_same_class_compiles_nothing(tmp_path: Path) -> None:
    body = """
call(torch.float32, 64, 576)
call(torch.float32, 64, 577)
call_many(torch.float32, [(4, 9), (4, 512)])
first = variants()
for filters, size in ((1, 528), (16, 1024), (17, 640), (4096, 992), (3, 999), (48, 1023)):
    call(torch.float32, filters, size)
for shapes in ([(1, 1)], [(64, 147), (64, 64), (256, 2304), (2, 10000)] * 4, [(0, 5), (5, 0)]):
    call_many(torch.float32, shapes)
print(first, variants())
"""
    first, after = map(int, run_compiled(body, tmp_path).split())
    assert first == after == 4 + 2


@pytest.mark.parametrize("capability", [80, 90])
def test_registers_do_not_spill(tmp_path: Path, capability: int) -> None:
    body = """
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for size in (9, 64, 512, 2048, 4608, 9216):
        for kernel in call(dtype, 64, size, eps_inside=size != 512):
            print(stack(kernel), kernel.metadata.name, size, dtype)
    for inside in (True, False):
        for kernel in call_many(dtype, [(4, 9), (4, 512)], inside):
            print(stack(kernel), kernel.metadata.name, dtype)
"""
    lines = run_compiled(body, tmp_path, capability).splitlines()
    assert len(lines) == 3 * (6 * 2 + 2 * 2)
    for line in lines:
        assert line.startswith("0 "), line


def test_whole_vectors_are_loaded_where_filters_are_aligned(tmp_path: Path) -> None:
    body = """
def vectors(kernel):
    return len(re.findall(r"ld[.]global[.\\w]*[.]v4[.]b32", kernel.asm["ptx"]))

for dtype in (torch.float32, torch.bfloat16):
    for size in (64, 512, 4608):
        print(*(vectors(kernel) > 0 for kernel in call(dtype, 64, size)))
    print(*(vectors(kernel) > 0 for kernel in call_many(dtype, [(4, 9), (4, 512)])))
"""
    assert set(run_compiled(body, tmp_path).split()) == {"True"}


def test_float64_keeps_its_width(tmp_path: Path) -> None:
    body = """
for kernel in (*call(torch.float64, 64, 576), *call_many(torch.float64, [(4, 9), (4, 512)])):
    narrowed = r"cvt[.\\w]*[.]f64[.]f32|cvt[.\\w]*[.]f32[.]f64"
    assert not re.search(narrowed, kernel.asm["ptx"]), kernel.metadata.name
    print("checked")
"""
    assert run_compiled(body, tmp_path) == "checked\n" * 4
