"""Real models x checks: the same numbers, the same state, and back again."""

import contextlib
import copy
import io
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import nnfast


class Swish(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


class Mish(nn.Module):
    def forward(self, x):
        return x * torch.tanh(F.softplus(x))


class Gated(nn.Module):
    """Holds its activation as a function."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.act_fn = nn.Linear(8, 16), nn.Linear(8, 4), F.silu

    def forward(self, x):
        a, b = self.up(x).chunk(2, -1)
        return self.down(self.act_fn(a) * b)


class Shared(nn.Module):
    """One activation in three places, one of them a container."""

    def __init__(self):
        super().__init__()
        self.act = nn.Mish(inplace=True)
        self.body = nn.ModuleDict({"a": nn.Sequential(nn.Linear(8, 8), self.act), "b": nn.Linear(8, 8)})
        self.more = nn.ModuleList([self.act, Swish()])

    def forward(self, x):
        return self.more[1](self.more[0](self.body["b"](self.act(self.body["a"](x)))))


def plain():
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.SiLU(inplace=True)),
        *(nn.Conv2d(8, 8, 3), Swish(), nn.Conv2d(8, 8, 3), Mish(), nn.Flatten(), nn.LazyLinear(5), nn.Mish()),
    )


def timm_model(name, **config):
    timm = pytest.importorskip("timm")
    act = config.pop("act_layer", None)
    both = (timm.layers.activations, timm.layers.activations_me)
    layer = {"act_layer": next(getattr(place, act) for place in both if hasattr(place, act))} if act else {}
    return timm.create_model(name, pretrained=False, num_classes=7, **config, **layer)


def torchvision_model():
    return pytest.importorskip("torchvision").models.efficientnet_b0(num_classes=7, stochastic_depth_prob=0.0)


class Llama(nn.Module):
    def __init__(self, act):
        super().__init__()
        transformers = pytest.importorskip("transformers")
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(vocab_size=50, max_position_embeddings=32, hidden_act=act, **sizes)
        self.llama = transformers.LlamaForCausalLM(config)

    def forward(self, ids):
        return self.llama(input_ids=ids, use_cache=False).logits


def image(size=32):
    return lambda: torch.randn(2, 3, size, size)


def vector():
    return torch.randn(4, 8)


def tokens():
    return torch.randint(50, (2, 9))


SILU, MISH = "torch.nn.SiLU", "torch.nn.Mish"
MODELS = {
    "plain": (plain, image(12), {SILU: 1, MISH: 1, "Swish": 1, "Mish": 1}),
    "gated": (Gated, vector, {"torch.nn.functional.silu": 1}),
    "shared": (Shared, vector, {MISH: 1, "Swish": 1}),
    "alone": (nn.SiLU, vector, {SILU: 1}),
    "timm efficientnet": (lambda: timm_model("efficientnet_b0"), image(), {SILU: 49}),
    "timm mobilenet, Swish": (
        *(lambda: timm_model("mobilenetv3_small_050", act_layer="Swish"), image()),
        {"timm.layers.Swish": 19},
    ),
    "timm mobilenet, SwishMe": (
        *(lambda: timm_model("mobilenetv3_small_050", act_layer="SwishMe"), image()),
        {"timm.layers.activations_me.SwishMe": 19},
    ),
    "timm darknet, Mish": (
        *(lambda: timm_model("cs3darknet_focus_s", act_layer="Mish"), image()),
        {"timm.layers.Mish": 31},
    ),
    "timm mobilenet, MishMe": (
        *(lambda: timm_model("mobilenetv3_small_050", act_layer="MishMe"), image()),
        {"timm.layers.activations_me.MishMe": 19},
    ),
    "torchvision efficientnet": (torchvision_model, image(), {SILU: 49}),
    "transformers llama, silu": (
        lambda: Llama("silu"),
        tokens,
        {"transformers.activations.SiLUActivation": 2},
    ),
    "transformers llama, swish": (lambda: Llama("swish"), tokens, {SILU: 2}),
    "transformers llama, mish": (
        lambda: Llama("mish"),
        tokens,
        {"transformers.activations.MishActivation": 2},
    ),
}
CACHE = {}


@pytest.fixture(params=MODELS)
def sample(request):
    """A model with weights of its own, an input, and what a report should count."""
    make, inputs, expected = MODELS[request.param]
    torch.manual_seed(0)
    if request.param not in CACHE:
        model, x = make(), inputs()
        with torch.no_grad():
            model.eval()(x.clone())  # lazy modules
        CACHE[request.param] = model, x
    model, x = CACHE[request.param]
    return copy.deepcopy(model), x, expected


def run(model, x, dtype=torch.float32):
    """Output and gradients as one vector each, in float64. BatchNorm in eval mode: a tiny batch shakes it."""
    model = copy.deepcopy(model).to(dtype)
    x = x.to(dtype).requires_grad_() if x.is_floating_point() else x
    out = model(x * 1 if x.is_floating_point() else x)  # not a leaf: activations may write to it
    wanted = [x] * x.requires_grad + [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(out.square().sum(), wanted, allow_unused=True)
    flat = torch.cat([grad.double().flatten() for grad in grads if grad is not None])
    return out.detach().double().flatten(), flat


def state(model):
    return {name: (type(module), {**vars(module)}) for name, module in model.named_modules()}


def assert_promise(ours, torchs, truth, floor=1e-6):
    """In output and in gradients, the error is at most twice torch's own."""
    for mine, theirs, exact in zip(ours, torchs, truth, strict=True):
        assert (mine - exact).norm() <= 2 * (theirs - exact).norm() + floor * exact.norm()


@pytest.mark.parametrize("backend", [None, "cpu", "reference"])
def test_same_numbers(sample, backend):
    model, x, _ = sample
    if backend == "cpu" and isinstance(model, Llama):
        pytest.skip("its attention is swapped too, which has no C++ kernel to be forced")
    torchs, truth = run(model, x), run(model, x, torch.float64)
    nnfast.swap(model)
    with nnfast.backend(backend) if backend else contextlib.nullcontext():
        explanation = nnfast.explain("mish", torch.ones(2))
        if explanation.backend is None:
            pytest.skip("; ".join(explanation.reasons[backend]))
        assert_promise(run(model, x), torchs, truth)


def test_report_counts_and_nnfast_serves(sample):
    model, x, expected = sample
    before = {name: value.data_ptr() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules(remove_duplicate=False))
    model(x.clone())
    report = nnfast.swap(model)
    activations = [entry for entry in report.replaced if entry.new.startswith("nnfast.")]
    counts = Counter(entry.old.removeprefix(f"{__name__}.") for entry in activations)
    assert counts == expected
    assert report.kept == ()
    assert report.looked_at == len(set(modules.values()))
    with nnfast.backend("cuda"), pytest.raises(nnfast.BackendError):  # cpu tensors: so the call got to nnfast
        model(x.clone())
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == before
    assert dict(model.named_modules(remove_duplicate=False)) == modules  # names and identities


def test_twice_and_back(sample):
    model, _, _ = sample
    before = state(model)
    first = nnfast.swap(model)
    swapped = state(model)
    assert swapped != before
    again = nnfast.swap(model)
    assert again.replaced == ()
    assert again.looked_at == first.looked_at
    assert state(model) == swapped
    nnfast.restore(model)
    assert state(model) == before
    nnfast.restore(model)
    assert state(model) == before
    assert nnfast.swap(model) == first


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies(sample, how):
    model, x, _ = sample
    expected = model.eval()(x.clone())
    nnfast.swap(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    torch.testing.assert_close(twin(x.clone()), expected)
    classes = [type(module) for module in model.modules()]
    assert [type(module) for module in twin.modules()] == classes
    nnfast.restore(twin)
    torch.testing.assert_close(twin(x.clone()), expected)
    assert [type(module) for module in model.modules()] == classes  # the first one keeps its own
    nnfast.restore(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]


def test_state_dict_of_either_loads_into_the_other(sample):
    model, _, _ = sample
    twin = copy.deepcopy(model)
    nnfast.swap(model)
    assert list(model.state_dict()) == list(twin.state_dict())
    twin.load_state_dict(model.state_dict())
    model.load_state_dict(twin.state_dict())


@pytest.mark.parametrize("order", ["before", "after"])
def test_swap_before_and_after_bfloat16(sample, order):
    model, x, _ = sample
    torchs, truth = run(model, x, torch.bfloat16), run(model, x, torch.float64)
    if order == "before":
        nnfast.swap(model)
        model.to(torch.bfloat16)
    else:
        model.to(torch.bfloat16)
        nnfast.swap(model)
    assert_promise(run(model, x, torch.bfloat16), torchs, truth)
