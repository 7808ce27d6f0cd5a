"""Reversible columns' Triton kernels: what the contract does not see."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import triton_compiled
from contract import DTYPES, case_id
from tolerances import assert_matches
from torch import Tensor
from viops import dispatch, triton_runtime
from viops.cases import Draw
from viops.ops.reversible_columns import reference

pytest.importorskip("triton", reason="triton is not installed")
interpreted = pytest.mark.skipif(
    not triton_runtime.INTERPRETED,
    reason="Triton compiles here: the contract's rows run on the GPU",
)
LAYOUTS = pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])


def laid_out(x: Tensor, last: bool) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x


@interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("size", [1, 16, 17, 128, 1023, 1025, 4097])
@LAYOUTS
def test_blocks_and_programs(
    monkeypatch: pytest.MonkeyPatch, last: bool, size: int, dtype: torch.dtype
) -> None:
    """Rows around the sizes at which a launch is cut otherwise, in blocks as a GPU has them."""
    from viops.ops.reversible_columns import triton_kernels

    monkeypatch.setattr(triton_kernels, "_INTERPRETED_BLOCK", triton_kernels._BLOCK)
    shape = (1, size, 37) if last else (3, 13, size)
    draw = Draw(dtype)
    f, x, grad = (laid_out(draw.normal(*shape), last) for _ in range(3))
    alpha = draw.normal(shape[1])
    alpha = alpha + 0.5 * alpha.sign()
    kernels = dispatch._kernels["reversible_step"]["triton"]
    wide_f, wide_x, wide_grad, wide_alpha = (t.double() for t in (f, x, grad, alpha))
    out = kernels.forward(f, x, alpha)
    assert_matches("out", out, reference.run_forward(wide_f, wide_x, wide_alpha))
    for given, wide in ((f, wide_f), (None, None)):
        found = kernels.backward(grad, x, given, alpha, True, True)
        expected = reference.run_backward(wide_grad, wide_x, wide, wide_alpha, True, True)
        names = "x", "grad_x", "grad_alpha"
        for name, result, wanted in zip(names, found, expected, strict=True):
            assert_matches(name, result, wanted)


BAD = [
    (0, lambda t: t[0, 0], "grad_out: expected"),
    (0, lambda t: t[1:], "values: expected shape"),
    (1, lambda t: t[:, 1:], "values: expected shape"),
    (1, lambda t: t.to("meta"), "values: expected a tensor on cpu"),
    (2, lambda t: t[..., :1], "f: expected shape"),
    (3, lambda t: t[1:], "alpha: expected C = 5"),
    (3, lambda t: t.to("meta"), "alpha: expected a tensor on cpu"),
]


@interpreted
@pytest.mark.parametrize(("place", "change", "message"), BAD)
def test_the_way_back_is_guarded_without_the_public_function(place: int, change, message) -> None:
    draw = Draw(torch.float32)
    args = [draw.normal(2, 5, 7) for _ in range(3)] + [draw.normal(5)]
    args[place] = change(args[place])
    kernels = dispatch._kernels["reversible_step"]["triton"]
    if message.startswith("values") and place == 0:
        args[2] = None  # f would be named first
    with pytest.raises(ValueError, match=f"^{message}"):
        kernels.backward(*args, True, True)


@interpreted
def test_the_step_is_guarded_without_the_public_function() -> None:
    draw = Draw(torch.float32)
    f, alpha = draw.normal(2, 5, 7), draw.normal(5)
    kernels = dispatch._kernels["reversible_step"]["triton"]
    for args, name in (((f[1:], f, alpha), "f"), ((f, f, alpha[1:]), "alpha")):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            kernels.forward(*args)


# The kernels compiled for a GPU that need not be there.

DEFINITIONS = """
from viops.ops.reversible_columns import carry, op, triton_kernels

modules = [triton_kernels]

def operands(shape, last, dtype, f_dtype):
    compiled.clear()
    x = torch.empty(shape, dtype=dtype)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    return x, x.to(f_dtype or dtype), torch.empty(shape[1], dtype=dtype)

def call(shape, last, dtype=torch.float32, f_dtype=None):
    x, f, alpha = operands(shape, last, dtype, f_dtype)
    op._triton_forward(f, x, alpha)
    op._triton_backward(x, x, f, alpha, True, True)
    for needs in ((True, True), (True, False), (False, True)):
        op._triton_backward(x, x, None, alpha, *needs)
    return list(compiled)

def call_with_rest(shape, last, dtype=torch.float32, f_dtype=None):
    x, f, alpha = operands(shape, last, dtype, f_dtype)
    rest = x.float()
    for factors in (alpha, None):
        for x_rest in (rest, None):
            carry._triton_forward(f, x, x_rest, factors)
        carry._triton_backward(x, rest, f, factors, None, True)
    for need_rest in (True, False):
        carry._triton_backward(x, rest, f, alpha, x, need_rest)
    return list(compiled)
"""

run_compiled = functools.partial(triton_compiled.run_compiled, DEFINITIONS)


def test_a_new_batch_compiles_nothing(tmp_path: Path) -> None:
    body = """
for last in (False, True):
    call((2, 64, 7, 7), last)
first = variants()
for batch in (1, 3, 16, 17, 64):
    for last in (False, True):
        call((batch, 64, 7, 7), last)
print(first, variants())
"""
    first, after = map(int, run_compiled(body, tmp_path).split())
    assert first == after == 10


def test_quotients_are_rounded_correctly_and_float64_keeps_its_width(tmp_path: Path) -> None:
    body = """
for last in (False, True):
    for dtype, f_dtype in (
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, None),
        (torch.float64, None),
    ):
        step, back, *derivatives = call((2, 24, 9, 5), last, dtype, f_dtype)
        assert "div.rn" in back.asm["ptx"]
        assert "div.full" not in back.asm["ptx"] and "div.approx" not in back.asm["ptx"]
        for kernel in (step, back, *derivatives):
            narrowed = r"cvt[.\\w]*[.]f64[.]f32|cvt[.\\w]*[.]f32[.]f64"
            assert dtype is not torch.float64 or not re.search(narrowed, kernel.asm["ptx"])
        print("checked")
"""
    assert run_compiled(body, tmp_path) == "checked\n" * 8


def test_with_rests_all_is_computed_in_float64(tmp_path: Path) -> None:
    body = """
for last in (False, True):
    for dtype, f_dtype in (
        (torch.float32, None),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, None),
        (torch.float16, None),
    ):
        kernels = call_with_rest((2, 24, 9, 5), last, dtype, f_dtype)
        for kernel in kernels:
            ptx = kernel.asm["ptx"]
            assert "sub.f64" in ptx
            assert not re.search(r"(add|mul|fma|sub|div)[.\\w]*[.]f32", ptx)
        print(len(kernels))
"""
    assert run_compiled(body, tmp_path) == "8\n" * 8


def test_with_rests_a_new_batch_compiles_nothing(tmp_path: Path) -> None:
    body = """
for last in (False, True):
    call_with_rest((2, 64, 7, 7), last)
first = variants()
for batch in (1, 3, 16, 17, 64):
    for last in (False, True):
        call_with_rest((batch, 64, 7, 7), last)
print(first, variants())
"""
    first, after = map(int, run_compiled(body, tmp_path).split())
    assert first == after
