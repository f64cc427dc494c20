"""Every backend for the tests of one operation, marked `only`."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch


@pytest.fixture
def forced(case, run):
    """A backend by name; new tensors are made where it runs."""
    device = nullcontext() if run.device == "cpu" else torch.device(run.device)
    with device, run.forced():
        yield run.backend
