"""Chains of convolution, batch norm, sum and activation among modules that are called one after another.

What runs as one is decided at every call, from the modules as they are then: one that was replaced, hooked or
given a forward of its own since the swap is called as itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..activation import module as activation
from ..conv_bn_act import blocks, notes, replay
from ..conv_bn_act.blocks import Unit
from ..conv_bn_act.module import normalise
from ..conv_bn_act.op import recomputing
from ..core.op import Explanation
from ..core.operator import autocasts, traced, transformed
from ..core.snapshot import altered, hooked_everywhere
from .rule import Swapped

IDENTITY = ("identity", 0.0)
ACTIVATIONS: dict[type, tuple[str, float]] = {
    nn.ReLU: ("relu", 0.0),
    nn.SiLU: ("silu", 0.0),
    nn.Mish: ("mish", 0.0),
    activation.SiLU: ("silu", 0.0),
    activation.Swish: ("silu", 0.0),
    activation.Mish: ("mish", 0.0),
}
"""Name and slope of what a pass can end with; nn.LeakyReLU brings its own slope."""

ACTIVATION_FUNCTIONS = {
    **dict.fromkeys(
        ("torch.relu", "torch.relu_", "F.relu", "F.relu_", "Tensor.relu", "Tensor.relu_"), "relu"
    ),
    **{"F.leaky_relu": "leaky_relu", "F.silu": "silu", "F.mish": "mish"},
}
"""The same for functions, by the names that `read` gives them."""

_DO_NOTHING_IN_EVAL = {
    *("torch.nn.modules.dropout.Dropout", "torch.nn.modules.dropout.Dropout2d"),
    *("timm.layers.drop.DropPath", "timm.layers.drop.DropBlock2d"),
    *("torchvision.ops.stochastic_depth.StochasticDepth", "torchvision.ops.drop_block.DropBlock2d"),
}
_READ_ONLY = (nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)
"""Modules whose output is new and whose input stays as it is."""


class Act(NamedTuple):
    """An activation that is a function, and how to call it."""

    act: tuple[str, float]
    call: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """Call it."""
        return self.call(x)


class Add(NamedTuple):
    """The sum of what has come so far and `items` run on `x`, which come later in the program.

    `to_so_far`, `to_branch`: the sum is written there, where others may see it.
    """

    x: Any
    items: list[Any]
    call: Callable[[Tensor, Tensor], Tensor]
    to_so_far: bool = False
    to_branch: bool = False

    def __call__(self, so_far: Tensor) -> Tensor:
        """One after another."""
        return self.call(so_far, run(self.items, self.x))


class Chain(NamedTuple):
    """What runs as one: act(norm(conv(x)) + add), and how many items of a list it takes."""

    conv: Any
    norm: Any
    add: Add | None
    act: tuple[str, float]
    length: int

    def __str__(self) -> str:
        """`conv+bn+add+relu`."""
        last = [] if self.act == IDENTITY else [self.act[0]]
        return "+".join(["conv"] * (self.conv is not None) + ["bn"] + ["add"] * (self.add is not None) + last)

    @property
    def pays(self) -> bool:
        """More than a batch norm alone."""
        return self.conv is not None or self.add is not None or self.act != IDENTITY


# Which module plays which part


def plain(module: nn.Module) -> bool:
    """Calling it runs its class's forward, not compiled, and nothing else but hooks on every module."""
    return module._compiled_call_impl is None and not altered(module)


def is_conv(item: Any) -> bool:
    """A convolution that can be fused."""
    return type(item) is nn.Conv2d and plain(item)


def is_norm(item: Any) -> bool:
    """A batch norm that can be fused."""
    return type(item) is nn.BatchNorm2d and plain(item)


def norm_of(module: nn.Module) -> nn.Module:
    """The nn.BatchNorm2d in a subclass that does more: another class's view of the same attributes."""
    view = _NORMS.get(module)
    if view is None or vars(view) is not vars(module):
        view = object.__new__(nn.BatchNorm2d)
        object.__setattr__(view, "__dict__", vars(module))
        _NORMS[module] = view
    return view


_NORMS: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def activation_of(item: Any) -> tuple[str, float] | None:
    """Name and slope of an activation that can be fused."""
    if type(item) is Act:
        return item.act
    if found := ACTIVATIONS.get(type(item)):
        return found if plain(item) else None
    if type(item) is nn.LeakyReLU and plain(item):
        return "leaky_relu", item.negative_slope
    return None


def flatten(modules: Iterable[Any], parts: Callable[[nn.Module], list[Any] | None]) -> list[Any]:
    """The list with the parts of every container in its place, and without what does nothing."""
    items: list[Any] = []
    for module in modules:
        if type(module) in _LEAVES or not isinstance(module, nn.Module) or not plain(module):
            items.append(module)
        elif (inner := parts(module)) is not None:
            items += flatten(inner, parts)
        elif not _does_nothing(module):
            items.append(module)
    return items


_LEAVES = {nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU, *ACTIVATIONS}
"""Of what is most often there, what has no parts and does something."""


def _does_nothing(module: nn.Module) -> bool:
    cls = type(module)
    return cls is nn.Identity or (
        not module.training and f"{cls.__module__}.{cls.__qualname__}" in _DO_NOTHING_IN_EVAL
    )


def match(
    items: list[Any], at: int, act_of: Callable[[Any], tuple[str, float] | None] = activation_of
) -> Chain | None:
    """The chain that starts there."""
    after = at
    conv = norm = add = None
    if is_conv(items[after]):
        conv = items[after]
        after += 1
    if after == len(items) or not is_norm(items[after]):
        return None
    norm = items[after]
    after += 1
    if after < len(items) and type(items[after]) is Add:
        add = items[after]
        after += 1
    act = act_of(items[after]) if after < len(items) else None
    return Chain(conv, norm, add, act or IDENTITY, after + (act is not None) - at)


# Running them


def eager(x: object) -> bool:
    """An ordinary call on images. Compilers, tracers and transforms get the modules themselves."""
    return (
        type(x) is Tensor
        and x.dim() == 4
        and (x.is_cpu or x.is_cuda)
        and not torch.compiler.is_compiling()
        and not traced()
        and not transformed()
        and not hooked_everywhere()
    )


def small(module: nn.Module, x: Tensor) -> bool:
    """The module trains on so small an image that none of its chains is faster than its own forward.

    Looked at before all else: on small images what is asked costs as much as what is computed.
    """
    if (
        torch.compiler.is_compiling()
        or not module.training
        or type(x) is not Tensor
        or x.dim() != 4
        or replay.observers
    ):
        return False
    found: blocks.Extent | None = module.__dict__.get("_nnfast_extent")
    return (found or blocks.extent(module.modules())).small(x)  # a slice of a sequential has none


def as_written(module: nn.Module, forward: Callable[..., Any], x: Tensor) -> Any:
    """The module's own forward; one that checkpointing repeats does not count again."""
    if not recomputing():
        return forward(module, x)
    with blocks.kept_statistics(m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        return forward(module, x)


_OUT_OF_PLACE: dict[type, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys((nn.SiLU, activation.SiLU, activation.Swish), activation.silu),
    **dict.fromkeys((nn.Mish, activation.Mish), activation.mish),
}
"""Activations whose gradient needs their input, which autograd copies before they write to it."""


def in_turn(module: nn.Module, x: Any) -> Any:
    """A sequential's children one after another; what nobody but the next one sees is not overwritten."""
    unseen = False
    for child in module._modules.values():
        act = _OUT_OF_PLACE.get(type(child)) if unseen else None
        if act and (not plain(child) or hooked_everywhere()):  # type: ignore[arg-type]
            act = None
        x = act(x) if act else child(x)  # type: ignore[misc]
        unseen = is_norm(child)
    return x


def run(items: list[Any], x: Any, ordinary: bool | None = None) -> Any:
    """Call the items one after another, chains among them at once.

    ordinary: what `eager` says of x, where that is known.
    """
    at = 0
    while at < len(items):
        chain = match(items, at) if ordinary or (ordinary is None and eager(x)) else None
        ordinary = None
        if chain is not None and chain.conv is not None:
            x, at = _run_convolutions(items, at, chain, x)
        elif chain is not None and chain.pays:
            at += chain.length
            x = _run_chain(chain, x, items[at - 1])
        elif type(items[at]) is Add and eager(x):
            act = activation_of(items[at + 1]) if at + 1 < len(items) else None
            last = items[at + 1] if act else None
            add, at = items[at], at + 1 + (act is not None)
            x = _add_after(x, add, act or IDENTITY, last, fresh=False)
        else:
            x = notes.call(items[at], x)
            at += 1
    return x


def expected_calls(items: list[Any]) -> list[Any] | None:
    """What `run` comes to, as `replay.noted` takes it, where that is nothing but folded convolutions and
    modules that are known to keep to shapes; else None."""
    found: list[Any] = []
    at = 0
    while at < len(items):
        chain = match(items, at)
        if chain is None and _keeps_shapes(items[at]):
            found.append(items[at])
            at += 1
            continue
        if chain is None or chain.conv is None:
            return None
        if chain.add is not None:
            head, conv, norm = _tail(chain.add.items)
            if head or (conv is None) != (norm is None):
                return None
            if conv is not None:
                found.append((conv, norm, False, IDENTITY))
        found.append((chain.conv, chain.norm, chain.add is not None, chain.act))
        at += chain.length
    return found


def _keeps_shapes(item: Any) -> bool:
    """A module whose result for inputs of one shape has one shape."""
    cls = type(item)
    return cls.__module__ in _KEEP_SHAPES or f"{cls.__module__}.{cls.__qualname__}" in _KEEP_SHAPES


_KEEP_SHAPES = {
    *("torch.nn.modules.activation", "torch.nn.modules.pooling", activation.__name__),
    *("torchvision.ops.misc.SqueezeExcitation", "timm.layers.squeeze_excite.SEModule"),
    "timm.models._efficientnet_blocks.SqueezeExcite",
}


def _run_convolutions(items: list[Any], at: int, first: Chain, x: Tensor) -> tuple[Tensor, int]:
    """Chains that follow each other, up to the sum that makes them a residual block; where to go on."""
    units: list[Unit] = []
    chain: Chain | None = first
    while chain is not None and chain.conv is not None and chain.add is None:
        units.append(_unit(chain.conv, chain.norm, chain.act))
        at += chain.length
        chain = match(items, at) if at < len(items) else None
    if chain is not None and chain.conv is not None and chain.add is not None:
        add = chain.add
        block = [*units, _unit(chain.conv, chain.norm, chain.act)]
        if add.x is x and (found := _projection(add, block, x)) is not None:
            return blocks.chain(
                block, x, None if found else x, found[0] if found else None
            ), at + chain.length
        if not units:
            return _run_chain(chain, x, items[at + chain.length - 1]), at + chain.length
    return blocks.chain(units, x), at


def _projection(add: Add, block: list[Unit], x: Tensor) -> list[Unit] | None:
    """The convolution and batch norm around a block, or none; None if there is anything else."""
    rest, conv, norm = _tail(add.items)
    if rest or (norm is None) != (conv is None) or (norm is None and add.to_branch):
        return None
    if autocasts(x) or any(unit.bn is norm for unit in block):
        return None
    shape = tuple(x.shape)
    for unit in block:
        shape = _shape(unit.conv, shape)
    return None if shape != _shape(conv, tuple(x.shape)) else [_unit(conv, norm)] if conv else []


def _unit(conv: Any, norm: Any, act: tuple[str, float] = IDENTITY) -> Unit:
    return Unit(conv, norm, *act)


def _run_chain(chain: Chain, x: Tensor, last: Any) -> Tensor:
    conv, norm, add, act, _ = chain
    if add is None:
        return normalised(conv, norm, x, act=act)
    head, other_conv, other_norm = _tail(add.items)
    # the branch comes after this chain in the program; it may run before only if nobody can tell
    if (other_norm is None and add.to_branch) or not _cannot_tell(add.items, norm):
        return _add_after(normalised(conv, norm, x), add, act, last, fresh=True)
    branch = run(head, add.x)
    if _fits(branch, other_conv, conv, x):
        return normalised(conv, norm, x, branch, other_conv, other_norm, act)
    so_far = normalised(conv, norm, x)
    total = add.call(so_far, run([*filter(None, (other_conv, other_norm))], branch))
    return total if act == IDENTITY else last(total)


def _add_after(so_far: Tensor, add: Add, act: tuple[str, float], last: Any, fresh: bool) -> Tensor:
    """act(so_far + branch): the batch norm at the end of the branch takes the sum along."""
    head, conv, norm = _tail(add.items)
    branch = run(head, add.x)
    if norm and eager(branch) and (fresh or not add.to_so_far) and _fits(so_far, None, conv, branch):
        return normalised(conv, norm, branch, so_far, None, None, act)
    total = add.call(so_far, run([*filter(None, (conv, norm))], branch))
    return total if act == IDENTITY else last(total)


def _tail(items: list[Any]) -> tuple[list[Any], Any, Any]:
    """What comes before the last [conv,] norm of a list, and these."""
    if not items or not is_norm(items[-1]):
        return items, None, None
    if len(items) > 1 and is_conv(items[-2]):
        return items[:-2], items[-2], items[-1]
    return items[:-1], None, items[-1]


def _cannot_tell(items: list[Any], norm: Any) -> bool:
    """Items may run earlier: they write to nothing that was there before, and do not use the batch norm."""
    known = all(
        type(item) is Act or ((type(item) in _READ_ONLY or activation_of(item)) and plain(item))
        for item in items
    )
    first = not items or type(items[0]) in _READ_ONLY
    return known and first and all(item is not norm for item in items)


def _fits(residual: object, residual_conv: Any, conv: Any, x: Tensor) -> bool:
    """conv(x) and residual_conv(residual) have one shape and dtype, so that a plain sum is meant."""
    if not eager(residual):
        return False
    assert isinstance(residual, Tensor)
    autocast = autocasts(x)
    lower = torch.get_autocast_dtype(x.device.type) if autocast else None
    dtypes = {
        lower if lower and c is not None and each.dtype is not torch.float64 else each.dtype
        for c, each in ((conv, x), (residual_conv, residual))
    }
    return (
        len(dtypes) == 1
        and residual.device == x.device
        and _shape(conv, tuple(x.shape)) == _shape(residual_conv, tuple(residual.shape))
    )


def _shape(conv: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of conv(x), for x of a shape."""
    if conv is None:
        return shape
    sizes = []
    for i in range(2):
        padding = conv._reversed_padding_repeated_twice[2 - 2 * i : 4 - 2 * i]
        whole = shape[2 + i] + sum(padding) - conv.dilation[i] * (conv.kernel_size[i] - 1)
        sizes.append((whole - 1) // conv.stride[i] + 1)
    return (shape[0], conv.out_channels, *sizes)


def normalised(
    conv: Any,
    norm: Any,
    x: Tensor,
    residual: Tensor | None = None,
    residual_conv: Any = None,
    residual_norm: Any = None,
    act: tuple[str, float] = IDENTITY,
) -> Tensor:
    """act(norm(conv(x)) + residual_norm(residual_conv(residual))), where any but norm may be missing."""
    name, slope = act
    if conv is None:
        if residual_conv is not None and residual is not None:
            residual, residual_norm = blocks.run(_unit(residual_conv, residual_norm), residual), None
        return normalise(
            norm, x, residual=residual, residual_bn=residual_norm, act=name, negative_slope=slope
        )
    if residual is not None and residual_conv is not None:
        projection = (_unit(residual_conv, residual_norm), residual)
        return blocks.run(_unit(conv, norm, act), x, projection=projection)
    if residual is not None and residual_norm is not None:
        residual = normalise(residual_norm, residual)
    return blocks.run(_unit(conv, norm, act), x, residual)


# The classes of what was swapped


class Fused(Swapped):
    """What calls chains."""

    nnfast_op = "batch_norm_act"

    def items(self) -> list[Any]:
        """What is called first, one after another; [] where that is not known."""
        raise NotImplementedError

    def explain(self, x: Tensor) -> Explanation:
        """What `nnfast.explain(module, x)` says: of the chain that x enters first."""
        items, at, units, added = self.items(), 0, [], False
        while at < len(items) and not added and (found := match(items, at)) and found.conv is not None:
            units.append(_unit(found.conv, found.norm, found.act))
            at, added = at + found.length, found.add is not None
        if units:
            return blocks.explain_units(units, x, x if added else None)
        return Explanation("conv_bn_act", None, {}, None, ": no convolution comes first; ask of its children")
