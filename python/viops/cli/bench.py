"""`python -m viops bench`: times the ops against eager PyTorch, torch.compile and the floor.

The benches are pytest functions; they run in a process of their own, and this command reads the
JSON that pytest-benchmark writes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import viops

from .console import UserError, print_heading, print_table

_INSTALL_BENCH = (
    "in a checkout, pip install '.[bench]' installs what is missing; timm requires torchvision: "
    "choose the one that fits the torch that is there"
)

#: Seconds and least number of rounds of each bench.
_FULL = ("3", "7")
_QUICK = ("0.4", "3")  # of a short round the harness makes more

#: Seconds that interrupted benches have to write what they measured: `make gpu`, which interrupts
#: this command where its time is up, ends it three seconds later.
_GRACE = 12
#: The exit status of an interrupted run.
_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `bench` takes to the parser."""
    parser.add_argument("--op", metavar="NAME", help="one op family alone, such as those of `info`")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, fewer sizes")
    parser.add_argument(
        "--warm",
        action="store_true",
        help="an untimed call before each timed one, so that caches hold its own data",
    )
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument(
        "--threads", type=int, help="threads on the CPU; 2 unless there is one core"
    )
    parser.add_argument(
        "--plot",
        metavar="FILE",
        type=Path,
        help="draw the ratios as a bar chart; into a folder as <machine>.png",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        type=Path,
        nargs="?",
        const=Path(),
        help="keep the results; into a folder, or without FILE into results beside the benches, as "
        "<machine>.json",
    )
    parser.add_argument("--check", action="store_true", help="fail where a bar is missed")
    parser.add_argument("--base", metavar="REV", help="compare with this commit of the checkout")
    parser.add_argument(
        "--benches", metavar="DIR", type=Path, help="folder of the benches, where not viops' own"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the benches; 0, or 1 where one failed or, with --check, missed a bar.

    Of an interrupted run it keeps what there is, and gives 130.
    """
    _require("pytest", "pytest_benchmark", *(["matplotlib"] if args.plot else []))
    _check_arguments(args)
    folder = _find_benches(args.benches)
    files = _bench_files(folder, args.op)
    if args.base is not None:
        return _compare_with_base(args, folder, files)
    print(f"benches of {folder}", flush=True)
    status, report = _run_pytest(folder, files, args)
    if status == _INTERRUPTED:
        print(f"interrupted after {len(_records(report))} benches", file=sys.stderr)
        if not _records(report):
            return status
    if args.json is not None:  # before the plot, which takes longer
        path = args.json
        if not path.name:
            path = folder / "results"
            path.mkdir(exist_ok=True)
        path = _inside(path, report, ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: {path}", flush=True)
    if args.plot:
        path = _inside(args.plot, report, ".png")
        _plot(report, path)
        print(f"drawn: {path}")
    if status == _INTERRUPTED:
        return status
    missed = sum(not bar["met"] for record in _records(report) for bar in record["bars"])
    if args.check and missed:
        print(f"{missed} of the bars missed", file=sys.stderr)
    return int(status != 0 or (args.check and missed > 0))


def _require(*modules: str) -> None:
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UserError(f"needs the package {module!r}: {_INSTALL_BENCH}")


def _check_arguments(args: argparse.Namespace) -> None:
    if args.threads is not None and args.threads < 1:
        raise UserError(f"--threads: expected at least 1, got {args.threads}")
    _check_device(args.device)
    if args.base is not None:
        for option in ("plot", "json", "check"):
            if getattr(args, option):
                raise UserError(
                    f"--{option}: is of no use with --base, which prints two times a bench"
                )
    if args.plot is not None:
        _check_plot(args.plot)
    if args.json is not None and args.json.name and not args.json.is_dir():
        _check_writable("--json", args.json)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: expected cpu or cuda, got {name!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: torch sees no CUDA device")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")


def _check_plot(path: Path) -> None:
    from matplotlib.backend_bases import FigureCanvasBase

    if path.is_dir():
        return
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in formats:
        raise UserError(
            f"--plot {path}: expected a name that ends with one of {', '.join(formats)}"
        )
    _check_writable("--plot", path)


def _check_writable(option: str, path: Path) -> None:
    """Makes the file's folder and opens it, and leaves neither a new file nor a changed one."""
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}; give a file to write to") from error


def _find_benches(given: Path | None) -> Path:
    """The checkout's benches where the command runs inside one, else those of the package."""
    if given is not None:
        folders = [given]
    else:
        package = Path(viops.__file__).resolve().parent
        checkouts = [Path.cwd(), *Path.cwd().parents, package.parents[1]]
        folders = [root / "benches" for root in checkouts if (root / "python/viops").is_dir()]
        folders.append(package / "benches")
    for folder in folders:
        if (folder / "harness.py").is_file():
            return folder.resolve()
    raise UserError(f"no benches (harness.py) in {', '.join(map(str, folders))}")


def _bench_files(folder: Path, op: str | None) -> list[Path]:
    files = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    if op is None:
        return list(files.values())
    if op not in files:
        raise UserError(f"--op: {op!r} has no bench; there are: {', '.join(files)}")
    return [files[op]]


def _run_pytest(
    folder: Path,
    files: Sequence[Path],
    args: argparse.Namespace,
    *options: str,
    environment: dict[str, str] | None = None,
    quiet: bool = False,
) -> tuple[int, dict[str, Any]]:
    """Runs the benches in another process: its exit status, and pytest-benchmark's report.

    Interrupted, it gives the status 130 and a report of the benches that had ended by then.
    """
    seconds, rounds = _QUICK if args.quick else _FULL
    with tempfile.TemporaryDirectory() as temporary:
        report_file = Path(temporary) / "report.json"
        command = [
            sys.executable,
            "-m",
            "pytest",
            *map(str, files),
            "-c",
            str(folder / "pytest.ini"),
        ]
        command += ["--rootdir", str(folder), "-p", "no:cacheprovider", "-q", "--no-header", "-rs"]
        command += ["--benchmark-quiet", f"--benchmark-json={report_file}"]
        command += [f"--benchmark-storage=file://{temporary}"]  # else a folder stays behind
        command += [f"--benchmark-max-time={seconds}", f"--benchmark-min-rounds={rounds}"]
        command += ["--device", args.device, *options]
        if args.quick:
            command += ["-m", "not full"]
        if args.threads is not None:
            command += ["--threads", str(args.threads)]
        if args.warm:
            command.append("--warm")
        status, told = _run_interruptibly(command, environment, quiet)
        if quiet and status:
            print(told, end="", file=sys.stderr, flush=True)
        text = report_file.read_text() if report_file.is_file() else ""
    try:
        return status, json.loads(text) if text else {"benchmarks": []}
    except json.JSONDecodeError:  # it was ended while it wrote
        return status, {"benchmarks": []}


def _run_interruptibly(
    command: Sequence[str], environment: dict[str, str] | None, quiet: bool
) -> tuple[int, str]:
    """Exit status and, where quiet, output; an interruption is passed on, and is the status 130."""
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
        text=True,
        errors="replace",
    ) as process:
        try:
            told, _ = process.communicate()
            return process.returncode, told or ""
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            try:
                told, _ = process.communicate(timeout=_GRACE)
            except subprocess.TimeoutExpired:
                told = None
            return _INTERRUPTED, told or ""
        finally:
            process.kill()  # which does nothing to a process that has ended


def _records(report: dict[str, Any]) -> list[dict[str, Any]]:
    """What the harness recorded of each bench."""
    return [benchmark["extra_info"] for benchmark in report["benchmarks"]]


def _inside(path: Path, report: dict[str, Any], suffix: str) -> Path:
    """The path itself, or where it is a folder a file of the machine's name in it."""
    return path / f"{_machine(report)}{suffix}" if path.is_dir() else path


def _machine(report: dict[str, Any]) -> str:
    """A file name for the machine: the GPU, or the processor and how many cores."""
    machine = report.get("machine_info", {})
    cpu = machine.get("cpu", {})
    cores = f"{cpu.get('brand_raw', 'unknown')}-{cpu.get('count', os.cpu_count())}-cores"
    name = machine.get("gpu", cores)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _plot(report: dict[str, Any], path: Path) -> None:
    """Bars: how many times the time of viops each contender took, on a logarithmic scale."""
    from matplotlib.figure import Figure

    records = [record for record in _records(report) if record["ratios"]]
    names = list(dict.fromkeys(name for record in records for name in record["ratios"]))
    height = 1.0 + sum(0.28 * len(record["ratios"]) + 0.35 for record in records)
    figure = Figure(figsize=(10, height), layout="constrained")
    axes = figure.add_subplot()
    place = 0.0
    ticks, labels, drawn = [], [], set()
    for record in records:
        ticks.append(place + (len(record["ratios"]) - 1) / 2)
        labels.append(record["title"].replace(", ", "\n", 1))
        for name, ratio in record["ratios"].items():
            label = name if name not in drawn else "_"
            drawn.add(name)
            # bars start at 1, the time of viops
            axes.barh(place, ratio - 1, left=1, color=f"C{names.index(name)}", label=label)
            axes.annotate(f" {ratio:.2f} ", (ratio, place), va="center", fontsize=8)
            place += 1
        place += 1.2
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.margins(x=0.1)
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time over the time of viops; right of 1 viops is faster")
    if names:
        axes.legend(loc="best", fontsize=8)
    figure.savefig(path, dpi=120)


def _compare_with_base(args: argparse.Namespace, folder: Path, files: Sequence[Path]) -> int:
    """Builds commit and working tree alike, and runs the present benches on both in turn."""
    root = Path(_git(folder, "rev-parse", "--show-toplevel", what="--base needs a git checkout"))
    if not all((root / part).is_dir() for part in ("python/viops", "csrc")):
        raise UserError(f"--base needs a checkout of viops; {root} lacks python/viops or csrc")
    what = f"--base: {args.base!r} is not a commit of {root}"
    commit = _git(root, "rev-parse", "--verify", "--quiet", f"{args.base}^{{commit}}", what=what)
    with _ending_on_sigterm(), tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "source"
        _extract(root, commit, source)
        environments = {}
        for side, tree in (("base", source), ("new", root)):
            print(f"building {side}: {args.base if side == 'base' else root}", flush=True)
            environments[side] = _build(tree, Path(temporary) / side)
        return _alternate(args, folder, files, environments)


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Within the block SIGTERM unwinds the stack, so that temporary folders are removed."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _extract(root: Path, commit: str, target: Path) -> None:
    """The commit's files, by way of an archive: nothing is registered in the repository."""
    archive = target.with_suffix(".tar")
    _git(root, "archive", f"--output={archive}", commit, what="git archive failed")
    with tarfile.open(archive) as files:
        if hasattr(tarfile, "data_filter"):  # early patch releases of Python 3.10 lack it
            files.extractall(target, filter="data")
        else:
            files.extractall(target)


def _git(folder: Path, *words: str, what: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        raise UserError(f"{what}: there is no git") from None
    if done.returncode:
        raise UserError(": ".join(filter(None, (what, done.stderr.strip()))))
    return done.stdout.strip()


def _build(tree: Path, target: Path) -> dict[str, str]:
    """Installs the tree into the target folder; the environment in which it is what one imports."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "--target", str(target)]
    command += ["--config-settings", f"build-dir={target}-build", str(tree)]
    status, told = _run_with_children(command)
    if status:
        raise UserError(f"cannot build {tree}:\n{told[-3000:]}")
    environment = os.environ | {"PYTHONPATH": str(target)}
    script = "import viops; print(viops.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=target, capture_output=True, text=True
    )
    lines = done.stdout.split()
    if done.returncode or not lines or target.resolve() not in Path(lines[-1]).resolve().parents:
        raise UserError(
            f"the build of {tree} is not what `import viops` finds, or fails (an editable install "
            f"of viops would come first): {(done.stdout + done.stderr).strip()[-1000:]}"
        )
    return environment


def _run_with_children(command: Sequence[str]) -> tuple[int, str]:
    """Exit status and output; an interruption ends the compilers, too, that the command started."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            told, _ = process.communicate()
        except BaseException:
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            raise
    return process.returncode, told


def _alternate(
    args: argparse.Namespace,
    folder: Path,
    files: Sequence[Path],
    environments: dict[str, dict[str, str]],
) -> int:
    best: dict[str, dict[str, float]] = {side: {} for side in environments}
    failed = dict.fromkeys(environments, False)
    repeats = 2 if args.quick else 3
    for repeat in range(repeats):
        for side, environment in environments.items():
            print(f"run {repeat + 1} of {repeats}: {side}", flush=True)
            status, report = _run_pytest(
                folder, files, args, "--only-viops", environment=environment, quiet=True
            )
            if status == _INTERRUPTED:
                raise KeyboardInterrupt
            failed[side] |= status != 0
            for record in _records(report):
                seconds = record["contenders"]["viops"]["best"]
                title = record["title"]
                best[side][title] = min(seconds, best[side].get(title, seconds))
    rows = []
    for title in dict.fromkeys([*best["base"], *best["new"]]):
        base, new = best["base"].get(title), best["new"].get(title)
        ratio = f"{new / base:.3f}" if base and new else ""
        rows.append(
            [title, *("failed" if t is None else f"{t * 1e3:.4g}" for t in (base, new)), ratio]
        )
    print_heading(f"best of {repeats} runs in turn, ms a call; new / base below 1 is faster")
    print_table(["bench", f"base {args.base}", "new", "new / base"], rows)
    if failed["base"]:
        print(f"some of the benches fail on {args.base}; what they said stands above")
    return int(failed["new"] or not rows)
