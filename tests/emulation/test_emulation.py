"""The emulation that runs CUDA kernels on the host: barriers and shuffles are right, and divergence is seen.

The operations' own kernels are rows of the table like every backend: see `tests/conftest.py`.
"""

import pytest
import torch

from tests.emulation.emulated import load_emulated


@pytest.mark.parametrize("dynamic", [False, True])
def test_block_reduction(dynamic):
    torch.manual_seed(0)
    x = torch.randn(3, 256, dtype=torch.float64)
    torch.testing.assert_close(load_emulated().sum_blocks(x, dynamic), x.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("leave", "message"),
    [
        (True, "of 64 threads 32 wait at __syncthreads, 0 at a warp barrier or shuffle, 32 have finished"),
        (False, "of 64 threads 32 wait at __syncthreads, 32 at a warp barrier or shuffle, 0 have finished"),
    ],
)
def test_divergent_barrier_is_an_error(leave, message):
    with pytest.raises(RuntimeError, match=f"divergent_barrier: divergent barrier in block 0: {message}"):
        load_emulated().diverge(torch.zeros(1), leave)
