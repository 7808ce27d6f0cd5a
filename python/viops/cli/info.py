"""`python -m viops info`: versions, what the extension was built for, and op x backend."""

from __future__ import annotations

import argparse
import platform

import torch

from .. import __version__, catalog, native
from .backends import absence, environment
from .console import print_heading, print_table, version_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """info takes no arguments."""


def run(args: argparse.Namespace) -> int:
    """Prints everything; always 0, since saying what is wrong is doctor's part."""
    print_table(("package", "version"), _versions())
    print_heading("Machine and extension")
    print_table(("what", "here"), _machine())
    print_heading("Environment")
    print_table(("variable", "value"), environment())
    print_heading("Ops and backends")
    _print_backends()
    return 0


def _versions() -> list[tuple[str, str]]:
    packages = ("timm", "torchvision", "triton", "numpy")
    rows = [
        ("viops", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
    ]
    return rows + [(name, version_of(name) or "not installed") for name in packages]


def _machine() -> list[tuple[str, str]]:
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        gpu = ", ".join(devices)
    else:
        gpu = "torch sees no CUDA device"
    rows = [
        ("processor", f"{platform.machine()}, {torch.get_num_threads()} torch threads"),
        ("GPU", gpu),
    ]
    extension = native.extension
    if extension is None:
        return [*rows, ("extension", f"{native.load_error}; run `python -m viops doctor`")]
    build = extension.build_info()
    threads = extension.threads()
    return [
        *rows,
        ("extension", f"{extension.__file__}, built by {build['compiler']}"),
        ("CPU level", f"{extension.cpu_level()} of {', '.join(extension.cpu_levels())}"),
        ("OpenMP runtime", f"{threads['runtime']}, {threads['max_threads']} threads"),
        ("CUDA part", cuda_part(build)),
    ]


def cuda_part(build: dict) -> str:
    """What build_info() says about CUDA, in words."""
    if build["cuda_architectures"]:
        return f"CUDA {build['cuda_version']} for {', '.join(build['cuda_architectures'])}"
    return f"none: {build['cuda_reason']}"


def _print_backends() -> None:
    notes: list[str] = []
    rows = []
    for family in catalog.FAMILIES:
        for op in family.ops:
            cells = [op]
            for backend in catalog.BACKENDS:
                reason = absence(op, backend)
                if reason is None:
                    cells.append("yes")
                    continue
                note = f"{backend}: {reason}"
                if note not in notes:
                    notes.append(note)
                cells.append(f"no [{notes.index(note) + 1}]")
            rows.append(cells)
    print_table(("op", *catalog.BACKENDS), rows)
    for number, note in enumerate(notes, 1):
        print(f"  [{number}] {note}")
