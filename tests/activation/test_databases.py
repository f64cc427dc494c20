"""torch's own databases of inputs, OpInfo and ModuleInfo, for SiLU and Mish: ours against torch's."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

pytestmark = pytest.mark.only("activation")

OPINFO = {op.name.removeprefix("nn.functional."): op for op in op_db if op.name.startswith("nn.functional.")}
MODULEINFO = {info.module_cls: info for info in module_db}


def test_opinfo(case, run, dtype):
    count = 0
    for sample in OPINFO[case.name].sample_inputs(run.device, dtype, requires_grad=True):
        expected = case.torchs(sample.input.detach(), *sample.args, **sample.kwargs)
        if sample.kwargs.get("inplace"):
            result = run(case.ours, sample.input.detach().clone(), *sample.args, **sample.kwargs)
        else:
            result = run(case.ours, sample.input, *sample.args, **sample.kwargs)
            (grad,) = torch.autograd.grad(result, sample.input, torch.ones_like(result))
            again = sample.input.detach().requires_grad_()
            (truth,) = torch.autograd.grad(case.torchs(again), again, torch.ones_like(result))
            assert_close(grad, truth)
        assert_close(result, expected)
        assert result.stride() == expected.stride()
        count += 1
    assert count


def test_opinfo_reference_inputs(case, run):
    """Broadcasted, transposed, extremal and many more inputs."""
    count = 0
    for sample in OPINFO[case.name].reference_inputs(run.device, torch.float32, requires_grad=False):
        expected = case.torchs(sample.input)
        assert_close(run(case.ours, sample.input), expected, equal_nan=True)
        count += 1
    assert count >= 3


def test_opinfo_errors(case):
    info = OPINFO[case.name]
    if info.error_inputs_func is None:
        pytest.skip("the database has no error inputs for it")
    for error in info.error_inputs("cpu"):
        with pytest.raises(error.error_type):
            case.ours(error.sample_input.input, *error.sample_input.args, **error.sample_input.kwargs)


@pytest.mark.parametrize("training", [False, True])
def test_moduleinfo(case, run, dtype, training):
    info = MODULEINFO[case.torch_module]
    count = 0
    for entry in info.module_inputs_func(info, run.device, dtype, requires_grad=True, training=training):
        made = entry.constructor_input
        ours, torchs = (
            kind(*made.args, **made.kwargs).train(training) for kind in (case.module, case.torch_module)
        )
        (x,) = entry.forward_input.args
        result = run(ours, x)
        assert_close(result, torchs(x))
        with run.forced():
            grads = [torch.autograd.grad(m(x), x, torch.ones_like(x))[0] for m in (ours, torchs)]
        assert_close(*grads)
        count += 1
    assert count
