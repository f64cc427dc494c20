"""Chains of convolution, batch norm, sum and activation: real networks stay the same."""

import copy
import inspect
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks
from torch.nn.utils import parametrizations, prune

import nnfast
from nnfast.conv_bn_act import blocks
from nnfast.swap import chain
from tests import torchvision_operators  # noqa: F401 - before torchvision


class Residual(nn.Module):
    """The seed's block, in the spelling given."""

    def __init__(self, inside, outside, stride=1, bias=True):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=bias)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=bias)
        self.bn2 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=bias), nn.BatchNorm2d(outside)
            )

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return torch.relu(out)


class Functional(Residual):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out = self.shortcut(x) + out
        return F.relu(out)


class ShortcutFirst(Residual):
    def forward(self, x):
        identity = self.shortcut(x)
        out = self.bn1(self.conv1(x)).relu()
        out = torch.add(self.bn2(self.conv2(out)), identity)
        return self.relu(out)


class ByMethod(Residual):
    def branch(self, x):
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))

    def forward(self, x):
        return self.relu(self.shortcut(x).add(self.branch(x)))


class Skips(nn.Module):
    """Sums inside a branch that is added."""

    def __init__(self, width):
        super().__init__()
        for i in range(3):
            self.add_module(f"conv{i}", nn.Conv2d(width, width, 3, padding=1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.bn0(self.conv0(x))
        a = self.bn1(self.conv1(y))
        b = self.bn2(self.conv2(y))
        return b + x + a


class Conv(nn.Module):
    """YOLO's."""

    def __init__(self, inside, outside, k=1, s=1, act=None):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(outside)
        self.act = nn.SiLU() if act is None else act

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class CSP(nn.Module):
    """Holds a function, a list, and a branch of chains."""

    def __init__(self, width):
        super().__init__()
        self.act, self.use = F.leaky_relu, True
        self.many = nn.ModuleList([Conv(width, width, 3, act=nn.Mish()), Conv(width, width)])
        self.conv, self.bn = nn.Conv2d(width, width, 1), nn.BatchNorm2d(width)

    def forward(self, x):
        y = x
        for layer in self.many:
            y = layer(y)
        y = torch.cat((y, self.act(self.bn(self.conv(x)), 0.2)), 1)
        if self.use:
            y = y[:, ::2] * 0.5
        return y


def yolo():
    head = nn.Sequential(
        OrderedDict(
            a=nn.Conv2d(16, 8, 1), b=nn.BatchNorm2d(8), c=nn.LeakyReLU(0.1), d=nn.BatchNorm2d(8), e=nn.Mish()
        )
    )
    tail = nn.Sequential(
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.GELU(), nn.ReLU(inplace=True), nn.BatchNorm2d(8)
    )
    return nn.Sequential(
        Conv(3, 16, 3, 2), CSP(16), head, tail, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


def seed(*spellings):
    return nn.Sequential(*(kind(*(3, 8, 2) if at == 0 else (8, 8)) for at, kind in enumerate(spellings)))


def tv(name, **config):
    models = pytest.importorskip("torchvision").models
    return getattr(models, name)(num_classes=5, **config)


def tv_blocks(**config):
    resnet = pytest.importorskip("torchvision").models.resnet
    return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=5, **config)


def timm_model(name, **config):
    return pytest.importorskip("timm").create_model(name, pretrained=False, num_classes=5, **config)


class Pooled(nn.Module):
    """transformers' ResNet."""

    def __init__(self, kind):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1], "layer_type": kind}
        self.model = transformers.ResNetModel(transformers.ResNetConfig(**sizes))

    def forward(self, x):
        return self.model(x).pooler_output


MODELS = {
    "seed": lambda: seed(Residual, Residual),
    "spellings": lambda: seed(Functional, ShortcutFirst, ByMethod, Functional),
    "spellings, projections": lambda: nn.Sequential(
        *(k(3, 3, 2) for k in (Functional, ShortcutFirst, ByMethod))
    ),
    "skips": lambda: Skips(3),
    "yolo": yolo,
    "tv resnet18": lambda: tv("resnet18"),
    "tv resnet50": lambda: tv("resnet50"),
    "tv resnext": lambda: tv_blocks(groups=32, width_per_group=4),
    "tv wide": lambda: tv_blocks(width_per_group=128),
    "tv mobilenet": lambda: tv("mobilenet_v2", dropout=0.0),
    "tv efficientnet": lambda: tv("efficientnet_b0", dropout=0.0, stochastic_depth_prob=0.0),
    "tv vgg_bn": lambda: nn.Sequential(tv("vgg11_bn").features, nn.Flatten()),
    "timm resnet18": lambda: timm_model("resnet18"),
    "timm resnet26d": lambda: timm_model("resnet26d"),
    "timm seresnet": lambda: timm_model("seresnet50", drop_path_rate=0.1, layers=(1, 1, 1, 1)),
    "timm cspdarknet53": lambda: timm_model("cspdarknet53"),
    "timm efficientnet_b0": lambda: timm_model("efficientnet_b0"),
    "transformers basic": lambda: Pooled("basic"),
    "transformers bottleneck": lambda: Pooled("bottleneck"),
}
SMALL = ["seed", "yolo", "tv resnet18", "timm efficientnet_b0", "transformers bottleneck"]
CACHE = {}


def sample(name):
    if name not in CACHE:
        torch.manual_seed(0)
        CACHE[name] = MODELS[name]().double(), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model, x = CACHE[name]
    return copy.deepcopy(model), x


@pytest.fixture
def fused(monkeypatch):
    """Counts calls of the fused functions: units of convolutions, and batch norms alone."""
    calls = []
    run, normalise = blocks.run, chain.normalise
    monkeypatch.setattr(blocks, "run", lambda unit, *a, **k: calls.append(unit.conv) or run(unit, *a, **k))
    monkeypatch.setattr(chain, "normalise", lambda bn, *a, **k: calls.append(bn) or normalise(bn, *a, **k))
    return calls


def step(model, x):
    """Output and gradients of one step; the random numbers are the same each time."""
    torch.manual_seed(1)
    x = x.clone().requires_grad_()
    out = model(x * 1)
    wanted = [x, *model.parameters()]
    return [out, *torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)]


def assert_same(model, twin, x):
    """In training, in eval mode, in training again, and with nobody looking."""
    for mode in (True, False, True):
        model.train(mode), twin.train(mode)
        ours, theirs = step(model, x), step(twin, x)
        scale = max(t.abs().max() for t in theirs[1:] if t is not None)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9 * float(scale))
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), twin.eval()(x), rtol=1e-7, atol=1e-9)


# The same


@pytest.mark.parametrize("name", MODELS)
def test_same_numbers(name, fused):
    model, x = sample(name)
    twin = copy.deepcopy(model)
    before = {key: value.data_ptr() for key, value in model.state_dict().items()}
    report = nnfast.swap(model)
    assert report.kept == ()
    assert any("conv+bn" in entry.new for entry in report.replaced)
    assert {key: value.data_ptr() for key, value in model.state_dict().items()} == before
    assert [type(m).__name__ for m in model.modules() if isinstance(m, chain.Fused)] == [
        type(n).__name__
        for m, n in zip(model.modules(), twin.modules(), strict=True)
        if isinstance(m, chain.Fused) and isinstance(m, type(n))
    ]
    assert_same(model, twin, x)
    assert fused


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("lower", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_inference_in_other_types(name, lower, layout):
    exact, x = sample(name)
    exact.train()(x)  # statistics of its own
    exact.eval()
    model = copy.deepcopy(exact).to(lower).to(memory_format=layout)
    x32 = x.to(lower).contiguous(memory_format=layout)
    with torch.no_grad():
        truth, torchs = exact(x), model(x32)
        nnfast.swap(model)
        ours = model(x32)
    assert ours.dtype == lower
    assert ours.stride() == torchs.stride()
    error, allowed = (ours - truth).norm(), 2 * (torchs - truth).norm()
    assert error <= allowed + 1e-6 * truth.norm()


@pytest.mark.parametrize("name", SMALL)
def test_every_convolution_is_fused(name, fused):
    model, x = sample(name)
    nnfast.swap(model)
    model.eval()(x)
    normed = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    wanted = {"yolo": len(normed) - 1}.get(name, len(normed))  # one ends in nothing
    assert len(fused) == wanted - (name in ("seed", "tv resnet18", "transformers bottleneck")) * _projections(
        model
    )


def _projections(model):
    """Convolutions around a block: they run with its last one."""
    return sum(
        name.endswith(("shortcut", "downsample")) and len(list(m.children())) == 2
        for name, m in model.named_modules()
    )


def test_residual_blocks_run_as_one(monkeypatch):
    seen, whole = [], blocks.chain

    def spy(units, x, residual=None, projection=None):
        seen.append((len(units), residual is x, projection is not None))
        return whole(units, x, residual, projection)

    monkeypatch.setattr(blocks, "chain", spy)
    model, x = sample("seed")
    nnfast.swap(model)
    model.eval()(x)
    assert seen == [(2, False, True), (2, True, False)]


# Swapped and back


@pytest.mark.parametrize("name", SMALL)
def test_twice_and_back(name):
    def state(model):
        return [(key, type(m), dict(vars(m))) for key, m in model.named_modules()]

    model, _ = sample(name)
    before, text = state(model), repr(model)
    first = nnfast.swap(model)
    swapped = state(model)
    assert repr(model) == text
    assert nnfast.swap(model).replaced == ()
    assert state(model) == swapped
    nnfast.restore(model)
    assert state(model) == before
    assert nnfast.swap(model) == first


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(name, how, fused):
    model, x = sample(name)
    expected = model.eval()(x)
    classes = [type(m) for m in model.modules()]
    nnfast.swap(model)
    twin = how(model)
    torch.testing.assert_close(twin(x), expected)
    assert fused
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    nnfast.restore(twin)
    assert [type(m) for m in twin.modules()] == classes
    assert isinstance(model, chain.Fused) or any(isinstance(m, chain.Fused) for m in model.modules())


def test_isinstance_and_signature_stay():
    models = pytest.importorskip("torchvision").models
    model = models.resnet18()
    signature = inspect.signature(model.forward)
    nnfast.swap(model)
    assert isinstance(model, models.ResNet)
    assert isinstance(model.layer1[0], models.resnet.BasicBlock)
    assert inspect.signature(model.forward) == signature


def test_a_sequential_stays_one(fused):
    conv, bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    model, x = (
        nn.Sequential(conv, bn, nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        torch.randn(2, 3, 8, 8),
    )
    nnfast.swap(model)
    part = model[:3]
    assert isinstance(part, nn.Sequential)
    assert len(part) == 3
    assert list(part) == [conv, bn, model[2]]
    torch.testing.assert_close(part.eval()(x), F.relu(bn(conv(x))))
    assert fused.pop() is conv
    nnfast.restore(part)
    assert type(part) is nn.Sequential
    model.append(nn.SiLU())
    model[2] = nn.Tanh()
    del model[0]
    model.insert(0, conv)
    torch.testing.assert_close(model.eval()(x), F.silu(model[4](model[3](torch.tanh(bn(conv(x)))))))
    assert [type(m) for m in model + nn.Sequential(nn.Tanh())] == [type(m) for m in model] + [nn.Tanh]
    nnfast.restore(model)
    assert type(model) is nn.Sequential


# What changes after the swap is honoured


def residual(kind=Residual):
    torch.manual_seed(0)
    model = kind(3, 3)
    nnfast.swap(model)
    assert isinstance(model, chain.Fused)
    return model.eval(), torch.randn(2, 3, 6, 6)


@pytest.mark.parametrize("name", ["conv1", "bn1", "relu", "conv2", "bn2", "shortcut"])
@pytest.mark.parametrize("kind", ["forward", "forward pre", "backward"])
def test_hooks_fire(name, kind):
    model, x = residual(ByMethod)
    log, child = [], getattr(model, name)
    if kind == "forward":
        child.register_forward_hook(lambda m, args, out: log.append(m) or out + 1)
    elif kind == "forward pre":
        child.register_forward_pre_hook(lambda m, args: log.append(m))
    else:
        child.register_full_backward_hook(lambda m, into, out: log.append(m))
    model.relu.inplace = False  # which backward hooks do not take
    out = model(x.requires_grad_() * 1)
    torch.testing.assert_close(out, ByMethod.forward(model, x))
    log.clear()
    model(x * 1).sum().backward()
    assert log == [child] * (1 + (name == "relu"))


@pytest.mark.parametrize("watched", [None, 1, 2])
@pytest.mark.parametrize("act", [nn.SiLU, nn.Mish])
def test_in_place_after_a_batch_norm_in_training(act, watched):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), act(inplace=True)).train()
    swapped = copy.deepcopy(model)
    nnfast.swap(swapped)
    seen, results = [], []
    x = torch.randn(2, 3, 8, 8)
    for each in (model, swapped):
        if watched:
            each[watched].register_forward_hook(lambda _, __, y: seen.append(y))
        y = each(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(each.parameters()))])
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(seen, [found[0] for found in results] if watched else [])


EVERYTHING = {
    "forward pre": (hooks.register_module_forward_pre_hook, lambda log: lambda m, args: log.append(m)),
    "forward": (hooks.register_module_forward_hook, lambda log: lambda m, args, out: log.append(m)),
    "backward": (
        hooks.register_module_full_backward_hook,
        lambda log: lambda m, into, out: log.append(m),
    ),
}


@pytest.mark.parametrize("kind", EVERYTHING)
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Mish])
@pytest.mark.parametrize("block", [False, True])
def test_hooks_on_everything(act, train, kind, block):
    if block:
        model, x = residual(ByMethod)
        model.relu = act()
    else:
        model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), act()), torch.randn(2, 3, 6, 6)
        nnfast.swap(model)
    model.train(train)
    log = []
    register, hook = EVERYTHING[kind]
    with register(hook(log)):
        model(x.requires_grad_()).sum().backward()
    assert {*model.modules()} <= {*log}


def plain_attribute(module, name):
    """A tensor computed elsewhere in place of a parameter or buffer, as hypernetworks and MAML set it."""
    value = getattr(module, name).detach().double() * 2
    delattr(module, name)
    setattr(module, name, value.requires_grad_(name in ("weight", "bias")) * 1)


CHANGES = {
    "a plain weight": lambda m: plain_attribute(m.conv1, "weight"),
    "a plain bias": lambda m: plain_attribute(m.conv1, "bias"),
    "a plain gamma": lambda m: plain_attribute(m.bn2, "weight"),
    "a plain mean": lambda m: plain_attribute(m.bn1, "running_mean"),
    "another norm": lambda m: setattr(m, "bn1", nn.GroupNorm(1, 3)),
    "no norm": lambda m: setattr(m, "bn2", nn.Identity()),
    "another activation": lambda m: setattr(m, "relu", nn.Tanh()),
    "another shortcut": lambda m: setattr(m, "shortcut", nn.AvgPool2d(3, 1, 1)),
    "a longer shortcut": lambda m: m.shortcut.append(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(inplace=True))),
    "writes to its input": lambda m: setattr(m, "shortcut", nn.ReLU(inplace=True)),
    "a parametrization": lambda m: parametrizations.weight_norm(m.conv1),
    "pruning": lambda m: prune.l1_unstructured(m.conv2, "weight", 0.5),
    "a forward": lambda m: setattr(m.bn1, "forward", torch.sigmoid),
    "compiled": lambda m: m.conv2.compile(backend="eager"),
    "one norm for all": lambda m: (setattr(m, "bn2", m.bn1), setattr(m, "shortcut", m.bn1)),
    "a broadcast": lambda m: setattr(m, "shortcut", nn.AdaptiveAvgPool2d(1)),
    "synchronised": nn.SyncBatchNorm.convert_sync_batchnorm,
    "frozen": lambda m: [p.requires_grad_(False) for p in m.bn1.parameters()],
    "a training norm": lambda m: m.bn2.train(),
    "without statistics": lambda m: setattr(m, "bn1", nn.BatchNorm2d(3, track_running_stats=False)),
    "without parameters": lambda m: setattr(m, "bn1", nn.BatchNorm2d(3, affine=False, momentum=None)),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("train", [False, True])
def test_changes_after_the_swap(name, train):
    model, x = residual()
    twin = copy.deepcopy(model)
    for each in (model, twin):
        each.train(train)
        CHANGES[name](each)
        each.double()
    if name == "synchronised" and train:
        pytest.skip("torch's SyncBatchNorm needs a GPU to train")
    x = x.double()
    for _ in range(2):
        mine, theirs = x.clone(), x.clone()
        torch.testing.assert_close(model(mine), Residual.forward(twin, theirs), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(model.state_dict(), twin.state_dict())


def test_another_answer_means_the_own_forward():
    model = CSP(4)
    nnfast.swap(model)
    x = torch.randn(2, 4, 6, 6)
    for name, value in (("use", False), ("act", torch.tanh), ("many", nn.ModuleList([nn.Tanh()]))):
        setattr(model, name, value) if name != "act" else setattr(model, name, lambda y, slope: torch.tanh(y))
        torch.testing.assert_close(model.eval()(x), CSP.forward(model, x))


def doubled(self, x):
    return 2 * self.bn1(self.conv1(x))


def bare(self, x):
    return self.relu(self.bn2(self.conv2(x)))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_forward_replaced_on_the_class(nested, train, grad, fused):
    class Block(Residual):
        forward = bare

    torch.manual_seed(0)
    block, x = Block(3, 3), torch.randn(2, 3, 6, 6)
    tail = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)] if nested else []
    model = nn.Sequential(block, *tail).train(train) if nested else block.train(train)
    twin = copy.deepcopy(model)
    nnfast.swap(model)
    models = [model]
    with torch.set_grad_enabled(grad):
        for forward in (bare, doubled, bare):
            Block.forward = forward
            for _ in range(3):
                expected = twin.train(train)(x)
                for each in models:
                    torch.testing.assert_close(each(x), expected, rtol=1e-4, atol=1e-5)
            models += [copy.deepcopy(model), copy.deepcopy(twin)]
            nnfast.swap(models[-1])
        fused.clear()
        block.eval()(torch.randn(2, 3, 9, 9))
    assert fused == [block.conv2]


class Sequence(nn.Sequential):
    pass


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


KNOWN = {
    "a sequential": lambda: Sequence(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)),
    "timm's norm": lambda: pytest.importorskip("timm.layers").BatchNormAct2d(3),
    "an activation": Swish,
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", KNOWN)
def test_a_forward_set_on_an_instance_after_the_swap(kind, nested, train, grad):
    block, x = KNOWN[kind](), torch.randn(2, 3, 6, 6)
    first = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)] if nested else []
    model = nn.Sequential(*first, block).train(train)
    before = copy.deepcopy(model[: len(first)])
    nnfast.swap(model)
    with torch.set_grad_enabled(grad):
        for _ in range(3):
            model(x)
        block.forward = torch.tanh
        for _ in range(3):
            torch.testing.assert_close(model(x), torch.tanh(before(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["a sequential", "timm's norm"])  # an activation takes nnfast's class
def test_a_forward_replaced_on_a_class_that_a_rule_knows(kind, nested, train, grad, monkeypatch):
    torch.manual_seed(0)
    block = KNOWN[kind]()
    cls, x = type(block), torch.randn(2, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), block, nn.ReLU()) if nested else block
    twin = copy.deepcopy(model)
    nnfast.swap(model)

    def agree():
        for _ in range(3):
            expected = twin.train(train)(x)
            for each in models:
                torch.testing.assert_close(each.train(train)(x), expected, rtol=1e-4, atol=1e-5)

    with torch.set_grad_enabled(grad):
        models = [model]
        agree()
        models = [model, copy.deepcopy(model)]
        with monkeypatch.context() as patch:
            patch.setattr(cls, "forward", lambda self, x: torch.tanh(x), raising=False)
            agree()
            assert nnfast.explain(block, x).backend is None
            assert not nnfast.swap(copy.deepcopy(twin)).replaced
        agree()


def test_a_norm_of_timms_that_is_swapped_before_its_container():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), pytest.importorskip("timm.layers").BatchNormAct2d(3))
    nnfast.swap(model[1])
    report = nnfast.swap(model)
    assert (len(report.replaced), report.kept) == (1, ())


def test_a_sum_written_into_a_tensor_that_others_see():
    class IntoInput(Residual):
        def forward(self, x):
            identity = self.shortcut(x)
            identity += self.bn1(self.conv1(x))
            return torch.relu(identity) + x

    for train in (False, True):
        model, x = IntoInput(3, 3).train(train), torch.randn(2, 3, 6, 6)
        twin, other = copy.deepcopy(model), x.clone()
        nnfast.swap(model)
        torch.testing.assert_close(model(x), twin(other))
        torch.testing.assert_close(x, other)


def test_preactivation_in_place(fused):
    class PreAct(Residual):
        def forward(self, x):
            out = self.conv1(self.relu(self.bn1(x)))
            out = self.conv2(F.relu_(self.bn2(out)))
            return out + self.relu(x)

    model, x = PreAct(3, 3).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    twin = copy.deepcopy(model)
    report = nnfast.swap(model)
    assert report.replaced[0].new == "fused bn+relu, conv+bn+relu"
    for each in (model, twin):
        each.relu.inplace = False
    assert_same(model, twin, x)
    for each in (model, twin):
        each.relu.inplace = True
    mine, theirs = x.clone(), x.clone()
    torch.testing.assert_close(model(mine), twin(theirs))
    torch.testing.assert_close(mine, theirs)
    assert fused


def test_outside_of_images():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    nnfast.swap(model)
    with pytest.raises(ValueError, match="expected 4D"):
        model(torch.randn(3, 8, 8))
    with pytest.raises(RuntimeError, match="expected input"):
        model(torch.randn(1, 5, 8, 8))
    statistics = model[1].running_mean.clone()
    with pytest.raises(ValueError, match=r"[Ee]xpected more than 1 value|one value"):
        model(torch.randn(1, 3, 3, 3))
    torch.testing.assert_close(model[1].running_mean, statistics)


# What it works with


@pytest.mark.parametrize("name", ["tv resnet18", "yolo"])
def test_compile_trace_and_export(name, fused):
    model, x = sample(name)
    expected = model.eval()(x)
    nnfast.swap(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    assert not fused  # torch's own operations are what they see


def test_wrapped_in_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x = sample("seed")
        twin = copy.deepcopy(model)
        wrapped = nn.parallel.DistributedDataParallel(model)
        assert nnfast.swap(wrapped).kept == ()
        for each in (wrapped, twin):
            each(x).square().sum().backward()
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-9, rtol=1e-7)
    finally:
        torch.distributed.destroy_process_group()


def test_functional_call_and_vmap():
    model, x = sample("seed")
    model.eval()
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    expected = torch.func.grad(loss)(parameters, x)
    nnfast.swap(model)
    torch.testing.assert_close(torch.func.grad(loss)(parameters, x), expected)


def test_checkpointing():
    model, x = sample("seed")
    twin = copy.deepcopy(model)
    nnfast.swap(model)
    out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    out.square().sum().backward()
    twin(x).square().sum().backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-9, rtol=1e-7)
    torch.testing.assert_close(model[0].bn1.running_mean, twin[0].bn1.running_mean)


def test_autocast():
    model, x = sample("seed")
    model.float().eval()
    exact, x = copy.deepcopy(model).double()(x), x.float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torchs = model(x)
        nnfast.swap(model)
        ours = model(x)
    assert ours.dtype == torchs.dtype
    assert (ours - exact).norm() <= 2 * (torchs - exact).norm()


# What is kept, and why


def user(forward, **more):
    return type("Mine", (Residual,), {"forward": forward, "__module__": __name__, **more})(3, 3)


def by_mode(self, x):
    return self.bn1(self.conv1(x)) if self.training else x


def by_value(self, x):
    y = self.bn1(self.conv1(x))
    return y if y.sum() > 0 else x


def by_own_parameter(self, x):
    return self.bn1(self.conv1(x)) * self.scale


def by_weight(self, x):
    return self.bn1(self.conv1(x)) * self.conv1.weight.mean()


def with_state(self, x):
    self.seen = 1
    return self.bn1(self.conv1(x))


def with_print(self, x):
    print("here")
    return self.bn1(self.conv1(x))


def with_numbers(self, x):
    return self.bn1(self.conv1(x)) + torch.rand(1)


def with_try(self, x):
    try:
        return self.bn1(self.conv1(x)).nothing
    except Exception:
        return x


def with_with(self, x):
    with torch.no_grad():
        return self.bn1(self.conv1(x))


def with_inner(self, x):
    return (lambda y: self.bn1(self.conv1(y)))(x)


def with_is(self, x):
    y = self.bn1(self.conv1(x))
    return x if y is x else y


def with_isinstance(self, x):
    return self.bn1(self.conv1(x)) if isinstance(x, torch.Tensor) else x


def two_inputs(self, x, y):
    return self.bn1(self.conv1(x)) + y


def by_super(self, x):
    return self.bn1(self.conv1(x)) + super(Residual, self).forward(x)


def with_default(self, x, seen=[]):  # noqa: B006
    seen.append(1)
    return self.bn1(self.conv1(x))


SETTING = 1


def with_global(self, x):
    return self.bn1(self.conv1(x)) * SETTING


UNREADABLE = {
    by_mode: "it asks whether it is training",
    by_value: "it depends on a tensor's value or size (gt)",
    by_own_parameter: "it uses its Parameter scale",
    by_weight: "it uses conv1.weight",
    with_state: "with_state sets seen",
    with_print: "it uses print",
    with_numbers: "it calls torch.rand without its input",
    with_try: "with_try has a try or a with",
    with_with: "with_with has a try or a with",
    with_inner: "closure|inner function",
    with_is: "with_is asks whether two things are the same",
    with_isinstance: "it uses torch.Tensor",
    two_inputs: "forward needs more than one input: y",
    by_super: "it uses super",
    with_default: "with_default has defaults that can change",
    with_global: "it passes on SETTING|it uses SETTING",
}


@pytest.mark.parametrize("forward", UNREADABLE, ids=lambda f: f.__name__)
def test_forwards_that_do_more_are_kept(forward, capsys):
    model = user(forward)
    model.scale = nn.Parameter(torch.ones(1))
    before = type(model), dict(vars(model))
    report = nnfast.swap(model)
    assert report.replaced == ()
    (entry,) = report.kept
    assert any(wanted in entry.reasons[0] for wanted in UNREADABLE[forward].split("|"))
    assert (type(model), dict(vars(model))) == before
    assert capsys.readouterr().out == ""
    if forward is with_default:
        assert with_default.__defaults__ == ([],)


def test_every_reason_against_a_class():
    class Counting(Residual):
        def __init_subclass__(cls):
            raise AssertionError

        def __call__(self, x):
            return super().__call__(x)

    model = Counting(3, 3)
    model.forward = Residual.forward.__get__(model)
    (entry,) = nnfast.swap(model).kept
    assert entry.reasons == (
        "its forward was set on this instance",
        "its class defines __call__",
        "its class wants to know of subclasses (__init_subclass__)",
    )


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


def given_forward(module):
    module.forward = torch.relu
    return module


def conv(**options):
    return nn.Conv2d(3, 4, 3, **options)


UNFIT = {
    "0 is a torch.nn.Conv1d, not torch.nn.Conv2d itself": (nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)),
    "1 is a torch.nn.BatchNorm3d, not torch.nn.BatchNorm2d itself": (nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)),
    "1 is a torch.nn.GroupNorm, not": (conv(), nn.GroupNorm(2, 4)),
    "1 is a torch.nn.InstanceNorm2d, not": (conv(), nn.InstanceNorm2d(4)),
    "1 is a torch.nn.SyncBatchNorm, not": (conv(), nn.SyncBatchNorm(4)),
    f"1 is a {__name__}.OwnNorm, not": (conv(), OwnNorm(4)),
    "0 is a torch.nn.LazyConv2d, which has no shape yet": (nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)),
    "1 is a torch.nn.LazyBatchNorm2d, which has no shape yet": (conv(), nn.LazyBatchNorm2d()),
    "0 is parametrized: weight": (parametrizations.weight_norm(conv()), nn.BatchNorm2d(4)),
    "0 has forward pre hooks (as pruning": (prune.l1_unstructured(conv(), "weight", 0.5), nn.BatchNorm2d(4)),
    "1 has forward hooks": (conv(), hooked(nn.BatchNorm2d(4))),
    "1 has a forward that was set on this instance": (conv(), given_forward(nn.BatchNorm2d(4))),
}


@pytest.mark.parametrize("reason", UNFIT)
def test_pairs_that_only_look_alike_are_kept(reason):
    model = nn.Sequential(*UNFIT[reason], nn.Sigmoid())
    report = nnfast.swap(model)
    assert report.replaced == ()
    (entry,) = report.kept
    assert any(given.startswith(reason) for given in entry.reasons)
    assert type(model) is nn.Sequential


@pytest.mark.filterwarnings("ignore:`?torch.jit")
def test_scripted_and_traced_by_fx():
    plain = nn.Sequential(conv(), nn.BatchNorm2d(4))
    report = nnfast.swap(nn.Sequential(torch.jit.script(plain), torch.fx.symbolic_trace(plain)))
    assert report.replaced == ()
    half = nn.Sequential(torch.jit.script(conv()), nn.BatchNorm2d(4))
    assert nnfast.swap(half).kept[0].reasons == ("0 is a RecursiveScriptModule, whose code is fixed",)


def test_fused_in_the_part_that_can_be():
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))
    report = nnfast.swap(model)
    assert [entry.new for entry in report.replaced] == ["fused conv+bn+relu"]
    assert report.kept[0].reasons == ("4 is a torch.nn.GroupNorm, not torch.nn.BatchNorm2d itself",)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(model.eval()(x), nn.Sequential.forward(model, x))


def test_timm_drop_blocks_and_attention_are_called(fused):
    timm = pytest.importorskip("timm")
    block = timm.models.resnet.BasicBlock
    drop = timm.layers.DropBlock2d
    model = block(4, 4, attn_layer="se", drop_block=drop, drop_path=timm.layers.DropPath(0.5)).double()
    twin, x = copy.deepcopy(model), torch.randn(2, 4, 16, 16, dtype=torch.float64)
    (entry,) = [entry for entry in nnfast.swap(model).replaced if "BasicBlock" in entry.old]
    assert entry.new == "fused 2 conv+bn"  # in training; in eval mode the activation joins
    assert_same(model, twin, x)
    assert fused


# What it says


def test_report_reads_well():
    model = pytest.importorskip("torchvision").models.resnet18()
    assert str(nnfast.swap(model)) == inspect.cleandoc(
        """
        nnfast.swap: 68 modules looked at, 12 replaced, 0 kept
          replaced  5  torchvision.models.resnet.BasicBlock -> fused conv+bn+relu, conv+bn+add+relu           at layer*.*
          replaced  3  torchvision.models.resnet.BasicBlock -> fused conv+bn+relu, conv+bn+add(conv+bn)+relu  at layer*.*
          replaced  3  torch.nn.Sequential -> fused conv+bn                                                   at layer*.*.downsample
          replaced  1  torchvision.models.ResNet -> fused conv+bn+relu                                        at the model itself
        """  # noqa: E501
    )


def test_explain_tells_of_the_chain_that_the_input_enters():
    """Sequential, user-written block and timm's norm: what serves is what runs."""
    conv = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Mish()]
    model = nn.Sequential(*conv, Residual(8, 8), nn.Flatten())
    nnfast.swap(model)
    x, y = torch.randn(2, 3, 9, 9), torch.randn(2, 8, 9, 9)
    training = nnfast.explain(model, x)
    assert (training.op, training.backend) == ("conv_bn_act", "aten")
    assert "the statistics of the batch" in str(training.reasons["folded"])
    model.eval()
    with torch.no_grad():
        assert nnfast.explain(model, x).backend == nnfast.explain(model[3], y).backend == "folded"
    nothing = nn.Sequential(nn.ReLU(), *conv)
    nnfast.swap(nothing)
    assert nnfast.explain(nothing, x).backend is None
    assert "no convolution comes first" in str(nnfast.explain(nothing, x))
