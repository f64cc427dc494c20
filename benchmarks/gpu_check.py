"""Everything that needs a GPU, in one call: tests, compute-sanitizer, benchmarks, and a page that sums it up.

    python benchmarks/gpu_check.py --wheels DIR --output DIR [--quick] [--dry-run] [--steps NAME ...]

Installs the wheels (nnfast's, and any test requirement that the machine lacks) into a folder of its own,
copies tests and benchmarks beside them, so that the installed package is what runs, and goes through the
steps. Nothing is fetched. A step that is done is not done again: call it once more to go on after a stop.
`--dry-run` goes the same way without a GPU, on little. Exit status: 0 if every step passed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
STEPS = ("info", "tests", "kernels", "benchmarks", *SANITIZERS)
PYTEST = ["-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-rfE"]


@dataclass
class Outcome:
    """How a step ended: exit status, seconds, and the last lines it printed."""

    status: int
    seconds: float
    tail: list[str]


def main() -> int:
    """Run the steps and print the summary last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--wheels", type=Path, required=True, help="folder with nnfast's wheel and any others"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for logs, result lines and summary.md"
    )
    parser.add_argument("--quick", action="store_true", help="fits ten minutes: few benchmarks")
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU, on little, to see that it works"
    )
    parser.add_argument(
        "--steps", nargs="+", choices=STEPS, default=STEPS, metavar="NAME", help=", ".join(STEPS)
    )
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="nnfast-gpu-check-"))
    try:
        environment = prepare(work, arguments.wheels.resolve())
        outcomes = {
            name: step(name, command, work, environment, output)
            for name, command in commands(output, arguments.quick, arguments.dry_run).items()
            if name in arguments.steps
        }
    finally:
        shutil.rmtree(work, ignore_errors=True)
    text = summary(outcomes, output)
    (output / "summary.md").write_text(text)
    print(text)
    return int(any(outcome.status for outcome in outcomes.values()))


def prepare(work: Path, wheels: Path) -> dict[str, str]:
    """Install the wheels and copy what runs on them; the environment in which it runs."""
    found = sorted(map(str, wheels.glob("*.whl")))
    if not any(Path(wheel).name.startswith("nnfast-") for wheel in found):
        raise SystemExit(f"gpu_check: no nnfast-*.whl in {wheels}; build one with: pip wheel --no-deps .")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run([*install, "--target", str(work / "site"), *found], check=True)
    for name in ("tests", "benchmarks", "csrc"):
        shutil.copytree(CHECKOUT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "setup.py"):
        shutil.copy(CHECKOUT / name, work / name)
    describe = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    commit = subprocess.run(
        describe, cwd=CHECKOUT, capture_output=True, text=True, check=False
    ).stdout.strip()
    environment = {**os.environ, "PYTHONPATH": str(work / "site"), "PYTHONUNBUFFERED": "1"}
    environment.setdefault("NNFAST_COMMIT", commit)
    return environment


def commands(output: Path, quick: bool, dry_run: bool) -> dict[str, list[str]]:
    """Step -> command, in order: what is most likely to matter first."""
    python = sys.executable
    of_the_checkout = ["--ignore=tests/build", "--ignore=tests/benchmarks"]
    tests = ["tests", *of_the_checkout, *["-k", "exact and float32"] * dry_run]
    benchmarks = ["benchmarks", *["--quick"] * (quick or dry_run), *["-k", "1024 and float32"] * dry_run]
    found = {
        "info": [python, "-m", "nnfast", "info"],
        "tests": [python, *PYTEST, *tests],
        "kernels": [python, "-m", "benchmarks.sanitize"],
        "benchmarks": [python, *PYTEST, *benchmarks, "--results", str(output / "results.jsonl")],
    }
    for tool in SANITIZERS if not dry_run else ():
        found[tool] = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *found["kernels"]]
    return found


def step(name: str, command: list[str], work: Path, environment: dict[str, str], output: Path) -> Outcome:
    """Run one step, its output into a log; or take its outcome from an earlier call."""
    done = output / "outcomes.jsonl"
    earlier = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
    for entry in earlier:
        if entry["name"] == name:
            print(f"{name}: done before", flush=True)
            return Outcome(entry["status"], entry["seconds"], entry["tail"])
    print(f"{name}: {' '.join(command)}", flush=True)
    if name == "benchmarks":
        (output / "results.jsonl").unlink(missing_ok=True)  # half of an earlier call
    if name == "kernels":
        environment = {**environment, "TRITON_INTERPRET": "0"}  # compiled ones, or none
    if name in SANITIZERS:
        environment = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    log = output / f"{name}.log"
    began = time.monotonic()
    with log.open("w") as file:
        try:
            status = subprocess.run(
                command, cwd=work, env=environment, stdout=file, stderr=subprocess.STDOUT
            ).returncode
        except FileNotFoundError as error:
            file.write(f"{error}\n")
            status = 127
    text = log.read_text(errors="replace")
    if len(text) > 8 << 20:
        log.write_text(text[: 1 << 20] + "\n[...]\n" + text[-(7 << 20) :])
    outcome = Outcome(
        status, time.monotonic() - began, [line for line in text.splitlines() if line.strip()][-12:]
    )
    with done.open("a") as file:
        file.write(json.dumps({"name": name, **asdict(outcome)}) + "\n")
    print(f"{name}: {'passed' if not status else f'failed ({status})'}, {outcome.seconds:.0f} s", flush=True)
    return outcome


def summary(outcomes: dict[str, Outcome], output: Path) -> str:
    """One page: what passed, what failed and its last words, what the benchmarks gave."""
    lines = ["# GPU check", "", "| step | outcome | seconds | last line |", "|---|---|---|---|"]
    for name, outcome in outcomes.items():
        verdict = "passed" if not outcome.status else f"FAILED ({outcome.status})"
        last = outcome.tail[-1].strip(" =") if outcome.tail else ""
        lines.append(f"| {name} | {verdict} | {outcome.seconds:.0f} | {last[:100]} |")
    for name, outcome in outcomes.items():
        if outcome.status:
            lines += ["", f"## {name}", "", "```", *outcome.tail, "```"]
    log = output / "benchmarks.log"
    if log.exists():
        table = [
            line for line in log.read_text().splitlines() if line.startswith("| ") or line.startswith("|--")
        ]
        lines += ["", "## benchmarks", "", *table]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
