"""Which backend runs a call, how one is forced, and that none is changed in silence."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import viops
from torch import Tensor
from viops import catalog, dispatch, native
from viops.dispatch import Kernels

OP = "reorganize_tokens"


@pytest.fixture
def arguments() -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 9, 4, generator=generator)
    return x, torch.rand(2, 8, generator=generator), 3


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The backends whose kernels ran OP, in order; each runs the reference underneath."""
    ran: list[str] = []
    reference = dispatch._kernels[OP]["reference"]

    def watched(backend: str, refuses) -> Kernels:
        def forward(*args: object) -> object:
            ran.append(backend)
            return reference.forward(*args)

        def backward(*args: object) -> object:
            ran.append(f"{backend} backward")
            return reference.backward(*args)

        return Kernels(forward, backward, refuses)

    kernels = {name: watched(name, k.refuses) for name, k in dispatch._kernels[OP].items()}
    monkeypatch.setitem(dispatch._kernels, OP, kernels)
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    return ran


@pytest.fixture
def no_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "extension", None)
    monkeypatch.setattr(native, "load_error", "viops._C cannot be loaded: the test took it")
    monkeypatch.setattr(dispatch, "_choices", {})
    monkeypatch.setattr(dispatch, "_warned", set())


def test_the_kernel_is_preferred_to_the_reference(arguments: tuple, calls: list[str]) -> None:
    viops.reorganize_tokens(*arguments)
    assert calls == ["cpu"]
    assert dispatch.choose(OP, "cpu", torch.float32)[0] == "cpu"


def test_backward_runs_where_forward_did(arguments: tuple, calls: list[str]) -> None:
    x, scores, keep = arguments
    tokens, _ = viops.reorganize_tokens(x.requires_grad_(), scores, keep)
    tokens.sum().backward()
    assert calls == ["cpu", "cpu backward"]


def test_registered_op_runs_the_same_backend(arguments: tuple, calls: list[str]) -> None:
    torch.ops.viops.reorganize_tokens(*arguments, 1, True)
    with viops.use_backend("reference"):
        torch.ops.viops.reorganize_tokens(*arguments, 1, True)
    assert calls == ["cpu", "reference"]


def test_use_backend_forces_and_restores(arguments: tuple, calls: list[str]) -> None:
    with viops.use_backend("reference"):
        with viops.use_backend("cpu"):
            viops.reorganize_tokens(*arguments)
        assert dispatch.is_reference_forced()
    assert not dispatch.is_reference_forced()
    viops.reorganize_tokens(*arguments)
    assert calls == ["cpu", "cpu"]


def test_use_backend_ends_with_an_exception() -> None:
    def leave() -> None:
        with viops.use_backend("reference"):
            raise KeyError

    with pytest.raises(KeyError):
        leave()
    assert not dispatch.is_reference_forced()


def test_use_backend_holds_on_other_threads(arguments: tuple, calls: list[str]) -> None:
    seen = []
    with viops.use_backend("reference"):
        thread = threading.Thread(
            target=lambda: seen.append(dispatch.choose(OP, "cpu", torch.float32)[0])
        )
        thread.start()
        thread.join()
    assert seen == ["reference"]


def test_compiled_code_honours_use_backend(arguments: tuple, calls: list[str]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(viops.reorganize_tokens, fullgraph=True, backend="aot_eager")
    compiled(*arguments)
    assert calls == ["cpu"]
    with viops.use_backend("reference"):
        compiled(*arguments)
    assert calls[1:] in (["reference"], [])  # the registered op, or plain PyTorch compiled anew
    torch._dynamo.reset()


def test_a_forced_backend_that_cannot_run_raises(arguments: tuple, no_extension: None) -> None:
    with (
        viops.use_backend("cpu"),
        pytest.raises(
            viops.BackendError, match=r"'cpu' was asked for, but viops._C cannot be loaded"
        ),
    ):
        viops.reorganize_tokens(*arguments)


@pytest.mark.parametrize("backend", sorted(set(catalog.BACKENDS) - {"cpu", "reference"}))
def test_a_forced_backend_that_is_not_written_raises(arguments: tuple, backend: str) -> None:
    lacks = catalog.lacks_of(OP)
    if backend not in lacks:
        pytest.skip(f"{OP} has {backend}")
    reason = re.escape(lacks[backend])
    with viops.use_backend(backend), pytest.raises(viops.BackendError, match=reason):
        viops.reorganize_tokens(*arguments)


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match=r"^name: 'gpu' is not a backend; there are: .*cuda"):
        viops.use_backend("gpu").__enter__()


def test_a_fallback_warns_once_with_the_reason(arguments: tuple, no_extension: None) -> None:
    with pytest.warns(
        RuntimeWarning, match=rf"{OP} runs on the reference.*the test took it"
    ) as got:
        viops.reorganize_tokens(*arguments)
    assert len(got) == 1
    assert got[0].filename == __file__  # the line that made the call
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        viops.reorganize_tokens(*arguments)


def test_strict_makes_a_fallback_an_error(
    arguments: tuple, no_extension: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIOPS_STRICT", "1")
    for _ in range(2):
        with pytest.raises(viops.BackendError, match=r"the test took it.*VIOPS_STRICT"):
            viops.reorganize_tokens(*arguments)
    with viops.use_backend("reference"):  # asked for, so no fallback
        viops.reorganize_tokens(*arguments)
    for off in ("0", ""):
        monkeypatch.setenv("VIOPS_STRICT", off)
        assert not dispatch.strict()


@pytest.mark.filterwarnings("ignore:.*the test took it:RuntimeWarning")
def test_strict_holds_after_a_fallback_that_was_allowed(
    arguments: tuple, no_extension: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    viops.reorganize_tokens(*arguments)
    monkeypatch.setenv("VIOPS_STRICT", "1")
    with pytest.raises(viops.BackendError, match="VIOPS_STRICT"):
        viops.reorganize_tokens(*arguments)


def test_explain(arguments: tuple) -> None:
    explanation = viops.explain(OP, *arguments)
    assert explanation.backend == "cpu"
    assert set(explanation.reasons) == set(catalog.BACKENDS) - {"cpu"}
    assert explanation.reasons["reference"] == "cpu is preferred"
    text = str(explanation)
    assert text.startswith(f"{OP}: cpu runs this call\n")
    assert "not reference: cpu is preferred" in text


def test_explain_under_use_backend(arguments: tuple) -> None:
    with viops.use_backend("reference"):
        explanation = viops.explain(OP, *arguments)
    assert explanation.backend == "reference"
    assert explanation.reasons["cpu"] == "backend 'reference' is forced"


def test_explain_without_extension(arguments: tuple, no_extension: None) -> None:
    explanation = viops.explain(OP, *arguments)
    assert explanation.backend == "reference"
    assert "the test took it" in explanation.reasons["cpu"]


def test_explain_a_call_that_nothing_runs(arguments: tuple) -> None:
    explanation = viops.explain(OP, arguments[0].long(), *arguments[1:])
    assert explanation.backend is None
    assert "torch.int64" in explanation.reasons["cpu"]
    assert str(explanation).startswith(f"{OP}: no backend runs this call")


def test_explain_every_public_function(arguments: tuple) -> None:
    x = arguments[0]
    for op in ("class_attention", *(op for f in catalog.FAMILIES for op in f.ops)):
        assert viops.explain(op, x).backend == "cpu"


def test_explain_bad_input(arguments: tuple) -> None:
    with pytest.raises(ValueError, match=r"^op: 'attention' is not an op"):
        viops.explain("attention", *arguments)
    with pytest.raises(TypeError, match=r"^args: there is no tensor"):
        viops.explain(OP, 1, 2)


def test_explain_runs_nothing(arguments: tuple, calls: list[str]) -> None:
    viops.explain(OP, *arguments)
    assert calls == []


def run_python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "default", "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_environment_forces_a_backend(tmp_path: Path) -> None:
    code = (
        "import torch, viops\n"
        "print(viops.explain('reorganize_tokens', torch.ones(1, 3, 1)).backend)"
    )
    result = run_python(code, tmp_path, VIOPS_BACKEND="reference")
    assert result.stdout == "reference\n", result.stderr
    result = run_python(code, tmp_path, VIOPS_BACKEND="gpu")
    assert result.returncode != 0
    assert "VIOPS_BACKEND: 'gpu' is not a backend" in result.stderr


def test_negative_view(arguments: tuple) -> None:
    """A tensor whose sign torch flips lazily: its memory does not hold its values."""
    x, scores, keep = arguments
    lazy = torch.complex(x, x).conj().imag
    assert lazy.is_neg()
    tokens, index = viops.reorganize_tokens(lazy, scores, keep)
    expected, places = viops.reorganize_tokens(-x, scores, keep)
    assert torch.equal(tokens, expected)
    assert torch.equal(index, places)


def test_tensor_subclass(arguments: tuple) -> None:
    class Tagged(Tensor):
        pass

    x, scores, keep = arguments
    tokens, _ = viops.reorganize_tokens(x.as_subclass(Tagged), scores, keep)
    assert type(tokens) is Tagged
    assert torch.equal(tokens.as_subclass(Tensor), viops.reorganize_tokens(*arguments)[0])


def test_parameter_as_input(arguments: tuple) -> None:
    x, scores, keep = arguments
    tokens, _ = viops.reorganize_tokens(torch.nn.Parameter(x), scores, keep)
    assert type(tokens) is Tensor
    assert tokens.requires_grad


def test_shapes_alone(arguments: tuple) -> None:
    """On the meta device, and under FakeTensorMode, results have their shapes and no data."""
    x, scores, keep = arguments
    with torch._subclasses.FakeTensorMode() as mode:
        tokens, index = viops.reorganize_tokens(mode.from_tensor(x), mode.from_tensor(scores), keep)
    assert tokens.shape == (2, 5, 4)
    assert index.shape == (2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens, index = viops.reorganize_tokens(x.to("meta"), scores.to("meta"), keep)
    assert tokens.device.type == index.device.type == "meta"
    assert tokens.shape == (2, 5, 4)
