"""Builds, checks and times viops on a machine with a GPU: `make gpu [STAGE=name] [OUT=folder]`.

Stages, in order: build, doctor, test, sanitize, emulation, bench.  Each prints a table last; the
log, the tests' reports and the times are in the folder, in no more than five files.  The exit
status is 1 where something failed or was not run; a failing stage does not keep later ones from
running.  Everything runs with the Python that runs this.

All stages in one call take longer than the 600 seconds that some machines allow a command; where
what is installed may be gone by the next call, each begins with the build:

    make gpu STAGE="build doctor test"
    make gpu STAGE="build bench" GPU_OPTIONS=--quick
    make gpu STAGE="build sanitize emulation"
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from steps import (
    LEAST,
    ROOT,
    Done,
    Failure,
    Run,
    count_tests,
    environment_for,
    find_nvcc,
    print_table,
    say,
)

PYTHON = sys.version_info[:3]
PYTHONS = ((3, 10), (3, 13))
TORCH = (2, 10)
BUILD_TOOLS = ("pip", "scikit_build_core", "pybind11")

#: What compute-sanitizer exits with where it found something.
FOUND = 86
#: All CUDA kernels of viops have this in their mangled names, and torch's have not.
OURS = ("--kernel-name", "kernel_substring=viops")
TRITONS = ("--kernel-name", "kernel_substring=class_attention")

FACTS = """
import json, pathlib, sys, sysconfig
import torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__,
    "cuda": torch.version.cuda,
    "gpu": torch.cuda.get_device_name() if cuda else None,
    "capability": torch.cuda.get_device_capability() if cuda else None,
    "in_venv": sys.prefix != sys.base_prefix,
    "managed": pathlib.Path(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED").exists(),
}))
"""
INSTALLED = """
import json
import viops
from viops import native
print(json.dumps({
    "path": viops.__file__,
    "error": native.cuda_error(),
    "build": native.extension.build_info() if native.extension else None,
}))
"""
ROWS = """
import json
import contract
rows = [row for row in contract.ALL_BACKENDS if row.device.startswith("cuda")]
print(json.dumps([[row.name, row.backend] for row in rows]))
"""


def find_sanitizer(nvcc: Path | None) -> Path | None:
    """compute-sanitizer on PATH, in nvcc's toolkit, or in another one."""
    found = shutil.which("compute-sanitizer")
    if found:
        return Path(found)
    toolkits = [nvcc.resolve().parent.parent] if nvcc else []
    toolkits += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    for toolkit in toolkits:
        for folder in ("bin", "compute-sanitizer"):
            if os.access(toolkit / folder / "compute-sanitizer", os.X_OK):
                return toolkit / folder / "compute-sanitizer"
    return None


def build(run: Run) -> None:
    facts = check_machine(run)
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--root-user-action=ignore", "--verbose"]
    command += ["-Ccmake.define.VIOPS_CUDA=ON", "."]
    done = run.step("pip install", command, lambda done: dlpack_source(done.text))
    if done.status == 0:
        words = check_installed(run, facts)
        run.add("architectures", "ok", 0.0, words)


def check_machine(run: Run) -> dict:
    """What torch says of the machine; Failure with all that the build would lack."""
    python = ".".join(map(str, PYTHON))
    problems = []
    if not PYTHONS[0] <= PYTHON[:2] <= PYTHONS[1]:
        problems.append(f"Python is {python}, and 3.{PYTHONS[0][1]} to 3.{PYTHONS[1][1]} are known")
    facts: dict = run.ask(FACTS)
    if tuple(map(int, re.findall(r"\d+", facts["torch"])[:2])) < TORCH:
        problems.append(f"torch is {facts['torch']}, and {TORCH[0]}.{TORCH[1]} or newer is needed")
    if facts["gpu"] is None:
        problems.append("torch sees no CUDA device")
    if find_nvcc() is None:
        problems.append("no nvcc on PATH, in CUDACXX or in /usr/local/cuda/bin")
    problems += [f"no package {name}" for name in BUILD_TOOLS if find_spec(name) is None]
    for tool in ("cmake", "ninja"):
        if shutil.which(tool, path=environment_for({})["PATH"]) is None:
            problems.append(f"no {tool} on PATH")
    if facts["managed"] and not facts["in_venv"]:
        problems.append(
            "this Python belongs to the system, which forbids pip to install: make an environment "
            "that sees its packages, python3 -m venv --system-site-packages gpu_env, and then "
            "make gpu PYTHON=gpu_env/bin/python"
        )
    if problems:
        raise Failure("; ".join(problems))
    words = f"Python {python}, torch {facts['torch']}, {facts['gpu']}, {facts['capability']}"
    run.add("machine", "ok", 0.0, words)
    return facts


def dlpack_source(text: str) -> str:
    match = re.search(r"viops: (dlpack\.h from \S+)", text)
    return match[1] if match else ""


def check_installed(run: Run, facts: dict | None = None) -> str:
    """What the installed viops was built for; Failure where it does not serve this GPU."""
    facts = facts or dict(run.ask(FACTS))
    if facts["gpu"] is None:
        raise Failure("torch sees no CUDA device")
    try:
        installed = run.ask(INSTALLED)
    except Failure as failure:
        raise Failure(f"viops is not installed: {failure}; make gpu STAGE=build") from None
    if installed["error"]:
        raise Failure(f"{installed['error']}; make gpu STAGE=build")
    built = installed["build"]
    names = ", ".join(built["cuda_architectures"])
    return f"CUDA {built['cuda_version']} for {names}; the GPU is {facts['capability']}"


def doctor(run: Run) -> None:
    check_installed(run)

    def judge(done: Done) -> str:
        rows = [line.split() for line in done.text.splitlines()]
        well = [row[1] for row in rows if len(row) > 2 and row[2] == "ok:"]
        on_gpu = sum(backend in ("cuda", "triton") for backend in well)
        if done.status == 0 and not on_gpu:
            raise Failure("no op ran on cuda or triton")
        return f"{len(well)} pairs of op and backend ok, {on_gpu} of them on the GPU"

    run.step("info", [sys.executable, "-m", "viops", "info"], tail=60)
    run.step("doctor", [sys.executable, "-m", "viops", "doctor"], judge, tail=60)


def test(run: Run, rest: bool, processes: int) -> None:
    """Each step is a process of its own: a CUDA error fails all tests after it in its process.

    So torch's own attention, which the contract's row `gpu` alone runs, comes after our kernels.
    """
    check_installed(run)
    names = [name for name, _ in rows_on_gpu(run)]
    contract = "tests/test_contract.py"
    of_kernels = files_of("tests/ops", "test_*_cuda.py", "test_*_triton.py")
    run_pytest(run, "kernels", of_kernels, processes)
    for name in names:
        run_pytest(run, f"contract: {name}", [contract, "-k", name], processes)
    for path in files_of("tests/gpu", "test_*.py"):
        run_pytest(run, path, [path])
    if not rest:
        return
    others = [f"--ignore={path}" for path in of_kernels]
    run_pytest(run, "tests/ops, the others", ["tests/ops", *others], processes)
    others = [contract, "-k", f"not ({' or '.join(names)})"]
    run_pytest(run, "contract: other rows", others, processes)
    # test_install builds in isolation, for which a package index is needed
    left_out = (contract, "tests/gpu", "tests/ops", "tests/test_install.py")
    ignored = [f"--ignore={path}" for path in left_out]
    run_pytest(run, "the rest", ["tests", *ignored], processes)


def files_of(folder: str, *patterns: str) -> list[str]:
    paths = [path for pattern in patterns for path in sorted((ROOT / folder).glob(pattern))]
    return [str(path.relative_to(ROOT)) for path in paths]


def rows_on_gpu(run: Run) -> list[tuple[str, str]]:
    """Names and backends of the contract's rows that run on a GPU; Failure without any."""
    rows = run.ask(ROWS, {"PYTHONPATH": str(ROOT / "tests")})
    if not rows:
        raise Failure("no row of tests/contract.py runs on a GPU")
    return [(name, backend) for name, backend in rows]


def run_pytest(run: Run, name: str, words: Sequence[str], processes: int = 0) -> None:
    """Tests as a step; where so many fail, the GPU is of no use to the process any more."""
    environment = {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "tests.xml")
        command = [*pytest_command(report), "--durations=8", "-rfE", "--tb=short", "--maxfail=40"]
        command += words
        if processes and find_spec("xdist"):
            command += ["-n", str(processes)]
            environment = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        judge = partial(count_tests, run, name, report)
        run.step(name, command, lambda done: judge(), environment=environment)


def pytest_command(report: Path) -> list[str]:
    options = ["-p", "no:cacheprovider", "--color=no", f"--junitxml={report}"]
    return [sys.executable, "-m", "pytest", *options]


def sanitize(run: Run) -> None:
    """memcheck and racecheck around the contract's calls on our kernels.

    initcheck would see nothing: the tests fill all memory before a kernel writes it.
    """
    check_installed(run)
    nvcc = find_nvcc()
    tool = find_sanitizer(nvcc)
    if tool is None:
        raise Failure("no compute-sanitizer on PATH or in a CUDA toolkit")
    rows = {backend: name for name, backend in rows_on_gpu(run) if backend in ("cuda", "triton")}
    if "cuda" not in rows:
        raise Failure("no row of tests/contract.py runs on the backend cuda")
    with tempfile.TemporaryDirectory() as folder:
        planted, source = str(Path(folder, "planted")), str(ROOT / "tests/gpu/planted.cu")
        run.step("build planted errors", [str(nvcc), "-arch=native", "-o", planted, source])
        checks = [("memcheck", "cuda", OURS), ("racecheck", "cuda", OURS)]
        checks += [("memcheck", "triton", TRITONS)] if "triton" in rows else []
        for left, (check, backend, kernels) in zip(range(len(checks), 0, -1), checks, strict=True):
            limit = run.time_left() / left
            report = Path(folder, f"{check}-{backend}.xml")
            sanitizer = sanitizer_command(tool, check)
            if backend == "cuda":
                find_planted(run, [*sanitizer, *OURS], check, planted)
            selection = f"{rows[backend]} and (matches_float64 or output_gradients)"
            tests = [*pytest_command(report), "-x", "--tb=short", "tests/test_contract.py"]
            name = f"{check}, {backend}"
            run.step(
                name,
                [*sanitizer, *kernels, *tests, "-k", selection],
                partial(judge_sanitized, run, name, report),
                limit=limit,
                # memory out of a pool hides what lies outside its tensors
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )


def sanitizer_command(tool: Path, check: str) -> list[str]:
    command = [str(tool), "--tool", check, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    # torch asks the driver for what may not be there; Triton starts ptxas
    command += ["--report-api-errors", "no", "--target-processes", "application-only"]
    return [*command, "--launch-timeout", "0"]  # importing torch may take longer than its 10 s


def find_planted(run: Run, sanitizer: Sequence[str], check: str, planted: str) -> None:
    """The tool must find the planted error of its kind, and nothing where there is none."""

    def judge(done: Done) -> str:
        if not done.status or not count_found(done):
            raise Failure(f"it does not see the planted error; exit status {done.status}")
        return f"{count_found(done)} found, as there should be"

    command = [*sanitizer, planted]
    done = run.command([*command, check], limit=60)
    try:
        run.add(f"{check} of a planted error", "ok", done.seconds, judge(done))
    except Failure as failure:
        say(done.text[-2000:])
        run.add(f"{check} of a planted error", "FAILED", done.seconds, str(failure))
    run.step(f"{check} without one", command, none_found, 3)


def judge_sanitized(run: Run, name: str, report: Path, done: Done) -> str:
    return f"{none_found(done)}, {count_tests(run, name, report)}"


def none_found(done: Done) -> str:
    """Failure where something was found, whatever the exit status: pytest may end with its own."""
    found = count_found(done)
    if found:
        raise Failure(f"{found} found; exit status {done.status}")
    return "0 found"


def count_found(done: Done) -> int:
    """The errors or hazards in compute-sanitizer's summaries; Failure without a summary."""
    counts = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", done.text)
    if not counts:
        raise Failure("compute-sanitizer gave no summary")
    return sum(map(int, counts))


def emulation(run: Run) -> None:
    """What PTX and warp intrinsics give on this GPU, and what the host executor says they give."""
    folder = ROOT / "tests/cuda_on_host"
    source = folder / "intrinsics.cu"
    if not source.is_file():
        raise Failure(f"there is no {source.relative_to(ROOT)}")
    with tempfile.TemporaryDirectory() as temporary:
        on_gpu, host = Path(temporary, "intrinsics"), Path(temporary, "host")
        nvcc = [str(find_nvcc()), "-std=c++20", "-arch=native"]
        nvcc += [f"-I{ROOT / 'csrc'}", f"-I{folder}", str(source), "-o", str(on_gpu)]
        run.step("nvcc", nvcc)
        configure = ["cmake", "-S", str(ROOT), "-B", str(host), "-DVIOPS_CUDA_ON_HOST=plain"]
        configure += ["-DVIOPS_CUDA=OFF", f"-DPython_EXECUTABLE={sys.executable}", "-G", "Ninja"]
        run.step("cmake", [*configure, f"-Dpybind11_DIR={cmake_folder_of_pybind11(run)}"])
        run.step("host", ["cmake", "--build", str(host), "--target", "intrinsics"])
        built = [path for path in host.rglob("intrinsics") if os.access(path, os.X_OK)]
        on_host = next((path for path in built if path.is_file()), None)
        if not on_gpu.is_file() or on_host is None:
            raise Failure("the two programs were not built")
        gpu_result, host_result = run.command([on_gpu]), run.command([on_host])
    for name, done in (("GPU", gpu_result), ("host", host_result)):
        if done.status != 0:
            say(done.text[-2000:])
            raise Failure(f"the program on the {name} ended with exit status {done.status}")
    count, different = compare_lines(gpu_result.text, host_result.text)
    say("\n".join(different[:40]))
    result = "ok" if count and not different else "FAILED"
    counts = f"{count} results, {len(different)} lines differ"
    run.add("same bits", result, gpu_result.seconds, counts)


def cmake_folder_of_pybind11(run: Run) -> str:
    done = run.command([sys.executable, "-m", "pybind11", "--cmakedir"])
    return done.text.strip().splitlines()[-1] if done.status == 0 else ""


def compare_lines(gpu: str, host: str) -> tuple[int, list[str]]:
    """How many results there are, and each line that differs, in words."""
    first, second = ([line for line in t.splitlines() if line.strip()] for t in (gpu, host))
    length = max(len(first), len(second))
    padded = zip(
        first + ["nothing"] * (length - len(first)),
        second + ["nothing"] * (length - len(second)),
        strict=True,
    )
    return length, [f"GPU: {a}   host: {b}" for a, b in padded if a != b]


def bench(run: Run, quick: bool) -> None:
    check_installed(run)
    command = [sys.executable, "-m", "viops", "bench", "--device", "cuda"]
    command += ["--json", str(run.out)]
    command += ["--plot", str(run.out)] if find_spec("matplotlib") else []
    command += ["--quick"] if quick else []

    def judge(done: Done) -> str:
        bars = done.text.rpartition("= bars =")[2]
        met, missed = (len(re.findall(rf": {word}$", bars, re.M)) for word in ("met", "MISSED"))
        words = f"{met} bars met, {missed} missed"
        skipped = re.findall(r"^(?:=+ )?(?:\d+ \w+, )*(\d+) skipped", done.text, re.M)
        if skipped:
            words += f", {skipped[-1]} benches skipped"
        if not met + missed:
            raise Failure(f"no bar was judged: {words}")
        return words

    run.step("bench", command, judge, tail=60)


STAGES = ("build", "doctor", "test", "sanitize", "emulation", "bench")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    first, _, more = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="gpu.py",
        description=first,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="*", help=f"{', '.join(STAGES)}; without: all, in order")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu", help="folder for results")
    parser.add_argument("--limit", type=float, default=540, help="seconds that a stage may take")
    parser.add_argument("--total", type=float, default=570, help="seconds that all may take")
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--processes", type=int, default=min(8, cores), help="of tests that are not timed; 0: one"
    )
    parser.add_argument("--rest", action="store_true", help="test: also what needs no GPU")
    parser.add_argument("--quick", action="store_true", help="bench: fewer rounds, fewer sizes")
    options = parser.parse_args(argv)
    for name in options.stages:
        if name not in STAGES:
            parser.error(f"{name!r} is not a stage; there are: {', '.join(STAGES)}")
    for name in ("limit", "total"):
        if getattr(options, name) <= LEAST:
            got = f"{getattr(options, name):g}"
            parser.error(f"--{name}: expected more than {LEAST} seconds, got {got}")
    options.stages = options.stages or list(STAGES)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    stages: dict[str, Callable[[Run], None]] = {
        "build": build,
        "doctor": doctor,
        "test": partial(test, rest=options.rest, processes=options.processes),
        "sanitize": sanitize,
        "emulation": emulation,
        "bench": partial(bench, quick=options.quick),
    }
    name = options.stages[0] if len(options.stages) == 1 else "gpu"
    run = Run(options.out, name, options.limit, options.total)
    for name in options.stages:
        run.run_stage(name, stages[name])
    if len(options.stages) > 1:
        print_table(run.steps)
    return int(any(step.result != "ok" for step in run.steps))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that commands are ended, too
    sys.exit(main())
