"""What only a GPU shows: graphs, streams, devices, waiting, memory and very large tensors.

Every public function runs here as a user gets it, on the backend that viops chooses.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator

import contract
import pytest
import torch
import viops
from contract import case_id
from torch import Tensor
from viops.cases import Case

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
two_devices = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="there is one CUDA device, and this takes two"
)

CASES = [case for name in ("prime", "deit", "large") for case in contract.main_cases(name)]
EACH = pytest.mark.parametrize("case", CASES, ids=case_id)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
#: GPU cycles, about a tenth of a second: time enough for the host to run ahead.
LONG = 200_000_000


class Call:
    """Forward and backward of a case on tensors that stay where they are."""

    def __init__(self, case: Case, dtype: torch.dtype, device: str = DEVICE, seed: int = 0) -> None:
        self.case = case
        self.args, self.kwargs = case.inputs(dtype, device, seed)
        with torch.no_grad():
            outputs = contract.as_tuple(contract.public(case)(*self.args, **self.kwargs))
        self.grads = contract.random_like(outputs)

    def __call__(self) -> list[Tensor]:
        """Outputs, and then gradients."""
        function = contract.public(self.case)
        result = contract.run(
            function, self.args, self.kwargs, grad_outputs=lambda outputs: self.grads
        )
        return [*result.outputs, *(grad for grad in result.grads.values() if grad is not None)]

    @property
    def tensors(self) -> list[Tensor]:
        """All that goes in."""
        return [*(arg for arg in self.args if isinstance(arg, Tensor)), *self.grads]

    def take(self, other: Call) -> None:
        """Copies the other call's values into the tensors of this one."""
        for tensor, value in zip(self.tensors, other.tensors, strict=True):
            tensor.copy_(value)

    @property
    def runs_on_torch(self) -> bool:
        """Whether a part of it is torch's own op, whose backward adds in any order."""
        return contract.torch_runs(self.case.op, self.args)


def assert_same(call: Call, results: list[Tensor], expected: list[Tensor]) -> None:
    """The same bits, and what torch's own op takes part in nearly so."""
    exact = {} if call.runs_on_torch else {"rtol": 0, "atol": 0}
    for result, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(result, wanted, **exact)


@pytest.fixture(autouse=True)
def free_memory() -> Iterator[None]:
    """What a test leaves in torch's pool is nothing to the next one."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=case_id)
@EACH
def test_a_kernel_runs_and_not_the_reference(case: Case, dtype: torch.dtype) -> None:
    args, _ = case.inputs(dtype, DEVICE)
    explanation = viops.explain(case.op, *args)
    chosen = {part.op: part.backend for part in (explanation, *explanation.others)}
    assert set(chosen.values()) <= {"cuda", "triton", "torch"}, str(explanation)


@DTYPES
@EACH
def test_a_cuda_graph_replays_on_new_values(case: Case, dtype: torch.dtype) -> None:
    call, other = Call(case, dtype), Call(case, dtype, seed=1)
    expected = other()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    call.take(other)
    for result in results:
        result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_same(call, results, expected)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(call, results, expected)


@DTYPES
@EACH
def test_the_callers_stream(case: Case, dtype: torch.dtype) -> None:
    """The inputs are written late on that stream: a kernel on another one would read old ones."""
    call, other = Call(case, dtype), Call(case, dtype, seed=1)
    expected, stale = other(), call()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        call.take(other)
        results = call()
    stream.synchronize()
    assert_same(call, results, expected)
    assert any(not torch.equal(old, new) for old, new in zip(stale, expected, strict=True))


@EACH
def test_inputs_that_come_on_a_side_stream(case: Case) -> None:
    """As loaders prefetch: copies from pinned memory on one stream, the op on another."""
    calls = [Call(case, torch.float32, seed=seed) for seed in range(4)]
    expected = [call() for call in calls]
    on_host = [[tensor.cpu().pin_memory() for tensor in call.tensors] for call in calls]
    slots = [Call(case, torch.float32, seed=9) for _ in range(2)]
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    torch.cuda.synchronize()
    results = []
    for i, values in enumerate(on_host):
        slot = slots[i % 2]
        side.wait_stream(main)
        with torch.cuda.stream(side):
            torch.cuda._sleep(LONG // 10)
            for tensor, value in zip(slot.tensors, values, strict=True):
                tensor.copy_(value, non_blocking=True)
        main.wait_stream(side)
        results.append(slot())
    torch.cuda.synchronize()
    for call, result, wanted in zip(calls, results, expected, strict=True):
        assert_same(call, result, wanted)


@two_devices
@pytest.mark.parametrize(("current", "device"), [(0, "cuda:1"), (1, "cuda:0")])
@EACH
def test_tensors_of_another_device_than_the_current(case: Case, current: int, device: str) -> None:
    expected = Call(case, torch.float32, f"cuda:{current}")()
    with torch.cuda.device(current):
        results = Call(case, torch.float32, device)()
        assert torch.cuda.current_device() == current
    for result, wanted in zip(results, expected, strict=True):
        assert result.device == torch.device(device)
        torch.testing.assert_close(result.cpu(), wanted.cpu())


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    """torch's own ops raise where they would wait for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@DTYPES
@EACH
def test_the_host_does_not_wait(
    case: Case, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    call = Call(case, dtype)
    for _ in range(3):
        results = call()
    request.getfixturevalue("waiting_is_an_error")
    end = torch.cuda.Event()
    torch.cuda._sleep(LONG)
    results = call()
    end.record()
    assert not end.query(), "the GPU was done when the call returned: it waited"
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert_same(call, results, call())


@DTYPES
@EACH
def test_the_same_bits_in_twenty_runs(case: Case, dtype: torch.dtype) -> None:
    if case.op == "softmax_attention":
        pytest.skip("torch's own op runs, whose backward adds in any order")
    call = Call(case, dtype)
    # of class_attention the scores alone are ours
    ours = slice(1, 2) if case.op == "class_attention" else slice(None)
    first = call()[ours]
    for _ in range(19):
        for result, wanted in zip(call()[ours], first, strict=True):
            torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)


@EACH
def test_memory_does_not_grow(case: Case) -> None:
    call = Call(case, torch.float32)
    for _ in range(3):
        call()
    gc.collect()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    for _ in range(50):
        call()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == held


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=case_id)
def test_the_attention_matrix_is_never_stored(dtype: torch.dtype, backward: bool) -> None:
    batch, num_heads, num_tokens, head_dim = 4, 6, 4097, 64
    shape = (batch, num_tokens, 3, num_heads, head_dim)
    qkv = torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=backward)
    matrix = batch * num_heads * num_tokens**2 * qkv.element_size()

    def run() -> None:
        out, scores = viops.class_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        if backward:
            torch.autograd.grad(out.float().square().sum() + scores.square().sum(), qkv)

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - held
    allowed = matrix // 2 if backward else matrix // 8
    assert 0 < peak < allowed, f"{peak / 2**20:.0f} MB, the matrix is {matrix / 2**20:.0f} MB"


BEYOND_32_BITS = (2800, 1024, 800)  # 2.3e9 elements; element 2**31 is in image 2621
IMAGES = (slice(0, 2), slice(2620, 2623), slice(2798, 2800))


@pytest.fixture
def large_memory() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 45 << 30:
        pytest.skip(f"takes 45 GB of GPU memory; {free >> 30} GB are free")


def assert_slices_match(function, args: tuple[Tensor, ...], grad: Tensor) -> None:
    """The call on everything, forward and backward, gives what calls on some images give.

    Up to the order in which sums are made, which may depend on how many images there are.
    """
    leaves = tuple(a.requires_grad_() if a.is_floating_point() else a for a in args)
    out = contract.as_tuple(function(*leaves))
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(out[0], asked, grad)
    for images in IMAGES:
        some = tuple(a[images].detach().clone().requires_grad_(a.requires_grad) for a in leaves)
        wanted = contract.as_tuple(function(*some))
        wanted_grads = torch.autograd.grad(
            wanted[0], [a for a in some if a.requires_grad], grad[images].clone()
        )
        for whole, part in zip((*out, *grads), (*wanted, *wanted_grads), strict=True):
            limits = {"rtol": 2e-2, "atol": 1e-3} if part.is_floating_point() else {}
            torch.testing.assert_close(whole[images], part, **limits)


@pytest.mark.usefixtures("large_memory")
def test_reorganizing_more_than_32_bits_can_count() -> None:
    batch, num_tokens, channels = BEYOND_32_BITS
    x = torch.randn(BEYOND_32_BITS, device=DEVICE, dtype=torch.bfloat16)
    scores = torch.rand(batch, num_tokens - 1, device=DEVICE)
    grad = torch.randn(batch, 702, channels, device=DEVICE, dtype=torch.bfloat16)
    assert_slices_match(lambda x, s: viops.reorganize_tokens(x, s, 700), (x, scores), grad)


@pytest.mark.usefixtures("large_memory")
def test_restoring_more_than_32_bits_can_count() -> None:
    batch, num_tokens, channels = BEYOND_32_BITS
    tokens = torch.randn(batch, 702, channels, device=DEVICE, dtype=torch.bfloat16)
    index = torch.rand(batch, num_tokens - 1, device=DEVICE).argsort(dim=1)[:, :700]
    grad = torch.randn(BEYOND_32_BITS, device=DEVICE, dtype=torch.bfloat16)
    assert_slices_match(
        lambda t, i: viops.restore_tokens(t, i, num_tokens - 1), (tokens, index), grad
    )


@pytest.mark.usefixtures("large_memory")
def test_scores_of_more_than_32_bits_can_count() -> None:
    batch, num_heads, num_tokens, head_dim = 2800, 4, 1024, 64
    shape = (batch, num_tokens, 3, num_heads, head_dim)
    qkv = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    grad = torch.randn(batch, num_tokens - 1, device=DEVICE)

    def function(qkv: Tensor) -> Tensor:
        q, k, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return viops.class_attention_scores(q, k)

    assert qkv.numel() > 2**31
    assert_slices_match(function, (qkv,), grad)
