"""One timed sample of a call on the CPU or a GPU, and what is to be held still around it."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

try:
    import resource
except ImportError:  # Windows has no count of page faults
    resource = None  # type: ignore[assignment]

#: Bytes from which glibc maps an allocation anew, and from which it gives the heap's end back.
#: Usual is where glibc's own adjustment ends in a process that has freed a few large tensors.
USUAL_HEAP = (32 << 20, 64 << 20)
RAISED_HEAP = (1 << 30, 2**31 - 1)


def sample_on_cpu(call: Callable[[], object], calls: int) -> float:
    """Seconds that one of so many calls takes."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def sample_on_cuda(call: Callable[[], object], calls: int) -> float:
    """The same between two events on the current stream, for calls queued one after the other.

    So a model queues its layers: where launching takes longer than the kernels, it is launching
    that this measures.  An untimed call comes before the first event.  On an idle GPU that event
    would pass at once, and the time in which the host makes the first call, where the GPU has
    nothing to do, would be a part of the kernels' time.  (A sleeping kernel in its place would
    let the host run ahead, and hide that much launching of all the calls.)
    """
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    call()
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


def in_turn(call: Callable[..., object], inputs: Sequence[tuple]) -> Callable[[], object]:
    """The call on the next set of inputs each time; as many results as sets are kept.

    A result that is freed at once gives its memory to the next one, whose writes then meet lines
    that the cache still holds and never has to write back.
    """
    if len(inputs) == 1:
        (only,) = inputs
        return (lambda: call(*only)) if only else call
    sets = itertools.cycle(inputs)
    kept: deque[object] = deque(maxlen=len(inputs))
    return lambda: kept.append(call(*next(sets)))


def captured(
    call: Callable[..., object], inputs: Sequence[tuple], calls: int
) -> Callable[[], object]:
    """So many calls on the sets of inputs in turn as one CUDA graph: kernels without launches.

    Their results, too, lie in different places of the graph's memory.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for args in inputs:
            call(*args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    next_call = in_turn(call, inputs)
    with torch.cuda.graph(graph):
        for _ in range(calls):
            next_call()
    return graph.replay


@contextmanager
def without_garbage_collection() -> Iterator[None]:
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
            mallopt(mmap_threshold, USUAL_HEAP[0])
            mallopt(trim_threshold, USUAL_HEAP[1])


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt if resource else 0
