"""Commands as steps of a stage: a log, a limit in time, a table."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent

#: Seconds that a command has, once its time is up, to end by itself: pytest then says what it has.
GRACE = 20
#: A stage begins only where more seconds than these are left.
LEAST = 2 * GRACE


class Step(NamedTuple):
    """A row of the table."""

    stage: str
    name: str
    result: str  # "ok", "FAILED", "TIME" or "NOT RUN"
    seconds: float
    counts: str


class Done(NamedTuple):
    """A command that has ended; `status` is None where its time was up."""

    status: int | None
    text: str
    seconds: float


class Failure(Exception):
    """Why a step failed, in words."""


class Run:
    """What the stages share: the folder, the log, the time that is left, the steps so far."""

    def __init__(self, out: Path, name: str, limit: float, total: float = math.inf) -> None:
        """
        Args:
            out: the folder for everything that is written.
            name: of the log, the JSON and the JUnit file in it.
            limit: seconds that a stage may take.
            total: seconds that all stages may take, from now on.
        """
        self.out = out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        self.limit = limit
        self.log = self.out / f"{name}.log"
        self.log.write_bytes(b"")
        self.json = self.out / f"{name}.json"
        self.junit = self.out / f"{name}.xml"
        self.junit.unlink(missing_ok=True)
        self.steps: list[Step] = []
        self.stage = ""
        self._deadline = 0.0
        self._end = time.monotonic() + total

    def run_stage(self, name: str, stage: Callable[[Run], None]) -> None:
        """Runs one stage, unless no time is left, and prints its table."""
        self.stage = name
        start = time.monotonic()
        limit = min(self.limit, self._end - start)
        self._deadline = start + limit
        say(f"\n== {name}: at most {max(limit, 0):.0f} s, log: {self.log}")
        if limit > LEAST:
            self._try_stage(name, stage)
        else:
            self.add(name, "NOT RUN", 0.0, f"{max(limit, 0):.0f} s of the total were left")
        rows = [step._asdict() for step in self.steps]
        self.json.write_text(json.dumps(rows, indent=1) + "\n")
        print_table([step for step in self.steps if step.stage == name])

    def _try_stage(self, name: str, stage: Callable[[Run], None]) -> None:
        start = time.monotonic()
        try:
            stage(self)
        except Failure as failure:  # a step that is the condition of all others
            self.add(name, "FAILED", time.monotonic() - start, str(failure))
        except Exception as error:  # a fault of ours, which other stages need not have
            say(traceback.format_exc())
            self.add(name, "FAILED", time.monotonic() - start, f"{type(error).__name__}: {error}")

    def add(self, name: str, result: str, seconds: float, counts: str) -> None:
        self.steps.append(Step(self.stage, name, result, seconds, counts))
        if result != "ok":
            say(f"!! {self.stage}, {name}: {result}: {counts}")

    def time_left(self) -> float:
        return self._deadline - time.monotonic()

    def command(
        self,
        words: Sequence[str | Path],
        limit: float | None = None,
        cwd: Path = ROOT,
        environment: Mapping[str, str] | None = None,
    ) -> Done:
        """Runs a command, its output in the log, for at most so many seconds of the stage's."""
        limit = min(self.time_left(), limit or self.time_left())
        say(f"-- {' '.join(map(str, words)).splitlines()[0][:300]}")
        start = time.monotonic()
        if limit <= GRACE:
            return Done(None, "no time was left", 0.0)
        with self.log.open("ab") as log:
            log.write(f"\n-- {' '.join(map(str, words))}\n".encode())
            log.flush()
            offset = log.tell()
            try:
                process = subprocess.Popen(
                    [str(word) for word in words],
                    cwd=cwd,
                    env=environment_for(environment or {}),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    preexec_fn=_begin_group,
                )
            except OSError as error:
                return Done(127, str(error), 0.0)
            status = wait(process, limit)
        with self.log.open("rb") as log:
            log.seek(offset)
            text = log.read().decode(errors="replace")
        return Done(status, text, time.monotonic() - start)

    def step(
        self,
        name: str,
        words: Sequence[str | Path],
        judge: Callable[[Done], str] | None = None,
        tail: int = 12,
        limit: float | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Done:
        """A command as a row of the table; `judge` gives its counts or raises Failure."""
        done = self.command(words, limit, environment=environment)
        result, counts = "ok", ""
        try:
            counts = judge(done) if judge else ""
            if done.status is None:
                result, counts = "TIME", f"{counts} stopped: its time was up".strip()
            elif done.status != 0:
                result, counts = "FAILED", f"{counts} exit status {done.status}".strip()
        except Failure as failure:
            result, counts = ("FAILED" if done.status is not None else "TIME"), str(failure)
        lines = done.text.splitlines()[-(tail if result == "ok" else 40) :]
        say("\n".join(line[:160] for line in lines))
        self.add(name, result, done.seconds, counts)
        return done

    def ask(self, program: str, environment: Mapping[str, str] | None = None) -> Any:
        """What a small Python program prints as JSON in its last line."""
        done = self.command([sys.executable, "-c", program], cwd=self.out, environment=environment)
        if done.status != 0:
            lines = done.text.strip().splitlines()
            raise Failure(lines[-1] if lines else f"exit status {done.status}")
        return json.loads(done.text.strip().splitlines()[-1])


def _begin_group() -> None:
    """In the new process: all that it starts can be ended with it, and SIGINT reaches it."""
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs ignore


def wait(process: subprocess.Popen, limit: float) -> int | None:
    """The exit status, or None where the time was up: then nothing of the process is left."""
    try:
        return process.wait(max(limit - GRACE, 1))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    except BaseException:  # an interruption
        kill_group(process)
        raise
    try:
        process.wait(GRACE - 5)
    except subprocess.TimeoutExpired:
        pass
    kill_group(process)
    return None


def kill_group(process: subprocess.Popen) -> None:
    """Ends a command and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def environment_for(more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a command: the tools beside this Python and nvcc are on its PATH."""
    nvcc = find_nvcc()
    folders = [str(Path(sys.executable).parent), *([str(nvcc.parent)] if nvcc else [])]
    path = os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)])
    found = {"CUDACXX": str(nvcc)} if nvcc else {}
    # of the make that started this, nothing is for the makes that builds start
    inherited = {key: text for key, text in os.environ.items() if not key.startswith("MAKE")}
    return {**inherited, "PATH": path, "PYTHONUNBUFFERED": "1", **found, **more}


def find_nvcc() -> Path | None:
    """nvcc by CUDACXX, PATH, or the usual place."""
    found = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return Path(found) if found else usual if usual.is_file() else None


def count_tests(run: Run, name: str, report: Path) -> str:
    """Such as "12 passed, 3 skipped"; Failure where none passed, or there is no whole report.

    What pytest reported of this step joins the other steps in the one JUnit file of the run.
    """
    try:
        suites = list(ElementTree.parse(report).iter("testsuite"))
    except FileNotFoundError:
        raise Failure("pytest wrote no report") from None
    except ElementTree.ParseError as error:
        raise Failure(f"pytest's report is not whole: {error}") from None
    there = run.junit.is_file()
    root = ElementTree.parse(run.junit).getroot() if there else ElementTree.Element("testsuites")
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        suite.set("name", f"{run.stage}: {name}")
        for key in counts:
            counts[key] += int(suite.get(key, 0))
    root.extend(suites)
    ElementTree.ElementTree(root).write(run.junit, encoding="utf-8", xml_declaration=True)
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    others = ((failed, "failed"), (counts["skipped"], "skipped"))
    words = ", ".join([f"{passed} passed", *(f"{n} {what}" for n, what in others if n)])
    if passed == 0:
        raise Failure(words)
    return words


def say(text: str) -> None:
    if text:
        print(text, flush=True)


def print_table(steps: Sequence[Step]) -> None:
    rows = [("stage", "step", "result", "seconds", "counts")]
    rows += [(s.stage, s.name, s.result, f"{s.seconds:.1f}", s.counts) for s in steps]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    say("")
    for *cells, counts in rows:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        say("  ".join([*padded, counts[:300]]).rstrip())
