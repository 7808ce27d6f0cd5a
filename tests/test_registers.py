"""`make registers`: reads what ptxas says, and fails where a kernel spills."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / ".ci"))
import registers  # noqa: E402

PTXAS = """
ptxas info    : 18 bytes gmem, 32 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN5viops2op13double_kernelIfEEvPT_' for 'sm_90'
ptxas info    : Function properties for _ZN5viops2op13double_kernelIfEEvPT_
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 352 bytes cumulative stack size, 132 bytes smem
ptxas info    : Compile time = 17.200 ms
ptxas info    : Compiling entry function '_ZN5viops6kernelEi' for 'sm_90'
ptxas info    : Function properties for _ZN5viops6kernelEi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
ptxas info    : Function properties for _Z6helperPii
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""

SPILLING = """
__global__ void spilling_kernel(float* x, const int* order) {
  float values[64];  // indexed at run time, and so not in registers
  for (int i = 0; i < 64; ++i) values[i] = x[i * 32 + threadIdx.x];
  for (int i = 0; i < 64; ++i) x[i * 32 + threadIdx.x] = values[order[i]];
}
"""

needs_nvcc = pytest.mark.skipif(registers.find_nvcc() is None, reason="there is no nvcc")


def test_what_ptxas_says_is_read() -> None:
    first, second, helper = registers.parse(PTXAS.format(stack=352, stores=476, loads=544))
    name = "_ZN5viops2op13double_kernelIfEEvPT_"
    assert first == registers.Kernel(name, "sm_90", 32, 352, 476, 544, 132)
    assert second == registers.Kernel("_ZN5viops6kernelEi", "sm_90", 255, 0, 0, 0, 0)
    assert helper.name == "_Z6helperPii"
    assert [kernel.is_clean for kernel in (first, second, helper)] == [False, True, True]


def test_names_are_those_of_the_source() -> None:
    for name, short in (
        ("void viops::op::double_kernel<float>(float*)", "double_kernel<float>"),
        ("viops::op::(anonymous namespace)::kernel(int)", "kernel"),
        (
            "void viops::(anonymous namespace)::kernel<viops::op::T, (bool)1>(int)",
            "kernel<T, (bool)1>",
        ),
        ("helper(int*, int)", "helper"),
    ):
        assert registers._short(name) == short


@pytest.mark.parametrize(
    ("stack", "stores", "loads", "status"), [(0, 0, 0, 0), (8, 0, 0, 1), (8, 4, 4, 1)]
)
def test_a_spill_is_a_failure(
    stack: int,
    stores: int,
    loads: int,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    text = PTXAS.format(stack=stack, stores=stores, loads=loads)
    monkeypatch.setattr(registers, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(registers, "compile_kernels", lambda *_: registers.parse(text))
    assert registers.main(["one.cu", "--json", str(tmp_path / "rows.json")]) == status
    out = capsys.readouterr().out
    assert f"9 kernels, {3 * status} with a stack frame or spills" in out
    assert ("SPILLS" in out) == (stores > 0)
    assert ("STACK" in out) == (stack > 0 and stores == 0)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {row["stack"] for row in rows} == {0, stack}


def test_without_nvcc_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(registers, "find_nvcc", lambda: None)
    assert registers.main([]) == 2
    assert "no nvcc" in capsys.readouterr().err


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / ".ci/registers.py"), *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@needs_nvcc
def test_a_kernel_that_needs_a_stack_is_found(tmp_path: Path) -> None:
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    done = run(str(source))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "spilling_kernel for sm_90" in done.stdout
    source.write_text("not CUDA")
    done = run(str(source))
    assert done.returncode == 2
    assert "nvcc does not compile" in done.stderr


@needs_nvcc
def test_the_kernels_of_viops_fit_into_registers() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
