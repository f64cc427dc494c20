"""Every operation of the table on every backend: the promises that all of them make."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import nnfast
from nnfast.core.op import OPS
from tests.ops import Case, Sample

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3),
    "permuted": lambda x: x.permute(3, 1, 0, 2),
    "step": lambda x: x[:, :, ::2, ::3],
    "flipped": lambda x: x.flip(2)[:, 1:],
    "expanded": lambda x: x[:, :1].expand(-1, 5, -1, -1),
    "narrowed": lambda x: x[1:, :, 1:3],
    "stepped channels_last": lambda x: x.contiguous(memory_format=torch.channels_last)[:, ::2],
}


def gradient(function, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x, grad)[0]


def upstream(x: torch.Tensor) -> torch.Tensor:
    """A gradient from above that is not one."""
    return torch.linspace(0.5, 2, x.numel(), dtype=torch.float64).reshape(x.shape).to(x)


def allowed(torchs_error: float, dtype: torch.dtype) -> float:
    """The promise: twice torch's own error, plus a floor (in float64 the truth itself is rounded)."""
    return 2 * torchs_error + torch.finfo(dtype).eps * (16 if dtype == torch.float64 else 0.125)


def samples(case: Case, run, dtype: torch.dtype) -> list[Sample]:
    """What errors are measured on; where slow, the half types, float32 but for loads and stores, share it."""
    halves = (torch.bfloat16, torch.float16)
    return run.share(case.samples, halves.index(dtype), 2) if dtype in halves else list(case.samples)


def test_forward_is_as_exact_as_torch(case: Case, run, dtype):
    for sample in samples(case, run, dtype):
        x = sample(dtype, run.device)
        truth = case.truth(x.double())
        error = sample.error(run(case.ours, x), truth)
        assert error <= allowed(sample.error(case.torchs(x), truth), dtype), sample.name


def test_backward_is_as_exact_as_torch(case: Case, run, dtype):
    for sample in samples(case, run, dtype):
        x = sample(dtype, run.device)
        grad = upstream(case.torchs(x))
        truth = gradient(case.truth, x.double(), grad.double())
        with run.forced():
            error = sample.error(gradient(case.ours, x, grad), truth)
        assert error <= allowed(sample.error(gradient(case.torchs, x, grad), truth), dtype), sample.name


def test_gradcheck_and_gradgradcheck(case: Case, run):
    if not case.takes(run.backend, torch.float64):
        pytest.skip("this backend takes no float64; its double backward is the reference's formula")
    x = case.example(torch.float64, run.device).requires_grad_()
    with run.forced():
        forward_ad = "transforms" in case.traits or run.backend in ("aten", "reference")
        assert gradcheck(case.ours, x, check_forward_ad=forward_ad, check_batched_grad=True)
        assert gradgradcheck(case.ours, x)


@pytest.mark.trait("inplace")
def test_inplace_gradcheck(case: Case, run):
    x = case.example(torch.float64, run.device).requires_grad_()
    with run.forced():
        assert gradcheck(lambda x: case.ours(x.clone(), inplace=True), x)
        assert gradgradcheck(lambda x: case.ours(x.clone(), inplace=True), x)


def test_same_result_every_time_and_input_untouched(case: Case, run, dtype):
    x = case.samples[1](dtype, run.device)
    before = x.clone()
    grad = upstream(case.torchs(x))
    grad_before = grad.clone()
    with run.forced():
        first, second = (case.ours(x) for _ in range(2))
        first_grad, second_grad = (gradient(case.ours, x, grad) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first_grad, second_grad)
    assert torch.equal(x, before)
    assert torch.equal(grad, grad_before)


@pytest.mark.trait("elementwise")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_torchs(case: Case, run, layout):
    x = LAYOUTS[layout](torch.randn(3, 5, 6, 7, device=run.device))
    expected = case.torchs(x)
    result = run(case.ours, x)
    assert result.stride() == expected.stride() or "builtin" not in case.traits
    assert_close(result, expected)
    for grad in (torch.randn_like(expected), torch.ones((), device=run.device).expand(x.shape)):
        with run.forced():
            assert_close(gradient(case.ours, x, grad), gradient(case.torchs, x, grad))


@pytest.mark.trait("inplace")
@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"expanded"}))
def test_inplace_layouts(case: Case, run, layout):
    base = torch.randn(3, 5, 6, 7, device=run.device)
    ours, torchs = base.clone(), base.clone()
    view = LAYOUTS[layout](ours)
    case.torchs(LAYOUTS[layout](torchs), inplace=True)
    with run.forced():
        refused = OPS[case.name].explain(view, inplace=True).reasons[run.backend]
    if refused:
        with pytest.raises(nnfast.BackendError, match="gaps"):
            run(case.ours, view, inplace=True)
        assert torch.equal(ours, base)
        assert case.ours(view, inplace=True) is view
    else:
        assert run(case.ours, view, inplace=True) is view
    assert_close(ours, torchs)


@pytest.mark.trait("inplace")
def test_shifted_views_of_one_buffer(case: Case, run, dtype):
    buffer = torch.linspace(-9, 9, 1200, device=run.device).to(dtype)
    for shift, length in itertools.chain(((s, 1037) for s in range(0, 41)), ((1, n) for n in range(1, 35))):
        x = buffer[shift : shift + length]
        y = run(case.ours, x)
        assert_close(y, case.torchs(x), msg=lambda m, at=(shift, length): f"shift, length {at}: {m}")
    shifted = buffer.clone()
    run(case.ours, shifted[3:777], inplace=True)
    assert torch.equal(shifted[:3], buffer[:3])
    assert torch.equal(shifted[777:], buffer[777:])
    assert_close(shifted[3:777], case.torchs(buffer[3:777]))


@pytest.mark.trait("elementwise")
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1, 1)], ids=str)
def test_empty_and_scalar(case: Case, run, dtype, shape):
    x = torch.full(shape, 0.5, dtype=dtype, device=run.device)
    y = run(case.ours, x)
    expected = case.torchs(x)
    assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), expected.dtype)
    assert_close(y, expected)
    with run.forced():
        assert_close(gradient(case.ours, x, x), gradient(case.torchs, x, x))


EXTREMES = [
    float("nan"),
    float("inf"),
    float("-inf"),
    1e4,
    -1e4,
    3e38,
    -3e38,
    89.0,
    -89.0,
    104.0,
    -104.0,
    0.0,
    -0.0,
]


@pytest.mark.trait("builtin")
def test_extremes_are_torchs(case: Case, run, dtype):
    x = torch.tensor(EXTREMES, device=run.device).to(dtype).repeat_interleave(17)
    assert_close(
        run(case.ours, x), case.torchs(x), equal_nan=True, atol=1e-36, rtol=1.6e-2 if x.itemsize < 4 else 1e-6
    )
    grad = torch.ones_like(x)
    with run.forced():
        ours = gradient(case.ours, x, grad)
    torchs = gradient(case.torchs, x, grad)
    finite = x.isfinite()
    assert_close(ours[finite], torchs[finite], atol=1e-35, rtol=1.6e-2 if x.itemsize < 4 else 1e-6)
    assert ours[x.isnan()].isnan().all()
    at_infinity, torchs_there = ours[x == float("inf")], torchs[x == float("inf")]
    if not at_infinity.isnan().all():  # where torch's own gradient is NaN, the limit 1 is as good
        assert_close(at_infinity, torchs_there.nan_to_num(nan=1.0))
    else:
        assert torchs_there.isnan().all()


def test_opcheck(case: Case, run):
    """Every opaque operator behind this backend: schema, fakes, autograd registration, AOT dispatch."""
    if run.backend in ("aten", "reference"):
        pytest.skip("torch's own operators: nothing of ours is registered")
    with run.forced():  # defines the emulated operators
        namespace = torch.ops.nnfast_emulated if run.emulated else torch.ops.nnfast
    for name in case.operators:
        packet = getattr(namespace, name)
        operator = getattr(packet, run.backend if run.backend in packet.overloads() else "default")
        for layout in ("contiguous", "transposed", "step"):
            x = LAYOUTS[layout](torch.randn(2, 3, 4, 6, device=run.device))
            torch.library.opcheck(operator, case.operators[name](x))


def test_compile_in_one_graph(case: Case, run):
    """Forced, so that our own operators are in the graph."""
    torch._dynamo.reset()
    x = torch.randn(40, 50, device=run.device, requires_grad=True)

    def f(x):
        return case.ours(x * 2) + 1

    with run.forced():
        compiled = torch.compile(f, fullgraph=True)
        y = compiled(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
    expected = case.torchs(x * 2) + 1
    assert_close(y, expected)
    assert_close(grad, torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.trait("builtin")
def test_compile_lowers_to_torchs_operator(case: Case, device):
    torch._dynamo.reset()
    graphs = []

    def capture(graph, _):
        graphs.append(graph)
        return graph.forward

    module = case.module()
    compiled = torch.compile(module, fullgraph=True, backend=capture)
    x = torch.randn(1 << 15, device=device)
    assert_close(compiled(x), case.torchs(x))
    called = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert called == [case.torchs]
    with nnfast.backend("reference"):  # the choice is guarded on: entering a block compiles again
        compiled(x)
    assert len(graphs) == 2
    assert case.torchs not in [node.target for node in graphs[1].graph.nodes]


@pytest.mark.trait("builtin")
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_needs_no_nnfast(case: Case, strict):
    x = torch.randn(1 << 13)
    program = torch.export.export(case.module(), (x,), strict=strict)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called == {f"aten.{case.name}.default"}
    assert_close(program.module()(x), case.torchs(x))


@pytest.mark.trait("transforms")
def test_vmap_and_transforms(case: Case, run):
    from torch.func import grad, hessian, jvp, vmap

    x = torch.randn(3, 4, 5, dtype=torch.float64, device=run.device)
    with run.forced():
        assert_close(*(vmap(f, in_dims=1, out_dims=-1)(x) for f in (case.ours, case.torchs)))
        sums = [lambda x, f=f: f(x).sum() for f in (case.ours, case.truth)]
        assert_close(*(vmap(grad(f))(x) for f in sums))
        assert_close(*(hessian(f)(x[0, 0]) for f in sums))
        assert_close(*(jvp(f, (x,), (x,))[1] for f in sums))


def test_autocast_keeps_the_dtype(case: Case, run, dtype):
    if not case.takes(run.backend, torch.bfloat16):
        pytest.skip("autocast casts to a type that this backend does not take")
    x = case.samples[1](dtype, run.device)
    with torch.autocast(run.device, dtype=torch.bfloat16):
        assert run(case.ours, x).dtype == case.torchs(x).dtype


@pytest.mark.trait("inplace")
def test_inplace_bumps_the_version(case: Case, run):
    leaf = torch.randn(8, device=run.device, requires_grad=True)
    x = leaf * 2
    y = x * x  # saves x
    with torch.no_grad():
        run(case.ours, x, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.trait("elementwise")
def test_only_the_input_is_saved(case: Case, run):
    saved = []
    x = torch.randn(16, device=run.device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        run(case.ours, x)
    if run.backend != "reference":
        beyond = [t for t in saved if t.data_ptr() != x.data_ptr()]
        assert len(beyond) < len(saved)
        assert not beyond or case.family == "focal_loss"  # its targets


def test_backward_uses_the_backend_of_forward(case: Case, run):
    """Backward may run after the block, or in another thread."""
    x = torch.randn(8, 8, device=run.device, requires_grad=True)
    with run.forced():
        y = case.ours(x)
    with nnfast.backend("reference"):
        (grad,) = torch.autograd.grad(y.sum(), x)
    with run.forced():
        (expected,) = torch.autograd.grad(case.ours(x).sum(), x)
    assert torch.equal(grad, expected)


@pytest.mark.trait("builtin")
def test_fake_and_meta_tensors(case: Case):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = case.ours(torch.empty(1 << 20, dtype=torch.bfloat16))
    assert fake.shape == (1 << 20,)
    meta = case.ours(torch.empty(3, 1 << 30, device="meta"))
    assert (meta.device.type, meta.shape) == ("meta", (3, 1 << 30))


@pytest.mark.trait("builtin")
def test_symbolic_trace_records_torchs_function(case: Case):
    traced = torch.fx.symbolic_trace(case.module())
    assert case.torchs in [node.target for node in traced.graph.nodes]


@pytest.mark.trait("builtin")
def test_module_is_a_drop_in(case: Case):
    ours, torchs = case.module(inplace=True), case.torch_module(inplace=True)
    assert isinstance(ours, case.torch_module)
    assert repr(ours) == repr(torchs)
    assert ours.state_dict() == {}
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(copied) is type(ours)
        assert copied.inplace
    x = torch.randn(4, 5)
    assert ours(x) is x


@pytest.mark.trait("builtin")
def test_integers_and_complex_as_torch(case: Case):
    for dtype in (torch.int64, torch.bool, torch.uint8):
        for size in (3, 1 << 21):
            x = torch.ones(size, dtype=dtype)
            with pytest.raises(NotImplementedError):
                case.torchs(x)
            with pytest.raises(
                NotImplementedError, match=rf"{case.name}: x has dtype {dtype}; {case.name} needs"
            ):
                case.ours(x)
    x = torch.randn(1 << 21, dtype=torch.complex64)
    try:
        expected = case.torchs(x)
    except RuntimeError:
        with pytest.raises(
            NotImplementedError, match=r"x has dtype torch.complex64; \w+ needs a floating-point one"
        ):
            case.ours(x)
    else:
        assert_close(case.ours(x), expected)


@pytest.mark.trait("inplace")
def test_bad_input_is_named_and_unchanged(case: Case, run):
    with pytest.raises(TypeError, match=rf"nnfast.{case.name}: x is a list; it needs a torch.Tensor"):
        run(case.ours, [1.0])
    leaf = torch.randn(5, device=run.device, requires_grad=True)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match=rf"nnfast.{case.name}: x is a leaf that requires grad"):
        run(case.ours, leaf, inplace=True)
    with pytest.raises(NotImplementedError, match=r"x has dtype torch\.int32"):
        run(case.ours, torch.ones(3, dtype=torch.int32, device=run.device))
    assert torch.equal(leaf, before)


@pytest.mark.trait("builtin")
def test_subclasses_take_torchs_own_unless_forced(case: Case):
    class Meter(torch.Tensor):
        """A subclass that sees which functions are called with it."""

        seen: list = []  # noqa: RUF012

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x = torch.randn(1 << 15).as_subclass(Meter)
    assert type(case.ours(x)) is Meter
    assert Meter.seen[0] is case.torchs
    with (
        nnfast.backend("triton"),
        pytest.raises(nnfast.BackendError, match="x is a Meter; our kernels take plain"),
    ):
        case.ours(x)


@pytest.mark.trait("elementwise")
def test_lazily_negated_input(case: Case, run):
    """The imaginary part of a lazy conjugate holds its elements negated."""
    x = torch.randn(50, dtype=torch.complex64, device=run.device).conj().imag
    assert x.is_neg()
    assert_close(run(case.ours, x), case.torchs(x))


@pytest.mark.trait("builtin")
@pytest.mark.gpu
def test_cuda_graph(case: Case, run):
    if run.device != "cuda":
        pytest.skip("CUDA graphs hold CUDA tensors")
    x = torch.randn(1 << 16, device="cuda")
    run(case.ours, x)  # warm up: Triton compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(case.ours, x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_close(y, case.torchs(x))


def _is_compiled(run) -> bool:
    on_gpu = run.backend == "triton" and run.device == "cuda"
    return (run.backend in ("cpu", "cuda") and not run.emulated) or on_gpu


@pytest.mark.parametrize("size", [100_003, 6_000_011])
def test_many_elements(case: Case, run, dtype, size):
    """Enough for several threads, and for results to be streamed past the caches; from an odd address."""
    if not _is_compiled(run):
        pytest.skip("not our compiled kernel: nothing else happens at this size")
    sample = Sample("many", lambda: torch.linspace(-20, 20, size + 1))
    x = case.shaped(sample(dtype, run.device)[1:])
    truth = case.truth(x.double())
    error = sample.error(run(case.ours, x), truth)
    assert error <= allowed(sample.error(case.torchs(x), truth), dtype)
    grad = upstream(truth).to(dtype)
    truth = gradient(case.truth, x.double(), grad.double())
    with run.forced():
        error = sample.error(gradient(case.ours, x, grad), truth)
    assert error <= allowed(sample.error(gradient(case.torchs, x, grad), truth), dtype)


def _available_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    import os

    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.trait("elementwise")
def test_more_than_2_to_31_elements(case: Case, run):
    if not _is_compiled(run):
        pytest.skip("not our compiled kernel")
    count = 2**31 + 4099
    if _available_bytes(run.device) < 4 * 2 * count:
        pytest.skip("needs 17 GB of free memory")
    x = torch.empty(count, dtype=torch.bfloat16, device=run.device)
    x[: 1 << 12], x[-(1 << 13) :] = -3, 1.5
    y = run(case.ours, x)
    assert_close(y[-(1 << 13) :], case.torchs(x[-(1 << 13) :]))
    assert_close(y[: 1 << 12], case.torchs(x[: 1 << 12]))


@pytest.mark.only("activation", "focal_loss")
def test_samples_cover_both_metrics(case: Case):
    if case.operators:  # of a product, gradients cross zero
        assert {s.metric for s in case.samples} == {"norm", "relative"}
    sample = Sample("x", lambda: torch.ones(2))
    assert sample.error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")
    assert sample.error(torch.tensor([1.0, 1.5]), torch.ones(2)) == 0.5


@pytest.mark.only("activation")
def test_nested_tensors_are_torchs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = torch.nested.nested_tensor([torch.randn(n, 64) for n in (5000, 3000)])
        for found, expected in zip(
            nnfast.functional.silu(x).unbind(), torch.nn.functional.silu(x).unbind(), strict=True
        ):
            assert_close(found, expected)
