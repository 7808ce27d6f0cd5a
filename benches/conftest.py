"""What all benches share: the harness fixture, threads and device, the tables, the JSON."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import viops
from harness import Harness
from tables import format_bars, format_record
from viops import native

_RECORDS = pytest.StashKey[list]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("viops")
    group.addoption("--device", default="cpu", help="cpu or cuda")
    group.addoption("--threads", type=int, default=min(2, os.cpu_count() or 1))
    group.addoption("--warm", action="store_true", help="an untimed call before each timed one")
    group.addoption("--only-viops", action="store_true", help="leave out the other contenders")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDS] = []
    torch.set_num_threads(config.getoption("threads"))
    if _on_gpu(config):
        # events are those of the current device, which is set by number alone
        torch.cuda.set_device(torch.device(config.getoption("device")).index or 0)
    _define_torchvision_ops()


def _on_gpu(config: pytest.Config) -> bool:
    return torch.device(config.getoption("device")).type == "cuda"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the benches of another device: a mark device("cuda") or device("cpu") says so.

    Those that --quick leaves out, which have no bars, come last: a run that is interrupted has
    the others by then.
    """
    device = torch.device(config.getoption("device")).type
    others = []
    for item in items:
        mark = item.get_closest_marker("device")
        if mark is not None and mark.args != (device,):
            others.append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]
    items.sort(key=lambda item: item.get_closest_marker("full") is not None)


def pytest_keyboard_interrupt() -> None:
    """A terminal and `viops bench` both interrupt: the report is to be written all the same."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _define_torchvision_ops() -> None:
    """Lets timm import a torchvision whose compiled part does not fit torch: no bench calls it."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    try:
        for library in Path(spec.origin).parent.glob("_C.*"):
            torch.ops.load_library(library)
    except OSError:
        for op in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{op}", schema)


def pytest_collection_finish(session: pytest.Session) -> None:
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    device = session.config.getoption("device")
    reporter.write_line(
        f"viops {viops.__version__}, {native.load_error or 'with its compiled extension'}"
    )
    if _on_gpu(session.config):
        device = f"{device}, {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    reporter.write_line(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load > cores / 2:
        reporter.write_line(f"load average {load:.1f} on {cores} cores: others disturb these times")


@pytest.fixture
def harness(benchmark, request: pytest.FixtureRequest) -> Iterator[Harness]:  # type: ignore[no-untyped-def]
    """The contenders of one bench; its table is printed when the bench ends."""
    config = request.config
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # what one bench compiled, and how often, is nothing to the next
    harness = Harness(
        benchmark,
        op=request.path.stem.removeprefix("bench_"),
        device=config.getoption("device"),
        seconds=float(config.getoption("benchmark_max_time")),
        min_rounds=config.getoption("benchmark_min_rounds"),
        only_viops=config.getoption("only_viops"),
        warm=config.getoption("warm"),
    )
    yield harness
    if harness.record is not None:
        config.stash[_RECORDS].append(harness.record)
        reporter = config.pluginmanager.getplugin("terminalreporter")
        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            reporter.ensure_newline()
            reporter.write_line(format_record(harness.record))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:  # type: ignore[no-untyped-def]
    text = format_bars(config.stash[_RECORDS])
    if text:
        terminalreporter.section("bars")
        terminalreporter.write_line(text)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info.pop("node", None)  # the name of a host is nobody's business
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    if _on_gpu(config):
        machine_info["gpu"] = torch.cuda.get_device_name()
        machine_info["cuda"] = torch.version.cuda


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list, output_json: dict
) -> None:
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)
