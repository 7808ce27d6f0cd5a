"""Times viops against what a user would otherwise run, as ratios within one run.

In each round of pytest-benchmark every contender runs once, in a new random order, so that a
machine that slows down or speeds up does so for all of them.  Among the contenders are two that
measure the machine itself: a copy and a matrix product, which give the floor that no kernel passes.

pytest-benchmark repeats the rounds, holds the statistics of viops' own times and writes the JSON;
what the other contenders took, the ratios and the bars are in `extra_info` of each benchmark.
"""

from __future__ import annotations

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
from sampling import (
    RAISED_HEAP,
    USUAL_HEAP,
    captured,
    in_turn,
    malloc_thresholds,
    page_faults,
    sample_on_cpu,
    sample_on_cuda,
    without_garbage_collection,
)
from tables import times
from torch import Tensor
from viops.cli.measure import peak_bytes

#: A bar: "<=" is at most so many times the contender's time, ">=" at least so many times faster.
#: Against "viops" itself, the limit is seconds a call.
Bar = tuple[str, float]

_RELATIONS = {"<=": operator.le, ">=": operator.ge}

#: Relative norm of the difference within which two contenders compute the same thing.
_SAME_RESULT = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

#: Side of the square matrices whose product shows the arithmetic rate: large enough for the peak,
#: small enough to take milliseconds.
_MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}

#: Bytes that the copy reads and writes, far more than caches hold; on the CPU as many as the op,
#: and from and to as many places.
_COPY_BYTES = {"cuda": 2 << 30}

#: Cold inputs take so many times the last cache; of a processor's, which may be another's too, at
#: most so many bytes are thought of.
_CACHES = 4
_MAX_CPU_CACHE = 32 << 20
_MAX_INPUT_SETS = 32

#: How often a sample replays a CUDA graph: what lies between two graphs is a part of its time.
_REPLAYS = 4

_MAX_ROUNDS = 1000

#: A round of less than so many seconds is repeated at least so often, also with --quick: the best
#: of a few short samples is the machine's mood.
_SHORT_ROUND = (0.2, 9)


@dataclass(frozen=True)
class Floor:
    """What an op cannot do without: bytes read and written, and floating-point operations."""

    bytes: int = 0
    flops: int = 0
    #: Of the matrices whose product shows the rate of the operations.
    dtype: torch.dtype = torch.float32


class Sample(NamedTuple):
    """What one call took."""

    seconds: float
    page_faults: int


class Timed(NamedTuple):
    """What one sample runs."""

    run: Callable[[], object]
    #: How often a sample runs it.
    times: int
    #: How many calls of the contender one run makes.
    calls: int = 1


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
        self.on_gpu = self.device.type == "cuda"
        self._sample = sample_on_cuda if self.on_gpu else sample_on_cpu

    def input_sets(
        self, make: Callable[[int], tuple], touched: int | None = None, cold: bool = False
    ) -> list[tuple]:
        """Inputs made from seeds, for calls in turn: on a GPU more than its cache holds.

        Args:
            make: a set of inputs from a seed.
            touched: bytes of one set that a call reads, where that is not all of them.
            cold: so on the CPU too, for what a network has many of and meets once a step.
        """
        sets = [make(0)]
        if self.on_gpu or cold:
            cache = _last_cache_bytes(self.device)
            touched = _num_bytes(sets[0]) if touched is None else touched
            wanted = -(-_CACHES * cache // max(touched, 1))
            sets += [make(seed) for seed in range(1, min(max(wanted, 2), _MAX_INPUT_SETS))]
        return sets

    def compare(
        self,
        title: str,
        contenders: Mapping[str, Callable[..., object]],
        *,
        inputs: Sequence[tuple] = ((),),
        floor: Floor | None = None,
        bars: Mapping[str, Mapping[str, Bar]] | None = None,
        other_result: Sequence[str] = (),
        calls: int = 1,
        graph: bool = False,
        keep_heap: bool = False,
        patience: int = 1,
        notes: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Times the contenders and returns the record that also goes into the JSON.

        Args:
            title: what is timed, with its sizes.
            contenders: by name, functions of what one set of inputs holds; "viops" is the one that
                the others are compared with, and all must compute what it computes.  "compile" may
                fail: the record then says why.
            inputs: sets of inputs, taken in turn from one call to the next: `input_sets`.
            floor: what the op must move and compute.
            bars: by device type, then by contender (or "floor", or "viops" for seconds a call).
            other_result: contenders that by their nature compute something else.
            calls: calls in one sample, for what is too short to time by itself.
            graph: whether the calls of a sample are replayed as one CUDA graph, so that kernels
                are timed apart from their launches.
            keep_heap: whether large outputs, too, come from memory that is already mapped, for all
                contenders alike.  By default those over 32 MB are mapped and faulted at each
                call, as in a user's own process.
            patience: how many times the usual number of rounds there are, for a ratio that noise
                would carry across its bar.
            notes: further measures to print.
        """
        limits = (bars or {}).get(self.device.type, {})
        _check_arguments(contenders, floor, limits, other_result)
        if graph and not self.on_gpu:
            raise ValueError(f"graph: expected a CUDA device, got {self.device}")
        contenders = dict(contenders)
        if self._only_viops:
            contenders = {"viops": contenders["viops"]}
            floor, limits, other_result = None, {}, ()
        with malloc_thresholds(RAISED_HEAP if keep_heap else USUAL_HEAP) as malloc:
            errors = self._warm_up(contenders, inputs, other_result)
            timed = {}
            for name, call in list(contenders.items()):
                with self._may_fail(name, contenders, errors):
                    timed[name] = (
                        Timed(captured(call, inputs, calls), _REPLAYS, calls)
                        if graph
                        else Timed(in_turn(call, inputs), calls)
                    )
            timed |= self._floor_contenders(floor, calls, len(inputs))
            self._benchmark.has_error = True  # an interrupted bench has no place in the JSON
            samples = self._run_rounds(timed, patience)
        measured: dict[str, dict[str, Any]] = {name: _summary(samples[name]) for name in contenders}
        measured |= {name: {"error": text} for name, text in errors.items()}
        record: dict[str, Any] = {
            "op": self._op,
            "title": title,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "calls": calls,
            "graph": graph,
            "input_sets": len(inputs),
            "input_bytes": sum(map(_num_bytes, inputs)),
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
        self._benchmark.has_error = False
        self.record = record
        return record

    def compare_memory(
        self,
        title: str,
        contenders: Mapping[str, Callable[..., object]],
        *,
        inputs: tuple,
        bars: Mapping[str, Mapping[str, Bar]] | None = None,
    ) -> dict[str, Any]:
        """The most memory that tensors hold while each contender runs, beyond its inputs.

        Arguments and result are those of `compare`, with bytes for seconds.
        """
        if self._only_viops:
            contenders, bars = {"viops": contenders["viops"]}, None
        self._warm_up(dict(contenders), [inputs], ())
        measures = {
            name: lambda call=call: peak_bytes(lambda: call(*inputs), self.device.type)
            for name, call in contenders.items()
        }
        what = "the most that tensors held at once, beyond the inputs"
        return self.compare_numbers(title, measures, what=what, unit="bytes", bars=bars)

    def compare_numbers(
        self,
        title: str,
        measures: Mapping[str, Callable[[], float]],
        *,
        what: str,
        unit: str,
        bars: Mapping[str, Mapping[str, Bar]] | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> dict[str, Any]:
        """Numbers that are no times, such as an error: by contender, what its function returns.

        Arguments and result are otherwise those of `compare`, with `unit` ("bytes", or "" for plain
        numbers) for seconds; `what` says what the numbers are.
        """
        limits = (bars or {}).get(self.device.type, {})
        _check_arguments(measures, None, limits, ())
        if self._only_viops:
            measures, limits = {"viops": measures["viops"]}, {}
        numbers = {name: measure() for name, measure in measures.items()}
        for name, number in numbers.items():
            if not 0 < number < float("inf"):
                raise ValueError(f"{name}: expected a number above 0 to compare, got {number}")
        self._benchmark.pedantic(measures["viops"], rounds=1)
        record: dict[str, Any] = {
            "op": self._op,
            "title": title,
            "unit": unit,
            "what": what,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "rounds": 1,
            "contenders": {name: {"best": number} for name, number in numbers.items()},
            "notes": dict(notes or {}),
        }
        record["ratios"] = _ratios(record)
        record["bars"] = [_judge(name, bar, record) for name, bar in limits.items()]
        self._benchmark.extra_info.update(record)
        self.record = record
        return record

    def _warm_up(
        self,
        contenders: dict[str, Callable[..., object]],
        inputs: Sequence[tuple],
        other_result: Sequence[str],
    ) -> dict[str, str]:
        """Runs each contender until it is warm and checks its result; drops what cannot run."""
        errors: dict[str, str] = {}
        expected = contenders["viops"](*inputs[0])
        for name, call in list(contenders.items()):
            with self._may_fail(name, contenders, errors):
                result = call(*inputs[0])
            if name not in contenders:
                continue
            if name not in other_result:
                _check_same_result(name, result, expected)
            for args in inputs:
                call(*args)
        return errors

    @contextmanager
    def _may_fail(
        self, name: str, contenders: dict[str, Callable[..., object]], errors: dict[str, str]
    ) -> Iterator[None]:
        """The block may fail for "compile" alone, which is then no contender any more."""
        try:
            yield
        except Exception as error:
            if name != "compile":
                raise
            errors[name] = _one_line(error)
            del contenders[name]

    def _floor_contenders(
        self, floor: Floor | None, calls: int, input_sets: int
    ) -> dict[str, Timed]:
        """The copy and the matrix product that measure the machine.

        Where calls take sets of inputs in turn, the copies on the CPU take as many tensors.
        """
        times = 1 if self.on_gpu else calls  # on a GPU one takes as long as many calls of an op
        timed = {}
        if floor is not None and floor.bytes:
            moved = _COPY_BYTES.get(self.device.type, floor.bytes)
            elements = -(-moved // 8)  # half read, half written
            pairs = [
                (torch.ones(elements, device=self.device), torch.rand(elements, device=self.device))
                for _ in range(1 if self.on_gpu else input_sets)
            ]
            timed["copy"] = Timed(in_turn(Tensor.copy_, pairs), times)
        if floor is not None and floor.flops:
            side = _MATRIX_SIDE.get(self.device.type, 1024)
            matrix = torch.rand(side, side, device=self.device).to(floor.dtype)
            product = torch.empty_like(matrix)
            timed["matrix product"] = Timed(lambda: torch.mm(matrix, matrix, out=product), times)
        for run, _, _ in timed.values():
            for _ in range(input_sets):
                run()
        return timed

    def _run_rounds(self, timed: Mapping[str, Timed], patience: int) -> dict[str, list[Sample]]:
        """One sample a round of each contender."""
        samples: dict[str, list[Sample]] = {name: [] for name in timed}
        others = [name for name in timed if name != "viops"]
        order = random.Random(0)

        def run(name: str) -> None:
            run, times, calls = timed[name]
            if self._warm:
                run()
            faults = page_faults()
            seconds = self._sample(run, times) / calls
            faults = (page_faults() - faults) // (times * calls)
            samples[name].append(Sample(seconds, faults))

        def run_others() -> None:
            order.shuffle(others)
            for name in others:
                run(name)

        with without_garbage_collection():
            start = time.perf_counter()
            run_others()
            run("viops")
            rounds = patience * self._num_rounds(time.perf_counter() - start)
            # what pytest-benchmark times is the sample of viops: its statistics are of that
            self._benchmark.pedantic(run, args=("viops",), setup=run_others, rounds=rounds)
        return samples

    def _num_rounds(self, seconds: float) -> int:
        """How often to repeat a round that takes so long."""
        short, least = _SHORT_ROUND
        least = max(self._min_rounds, least) if seconds < short else self._min_rounds
        return min(max(round(self._seconds / max(seconds, 1e-9)), least), _MAX_ROUNDS)


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


def _num_bytes(value: object) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(value))


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
    # float32 results beside bfloat16 ones may have been rounded to bfloat16 on the way
    dtypes = {tensor.dtype for tensor in wanted if tensor.is_floating_point()}
    tolerance = max((_SAME_RESULT[dtype] for dtype in dtypes), default=0.0)
    for place, (one, other) in enumerate(zip(got, wanted, strict=True)):
        if one.is_floating_point():
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


def _last_cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    names = [f"SC_LEVEL{level}_CACHE_SIZE" for level in (3, 2) if hasattr(os, "sysconf_names")]
    sizes = [os.sysconf(name) for name in names if name in os.sysconf_names]
    return min(max([*sizes, 0]) or _MAX_CPU_CACHE, _MAX_CPU_CACHE)


def _floor_summary(
    floor: Floor, samples: Mapping[str, Sequence[Sample]], device_type: str
) -> dict[str, Any]:
    """The longer of two times: to move the bytes, to do the operations."""
    result: dict[str, Any] = {"bytes": floor.bytes, "flops": floor.flops, "best": 0, "median": 0}
    result["dtype"] = str(floor.dtype).removeprefix("torch.")
    shares = []
    if floor.bytes:
        copy = _summary(samples["copy"])
        copied = _COPY_BYTES.get(device_type, floor.bytes)
        result["bytes_per_second"] = copied / copy["best"]
        shares.append((copy, floor.bytes / copied))
    if floor.flops:
        product = _summary(samples["matrix product"])
        product_flops = 2 * _MATRIX_SIDE.get(device_type, 1024) ** 3
        result["flops_per_second"] = product_flops / product["best"]
        shares.append((product, floor.flops / product_flops))
    for key in ("best", "median"):
        result[key] = max(took[key] * share for took, share in shares)
    return result


def _ratios(record: Mapping[str, Any]) -> dict[str, float]:
    """Best time of each contender over the best of viops: how many times faster viops is."""
    viops = record["contenders"]["viops"]["best"]
    return {
        name: row["best"] / viops
        for name, row in times(record).items()
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
