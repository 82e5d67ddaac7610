"""Where the kernels of these tests run: on a GPU, else on the CPU, in Triton's interpreter (tests/conftest.py)."""

from __future__ import annotations

import pytest
import torch

from fewstep.kernels import dispatch


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["closed", "triton"])
def form(request: pytest.FixtureRequest, device: str) -> str:
    """A form beside the reference, skipped where it cannot run."""
    if request.param == "triton" and not dispatch.triton_runs_on(device):
        pytest.skip("Triton is not installed")
    return request.param
