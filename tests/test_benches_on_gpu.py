"""The harness of the benches on a GPU, without one: on clocks and devices that stand in for it."""

from __future__ import annotations

import importlib.util
import types

import pytest
import torch
from test_benches import BENCHES, harness_module, make_harness, tables
from torch.cuda._utils import _get_device_index

import sampling  # isort: skip  (test_benches makes the benches importable)


def fake_gpu_harness(monkeypatch, seconds: dict[str, float]):
    """A harness for "cuda" whose samples take as long as the contender's name says."""
    properties = types.SimpleNamespace(L2_cache_size=100)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    harness = make_harness(device="cuda", min_rounds=2)
    running = []
    monkeypatch.setattr(
        harness_module, "in_turn", lambda call, inputs: lambda: running.append(call.__name__)
    )
    monkeypatch.setattr(
        harness_module,
        "captured",
        lambda call, inputs, calls: lambda: running.extend([call.__name__] * calls),
    )

    def copy():
        running.append("copy")

    def floor_contenders(floor, calls, input_sets):
        return {"copy": harness_module.Timed(copy, 1)} if floor else {}

    def sample(run, times):
        running.clear()
        for _ in range(times):
            run()
        return sum(seconds[name] for name in running) / times

    monkeypatch.setattr(harness, "_floor_contenders", floor_contenders)
    monkeypatch.setattr(harness, "_sample", sample)
    return harness


@pytest.mark.parametrize("graph", [False, True])
def test_bars_of_a_gpu(monkeypatch: pytest.MonkeyPatch, graph: bool):
    def kernel(x):
        return x

    def slow(x):
        return x.clone()

    moved = 66_000_000
    # the copy moves 2 GiB: at 3 TB/s the 66 MB take 22 us
    seconds = {"kernel": 28e-6, "slow": 196e-6, "copy": (2 << 30) / 3e12}
    harness = fake_gpu_harness(monkeypatch, seconds)
    record = harness.compare(
        "double, B256",
        {"viops": kernel, "eager": slow},
        inputs=harness.input_sets(lambda seed: (torch.ones(50),)),
        floor=harness_module.Floor(moved),
        bars={
            "cpu": {"eager": (">=", 100)},
            "cuda": {"floor": ("<=", 1 / 0.75), "eager": (">=", 8)},
        },
        calls=20,
        graph=graph,
    )
    assert record["contenders"]["viops"]["best"] == pytest.approx(28e-6)
    assert record["floor"]["best"] == pytest.approx(22e-6)
    assert {bar["against"]: bar["met"] for bar in record["bars"]} == {"floor": True, "eager": False}
    lines = [" ".join(line.split()) for line in tables.format_record(record).splitlines()]
    assert "floor 22 us 22 us 1.27 x its time at most 1.33 x: met" in lines
    assert "eager 196 us 196 us 7.00 x faster at least 8 x: MISSED" in lines
    assert "viops moves 2.36e+03 GB/s, 79% of what the copy moves" in lines
    how = "replayed as a CUDA graph" if graph else "queued"
    assert f"20 calls a sample, {how}, on 2 sets of inputs in turn, 0.0004 MB" in lines
    assert not any("malloc" in line or "faults" in line for line in lines)


def test_inputs_of_a_gpu_outgrow_its_cache(monkeypatch: pytest.MonkeyPatch):
    harness = fake_gpu_harness(monkeypatch, {})
    for length, count in ((5, 20), (50, 2), (500, 2), (1, 32)):  # 4 bytes each, a cache of 100
        sets = harness.input_sets(lambda seed, length=length: (torch.full((length,), float(seed)),))
        assert len(sets) == count
        assert {int(x[0]) for (x,) in sets} == set(range(len(sets)))


def test_a_graph_needs_a_gpu():
    with pytest.raises(ValueError, match="graph: expected a CUDA device, got cpu"):
        make_harness().compare("graph", {"viops": int}, graph=True)


def test_inputs_are_counted_by_what_is_read_of_them(monkeypatch: pytest.MonkeyPatch):
    harness = fake_gpu_harness(monkeypatch, {})
    sets = harness.input_sets(lambda seed: (torch.zeros(50),), touched=40)  # of 200 bytes
    assert len(sets) == 10


def test_what_cannot_be_captured_is_told(monkeypatch: pytest.MonkeyPatch):
    def kernel(x):
        return x

    def compiled(x):
        return x.clone()

    harness = fake_gpu_harness(monkeypatch, {"kernel": 1e-6})
    replayed = harness_module.captured

    def captured(call, inputs, calls):
        if call in (compiled, refused):
            raise RuntimeError("operation not permitted when stream is capturing")
        return replayed(call, inputs, calls)

    refused = None
    monkeypatch.setattr(harness_module, "captured", captured)
    compare = {"inputs": [(torch.ones(5),)], "bars": {"cuda": {"compile": (">=", 1)}}}
    record = harness.compare("one", {"viops": kernel, "compile": compiled}, graph=True, **compare)
    assert [bar["met"] for bar in record["bars"]] == [False]
    lines = tables.format_record(record).splitlines()
    assert any("compile failed: RuntimeError: operation not permitted" in line for line in lines)
    refused = kernel
    with pytest.raises(RuntimeError, match="operation not permitted"):
        harness.compare("two", {"viops": kernel, "compile": compiled}, graph=True, **compare)


class Clocks:
    """A host and a GPU of which each call takes so long; stands for torch.cuda."""

    def __init__(self, on_host: float, on_gpu: float) -> None:
        self.on_host, self.on_gpu = on_host, on_gpu
        self.host = self.gpu = 0.0

    def call(self) -> None:
        self.host += self.on_host
        self.gpu = max(self.gpu, self.host) + self.on_gpu

    def synchronize(self) -> None:
        self.host = max(self.gpu, self.host)

    def Event(self, enable_timing: bool) -> types.SimpleNamespace:
        event = types.SimpleNamespace(time=0.0)

        def record() -> None:
            event.time = max(self.gpu, self.host)

        event.record = record
        event.elapsed_time = lambda end: (end.time - event.time) * 1e3
        return event


@pytest.mark.parametrize(("on_host", "on_gpu"), [(12e-6, 28e-6), (28e-6, 12e-6)])
def test_a_sample_is_of_the_slower_of_host_and_gpu(
    monkeypatch: pytest.MonkeyPatch, on_host: float, on_gpu: float
):
    """From its first call on: that the GPU is idle before that is no part of it."""
    clocks = Clocks(on_host, on_gpu)
    for name in ("Event", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(clocks, name))
    assert sampling.sample_on_cuda(clocks.call, 20) == pytest.approx(28e-6)


def test_results_of_calls_in_turn_lie_in_different_places():
    calls, sets = [], [(torch.full((1000,), float(i)),) for i in range(3)]

    def call(x):
        result = x + 1
        calls.append(result.data_ptr())
        return result

    run = sampling.in_turn(call, sets)
    for _ in range(12):
        assert run() is None
    for i in range(len(calls) - len(sets)):
        assert len(set(calls[i : i + len(sets) + 1])) == len(sets) + 1


@pytest.mark.parametrize(("name", "index"), [("cuda", 0), ("cuda:0", 0), ("cuda:3", 3)])
def test_the_device_is_set_by_its_number(monkeypatch: pytest.MonkeyPatch, name: str, index: int):
    """torch's own rule, which refuses a device without a number."""
    spec = importlib.util.spec_from_file_location("conftest_of_benches", BENCHES / "conftest.py")
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    chosen = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append(_get_device_index(device))
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(conftest, "_define_torchvision_ops", lambda: None)
    options = {"device": name, "threads": 1}
    conftest.pytest_configure(types.SimpleNamespace(stash={}, getoption=options.get))
    assert chosen == [index]
