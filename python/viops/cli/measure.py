"""Images a second and peak memory, for the demo."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def best_seconds(
    runs: Mapping[str, Callable[[], object]], rounds: Iterable[int], device: str
) -> dict[str, float]:
    """The shortest time of each function, run in turn so that all meet the same disturbances."""
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
    for _ in rounds:
        for name, run in runs.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most memory that tensors allocated while the function ran, beyond what was held before.

    On a GPU from torch's caching allocator; on the CPU from the allocations and frees that
    torch.profiler records, which count every tensor and nothing else.  The function frees what it
    allocates: frees of what was there before are not seen.
    """
    run()
    if device == "cuda":
        _synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        _synchronize(device)
        return torch.cuda.max_memory_allocated() - held
    return max((0, *_held_after_each_change(run)))


def held_bytes(run: Callable[[], object], device: str) -> int:
    """The memory of tensors that the function has allocated and that its result keeps alive.

    Measured as peak_bytes is; of a forward pass it is what waits for backward, and the result.
    """
    run()
    if device == "cuda":
        _synchronize(device)
        before = torch.cuda.memory_allocated()
        result = run()
        _synchronize(device)
        held = torch.cuda.memory_allocated() - before
        del result
        return held
    return (0, *_held_after_each_change(run))[-1]


def _held_after_each_change(run: Callable[[], object]) -> list[int]:
    """Bytes of tensors on the CPU after each allocation and each free; the result is kept alive."""
    with _quiet_stderr():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            result = run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    del result
    changes = [
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    ]
    return list(accumulate(change for _, change in sorted(changes, key=lambda item: item[0])))


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Discards what C++ writes to stderr: torch's profiler announces there that it starts."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
