"""The demo's rare classes: what is trained on, what recall means, what is printed."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nnfast
from nnfast.cli import _imbalance
from nnfast.cli._tasks import Samples, fashion_mnist


@pytest.fixture(scope="module")
def data():
    return fashion_mnist()


def test_rare_classes_are_rare(data):
    samples = _imbalance.imbalanced(data[0])
    counts = samples.targets.bincount(minlength=10).tolist()
    assert counts == [_imbalance.KEPT if label in _imbalance.RARE else 800 for label in range(10)]


def test_recall():
    targets = torch.arange(10).repeat(3)
    logits = F.one_hot(targets, 10).float()
    logits[10] = logits[20] = F.one_hot(torch.tensor(9), 10).float()  # two of class 0 are taken for 9
    found = _imbalance.recall(nn.Identity(), Samples(logits, targets))
    assert found == pytest.approx([1 / 3] + [1] * 9)


def test_same_seed_same_network(data):
    samples = _imbalance.imbalanced(data[0])
    runs = [_imbalance.train(F.cross_entropy, samples, 1, 2, 16, seed) for seed in (3, 3, 4)]
    weights = [run[0].weight for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_user_written_loss_is_swapped():
    assert len(nnfast.swap(_imbalance.FocalLoss()).replaced) == 1


def test_what_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(_imbalance, "LOGITS", ((64, 10),))
    _imbalance.show(torch.device("cpu"), epochs=1, steps=3, batch_size=32, seed=0)
    text = capsys.readouterr().out
    rows = re.findall(r"^  (\S.*?)  +(40|800) +(\d+\.\d)% +(\d+\.\d)%$", text, re.M)
    assert {name for name, *_ in rows} == set(_imbalance.CLASSES)
    assert [name for name, count, *_ in rows if count == "40"] == ["coat", "shirt", "sneaker"]
    means = re.search(r"mean of all +(\d+\.\d)% +(\d+\.\d)%", text).groups()
    for column, mean in enumerate(means, 2):
        assert float(mean) == pytest.approx(sum(float(row[column]) for row in rows) / 10, abs=0.11)
    (difference,) = re.findall(r"64 x 10 +\S+ ms +\S+ ms +\S+x +(\S+) +\w+$", text, re.M)
    assert float(difference) < 1e-6
    assert max(map(len, text.splitlines())) <= 110
