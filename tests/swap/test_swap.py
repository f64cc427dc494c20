"""What swap and restore leave alone, what they work with, and what they say."""

import copy
import inspect
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import nnfast
from nnfast.swap.rule import Proposal

PACKAGE = sys.modules["nnfast.swap"]  # nnfast.swap is the function


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Sixfold(nn.ReLU):
    """Not what it replaces: seen wherever it runs."""

    def forward(self, x):
        return x * 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.act, self.own = nn.Linear(4, 4), nn.SiLU(), Swish()

    def forward(self, x):
        return self.own(self.act(self.fc(x)))


@pytest.fixture
def sixfold(monkeypatch):
    """Plugs in a rule that replaces nn.ReLU by something that shows."""

    def rule(module):
        return [Proposal("ReLU", "Sixfold", {"__class__": Sixfold})] if type(module) is nn.ReLU else []

    monkeypatch.setattr(PACKAGE, "RULES", [rule, *PACKAGE.RULES])


def is_swapped(model):
    """Every SiLU and Swish of a Block runs nnfast's code."""
    return all(
        isinstance(m, nnfast.SiLU) for n, m in model.named_modules() if n.split(".")[-1] in ("act", "own")
    )


# What stays


def test_everything_about_a_module_stays():
    act = nn.SiLU(inplace=True).eval()
    act.note, act.tensor = "mine", torch.ones(2)
    act.register_buffer("seen", torch.zeros(3))
    act.named = nn.Identity()
    model = nn.Sequential(act)
    before, text = dict(vars(act)), repr(model)
    nnfast.swap(model)
    assert model[0] is act
    assert repr(model) == text
    assert {key: value for key, value in vars(act).items() if key in before} == before
    assert not act.training
    assert act.inplace
    x = torch.randn(4)
    assert act(x).data_ptr() == x.data_ptr()
    act.train()
    nnfast.restore(model)
    assert type(act) is nn.SiLU
    assert act.training  # set after the swap
    assert dict(vars(act)).keys() == before.keys()


REGISTER = {
    "forward pre": lambda m, log: m.register_forward_pre_hook(lambda m, a: log.append(m)),
    "forward pre kwargs": lambda m, log: m.register_forward_pre_hook(
        lambda m, a, k: log.append(m), with_kwargs=True
    ),
    "forward": lambda m, log: m.register_forward_hook(lambda m, a, out: log.append(m)),
    "forward kwargs": lambda m, log: m.register_forward_hook(
        lambda m, a, k, o: log.append(m), with_kwargs=True
    ),
    "forward always": lambda m, log: m.register_forward_hook(lambda m, a, o: log.append(m), always_call=True),
    "backward pre": lambda m, log: m.register_full_backward_pre_hook(lambda m, grad: log.append(m)),
    "backward": lambda m, log: m.register_full_backward_hook(lambda m, into, out: log.append(m)),
    "state_dict": lambda m, log: m.register_state_dict_post_hook(lambda m, *_: log.append(m)),
    "state_dict pre": lambda m, log: m.register_state_dict_pre_hook(lambda m, *_: log.append(m)),
    "load pre": lambda m, log: m.register_load_state_dict_pre_hook(lambda m, *_: log.append(m)),
    "load post": lambda m, log: m.register_load_state_dict_post_hook(lambda m, _: log.append(m)),
}


@pytest.mark.parametrize("kind", REGISTER)
@pytest.mark.parametrize("cls", [nn.SiLU, nn.Mish, Swish])
def test_hooks_fire_and_handles_work(kind, cls):
    model, log = nn.Sequential(nn.Linear(3, 3), cls()), []

    def fired():
        log.clear()
        model(torch.randn(2, 3)).sum().backward()
        model.load_state_dict(model.state_dict())
        return log

    handle = REGISTER[kind](model[1], log)
    nnfast.swap(model)
    assert fired() == [model[1]]
    late = REGISTER[kind](model[1], log)
    assert fired() == [model[1]] * 2
    nnfast.restore(model)
    assert fired() == [model[1]] * 2
    handle.remove()
    assert fired() == [model[1]]
    late.remove()
    assert fired() == []


def test_references_elsewhere_see_the_swap():
    act = nn.Mish()
    model = nn.Sequential(act, nn.ModuleList([act]), nn.ModuleDict({"same": act}))
    elsewhere, names, other_model = [act], {act: "known"}, nn.Sequential(act)
    (entry,) = nnfast.swap(model).replaced
    assert entry.names == ("0", "1.0", "2.same")
    assert model[0] is model[1][0] is model[2]["same"] is elsewhere[0]
    assert names[model[0]] == "known"
    assert isinstance(act, nnfast.Mish)
    assert nnfast.swap(other_model).replaced == ()  # one module: swapped wherever it is
    nnfast.restore(other_model)
    assert type(model[0]) is nn.Mish


def test_optimizer_goes_on():
    torch.manual_seed(0)
    model = Block()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.Adam(m.parameters()) for m in (model, twin)]
    for step in range(4):
        if step == 2:
            nnfast.swap(model)
        for m, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            m(torch.ones(2, 4)).sum().backward()
            optimizer.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


# What it works with


def test_wrapped_in_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, x = Block(), torch.randn(3, 4)
        expected = torch.autograd.grad(plain(x).sum(), list(plain.parameters()))
        before, after = copy.deepcopy(plain), copy.deepcopy(plain)
        nnfast.swap(before)
        before, after = (nn.parallel.DistributedDataParallel(model) for model in (before, after))
        report = nnfast.swap(after)
        assert [entry.names for entry in report.replaced] == [("module.act",), ("module.own",)]
        for model in (before, after, before):
            assert is_swapped(model)
            model.zero_grad()
            model(x).sum().backward()
            torch.testing.assert_close([p.grad for p in model.parameters()], list(expected))
        nnfast.restore(after)
        assert type(after.module.act) is nn.SiLU
        after(x)
    finally:
        torch.distributed.destroy_process_group()


def test_compile_after_swap():
    model, x = Block(), torch.randn(3, 4)
    expected = model(x)
    nnfast.swap(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    compiled(x).sum().backward()
    with nnfast.backend("cuda"), pytest.raises(Exception, match="cuda"):
        compiled(x)  # so nnfast was asked


@pytest.mark.parametrize("how", ["function", "method", "child", "grandchild"])
def test_swap_after_compile(sixfold, how):
    class Pair(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x))

    inner = Pair(nn.Linear(4, 4), nn.ReLU())
    model = nn.Sequential(inner, nn.Identity()) if how == "grandchild" else inner
    x = torch.randn(3, 4)
    if how == "method":
        model.compile(fullgraph=True, backend="aot_eager")
    elif how == "child":
        inner[1] = torch.compile(inner[1], fullgraph=True, backend="aot_eager")
    else:
        model = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = inner[0](x)
    for _ in range(8):  # guards change their ways after some calls
        torch.testing.assert_close(model(x), expected.relu())
    for _ in range(2):
        nnfast.swap(model)
        for _ in range(8):
            torch.testing.assert_close(model(x), expected * 6)
        nnfast.restore(model)
        for _ in range(8):
            torch.testing.assert_close(model(x), expected.relu())


def test_fx_graph_modules(sixfold):
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.SiLU()), torch.randn(3, 4)
    traced = torch.fx.symbolic_trace(model)
    report = nnfast.swap(traced)
    assert [entry.names for entry in report.replaced] == [("1",), ("2",)]
    torch.testing.assert_close(traced(x), F.silu(model[0](x) * 6))
    traced.recompile()
    torch.testing.assert_close(traced(x), F.silu(model[0](x) * 6))
    nnfast.restore(traced)
    torch.testing.assert_close(traced(x), F.silu(model[0](x).relu()))


@pytest.mark.filterwarnings("ignore:`?torch.jit")
@pytest.mark.parametrize(
    "script", [torch.jit.script, partial(torch.jit.trace, example_inputs=torch.ones(1, 4))]
)
def test_script_modules_are_kept(script):
    model = nn.Sequential(script(nn.Sequential(nn.SiLU(), nn.Mish())), nn.SiLU())
    report = nnfast.swap(model)
    assert [entry.names for entry in report.replaced] == [("1",)]
    assert [entry.names for entry in report.kept] == [("0.0",), ("0.1",)]
    assert all("code is fixed" in entry.reasons[0] for entry in report.kept)
    model(torch.ones(1, 4))


def test_parametrized_modules():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.SiLU(), nn.Mish())
    model[2].register_parameter("scale", nn.Parameter(torch.ones(1)))
    parametrize.register_parametrization(model[2], "scale", nn.Identity())
    x = torch.randn(2, 4)
    expected = model(x)
    report = nnfast.swap(model)
    assert [entry.names for entry in report.replaced] == [("1",)]
    assert "it is a subclass of torch.nn.Mish" in report.kept[0].reasons[0]
    torch.testing.assert_close(model(x), expected)
    assert parametrize.is_parametrized(model[0])


def test_subclasses_are_kept():
    class Scaled(nn.SiLU):
        def forward(self, x):
            return 2 * super().forward(x)

    class Named(nn.Mish):
        pass

    report = nnfast.swap(nn.Sequential(Scaled(), Named()))
    assert report.replaced == ()
    assert [entry.reasons for entry in report.kept] == [
        ("it is a subclass of torch.nn.SiLU with its own forward",),
        ("it is a subclass of torch.nn.Mish",),
    ]


def test_functions_held_as_attributes():
    model = nn.Linear(2, 2)
    model.act, model.act2, model.other, model.part = F.silu, F.mish, F.relu, partial(F.silu, inplace=True)
    model.functions = [F.silu]
    before = dict(vars(model))
    report = nnfast.swap(nn.Sequential(model))
    assert [(*entry.names, entry.old, entry.new) for entry in report.replaced] == [
        ("0.act", "torch.nn.functional.silu", "nnfast.functional.silu"),
        ("0.act2", "torch.nn.functional.mish", "nnfast.functional.mish"),
    ]
    assert [entry.names for entry in report.kept] == [("0.part",)]
    assert (model.act, model.act2, model.other) == (nnfast.functional.silu, nnfast.functional.mish, F.relu)
    model.act2 = F.relu  # the user's own word counts
    nnfast.restore(model)
    assert dict(vars(model)) == {**before, "act2": F.relu}


def test_functions_held_by_what_is_replaced_too():
    """What a rule says of the module is no reason to pass its attributes by."""
    models = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), nn.MultiheadAttention(4, 2)]
    models += [nnfast.MultiheadAttention(4, 2), nn.TransformerEncoderLayer(4, 2, 4)]
    for model in models:
        cls = type(model)
        model.act, model.part = F.silu, partial(F.mish)
        report = nnfast.swap(model)
        assert [e.new for e in report.replaced if e.names == ("act",)] == ["nnfast.functional.silu"]
        assert [e.names for e in report.kept] == [("part",)]
        assert hasattr(type(model), "nnfast_op")
        assert model.act is nnfast.functional.silu
        assert nnfast.swap(model).replaced == ()
        nnfast.restore(model)
        assert type(model) is cls
        assert model.act is F.silu


def test_a_hub_of_transformers_instances_and_functions():
    activations = pytest.importorskip("transformers.activations")
    model = nn.ModuleList([activations.ACT2FN[name] for name in ("silu", "swish", "mish", "gelu")])
    model[2].act = model[2]._mish_python
    model.append(activations.ACT2FN["mish"])
    report = nnfast.swap(model)
    assert [entry.names for entry in report.replaced] == [("0",), ("1",), ("4",)]
    assert [entry.reasons for entry in report.kept] == [("its act is not torch.nn.functional.mish",)]


def test_timm_factories():
    timm = pytest.importorskip("timm")
    stray = timm.layers.Mish()
    stray.inplace = True
    assert "true attribute inplace" in nnfast.swap(stray).kept[0].reasons[0]
    assert nnfast.swap(timm.layers.Swish(inplace=True)).kept == ()
    names = ("silu", "swish", "mish", "hard_swish", "hard_mish", "relu")
    report = nnfast.swap(nn.ModuleList([timm.layers.get_act_layer(name)() for name in names]))
    assert [entry.names for entry in report.replaced] == [("0",), ("1",), ("2",)]
    assert report.kept == ()


def test_no_library_is_imported_for_a_model_without_it():
    code = "import sys, torch, nnfast; nnfast.swap(torch.nn.SiLU()); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "nnfast.swap.timm" in loaded
    assert not {"timm", "transformers"} & {*loaded}


# When it goes wrong


@pytest.mark.parametrize("function", [nnfast.swap, nnfast.restore])
@pytest.mark.parametrize(
    ("model", "named"), [([nn.SiLU()], "a list"), (nn.SiLU, "the class torch.nn.SiLU"), (None, "a NoneType")]
)
def test_not_a_module(function, model, named):
    with pytest.raises(TypeError, match=rf"nnfast.{function.__name__}: model is {named}; it needs to be"):
        function(model)


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    class Slots(nn.Module):
        __slots__ = ("one",)

    def layout(module):
        return [Proposal("", "", {"__class__": Slots})] if isinstance(module, nn.Tanh) else []

    def explode(module):
        if isinstance(module, nn.Tanh):
            raise RuntimeError("layout")
        return []

    model = nn.Sequential(nn.SiLU(), Swish(), nn.Linear(2, 2), nn.Tanh())
    model[2].act = F.silu
    for rule in (layout, explode):
        monkeypatch.setattr(PACKAGE, "RULES", [*PACKAGE.RULES, rule])
        before = [(type(module), dict(vars(module))) for module in model.modules()]
        with pytest.raises((TypeError, RuntimeError), match="layout"):
            nnfast.swap(model)
        assert [(type(module), dict(vars(module))) for module in model.modules()] == before


def test_restore_says_when_a_class_has_changed_since():
    model = nn.Sequential(nn.Mish(), nn.SiLU())
    nnfast.swap(model)
    model[1].register_parameter("scale", nn.Parameter(torch.ones(1)))
    parametrize.register_parametrization(model[1], "scale", nn.Identity())
    with pytest.raises(RuntimeError, match=r"1 was made a nnfast.SiLU by swap and has since become"):
        nnfast.restore(model)
    assert isinstance(model[0], nnfast.Mish)
    parametrize.remove_parametrizations(model[1], "scale")
    nnfast.restore(model)
    assert type(model[1]) is nn.SiLU


# What it says


def test_report_reads_well():
    class BetaSwish(nn.Module):
        def __init__(self):
            super().__init__()
            self.beta = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x * torch.sigmoid(self.beta * x)

    class Plain(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x)

    BetaSwish.__module__ = Plain.__module__ = Plain.forward.__module__ = "my"
    model = nn.Sequential(
        *(nn.ModuleDict({"act": nn.SiLU(), "own": Plain()}) for _ in range(12)), BetaSwish()
    )
    model.stem, model.tail, model.head, model.last = (nn.SiLU() for _ in range(4))
    assert str(nnfast.swap(model)) == inspect.cleandoc(
        """
        nnfast.swap: 42 modules looked at, 28 replaced, 1 kept
          replaced  16  torch.nn.SiLU -> nnfast.SiLU  at *.act, stem, tail and 2 places more
          replaced  12  my.Plain -> nnfast.Swish      at *.own
          kept       1  my.BetaSwish                  at 12
                        - forward is not exactly x * sigmoid(x) or x * tanh(softplus(x)): it uses beta
                        - it has parameters of its own: beta
        """
    )
    assert str(nnfast.swap(nn.Linear(1, 1))) == "nnfast.swap: 1 module looked at, 0 replaced, 0 kept"
    assert str(nnfast.swap(nn.Mish())).endswith("torch.nn.Mish -> nnfast.Mish  at the model itself")
