"""Statistics shared by two gloo processes against one process with the joined batch; DDP and FSDP."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import nnfast
from nnfast.conv_bn_act.module import normalise

WORLD_SIZE = 2


def _process(rank: int, path: Path, check: Callable[..., None], *arguments: object) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD_SIZE)
    torch.manual_seed(0)
    try:
        check(rank, *arguments)
    finally:
        dist.destroy_process_group()


def in_processes(tmp_path: Path, check: Callable[..., None], *arguments: object) -> None:
    """Run check(rank, *arguments) in each process."""
    mp.spawn(_process, (tmp_path / "init", check, *arguments), WORLD_SIZE)


def _parts(sizes: list[int], rank: int) -> slice:
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


def _statistics_and_gradients(rank: int, sizes: list[int]) -> None:
    part = _parts(sizes, rank)
    whole = [torch.randn(sum(sizes), 5, 4, 3) + 2 for _ in range(3)]
    for act, with_norm, momentum in (("relu", False, 0.1), ("silu", True, None), ("mish", False, 0.3)):
        joined = [nn.BatchNorm2d(5, momentum=momentum) for _ in range(2)]
        for bn in joined:
            nn.init.normal_(bn.weight)
        shared = nn.SyncBatchNorm.convert_sync_batchnorm(nn.ModuleList(copy.deepcopy(joined)))
        x, other = (t[part].clone().requires_grad_() for t in whole[:2])
        y = normalise(shared[0], x, residual=other, residual_bn=shared[1] if with_norm else None, act=act)
        y.backward(whole[2][part])

        every_x, every_other = (t.clone().requires_grad_() for t in whole[:2])
        z = joined[0](every_x) + (joined[1](every_other) if with_norm else every_other)
        truth = {"relu": F.relu, "silu": F.silu, "mish": F.mish}[act](z)
        truth.backward(whole[2])

        close = {"atol": 3e-5, "rtol": 3e-5}
        assert_close(y, truth[part], **close)
        assert_close(x.grad, every_x.grad[part], **close)
        assert_close(other.grad, every_other.grad[part], **close)
        for mine, theirs in zip(list(shared)[: 1 + with_norm], joined, strict=False):
            assert_close(mine.state_dict(), theirs.state_dict())
            for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
                dist.all_reduce(p.grad)  # their own: DDP averages them
                assert_close(p.grad, q.grad, **close)


@pytest.mark.parametrize("sizes", [[3, 3], [1, 4], [0, 3]], ids=["even", "uneven", "one is empty"])
def test_two_processes_are_one_with_the_joined_batch(sizes, tmp_path):
    in_processes(tmp_path, _statistics_and_gradients, sizes)


def _convert(rank: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nnfast.BatchNormAct2d(4, act="mish"), nn.Sequential(nn.BatchNorm2d(4))
    )
    state = copy.deepcopy(model.state_dict())
    group = dist.new_group([0, 1])
    for given in (None, group):
        converted = nnfast.convert_sync_batchnorm(model, given)
        assert converted is model
        assert type(model[1]) is nnfast.BatchNormAct2d
        assert type(model[2][0]) is nn.SyncBatchNorm
        assert_close(model.state_dict(), state)
    ours = nnfast.convert_sync_batchnorm(nnfast.BatchNormAct2d(4, act="mish"))
    joined = nnfast.BatchNormAct2d(4, act="mish")
    whole = torch.randn(5, 4, 2, 3)
    part = _parts([2, 3], rank)
    for module in (ours, copy.deepcopy(ours), nnfast.BatchNormAct2d(4, act="mish", process_group=group)):
        assert_close(module(whole[part]), nnfast.BatchNormAct2d(4, act="mish")(whole)[part])
    joined(whole)
    assert_close(ours.state_dict(), joined.state_dict())
    one_value = torch.randn(1, 4, 1, 1)  # two are enough for two processes
    assert copy.deepcopy(ours)(one_value).isfinite().all()
    assert_close(ours.eval()(whole[part]), joined.eval()(whole)[part])  # no process waits for another


def test_conversion(tmp_path):
    in_processes(tmp_path, _convert)


def _checkpointed(rank: int) -> None:
    whole = torch.randn(5, 4, 2, 3)
    part = _parts([2, 3], rank)
    ours = nnfast.convert_sync_batchnorm(nnfast.BatchNormAct2d(4))
    joined = nnfast.BatchNormAct2d(4)
    x, every_x = whole[part].clone().requires_grad_(), whole.clone().requires_grad_()
    checkpoint(ours, x, use_reentrant=False).square().sum().backward()
    joined(every_x).square().sum().backward()
    assert_close(x.grad, every_x.grad[part])
    assert_close(ours.state_dict(), joined.state_dict())


def test_checkpointing(tmp_path):
    in_processes(tmp_path, _checkpointed)


def _twice(rank: int) -> None:
    ours = nnfast.convert_sync_batchnorm(nnfast.BatchNormAct2d(4))
    x = torch.randn(2, 4, 2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="shared by a process group cannot be differentiated twice"):
        torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)


def test_double_backward_is_refused(tmp_path):
    in_processes(tmp_path, _twice)


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.bn1, self.bn2 = nnfast.BatchNormAct2d(8), nnfast.BatchNormAct2d(8, act="silu")
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv1(x))
        return self.head(self.bn2(self.conv2(x), x).mean((2, 3)))


def _train(model: nn.Module, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for x, target in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()


def _steps(rank: int, wrap: str) -> None:
    """Two processes of equal batches against one with the joined batch: their mean loss is its loss."""
    alone = _Network()
    model: nn.Module = nnfast.convert_sync_batchnorm(copy.deepcopy(alone))
    if wrap == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (WORLD_SIZE,))
        for child in (model.conv1, model.bn1, model.conv2, model.bn2):
            fully_shard(child, mesh=mesh)
        fully_shard(model, mesh=mesh)
    batches = [(torch.randn(6, 3, 5, 5), torch.randint(2, (6,))) for _ in range(4)]
    _train(alone, batches)
    part = _parts([3, 3], rank)
    _train(model, [(x[part], target[part]) for x, target in batches])
    state = model.module.state_dict() if wrap == "ddp" else model.state_dict()
    for name, value in alone.state_dict().items():
        mine = state[name]
        mine = mine.full_tensor() if hasattr(mine, "full_tensor") else mine
        assert_close(mine, value, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_training_steps(wrap, tmp_path):
    in_processes(tmp_path, _steps, wrap)
