"""The examples run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *words], capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("name", "starts"),
    [
        ("train_micro_batch.py", [f"{norm:<8}" for norm in ("BN", "GN", "GN+WS", "BCN+WS")]),
        ("train_int16.py", ["seed ", "mean ", "3.branch.0 ", "5.shortcut.0 "]),
        ("memory_vs_columns.py", ["stored ", "checkpoint ", "a node a column ", "viops "]),
        ("drift_vs_columns.py", ["float64 ", "float32 ", "bfloat16 autocast ", "bfloat16 "]),
    ],
)
def test_an_example_runs(tmp_path: Path, name: str, starts: list[str]) -> None:
    done = run(name, "--quick", "--plot", str(tmp_path / "curves.png"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    for start in starts:
        assert f"\n{start}" in done.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("train_micro_batch.py", ["--batch-size", "16"]),
        ("train_int16.py", ["--batch-size", "80"]),
    ],
)
def test_an_example_refuses_what_has_no_point(name: str, words: list[str]) -> None:
    done = run(name, "--quick", *words)
    assert done.returncode == 2
    assert "--every" in done.stderr


@pytest.mark.parametrize(
    "words", [["--columns", "0"], ["--image-size", "40"], ["--batch-size", "0"]]
)
@pytest.mark.parametrize("name", ["memory_vs_columns.py", "drift_vs_columns.py"])
def test_an_example_of_columns_refuses_what_is_no_size(name: str, words: list[str]) -> None:
    done = run(name, *words)
    assert done.returncode == 2
    assert words[0] in done.stderr


def test_an_example_refuses_what_is_no_share() -> None:
    done = run("train_micro_batch.py", "--quick", "--share", "1.5")
    assert done.returncode == 2
    assert "--share" in done.stderr
