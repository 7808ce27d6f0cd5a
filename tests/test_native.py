"""The extension: how it is loaded, its threads, its CPU levels, and life without it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import viops
from viops import native

#: What the subprocesses below start with: an op large enough to run on several threads.
PRELUDE = """
import os, sys, warnings
import torch, viops
def run():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 197, 384, generator=generator, requires_grad=True)
    q = torch.randn(4, 6, 197, 64, generator=generator, requires_grad=True)
    scores = viops.class_attention_scores(q, q)
    tokens, index = viops.reorganize_tokens(x, scores.repeat(4, 1), 137)
    restored = viops.restore_tokens(tokens, index, 196)
    restored.square().sum().backward()
    return restored.detach(), q.grad
"""

BLOCK_EXTENSION = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "viops._C":
            raise ImportError("blocked by the test")
sys.meta_path.insert(0, Block())
"""


def run_python(
    code: str, cwd: Path, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "default", "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def output_of(code: str, cwd: Path, **environment: str) -> str:
    result = run_python(code, cwd, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_extension_is_there() -> None:
    assert native.load_error is None
    assert native.require() is native.extension


def test_levels() -> None:
    extension = native.require()
    levels = extension.cpu_levels()
    assert levels
    assert levels == sorted(levels)
    assert extension.cpu_level() in levels
    with pytest.raises(ValueError, match="v9.*" + ", ".join(levels)):
        extension.set_cpu_level("v9")
    assert extension.cpu_level() in levels


def test_levels_hold_what_the_machine_has() -> None:
    """Against what the operating system says, not what the extension finds."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        pytest.skip("/proc/cpuinfo is Linux's")
    text = cpuinfo.read_text()
    flags = set(text.partition("flags")[2].partition("\n")[0].split())
    if "sse2" not in flags:
        pytest.skip("not an x86-64 CPU")
    expected = ["v2"]
    if {"avx2", "fma", "bmi2", "f16c"} <= flags:
        expected.append("v3")
        if {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"} <= flags:
            expected.append("v4")
    assert native.require().cpu_levels() == expected


def test_environment_forces_a_lower_level(tmp_path: Path) -> None:
    levels = native.require().cpu_levels()
    code = "from viops import native; print(native.require().cpu_level())"
    assert output_of(code, tmp_path, VIOPS_CPU_LEVEL="") == levels[-1]
    assert output_of(code, tmp_path, VIOPS_CPU_LEVEL=levels[0]) == levels[0]


def test_a_level_that_is_not_there_is_told(tmp_path: Path) -> None:
    code = "from viops import native; print(native.load_error)"
    told = output_of(code, tmp_path, VIOPS_CPU_LEVEL="v9")
    for part in ("VIOPS_CPU_LEVEL", "v9", *native.require().cpu_levels()):
        assert part in told


def test_build_info() -> None:
    info = native.require().build_info()
    assert set(info) >= {"compiler", "cuda_architectures", "cuda_version", "cuda_reason"}
    assert info["compiler"]
    built_for_cuda = bool(info["cuda_architectures"])
    assert (info["cuda_version"] is not None) == built_for_cuda
    assert bool(info["cuda_reason"]) != built_for_cuda


@pytest.mark.parametrize(
    ("architectures", "capability", "served"),
    [
        (["80-real", "90"], (9, 0), True),
        (["80-real", "90"], (8, 6), True),  # machine code of 8.0
        (["80-real", "90"], (12, 0), True),  # PTX of 9.0
        (["80-real", "90"], (7, 5), False),
        (["80-real", "90-real"], (10, 0), False),
        (["90-virtual"], (9, 0), True),
        (["90a"], (9, 0), True),
        (["90a"], (10, 0), False),
        (["native"], (9, 0), False),
    ],
)
def test_which_devices_an_architecture_serves(
    architectures: list[str], capability: tuple[int, int], served: bool
) -> None:
    assert native.serves(architectures, capability) == served


@pytest.mark.parametrize("count", [1, 2, 3])
def test_set_num_threads_holds(count: int) -> None:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        assert native.require().threads()["max_threads"] == count
    finally:
        torch.set_num_threads(previous)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="/proc is Linux's")
def test_one_openmp_runtime(tmp_path: Path) -> None:
    code = (
        PRELUDE
        + """
torch.set_num_threads(2)
run()
(torch.randn(400, 400) @ torch.randn(400, 400)).exp()
from viops import native
from pathlib import Path
mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
names = ("libgomp", "libomp", "libiomp")
runtimes = {os.path.realpath(m) for m in mapped if os.path.basename(m).startswith(names)}
print(*runtimes)
print(os.path.realpath(native.require().threads()["runtime"]))
"""
    )
    mapped, used = output_of(code, tmp_path).splitlines()
    assert mapped.split() == [used]


FORK = """
import os, numpy, torch, viops
torch.set_num_threads(2)
x, q = torch.randn(16, 197, 384), torch.randn(4, 6, 197, 64)
scores = torch.rand(16, 196)
def run():
    tokens, index = viops.reorganize_tokens(x, scores, 137)
    return viops.class_attention_scores(q, q), tokens, viops.restore_tokens(tokens, index, 196)
expected = [out.numpy() for out in run()]
child = os.fork()
if child == 0:  # here torch's own ops would hang, in OpenMP's threads that are gone
    same = all(map(numpy.array_equal, (out.numpy() for out in run()), expected))
    os._exit(0 if same else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
run()
"""

DATA_LOADER = """
import torch, viops
class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        tokens, _ = viops.reorganize_tokens(x, scores, 137)
        return tokens.sum()
torch.set_num_threads(2)
x, scores = torch.randn(16, 197, 384), torch.rand(16, 196)
expected = viops.reorganize_tokens(x, scores, 137)[0].sum()
loader = torch.utils.data.DataLoader(Data(), num_workers=2, multiprocessing_context="fork")
print(all(torch.allclose(value, expected, atol=1e-2) for value in loader))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(("code", "printed"), [(FORK, "0"), (DATA_LOADER, "True")])
def test_forked_process(code: str, printed: str, tmp_path: Path) -> None:
    """After threads have run in the parent; a hang is a timeout here."""
    result = run_python(code, tmp_path, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == printed


def test_calls_from_many_threads() -> None:
    x = torch.randn(4, 60, 32)
    scores = torch.rand(4, 59)
    expected = viops.reorganize_tokens(x, scores, 20)[0]
    wrong = []

    def call() -> None:
        for _ in range(50):
            tokens, _ = viops.reorganize_tokens(x, scores, 20)
            if not torch.equal(tokens, expected):
                wrong.append(tokens)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_import_without_the_extension(tmp_path: Path) -> None:
    code = (
        BLOCK_EXTENSION
        + PRELUDE
        + """
from viops import native
assert native.extension is None
print(native.load_error)
try:
    native.require()
except RuntimeError as error:
    print(error)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    run()
    run()
told = [str(w.message) for w in caught if w.category is RuntimeWarning]
print(len(told), len(set(told)))
print(*told, sep="\\n")
"""
    )
    lines = output_of(code, tmp_path, VIOPS_STRICT="").splitlines()
    reason = "viops._C cannot be loaded: blocked by the test"
    assert lines[:2] == [reason, reason]
    assert lines[2] == "3 3"  # once for each of the three ops
    assert all("runs on the reference" in line and reason in line for line in lines[3:])


def test_strict_without_the_extension(tmp_path: Path) -> None:
    result = run_python(BLOCK_EXTENSION + PRELUDE + "run()", tmp_path, VIOPS_STRICT="1")
    assert result.returncode != 0
    assert "BackendError" in result.stderr
    assert "blocked by the test" in result.stderr
