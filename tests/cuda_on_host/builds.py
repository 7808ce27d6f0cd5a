"""Builds the CUDA sources for the CPU, and gives what was built.

Each kind is the same sources in another build:

    plain    -O2; threads run in forward, reverse or random order
    address  AddressSanitizer and UndefinedBehaviorSanitizer: overruns, misaligned access
    thread   ThreadSanitizer: races, between the threads of a block and between blocks
"""

from __future__ import annotations

import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent.parent
KINDS = ("plain", "address", "thread")
#: What must come before all else in the process: the sanitizers' runtimes, and what they look up in
#: the C++ one when they start.
RUNTIMES = {"address": ("libasan.so", "libstdc++.so"), "thread": ("libtsan.so", "libstdc++.so")}
#: Python and torch end with memory that was never freed; a wrong step is to end the process.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
}
#: The kind that this process tests, where it is started for one.
KIND_VARIABLE = "VIOPS_CUDA_ON_HOST"


def kind_here() -> str:
    """The kind of build that this process tests."""
    return os.environ.get(KIND_VARIABLE, "plain")


def _tool(name: str) -> str:
    """A command of this environment, such as its cmake, or else of the machine."""
    beside = Path(sysconfig.get_path("scripts"), name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(
            f"building the CUDA sources for the CPU needs {name}: pip install {name}"
        )
    return found


def _run(*command: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}")


@functools.cache
def folder(kind: str) -> Path:
    """Where the programs and the extension of this kind are, built from the sources as they are."""
    import pybind11

    build = ROOT / "build/cuda_on_host" / f"{kind}-{sys.implementation.cache_tag}"
    build.mkdir(parents=True, exist_ok=True)
    with (build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building the same
        _run(
            _tool("cmake"),
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DVIOPS_CUDA_ON_HOST={kind}",
            "-DVIOPS_CUDA=OFF",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}",
        )
        _run(_tool("cmake"), "--build", str(build))
    return build / "tests/cuda_on_host"


@functools.cache
def extension() -> ModuleType:
    """`_C_cuda_on_host` of the kind that this process tests."""
    (path,) = folder(kind_here()).glob("_C_cuda_on_host*.so")
    spec = importlib.util.spec_from_file_location("_C_cuda_on_host", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++"):
        if name and shutil.which(name):
            return name
    raise RuntimeError("building the CUDA sources for the CPU needs a C++ compiler")


def _library_of_compiler(name: str) -> str:
    command = (_compiler(), f"-print-file-name={name}")
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(found).is_absolute():
        raise RuntimeError(f"{_compiler()} has no {name}")
    return str(Path(found).resolve())


def environment(kind: str) -> dict[str, str]:
    """The environment of a process that loads the extension of this kind."""
    variables = {**os.environ, **OPTIONS, KIND_VARIABLE: kind}
    if kind in RUNTIMES:
        variables["LD_PRELOAD"] = " ".join(map(_library_of_compiler, RUNTIMES[kind]))
    if kind == "thread":
        variables["OMP_NUM_THREADS"] = "1"  # torch's runtime is a stranger to the race detector
    return variables


@functools.cache
def lacks(kind: str) -> str | None:
    """What this machine lacks to run a build of this kind, or None."""
    try:
        for name in RUNTIMES.get(kind, ()):
            _library_of_compiler(name)
        run = subprocess.run(command(kind, "true"), capture_output=True, text=True)
    except RuntimeError as error:
        return str(error)
    return run.stderr.strip() if run.returncode else None


def command(kind: str, *words: str) -> tuple[str, ...]:
    """A command that can be run with a build of this kind."""
    # the race detector of GCC 12 knows not all layouts that address randomisation makes
    return (_tool("setarch"), "-R", *words) if kind == "thread" else words
