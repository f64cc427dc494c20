"""Which user-written classes are Swish and Mish, and which only look alike."""

import functools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn, sigmoid
from torch.nn.functional import softplus

import nnfast

calls = []


def noisy(x):
    calls.append(x)
    return torch.sigmoid(x)


def module(forward, name="Act", base=nn.Module, **members):
    return type(name, (base,), {"forward": forward, "__module__": __name__, **members})()


SWISH = [
    lambda self, x: x * torch.sigmoid(x),
    lambda self, x: torch.sigmoid(x) * x,
    lambda self, x: x * x.sigmoid(),
    lambda self, x: x.sigmoid() * x,
    lambda self, x: x.mul(x.sigmoid()),
    lambda self, x: x.sigmoid().mul(x),
    lambda self, x: torch.mul(x, torch.sigmoid(x)),
    lambda self, x: x * F.sigmoid(x),
    lambda self, x: x * torch.nn.functional.sigmoid(x),
    lambda self, input: input * sigmoid(input),
    staticmethod(lambda x: x * torch.sigmoid(x)),
]
SILU = [
    lambda self, x: F.silu(x),
    lambda self, x: nn.functional.silu(x, inplace=False),
]
MISH = [
    lambda self, x: x * torch.tanh(F.softplus(x)),
    lambda self, x: torch.tanh(F.softplus(x)) * x,
    lambda self, x: x * F.softplus(x).tanh(),
    lambda self, x: x.mul(F.softplus(x).tanh()),
    lambda self, x: torch.mul(x, F.tanh(softplus(x))),
    lambda self, x: x * torch.tanh(torch.nn.functional.softplus(x)),
    lambda self, x: F.mish(x),
]


def in_two_steps(self, x):
    """With a docstring and a local."""
    gate = torch.sigmoid(x)
    return x * gate


@pytest.mark.parametrize("forward", [*SWISH, in_two_steps, *SILU, *MISH])
def test_spellings(forward):
    act = module(forward)
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)
    expected = act(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    (entry,) = nnfast.swap(act).replaced
    kind = nnfast.Mish if forward in MISH else nnfast.SiLU if forward in SILU else nnfast.Swish
    assert entry.new == f"nnfast.{kind.__name__}"
    assert type(act) is kind
    torch.testing.assert_close(act(x), expected)
    torch.testing.assert_close(torch.autograd.grad(act(x).sum(), x)[0], gradient)


@pytest.mark.parametrize("forward", [*SWISH, *SILU, *MISH])
@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.bool])
def test_integers_and_booleans(forward, kind):
    """Products give floats; torch's own functions, and softplus, take none."""
    written, act = module(forward), module(forward)
    assert nnfast.swap(act).replaced
    for x in (torch.arange(6), torch.arange(6)[:3:2], torch.arange(6).expand(50_000, 6), torch.tensor([])):
        x = x.to(kind)
        if forward in SWISH:
            torch.testing.assert_close(act(x), written(x))
            torch.testing.assert_close(torch.compile(act, backend="eager")(x), written(x))
        elif x.numel():
            for each in (written, act):
                with pytest.raises(NotImplementedError):
                    each(x)


def two_inputs(self, x, y=None):
    return x * torch.sigmoid(x)


def any_inputs(self, x, *more):
    return x * torch.sigmoid(x)


def any_names(self, x, **more):
    return x * torch.sigmoid(x)


def a_mode(self, x, *, mode=None):
    return x * torch.sigmoid(x)


def in_place(self, x):
    x *= torch.sigmoid(x)
    return x


def by_mode(self, x):
    return x * torch.sigmoid(x) if self.training else x


def with_effect(self, x):
    calls.append(1)
    return x * torch.sigmoid(x)


def sometimes(self, x):
    return x * torch.sigmoid(x) if x.sum() > 0 else x


def counted(self, x):
    self.count = 1
    return x * torch.sigmoid(x)


def inner(self, x):
    return (lambda y: y * torch.sigmoid(y))(x)


def swallow(self, x):
    try:
        return x.tan() * x
    except TypeError:
        return x * torch.sigmoid(x)


@functools.wraps(in_two_steps)
def decorated(self, x):
    return x * torch.sigmoid(x) + 1


def written_mish(x):
    return x * torch.tanh(F.softplus(x))


def my_silu(x, inplace=False):
    return x.mul_(x.sigmoid()) if inplace else x * x.sigmoid()


def hard_swish(x):
    return x * F.relu6(x + 3) / 6


def test_user_written_functions_held_as_attributes_are_kept_with_the_reason():
    model = nn.Linear(2, 2)
    model.mish, model.silu, model.other, model.hard = written_mish, my_silu, lambda x: 2 * x, hard_swish
    model.nameless, model.part, model.wrapped = (
        lambda x: F.silu(x),
        functools.partial(written_mish),
        F.hardswish,
    )
    model.made = eval("lambda x: x.mul(x.sigmoid())", {"__name__": None})
    before = dict(vars(model))
    report = nnfast.swap(model)
    by_hand = "it is user-written; give it nnfast.functional.{} by hand"
    assert report.replaced == ()
    assert {e.names[0]: e.reasons[0] for e in report.kept} == {
        "mish": by_hand.format("mish"),
        "silu": "it is not exactly x * sigmoid(x) or x * tanh(softplus(x)): it takes more than one input",
        "nameless": by_hand.format("silu"),
        "part": "it is a functools.partial; give it nnfast's function by hand",
        "made": by_hand.format("swish"),
    }
    assert vars(model) == before


UNLIKE = {
    "beta": (lambda self, x: x * torch.sigmoid(1.702 * x), "multiplies by 1.702"),
    "attribute": (lambda self, x: x * torch.sigmoid(self.beta * x), "it uses beta"),
    "helper": (lambda self, x: x * noisy(x), "it uses noisy"),
    "softplus beta": (lambda self, x: x * torch.tanh(F.softplus(x, 2)), "calls softplus with (2,)"),
    "softplus threshold": (lambda self, x: x * torch.tanh(F.softplus(x, threshold=0)), "{'threshold': 0}"),
    "silu in place": (lambda self, x: F.silu(x, inplace=True), "{'inplace': True}"),
    "silu in place, by position": (lambda self, x: F.silu(x, True), "{'inplace': True}"),
    "no sigmoid": (lambda self, x: x * x, "it is mul(x, x)"),
    "tanh of sigmoid": (lambda self, x: x * torch.tanh(torch.sigmoid(x)), "it is mul(tanh(sigmoid(x)), x)"),
    "cubed": (lambda self, x: x * x * torch.sigmoid(x), "mul("),
    "out": (lambda self, x: torch.mul(x, torch.sigmoid(x), out=x), "calls mul"),
    "identity": (lambda self, x: x, "it is x"),
    "none": (lambda self, x: None, "no formula of x"),
    "static with self": (staticmethod(in_two_steps), "more than one input"),
    "two inputs": (two_inputs, "more than one input"),
    "any inputs": (any_inputs, "more than one input"),
    "any names": (any_names, "more than one input"),
    "a mode": (a_mode, "more than one input"),
    "in place": (in_place, "writes to its input"),
    "by mode": (by_mode, "it uses training"),
    "effect": (with_effect, "it uses append, calls"),
    "branch": (sometimes, "it uses sum"),
    "state": (counted, "it uses count"),
    "inner": (inner, "an inner function"),
    "swallow": (swallow, "it uses TypeError, tan"),
    "decorated": (decorated, "decorated or a closure"),
    "not a function": (functools.partial(F.silu), "no forward of its own"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_formulas_that_only_look_alike_are_kept_with_the_reason(name):
    forward, reason = UNLIKE[name]
    act = module(forward, "MySwish")
    before = type(act)
    report = nnfast.swap(nn.Sequential(act))
    assert report.replaced == ()
    (entry,) = report.kept
    assert entry.names == ("0",)
    assert reason in entry.reasons[0], entry
    assert type(act) is before
    assert calls == []
    assert nnfast.swap(module(forward, "Layer")).kept == ()  # nothing about it suggests Swish


def with_members(**members):
    return module(in_two_steps, **members)


def with_state(what):
    act = module(in_two_steps)
    if what == "parameter":
        act.scale = nn.Parameter(torch.ones(1))
    elif what == "buffer":
        act.register_buffer("scale", torch.ones(1))
    elif what == "child":
        act.child = nn.Identity()
    elif what == "inplace":
        act.inplace = True
    elif what == "forward":
        act.forward = lambda x: x
    return act


class Parent(nn.Module):
    forward = in_two_steps


UNFIT = {
    "method": (lambda: with_members(flops=lambda self: 0), "also defines flops"),
    "call": (lambda: with_members(__call__=lambda self, x: x), "also defines __call__"),
    "setattr": (lambda: with_members(__getattr__=lambda self, name: 1), "also defines __getattr__"),
    "base": (lambda: module(in_two_steps, base=Parent), "derives from test_seed.Parent"),
    "parameter": (lambda: with_state("parameter"), "parameters of its own: scale"),
    "buffer": (lambda: with_state("buffer"), "buffers of its own: scale"),
    "child": (lambda: with_state("child"), "modules of its own: child"),
    "inplace": (lambda: with_state("inplace"), "true attribute inplace"),
    "forward": (lambda: with_state("forward"), "forward was set on this instance"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_the_right_formula_in_a_class_that_holds_more_is_kept(name):
    make, reason = UNFIT[name]
    act = make()
    report = nnfast.swap(act)
    assert report.replaced == ()
    assert [reason in text.replace(f"{__name__}.", "test_seed.") for text in report.kept[0].reasons] == [True]


def test_every_reason_is_given():
    act = with_members(flops=1)
    act.child, act.inplace = nn.Identity(), True
    assert len(nnfast.swap(act).kept[0].reasons) == 3


def test_numbers_decide_in_the_end():
    act = module(in_two_steps)
    with mock.patch.dict("nnfast.swap.seed.FORMULAS", {"mul(sigmoid(x), x)": (nnfast.Mish, torch.relu)}):
        (entry,) = nnfast.swap(act).kept
    assert "numbers could not be shown" in entry.reasons[0]


def test_a_forward_set_on_the_class_from_outside_is_kept(monkeypatch):
    def forward(self, x):
        return x + 1

    forward.__module__ = "somewhere"
    monkeypatch.setattr(nn.SiLU, "forward", forward)
    (entry,) = nnfast.swap(nn.SiLU()).kept
    assert entry.reasons == ("its class's forward was set from outside, by somewhere",)


def test_a_name_is_read_as_what_it_is_in_the_functions_own_globals():
    scope = {"torch": torch, "sigmoid": noisy, "__name__": __name__}
    exec("def forward(self, x):\n    return x * sigmoid(x)", scope)
    assert nnfast.swap(module(scope["forward"], "Swish")).replaced == ()
    scope["sigmoid"] = torch.sigmoid
    assert len(nnfast.swap(module(scope["forward"], "Swish")).replaced) == 1
