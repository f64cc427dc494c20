"""`nnfast demo` from its arguments to its picture."""

import argparse
import copy
import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import nnfast
from nnfast.cli import _tasks, _training, main
from nnfast.cli._tasks import Mish, Samples, Swish
from nnfast.cli._training import Side, step_memory


@pytest.fixture(scope="module")
def small():
    """A task's samples, fewer of them."""
    train, held_out = _tasks.fashion_mnist()
    return train[torch.arange(0, 8000, 40)], held_out[torch.arange(0, 2000, 40)]


def train(small, written, swapped, steps=3, epochs=1):
    return _training.train(
        _tasks.TASKS[0], small, written, swapped, epochs=epochs, steps=steps, batch_size=16, seed=0
    )


def networks():
    torch.manual_seed(0)
    written = _tasks.residual_network(width=4)
    swapped = _tasks.residual_network(width=4)
    swapped.load_state_dict(written.state_dict())
    return written, swapped


def test_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["demo", "--device", "cpu", "--epochs", "1", "--steps", "2", "--batch-size", "32"]
    assert main(arguments) == 0
    text, _, attention = capsys.readouterr().out.partition("Fashion-MNIST in patches")
    assert re.search(r"training step +attention +float32\[32, .*\] on cpu +(cpu|aten) +1\n", attention)
    assert "8,000 images to train on and 2,000 held out" in text
    assert re.search(r"nnfast\.swap: .*10 replaced", text)

    number = r"\d+\.\d+"
    (epoch,) = re.findall(rf"^  1 +({number}) +({number}) +({number})% +({number})%$", text, re.M)
    written_loss, swapped_loss, *accuracies = map(float, epoch)
    assert abs(written_loss - swapped_loss) < 1e-3
    assert 1.5 < written_loss < 3
    assert all(0 <= accuracy <= 100 for accuracy in accuracies)
    assert re.search(rf"time, median +{number} ms +{number} ms +{number}x", text)
    assert re.search(rf"kept for backward +{number} MiB +{number} MiB +{number}x", text)
    (between,) = re.findall(r"first +as written and nnfast +(\S+)", text)
    (change,) = re.findall(r"before and after the step +(\S+)", text)
    assert 0 <= float(between) < 1e-4 * float(change)
    for when in ("training step", "evaluation"):
        for op, elements in (
            ("mish", r"32, \d+" if when == "training step" else r"500, \d+"),
            ("conv_bn_act", r"32, \d+" if when == "training step" else r"500, \d+"),
            ("silu", r"\d+"),
        ):
            assert re.search(rf"{when} +{op} +float32\[{elements}.*\] on cpu +(cpu|aten|folded) +\d+", text)

    path = Path(re.findall(r"^Plot: (.*)$", text, re.M)[0])
    assert path == tmp_path / "demo-output" / "fashion-mnist.png"
    assert path.stat().st_size > 20_000
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    assert 1000 <= width <= 3000
    assert 400 <= height <= 1500


def test_same_network_twice_is_the_same_training(small):
    """Without a swap nothing differs: same weights, batches and masks."""
    result = train(small, *networks(), steps=4)
    assert result.written.losses == result.swapped.losses
    assert result.written.accuracy == result.swapped.accuracy
    assert result.differences.first_step == result.differences.last_step == 0
    assert result.differences.written_error < 1e-3 * result.differences.change


def test_swapped_keeps_the_numbers(small):
    written, swapped = networks()
    assert len(nnfast.swap(swapped).replaced) == 10
    result = train(small, written, swapped)
    found = result.differences
    assert found.swapped_error <= 2 * found.written_error + 1e-7
    assert found.first_step < 1e-3 * found.change
    assert result.written.losses == pytest.approx(result.swapped.losses, rel=1e-3)


@pytest.mark.parametrize("task", _tasks.TASKS, ids=lambda task: task.name)
def test_both_learn_the_same(task):
    """A hundred steps on, losses are still together, and the held-out images are told apart alike."""
    train, held_out = _tasks.fashion_mnist()
    torch.manual_seed(0)
    written = task.network()
    swapped = copy.deepcopy(written)
    assert nnfast.swap(swapped).replaced
    data = train[torch.arange(0, 8000, 10)], held_out[torch.arange(0, 2000, 4)]
    result = _training.train(task, data, written, swapped, epochs=2, steps=50, batch_size=16, seed=0)
    losses, others = result.written.losses, result.swapped.losses
    assert losses == pytest.approx(others, abs=5e-3)
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert result.written.accuracy == pytest.approx(result.swapped.accuracy, abs=0.011)


def test_a_wrong_swap_is_seen(small):
    """The comparison can fail: Mish in the place of Swish shows in the weights."""
    written, swapped = networks()
    for name, module in list(swapped.named_modules()):
        if isinstance(module, Swish):
            swapped.set_submodule(name, Mish())
    found = train(small, written, swapped).differences
    assert found.first_step > 0.01 * found.change
    assert found.swapped_error > 100 * found.written_error


def test_steps_take_turns_and_are_timed(small):
    result = train(small, *networks(), steps=6, epochs=2)
    for side in (result.written, result.swapped):
        assert len(side.losses) == len(side.seconds) == 12
        assert len(side.accuracy) == 2
        assert all(math.isfinite(loss) for loss in side.losses)
        low, median, high = side.quartiles()
        assert 0 < low <= median <= high


@pytest.mark.parametrize(
    ("seconds", "median"), [([4.0], 4), ([4.0, 2.0], 3), ([9.0, 9.0, 9.0, 1.0, 2.0, 3.0], 2)]
)
def test_median_leaves_the_warm_up_out(seconds, median):
    side = Side("", nn.Linear(1, 1), 10)
    side.seconds = seconds
    assert side.quartiles()[1] == median


def test_memory_counts_each_storage_once():
    """Linear keeps its input x; tanh keeps its output; the sum's gradient needs nothing."""
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh())
    batch = Samples(torch.randn(16, 8), torch.zeros(16))
    kept = step_memory(model, lambda y, _: y.sum() + y.mean(), batch)
    assert kept == 4 * (16 * 8 + 16 * 4)


def test_swap_keeps_less_for_backward(small):
    written, swapped = networks()
    nnfast.swap(swapped)
    sizes = [step_memory(m, _tasks.TASKS[0].loss, small[0][:16]) for m in (written, swapped)]
    assert sizes[1] < 0.85 * sizes[0]


def test_served_tells_what_explain_tells(small):
    written, swapped = networks()
    nnfast.swap(swapped)
    with nnfast.backend("reference"):
        result = train(small, written, swapped)
    assert {key[3] for key in result.served} == {"reference"}
    assert sum(n for key, n in result.served.items() if key[0] == "training step") == 6 + 2 + 1
    assert any("'reference' is forced" in reason for reason in result.not_served)


def test_forced_backend_that_cannot_serve(tmp_path, capsys):
    with nnfast.backend("cuda"):
        assert main(["demo", "--device", "cpu", "--steps", "1", "--output", str(tmp_path)]) == 2
    assert "backend 'cuda' is forced and cannot serve" in capsys.readouterr().err


BAD = {
    "--device banana": r"--device: got 'banana'; it needs auto, cpu, cuda or cuda:N",
    "--device cuda:x": r"--device: got 'cuda:x'; it needs",
    "--device cuda:": r"--device: got 'cuda:'; it needs",
    "--device cpu:0": r"--device: got 'cpu:0'; it needs",
    "--device cuda:99": r"--device: got 'cuda:99'; torch \S+ sees \d+ CUDA devices",
    "--epochs 0": r"--epochs: got '0'; it needs a whole number of at least 1",
    "--steps 1.5": r"--steps: got '1.5'; it needs a whole number of at least 1",
    "--batch-size -3": r"--batch-size: got '-3'; it needs a whole number of at least 1",
    "--seed x": r"--seed: got 'x'; it needs a whole number of at least 0",
}


@pytest.mark.parametrize("arguments", BAD)
def test_bad_argument(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["demo", *arguments.split()])
    assert exit_.value.code == 2
    assert re.search(BAD[arguments], capsys.readouterr().err)


def test_nothing_replaced_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nnfast, "swap", lambda model: Nothing())
    assert main(["demo", "--output", str(tmp_path)]) == 2
    assert "nothing to compare: nnfast.swap replaced no module of Fashion-MNIST" in capsys.readouterr().err


class Nothing:
    replaced = ()


def test_batch_larger_than_the_data(tmp_path, capsys):
    assert main(["demo", "--batch-size", "8001", "--output", str(tmp_path)]) == 2
    assert "--batch-size: got 8001; there are 8000 samples to train on" in capsys.readouterr().err


def test_output_is_a_file(tmp_path, capsys):
    (tmp_path / "taken").touch()
    assert main(["demo", "--output", str(tmp_path / "taken")]) == 2
    assert "taken cannot be made a directory: File exists" in capsys.readouterr().err


@pytest.mark.parametrize("gone", [["matplotlib"], ["tqdm"], ["matplotlib", "tqdm"]])
def test_missing_packages(gone, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    assert main(["demo"]) == 2
    assert f"nnfast demo: needs {' and '.join(gone)}; install" in capsys.readouterr().err


def test_importing_nnfast_and_help_need_neither():
    code = (
        "import sys; sys.modules['matplotlib'] = sys.modules['tqdm'] = None\n"
        "import nnfast, nnfast.cli\n"
        "try: nnfast.cli.main(['demo', '--help'])\n"
        "except SystemExit as exit: sys.exit(exit.code)"
    )
    root = Path(nnfast.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--batch-size" in done.stdout


def test_a_subcommand_is_a_file():
    import nnfast.cli

    parser = nnfast.cli._parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    files = {p.stem for p in Path(nnfast.cli.__file__).parent.glob("*.py") if not p.stem.startswith("_")}
    assert set(commands.choices) == files >= {"info", "demo"}
