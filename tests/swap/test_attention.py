"""Attention in torch's, torchvision's, timm's, transformers' and user-written models: swapped and back."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import nnfast
from nnfast.core import tuning
from nnfast.swap import attention
from tests.attention.test_self_attention import Seed


@pytest.fixture(autouse=True)
def however_small(monkeypatch):
    """Small inputs are nnfast's too."""
    monkeypatch.setattr(tuning, "MULTIHEAD_ELEMENTS", 0)
    monkeypatch.setattr(tuning, "MULTIHEAD_FASTPATH_LENGTH", 0)


X = torch.linspace(-1, 2, 2 * 5 * 16).sin().view(2, 5, 16)
IMAGE = torch.linspace(0, 900, 2 * 3 * 16 * 16).sin().view(2, 3, 16, 16)
IDS = torch.arange(18).view(2, 9) % 50
SEEN = (torch.arange(9) < torch.tensor([[9], [6]])).long()
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}


class Alone(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.attention = kind(16, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def alone():
    return Alone(nn.MultiheadAttention), lambda m: m(X), {"torch.nn.MultiheadAttention": 1}


def encoder():
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    hidden = ~SEEN.bool()[:, :5]
    replaced = {"torch.nn.MultiheadAttention": 2, "torch.nn.TransformerEncoderLayer": 2}
    return model, lambda m: m(X, src_key_padding_mask=hidden), replaced


def decoder():
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 2)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    return model, lambda m: m(X, X.flip(1), tgt_mask=causal), {"torch.nn.MultiheadAttention": 4}


def torchvision_vit():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=3)
    return model, lambda m: m(IMAGE), {"torch.nn.MultiheadAttention": 2}


def timm_vit():
    timm = pytest.importorskip("timm")
    model = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=4, num_classes=3, qk_norm=True
    )
    return model, lambda m: m(IMAGE), {"timm.layers.Attention": 2}


def transformers_model(name, config, call, count, **options):
    def make():
        transformers = pytest.importorskip("transformers")
        model = getattr(transformers, name)(getattr(transformers, config)(**options))
        return model, lambda m: call(m), {"with sdpa": count}

    return make


def tokens(m):
    out = m(IDS, attention_mask=SEEN)
    return (out.logits if "logits" in out else out.last_hidden_state)[SEEN.bool()]


def unpadded(m):
    return m(IDS, use_cache=False).logits


def image(m):
    return m(IMAGE).last_hidden_state


LLAMA = {**SIZES, "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 32}
GPT2 = {"n_embd": 16, "n_head": 4, "n_layer": 2, "vocab_size": 50, "n_positions": 32, "resid_pdrop": 0.0}
GPT2 |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {**SIZES, "vocab_size": 50, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VIT = {**SIZES, "image_size": 16, "patch_size": 8}
MODELS = {
    "alone": alone,
    "encoder": encoder,
    "decoder": decoder,
    "torchvision vit": torchvision_vit,
    "timm vit": timm_vit,
    "bert": transformers_model("BertModel", "BertConfig", tokens, 1, **BERT),
    "vit": transformers_model("ViTModel", "ViTConfig", image, 1, **VIT),
    "gpt2": transformers_model("GPT2LMHeadModel", "GPT2Config", tokens, 2, **GPT2),
    "llama": transformers_model("LlamaForCausalLM", "LlamaConfig", tokens, 2, **LLAMA),
    "llama, causal": transformers_model("LlamaForCausalLM", "LlamaConfig", unpadded, 2, **LLAMA),
}


@pytest.mark.parametrize("name", ["alone", "torchvision vit", "timm vit", "vit"])
def test_compiled(name):
    model, call, _ = MODELS[name]()
    model.eval()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = call(model)
        nnfast.swap(model)
        found = call(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


def run(model, call, training):
    """Output and gradients; without gradients where in eval mode."""
    model.train(training)
    model.zero_grad()
    with torch.set_grad_enabled(training):
        y = call(model)
    if not training:
        return [y]
    y.backward(torch.linspace(-1, 2, y.numel()).view(y.shape))
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", MODELS)
def test_same_numbers_and_back(name):
    torch.manual_seed(0)
    model, call, counts = MODELS[name]()
    modes = (True, False) if name != "encoder" else (True,)  # its fused path is torch's
    expected = {training: run(model, call, training) for training in modes}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    report = nnfast.swap(model)
    for what, count in counts.items():
        assert sum(what in entry.old for entry in report.replaced) == count, report
    for training in modes:
        assert_close(run(model, call, training), expected[training], rtol=1e-4, atol=1e-5)
        with nnfast.backend("reference"):
            assert_close(run(model, call, training), expected[training], rtol=1e-4, atol=1e-5)
        with nnfast.backend("cuda"), pytest.raises(nnfast.BackendError, match=r"nnfast\.attention"):
            run(model, call, training)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    twin = copy.deepcopy(model)
    assert_close(run(twin, call, True), expected[True], rtol=1e-4, atol=1e-5)
    assert nnfast.swap(model).replaced == ()
    nnfast.restore(model)
    assert [type(m) for m in model.modules()] == classes
    assert_close(run(model, call, True), expected[True], rtol=0, atol=0)
    with nnfast.backend("cuda"), pytest.raises(nnfast.BackendError, match=r"nnfast\.attention"):
        call(twin)  # which is a model of its own
    nnfast.restore(twin)
    with nnfast.backend("cuda"):
        call(twin)


def test_pickles():
    for name in ("alone", "timm vit", "llama"):
        model, call, _ = MODELS[name]()
        nnfast.swap(model.eval())
        assert_close(call(pickle.loads(pickle.dumps(model))), call(model))


def test_short_inputs_of_encoder_layers_stay_fused():
    model, call, _ = encoder()
    model.eval()
    with torch.no_grad():
        expected = call(model)
        nnfast.swap(model)
        assert torch.equal(call(model), expected)


def swish(x):
    return x * torch.sigmoid(x)


ACTIVATIONS = {
    "relu": lambda: "relu",
    "silu": lambda: F.silu,
    "mish": lambda: F.mish,
    "SiLU": nn.SiLU,
    "Mish": nn.Mish,
    "user-written": lambda: swish,
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("kind", ["Encoder", "Decoder"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_layers_with_any_activation(name, kind, depth):
    torch.manual_seed(0)
    layer = getattr(nn, f"Transformer{kind}Layer")
    options = {"dropout": 0.0, "batch_first": True}
    layers = [layer(16, 4, 32, activation=ACTIVATIONS[name](), **options) for _ in range(max(depth, 1))]
    model = layers[0]
    if depth:  # not of torch's copies: those of decoder layers have F.relu in place of a module
        model = getattr(nn, f"Transformer{kind}")(model, 1)
        model.layers, model.num_layers = nn.ModuleList(layers), depth
    inputs = (X,) if kind == "Encoder" else (X, X.flip(1))

    def call(m):
        return m(*inputs)

    before = [(type(m), type(m.self_attn), m.activation, type(m.activation)) for m in layers]
    expected = {training: run(model, call, training) for training in (True, False)}
    report = nnfast.swap(model)
    attentions = 1 if kind == "Encoder" else 2
    ours = name in ("silu", "mish", "SiLU", "Mish")
    kept = ["it is user-written; give it nnfast.functional.swish by hand"] * (name == "user-written")
    assert [e.reasons for e in report.kept] == [tuple(kept)] * len(layers) * bool(kept)
    assert len(report.replaced) == len(layers) * (attentions + (kind == "Encoder") + ours), report
    for m in layers:
        assert isinstance(m, nnfast.TransformerEncoderLayer) == (kind == "Encoder")
        assert isinstance(m.self_attn, nnfast.MultiheadAttention)
        assert hasattr(m.activation, "nnfast_op") == ours
    twins = [model]
    if kind == "Encoder" or "activation" not in layers[0]._modules:
        twins += [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        for training in (True, False):
            assert_close(run(twin, call, training), expected[training], rtol=1e-4, atol=1e-5)
            with nnfast.backend("reference"):
                assert_close(run(twin, call, training), expected[training], rtol=1e-4, atol=1e-5)
        assert nnfast.swap(twin).replaced == ()
    nnfast.restore(model)
    assert [(type(m), type(m.self_attn), m.activation, type(m.activation)) for m in layers] == before
    assert all("_nnfast" not in attribute for m in model.modules() for attribute in vars(m))
    assert_close(run(model, call, True), expected[True], rtol=0, atol=0)


def test_attn_implementation_by_name():
    transformers = pytest.importorskip("transformers")
    nnfast.register_transformers()
    torch.manual_seed(0)
    models = [
        transformers.AutoModelForCausalLM.from_config(
            transformers.LlamaConfig(**LLAMA), attn_implementation=name
        )
        for name in ("sdpa", "nnfast")
    ]
    models[1].load_state_dict(models[0].state_dict())
    assert models[1].config._attn_implementation == "nnfast"
    assert_close(tokens(models[1]), tokens(models[0]))
    assert not [e for e in nnfast.swap(models[1]).replaced if "sdpa" in e.old]
    generated = [m.eval().generate(IDS[:1], max_new_tokens=5, do_sample=False) for m in models]
    assert torch.equal(*generated)
    with nnfast.backend("cuda"), pytest.raises(nnfast.BackendError):
        tokens(models[1])


def test_what_the_function_leaves_to_transformers():
    pytest.importorskip("transformers")
    q, k, v = (torch.randn(1, heads, 3, 8) for heads in (4, 2, 2))
    layer = nn.Module()
    layer.num_key_value_groups, layer.is_causal = 2, True
    bias = torch.randn(1, 4, 3, 3)
    out, weights = attention.transformers_attention(layer, q, k, v, None, position_bias=bias, is_causal=True)
    full = [x.repeat_interleave(2, 1) for x in (k, v)]
    causal = torch.ones(3, 3).tril().bool()
    assert_close(
        out, F.scaled_dot_product_attention(q, *full, bias.masked_fill(~causal, -torch.inf)).transpose(1, 2)
    )
    assert weights is None
    wide = [torch.randn(1, 1, 3, 300) for _ in range(3)]  # heads too wide for nnfast's
    layer.num_key_value_groups = 1
    out, _ = attention.transformers_attention(layer, *wide, None, is_causal=False)
    assert_close(out, F.scaled_dot_product_attention(*wide).transpose(1, 2))


def test_eager_models_are_kept():
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel(transformers.BertConfig(**BERT, attn_implementation="eager"))
    (entry,) = [e for e in nnfast.swap(model).kept if "Bert" in e.old]
    assert "attn_implementation is 'eager'" in entry.reasons[0]
    assert model.config._attn_implementation == "eager"


def test_nothing_is_imported():
    code = (
        "import sys, nnfast, torch; nnfast.swap(torch.nn.MultiheadAttention(4, 2)); print(list(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ},
        check=True,
    )
    assert "'transformers'" not in done.stdout
    assert "'timm'" not in done.stdout


def test_kept_with_the_reason():
    class Own(nn.MultiheadAttention):
        pass

    class OwnLayer(nn.TransformerEncoderLayer):
        pass

    (entry,) = nnfast.swap(Own(4, 2)).kept
    assert "subclass of torch.nn.MultiheadAttention" in entry.reasons[0]
    (entry,) = nnfast.swap(OwnLayer(4, 2, 4)).kept
    assert "subclass of torch.nn.TransformerEncoderLayer" in entry.reasons[0]
    module = nn.MultiheadAttention(4, 2)
    module.forward = lambda *_: 0
    (entry,) = nnfast.swap(module).kept
    assert "forward was set on this instance" in entry.reasons[0]
    timm = pytest.importorskip("timm")
    module = timm.layers.Attention(16)
    module.fused_attn = False
    (entry,) = nnfast.swap(module).kept
    assert "fused_attn is False" in entry.reasons[0]


# --- the seed's SelfAttention -------------------------------------------------------------------------------


def with_forward(forward, name="MyAttention"):
    """The seed's module with another forward."""
    members = {"__init__": Seed.__init__, "forward": forward, "__module__": __name__}
    cls = type(name, (nn.Module,), members)
    made = cls.__new__(cls)
    nn.Module.__init__(made)
    vars(made).update(copy.deepcopy(vars(Seed(16, 4))))
    return made


def matmuls(self, values, keys, query, mask):
    n = query.size(0)
    v = self.values(values.view(n, -1, self.heads, self.head_dim)).permute(0, 2, 1, 3)
    k = self.keys(keys.view(n, -1, self.heads, self.head_dim)).permute(0, 2, 3, 1)
    q = self.queries(query.view(n, -1, self.heads, self.head_dim)).transpose(1, 2)
    energy = torch.matmul(q, k)
    if mask is not None:
        energy = energy.masked_fill(mask == 0, float("-1e20"))
    out = torch.matmul(F.softmax(energy / self.embed_size**0.5, dim=-1), v)
    return self.fc_out(out.transpose(1, 2).reshape(n, -1, self.embed_size))


@pytest.mark.parametrize(
    "make", [lambda: Seed(16, 4), lambda: with_forward(matmuls)], ids=["seed", "matmuls"]
)
def test_seed(make):
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": make()})
    module = model["attention"]
    cls, before = type(module), dict(vars(module))
    mask = torch.ones(2, 1, 5, 5).tril()

    def call(m):
        return m["attention"](X, X, X, mask)

    state = torch.get_rng_state()
    expected = {training: run(model, call, training) for training in (True, False)}
    report = nnfast.swap(model)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    assert [entry.new for entry in report.replaced] == ["nnfast.SelfAttention"]
    assert type(module) is nnfast.SelfAttention
    for training, found in expected.items():
        assert_close(run(model, call, training), found)
    assert nnfast.swap(model).replaced == ()
    nnfast.restore(model)
    assert type(module) is cls
    assert vars(module).keys() == before.keys()


def by_mode(self, values, keys, query, mask):
    return self.fc_out(values) if self.training else self.fc_out(query)


def by_length(self, values, keys, query, mask):
    n, length = query.shape[0], query.shape[1]
    if length > 100:
        return self.fc_out(query)
    q, k, v = (m(x.reshape(n, x.shape[1], 4, 4)) for m, x in zip((self.queries,), (query,)))  # noqa: B905
    return q, k, v


def head_scaled(self, values, keys, query, mask):
    n = query.shape[0]
    v = self.values(values.reshape(n, values.shape[1], self.heads, self.head_dim))
    k = self.keys(keys.reshape(n, keys.shape[1], self.heads, self.head_dim))
    q = self.queries(query.reshape(n, query.shape[1], self.heads, self.head_dim))
    energy = torch.einsum("nqhd,nkhd->nhqk", q, k)
    if mask is not None:
        energy = energy.masked_fill(mask == 0, float("-1e20"))
    weights = torch.softmax(energy / self.head_dim**0.5, dim=3)
    out = torch.einsum("nhql,nlhd->nqhd", weights, v).reshape(n, query.shape[1], self.embed_size)
    return self.fc_out(out)


def one_input(self, x):
    return self.fc_out(x)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (by_mode, "it uses training"),
        (by_length, "it "),
        (head_scaled, "its numbers could not be shown to be SelfAttention's"),
        (one_input, "it does not take values, keys, query, mask"),
    ],
)
def test_what_only_looks_like_the_seeds_is_kept(forward, reason):
    module = with_forward(forward)
    cls = type(module)
    (entry,) = nnfast.swap(module).kept
    assert any(reason in text for text in entry.reasons), entry.reasons
    assert type(module) is cls


@pytest.mark.parametrize("change", ["bias", "shape", "number", "hook"])
def test_the_seeds_with_other_children(change):
    module = Seed(16, 4)
    if change == "bias":
        module.keys = nn.Linear(4, 4)
        reason = "without bias"
    elif change == "shape":
        module.fc_out = nn.Linear(16, 8)
        reason = "fc_out is not square"
    elif change == "number":
        module.heads = 2
        reason = "its heads is 2"
    else:
        module.dropout = nn.Dropout()
        assert nnfast.swap(module).replaced == ()
        return
    (entry,) = nnfast.swap(module).kept
    assert any(reason in text for text in entry.reasons), entry.reasons
