"""The harness of the benches and `python -m viops bench`, on ops that take next to no time."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from viops.cli import main

pytest.importorskip("pytest_benchmark", reason="the benches are built on pytest-benchmark")

ROOT = Path(__file__).resolve().parents[1]
BENCHES = ROOT / "benches"

TRIVIAL_BENCH = """
import torch
from harness import Floor

def sleep(milliseconds):
    import time
    time.sleep(milliseconds * 1e-3)
    return torch.zeros(2)

def failing():
    raise RuntimeError("no compiler here")

def bench_sleep(harness):
    harness.compare(
        "sleep, some milliseconds",
        {
            "viops": lambda: sleep(4),
            "eager": lambda: sleep(12),
            "compile": failing,
            "half": lambda: sleep(2),
        },
        floor=Floor(bytes=1 << 20),
        bars={
            "cpu": {
                "eager": (">=", 1.5),
                "half": ("<=", 1.1),
                "compile": (">=", 1),
                "viops": ("<=", 1),
            },
            "cuda": {"eager": (">=", 1000)},
        },
    )
"""


sys.path.insert(0, str(BENCHES))
import harness as harness_module  # noqa: E402
import tables  # noqa: E402


class FakeBenchmark:
    """pytest-benchmark's fixture as far as the harness uses it."""

    def __init__(self) -> None:
        self.extra_info = {}

    def pedantic(self, target, args=(), setup=lambda: None, rounds=1):
        for _ in range(rounds):
            setup()
            target(*args)


def make_harness(**options):
    return harness_module.Harness(FakeBenchmark(), op="trivial", seconds=0.01, **options)


@pytest.fixture
def run_bench(capfd: pytest.CaptureFixture):
    """Runs `python -m viops bench`: the exit status, and what stands on stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        status = main(["bench", *words])
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the harness and one trivial bench."""
    for name in ("harness.py", "sampling.py", "tables.py", "conftest.py", "pytest.ini"):
        shutil.copy(BENCHES / name, tmp_path / name)
    (tmp_path / "bench_trivial.py").write_text(TRIVIAL_BENCH)
    return tmp_path


def test_record_holds_ratios_floor_and_bars():
    data = torch.ones(1 << 16)
    harness = make_harness(min_rounds=6)
    record = harness.compare(
        "copy",
        {"viops": lambda: data + 1, "eager": lambda: [data + 1 for _ in range(20)].pop()},
        floor=harness_module.Floor(bytes=2 << 18, flops=1000),
        bars={"cpu": {"eager": (">=", 2), "floor": ("<=", 1e-9)}},
    )
    assert record["rounds"] >= 6
    assert set(record["contenders"]) == {"viops", "eager"}
    best = {name: row["best"] for name, row in record["contenders"].items()}
    assert record["ratios"]["eager"] == best["eager"] / best["viops"] > 2
    assert record["ratios"]["floor"] == record["floor"]["best"] / best["viops"]
    assert all(row["best"] <= row["median"] for row in record["contenders"].values())
    met = {bar["against"]: bar["met"] for bar in record["bars"]}
    assert met == {"eager": True, "floor": False}
    assert record["bars"][1]["measured"] == pytest.approx(best["viops"] / record["floor"]["best"])


def test_numbers_that_are_no_times():
    numbers = {"viops": 2e-6, "official form": 8e-6, "stored": 1e-6}
    harness = make_harness()
    record = harness.compare_numbers(
        "drift",
        {name: lambda number=number: number for name, number in numbers.items()},
        what="relative error",
        unit="",
        bars={
            "cpu": {"viops": ("<=", 1e-5), "official form": (">=", 5), "stored": ("<=", 2.5)},
            "cuda": {"viops": ("<=", 0)},
        },
        notes={"columns": "8"},
    )
    assert {name: row["best"] for name, row in record["contenders"].items()} == numbers
    assert record["ratios"] == pytest.approx({"official form": 4, "stored": 0.5})
    assert [bar["met"] for bar in record["bars"]] == [True, False, True]
    assert [bar["measured"] for bar in record["bars"]] == pytest.approx([2e-6, 4, 2])
    lines = tables.format_record(record).splitlines()
    assert lines[2].split() == "viops 2e-06 at most 1e-05: met".split()
    assert lines[3].split() == "official form 8e-06 4.00 x less at least 5 x: MISSED".split()
    assert lines[4].split() == "stored 1e-06 2.00 x that at most 2.5 x: met".split()
    assert lines[5:] == ["  relative error", "  columns: 8"]
    with pytest.raises(ValueError, match="eager: expected a number above 0 to compare, got 0"):
        harness.compare_numbers("none", {"viops": lambda: 1, "eager": lambda: 0}, what="", unit="")


def test_floor_is_the_longer_of_moving_and_computing():
    samples = {
        "copy": [harness_module.Sample(0.002, 0), harness_module.Sample(0.001, 0)],
        "matrix product": [harness_module.Sample(0.5, 0)],
    }
    matrix_flops = 2 * 1024**3
    for flops, best in ((matrix_flops // 1000, 0.001), (matrix_flops // 100, 0.005)):
        floor = harness_module.Floor(bytes=1 << 20, flops=flops)
        summary = harness_module._floor_summary(floor, samples, "cpu")
        assert summary["best"] == pytest.approx(best, rel=1e-4)
        assert summary["bytes_per_second"] == pytest.approx((1 << 20) / 0.001)
        assert summary["flops_per_second"] == pytest.approx(matrix_flops / 0.5)


def test_contenders_are_interleaved_in_changing_order():
    calls = []
    contenders = {name: (lambda name=name: calls.append(name)) for name in ("viops", *"abcd")}
    rounds = make_harness(min_rounds=4).compare("order", contenders, patience=3)["rounds"]
    assert rounds > 3 * 4
    timed = calls[-5 * rounds :]
    orders = [tuple(timed[start : start + 5]) for start in range(0, len(timed), 5)]
    assert all(sorted(order) == sorted(contenders) for order in orders)
    assert len(set(orders)) > 1


def test_calls_of_one_sample_are_divided_out():
    count = []
    harness = make_harness(min_rounds=2)
    record = harness.compare("loop", {"viops": lambda: count.append(1)}, calls=1000)
    assert len(count) >= 2000
    assert record["contenders"]["viops"]["best"] < 1e-4


def test_contender_with_another_result_is_refused():
    def contenders(value):
        return {"viops": lambda: torch.ones(3), "eager": lambda: torch.tensor(value)}

    with pytest.raises(AssertionError, match="eager: result 0 differs"):
        make_harness().compare("wrong", contenders([1.0, 1.0, 1.01]))
    with pytest.raises(AssertionError, match="eager: result 0 differs"):
        make_harness().compare("NaN", contenders([1.0, 1.0, float("nan")]))
    with pytest.raises(AssertionError, match="eager: shapes differ"):
        make_harness().compare("shape", contenders([1.0]))
    make_harness().compare("named so", contenders([5.0, 5.0, 5.0]), other_result=("eager",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"contenders": {"eager": int}}, "contenders: expected"),
        ({"bars": {"cpu": {"egaer": (">=", 2)}}}, "bars: 'egaer' is not a contender"),
        ({"bars": {"cpu": {"floor": ("<=", 2)}}}, "bars: 'floor' is not a contender"),
        ({"bars": {"cpu": {"eager": (">", 2)}}}, 'bars: expected "<=" or ">="'),
        ({"other_result": ("sdpa",)}, "other_result: 'sdpa'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    defaults = {"contenders": {"viops": int, "eager": int}}
    with pytest.raises(ValueError, match=message):
        make_harness().compare("bad", **{**defaults, **arguments})


def test_calls_take_the_sets_of_inputs_in_turn():
    seen = []
    harness = make_harness(min_rounds=2)
    sets = [(torch.full((2,), float(i)), i) for i in range(3)]
    record = harness.compare(
        "sets",
        {"viops": lambda x, i: seen.append(i), "eager": lambda x, i: None},
        inputs=sets,
        calls=6,
    )
    rounds = record["rounds"]
    assert seen[-6 * rounds :] == [0, 1, 2] * 2 * rounds
    assert (record["input_sets"], record["input_bytes"]) == (3, 24)
    assert make_harness().input_sets(lambda seed: (seed,)) == [(0,)]


def test_cold_inputs_are_more_than_a_cache_holds_and_the_copies_as_many(
    monkeypatch: pytest.MonkeyPatch,
):
    harness = make_harness()
    sets = harness.input_sets(lambda seed: (torch.full((1 << 20,), float(seed)),), cold=True)
    cache = harness_module._last_cache_bytes(torch.device("cpu"))
    assert sum(x.nbytes for (x,) in sets) >= 4 * cache or len(sets) == 32
    assert [x[0].item() for (x,) in sets] == list(range(len(sets)))
    copied = []
    monkeypatch.setattr(harness_module, "in_turn", lambda call, pairs: lambda: copied.append(pairs))
    timed = harness._floor_contenders(harness_module.Floor(bytes=64), 1, len(sets))
    timed["copy"].run()
    places = [tensor.data_ptr() for pair in copied[0] for tensor in pair]
    assert len(set(places)) == len(places) == 2 * len(sets)


def test_float32_beside_bfloat16_is_compared_as_bfloat16():
    def contenders(*dtypes):
        exact = [torch.ones(3, dtype=dtype) for dtype in dtypes]
        return {"viops": lambda: exact, "eager": lambda: [exact[0], exact[1] * 1.004]}

    make_harness().compare("rounded", contenders(torch.bfloat16, torch.float32))
    with pytest.raises(AssertionError, match="eager: result 1 differs"):
        make_harness().compare("wrong", contenders(torch.float32, torch.float32))


def test_benches_of_the_other_device_are_left_out(folder: Path, run_bench):
    (folder / "bench_trivial.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('dtype', ['here', pytest.param('there', marks="
        "pytest.mark.device('cuda'))])\n"
        "def bench_one(harness, dtype):\n"
        "    harness.compare(dtype, {'viops': int})\n"
    )
    status, out, err = run_bench("--benches", str(folder), "--quick")
    assert status == 0, out + err
    assert "1 passed, 1 deselected" in out


def test_results_are_named_after_the_gpu_or_the_processor(tmp_path: Path):
    from viops.cli.bench import _inside

    machine = {"cpu": {"brand_raw": "AMD EPYC", "count": 2}}
    assert _inside(tmp_path, {"machine_info": machine}, ".json").name == "amd-epyc-2-cores.json"
    machine["gpu"] = "NVIDIA H100 80GB HBM3"
    assert _inside(tmp_path, {"machine_info": machine}, ".png").name == "nvidia-h100-80gb-hbm3.png"
    assert _inside(tmp_path / "a.json", {}, ".json") == tmp_path / "a.json"


def test_only_viops_leaves_the_others_out():
    contenders = {"viops": int, "eager": lambda: pytest.fail("was run")}
    harness = make_harness(only_viops=True)
    record = harness.compare("one", contenders, bars={"cpu": {"eager": (">=", 2)}})
    assert set(record["contenders"]) == {"viops"}
    assert record["bars"] == []


def test_table_says_what_is_missed_and_what_failed():
    record = {
        "title": "double",
        "rounds": 9,
        "malloc": "usual",
        "contenders": {
            "viops": {"best": 2e-3, "median": 2.5e-3, "page_faults": 0},
            "eager": {"best": 6e-3, "median": 7e-3, "page_faults": 12},
            "lean": {"best": 1e-3, "median": 1e-3, "page_faults": 0},
            "compile": {"error": "RuntimeError: no compiler"},
        },
        "floor": {"best": 1e-3, "median": 1e-3, "bytes": 10**6, "bytes_per_second": 1e9},
        "ratios": {"eager": 3.0, "lean": 0.5, "floor": 0.5},
        "bars": [],
        "notes": {"images/s": "7"},
    }
    for name, bar in (("floor", ("<=", 1.4)), ("eager", (">=", 2)), ("compile", (">=", 1))):
        record["bars"].append(harness_module._judge(name, bar, record))
    lines = [" ".join(line.split()) for line in tables.format_record(record).splitlines()]
    assert "floor 1 ms 1 ms 2.00 x its time at most 1.4 x: MISSED" in lines
    assert "eager 6 ms 7 ms 12 3.00 x faster at least 2 x: met" in lines
    assert "lean 1 ms 1 ms 0 2.00 x its time" in lines
    assert "compile failed at least 1 x: MISSED" in lines
    assert "compile failed: RuntimeError: no compiler" in lines
    assert "images/s: 7" in lines
    bars = tables.format_bars([record]).splitlines()
    assert "double, floor: 2.00 x, at most 1.4 x: MISSED" in bars
    assert "double, compile: not measured, at least 1 x: MISSED" in bars


def test_bench_command_prints_writes_draws_and_checks(folder: Path, run_bench):
    json_file, plot = folder / "out" / "results.json", folder / "ratios.png"
    words = ("--benches", str(folder), "--quick", "--json", str(json_file), "--plot", str(plot))
    status, out, err = run_bench(*words, "--check")
    assert status == 1, out + err
    assert re.search(r"some milliseconds, half: [12]\.\d+ x, at most 1.1 x: MISSED", out)
    assert re.search(r"some milliseconds, eager: \d\.\d+ x, at least 1.5 x: met", out)
    assert "compile failed: RuntimeError: no compiler here" in out
    assert "2 of the bars missed" in err
    assert plot.read_bytes().startswith(b"\x89PNG")

    report = json.loads(json_file.read_text())
    assert "node" not in report["machine_info"]
    (benchmark,) = report["benchmarks"]
    record = benchmark["extra_info"]
    assert record["op"] == "trivial"
    assert record["threads"] == min(2, os.cpu_count())
    # pytest-benchmark's own statistics are those of viops
    assert benchmark["stats"]["min"] == pytest.approx(
        record["contenders"]["viops"]["best"], rel=0.2
    )
    assert 1.5 <= record["ratios"]["eager"] < 4
    assert record["floor"]["best"] > 0
    met = {bar["against"]: bar["met"] for bar in record["bars"]}
    assert met == {"eager": True, "half": False, "compile": False, "viops": True}


def test_bench_command_succeeds_with_missed_bars_and_fails_with_errors(folder: Path, run_bench):
    status, out, err = run_bench("--benches", str(folder), "--quick", "--op", "trivial")
    assert status == 0, out + err
    assert "MISSED" in out
    (folder / "bench_trivial.py").write_text("def bench_broken(harness):\n    assert 1 == 2\n")
    status, out, _ = run_bench("--benches", str(folder), "--quick")
    assert status == 1
    assert "assert 1 == 2" in out


SLOW_BENCH = """
import pathlib, time
import pytest

@pytest.mark.full
def bench_slow(harness):
    calls = []

    def slow():
        calls.append(1)
        if len(calls) > 7:  # amid its rounds
            pathlib.Path(__file__).with_name("started").touch()
            time.sleep(100)

    harness.compare("slow", {"viops": slow})

"""


@pytest.mark.parametrize("interrupt", [os.kill, os.killpg], ids=["command", "terminal"])
def test_an_interrupted_run_keeps_what_it_has(folder: Path, interrupt):
    """A terminal interrupts the benches' process, too; the slow bench stands first in its file."""
    (folder / "bench_trivial.py").write_text(SLOW_BENCH + TRIVIAL_BENCH)
    report, plot = folder / "report.json", folder / "plot.png"
    words = ["--benches", str(folder), "--json", str(report), "--plot", str(plot)]
    process = subprocess.Popen(
        [sys.executable, "-m", "viops", "bench", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / "started").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        interrupt(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, out + err
    assert "interrupted after 1 benches" in err
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    assert benchmark["extra_info"]["title"] == "sleep, some milliseconds"
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert re.search(r"= bars =.*^sleep, some milliseconds, eager: .*: met$", out, re.M | re.S)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--op", "no_such_op"), "--op: 'no_such_op' has no bench; there are: batch_"),
        (("--base", "main", "--check"), "--check: is of no use with --base"),
        (("--threads", "0"), "--threads: expected at least 1, got 0"),
        (("--plot", "ratios.xyz"), "--plot ratios.xyz: expected a name that ends with one of"),
        (("--plot", f"{__file__}/ratios.png"), "give a file to write to"),
        (("--json", f"{__file__}/results.json"), "give a file to write to"),
        (("--device", "cuda"), "--device cuda: torch sees no CUDA device"),
        (("--device", "no such"), "--device: expected cpu or cuda, got 'no such'"),
        (("--device", "meta"), "--device: expected cpu or cuda, got 'meta'"),
    ],
)
def test_bench_command_names_a_bad_option(words, message, run_bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = run_bench("--benches", str(BENCHES), *words)
    assert status == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert message in err


def test_folder_without_benches_is_named(tmp_path: Path, run_bench):
    status, _, err = run_bench("--benches", str(tmp_path))
    assert status == 2
    assert f"no benches (harness.py) in {tmp_path}" in err


def test_base_must_be_a_commit(folder: Path, run_bench):
    status, _, err = run_bench("--benches", str(folder), "--base", "HEAD")
    assert status == 2
    assert "--base needs a git checkout" in err
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    status, _, err = run_bench("--benches", str(folder), "--base", "HEAD")
    assert status == 2
    assert "--base needs a checkout of viops" in err
    for part in ("python/viops", "csrc"):
        (folder / part).mkdir(parents=True)
    status, _, err = run_bench("--benches", str(folder), "--base", "no-such-revision")
    assert status == 2
    assert "--base: 'no-such-revision' is not a commit of" in err


@pytest.fixture
def checkout(folder: Path) -> Path:
    """A git repository that looks like a checkout; its build writes `started` and then hangs."""
    for part in ("python/viops", "csrc"):
        (folder / part).mkdir(parents=True)
        (folder / part / "file").touch()
    (folder / "setup.py").write_text(
        f"import pathlib, time\npathlib.Path({str(folder / 'started')!r}).touch()\ntime.sleep(60)\n"
    )
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], cwd=folder, check=True)
    return folder


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted_base_leaves_nothing_behind(checkout: Path, number, status):
    temporary = checkout / "temporary"
    temporary.mkdir()
    words = ["bench", "--benches", str(checkout), "--base", "HEAD"]
    process = subprocess.Popen(
        [sys.executable, "-m", "viops", *words],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 60
        while not (checkout / "started").exists() and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.05)
        (source,) = temporary.glob("*/source")
        assert (source / "csrc/file").is_file(), "the commit's files are there"
        process.send_signal(number)
        assert process.wait(timeout=30) == status
    finally:
        process.kill()
    assert not list(temporary.glob("*/source"))
    assert not (checkout / ".git/worktrees").exists()


def test_short_rounds_are_repeated_more_often():
    harness = make_harness(min_rounds=3)
    assert harness._num_rounds(0.19) == 9
    assert harness._num_rounds(0.21) == 3
    assert make_harness(min_rounds=12)._num_rounds(0.19) == 12


def test_faster_than_the_floor_is_remarked():
    floor = {"bytes": 10**6, "bytes_per_second": 1e9}
    remark = "viops is faster than the floor: caches held the data, or torch.mm is below the peak"
    for ratio, remarked in ((0.9, False), (1.1, True)):
        lines = tables._floor_lines({"floor": floor, "ratios": {"floor": ratio}})
        assert (remark in lines) == remarked
