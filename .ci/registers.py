"""Registers, stack, spills and shared memory of every CUDA kernel: `make registers`.

Compiles csrc/**/*.cu for the architectures that CMake builds for, prints what ptxas says of each
kernel, and exits with 1 where one spills registers or has a stack frame, with 2 without nvcc.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from steps import ROOT, find_nvcc

#: As third_party/cuda.cmake has them: machine code for sm_80 and sm_90, and PTX of compute_90, here
#: compiled for sm_100 as that device's driver does.
TARGETS = (
    "arch=compute_80,code=sm_80",
    "arch=compute_90,code=sm_90",
    "arch=compute_90,code=sm_100",
)
#: Those of CMake's build type Release.
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-DVIOPS_CUDA")

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+)(?:\+\d+)? bytes smem")


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel for one architecture; bytes but for the registers."""

    name: str
    architecture: str
    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0

    @property
    def is_clean(self) -> bool:
        return not (self.stack or self.spill_stores or self.spill_loads)


class CompilerError(Exception):
    """What nvcc said of a source that it does not compile."""


def parse(text: str) -> list[Kernel]:
    """The kernels in what `ptxas -v` prints, by their mangled names.

    A device function that is not inlined counts as one: its stack and spills are as bad.
    """
    kernels: dict[str, Kernel] = {}
    name = architecture = ""

    def note(**values: Any) -> None:
        kernels[name] = replace(kernels.get(name, Kernel(name, architecture)), **values)

    for line in text.splitlines():
        if match := _ENTRY.search(line):
            name, architecture = match.groups()
            note()
        elif match := _PROPERTIES.search(line):
            name = match.group(1)
        elif match := _STACK.search(line):
            stack, stores, loads = map(int, match.groups())
            note(stack=stack, spill_stores=stores, spill_loads=loads)
        elif match := _USED.search(line):
            shared = _SHARED.search(line)
            note(registers=int(match.group(1)), shared=int(shared.group(1)) if shared else 0)
    return list(kernels.values())


def compile_kernels(nvcc: Path, source: Path, target: str) -> list[Kernel]:
    """The kernels of one source for one architecture; CompilerError where nvcc refuses it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(nvcc), *FLAGS, "-Xptxas", "-v", "-cubin", f"-gencode={target}"]
        command += [f"-I{ROOT / 'csrc'}"]
        command += ["-o", str(Path(folder, "out.cubin")), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    if done.returncode:
        raise CompilerError(f"{source}, {target}:\n{text.strip()}")
    return parse(text)


def demangled(kernels: Sequence[Kernel]) -> list[Kernel]:
    """With names as the source has them, without namespaces and parameters."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not kernels:
        return list(kernels)
    names = "\n".join(kernel.name for kernel in kernels)
    done = subprocess.run([tool], input=names, capture_output=True, text=True, check=True)
    return [
        replace(kernel, name=_short(name))
        for kernel, name in zip(kernels, done.stdout.splitlines(), strict=True)
    ]


def _short(name: str) -> str:
    """`void viops::op::f<float>(float*)` is `f<float>`."""
    name = re.sub(r"\bviops::(?:\w+::)*(?:\(anonymous namespace\)::)?", "", name)
    depth = 0
    for place, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            name = name[:place]
            break
    return name.removeprefix("void ")


def report(kernels: Sequence[Kernel]) -> str:
    """A table, and how many kernels are not clean."""
    header = ("kernel", "for", "registers", "stack", "spill st", "spill ld", "shared", "")
    rows = [header] + [
        (
            kernel.name,
            kernel.architecture,
            *map(str, (kernel.registers, kernel.stack, kernel.spill_stores)),
            *map(str, (kernel.spill_loads, kernel.shared)),
            "" if kernel.is_clean else "SPILLS" if kernel.spill_stores else "STACK",
        )
        for kernel in kernels
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for name, *numbers in rows:
        cells = [name.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    unclean = [f"{each.name} for {each.architecture}" for each in kernels if not each.is_clean]
    lines.append(f"{len(kernels)} kernels, {len(unclean)} with a stack frame or spills")
    lines += [f"  {name}" for name in unclean]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="registers.py", description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, help="without: every .cu of csrc")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the table here too")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time (2)")
    args = parser.parse_args(argv)
    nvcc = find_nvcc()
    if nvcc is None:
        print("make registers: no nvcc; put it on PATH or set CUDACXX", file=sys.stderr)
        return 2
    sources = args.sources or sorted((ROOT / "csrc").rglob("*.cu"))
    work = [(source, target) for source in sources for target in TARGETS]
    try:
        with ThreadPoolExecutor(args.jobs) as pool:
            found = list(pool.map(lambda item: compile_kernels(nvcc, *item), work))
    except CompilerError as error:
        print(f"make registers: nvcc does not compile {error}", file=sys.stderr)
        return 2
    kernels = demangled([kernel for kernels in found for kernel in kernels])
    kernels.sort(key=lambda kernel: (kernel.name, int(re.sub(r"\D", "", kernel.architecture))))
    print(report(kernels))
    if args.json:
        rows = [asdict(kernel) for kernel in kernels]
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(not all(kernel.is_clean for kernel in kernels))


if __name__ == "__main__":
    sys.exit(main())
