"""The host executor: planted bugs are caught by the builds that should; valid kernels pass."""

from __future__ import annotations

import re
import subprocess

import pytest
from cuda_on_host import builds

#: In which order the threads run, of the plain build.
ORDERS = ("forward", "reverse", "random")
WRONG_RESULT, ERROR = 3, 4  # exit statuses of `planted`

#: Each bug: what the executor says wherever the program runs (or None), the orders of the plain
#: build that see it otherwise, and what each sanitizer says (or None where it cannot see it).
BUGS = {
    "shared_overrun": (None, (), r"out of bounds|heap-buffer-overflow", None),
    "dynamic_shared_overrun": (None, (), r"heap-buffer-overflow", None),
    "global_overrun": (None, (), r"heap-buffer-overflow", None),
    "misaligned_vector_load": (None, None, r"misaligned address", None),
    "missing_barrier": (None, ORDERS, None, r"data race"),
    "missing_barrier_that_forward_order_hides": (None, ("reverse", "random"), None, r"data race"),
    "warp_barrier_for_a_block_barrier": (None, ORDERS, None, r"data race"),
    "race_between_blocks": (None, (), None, r"data race"),
    "uninitialised_shared_memory": (None, ORDERS, None, None),
    "copy_not_waited_for": (None, ORDERS, None, None),
    "divergent_barrier": (r"divergent barrier: thread", (), None, None),
    "early_return": (r"thread \(5, 0, 0\) left the kernel, while others wait", (), None, None),
    "wrong_mask": (r"__shfl_sync with mask 0xffffffff: lane 16 does not come", (), None, None),
    "mask_without_the_caller": (r"the mask 0x0000ffff lacks the calling lane", (), None, None),
    "inactive_lane": (r"__shfl_sync: reads from an inactive lane", (), None, None),
    "two_exchanges_meet": (
        r"lane \d+ does not come; it waits in __(any|ballot)_sync",
        (),
        None,
        None,
    ),
    "too_much_shared_memory": (r"more static and dynamic shared memory", (), None, None),
}
VALID = (
    "valid_permutation",
    "valid_reduction",
    "valid_sort",
    "valid_part_of_warps",
    "valid_warp_barriers",
    "valid_last_block",
)


@pytest.fixture
def thread_sanitizer() -> None:
    """Skips where the machine cannot run it; `make sanitize` fails there."""
    if builds.lacks("thread"):
        pytest.skip(f"ThreadSanitizer: {builds.lacks('thread')}")


def run(kind: str, name: str, order: str = "forward", seed: int = 0) -> subprocess.CompletedProcess:
    program = str(builds.folder(kind) / "planted")
    environment = builds.environment(kind)
    environment.pop("LD_PRELOAD", None)  # the program is linked with the runtime
    return subprocess.run(
        builds.command(kind, program, *([name, order, str(seed)] if name else [])),
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def test_every_program_is_in_a_table() -> None:
    assert sorted(run("plain", "").stdout.split()) == sorted((*BUGS, *VALID))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", BUGS)
def test_bug_in_the_plain_build(name: str, order: str) -> None:
    said, orders, _, _ = BUGS[name]
    done = run("plain", name, order)
    if said is not None:
        assert done.returncode == ERROR, done.stderr
        assert re.search(said, done.stderr)
        where = (
            r"at \S+planted\.cu:\d+, block \(0, 0, 0\), thread \(\d+, 0, 0\), launched at \S+:\d+"
        )
        assert re.search(where, done.stderr), done.stderr
    elif orders is None:  # what the processor makes of it is its own affair
        assert done.returncode != ERROR
    else:
        assert done.returncode == (WRONG_RESULT if order in orders else 0), done.stderr


@pytest.mark.parametrize("name", BUGS)
def test_bug_under_address_sanitizer(name: str) -> None:
    said, orders, sanitizer, _ = BUGS[name]
    done = run("address", name)
    if sanitizer is not None:
        assert done.returncode not in (0, WRONG_RESULT, ERROR), done.stderr
        assert re.search(sanitizer, done.stderr), done.stderr
    else:
        expected = ERROR if said else WRONG_RESULT if "forward" in (orders or ()) else 0
        assert done.returncode == expected, done.stderr


@pytest.mark.parametrize("name", BUGS)
def test_bug_under_thread_sanitizer(name: str, thread_sanitizer: None) -> None:
    said, orders, _, sanitizer = BUGS[name]
    if orders is None:
        pytest.skip("the processor faults on it")
    done = run("thread", name)
    if sanitizer is not None:
        assert done.returncode not in (0, WRONG_RESULT, ERROR), done.stderr
        assert re.search(sanitizer, done.stderr), done.stderr
    else:
        expected = ERROR if said else WRONG_RESULT if "forward" in orders else 0
        assert done.returncode == expected, done.stderr


def test_every_bug_is_caught() -> None:
    for name, (said, orders, address, thread) in BUGS.items():
        assert said or orders or address or thread, name


@pytest.mark.parametrize("kind", ["plain", "address"])
@pytest.mark.parametrize("name", VALID)
def test_valid_kernels_pass(name: str, kind: str) -> None:
    for order, seed in (("forward", 0), ("reverse", 0), ("random", 1), ("random", 2)):
        done = run(kind, name, order, seed)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""


@pytest.mark.parametrize("name", VALID)
def test_valid_kernels_have_no_race(name: str, thread_sanitizer: None) -> None:
    done = run("thread", name)  # which sees races in any order
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_emulation_gives_what_it_gave() -> None:
    """The program whose output `make gpu` compares with a GPU's: it runs, and is deterministic."""
    outputs = [
        subprocess.run(
            builds.folder(kind) / "intrinsics", capture_output=True, text=True, check=True
        )
        for kind in ("plain", "address")
    ]
    assert outputs[0].stdout == outputs[1].stdout
    names = {line.split()[0] for line in outputs[0].stdout.splitlines()}
    assert {"shuffles", "votes", "mma.f16", "mma.bf16", "ldmatrix", "cp.async"} <= names
    assert {"mma.s8", "mma.u8", "mma.u8.s8", "mma.s8.u8"} <= names


UNSUPPORTED = {
    "cooperative groups": "#include <cooperative_groups.h>",
    "cub": "#include <cub/cub.cuh>",
    "cuda::barrier and TMA": "#include <cuda/barrier>",
    "nvcuda::wmma": "#include <mma.h>",
    r"inline PTX \(wgmma, TMA": '__global__ void f() { asm("wgmma.fence.sync.aligned;"); }',
    r"TMA \(CUtensorMap\)": "__global__ void f(const CUtensorMap map) {}",
    "a cluster of thread blocks": "__global__ void __cluster_dims__(2, 1, 1) f() {}",
    "__activemask": "unsigned f() { return __activemask(); }",
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_is_unsupported_fails_to_compile_and_says_so(what: str, tmp_path) -> None:
    source = tmp_path / "source.cu"
    source.write_text(f'#include "common/cuda.cuh"\n{UNSUPPORTED[what]}\n')
    here = builds.ROOT / "tests/cuda_on_host"
    include = (f"-I{builds.ROOT / 'csrc'}", f"-I{here}", f"-I{here / 'unsupported'}")
    done = subprocess.run(
        (
            builds._compiler(),
            "-std=c++20",
            "-O1",
            "-xc++",
            "-c",
            *include,
            source,
            "-o",
            "/dev/null",
        ),
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert re.search(rf"{what}.*is not supported|{what}.*: not supported", done.stderr), done.stderr
