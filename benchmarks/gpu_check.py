"""Everything that needs a GPU, in one call: tests, compute-sanitizer, benchmarks, and a page that sums it up.

    python benchmarks/gpu_check.py --wheels DIR --output DIR [--quick] [--dry-run] [--steps NAME ...]

Unpacks the wheels (nnfast's, and any test requirement that the machine lacks) into a folder of its own,
copies tests and benchmarks beside them, so that the installed package is what runs, and goes through the
steps. Nothing is fetched. Each step has a budget of seconds; what fails or takes longer stops no other. A
step that passed is not done again: call it once more to go on after a stop. `--quick` takes less than nine
minutes: few benchmarks, of the tests those on the GPU. `--dry-run` goes the same way without a GPU, on
little. Exit status: 0 if every step passed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
QUICK_SECONDS = 520
"""All steps of --quick together."""
CORES = os.cpu_count() or 1
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
STEPS = ("info", "launch", "kernels", "benchmarks", "tests", *SANITIZERS)
SIDE_BY_SIDE = {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""Many processes at once: threads of each for all cores would only wait for each other."""
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "-rfE"]

FAMILIES = {
    "activation": ("silu or mish", 1),
    "focal_loss": ("focal", 1),
    "conv_bn_act": ("batch_norm", 3),
    "convolution": ("conv2d", 5),
    "attention": ("attention or rotary", 5),
}
"""Family -> its rows in the table of operations, and how many processes its own tests get of 16: most time
goes into compiling. A fault of the device spoils no other family."""
BENCHMARKS = ("activation", "focal_loss", "attention", "convolution", "conv_bn_act", "attention_modules")
QUICK_BENCHMARKS = "not test_attention.py or rotary or (4096-128 and (causal or padding or softcap))"


@dataclass(frozen=True)
class Step:
    """A command, the seconds that it may take, and what it needs in its environment."""

    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """How a step ended: exit status (124: over its budget), seconds, and the last lines it printed."""

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
    parser.add_argument("--quick", action="store_true", help="fits nine minutes: few benchmarks")
    parser.add_argument(
        "--dry-run", action="store_true", help="without a GPU, on little, to see that it works"
    )
    parser.add_argument(
        "--steps", nargs="+", choices=STEPS, default=STEPS, metavar="NAME", help=", ".join(STEPS)
    )
    arguments = parser.parse_args()
    end = time.monotonic() + (QUICK_SECONDS if arguments.quick else float("inf"))
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="nnfast-gpu-check-"))
    try:
        environment = prepare(work, arguments.wheels.resolve())
        groups = [
            {name: found for name, found in group.items() if name.split("-")[0] in arguments.steps}
            for group in steps(work, output, arguments.quick, arguments.dry_run)
        ]
        outcomes = run(groups, work, environment, output, end)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    text = summary(outcomes, output)
    (output / "summary.md").write_text(text)
    print(text)
    return int(any(outcome.status for outcome in outcomes.values()))


def prepare(work: Path, wheels: Path) -> dict[str, str]:
    """Unpack the wheels and copy what runs on them; the environment in which it runs."""
    found = sorted(wheels.glob("*.whl"))
    if not any(wheel.name.startswith("nnfast-") for wheel in found):
        raise SystemExit(f"gpu_check: no nnfast-*.whl in {wheels}; build one with: pip wheel --no-deps .")
    for wheel in found:
        zipfile.ZipFile(wheel).extractall(work / "site")
    for folder in (work / "site").glob("*.data/*lib"):  # where a wheel may keep what belongs at its root
        shutil.copytree(folder, work / "site", dirs_exist_ok=True)
    for name in ("tests", "benchmarks", "csrc"):
        shutil.copytree(CHECKOUT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "setup.py"):
        shutil.copy(CHECKOUT / name, work / name)
    paths = [str(work / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment.setdefault("NNFAST_COMMIT", described())
    return environment


def described() -> str:
    """The checkout's commit, + if it is changed; "" of a copy without git."""
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def steps(work: Path, output: Path, quick: bool, dry_run: bool) -> list[dict[str, Step]]:
    """Name -> step, in groups: one group after the other, what is in a group side by side."""
    less, python, compiled = quick or dry_run, sys.executable, {"TRITON_INTERPRET": "0"}
    kernels = [python, "-m", "benchmarks.sanitize", *["--quick"] * less]
    shared = ["--processes", str(CORES - 2)] if CORES > 4 else []
    benchmarks = [f"benchmarks/test_{name}.py" for name in BENCHMARKS] if less else ["benchmarks"]
    chosen = "1024 and float32" if dry_run else QUICK_BENCHMARKS
    benchmarks += ["--quick", "-k", chosen] if less else []
    sanitized = {
        tool: Step(
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *kernels],
            400 if less else 7200,
            {**SIDE_BY_SIDE, **compiled, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for tool in SANITIZERS
        if not dry_run
    }
    return [
        {
            "info": Step([python, "-m", "nnfast", "info"], 60),
            "launch": Step([python, "-m", "benchmarks.launch"], 60, compiled),
        },
        {"kernels": Step([*kernels, *shared], 120 if less else 3600, SIDE_BY_SIDE | compiled)},
        {
            "benchmarks": Step(
                [*PYTEST, *benchmarks, "--results", str(output / "results.jsonl")], 190 if less else 14400
            )
        },
        {**tests(work, quick, dry_run), **sanitized},
    ]


def tests(work: Path, quick: bool, dry_run: bool) -> dict[str, Step]:
    """Of each family the table's rows and its own tests; what is quick runs on the GPU alone."""
    if dry_run:
        few = ["-k", "(silu or mish) and exact and float32 and not triton"]
        return {"tests-table-activation": Step([*PYTEST, "tests/test_every_op.py", *few], 600, SIDE_BY_SIDE)}
    seconds, found = 300 if quick else 7200, {}
    on_gpu = ["-m", "gpu"] * quick
    xdist = importlib.util.find_spec("xdist") or (work / "site/xdist").is_dir()
    for family, (rows, processes) in FAMILIES.items():
        table = ["tests/test_every_op.py", "-k", rows]
        found[f"tests-table-{family}"] = Step([*PYTEST, *on_gpu, *table], seconds, SIDE_BY_SIDE)
        share = max(1, processes * CORES // 16)
        shared = ["-n", str(share)] if xdist and share > 1 else []
        own = [*PYTEST, *on_gpu, *shared, f"tests/{family}"]
        found[f"tests-{family}"] = Step(own, seconds, SIDE_BY_SIDE)
    if not quick:
        others = ["build", "benchmarks", "test_every_op.py", *FAMILIES]  # two are the checkout's alone
        ignored = [f"--ignore=tests/{name}" for name in others]
        found["tests-others"] = Step([*PYTEST, "tests", *ignored], seconds, SIDE_BY_SIDE)
    return found


def run(
    groups: Sequence[dict[str, Step]], work: Path, environment: dict[str, str], output: Path, end: float
) -> dict[str, Outcome]:
    """The groups in turn, until `end`; what passed in an earlier call is taken from there."""
    kept = output / "outcomes.jsonl"
    earlier = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    passed = {entry.pop("name"): Outcome(**entry) for entry in earlier if not entry["status"]}

    def one(name: str, step: Step) -> Outcome:
        if name in passed:
            print(f"{name}: done before", flush=True)
            return passed[name]
        outcome = take(name, step, work, environment, output, end)
        with kept.open("a") as file:
            file.write(json.dumps({"name": name, **asdict(outcome)}) + "\n")
        return outcome

    outcomes: dict[str, Outcome] = {}
    for group in groups:
        with ThreadPoolExecutor(CORES) as pool:
            outcomes |= zip(group, pool.map(one, group, group.values()), strict=True)
    return outcomes


def take(name: str, step: Step, work: Path, environment: dict[str, str], output: Path, end: float) -> Outcome:
    """Run one step, its output into a log."""
    print(f"{name}: {' '.join(step.command)}", flush=True)
    if name == "benchmarks":
        (output / "results.jsonl").unlink(missing_ok=True)  # half of an earlier call
    log, began = output / f"{name}.log", time.monotonic()
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=work,
                env=environment | step.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of processes, to be ended as one
            )
            status = ended(process, min(step.seconds, end - began))
        except FileNotFoundError as error:
            file.write(f"{error}\n")
            status = 127
    text = log.read_text(errors="replace")
    if len(text) > 8 << 20:
        log.write_text(text[: 1 << 20] + "\n[...]\n" + text[-(7 << 20) :])
    tail = [line for line in text.splitlines() if line.strip()][-24:]
    outcome = Outcome(status, time.monotonic() - began, tail)
    print(f"{name}: {verdict(outcome)}, {outcome.seconds:.0f} s", flush=True)
    return outcome


def ended(process: subprocess.Popen[bytes], seconds: float) -> int:
    """Exit status; 124 after so many seconds: asked to stop, so that pytest sums up, then killed."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(max(0, seconds))
    for number, patience in ((signal.SIGINT, 5), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    return 124


def verdict(outcome: Outcome) -> str:
    """How it ended in words."""
    known = {0: "passed", 124: "OUT OF TIME"}
    return known.get(outcome.status, f"FAILED ({outcome.status})")


def summary(outcomes: dict[str, Outcome], output: Path) -> str:
    """One page: what passed, what failed and its last words, what the benchmarks gave."""
    lines = ["# GPU check", "", "| step | outcome | seconds | last line |", "|---|---|---|---|"]
    for name, outcome in outcomes.items():
        last = outcome.tail[-1].strip(" =") if outcome.tail else ""
        lines.append(f"| {name} | {verdict(outcome)} | {outcome.seconds:.0f} | {last[:100]} |")
    for name, outcome in outcomes.items():
        if outcome.status or name == "launch":
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
