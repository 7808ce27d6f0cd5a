"""The catalog against the tree: all that a family needs is there, and nothing it does not list."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import viops
from viops import catalog, dispatch
from viops.catalog import FAMILIES, Family

ROOT = Path(__file__).parent.parent
#: Ops whose results are integers, or that are derivatives themselves.
NO_DERIVATIVE = ("quantize_dfp", "reversible_step_backward")


def missing_places(family: Family, root: Path = ROOT) -> list[str]:
    """What is not there for a family, of the places that design and README name."""
    files = [
        f"csrc/{family.name}/{family.name}.h",
        f"csrc/{family.name}/bind.cpp",
        *(f"csrc/{family.name}/cpu.cpp" for _ in {"cpu"} & set(family.backends)),
        *(f"csrc/{family.name}/cuda.cu" for _ in {"cuda"} & set(family.backends)),
        *(
            f"python/viops/ops/{family.name}/{name}"
            for name in ("README.md", "reference.py", "op.py", "module.py", "cases.py")
        ),
        f"tests/ops/test_{family.name}.py",
        f"benches/bench_{family.name}.py",
    ]
    missing = [name for name in files if not (root / name).is_file()]
    cmake = root / "csrc/CMakeLists.txt"
    lines = cmake.read_text().splitlines() if cmake.is_file() else []
    if not any(line.strip().startswith(f"add_op({family.name}") for line in lines):
        missing.append(f"csrc/CMakeLists.txt: add_op({family.name} ...)")
    readme = root / "README.md"
    lines = readme.read_text().splitlines() if readme.is_file() else []
    if not any(line.startswith("|") and family.name in line for line in lines):
        missing.append(f"README.md: a row of the table of ops for {family.name}")
    return missing


@pytest.fixture(params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def test_every_place_is_there(family: Family) -> None:
    assert missing_places(family) == []


def test_a_missing_place_is_found(tmp_path: Path) -> None:
    lacks = {"cuda": "not written yet", "triton": "not written yet", "torch": "has none"}
    invented = Family("invented", "none", {"invented": lacks})
    missing = missing_places(invented, tmp_path)
    assert "csrc/invented/cpu.cpp" in missing
    assert "csrc/CMakeLists.txt: add_op(invented ...)" in missing
    assert len(missing) == 12
    assert len(missing_places(invented, ROOT)) == 12


def test_public_names_are_exported(family: Family) -> None:
    package = importlib.import_module(f"viops.ops.{family.name}")
    module = importlib.import_module(f"viops.ops.{family.name}.module")
    for name in package.__all__:
        assert name in viops.__all__
        assert getattr(viops, name) is getattr(package, name)
    for name in module.__all__:
        assert name in viops.nn.__all__
        assert getattr(viops.nn, name) is getattr(module, name)
    for op in family.ops:
        assert op in package.__all__


def test_public_names_say_what_they_do(family: Family) -> None:
    package = importlib.import_module(f"viops.ops.{family.name}")
    for name in package.__all__:
        text = getattr(package, name).__doc__
        for part in ("Args:", "Returns:", "Raises:"):
            assert part in text, f"{name}: its docstring has no {part}"


def test_every_backend_is_registered_or_lacking_with_a_reason(family: Family) -> None:
    for op, lacks in family.ops.items():
        assert set(lacks) <= set(catalog.BACKENDS)
        assert all(lacks.values())
        assert set(dispatch._kernels[op]) == set(catalog.backends_of(op))
        assert "reference" in dispatch._kernels[op]


def test_no_backend_but_listed_ones_has_source(family: Family) -> None:
    for backend, name in (("cpu", "cpu.cpp"), ("cuda", "cuda.cu")):
        assert (ROOT / "csrc" / family.name / name).is_file() == (backend in family.backends)
    kernels = ROOT / "python/viops/ops" / family.name / "triton_kernels.py"
    assert kernels.is_file() == ("triton" in family.backends)


def test_every_folder_and_file_of_an_op_is_in_the_catalog() -> None:
    names = {family.name for family in FAMILIES}
    folders = [
        path.name
        for parent in (ROOT / "csrc", ROOT / "python/viops/ops")
        for path in parent.iterdir()
        if path.is_dir() and path.name not in ("common", "__pycache__")
    ]
    assert set(folders) == names
    files = [
        *(path.stem.removeprefix("test_") for path in (ROOT / "tests/ops").glob("test_*.py")),
        *(path.stem.removeprefix("bench_") for path in (ROOT / "benches").glob("bench_*.py")),
    ]
    strangers = [file for file in files if not any(file.startswith(name) for name in names)]
    assert strangers == []


def test_every_registered_op_is_in_the_catalog() -> None:
    listed = {op for family in FAMILIES for op in family.ops}
    registered = {
        name.removeprefix("viops::").partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("viops::")
    }
    with_derivative = {op for op in listed if op not in NO_DERIVATIVE}
    assert registered == listed | {f"{op}_backward" for op in with_derivative}
    assert set(dispatch._kernels) == listed
    assert all(hasattr(torch.ops.viops, op) for op in listed)


def test_names_are_unique() -> None:
    ops = [op for family in FAMILIES for op in family.ops]
    assert len(ops) == len(set(ops))
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert sorted(viops.__all__) == sorted(set(viops.__all__))


def test_an_unknown_op_is_named() -> None:
    with pytest.raises(ValueError, match=r"^op: 'no_such_op' is not an op .* reorganize_tokens"):
        catalog.family_of("no_such_op")


def test_the_readme_gives_measured_ratios() -> None:
    """Each family's row ends in numbers, not in a placeholder."""
    for family in catalog.FAMILIES:
        (row,) = (
            line
            for line in (ROOT / "README.md").read_text().splitlines()
            if line.startswith(f"| `{family.name}`")
        )
        measured = row.rstrip(" |").rsplit("|", 1)[1]
        assert "not measured" in measured or any(char.isdigit() for char in measured)
