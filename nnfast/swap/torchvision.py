"""torchvision's RetinaNet: its classification head takes a class whose loss calls nnfast's.

The head's own `compute_loss` is kept, with one name bound anew in a copy of its globals: nothing of
torchvision is changed.
"""

from __future__ import annotations

import importlib
from types import FunctionType
from typing import Any

from torch import nn

from ..focal_loss.module import sigmoid_focal_loss
from .rule import Proposal, instance_reasons, public_name

_HEAD = "torchvision.models.detection.retinanet.RetinaNetClassificationHead"
_FUNCTION = "torchvision.ops.focal_loss.sigmoid_focal_loss"


def modules(module: nn.Module) -> list[Proposal]:
    """RetinaNetClassificationHead itself."""
    cls: Any = type(module)
    if f"{cls.__module__}.{cls.__qualname__}" != _HEAD:
        return []
    method = cls.compute_loss
    called = getattr(method, "__globals__", {}).get("sigmoid_focal_loss")
    reasons = instance_reasons(module)
    if f"{getattr(called, '__module__', '')}.{getattr(called, '__qualname__', '')}" != _FUNCTION:
        reasons.append("its compute_loss does not call torchvision's sigmoid_focal_loss")
    if "compute_loss" in vars(module):
        reasons.append("its compute_loss was set on this instance")
    if reasons:
        return [Proposal(public_name(cls), reasons=tuple(reasons))]
    new = __getattr__("RetinaNetClassificationHead")
    return [Proposal(public_name(cls), f"{__name__}.{new.__name__}", {"__class__": new})]


def __getattr__(name: str) -> Any:
    """The class is made when it is asked for, by a swap or by pickle: torchvision is imported only then."""
    if name != "RetinaNetClassificationHead":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = importlib.import_module("torchvision.models.detection.retinanet").RetinaNetClassificationHead
    method = base.compute_loss
    scope = {**method.__globals__, "sigmoid_focal_loss": sigmoid_focal_loss}
    scope.pop("__name__", None)  # by which torch.compile would find the original's
    compute_loss = FunctionType(method.__code__, scope, method.__name__, method.__defaults__)
    members = {
        "__doc__": base.__doc__,
        "__module__": __name__,
        "compute_loss": compute_loss,
        "nnfast_op": "sigmoid_focal_loss",
    }
    globals()[name] = made = type(name, (base,), members)
    return made
