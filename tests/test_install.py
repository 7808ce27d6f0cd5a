"""The package builds by itself: no torch in the build, none among what it installs."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_a_wheel_builds_in_isolation(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--quiet",
        f"--wheel-dir={tmp_path}",
    ]
    command += ["-Ccmake.define.VIOPS_CUDA=OFF", f"-Cbuild-dir={tmp_path / 'build'}", str(ROOT)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("viops-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("dist-info/METADATA"))
        needs = [
            line
            for line in archive.read(metadata).decode().splitlines()
            if line.startswith("Requires-Dist:") and "extra ==" not in line
        ]
    assert needs == []
    assert any(name.startswith("viops/_C.") for name in names)
    assert "viops/py.typed" in names
    assert "viops/benches/harness.py" in names
