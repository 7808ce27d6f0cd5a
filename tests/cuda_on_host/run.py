"""Tests the CUDA kernels built for the CPU: run.py plain|address|thread."""

from __future__ import annotations

import subprocess
import sys

import builds

#: What each kind runs; the race detector takes seconds a call, so it gets one dtype.
SELECTIONS = {
    "plain": "cuda_on_host or _cuda",
    "address": "cuda_on_host or _cuda",
    "thread": "cuda_on_host and test_matches_float64 and float32",
}


def main() -> int:
    """Builds, and runs pytest on the contract and the ops' own tests; further arguments are its."""
    if len(sys.argv) < 2 or sys.argv[1] not in builds.KINDS:
        print(f"usage: run.py {'|'.join(builds.KINDS)} [arguments of pytest]", file=sys.stderr)
        return 2
    kind, *rest = sys.argv[1:]
    builds.folder(kind)
    tests = builds.ROOT / "tests"
    files = [tests / "test_contract.py", *sorted((tests / "ops").glob("test_*_cuda.py"))]
    pytest = (sys.executable, "-m", "pytest", *map(str, files))
    selection = ["-k", SELECTIONS[kind], *rest]
    if kind in builds.RUNTIMES:
        # a sanitizer ends the process: its report must not be held back, nor the test's name
        selection += ["--capture=sys", "-v"]
    print(f"CUDA kernels on the CPU, build {kind}:", flush=True)
    return subprocess.run(
        builds.command(kind, *pytest, *selection), env=builds.environment(kind), cwd=builds.ROOT
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
