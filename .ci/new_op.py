"""Makes a new op family: `make new-op NAME=my_op`.

The folder new_op/ beside this file mirrors the checkout and holds a family that works, called
my_op: y = x * scale on the CPU, forward and backward.  This copies it under the new name and adds
it to the lists that name every family.  Where it refuses, nothing has been written.
"""

from __future__ import annotations

import argparse
import ast
import keyword
import re
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = Path(__file__).resolve().parent / "new_op"

#: Up to this length ruff and clang-format leave the lines of the templates as they are.
MAX_LENGTH = 36

CPP_WORDS = frozenset(
    "alignas alignof asm auto bool case catch char compl concept const consteval constexpr "
    "constinit default delete do double enum explicit export extern false float friend goto "
    "inline int linux long mutable namespace new noexcept nullptr operator private protected "
    "public register requires short signed sizeof static struct switch template this throw true "
    "typedef typeid typename union unix unsigned using virtual void volatile xor".split()
)

CATALOG_ROW = """\
    Family(
        name="my_op",
        paper="none: y = x * scale, as make new-op leaves it",
        ops={
            "my_op": {
                "cuda": "not written yet",
                "triton": "not written yet",
                "torch": _NO_SUCH_OP,
            },
        },
    ),
"""

README_ROW = (
    "| `my_op` ([y = x * scale](python/viops/ops/my_op/README.md)) | each element times a number "
    "| cpu | not measured yet |\n"
)

NEXT_STEPS = """\
It works as it is; try it:
  make install
  .venv/bin/python -m pytest tests -k my_op
Then make it yours, with the tests green after each step:
  1. python/viops/ops/my_op (VIOPS_BACKEND=reference runs without the kernels):
     reference.py, the formula and its derivative in plain PyTorch;
     op.py, arguments, checks, schema, fake, autograd, docstring;
     cases.py, inputs good and bad, some of which the contract test asks for by name
  2. csrc/my_op:
     my_op.h, the contracts of the kernels; bind.cpp, the checks that guard memory;
     cpu.cpp, the kernels
  3. python/viops/ops/my_op/module.py, where the paper's code has modules;
     tests/ops/test_my_op.py, what the contract test does not cover;
     benches/bench_my_op.py, with sizes, floor and bars: python -m viops bench --op my_op
  4. python/viops/ops/my_op/README.md, the rows of python/viops/catalog.py and README.md, and
     CHANGELOG.md; then make check"""


class Refusal(Exception):
    """Why no op can be made under this name."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="new_op.py", description=__doc__.splitlines()[0])
    parser.add_argument("name", metavar="NAME", help="the family's name, in snake_case")
    name = parser.parse_args().name
    try:
        check_name(name)
        texts = {**new_files(name), **edited_files(name)}
    except Refusal as refusal:
        parser.error(f"NAME: {refusal}")
    for path, text in texts.items():
        print(f"{'edit' if path.exists() else 'make'}  {path.relative_to(ROOT)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"\n{renamed(NEXT_STEPS, name)}")


def check_name(name: str) -> None:
    """Raises Refusal where this is no name for a new family."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise Refusal(f"expected snake_case (a-z, 0-9 and single _ between), got {name!r}")
    if len(name) > MAX_LENGTH:
        raise Refusal(f"expected at most {MAX_LENGTH} characters, got {len(name)}: {name!r}")
    if keyword.iskeyword(name) or name in CPP_WORDS:
        raise Refusal(f"{name!r} is a word of Python or C++ itself")
    if name.endswith(("_forward", "_backward")):
        raise Refusal(f"{name!r} ends like the kernels of an op; give the op's own name")
    for path in existing_places(name):
        raise Refusal(f"{name!r} exists already: {path.relative_to(ROOT)}")
    for path in [
        *(ROOT / "python/viops" / file for file in ("__init__.py", "catalog.py", "nn.py")),
        ROOT / "csrc/CMakeLists.txt",
        ROOT / "csrc/module.cpp",
        *sorted((ROOT / "csrc/common").glob("*.h")),
        *template_files(),
    ]:
        words = re.findall(r"\w+", path.read_text(encoding="utf-8"))
        taken = {name, class_name(name)} & set(words) - {"my_op", "MyOp"}
        if taken:
            where = path.relative_to(ROOT)
            raise Refusal(f"{taken.pop()!r} already stands for something in {where}")


def existing_places(name: str) -> list[Path]:
    """Files where those of a family of this name would be, or would be mistaken for them."""
    found = [
        ROOT / "python/viops" / name,
        ROOT / f"python/viops/{name}.py",
        ROOT / "csrc" / name,
        ROOT / "python/viops/ops" / name,
        ROOT / f"tests/{name}.py",
        ROOT / f"tests/test_{name}.py",
        ROOT / f"tests/ops/test_{name}.py",
        ROOT / f"benches/bench_{name}.py",
    ]
    return [path for path in found if path.is_file() or holds_files(path)]


def holds_files(folder: Path) -> bool:
    """Whether a folder is there and holds more than what Python leaves behind."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return any("__pycache__" not in path.parts for path in files)


def template_files() -> list[Path]:
    return sorted(
        path
        for path in TEMPLATES.rglob("*")
        if path.suffix in (".h", ".cpp", ".py", ".md") and path.is_file()
    )


def class_name(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


def renamed(text: str, name: str) -> str:
    """A template's text or path, with my_op under its new name in each of its forms."""
    title = name.replace("_", " ").capitalize()
    return text.replace("my_op", name).replace("MyOp", class_name(name)).replace("My op", title)


def new_files(name: str) -> dict[Path, str]:
    """The files of the family and what goes into them."""
    files = {}
    for template in template_files():
        text = renamed(template.read_text(encoding="utf-8"), name)
        path = ROOT / renamed(str(template.relative_to(TEMPLATES)), name)
        files[path] = with_sorted_includes(text) if path.suffix == ".cpp" else text
    return files


def with_sorted_includes(text: str) -> str:
    """The same with each run of includes in the order in which clang-format puts them."""

    def in_order(match: re.Match) -> str:
        return "".join(sorted(match[0].splitlines(keepends=True)))

    return re.sub(r'(#include ".*"\n)+', in_order, text)


def edited_files(name: str) -> dict[Path, str]:
    """The files that list all families, with the new one added."""
    families = [path.name for path in (ROOT / "python/viops/ops").iterdir()]
    edits = {
        "csrc/CMakeLists.txt": lambda text: after_last_line(
            text, lambda line: line.startswith("add_op("), f"add_op({name} CPU)\n"
        ),
        "python/viops/catalog.py": lambda text: with_catalog_row(text, name),
        "python/viops/__init__.py": lambda text: with_export(text, f"ops.{name}", name),
        "python/viops/nn.py": lambda text: with_export(
            text, f"ops.{name}.module", class_name(name)
        ),
        "README.md": lambda text: after_last_line(
            text,
            lambda line: any(line.startswith(f"| `{family}`") for family in families),
            renamed(README_ROW, name),
        ),
    }
    files = {}
    for place, edit in edits.items():
        path = ROOT / place
        try:
            files[path] = edit(path.read_text(encoding="utf-8"))
        except LookupError as error:
            raise Refusal(f"{place}: {error}") from None
    return files


def after_last_line(text: str, matches: Callable[[str], bool], new: str) -> str:
    """The text with a line added after the last one that matches."""
    lines = text.splitlines(keepends=True)
    places = [i for i, line in enumerate(lines) if matches(line)]
    if not places:
        raise LookupError(f"no line to put this one after: {new.rstrip()}")
    return "".join([*lines[: places[-1] + 1], new, *lines[places[-1] + 1 :]])


def with_catalog_row(text: str, name: str) -> str:
    """catalog.py with a family added at the end of FAMILIES."""
    families = assignment(text, "FAMILIES")
    lines = text.splitlines(keepends=True)
    last = families.end_lineno - 1  # the line of the closing parenthesis
    return "".join([*lines[:last], renamed(CATALOG_ROW, name), *lines[last:]])


def with_export(text: str, module: str, exported: str) -> str:
    """A module's text that also imports a name from a family, and lists it in __all__."""
    lines = text.splitlines(keepends=True)
    names = assignment(text, "__all__")  # stands below the imports: their places stay
    lines[names.lineno - 1 : names.end_lineno] = all_lines(
        [*ast.literal_eval(names.value), exported], one_line=names.lineno == names.end_lineno
    )
    imports = [
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.ImportFrom)
        and node.level == 1
        and (node.module or "").startswith("ops.")
    ]
    if not imports:
        raise LookupError("no import from .ops to put the new one beside")
    later = [node for node in imports if natural(node.module) > natural(module)]
    place = later[0].lineno - 1 if later else imports[-1].end_lineno
    lines.insert(place, f"from .{module} import {exported}\n")
    return "".join(lines)


def assignment(text: str, name: str) -> ast.Assign:
    """The statement that gives a module's variable its value."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node
    raise LookupError(f"there is no {name}")


def all_lines(names: Iterable[str], one_line: bool) -> list[str]:
    """__all__ with these names, sorted and laid out as ruff does it."""
    names = sorted(names, key=lambda name: (not name.isupper(), name.islower(), natural(name)))
    line = "__all__ = [" + ", ".join(f'"{name}"' for name in names) + "]\n"
    if one_line and len(line) <= 101:
        return [line]
    return ["__all__ = [\n", *(f'    "{name}",\n' for name in names), "]\n"]


def natural(text: str) -> list[tuple[str, int]]:
    """A sort key by which numbers within a name count as numbers."""
    parts = re.findall(r"\d+|\D", text)
    return [("0", int(part)) if part.isdigit() else (part, 0) for part in parts]


if __name__ == "__main__":
    main()
