"""Times viops against what a user would otherwise run, as ratios within one run.

In each round of pytest-benchmark every contender runs once, in a new random order, so that a
machine that slows down or speeds up does so for all of them.  Among the contenders are two that
measure the machine itself: a copy and a matrix product, which give the floor that no kernel passes.

pytest-benchmark repeats the rounds, holds the statistics of viops' own times and writes the JSON;
what the other contenders took, the ratios and the bars are in `extra_info` of each benchmark.
"""

from __future__ import annotations

import ctypes
import gc
import operator
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import resource
except ImportError:  # Windows has no count of page faults
    resource = None  # type: ignore[assignment]

#: A bar: "<=" is at most so many times the contender's time, ">=" at least so many times faster.
#: Against "viops" itself, the limit is seconds a call.
Bar = tuple[str, float]

_RELATIONS = {"<=": operator.le, ">=": operator.ge}

#: Relative norm of the difference within which two contenders compute the same thing.
_SAME_RESULT = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

#: Side of the square matrices whose product shows the arithmetic rate: large enough for the peak,
#: small enough to take milliseconds.
_MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}

_MAX_ROUNDS = 1000

#: A round of less than so many seconds is repeated at least so often, also with --quick: the best
#: of a few short samples is the machine's mood.
_SHORT_ROUND = (0.2, 9)

#: Bytes from which glibc maps an allocation anew, and from which it gives the heap's end back.
#: Usual is where glibc's own adjustment ends in a process that has freed a few large tensors.
_USUAL = (32 << 20, 64 << 20)
_RAISED = (1 << 30, 2**31 - 1)


@dataclass(frozen=True)
class Floor:
    """What an op cannot do without: bytes read and written, and floating-point operations."""

    bytes: int = 0
    flops: int = 0


class Sample(NamedTuple):
    """What one call took."""

    seconds: float
    page_faults: int


class Harness:
    """Runs the contenders of one bench; the `harness` fixture."""

    def __init__(
        self,
        benchmark: Any,
        *,
        op: str,
        device: str = "cpu",
        seconds: float = 1.0,
        min_rounds: int = 5,
        only_viops: bool = False,
        warm: bool = False,
    ) -> None:
        """
        Args:
            benchmark: pytest-benchmark's fixture.
            op: the op family that the bench belongs to.
            device: where the bench makes its tensors.
            seconds, min_rounds: rounds are repeated for so long, and at least so often.
            only_viops: leaves out all other contenders, for a comparison of two versions.
            warm: an untimed call of the same contender comes before each sample, so that caches
                hold what the contender itself leaves there, and not what another left.
        """
        self.device = torch.device(device)
        self.record: dict[str, Any] | None = None
        self._benchmark = benchmark
        self._op = op
        self._seconds = seconds
        self._min_rounds = min_rounds
        self._only_viops = only_viops
        self._warm = warm
        self._sample = _sample_on_cuda if self.device.type == "cuda" else _sample_on_cpu

    def compare(
        self,
        title: str,
        contenders: Mapping[str, Callable[[], object]],
        *,
        floor: Floor | None = None,
        bars: Mapping[str, Mapping[str, Bar]] | None = None,
        other_result: Sequence[str] = (),
        calls: int = 1,
        keep_heap: bool = False,
        notes: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Times the contenders and returns the record that also goes into the JSON.

        Args:
            title: what is timed, with its sizes.
            contenders: by name, functions without arguments; "viops" is the one that the others
                are compared with, and all must compute what it computes.  "compile" may fail: the
                record then says why.
            floor: what the op must move and compute.
            bars: by device type, then by contender (or "floor", or "viops" for seconds a call).
            other_result: contenders that by their nature compute something else.
            calls: calls in one sample, for what is too short to time by itself.
            keep_heap: whether large outputs, too, come from memory that is already mapped, for all
                contenders alike.  By default those over 32 MB are mapped and faulted at each
                call, as in a user's own process.
            notes: further measures to print.
        """
        limits = (bars or {}).get(self.device.type, {})
        _check_arguments(contenders, floor, limits, other_result)
        contenders = dict(contenders)
        if self._only_viops:
            contenders = {"viops": contenders["viops"]}
            floor, limits, other_result = None, {}, ()
        with malloc_thresholds(_RAISED if keep_heap else _USUAL) as malloc:
            errors = self._warm_up(contenders, other_result)
            floor_names = self._add_floor(contenders, floor)
            samples = self._run_rounds(contenders, calls)
        measured: dict[str, dict[str, Any]] = {
            name: _summary(samples[name]) for name in contenders if name not in floor_names
        }
        measured |= {name: {"error": text} for name, text in errors.items()}
        record: dict[str, Any] = {
            "op": self._op,
            "title": title,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "calls": calls,
            "malloc": malloc,
            "warm": self._warm,
            "rounds": len(samples["viops"]),
            "contenders": measured,
            "notes": dict(notes or {}),
        }
        if floor is not None:
            record["floor"] = _floor_summary(floor, samples, self.device.type)
        record["ratios"] = _ratios(record)
        record["bars"] = [_judge(name, bar, record) for name, bar in limits.items()]
        self._benchmark.extra_info.update(record)
        self.record = record
        return record

    def _warm_up(
        self, contenders: dict[str, Callable[[], object]], other_result: Sequence[str]
    ) -> dict[str, str]:
        """Runs each contender until it is warm and checks its result; drops what cannot run."""
        errors: dict[str, str] = {}
        expected = contenders["viops"]()
        for name, call in list(contenders.items()):
            try:
                result = call()
            except Exception as error:
                if name != "compile":
                    raise
                errors[name] = _one_line(error)
                del contenders[name]
                continue
            if name not in other_result:
                _check_same_result(name, result, expected)
            call()
        return errors

    def _add_floor(
        self, contenders: dict[str, Callable[[], object]], floor: Floor | None
    ) -> tuple[str, ...]:
        """Adds the copy and the matrix product to the contenders; their names."""
        names: tuple[str, ...] = ()
        if floor is not None and floor.bytes:
            source = torch.ones(-(-floor.bytes // 8), device=self.device)  # half read, half written
            target = torch.ones_like(source)
            contenders["copy"] = lambda: target.copy_(source)
            names += ("copy",)
        if floor is not None and floor.flops:
            side = _MATRIX_SIDE.get(self.device.type, 1024)
            matrix = torch.ones(side, side, device=self.device)
            product = torch.empty_like(matrix)
            contenders["matrix product"] = lambda: torch.mm(matrix, matrix, out=product)
            names += ("matrix product",)
        for name in names:
            contenders[name]()
        return names

    def _run_rounds(
        self, contenders: Mapping[str, Callable[[], object]], calls: int
    ) -> dict[str, list[Sample]]:
        """One sample a round of each contender."""
        samples: dict[str, list[Sample]] = {name: [] for name in contenders}
        others = [name for name in contenders if name != "viops"]
        order = random.Random(0)

        def run(name: str) -> None:
            if self._warm:
                contenders[name]()
            faults = page_faults()
            seconds = self._sample(contenders[name], calls)
            samples[name].append(Sample(seconds, (page_faults() - faults) // calls))

        def run_others() -> None:
            order.shuffle(others)
            for name in others:
                run(name)

        with _without_garbage_collection():
            start = time.perf_counter()
            run_others()
            run("viops")
            rounds = self._num_rounds(time.perf_counter() - start)
            # what pytest-benchmark times is the sample of viops: its statistics are of that
            self._benchmark.pedantic(run, args=("viops",), setup=run_others, rounds=rounds)
        return samples

    def _num_rounds(self, seconds: float) -> int:
        """How often to repeat a round that takes so long."""
        short, least = _SHORT_ROUND
        least = max(self._min_rounds, least) if seconds < short else self._min_rounds
        return min(max(round(self._seconds / max(seconds, 1e-9)), least), _MAX_ROUNDS)


def _sample_on_cpu(call: Callable[[], object], calls: int) -> float:
    """Seconds that one of so many calls takes."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def _sample_on_cuda(call: Callable[[], object], calls: int) -> float:
    """The same between two events on the current stream; earlier work has ended before."""
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def malloc_thresholds(thresholds: tuple[int, int]) -> Iterator[str]:
    """Sets glibc's mmap and trim thresholds within the block; yields what holds there, in words."""
    mmap_threshold, trim_threshold = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    try:
        if mallopt is None:
            yield "not glibc's malloc"
        elif mallopt(mmap_threshold, thresholds[0]) and mallopt(trim_threshold, thresholds[1]):
            yield f"outputs over {thresholds[0] >> 20} MB are mapped at each call"
        else:
            yield "glibc refused the thresholds"
    finally:
        if mallopt is not None:
            mallopt(mmap_threshold, _USUAL[0])
            mallopt(trim_threshold, _USUAL[1])


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else 0


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def _check_arguments(
    contenders: Mapping[str, object],
    floor: Floor | None,
    bars: Mapping[str, Bar],
    other_result: Sequence[str],
) -> None:
    names = list(contenders)
    if "viops" not in contenders:
        raise ValueError(f'contenders: expected "viops" among them, got {names}')
    for name in other_result:
        if name not in contenders:
            raise ValueError(f"other_result: {name!r} is not a contender; there are: {names}")
    if floor is not None and (floor.bytes < 0 or floor.flops < 0 or not floor.bytes + floor.flops):
        raise ValueError(f"floor: expected bytes or flops above 0, got {floor}")
    for name, (relation, _) in bars.items():
        if relation not in _RELATIONS:
            raise ValueError(f'bars: expected "<=" or ">=" for {name!r}, got {relation!r}')
        if name not in contenders and not (name == "floor" and floor is not None):
            raise ValueError(f"bars: {name!r} is not a contender; there are: {names}")


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _check_same_result(name: str, result: object, expected: object) -> None:
    """A contender that computes something else would make the ratio meaningless."""
    got, wanted = _tensors(result), _tensors(expected)
    if [t.shape for t in got] != [t.shape for t in wanted]:
        raise AssertionError(f"{name}: shapes differ from those of viops")
    for place, (one, other) in enumerate(zip(got, wanted, strict=True)):
        if one.is_floating_point():
            tolerance = _SAME_RESULT[one.dtype]
            norm = other.double().norm().item()
            difference = (one.double() - other.double()).norm().item()
            same = difference <= tolerance * norm  # false for NaN too
        else:
            same = torch.equal(one, other)
        if not same:
            raise AssertionError(f"{name}: result {place} differs from that of viops")


def _summary(samples: Sequence[Sample]) -> dict[str, Any]:
    seconds = [sample.seconds for sample in samples]
    return {
        "best": min(seconds),
        "median": statistics.median(seconds),
        "page_faults": int(statistics.median(sample.page_faults for sample in samples)),
    }


def _floor_summary(
    floor: Floor, samples: Mapping[str, Sequence[Sample]], device_type: str
) -> dict[str, Any]:
    """The longer of two times: to move the bytes, to do the operations."""
    result: dict[str, Any] = {"bytes": floor.bytes, "flops": floor.flops, "best": 0, "median": 0}
    shares = []
    if floor.bytes:
        copy = _summary(samples["copy"])
        result["bytes_per_second"] = floor.bytes / copy["best"]
        shares.append((copy, 1.0))
    if floor.flops:
        product = _summary(samples["matrix product"])
        product_flops = 2 * _MATRIX_SIDE.get(device_type, 1024) ** 3
        result["flops_per_second"] = product_flops / product["best"]
        shares.append((product, floor.flops / product_flops))
    for key in ("best", "median"):
        result[key] = max(times[key] * share for times, share in shares)
    return result


def _times(record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What was measured, the floor included."""
    rows = dict(record["contenders"])
    if "floor" in record:
        rows = {"viops": rows.pop("viops"), "floor": record["floor"], **rows}
    return rows


def _ratios(record: Mapping[str, Any]) -> dict[str, float]:
    """Best time of each contender over the best of viops: how many times faster viops is."""
    viops = record["contenders"]["viops"]["best"]
    return {
        name: row["best"] / viops
        for name, row in _times(record).items()
        if name != "viops" and "best" in row
    }


def _judge(name: str, bar: Bar, record: Mapping[str, Any]) -> dict[str, Any]:
    """A bar with what was measured; missed where nothing could be."""
    relation, limit = bar
    measured: float | None
    if name == "viops":
        measured = record["contenders"]["viops"]["best"]
    else:
        measured = record["ratios"].get(name)
        if measured is not None and relation == "<=":
            measured = 1 / measured
    met = measured is not None and _RELATIONS[relation](measured, limit)
    return {"against": name, "relation": relation, "limit": limit, "measured": measured, "met": met}


def format_seconds(seconds: float) -> str:
    """Three digits in s, ms or us."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def format_bar(bar: Mapping[str, Any]) -> str:
    """Such as "at most 1.4 x: met"."""
    words = "at most" if bar["relation"] == "<=" else "at least"
    limit = format_seconds(bar["limit"]) if bar["against"] == "viops" else f"{bar['limit']:g} x"
    return f"{words} {limit}: {'met' if bar['met'] else 'MISSED'}"


def format_record(record: Mapping[str, Any]) -> str:
    """The table of one bench."""
    bars = {bar["against"]: bar for bar in record["bars"]}
    rows = [("", "best", "median", "faults", "viops takes", "bar")]
    for name, row in _times(record).items():
        bar = format_bar(bars[name]) if name in bars else ""
        if "error" in row:
            rows.append((name, "failed", "", "", "", bar))
            continue
        took = ""
        if name != "viops":
            ratio = record["ratios"][name]
            over = name == "floor" or bars.get(name, {}).get("relation") == "<="
            took = f"{1 / ratio:.2f} x its time" if over or ratio < 1 else f"{ratio:.2f} x faster"
        rows.append(
            (
                name,
                format_seconds(row["best"]),
                format_seconds(row["median"]),
                str(row.get("page_faults", "")),
                took,
                bar,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"{record['title']}  ({record['rounds']} rounds)"]
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    lines += [f"  {text}" for text in _floor_lines(record)]
    lines.append(f"  malloc: {record['malloc']}")
    lines += [f"  {key}: {text}" for key, text in record["notes"].items()]
    for name, row in record["contenders"].items():
        if "error" in row:
            lines.append(f"  {name} failed: {row['error']}")
    return "\n".join(lines)


def _floor_lines(record: Mapping[str, Any]) -> list[str]:
    floor = record.get("floor", {})
    lines = []
    if floor.get("bytes"):
        rate = floor["bytes_per_second"] / 1e9
        lines.append(f"floor: {floor['bytes'] / 1e6:.3g} MB at {rate:.3g} GB/s, a copy in this run")
    if floor.get("flops"):
        rate = floor["flops_per_second"] / 1e9
        lines.append(
            f"floor: {floor['flops'] / 1e9:.3g} GFLOP at {rate:.3g} GFLOP/s, torch.mm in this run"
        )
    if record["ratios"].get("floor", 0) > 1:
        lines.append(
            "viops is faster than the floor: caches held the data, or torch.mm is below the peak"
        )
    return lines


def format_bars(records: Sequence[Mapping[str, Any]]) -> str:
    """All bars of a run, one a line."""
    lines = []
    for record in records:
        for bar in record["bars"]:
            measured = bar["measured"]
            if measured is None:
                text = "not measured"
            else:
                text = (
                    format_seconds(measured) if bar["against"] == "viops" else f"{measured:.2f} x"
                )
            against = "a call" if bar["against"] == "viops" else bar["against"]
            lines.append(f"{record['title']}, {against}: {text}, {format_bar(bar)}")
    return "\n".join(lines)
