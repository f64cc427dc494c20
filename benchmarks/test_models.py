"""Whole models as written, compiled, swapped, and swapped and compiled: inference, and a training step.

A training step is forward and backward of the mean square of the outputs; the optimizer, the same for all, is
left out. On CUDA at the sizes people train at, in bfloat16 under autocast; on a CPU small images and short
texts in float32, uncompiled, so that the set takes a minute. Weights are random, made from configurations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import nnfast
from benchmarks.runner import Result, compare, synchronize

CUDA = torch.cuda.is_available()
BATCH, SIDE, LENGTH = (256, 224, 512) if CUDA else (4, 96, 64)
VOCABULARY = 30522


class Outputs(nn.Module):
    """A transformers model's main output as a tensor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        found = self.model(ids, use_cache=False) if hasattr(self.model, "wte") else self.model(ids)
        return found.last_hidden_state


def _torchvision(name: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        pytest.importorskip("tests.torchvision_operators")
        model = pytest.importorskip("torchvision").models.get_model(name, **config)
        for module in model.modules():
            if isinstance(module, nn.Linear) and not module.weight.any():
                nn.init.normal_(module.weight, std=0.02)  # ViT's head: outputs of zeros would show nothing
        return model

    return make


def _timm(name: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        pytest.importorskip("tests.torchvision_operators")  # timm imports torchvision
        return pytest.importorskip("timm").create_model(name, pretrained=False, **config)

    return make


def _transformers(kind: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        pytest.importorskip("tests.torchvision_operators")  # transformers imports torchvision
        transformers = pytest.importorskip("transformers")
        dropout = {
            "Bert": "hidden_dropout_prob attention_probs_dropout_prob",
            "GPT2": "resid_pdrop attn_pdrop embd_pdrop",
        }
        config = getattr(transformers, f"{kind}Config")(**dict.fromkeys(dropout[kind].split(), 0.0))
        return Outputs(getattr(transformers, f"{kind}Model")(config))

    return make


def _images() -> Tensor:
    return torch.randn(BATCH, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)


def _texts() -> Tensor:
    return torch.randint(VOCABULARY, (max(BATCH // 8, 2), LENGTH))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "ResNet-50": (_torchvision("resnet50"), _images),
    "EfficientNet-B0": (_torchvision("efficientnet_b0", dropout=0.0, stochastic_depth_prob=0.0), _images),
    "CSPDarknet53 with Mish": (_timm("cspdarknet53", act_layer=nn.Mish), _images),
    "ViT-B/16": (_torchvision("vit_b_16", image_size=SIDE), _images),
    "BERT-base": (_transformers("Bert"), _texts),
    "GPT-2 small": (_transformers("GPT2"), _texts),
}
TARGETS = {("ResNet-50", True): {"seed": 1.25, "compile": 1.05}} if CUDA else {}
"""(model, training) -> contender -> least ratio of its time to ours."""


def _step(model: nn.Module, training: bool) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with torch.set_grad_enabled(training), torch.autocast("cuda", torch.bfloat16, enabled=CUDA):
            y = model(x)
        if training:
            y.float().square().mean().backward()
            model.zero_grad(set_to_none=True)
        return y.detach()

    return run


def _peak(run: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes at the peak of a call, beyond what was there before; 0 where torch does not count them."""
    if not CUDA:
        return 0
    run(x)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(x)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name, training, device, quick, benchmark, record):
    if quick:
        pytest.skip("not in --quick")
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    written = make().to(device)
    if inputs is _images:
        written = written.to(memory_format=torch.channels_last)
    _measure(name, written, inputs().to(device), training, device, benchmark, record)


ONE_IMAGE = {
    "ResNet-18": _torchvision("resnet18"),
    "MobileNetV2": _torchvision("mobilenet_v2", dropout=0.0),
    "EfficientNet-B0": MODELS["EfficientNet-B0"][0],
}


@pytest.mark.parametrize("side", [64, 224])
@pytest.mark.parametrize("name", ONE_IMAGE)
def test_one_image(name, side, device, quick, benchmark, record):
    """Contiguous, as a service gets them: to find out what serves must cost less than it gains."""
    if quick:
        pytest.skip("not in --quick")
    torch.manual_seed(0)
    _measure(
        name, ONE_IMAGE[name]().to(device), torch.randn(1, 3, side, side, device=device), False, device,
        benchmark, record,
    )  # fmt: skip


def _measure(
    name: str, written: nn.Module, x: Tensor, training: bool, device: Any, benchmark: Any, record: Any
) -> None:
    torch._dynamo.reset()
    written.train(training)
    # the same weights: where they lie in memory can make more of a difference than what is measured
    swapped = copy.deepcopy(written, {id(t): t for t in (*written.parameters(), *written.buffers())})
    report = nnfast.swap(swapped)
    assert report.replaced
    models = {"seed": written, "nnfast": swapped}
    if CUDA:
        models |= {f"{key}+compile": torch.compile(copy.deepcopy(m)) for key, m in models.items()}
        models["compile"] = models.pop("seed+compile")
    functions = {key: _step(model, training) for key, model in models.items()}
    truth = functions["seed"](x)
    for run in functions.values():
        scale = float(truth.float().abs().max())
        assert_close(run(x).float() / scale, truth.float() / scale, rtol=0, atol=5e-2 if CUDA else 1e-4)
    synchronize(device)
    seconds = compare(functions, [x], device, 4.0 if CUDA else 8.0, 7)
    record(
        Result(
            family="models",
            op="model",
            case=f"{name} {'training' if training else 'inference'}, {' x '.join(map(str, x.shape))}",
            direction="forward+backward" if training else "forward",
            dtype="bfloat16" if CUDA else "float32",
            numel=x.numel(),
            backend="",
            seconds=seconds,
            bytes=0,
            flops=_flops(written, x) * (3 if training else 1),
            targets=TARGETS.get((name, training), {}),
            memory={key: _peak(run, x) for key, run in functions.items()},
        ),
        benchmark,
    )
    benchmark.pedantic(functions["nnfast"], args=(x,), rounds=3, warmup_rounds=1)


def _flops(model: nn.Module, x: Tensor) -> int:
    """Floating-point operations of a forward's products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return int(counter.get_total_flops())
