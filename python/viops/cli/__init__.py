"""The command line: `python -m viops demo | info | doctor | bench`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .backends import check_forced
from .console import INSTALL_DEMO, UserError

_COMMANDS = {
    "demo": "train a small ViT, patch it, show what is kept, time DeiT-S",
    "info": "versions, CPU level, CUDA architectures, and which op has which backend",
    "doctor": "run every op on every backend against the reference; say what is wrong",
    "bench": "measure ops against eager PyTorch, torch.compile and the hardware's floor",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status: 0 well, 1 something is wrong, 2 wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="python -m viops", description="viops: C++, CUDA and Triton kernels for vision models"
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    chosen = next((word for word in argv if word in _COMMANDS), None)
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == chosen:  # the others' modules, and what they import, are not needed
            try:
                module = import_module(f".{name}", __package__)
            except ModuleNotFoundError as error:
                print(f"viops {name}: {error}; {INSTALL_DEMO}", file=sys.stderr)
                return 2
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    try:
        check_forced()
        return args.run(args)
    except UserError as error:
        print(f"viops {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"viops {args.command}: interrupted", file=sys.stderr)
        return 130


__all__ = ["main"]
