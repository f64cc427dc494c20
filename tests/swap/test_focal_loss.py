"""User-written focal losses and torchvision's RetinaNet: swapped, the same, and restored."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nnfast
from nnfast.core.op import triton_why_not
from nnfast.swap.seed_loss import RowsFocalLoss


class FocalLoss(nn.Module):
    def __init__(self, alpha=1, gamma=2):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, inputs, targets):
        ce_loss = F.cross_entropy(inputs, targets, reduction="none")
        pt = torch.exp(-ce_loss)
        focal_loss = self.alpha * (1 - pt) ** self.gamma * ce_loss
        return focal_loss.mean()


def inline(self, x, y):
    ce = nn.functional.cross_entropy(x, y, reduction="none")
    return torch.mean(ce * self.alpha * torch.pow(1 - (-ce).exp(), self.gamma))


def summed(self, x, y):
    ce = F.cross_entropy(x, y, reduction="none", ignore_index=-100)
    return ((1 - torch.exp(-ce)).pow(self.gamma) * ce).sum()


def rows(self, x, y):
    ce = F.cross_entropy(x, y, reduction="none")
    return self.alpha * (1 - torch.exp(-ce)) ** self.gamma * ce


def other_names(self, x, y):
    ce = F.cross_entropy(x, y, reduction="none")
    return (self.factor * (1 - torch.exp(-ce)) ** self.gamma * ce).sum()


def with_forward(forward, **attributes):
    cls = type("MyFocalLoss", (nn.Module,), {"forward": forward, "__module__": __name__})
    made = cls()
    for name, value in {"alpha": 0.25, "factor": 0.75, "gamma": 1.5, **attributes}.items():
        setattr(made, name, value)
    return made


def results(loss, x, targets):
    x = x.detach().requires_grad_()
    y = loss(x, targets)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize(
    "make",
    [
        FocalLoss,
        lambda: FocalLoss(0.5, 3),
        *(lambda f=f: with_forward(f) for f in (inline, rows)),
        lambda: with_forward(summed),
        lambda: with_forward(rows, weight=torch.ones(5), reduction="mean"),
    ],
    ids=["seed", "seed with arguments", "inline", "rows", "sum", "attributes it does not read"],
)
def test_same_numbers_and_back(make):
    loss = make()
    cls, before = type(loss), dict(vars(loss))
    x, targets = torch.randn(9, 5), torch.arange(9) % 5
    targets[3] = -100  # a row of loss 0, which the seed's mean counts
    expected = (
        results(loss, x, targets),
        results(loss, x[:, :, None, None].expand(9, 5, 2, 3), targets[:, None, None].expand(9, 2, 3)),
    )
    report = nnfast.swap(nn.Sequential(loss))
    assert [entry.new for entry in report.replaced] == ["nnfast.functional.softmax_focal_loss"]
    assert isinstance(loss, RowsFocalLoss)
    assert loss.state_dict() == {}
    assert repr(loss) == f"{cls.__name__}()"
    for backend in ("cpu", *["triton"] * (not triton_why_not("cpu")), "aten", "reference"):
        if not nnfast.explain("softmax_focal_loss", x, targets).reasons[backend] or backend != "cpu":
            with nnfast.backend(backend):
                torch.testing.assert_close(results(loss, x, targets), expected[0])
    spatial = results(loss, x[:, :, None, None].expand(9, 5, 2, 3), targets[:, None, None].expand(9, 2, 3))
    torch.testing.assert_close(spatial, expected[1])
    copies = [copy.deepcopy(loss)]
    if cls is FocalLoss:
        copies.append(pickle.loads(pickle.dumps(loss)))
    for each in (loss, *copies):
        assert isinstance(each, cls)
        assert type(each) is type(loss)
        torch.testing.assert_close(results(each, x, targets), expected[0])
    assert nnfast.swap(loss).replaced == ()
    nnfast.restore(loss)
    assert type(loss) is cls
    assert vars(loss) == before
    assert torch.equal(loss(x, targets), expected[0][0])


ATTRIBUTES = {
    "another gamma": ("gamma", 3),
    "a negative gamma": ("gamma", -0.5),
    "a tensor gamma": ("gamma", torch.tensor(1.5)),
    "a learnt gamma": ("gamma", nn.Parameter(torch.tensor(1.5))),
    "another alpha": ("alpha", 0.5),
    "alpha of rows": ("alpha", torch.linspace(0, 1, 9)),
    "alpha of as many rows as classes": ("alpha", torch.linspace(0, 1, 5)),
    "a reduction": ("reduction", "sum"),
    "a weight": ("weight", torch.linspace(0, 1, 5)),
    "smoothing": ("label_smoothing", 0.1),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
@pytest.mark.parametrize("make", [FocalLoss, lambda: with_forward(rows), lambda: with_forward(other_names)])
def test_attributes_set_later(make, name):
    loss = make()
    assert nnfast.swap(loss).replaced
    twin = make()
    attribute, value = ATTRIBUTES[name]
    for each in (loss, twin):
        setattr(each, attribute, value)
        if attribute == "alpha":
            each.factor = value
    rows = 5 if name == "alpha of as many rows as classes" else 9
    x, targets = torch.randn(rows, 5), torch.arange(rows) % 5
    torch.testing.assert_close(results(loss, x, targets), results(twin, x, targets))


def test_a_forward_replaced_on_the_class():
    loss, twin = (with_forward(inline) for _ in range(2))
    twin.__class__ = cls = type(loss)
    nnfast.swap(loss)
    x, targets = torch.randn(9, 5), torch.arange(9) % 5
    for forward in (summed, by_mode, inline):
        cls.forward = forward
        for each in (loss, copy.deepcopy(loss)):
            torch.testing.assert_close(results(each, x, targets), results(twin, x, targets))
        if forward is summed:  # a formula too, but another one
            (entry,) = nnfast.swap(twin).kept
            assert entry.reasons == ("its class had another forward when a module of it was swapped",)


def by_mode(self, x, y):
    ce = F.cross_entropy(x, y, reduction="none")
    return ce.mean() if self.training else ce


def weighted(self, x, y):
    ce = F.cross_entropy(x, y, reduction="none", label_smoothing=0.1)
    return (self.alpha * (1 - torch.exp(-ce)) ** self.gamma * ce).mean()


def of_the_mean(self, x, y):
    ce = F.cross_entropy(x, y)
    return self.alpha * (1 - torch.exp(-ce)) ** self.gamma * ce


def no_power(self, x, y):
    ce = F.cross_entropy(x, y, reduction="none")
    return (self.alpha * (1 - torch.exp(-ce)) * ce).mean()


def twice(self, x, y):
    ce = F.cross_entropy(x, y, reduction="none")
    return (self.alpha * self.alpha * (1 - torch.exp(-ce)) ** self.gamma * ce).mean()


def wrong_sign(self, x, y):
    ce = F.cross_entropy(x, y, reduction="none")
    return (self.alpha * (1 - torch.exp(ce)) ** self.gamma * ce).mean()


def swapped_arguments(self, x, y):
    ce = F.cross_entropy(y, x, reduction="none")
    return (self.alpha * (1 - torch.exp(-ce)) ** self.gamma * ce).mean()


def with_helper(self, x, y):
    return results(x, y, y)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: with_forward(by_mode), "it uses training"),
        (lambda: with_forward(weighted), "calls cross_entropy with"),
        (lambda: with_forward(of_the_mean), "calls cross_entropy with"),
        (lambda: with_forward(no_power), "it is alpha * cross_entropy(x, target) * sub("),
        (lambda: with_forward(twice), "it is "),
        (lambda: with_forward(wrong_sign), "it is "),
        (lambda: with_forward(swapped_arguments), "it is "),
        (lambda: with_forward(with_helper), "it uses results"),
        (lambda: with_forward(lambda self, x: x), "does not take inputs and targets alone"),
        (lambda: FocalLoss(torch.rand(5)), "it uses alpha"),
        (lambda: FocalLoss(gamma=-1), "its gamma is -1"),
    ],
)
def test_what_only_looks_alike_is_kept_with_the_reason(make, reason):
    loss = make()
    cls = type(loss)
    report = nnfast.swap(nn.Sequential(loss))
    assert report.replaced == ()
    (entry,) = report.kept
    assert any(reason in text for text in entry.reasons), entry.reasons
    assert type(loss) is cls


@pytest.fixture(scope="module")
def detection():
    pytest.importorskip("torchvision")
    from torchvision.models.detection import retinanet

    return retinanet


def retinanet_model(detection):
    torch.manual_seed(0)
    return detection.retinanet_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64
    ).train()


def losses(model):
    torch.manual_seed(1)
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 48)]
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0], [20.0, 8.0, 44.0, 60.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 2])} for _ in images]
    found = model(images, targets)
    found["classification"].backward()
    gradients = [p.grad.clone() for p in model.head.classification_head.parameters()]
    model.zero_grad()
    return found["classification"].detach(), gradients


def test_retinanet(detection):
    model, other = retinanet_model(detection), retinanet_model(detection)
    function, cls = detection.sigmoid_focal_loss, detection.RetinaNetClassificationHead
    method = cls.compute_loss
    expected = losses(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    report = nnfast.swap(model)
    nnfast.restore(model.backbone)  # its convolutions would round otherwise
    (entry,) = [e for e in report.replaced if "RetinaNet" in e.old]
    assert entry.names == ("head.classification_head",)
    head = model.head.classification_head
    assert isinstance(head, cls)
    assert type(head) is not cls
    assert head.compute_loss.__globals__["sigmoid_focal_loss"] is nnfast.functional.sigmoid_focal_loss
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    torch.testing.assert_close(losses(model), expected)
    with nnfast.backend("reference"):  # the loss is ours: it listens to what is forced
        torch.testing.assert_close(losses(model), expected)
    with nnfast.backend("cuda"), pytest.raises(nnfast.BackendError, match="sigmoid_focal_loss"):
        losses(model)
    # nothing outside the model has changed
    assert detection.sigmoid_focal_loss is function
    assert detection.RetinaNetClassificationHead is cls
    assert cls.compute_loss is method
    assert type(other.head.classification_head) is cls
    for copied in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert type(copied) is type(head)
    assert nnfast.swap(model.head).replaced == ()
    nnfast.restore(model)
    assert type(head) is cls
    assert all(map(torch.equal, losses(model)[1], expected[1]))


def test_a_head_whose_loss_is_not_torchvisions_is_kept(detection, monkeypatch):
    head = detection.RetinaNetClassificationHead(8, 1, 2)
    monkeypatch.setattr(detection, "sigmoid_focal_loss", lambda *_, **__: 0)
    (entry,) = [e for e in nnfast.swap(head).kept if "RetinaNet" in e.old]
    assert "does not call torchvision's sigmoid_focal_loss" in entry.reasons[0]
    head = detection.RetinaNetClassificationHead(8, 1, 2)
    head.compute_loss = lambda *_: 0
    monkeypatch.undo()
    (entry,) = [e for e in nnfast.swap(head).kept if "RetinaNet" in e.old]
    assert "compute_loss was set on this instance" in entry.reasons[0]
