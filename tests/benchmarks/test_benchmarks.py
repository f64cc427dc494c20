"""The measuring itself: ratios, targets, staleness, tables from results, the one call for a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, report, runner, sanitize
from nnfast.core import extension
from tests.ops import TABLE

ROOT = Path(runner.ROOT)
FACTS = {
    "family": "activation",
    "op": "mish",
    "case": "mish forward float32 1,024",
    "direction": "forward",
    "dtype": "float32",
    "numel": 1024,
    "backend": "cpu",
    "seconds": {"nnfast": 1e-3, "torch": 5e-3, "compile": 4e-3, "seed": 8e-3},
    "bytes": 8 * 10**6,
    "flops": 10**6,
    "targets": {"torch": 5.0, "compile": 4.5},
    "limits": {"copy_bytes_per_s": 16e9, "matmul_flop_per_s": 1e12},
    "machine": {
        "device": "a machine",
        "driver": "",
        "threads": "2",
        "torch": "2.11.0",
        "triton": "",
        "python": "3.12",
    },
    "commit": "abc",
    "date": "2026-01-01",
}


@pytest.fixture
def result() -> runner.Result:
    return runner.Result(**FACTS, digest=runner.digest("activation"))


def test_ratios_bandwidth_and_targets(result):
    assert result.ratio("torch") == 5.0
    assert result.bandwidth == 8e9
    assert result.share == 0.5
    assert result.rate == "8.0 GB/s"
    assert result.missed() == ["4.00x compile, promised 4.5x"]
    heavy = replace(result, flops=6 * 10**8)
    assert heavy.share == pytest.approx(0.6)
    assert heavy.rate == "0.6 TFLOP/s"


def test_a_result_survives_its_file(result, tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text(result.line() + "\n")
    assert runner.load(path) == [result]


def test_figures_of_changed_kernels_are_stale(result):
    assert not result.stale
    assert "(stale)" not in runner.table([result])
    old = replace(result, digest="0" * 16)
    assert old.stale
    assert "(stale)" in runner.table([old])
    assert "(stale)" in report.short_table([old])


def test_what_is_below_1x_is_shown(result):
    seconds = {"nnfast": 1.0, "torch": 0.9, "compile": 3.0}
    missed = replace(result, case="missed", seconds=seconds, targets={"compile": 4.0})
    kept = replace(missed, case="kept", seconds={"nnfast": 1.0, "torch": 0.998}, targets={})
    shown = report.below([kept, missed])
    assert "| missed | cpu | torch 0.90x | 3.00x compile, promised 4x |" in shown
    assert "kept" not in shown


def test_the_digest_follows_every_kernel_source(tmp_path, monkeypatch):
    before = runner.digest("activation")
    for folder, name in (("csrc/activation", "math.h"), ("csrc/common", "x.h"), ("csrc/focal_loss", "y.h")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_text("")
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    first = runner.digest("activation")
    (tmp_path / "csrc/focal_loss/y.h").write_text("other")
    assert runner.digest("activation") == first != before
    (tmp_path / "csrc/activation/math.h").write_text("other")
    assert runner.digest("activation") != first


def test_compare_tells_a_slow_contender_from_a_fast_one():
    found = runner.compare(
        {"fast": lambda _: time.sleep(0.001), "slow": lambda _: time.sleep(0.004)}, [None], "cpu", 0.3, 5
    )
    assert 1.5 < found["slow"] / found["fast"] < 6


def test_committed_tables_are_what_the_results_say():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.report", "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_markers_keep_the_rest():
    text = "a\n<!-- results:cpu -->\nold\n<!-- /results -->\nb\n<!-- results:gpu -->\n<!-- /results -->\n"
    made = report.write_markers(text, "cpu", "new")
    assert made == text.replace("old", "new")
    assert report.write_markers(made, "gpu", "x").count("new") == 1


def test_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("NNFAST_COMMIT", raising=False)
    assert runner.commit() == gpu_check.described() == ""
    monkeypatch.setenv("NNFAST_COMMIT", "abc")
    assert runner.commit() == "abc"


def test_a_wrong_result_is_named_and_the_rest_runs(monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "OURS", ("reference",))
    last, seen, close = len(sanitize.jobs("cpu", quick=True)) - 1, [], sanitize.close
    assert sanitize.work(last, quick=True) == (6, 0)

    def off(result: torch.Tensor, truth: torch.Tensor) -> None:
        seen.append(truth)
        close(result + (len(seen) == 1), truth)

    monkeypatch.setattr(sanitize, "close", off)
    assert sanitize.work(last, quick=True) == (6, 1)
    assert capsys.readouterr().out.count("FAILED rotary-neighbours reference [13, 24] torch.bfloat16") == 1


def test_a_job_in_a_process_of_its_own(monkeypatch):
    monkeypatch.chdir(ROOT)
    served = extension.why_not("silu", "CPU") == ""
    count, failed = sanitize.apart(len(sanitize.jobs("cpu", True)) - 1, quick=True)
    assert (count > 0, failed) == (served, 0)
    assert sanitize.apart(1000, quick=True) == (0, 1)


def test_a_step_over_its_budget_stops_no_other(tmp_path):
    """It is ended with all that it started; what passed is not done again."""
    python, end = sys.executable, time.monotonic() + 60
    ticking = "while echo >> ticks; do sleep 0.1; done"
    groups = [
        {
            "slow": gpu_check.Step(["sh", "-c", f"echo began; ({ticking}) & wait"], 0.5),
            "failing": gpu_check.Step([python, "-c", "raise SystemExit(3)"], 30),
            "missing": gpu_check.Step(["no-such-program"], 30),
        },
        {"last": gpu_check.Step(["sh", "-c", "echo $SAID"], 30, {"SAID": "fine"})},
    ]
    found = gpu_check.run(groups, tmp_path, dict(os.environ), tmp_path, end)
    assert {name: o.status for name, o in found.items()} == {
        "slow": 124,
        "failing": 3,
        "missing": 127,
        "last": 0,
    }
    assert (found["slow"].tail, found["last"].tail) == (["began"], ["fine"])
    ticks = (tmp_path / "ticks").stat().st_size
    time.sleep(1)
    assert (tmp_path / "ticks").stat().st_size == ticks > 0
    again = gpu_check.run(groups, tmp_path, dict(os.environ), tmp_path, time.monotonic())
    assert [o.status for o in again.values()] == [124, 124, 127, 0]
    assert "| slow | OUT OF TIME |" in gpu_check.summary(found, tmp_path)


@pytest.mark.parametrize("quick", [False, True])
def test_steps_cover_the_table_and_the_families(quick, tmp_path):
    *_, last = gpu_check.steps(tmp_path, tmp_path, quick, dry_run=False)
    for case in TABLE:
        rows, _ = gpu_check.FAMILIES[case.family]
        assert any(word in case.label for word in rows.split(" or "))
        assert (ROOT / "tests" / case.family).is_dir()
        assert {f"tests-{case.family}", f"tests-table-{case.family}", "memcheck"} <= set(last)
    assert ("tests-others" in last) != quick
    assert all((ROOT / f"benchmarks/test_{name}.py").exists() for name in gpu_check.BENCHMARKS)


@pytest.fixture(scope="module")
def checked(tmp_path_factory) -> Path:
    """A dry run of gpu_check on a pure-Python wheel of this tree, and the checkout's library if any."""
    folder = tmp_path_factory.mktemp("gpu_check")
    env = {**os.environ, "NNFAST_EXTENSION": "0"}
    wheel = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        folder / "wheels",
    ]
    built = subprocess.run([*wheel, ROOT], env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    library = ROOT / "nnfast/_C.so"
    if library.exists():
        (made,) = (folder / "wheels").glob("*.whl")
        with zipfile.ZipFile(made, "a") as file:
            file.write(library, "nnfast/_C.so")
    done = check(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, ROOT / "benchmarks/gpu_check.py", "--wheels", folder / "wheels"]
    return subprocess.run(
        [*program, "--output", folder / "out", "--dry-run"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_gpu_check_goes_all_the_way_without_a_gpu(checked):
    outcomes = [json.loads(line) for line in (checked / "out/outcomes.jsonl").read_text().splitlines()]
    names = [o["name"] for o in outcomes]
    assert {*names[:2]} == {"info", "launch"}
    assert names[2:] == ["kernels", "benchmarks", "tests-table-activation"]
    kernels = (checked / "out/kernels.log").read_text().splitlines()[-1]
    assert kernels.endswith("runs of our kernels on cpu, all results right")
    assert (int(kernels.split()[0]) > 100) == (ROOT / "nnfast/_C.so").exists()
    assert len(runner.load(checked / "out/results.jsonl")) >= 4
    summary = (checked / "out/summary.md").read_text()
    assert summary.count("| passed |") == 5
    assert "| mish forward float32 1,024" in summary


def test_gpu_check_does_nothing_twice(checked):
    again = check(checked)
    assert again.returncode == 0
    assert again.stdout.count("done before") == 5


def test_gpu_check_needs_a_wheel(tmp_path):
    (tmp_path / "wheels").mkdir()
    done = check(tmp_path)
    assert done.returncode != 0
    assert "no nnfast-*.whl in" in done.stderr
