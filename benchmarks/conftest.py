"""Options of `pytest benchmarks`, the results of a run, and the table at its end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.report import heading
from benchmarks.runner import Result, human, table

RESULTS: list[Result] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nnfast")
    group.addoption("--quick", action="store_true", help="few sizes, short measurements")
    group.addoption("--results", type=Path, help="append a JSON line for each case to this file")
    group.addoption("--strict-targets", action="store_true", help="fail a case that misses its target")


def pytest_configure(config: pytest.Config) -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(2)  # the promises for CPUs are made for two threads


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture
def record(request: pytest.FixtureRequest):
    """Keep a result: in the table, in the file, in pytest-benchmark's own record."""

    def keep(result: Result, benchmark) -> None:
        RESULTS.append(result)
        benchmark.extra_info.update(
            ratios={name: result.ratio(name) for name in result.seconds}, backend=result.backend
        )
        path = request.config.getoption("--results")
        if path:
            with path.open("a") as file:
                file.write(result.line() + "\n")
        if request.config.getoption("--strict-targets") and result.missed():
            pytest.fail(f"{result.case}: {'; '.join(result.missed())}")

    return keep


def pytest_terminal_summary(terminalreporter) -> None:
    if not RESULTS:
        return
    write = terminalreporter.write_line
    write("")
    write(heading(RESULTS))
    write("")
    write(table(RESULTS))
    others = [
        (r, name) for r in RESULTS for name in r.seconds if name not in ("nnfast", "seed", "torch", "compile")
    ]
    if others:
        write("")
        write("other contenders, time and its ratio to ours:")
        width = max(len(r.case) for r, _ in others)
        for r, name in others:
            write(f"  {r.case:<{width}}  {name:<18}{human(r.seconds[name]):>9}  {r.ratio(name):.2f}x")
