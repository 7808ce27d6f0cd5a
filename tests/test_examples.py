"""The examples run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_micro_batch.py"


def test_the_example_runs(tmp_path: Path) -> None:
    words = ["--quick", "--plot", str(tmp_path / "curves.png")]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    for name in ("BN", "GN", "GN+WS", "BCN+WS"):
        assert f"\n{name:<8}" in done.stdout


def test_the_example_refuses_what_has_no_step() -> None:
    words = ["--quick", "--batch-size", "16"]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert "--every" in done.stderr
