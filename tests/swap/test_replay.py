"""What an inference came to is repeated, until anything has changed that it depends on."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import nnfast
from nnfast.conv_bn_act import fold, notes, replay

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
CHANNELS_LAST = torch.channels_last


class Residual(nn.Module):
    """A block as users write them, its sum in place."""

    def __init__(self, channels: int = 8, projected: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels)) if projected else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)


def sequence(*last: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.SiLU(inplace=True),
        nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8), *last,
    )  # fmt: skip


def torchvisions(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        pytest.importorskip("tests.torchvision_operators")
        models = pytest.importorskip("torchvision").models
        if name == "InvertedResidual":
            return models.mobilenetv2.InvertedResidual(8, 8, 1, 4)
        config = models.efficientnet.MBConvConfig(4, 3, 1, 8, 8, 1)
        return models.efficientnet.MBConv(config, 0.0, nn.BatchNorm2d)

    return make


MODULES: dict[str, Callable[[], nn.Module]] = {
    "sequence": sequence,
    "relu6": lambda: sequence(nn.ReLU6(inplace=True), nn.MaxPool2d(2)),
    "nested": lambda: nn.Sequential(sequence(nn.LeakyReLU(0.3)), nn.Dropout(0.5), sequence()),
    "residual": Residual,
    "projected": lambda: Residual(projected=True),
    "InvertedResidual": torchvisions("InvertedResidual"),
    "MBConv": torchvisions("MBConv"),
}


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A module as written, and swapped, with statistics of their own; and images."""
    torch.manual_seed(0)
    written = MODULES[name]()
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        for _ in range(3):
            written(x)
    written.eval()
    for module in written.modules():
        module.note = np.zeros(2)
    swapped = copy.deepcopy(written)
    assert nnfast.swap(swapped).replaced
    return written, swapped, x


def kept(module: nn.Module) -> int:
    """How many kinds of calls of it are repeated."""
    return len(replay._REPLAYS[module].found)


def warm(module: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        for _ in range(3):
            module(x)
    assert kept(module)


@pytest.fixture
def repeated(monkeypatch):
    """Counts what is repeated."""
    count = []
    run = replay.Replay.run
    monkeypatch.setattr(replay.Replay, "run", lambda self, x: count.append(self) or run(self, x))
    return count


@pytest.mark.parametrize("layout", [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", MODULES)
def test_same_result(name, mode, layout, repeated):
    written, swapped, x = pair(name)
    x = x.contiguous(memory_format=layout)
    with mode():
        first = swapped(x)
        assert not repeated
        for _ in range(3):
            given = x.clone(memory_format=torch.preserve_format)
            y = swapped(given)
            assert torch.equal(given, x)
            assert torch.equal(y, first)
            assert y.stride() == first.stride()
        assert len(repeated) == 2 * (2 if name == "nested" else 1)  # whose two parts are modules of their own
        assert_close(y, written(x), rtol=1e-4, atol=1e-5)


def _swap_weight(m: nn.Module) -> None:
    m.weight = nn.Parameter(m.weight.detach() * 2)


def _set(name: str, value: Any) -> Callable[[nn.Module], None]:
    return lambda module: setattr(module, name, value)


def _in_place(name: str) -> Callable[[nn.Module], None]:
    def change(module: nn.Module) -> None:
        with torch.no_grad():
            getattr(module, name).mul_(1.5)

    return change


def _through_data(name: str) -> Callable[[nn.Module], None]:
    return lambda module: getattr(module, name).data.mul_(1.5)  # moves no version counter


def _plain(name: str) -> Callable[[nn.Module], None]:
    """A tensor computed elsewhere in place of a parameter or buffer."""

    def change(module: nn.Module) -> None:
        value = getattr(module, name).detach() * 1.5
        delattr(module, name)
        setattr(module, name, value)

    return change


CHANGES: dict[str, tuple[type, Callable[[nn.Module], Any]]] = {
    "weight in place": (nn.Conv2d, _in_place("weight")),
    "weight through data": (nn.Conv2d, _through_data("weight")),
    "new weight": (nn.Conv2d, _swap_weight),
    "bias": (nn.Conv2d, _in_place("bias")),
    "mean": (nn.BatchNorm2d, _in_place("running_mean")),
    "variance through data": (nn.BatchNorm2d, _through_data("running_var")),
    "gamma": (nn.BatchNorm2d, _through_data("weight")),
    "eps": (nn.BatchNorm2d, _set("eps", 0.5)),
    "padding mode": (nn.Conv2d, _set("padding_mode", "circular")),
    "a hook": (
        nn.Conv2d,
        lambda m: m.register_forward_hook(lambda module, args, y: y * 2),
    ),
    "a hook before": (
        nn.BatchNorm2d,
        lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    ),
    "an activation's hook": (
        nn.ReLU,
        lambda m: m.register_forward_hook(lambda module, args, y: y - 1),
    ),
    "forward of its own": (nn.BatchNorm2d, lambda m: _set("forward", lambda x: x * 3)(m)),
    "training": (nn.BatchNorm2d, lambda m: m.train()),
    "a tensor attribute": (nn.Conv2d, _set("note", torch.ones(3))),
    "another array": (nn.BatchNorm2d, lambda m: setattr(m, "note", m.note + 1)),
    "frozen": (nn.Conv2d, lambda m: m.requires_grad_(False)),
    "a plain weight": (nn.Conv2d, _plain("weight")),
    "a plain bias": (nn.Conv2d, _plain("bias")),
    "a plain gamma": (nn.BatchNorm2d, _plain("weight")),
    "a plain mean": (nn.BatchNorm2d, _plain("running_mean")),
    "no count of batches": (nn.BatchNorm2d, lambda m: delattr(m, "num_batches_tracked")),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["sequence", "residual", "projected"])
def test_a_change_is_seen(name, change):
    written, swapped, x = pair(name)
    warm(swapped, x)
    kind, apply = CHANGES[change]
    before = None
    for module in (written, swapped):
        found = [m for m in module.modules() if isinstance(m, kind)]
        if not found:
            pytest.skip(f"{name} has no {kind.__name__}")
        apply(found[0])
    with torch.no_grad():
        for _ in range(4):
            y = swapped(x)
            before = y if before is None else before
            assert_close(y, written(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["sequence", "residual"])
def test_a_child_replaced_is_called(name):
    written, swapped, x = pair(name)
    warm(swapped, x)
    for module in (written, swapped):
        torch.manual_seed(1)
        norm = nn.BatchNorm2d(12 if name == "sequence" else 16).eval()
        nn.init.normal_(norm.weight)
        setattr(module, "1" if name == "sequence" else "bn1", norm)
    with torch.no_grad():
        for _ in range(4):
            assert_close(swapped(x), written(x), rtol=1e-4, atol=1e-4)
    assert kept(swapped)


def test_hooks_on_all_modules_are_called():
    _, swapped, x = pair("sequence")
    warm(swapped, x)
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: called.append(module))
    with torch.no_grad():
        swapped(x)
    handle.remove()
    assert {type(m).__name__ for m in called} >= {"Conv2d", "BatchNorm2d"}


def test_gradients_are_not_missed(repeated):
    _, swapped, x = pair("residual")
    warm(swapped, x)
    repeated.clear()
    x.requires_grad_()
    swapped(x).sum().backward()
    assert x.grad is not None
    assert swapped.conv1.weight.grad is not None
    assert not repeated


def test_other_calls_are_their_own(repeated):
    written, swapped, x = pair("residual")
    warm(swapped, x)
    repeated.clear()
    others = [x[:1], x[:, :, :4].contiguous(), x.contiguous(memory_format=CHANNELS_LAST), x.double()]
    with torch.no_grad():
        for each in others:
            if each.dtype == torch.float64:
                written.double(), swapped.double()
            assert_close(swapped(each), written(each), rtol=1e-4, atol=1e-4)
    assert not repeated


def test_transforms_and_forced_backends_are_asked(repeated):
    written, swapped, x = pair("sequence")
    warm(swapped, x)
    repeated.clear()
    with torch.no_grad():
        batched = torch.vmap(lambda x: swapped(x.unsqueeze(0)).squeeze(0))(x)
        assert_close(batched, written(x), rtol=1e-4, atol=1e-4)
        with nnfast.backend("reference"):
            swapped(x)
        torch.compile(swapped, backend="eager", fullgraph=True)(x)
    assert not repeated


class Counter(nn.Module):
    """Does more than compute."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu(x)


def test_what_does_more_is_called_every_time(repeated):
    module = nn.Sequential(*sequence(), Counter()).eval()
    nnfast.swap(module)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        for _ in range(6):
            module(x)
    assert module[-1].calls == 6
    assert not repeated


def test_attempts_end():
    """What changes itself at every call is not looked at for ever."""
    _, swapped, x = pair("sequence")
    looked = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        snapshot = replay.Snapshot
        patch.setattr(replay, "Snapshot", lambda tensors: looked.append(1) or snapshot(tensors))
        for i in range(20):
            swapped[0].note = i
            swapped(x)
    assert 0 < len(looked) <= 4
    assert not kept(swapped)


def test_evaluation_after_every_epoch(repeated):
    """What trains in between is looked at again, each time."""
    written, swapped, x = pair("sequence")
    for _ in range(6):
        for module in (written, swapped):
            module.train()
            with torch.no_grad():
                module(x)
            module.eval()
        repeated.clear()
        with torch.no_grad():
            for _ in range(6):
                assert_close(swapped(x), written(x), rtol=1e-4, atol=1e-4)
        assert len(repeated) >= 3


def test_copies_have_their_own():
    _, swapped, x = pair("residual")
    warm(swapped, x)
    for twin in (copy.deepcopy(swapped), pickle.loads(pickle.dumps(swapped))):
        assert twin not in replay._REPLAYS
        with torch.no_grad():
            twin.conv1.weight.zero_()
            assert not torch.equal(twin(x), swapped(x))


def test_results_are_dropped_after_their_last_use():
    _, swapped, x = pair("projected")
    warm(swapped, x)
    (found,) = replay._REPLAYS[swapped].found.values()
    dropped = [place for step in found.steps for place in step.drops]
    assert sorted(dropped) == list(range(len(found.steps)))  # all but the result, once


BLOCKS = {
    "ConvBNAct": lambda: nnfast.ConvBNAct(8, 8, 3, padding=1, act="leaky_relu", negative_slope=0.3),
    "ResidualBlock": lambda: nnfast.ResidualBlock(8, 12, 2),
    "Bottleneck": lambda: nnfast.Bottleneck(8, 2),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_our_own(name, repeated):
    block = BLOCKS[name]()
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        block(x)
        block.eval()
        first = block(x)
        for _ in range(3):
            assert torch.equal(block(x), first)
        assert len(repeated) == 2
        with nnfast.backend("reference"):
            assert_close(block(x), first, rtol=1e-4, atol=1e-5)
        next(block.parameters()).data.mul_(2)
        found = block(x)
        with nnfast.backend("reference"):
            assert_close(block(x), found, rtol=1e-4, atol=1e-5)
        assert len(repeated) == 2
    assert copy.deepcopy(block) not in replay._REPLAYS
    alive = weakref.ref(block)
    del block
    repeated.clear()  # its snapshot holds weights, not the module
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("name", MODULES)
def test_a_module_does_not_outlive_its_last_user(name):
    _, swapped, x = pair(name)
    with torch.no_grad():
        for _ in range(3):
            swapped(x)
    alive = weakref.ref(swapped)
    del swapped
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("field", ["act", "residual", "bn", "x", "result"])
def test_what_was_not_expected_is_not_kept(field):
    _, swapped, x = pair("residual")
    with torch.no_grad():
        swapped(x)
        replay._REPLAYS[swapped].tried[fold.call_like(x)] = 4  # or the inner one would note them
        with notes.watching() as calls:
            y = swapped(x)
    expected = [
        (swapped.conv1, swapped.bn1, False, ("relu", 0.0)),
        (swapped.conv2, swapped.bn2, True, ("relu", 0.0)),
    ]
    assert replay._steps(x, expected, calls, y)
    other = {"act": "silu", "residual": None, "bn": swapped.bn1, "x": x.clone(), "result": y.clone()}
    calls[-1] = calls[-1]._replace(**{field: other[field]})
    assert not replay._steps(x, expected, calls, y)


def test_threads_may_see_a_change_at_once():
    """All of them ask, and run, while weights change."""
    _, swapped, x = pair("residual")
    warm(swapped, x)
    failed = []

    def work() -> None:
        try:
            with torch.no_grad():
                for i in range(50):
                    swapped(x)
                    if i % 5 == 0:
                        swapped.bn1.weight.mul_(1.0)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_notes_do_not_nest():
    with notes.watching() as outer:
        with notes.watching() as inner:
            pass
        notes.call(nn.ReLU(), torch.ones(1))
    assert not inner
    assert len(outer) == 1
    notes.call(nn.ReLU(), torch.ones(1))
    assert len(outer) == 1
