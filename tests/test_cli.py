"""`python -m viops`: what info and doctor say, how errors look, and a short demo."""

import argparse
import os
import subprocess
import sys

import PIL.Image
import pytest
import torch
import viops
from viops import catalog, dispatch, native, triton_runtime
from viops.cli import bench, demo, main
from viops.cli.demo_picture import dim_fused
from viops.cli.measure import held_bytes, peak_bytes

PYTHON_M_VIOPS = "import runpy; runpy.run_module('viops', run_name='__main__', alter_sys=True)"


def refuse_import(module: str, reason: str) -> str:
    """Python source after which importing the module raises ImportError, as a broken one does."""
    kind = "ImportError" if "." in module else "ModuleNotFoundError"
    return f"""
import sys
class Refuse:
    def find_spec(name, path=None, target=None):
        if name == {module!r}:
            raise {kind}({reason!r}, name=name)
sys.meta_path.insert(0, Refuse)
"""


def run_viops(*words, before=""):
    """Runs the command line in a process of its own, after some Python source."""
    # one thread: with two, a busy machine makes each wait for the other
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", before + PYTHON_M_VIOPS, *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


BROKEN_EXTENSION = refuse_import("viops._C", "libgomp.so.1: cannot open shared object file")


def test_info_lists_versions_and_every_op(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert viops.__version__ in out
    assert torch.__version__ in out
    assert "CPU level" in out
    assert "OpenMP runtime" in out
    assert "CUDA part" in out
    rows = [line.split() for line in out.splitlines()]
    for family in catalog.FAMILIES:
        for op, lacks in family.ops.items():
            (row,) = [row for row in rows if row and row[0] == op]
            assert row[1] == "yes", "the CPU kernels are there"
            assert row[-1] == "yes", "the reference is always there"
            for backend, reason in lacks.items():
                assert f"{backend}: {reason}" in out


def test_info_without_the_extension():
    done = run_viops("info", before=BROKEN_EXTENSION)
    assert done.returncode == 0
    assert done.stderr == ""
    assert "libgomp.so.1: cannot open shared object file" in done.stdout
    assert "yes" in done.stdout, "the reference is still there"


def test_doctor_finds_nothing_wrong(capsys):
    status = main(["doctor"])
    out = capsys.readouterr().out
    assert status == 0, out
    assert "Nothing is wrong" in out
    rows = [line.split() for line in out.splitlines()]
    for family in catalog.FAMILIES:
        for op in family.ops:
            verdicts = {row[1]: row[2] for row in rows if row[:1] == [op]}
            assert verdicts["cpu"] == "ok:"
            assert verdicts["reference"] == "ok:"


def test_doctor_without_the_extension():
    done = run_viops("doctor", before=BROKEN_EXTENSION)
    assert done.returncode == 1
    assert done.stderr == ""
    assert "libgomp.so.1: cannot open shared object file" in done.stdout
    assert "pip install --force-reinstall" in done.stdout
    assert "reference  ok" in done.stdout


def run_with(variables, *words):
    """`python -m viops` itself, under environment variables."""
    return subprocess.run(
        [sys.executable, "-m", "viops", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def fake_extension(source):
    """Python source after which viops._C is a module with this content."""
    return f"""
import importlib.abc, importlib.util, sys
class Fake(importlib.abc.Loader):
    def find_spec(name, path=None, target=None):
        if name == "viops._C":
            return importlib.util.spec_from_loader(name, Fake())
    def create_module(self, spec):
        return None
    def exec_module(self, module):
        exec({source!r}, module.__dict__)
sys.meta_path.insert(0, Fake)
"""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", "it is from another version of viops, without build_info, cpu_level"),
        ("raise RuntimeError('no such device')", "cannot be loaded: no such device"),
        ("raise AttributeError", "cannot be loaded: AttributeError"),
    ],
)
def test_broken_extension_is_a_finding(source, reason):
    done = run_viops("info", before=fake_extension(source))
    assert (done.returncode, done.stderr) == (0, "")
    assert reason in done.stdout
    done = run_viops("doctor", before=fake_extension(source))
    assert (done.returncode, done.stderr) == (1, "")
    assert reason in done.stdout
    assert "pip install --force-reinstall" in done.stdout


@pytest.mark.parametrize("command", ["info", "doctor"])
def test_unknown_backend_in_the_environment(command):
    done = run_with({"VIOPS_BACKEND": "bad"}, command)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"viops {command}: VIOPS_BACKEND: 'bad' is not a backend")


def test_info_shows_the_environment():
    told = {"VIOPS_BACKEND": "reference", "VIOPS_STRICT": "1", "VIOPS_CPU_LEVEL": "v2"}
    done = run_with(told, "info")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    for name, value in told.items():
        assert [name, value] in rows
    unset = dict.fromkeys(told, "")
    assert run_with(unset, "info").stdout.count("not set: ") == len(told)


def test_doctor_finds_a_forced_backend_that_is_not_there():
    done = run_with({"VIOPS_BACKEND": "cuda"}, "doctor")
    assert done.returncode == 1, done.stderr
    assert "VIOPS_BACKEND=cuda makes every call of" in done.stdout
    assert "unset VIOPS_BACKEND" in done.stdout
    assert "Nothing is wrong" not in done.stdout


def test_doctor_with_a_cpu_level_that_is_none():
    done = run_with({"VIOPS_CPU_LEVEL": "v9"}, "doctor")
    assert done.returncode == 1, done.stderr
    assert "unset VIOPS_CPU_LEVEL, which is 'v9'" in done.stdout
    assert "pip install" not in done.stdout


def replace_kernel(monkeypatch, op, **functions):
    """Puts other functions into the CPU backend of an op."""
    kernels = dispatch._kernels[op]
    monkeypatch.setitem(kernels, "cpu", kernels["cpu"]._replace(**functions))
    monkeypatch.setattr(dispatch, "_choices", {})


def test_doctor_finds_a_wrong_forward(monkeypatch, capsys):
    right = dispatch._kernels["restore_tokens"]["cpu"].forward
    replace_kernel(monkeypatch, "restore_tokens", forward=lambda *args: right(*args) * 1.001)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "Wrong: 1" in out
    assert "restore_tokens, case" in out
    assert "output 0 has relative error 1.0e-03" in out


def test_doctor_finds_a_wrong_backward(monkeypatch, capsys):
    right = dispatch._kernels["restore_tokens"]["cpu"].backward
    replace_kernel(monkeypatch, "restore_tokens", backward=lambda *args: right(*args) * 1.001)
    assert main(["doctor"]) == 1
    assert "gradient 0 has relative error 1.0e-03" in capsys.readouterr().out


def test_doctor_finds_a_kernel_that_raises(monkeypatch, capsys):
    def fail(*args):
        raise RuntimeError("no such instruction")

    replace_kernel(monkeypatch, "restore_tokens", forward=fail)
    assert main(["doctor"]) == 1
    assert "RuntimeError: no such instruction" in capsys.readouterr().out


def assert_user_error(capsys, words, *expected):
    """The command ends with status 2 and one line, which has these texts, on stderr."""
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    for text in expected:
        assert text in lines[0]


def test_demo_without_the_picture(tmp_path, capsys):
    words = ["demo", "--image", str(tmp_path / "none.png"), "--out", str(tmp_path)]
    assert_user_error(capsys, words, "--image", "none.png", "No such file")


def test_demo_with_a_picture_that_is_none(tmp_path, capsys):
    path = tmp_path / "text.png"
    path.write_text("no picture")
    words = ["demo", "--image", str(path), "--out", str(tmp_path)]
    assert_user_error(capsys, words, "--image", "cannot identify image file")


def test_demo_with_an_unwritable_folder(tmp_path, capsys):
    path = tmp_path / "file"
    path.touch()
    words = ["demo", "--out", str(path / "folder")]
    assert_user_error(capsys, words, "--out", "Not a directory")


def test_demo_without_cuda(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_user_error(capsys, ["demo", "--device", "cuda"], "torch sees no CUDA device")


@pytest.mark.parametrize("words", [[], ["no-such-command"], ["info", "more"]])
def test_wrong_usage(words, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(words)
    assert exit_.value.code == 2
    assert "usage: python -m viops" in capsys.readouterr().err


def test_demo_without_an_optional_package():
    done = run_viops("demo", before=refuse_import("sklearn", "No module named 'sklearn'"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "'sklearn'" in done.stderr
    assert "in a checkout, pip install '.[demo]'" in done.stderr
    assert "timm requires torchvision" in done.stderr


def test_demo_runs_the_bench_of_its_op(monkeypatch):
    calls = []
    monkeypatch.setattr(bench, "run", lambda args: calls.append(args) or 0)
    assert demo._run_bench("cpu") == 0
    (args,) = calls
    assert isinstance(args, argparse.Namespace)
    assert args.op == "token_reorganization"
    assert args.quick


def test_short_demo(tmp_path):
    picture = tmp_path / "wide.png"
    PIL.Image.new("RGB", (300, 100), (200, 30, 30)).save(picture)
    out = tmp_path / "pictures"
    done = run_viops("demo", "--quick", "--image", str(picture), "--out", str(out))
    assert done.returncode == 0, done.stderr
    for model in ("ViT as trained", "patched, viops", "patched, plain PyTorch", "DeiT-S patched"):
        assert model in done.stdout
    assert "Backend of the ops: cpu." in done.stdout
    assert "an initialisation in which its class token looks for ink" in done.stdout
    assert "one more epoch, of fine-tuning" in done.stdout
    assert "training: 100%" in done.stderr, "there is a progress bar"
    for name in ("digits.png", "photographs.png"):
        with PIL.Image.open(out / name) as image:
            assert image.width > 1000
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 20


def test_dim_fused_dims_the_dropped_patches_alone():
    images = torch.ones(1, 3, 4, 6)
    mask = torch.tensor([[True, False, True, False, True, True]])  # 2 x 3 patches of 2 x 2
    dimmed = dim_fused(images, mask, shade=0.0)[0, 0]
    bright = mask.reshape(2, 3).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(dimmed == 1, bright)
    assert (dimmed[~bright] < 0.5).all()


def test_peak_bytes_counts_what_is_held_at_once():
    size = 1 << 20

    def run():
        first = torch.empty(size, dtype=torch.uint8)
        second = torch.empty(size, dtype=torch.uint8)
        del first
        third = torch.empty(size // 2, dtype=torch.uint8)
        return second.data_ptr() + third.data_ptr()

    assert size * 2 <= peak_bytes(run, "cpu") <= size * 2 + 4096


def test_held_bytes_counts_what_the_result_keeps_alive():
    size = 1 << 20
    x = torch.ones(size // 4, requires_grad=True)

    def run():
        dropped = torch.empty(3 * size, dtype=torch.uint8)
        return x.exp() + dropped.sum()

    # the sum, and the exponential that waits for backward
    assert size * 2 <= held_bytes(run, "cpu") <= size * 2 + 4096
    assert held_bytes(lambda: torch.empty(size, dtype=torch.uint8).sum(), "cpu") <= 4096
    assert held_bytes(lambda: None, "cpu") == 0


def test_doctor_tells_of_ops_without_a_kernel_on_the_gpu(monkeypatch):
    from viops.cli import doctor

    assert list(doctor._examine_gpu()) == [] or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "cuda_error", lambda: "taken away by the test")
    monkeypatch.setattr(triton_runtime, "INTERPRETED", False)
    monkeypatch.setattr(triton_runtime, "device_error", lambda: "too old")
    found = {problem.what.split()[0]: problem.what for problem in doctor._examine_gpu()}
    with_kernels = {
        op
        for family in catalog.FAMILIES
        for op in family.ops
        if {"cuda", "triton"} & set(catalog.backends_of(op))
    }
    assert set(found) == with_kernels >= {"class_attention_scores", "reorganize_tokens"}
    assert found["reorganize_tokens"].endswith("on the GPU: cuda: taken away by the test")
    assert found["class_attention_scores"].endswith("on the GPU: triton: too old")
