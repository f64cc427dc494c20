"""Our convolution against torch's: every prologue and epilogue, odd sizes, all configurations."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import nnfast
from nnfast.activation.reference import ACTIVATIONS, act
from nnfast.conv_bn_act.op import merge_statistics
from nnfast.convolution import op, reference, winograd
from nnfast.core import extension, tuning
from nnfast.core.op import triton_why_not
from tests.conftest import DEVICES, ON_LAST_DEVICE

pytestmark = ON_LAST_DEVICE
LAST = torch.channels_last
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = {  # (N, C, H, W), O, kernel, stride, padding
    "3x3": ((2, 10, 9, 7), 20, (3, 3), (1, 1), (1, 1)),
    "3x3 stride": ((1, 65, 9, 6), 33, (3, 3), (2, 2), (1, 1)),
    "stem": ((2, 3, 13, 11), 16, (7, 7), (2, 2), (3, 3)),
    "1x1": ((3, 16, 5, 5), 70, (1, 1), (1, 1), (0, 0)),
    "1x1 stride": ((2, 18, 6, 5), 9, (1, 1), (2, 2), (0, 0)),
    "5x5": ((1, 3, 9, 9), 8, (5, 5), (1, 1), (2, 2)),
    "uneven": ((2, 17, 8, 9), 5, (3, 1), (2, 1), (0, 2)),
    "3x3 odd": ((3, 65, 2, 3), 35, (3, 3), (1, 1), (1, 1)),
    "3x3 wide": ((2, 33, 5, 4), 67, (3, 3), (1, 1), (0, 2)),
    "one pixel": ((1, 33, 1, 1), 3, (3, 3), (1, 1), (1, 1)),
    "wide padding": ((1, 10, 3, 4), 4, (3, 3), (1, 1), (3, 2)),
}
EPILOGUES = {
    "": (),
    "bias": ("bias",),
    "bias relu": ("bias", "relu"),
    "residual leaky_relu": ("residual", "leaky_relu"),
    "bias residual silu": ("bias", "residual", "silu"),
    "mish": ("mish",),
    "statistics": ("statistics",),
}
PROLOGUES = ("", "identity", "relu", "leaky_relu", "silu", "mish")


@pytest.fixture(params=["triton", "cpu", "reference"])
def kernels(request):
    """The three operators of a backend."""
    if request.param == "triton":
        if missing := triton_why_not(DEVICES[-1]):
            pytest.skip(missing)
        return op.CONV2D_ACT.kernels
    if request.param == "cpu":
        if missing := extension.why_not(winograd.NAME, "CPU"):
            pytest.skip(missing)
        return op.CONV2D_ACT.on_cpu
    return reference


def served(kernels, shape, dtype):
    """Whether a backend has the convolution."""
    return kernels is not op.CONV2D_ACT.on_cpu or not winograd.why_not(dtype, *shape[2:])


@pytest.fixture(autouse=True)
def _seed_and_place():
    """On a GPU where there is one."""
    torch.manual_seed(0)
    with torch.device(DEVICES[-1]):
        yield


def make(shape, dtype, epilogue=(), prologue="", center=True):
    """Operands of the forward operator."""
    size, out_channels, kernel, stride, padding = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(size).to(dtype).contiguous(memory_format=LAST)
    weight = torch.randn(out_channels, size[1], *kernel).to(dtype)
    bias = torch.randn(out_channels, dtype=wide) if "bias" in epilogue else None
    norm = [torch.randn(size[1], dtype=wide) if prologue else None for _ in range(3)]
    if not center:
        norm[0] = None
    code = next((ACTIVATIONS[name] for name in epilogue if name in ACTIVATIONS), 0)
    y = torch.empty(op.convolved_size(size, weight.shape, stride, padding))
    residual = (
        torch.randn_like(y).to(dtype).contiguous(memory_format=LAST) if "residual" in epilogue else None
    )
    tail = (ACTIVATIONS[prologue] if prologue else 0, 0.125, list(stride), list(padding), code, 0.25)
    return x, weight, bias, residual, *norm, *tail, "statistics" in epilogue


def double(given):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in given]


def truth_of(given):
    """By torch's convolution in float64."""
    x, weight, bias, residual, center, scale, shift, prologue, slope, stride, padding, code, last, _ = given
    if scale is not None:
        x = x if center is None else x - center.view(-1, 1, 1)
        x = act(x * scale.view(-1, 1, 1) + shift.view(-1, 1, 1), prologue, slope)
    y = F.conv2d(x, weight, bias, tuple(stride), tuple(padding))
    return act(y if residual is None else y + residual, code, last)


def near(found, truth, dtype, roundings=8):
    """To some roundings of the largest result; sums over pixels, whose terms cancel, to more."""
    eps, truth = torch.finfo(dtype).eps, truth.detach()
    error = float((found.double() - truth).abs().max())
    assert found.shape == truth.shape
    assert error <= eps * roundings * max(float(truth.abs().max()), 1e-3), error


def check_forward(kernels, shape, dtype, epilogue, prologue, center=True):
    given = make(shape, dtype, EPILOGUES[epilogue], prologue, center)
    y, statistics = kernels.forward(*given)
    near(y, truth_of(double(given)), dtype)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=LAST)
    if epilogue == "statistics":
        stored = y.double()
        mean, var = merge_statistics(statistics)
        assert_close(mean.double(), stored.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
        assert_close(var.double(), stored.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-6)
    else:
        assert not statistics.numel()


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("prologue", PROLOGUES)
def test_every_prologue_and_epilogue(kernels, prologue, epilogue):
    turn = PROLOGUES.index(prologue) + list(EPILOGUES).index(epilogue)
    for i, dtype in enumerate(DTYPES):
        shapes = [shape for shape in SHAPES.values() if served(kernels, shape, dtype)]
        if not shapes:
            continue
        shape = shapes[(turn * 4 + i) % len(shapes)]
        check_forward(kernels, shape, dtype, epilogue, prologue, center=turn % 2 == 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(kernels, shape):
    for dtype in (d for d in DTYPES if served(kernels, SHAPES[shape], d)):
        given = make(SHAPES[shape], dtype, ("bias", "relu"))
        near(kernels.forward(*given)[0], truth_of(double(given)), dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prologue", ["", "relu", "mish"])
def test_gradients(kernels, shape, prologue):
    for dtype, code in zip(DTYPES, itertools.cycle([("relu",), ("leaky_relu",), ()])):
        if served(kernels, SHAPES[shape], dtype):
            check_gradients(kernels, SHAPES[shape], dtype, code, prologue)


def check_gradients(kernels, shape, dtype, code, prologue):
    given = make(shape, dtype, ("bias", *code), prologue)
    x, weight, _, _, *norm = given[:7]
    y = kernels.forward(*given)[0]
    grad = torch.randn_like(y)
    exact = double(given)
    for i in (0, 1, 2, 4, 5, 6):
        if exact[i] is not None:
            exact[i].requires_grad_()
    z = truth_of([*exact[:11], 0, 0.0, False])
    below = z * 0.25 if code == ("leaky_relu",) else z * 0
    out = torch.where(y > 0, z, below) if code else z
    added = torch.randn_like(x)
    out = out.mul(grad.double()).sum()
    wanted = [exact[i] for i in (0, 1, 2, 5, 6) if exact[i] is not None]
    truth = dict(zip([i for i in (0, 1, 2, 5, 6) if exact[i] is not None],
                     torch.autograd.grad(out, wanted), strict=True))  # fmt: skip
    mask = (y if code else None, weight)
    before = (x if prologue else None, *norm, *given[7:9])
    after = (*given[9:11], given[11], 0.25)
    dx, sum_dz, sum_dz_x = kernels.input_gradient(grad, *mask, None, *before, list(x.shape), *after, True)
    near(dx, truth[0], dtype)
    if prologue:
        near(sum_dz, truth[6], torch.promote_types(dtype, torch.float32), 64)
        near(sum_dz_x, truth[5], torch.promote_types(dtype, torch.float32), 64)
        unscaled = kernels.input_gradient(grad, *mask, None, *before, list(x.shape), *after, False)[0]
        near(unscaled, truth[0] / exact[5].detach().view(-1, 1, 1), dtype)
    else:
        with_added = kernels.input_gradient(grad, *mask, added, *before, list(x.shape), *after, True)[0]
        near(with_added, truth[0] + added.double(), dtype)
    dweight, dbias = kernels.weight_gradient(
        grad, mask[0], x, *norm, *given[7:9], list(weight.shape[2:]), *after, True
    )
    near(dweight, truth[1], dtype)
    near(dbias, truth[2], torch.promote_types(dtype, torch.float32), 64)


BOXED = {  # as SHAPES; boxes of the height and width named, all filled or not
    "8x8": ((2, 40, 8, 8), 72, (3, 3), (1, 1), (1, 1)),
    "8x8 open": ((3, 48, 8, 7), 40, (3, 3), (1, 1), (1, 1)),
    "4x4": ((4, 72, 4, 4), 40, (3, 3), (1, 1), (1, 1)),
    "4x4 open": ((3, 40, 7, 4), 48, (5, 5), (1, 1), (2, 2)),
    "2x2 open": ((17, 64, 2, 2), 40, (3, 3), (1, 1), (1, 1)),
    "1x1 open": ((70, 48, 1, 1), 40, (3, 1), (1, 1), (1, 0)),
    "wide padding": ((1, 40, 6, 5), 40, (3, 3), (1, 1), (2, 2)),
    "row": ((3, 40, 5, 5), 72, (1, 1), (1, 1), (0, 0)),
}


def unsplit(tiles, steps):
    """Few tiles too: what the convolution itself writes is looked at."""
    return 1, steps


@pytest.fixture
def described(monkeypatch):
    """The boxes of images that the copy engine would load, on an architecture that has one."""
    if missing := triton_why_not(DEVICES[-1]):
        pytest.skip(missing)
    from nnfast.convolution import kernels

    if DEVICES[-1] == "cuda" and kernels.architecture(torch.device("cuda")) not in ("sm_90", "sm_100"):
        pytest.skip("this GPU has no copy engine")
    made = []
    original = kernels.TensorDescriptor

    def descriptor(*args):
        made.extend([args[-1]] * (len(args[-1]) == 4))
        return original(*args)

    monkeypatch.setattr(kernels, "architecture", lambda _: "sm_90")
    monkeypatch.setattr(kernels, "TensorDescriptor", descriptor)
    monkeypatch.setattr(kernels, "conv_splits", unsplit)
    return made


@pytest.mark.parametrize("shape", BOXED)
def test_boxes(shape, described):
    """What the copy engine loads: padded by its zeros, after the prologue though, and cut at the edges."""
    turn = list(BOXED).index(shape)
    kernels, dtypes = op.CONV2D_ACT.kernels, (torch.bfloat16, torch.float16)
    for i, prologue in enumerate(("", "relu", "mish", "identity")):
        epilogue = list(EPILOGUES)[(turn + 2 * i) % len(EPILOGUES)]
        check_forward(kernels, BOXED[shape], dtypes[i % 2], epilogue, prologue, center=i < 2)
    check_forward(kernels, BOXED[shape], dtypes[turn % 2], "statistics", "")
    assert len(described) == 5
    for i, (prologue, code) in enumerate((("", ("relu",)), ("silu", ()), ("relu", ("leaky_relu",)))):
        check_gradients(kernels, BOXED[shape], dtypes[(turn + i) % 2], code, prologue)
    if shape[0].isdigit():
        assert {f"{height}x{width}" for _, height, width, _ in described} == {shape.split()[0]}
    assert len(described) > 5 + 3 * 5


def test_an_infinite_pixel_beside_a_box_is_not_seen(described):
    """A gradient is zero outside of its image; times infinity that would be NaN."""
    x = torch.randn(3, 16, 8, 7).bfloat16().contiguous(memory_format=LAST)
    x[:, :, :, -1] = torch.inf
    grad = torch.randn(3, 8, 8, 7).bfloat16().contiguous(memory_format=LAST)
    arguments = (grad, None, x, None, None, None, 0, 0.0, [3, 3], [1, 1], [1, 1], 0, 0.0, True)
    found = op.CONV2D_ACT.kernels.weight_gradient(*arguments)[0]
    assert torch.equal(found.isfinite(), reference.weight_gradient(*arguments)[0].isfinite())
    assert found[..., 0].isfinite().all()
    assert described


def test_what_is_loaded_by_pointers(described):
    """And why."""
    from nnfast.convolution import kernels

    def image(channels=40, dtype=torch.half, offset=0):
        return (
            torch.empty(offset + channels * 64, dtype=dtype)[offset:]
            .view(1, 8, 8, channels)
            .permute(0, 3, 1, 2)
        )

    assert kernels.pointers_why((1, 1), False, image(), image(8)) == []
    assert kernels.pointers_why((1, 1), False, image(), image(12)) == [
        "12 channels; the engine takes 16 bytes and multiples"
    ]
    assert "stride is (2, 2)" in kernels.pointers_why((2, 2), False, image())[0]
    assert "torch.float32" in kernels.pointers_why((1, 1), False, image(dtype=torch.float32))[0]
    assert "element 4" in kernels.pointers_why((1, 1), False, image(offset=4))[0]
    for channels, stride in ((42, 1), (32, 1), (40, 2)):
        shape = ((1, channels, 8, 8), 8, (3, 3), (stride, stride), (1, 1))
        check_forward(op.CONV2D_ACT.kernels, shape, torch.half, "bias", "relu")
    assert described == []
    check_forward(op.CONV2D_ACT.kernels, BOXED["8x8"], torch.float32, "bias", "relu")
    check_forward(
        op.CONV2D_ACT.kernels, ((2, 40, 9, 9), 8, (3, 3), (1, 1), (1, 1)), torch.half, "bias", "relu"
    )
    assert described == []  # boxes would be half empty


def test_boxes_of_resnet():
    """Tiles of 128 pixels are exact at each of its sizes."""
    for size, box in ((56, (8, 8)), (28, (4, 4)), (14, (2, 2)), (7, (1, 1))):
        assert tuning.conv_box(128, 256, size, size) == (box, 2 * size * size)
    assert tuning.conv_box(128, 1, 1, 256 * 49) == ((1, 128), 98)
    assert tuning.conv_box(64, 3, 9, 9)[1] == 9


CONFIGS = [(size, config) for size, configs in tuning.CONV_CONFIGS.items() for config in configs]


@pytest.mark.parametrize("boxes", [False, True], ids=["pointers", "boxes"])
@pytest.mark.parametrize(("size", "config"), CONFIGS, ids=str)
def test_every_configuration_is_right(size, config, boxes, monkeypatch, request):
    """A template of 3x3 convolutions elsewhere was wrong at 8 warps (pytorch#173068): every one that
    is shipped goes over tiles and steps that are not full."""
    if missing := triton_why_not(DEVICES[-1]):
        pytest.skip(missing)
    if boxes and (size != 2 or config.depth < 64):
        pytest.skip("the copy engine serves half types, and more than 32 channels")
    from nnfast.convolution import kernels

    made = request.getfixturevalue("described") if boxes else None
    if not boxes:
        monkeypatch.setattr(kernels, "architecture", lambda _: "sm_80")

    def chosen(*args):
        return config

    monkeypatch.setattr(kernels, "conv_config", chosen)
    monkeypatch.setattr(kernels, "conv_splits", unsplit)
    for dtype in (d for d in DTYPES if d.itemsize == size):
        side = 9 if config.rows == 128 else 6  # two tiles of pixels, of channels made and of depth
        channels, out_channels = config.depth + 6, config.columns + 3
        shape = ((2, channels, side, side), out_channels, (3, 3), (1, 1), (1, 1))
        if boxes:
            shape = ((3, config.depth + 8, 8, 7), config.columns + 8, *shape[2:])
        given = make(shape, dtype, ("bias", "relu", "statistics"), "relu")
        y, statistics = op.CONV2D_ACT.kernels.forward(*given)
        near(y, truth_of(double(given)), dtype)
        assert_close(
            merge_statistics(statistics)[0].double(), y.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-6
        )
        if config.columns > tuning.CONV_INPUT_WIDEST:
            continue
        grad, x = torch.randn_like(y), given[0]
        arguments = (
            grad,
            y,
            given[1],
            None,
            None,
            None,
            None,
            None,
            0,
            0.0,
            list(x.shape),
            [1, 1],
            [1, 1],
            1,
            0.0,
        )
        found = op.CONV2D_ACT.kernels.input_gradient(*arguments, True)[0]
        near(found, reference.input_gradient(*double(arguments), True)[0], dtype)
    assert not boxes or len(made) >= 2


@pytest.mark.parametrize("boxes", [False, True], ids=["pointers", "boxes"])
@pytest.mark.parametrize("splits", [1, 2, 5])
def test_split_sums_are_the_same(splits, boxes, monkeypatch, request):
    if missing := triton_why_not(DEVICES[-1]):
        pytest.skip(missing)
    from nnfast.convolution import kernels

    made = request.getfixturevalue("described") if boxes else None
    if not boxes:
        monkeypatch.setattr(kernels, "architecture", lambda _: "sm_80")

    def split(tiles, steps):
        each = -(-steps // splits)
        return -(-steps // each), each

    monkeypatch.setattr(kernels, "conv_splits", split)
    shape = ((3, 40, 8, 7), 40, (3, 3), (1, 1), (1, 1)) if boxes else ((2, 40, 6, 7), 35, *SHAPES["3x3"][2:])
    dtype = torch.half if boxes else torch.float32
    for epilogue in ("bias residual silu", "statistics"):
        check_forward(op.CONV2D_ACT.kernels, shape, dtype, epilogue, "relu")
    for prologue, code in (("relu", ()), ("", ("relu",))):
        check_gradients(op.CONV2D_ACT.kernels, shape, dtype, code, prologue)
    if boxes:
        assert made
    else:
        check_gradients(op.CONV2D_ACT.kernels, SHAPES["3x3 stride"], dtype, ("relu",), "mish")


def test_sums_of_few_tiles_are_split():
    """Forward, and the gradient of the input: of a stage with images of 7x7, unless the batch is large."""
    from nnfast.convolution import kernels

    for batch, splits in ((1, 18), (8, 4), (256, 1)):
        x = torch.empty(batch, 512, 7, 7, dtype=torch.half, device="meta")
        weight = torch.empty(512, 512, 3, 3, device="meta")
        assert kernels.plan(x, weight, (1, 1), (1, 1)).splits == splits


def test_what_is_chosen_for_a_shape():
    config = tuning.conv_config(256 * 56 * 56, 64, 64, 2)
    assert (config.rows, config.columns) == (128, 64)
    assert tuning.conv_config(256 * 14 * 14, 256, 256, 2).columns == 128
    assert tuning.conv_config(256 * 14 * 14, 256, 256, 2, tuning.CONV_INPUT_WIDEST).columns == 64
    assert tuning.conv_config(1000, 64, 3, 2).depth == 32
    assert tuning.conv_splits(4, 72) == (18, 4)
    assert tuning.conv_splits(1000, 72) == (1, 72)


def function(x, weight, bias, residual, scale, shift, **options):
    return nnfast.functional.conv2d_act(
        x.contiguous(memory_format=LAST), weight, bias, 1, 1, residual=residual, **options,
        prologue=None if scale is None else (scale, shift, options.pop("before", "silu")),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["leaky_relu", "silu"])
def test_gradcheck_of_everything(name):
    if missing := triton_why_not(DEVICES[-1]):
        pytest.skip(missing)
    leaves = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 2, 3, 2), (3, 2, 3, 3), (3,), (1, 3, 3, 2), (2,), (2,))
    ]
    with nnfast.backend("triton"):
        assert gradcheck(lambda *t: function(*t, act=name, negative_slope=0.25), leaves)
        assert gradgradcheck(lambda *t: function(*t, act=name, negative_slope=0.25), leaves)


def test_gradients_are_the_references():
    """Of every argument, of a slope below zero and of one argument alone."""
    if missing := triton_why_not(DEVICES[-1]):
        pytest.skip(missing)
    for name, slope in (("relu", 0.0), ("leaky_relu", -0.5), ("mish", 0.0)):
        leaves = [
            torch.randn(shape, requires_grad=True)
            for shape in ((2, 5, 4, 6), (7, 5, 3, 3), (7,), (2, 7, 4, 6), (5,), (5,))
        ]
        found = []
        for backend in ("triton", "reference", "aten"):
            with nnfast.backend(backend):
                y = function(*leaves, act=name, negative_slope=slope)
                found.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y) / 3)])
        for other in found[1:]:
            assert_close(found[0], other, rtol=1e-4, atol=1e-4)
        with nnfast.backend("triton"):
            for i, leaf in enumerate(leaves):
                alone = [t if i == j else t.detach() for j, t in enumerate(leaves)]
                y = function(*alone, act=name, negative_slope=slope)
                assert_close(torch.autograd.grad(y, leaf, torch.ones_like(y) / 3)[0], found[0][i + 1])


def test_what_is_saved():
    """x and y; not what the prologue makes of x."""
    if missing := triton_why_not(DEVICES[-1]):
        pytest.skip(missing)
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=LAST).requires_grad_()
    weight = torch.randn(16, 16, 3, 3, requires_grad=True)
    for name, count in (("identity", 1), ("relu", 2)):
        saved = []
        with (
            nnfast.backend("triton"),
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, saved=saved: saved.append(t) or t, lambda t: t
            ),
        ):
            function(x, weight, None, None, torch.ones(16), torch.ones(16), act=name)
        assert len({t.data_ptr() for t in saved if t.numel() == x.numel()}) == count


REASONS = {
    "groups": ({"groups": 2}, (2, 8, 5, 5), 3, "groups is 2"),
    "dilation": ({"dilation": 2}, (2, 8, 9, 9), 3, r"dilation is \(2, 2\)"),
    "stride": ({"stride": 3}, (2, 8, 9, 9), 3, r"stride is \(3, 3\)"),
    "kernel": ({}, (2, 8, 12, 12), 9, "the kernel is 9x9; ours go to 7x7"),
    "layout": ({}, (2, 8, 9, 9), 3, "not laid out in torch.channels_last"),
    "empty": ({}, (0, 8, 9, 9), 3, "empty"),
}


@pytest.mark.parametrize("why", REASONS)
def test_why_not(why):
    """Each reason is named, refused where forced, and torch's own serves the call."""
    options, size, kernel, words = REASONS[why]
    x = torch.randn(size)
    if why != "layout":
        x = x.contiguous(memory_format=LAST)
    weight = torch.randn(8, 8 // options.get("groups", 1), kernel, kernel)
    explanation = nnfast.explain(nnfast.functional.conv2d_act, x, weight, **options)
    assert explanation.backend == "aten"
    with nnfast.backend("triton"), pytest.raises(nnfast.BackendError, match=words):
        nnfast.functional.conv2d_act(x, weight, **options)
    assert_close(nnfast.functional.conv2d_act(x, weight, **options), F.conv2d(x, weight, **options))


def test_serves_only_where_forced():
    x, weight = torch.randn(2, 8, 9, 9).contiguous(memory_format=LAST), torch.randn(8, 8, 3, 3)
    assert nnfast.explain("conv2d_act", x, weight).backend == "aten"


WRONG = {
    "input has shape": lambda x, w: (x[0], w),
    "weight has shape": lambda x, w: (x, w[0]),
    "needs 4, and as many": lambda x, w: (x, w[:, :4]),
    "weight has dtype": lambda x, w: (x, w.half()),
    "bias has shape": lambda x, w: (x, w, torch.ones(3)),
    "stride is": lambda x, w: (x, w, None, 0),
    "smaller than the kernel": lambda x, w: (x[..., :2], w),
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_arguments_are_named(words):
    arguments = WRONG[words](torch.randn(2, 8, 5, 5), torch.randn(8, 8, 3, 3))
    with pytest.raises(ValueError, match=words):
        nnfast.functional.conv2d_act(*arguments)


def test_wrong_options_are_named():
    x, weight = torch.randn(2, 8, 5, 5), torch.randn(8, 8, 3, 3)
    scale = torch.ones(8)
    for error, words, options in (
        (ValueError, "act is 'tanh'", {"act": "tanh"}),
        (ValueError, "residual has shape", {"residual": x}),
        (ValueError, "residual has dtype", {"residual": torch.randn(2, 8, 3, 3).double()}),
        (ValueError, "prologue's scale has shape", {"prologue": (scale[:3], scale, "relu")}),
        (ValueError, "prologue's act is 'x'", {"prologue": (scale, scale, "x")}),
        (TypeError, "prologue is", {"prologue": (scale, scale)}),
        (TypeError, "padding is 'same'", {"padding": "same"}),
        (TypeError, "residual is a int", {"residual": 3}),
    ):
        with pytest.raises(error, match=words):
            nnfast.functional.conv2d_act(x, weight, **options)
    with pytest.raises(TypeError, match="input is a list"):
        nnfast.functional.conv2d_act([1.0], weight)
    with pytest.raises(NotImplementedError, match="int64"):
        nnfast.functional.conv2d_act(x.long(), weight.long())


def test_module_is_a_convolution():
    torch.manual_seed(0)
    ours, theirs = nnfast.Conv2dAct(6, 8, 3, 2, 1, act="silu"), nn.Conv2d(6, 8, 3, 2, 1)
    ours.load_state_dict(theirs.state_dict())
    x, residual = torch.randn(2, 6, 9, 9), torch.randn(2, 8, 5, 5)
    expected = F.silu(theirs(x) + residual)
    assert_close(ours(x, residual), expected)
    if not triton_why_not(DEVICES[-1]):
        with nnfast.backend("triton"):
            assert_close(ours(x.contiguous(memory_format=LAST), residual), expected, rtol=1e-4, atol=1e-4)
    assert "act='silu'" in repr(ours)
    assert nnfast.explain(ours, x).backend == "aten"


def test_a_residual_batched_alone():
    """vmap over the residual of a small convolution, which is served at once."""
    x, weight, residuals = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(6, 2, 4, 3, 3)

    def ours(residual: torch.Tensor) -> torch.Tensor:
        return nnfast.functional.conv2d_act(x, weight, act="relu", residual=residual)

    assert_close(torch.func.vmap(ours)(residuals), F.relu(F.conv2d(x, weight) + residuals))
