"""`make new-op`: what it makes works, and what it refuses leaves the checkout as it was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAME = "halved_tokens"

MADE = {
    f"csrc/{NAME}/{NAME}.h",
    f"csrc/{NAME}/bind.cpp",
    f"csrc/{NAME}/cpu.cpp",
    *(
        f"python/viops/ops/{NAME}/{file}"
        for file in ("__init__.py", "README.md", "reference.py", "op.py", "module.py", "cases.py")
    ),
    f"tests/ops/test_{NAME}.py",
    f"benches/bench_{NAME}.py",
}
EDITED = {
    "csrc/CMakeLists.txt": f"add_op({NAME} CPU)",
    "python/viops/catalog.py": f'        name="{NAME}",',
    "python/viops/__init__.py": f"from .ops.{NAME} import {NAME}",
    "python/viops/nn.py": f"from .ops.{NAME}.module import HalvedTokens",
    "README.md": f"| `{NAME}` (",
}

#: The new op as a user meets it, without the extension, which was not built for it.
USE = f"""
import torch, viops
x = torch.arange(6.0).reshape(1, 2, 3).requires_grad_()
y = viops.{NAME}(x, scale=0.5)
y.sum().backward()
assert y.flatten().tolist() == [0, 0.5, 1, 1.5, 2, 2.5], y
assert x.grad.eq(0.5).all(), x.grad
assert torch.equal(viops.nn.HalvedTokens(0.5)(x), y)
assert torch.equal(torch.ops.viops.{NAME}(x, 0.5), y)
print(viops.__file__)
"""


def run(
    folder: Path, *words: str, expected: int = 0, **environment: str
) -> subprocess.CompletedProcess:
    """A Python command in a checkout; it must end with the expected status."""
    result = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder / "python"), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == expected, result.stdout + result.stderr
    return result


def new_op(folder: Path, *words: str, expected: int = 0) -> subprocess.CompletedProcess:
    return run(folder, "-S", ".ci/new_op.py", *words, expected=expected)


def copy_of_checkout(folder: Path) -> Path:
    """Its sources alone: nothing that was built."""
    built = shutil.ignore_patterns("__pycache__", "*.so", "results", "golden")
    for name in (".ci", "benches", "csrc", "python", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    for name in (".clang-format", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by its place, but for what Python leaves behind."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not {"__pycache__", ".pytest_cache"} & set(path.parts)
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout without a new op; tests leave it as it is."""
    return copy_of_checkout(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout with the new op; tests leave it as it is."""
    folder = copy_of_checkout(tmp_path_factory.mktemp("made"))
    new_op(folder, NAME)
    return folder


def test_files_are_made_and_lists_grow_by_a_row(plain: Path, made: Path) -> None:
    before, after = contents(plain), contents(made)
    assert set(after) - set(before) == MADE
    assert {name for name in before if after.get(name) != before[name]} == set(EDITED)
    for name, line in EDITED.items():
        new = after[name].decode().splitlines()
        assert sum(text.startswith(line) for text in new) == 1
        rest = iter(new)
        lost = [text for text in before[name].decode().splitlines() if text not in rest]
        assert all(text.startswith("__all__ = [") for text in lost)  # on one line, it grows
    for name in MADE:
        text = after[name].decode()
        assert "my_op" not in text
        assert "MyOp" not in text
        assert "My op" not in text


def test_rows_stand_beside_those_of_the_other_families(made: Path) -> None:
    for name, line in (("csrc/CMakeLists.txt", "add_op("), ("README.md", "| `")):
        lines = (made / name).read_text().splitlines()
        (place,) = (i for i, text in enumerate(lines) if text.startswith(EDITED[name]))
        assert lines[place - 1].startswith(line)


def test_the_op_works_on_the_reference(made: Path) -> None:
    result = run(made, "-c", USE, VIOPS_BACKEND="reference")
    assert Path(result.stdout.strip()).is_relative_to(made)


def test_catalog_and_contract_hold(made: Path) -> None:
    """All that holds without a build: the new op's kernels cannot run here."""
    result = run(
        made,
        *("-m", "pytest", "-p", "no:cacheprovider"),
        *("tests/test_catalog.py", f"tests/ops/test_{NAME}.py"),
        "tests/test_contract.py::test_matches_float64",
        "tests/test_contract.py::test_bad_input_names_the_argument",
        "tests/test_contract.py::test_every_op_has_the_cases_that_the_contract_is_run_on",
        "-k",
        f"test_catalog or test_every_op or {NAME} and not (cpu or float64 or float16 or large)",
        *("-W", "ignore::RuntimeWarning"),
    )
    assert "passed" in result.stdout
    assert "skipped" not in result.stdout


# Names of other lengths move the places where formatters break lines, and the order of includes.
LENGTHS = pytest.mark.parametrize("name", ["ab2", NAME, "w" * 36])


@pytest.fixture
def made_as(tmp_path: Path, name: str) -> list[str]:
    """The files of an op of that name and those that list it, in tmp_path."""
    folder = copy_of_checkout(tmp_path)
    output = new_op(folder, name).stdout
    return [line.split()[1] for line in output.splitlines() if line.startswith(("make ", "edit "))]


@LENGTHS
def test_ruff_passes(tmp_path: Path, made_as: list[str]) -> None:
    pytest.importorskip("ruff", reason="ruff, which make check runs, is not installed")
    edited = [name for name in made_as if name in EDITED and name.endswith(".py")]
    made = [name for name in made_as if name not in EDITED and name.endswith(".py")]
    assert len(edited) == 3
    assert len(made) == 7
    ruff = ("-m", "ruff")
    run(tmp_path, *ruff, "check", "--no-cache", *made)
    # of what stood there before, only the order of imports and exports is the scaffold's work
    run(tmp_path, *ruff, "check", "--no-cache", "--select", "F,I,RUF022", *edited)
    run(tmp_path, *ruff, "format", "--no-cache", "--check", *made, *edited)


@LENGTHS
def test_clang_format_passes(tmp_path: Path, made_as: list[str]) -> None:
    clang_format = pytest.importorskip(
        "clang_format", reason="clang-format, which make check runs, is not installed"
    ).get_executable("clang-format")
    sources = [name for name in made_as if name.endswith((".h", ".cpp"))]
    assert len(sources) == 3
    subprocess.run([clang_format, "--dry-run", "--Werror", *sources], cwd=tmp_path, check=True)


@pytest.mark.parametrize("source", ["bind.cpp", "cpu.cpp"])
def test_the_kernel_compiles(made: Path, source: str) -> None:
    """So that the template follows csrc/common; it is not linked here."""
    pybind11 = pytest.importorskip(
        "pybind11", reason="pybind11, which builds need, is not installed"
    )
    includes = (made / "csrc", pybind11.get_include(), sysconfig.get_path("include"))
    command = ["c++", "-fsyntax-only", "-std=c++17", "-DVIOPS_CPU_LEVEL=baseline"]
    command += [f"-I{folder}" for folder in includes]
    done = subprocess.run(
        [*command, made / "csrc" / NAME / source], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_second_run_is_an_error_that_changes_nothing(made: Path) -> None:
    before = contents(made)
    result = new_op(made, NAME, expected=2)
    assert f"NAME: '{NAME}' exists already: csrc/{NAME}" in result.stderr
    assert contents(made) == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "required: NAME"),
        (["two", "names"], "unrecognized arguments: names"),
        ([""], "NAME: expected snake_case"),
        (["MyOp"], "NAME: expected snake_case"),
        (["my-op"], "NAME: expected snake_case"),
        (["_my_op"], "NAME: expected snake_case"),
        (["my__op"], "NAME: expected snake_case"),
        (["my_op_"], "NAME: expected snake_case"),
        (["2d_op"], "NAME: expected snake_case"),
        (["ops/my_op"], "NAME: expected snake_case"),
        (["my_op\n"], "NAME: expected snake_case"),
        (["m" * 37], "NAME: expected at most 36 characters, got 37"),
        (["lambda"], "NAME: 'lambda' is a word of Python or C++ itself"),
        (["namespace"], "NAME: 'namespace' is a word of Python or C++ itself"),
        (["my_op_backward"], "NAME: 'my_op_backward' ends like the kernels of an op"),
        (["token_reorganization"], "NAME: 'token_reorganization' exists already: csrc/token"),
        (["common"], "NAME: 'common' exists already: csrc/common"),
        (["patch"], "NAME: 'patch' exists already: python/viops/patch"),
        (["contract"], "NAME: 'contract' exists already: tests/contract.py"),
        (["reorganize_tokens"], "NAME: 'reorganize_tokens' already stands for something in python"),
        (["scale_row"], "NAME: 'scale_row' already stands for something in csrc/common/rows.h"),
        (["class_Attention"], "NAME: expected snake_case"),
        (["native"], "NAME: 'native' exists already: python/viops/native.py"),
        (["pytest"], "NAME: 'pytest' already stands for something in .ci/new_op/"),
    ],
)
def test_names_that_cannot_be(plain: Path, words: list[str], told: str) -> None:
    before = contents(plain)
    assert told in new_op(plain, *words, expected=2).stderr
    assert contents(plain) == before


@pytest.mark.parametrize(
    ("place", "text", "told"),
    [
        ("csrc/CMakeLists.txt", "add_op(", "no line to put this one after: add_op(halved_tokens"),
        ("python/viops/catalog.py", "FAMILIES", "there is no FAMILIES"),
        ("python/viops/__init__.py", "__all__", "there is no __all__"),
        ("python/viops/nn.py", "from .ops", "no import from .ops to put the new one beside"),
        ("README.md", "| `", "no line to put this one after: | `halved_tokens`"),
    ],
)
def test_a_list_that_cannot_be_edited_is_named(
    tmp_path: Path, place: str, text: str, told: str
) -> None:
    path = copy_of_checkout(tmp_path) / place
    other = "from elsewhere" if text.startswith("from") else "other"
    path.write_text(path.read_text().replace(text, other))
    before = contents(tmp_path)
    assert f"NAME: {place}: {told}" in new_op(tmp_path, NAME, expected=2).stderr
    assert contents(tmp_path) == before


def test_leftovers_of_python_are_no_op(tmp_path: Path) -> None:
    folder = copy_of_checkout(tmp_path)
    cache = folder / f"python/viops/ops/{NAME}/__pycache__"
    cache.mkdir(parents=True)
    (cache / "op.cpython-311.pyc").write_bytes(b"")
    new_op(folder, NAME)
    assert set(contents(folder)) >= MADE
