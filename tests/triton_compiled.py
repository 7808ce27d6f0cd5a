"""Triton's kernels in Python processes of their own: compiled for a GPU, and not launched."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_python(code: str, **environment: str) -> str:
    """What a Python process of its own prints, with Triton's interpreter off unless asked for."""
    inherited = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


COMPILED = """
import re, subprocess, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from viops.cases import Draw
{definitions}

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", {capability}, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

driver.set_active(Driver())
compiled = []
kernels = [
    value
    for module in modules
    for name, value in vars(module).items()
    if name.endswith("_kernel")
]
for kernel in kernels:
    def compile_only(*args, run=kernel.run, warmup, **options):
        compiled.append(run(*args, warmup=True, **options))
    kernel.run = compile_only

def variants():
    return sum(len(kernel.device_caches[0][0]) for kernel in kernels)

{body}
"""


def run_compiled(definitions: str, body: str, cache: Path, capability: int = 90) -> str:
    """Runs `body` with kernels that are compiled and not launched.

    `definitions` names the `modules` of the kernels, and may have functions that launch them: what
    they compile is in `compiled`.  `variants` counts what has been compiled so far.
    """
    code = COMPILED.format(definitions=definitions, body=body, capability=capability)
    return run_python(code, TRITON_CACHE_DIR=str(cache))
