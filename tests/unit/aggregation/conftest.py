"""The arithmetics that every rule must give the same bits on."""

from __future__ import annotations

import pytest

from fedcore.aggregation.arithmetic import NUMPY, Arithmetic, TorchArithmetic


@pytest.fixture(scope="session", params=["numpy", "torch-cpu", "torch-cuda"])
def arithmetic(request: pytest.FixtureRequest) -> Arithmetic:
    if request.param == "numpy":
        return NUMPY
    torch = pytest.importorskip("torch")
    if request.param == "torch-cuda" and not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device")
    return TorchArithmetic(request.param.removeprefix("torch-"))
