"""`make gpu` without a GPU: limits, verdicts and tables, on stand-ins for the real commands."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from viops import native

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / ".ci"))
import gpu  # noqa: E402
import steps  # noqa: E402
from steps import Done, Failure, Run  # noqa: E402

JUNIT = '<testsuites><testsuite tests="9" failures="{failed}" errors="0" skipped="2"/></testsuites>'
FACTS = {
    "torch": "2.11.0+cu130",
    "cuda": "13.0",
    "gpu": "NVIDIA H100 80GB HBM3",
    "capability": [9, 0],
    "in_venv": True,
    "managed": True,
}
BUILD = {"cuda_architectures": ["80-real", "90"], "cuda_version": "13.0", "cuda_reason": ""}
SILENT = "========= ERROR SUMMARY: 0 errors"


class Machine:
    """Answers commands as a machine with a GPU would; by a word of the command, something else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[str] = []
        self.answers: dict[str, tuple[int | None, str]] = {}
        self.facts, self.build, self.rows = dict(FACTS), dict(BUILD), [["cuda", "cuda"]]
        self.error: str | None = None
        self.failed_tests = 0
        monkeypatch.setattr(Run, "command", lambda run, *words, **more: self.command(*words))
        monkeypatch.setattr(gpu, "find_nvcc", lambda: Path("nvcc"))
        monkeypatch.setattr(gpu, "find_sanitizer", lambda nvcc: Path("compute-sanitizer"))
        monkeypatch.setattr(gpu, "find_spec", lambda name: name)
        monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: name)
        monkeypatch.setattr(gpu, "PYTHON", (3, 12, 3))

    def command(self, words, limit=None) -> Done:
        command = " ".join(map(str, words))
        self.commands.append(command)
        for word, (status, text) in self.answers.items():
            if word in command:
                return Done(status, text, 1.0)
        if words[1:2] == ["-c"]:
            return Done(0, "a warning\n" + json.dumps(self.answer_to(words[2])), 1.0)
        return self.run_program(command, words)

    def answer_to(self, program: str) -> object:
        if program == gpu.INSTALLED:
            return {"path": "viops", "error": self.error, "build": self.build}
        return self.facts if program == gpu.FACTS else self.rows

    def run_program(self, command: str, words: list) -> Done:
        for word in map(str, words):
            if word.startswith("--junitxml="):
                Path(word.partition("=")[2]).write_text(JUNIT.format(failed=self.failed_tests))
        if command.endswith(("planted memcheck", "planted racecheck")):
            return Done(86, "========= RACECHECK SUMMARY: 2 hazards displayed", 1.0)
        if "compute-sanitizer" in command:
            return Done(0, SILENT, 1.0)
        if "viops doctor" in command:
            return Done(0, "  op  cpu  ok: 3 calls\n  op  cuda  ok: 3 calls", 1.0)
        if "--cmakedir" in command:
            return Done(0, "/share/cmake/pybind11\n", 1.0)
        if "viops bench" in command:
            bars = "= bars =\nb, eager: 9 x, at least 8 x: met\nc: MISSED"
            return Done(0, f"a: met\n{bars}\n7 passed, 2 skipped, 3 deselected in 4s\n", 1.0)
        if "nvcc" in command:
            Path(command.partition("-o ")[2].split()[0]).write_text("")
        if "--target intrinsics" in command:
            program = Path(words[2], "tests", "intrinsics")
            program.parent.mkdir(parents=True)
            program.write_text("")
            program.chmod(0o755)
        if command.endswith("intrinsics"):
            return Done(0, "shfl 0 3f800000\nmma 1 40000000\n", 1.0)
        return Done(int(self.failed_tests > 0 and "pytest" in command), "", 1.0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def results(out: Path, name: str = "gpu") -> dict[str, tuple[str, str]]:
    """Of each step in the JSON its result and counts."""
    rows = json.loads((out / f"{name}.json").read_text())
    return {f"{row['stage']}: {row['name']}": (row["result"], row["counts"]) for row in rows}


def test_all_stages_on_a_machine_where_all_is_well(machine, tmp_path, capsys) -> None:
    assert gpu.main(["--out", str(tmp_path), "--rest"]) == 0
    found = results(tmp_path)
    assert {result for result, _ in found.values()} == {"ok"}
    assert found["build: architectures"][1].startswith("CUDA 13.0 for 80-real, 90")
    assert found["doctor: doctor"][1] == "2 pairs of op and backend ok, 1 of them on the GPU"
    assert found["test: contract: cuda"][1] == "7 passed, 2 skipped"
    assert found["sanitize: memcheck, cuda"][1] == "0 found, 7 passed, 2 skipped"
    assert found["sanitize: racecheck of a planted error"][1] == "2 found, as there should be"
    assert found["emulation: same bits"][1] == "2 results, 0 lines differ"
    assert found["bench: bench"][1] == "1 bars met, 1 missed, 2 benches skipped"
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.log", "gpu.json", "gpu.xml"}
    suites = ElementTree.parse(tmp_path / "gpu.xml").iter("testsuite")
    with_tests = [name for name, (_, counts) in found.items() if "passed" in counts]
    assert [suite.get("name") for suite in suites] == with_tests
    out = capsys.readouterr().out
    last = out[out.rindex("stage ") :].splitlines()
    assert len(last) == 1 + len(found)
    assert last[-1].split()[:6] == ["bench", "bench", "ok", "1.0", "1", "bars"]


def test_one_stage_alone_has_its_own_files(machine, tmp_path) -> None:
    assert gpu.main(["--out", str(tmp_path), "doctor"]) == 0
    assert set(results(tmp_path, "doctor")) == {"doctor: info", "doctor: doctor"}
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "docter"])
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--limit", "5"])
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--total", "5"])


def test_each_row_and_each_file_on_the_gpu_has_its_own_process(machine, tmp_path) -> None:
    machine.rows = [["cuda", "cuda"], ["triton", "triton"], ["gpu", None]]
    assert gpu.main(["--out", str(tmp_path), "test"]) == 0
    steps_of_test = [name.removeprefix("test: ") for name in results(tmp_path, "test")]
    rows = [f"contract: {name}" for name in ("cuda", "triton", "gpu")]
    assert steps_of_test[:4] == ["kernels", *rows]
    assert {"tests/gpu/test_cuda.py", "tests/gpu/test_cuda_models.py"} < set(steps_of_test[4:])
    runs = [command for command in machine.commands if " -m pytest " in command]
    assert all("--maxfail=" in command for command in runs)
    for kind in ("cuda", "triton"):
        assert f"tests/ops/test_token_reorganization_{kind}.py" in runs[0]
    assert "tests/test_contract.py -k gpu" in runs[3]


def test_a_stage_without_time_is_not_run(machine, tmp_path, monkeypatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(steps.time, "monotonic", lambda: clock[0])
    limits = []

    def build(run: Run) -> None:
        limits.append(run.time_left())
        clock[0] += 100
        run.add("slow", "ok", 100.0, "")

    monkeypatch.setattr(gpu, "build", build)
    words = ["--limit", "90", "--total", "230", "build", "build", "build"]
    assert gpu.main(["--out", str(tmp_path), *words]) == 1
    assert limits == [90, 90]
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["result"] for row in rows] == ["ok", "ok", "NOT RUN"]
    assert rows[-1]["counts"] == "30 s of the total were left"
    limits.clear()
    assert (
        gpu.main(["--out", str(tmp_path), "--limit", "90", "--total", "150", *["build"] * 2]) == 0
    )
    assert limits == [90, 50]


def test_a_failing_stage_does_not_keep_later_ones_from_running(machine, tmp_path) -> None:
    machine.answers["pip install"] = (1, "no compiler")
    machine.answers["viops bench"] = (None, "stopped")
    machine.failed_tests = 1
    assert gpu.main(["--out", str(tmp_path)]) == 1
    found = results(tmp_path)
    assert found["build: pip install"] == ("FAILED", "exit status 1")
    words = "6 passed, 1 failed, 2 skipped exit status 1"
    assert found["test: tests/gpu/test_cuda.py"] == ("FAILED", words)
    assert found["doctor: doctor"][0] == "ok"
    assert found["bench: bench"] == ("TIME", "no bar was judged: 0 bars met, 0 missed")


def test_benches_without_a_bar_are_a_failure(machine, tmp_path) -> None:
    machine.answers["viops bench"] = (0, "5 skipped in 3s")
    assert gpu.main(["--out", str(tmp_path), "bench"]) == 1
    words = "no bar was judged: 0 bars met, 0 missed, 5 benches skipped"
    assert results(tmp_path, "bench")["bench: bench"] == ("FAILED", words)
    machine.answers["viops bench"] = (None, "= bars =\na, eager: 9 x, at least 8 x: met\n1 passed")
    assert gpu.main(["--out", str(tmp_path), "bench"]) == 1
    words = "1 bars met, 0 missed stopped: its time was up"
    assert results(tmp_path, "bench")["bench: bench"] == ("TIME", words)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"gpu": None, "capability": None}, "torch sees no CUDA device"),
        ({"torch": "2.9.1"}, "torch is 2.9.1, and 2.10 or newer is needed"),
        ({"in_venv": False}, "python3 -m venv --system-site-packages"),
    ],
)
def test_a_machine_that_cannot_build_is_told_why(machine, tmp_path, facts, words) -> None:
    machine.facts |= facts
    assert gpu.main(["--out", str(tmp_path), "build"]) == 1
    result, counts = results(tmp_path, "build")["build: build"]
    assert result == "FAILED"
    assert words in counts
    assert not any("pip install" in command for command in machine.commands)


def test_other_pythons_are_refused(machine, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "PYTHON", (3, 14, 0))
    assert gpu.main(["--out", str(tmp_path), "build"]) == 1
    assert "Python is 3.14.0" in results(tmp_path, "build")["build: build"][1]


def test_an_installed_viops_that_does_not_fit_is_refused(machine, tmp_path) -> None:
    machine.error = "the CUDA part is built for 80-real, and cuda:0 has capability 7.5"
    assert gpu.main(["--out", str(tmp_path), "build", "test"]) == 1
    words = f"{machine.error}; make gpu STAGE=build"
    assert results(tmp_path)["build: build"] == ("FAILED", words)
    assert results(tmp_path)["test: test"] == ("FAILED", words)


def test_the_installed_viops_is_asked_what_it_can_run(run) -> None:
    """The real package, whose names the program uses."""
    run._deadline = time.monotonic() + 100
    installed = run.ask(gpu.INSTALLED)
    assert installed["error"] == native.cuda_error()
    assert installed["build"] == native.require().build_info()


def test_the_contract_is_asked_for_its_rows_on_a_gpu(run) -> None:
    """The real contract, whose names the program of the stage uses."""
    run._deadline = time.monotonic() + 100
    rows = run.ask(gpu.ROWS, {"PYTHONPATH": str(ROOT / "tests")})
    assert {name for name, _ in rows} == (
        {"cuda", "triton", "gpu"} if torch.cuda.is_available() else set()
    )


@pytest.mark.parametrize("rows", [[], [["gpu", None]]])
def test_without_rows_on_the_gpu_there_is_nothing_to_be_proud_of(machine, tmp_path, rows) -> None:
    machine.rows = rows
    assert gpu.main(["--out", str(tmp_path), "sanitize"]) == 1
    assert "no row of tests/contract.py" in results(tmp_path, "sanitize")["sanitize: sanitize"][1]


@pytest.mark.parametrize(
    ("word", "status", "text", "step"),
    [
        ("planted memcheck", 0, SILENT, "memcheck of a planted error"),
        ("planted racecheck", 1, "no device", "racecheck of a planted error"),
        ("--tool memcheck", 86, SILENT.replace("0", "3"), "memcheck, cuda"),
        ("--tool memcheck", 0, SILENT.replace("0", "3"), "memcheck, cuda"),
        ("--tool racecheck", 0, f"{SILENT}\n{SILENT.replace('0', '1')}", "racecheck without one"),
        ("--tool racecheck", 0, "no summary at all", "racecheck, cuda"),
    ],
)
def test_what_the_sanitizer_finds_or_cannot_find_is_a_failure(
    machine, tmp_path, word, status, text, step
) -> None:
    machine.answers[word] = (status, text)
    assert gpu.main(["--out", str(tmp_path), "sanitize"]) == 1
    assert results(tmp_path, "sanitize")[f"sanitize: {step}"][0] == "FAILED"


def test_a_missing_sanitizer_is_named(machine, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "find_sanitizer", lambda nvcc: None)
    assert gpu.main(["--out", str(tmp_path), "sanitize"]) == 1
    assert "no compute-sanitizer" in results(tmp_path, "sanitize")["sanitize: sanitize"][1]


def test_results_of_the_emulation_are_compared_line_for_line() -> None:
    assert gpu.compare_lines("a 0\nb 1\n", "a 0\n\nb 1") == (2, [])
    assert gpu.compare_lines("a 0\nb 1", "a 0\nb 2") == (2, ["GPU: b 1   host: b 2"])
    assert gpu.compare_lines("a 0", "a 0\nb 2") == (2, ["GPU: nothing   host: b 2"])
    assert gpu.compare_lines("", "") == (0, [])


def test_the_sanitizer_is_looked_for_in_the_toolkit(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name: None)
    tool = tmp_path / "compute-sanitizer/compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("")
    nvcc = tmp_path / "bin/nvcc"
    assert gpu.find_sanitizer(nvcc) != tool  # it cannot be executed
    tool.chmod(0o755)
    assert gpu.find_sanitizer(nvcc) == tool


def started(run: Run, code: str, **options) -> Done:
    run._deadline = time.monotonic() + options.pop("limit")
    return run.command([sys.executable, "-c", code], **options)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, "name", 540)


OBEYING = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('what I have')"


def test_a_command_of_a_background_job_is_interrupted_too(run, monkeypatch) -> None:
    """A shell's background jobs are started with SIGINT ignored, which commands inherit."""
    monkeypatch.setattr(steps, "GRACE", 7)
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert started(run, OBEYING, limit=10).text == "what I have\n"
    finally:
        signal.signal(signal.SIGINT, previous)


def test_reports_that_are_not_whole_are_failures(run) -> None:
    report = run.out / "report.xml"
    with pytest.raises(Failure, match="pytest wrote no report"):
        steps.count_tests(run, "one", report)
    report.write_text("<testsuites><testsuite tests=")
    with pytest.raises(Failure, match="pytest's report is not whole"):
        steps.count_tests(run, "one", report)
    report.write_text('<testsuites><testsuite tests="2" errors="0" skipped="2"/></testsuites>')
    with pytest.raises(Failure, match="0 passed, 2 skipped"):
        steps.count_tests(run, "one", report)


def test_a_command_that_runs_past_its_limit_is_stopped(run, monkeypatch) -> None:
    monkeypatch.setattr(steps, "GRACE", 7)
    start = time.monotonic()
    done = started(run, OBEYING, limit=8)
    assert done.status is None
    assert done.text == "what I have\n"
    child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    stubborn = (
        f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {child!r}]).pid)"
    )
    stubborn += f"\nsys.stdout.flush()\n{child}"
    done = started(run, stubborn, limit=8)
    assert done.status is None
    assert time.monotonic() - start < 30
    deadline = time.monotonic() + 5
    while is_running(int(done.text)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(int(done.text)), "its child was left behind"
    assert started(run, "print(1)", limit=5) == Done(None, "no time was left", 0.0)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_output_is_kept_and_told(run, capsys) -> None:
    run.stage = "one"
    code = "import sys; [print(i) for i in range(100)]; sys.exit(3)"
    run._deadline = time.monotonic() + 100
    run.step("numbers", [sys.executable, "-c", code])
    run.step("nothing", ["/no/such/program"])
    assert [step.result for step in run.steps] == ["FAILED", "FAILED"]
    assert run.steps[0].counts == "exit status 3"
    assert run.steps[1].counts == "exit status 127"
    assert "\n0\n1\n2\n" in run.log.read_text()
    out = capsys.readouterr().out
    assert "\n98\n99\n" in out
    assert "\n0\n" not in out


def test_a_fault_of_a_stage_is_its_failure(run, capsys) -> None:
    def broken(run: Run) -> None:
        raise KeyError("no such key")

    run.run_stage("broken", broken)
    assert run.steps[0].result == "FAILED"
    assert "KeyError" in run.steps[0].counts
    with pytest.raises(Failure, match="ZeroDivisionError"):
        run.ask("1 / 0")
    assert run.ask("print('noise'); print([1, 2])") == [1, 2]


def test_the_environment_of_commands(monkeypatch) -> None:
    monkeypatch.setenv("MAKEFLAGS", "-j1")
    monkeypatch.setattr(steps, "find_nvcc", lambda: Path("/toolkit/bin/nvcc"))
    environment = steps.environment_for({"MORE": "1"})
    assert environment["PATH"].split(os.pathsep)[:2] == [
        str(Path(sys.executable).parent),
        "/toolkit/bin",
    ]
    assert environment["CUDACXX"] == "/toolkit/bin/nvcc"
    assert environment["MORE"] == "1"
    assert "MAKEFLAGS" not in environment
