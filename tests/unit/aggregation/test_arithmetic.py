"""The arithmetics: equal bits, and what happens where there is no CUDA device."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from fedcore.aggregation import arithmetic as arithmetics
from fedcore.aggregation.arithmetic import NUMPY, AcceleratorFailed, Arithmetic, TorchArithmetic, choose

LONG = 3 * 1000 + 17


@pytest.fixture
def values() -> np.ndarray:
    """Doubles of all magnitudes, with both zeros, subnormal and vast ones."""
    chance = np.random.default_rng(3)
    made = chance.standard_normal(LONG) * 10.0 ** chance.integers(-300, 300, LONG)
    made[:5] = [0.0, -0.0, 5e-324, 1e-45, 3.5e38]
    return made


class TestEqualBits:
    """Every operation that rules use, on values where a second rounding or a reciprocal would show."""

    def test_of_quotients_products_and_sums(self, arithmetic: Arithmetic, values: np.ndarray) -> None:
        for number in (3.0, 49.0, 65535.0, 1e-3, 7 / 3):
            array, _ = arithmetic.take(values, share=False)
            operand = arithmetic.number(number)
            with np.errstate(over="ignore"):
                expected = values + np.float64(number) * (values / np.float64(number))
            made = arithmetic.host(array + operand * (array / operand))
            assert made.tobytes() == expected.tobytes()

    def test_of_rounding_to_single_precision(self, arithmetic: Arithmetic, values: np.ndarray) -> None:
        array, _ = arithmetic.take(values, share=False)
        made = arithmetic.floats(array)
        with np.errstate(over="ignore"):
            assert made.tobytes() == values.astype(np.float32).tobytes()
        assert made.dtype == np.float32 and np.isinf(made[4])

    def test_of_doubles_of_floats(self, arithmetic: Arithmetic) -> None:
        floats = np.random.default_rng(1).standard_normal(100).astype(np.float32)
        floats.setflags(write=False)  # as those of a model are
        assert arithmetic.host(arithmetic.doubles(floats)).tobytes() == floats.astype(np.float64).tobytes()

    def test_of_sums_in_place_longer_than_a_block(
        self, arithmetic: Arithmetic, values: np.ndarray, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(arithmetics, "BLOCK", 1000)
        total, own = arithmetic.take(values, share=False)
        assert own
        arithmetic.add(total, values[::-1].copy())
        assert arithmetic.host(total).tobytes() == (values + values[::-1]).tobytes()


def test_pytorch_never_gets_hold_of_memory_that_may_not_be_written() -> None:
    """It knows no read-only tensors, and warns once per process only."""
    pytest.importorskip("torch")
    values = np.ones(5)
    values.setflags(write=False)
    tensor, _ = TorchArithmetic("cpu").take(values, share=True)
    tensor += 1
    assert values.tolist() == [1.0] * 5


class TestChoose:
    def test_the_cpu_needs_no_pytorch(self) -> None:
        """It is imported only when a device is asked for: it takes seconds and a hundred megabytes."""
        assert choose("cpu") == (NUMPY, "")
        code = (
            "import sys; from fedcore.aggregation.rules import rule_named; "
            "from fedcore.aggregation.arithmetic import choose; choose('cpu'); assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    @pytest.mark.parametrize("device", ["auto", "cuda"])
    def test_without_pytorch_the_remedy_is_to_install_it(
        self, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        assert choose(device) == (NUMPY, "PyTorch is not installed: pip install 'fedcore[torch]'")

    @pytest.mark.parametrize("device", ["auto", "cuda"])
    def test_with_a_device_or_without(self, device: str) -> None:
        torch = pytest.importorskip("torch")
        chosen, why_not = choose(device)
        if torch.cuda.is_available():
            assert (chosen.name, why_not) == (f"PyTorch {torch.__version__} on cuda", "")
        else:
            assert chosen is NUMPY
            assert "finds no CUDA device: see nvidia-smi" in why_not

    def test_a_device_that_does_not_work_is_named(self) -> None:
        torch = pytest.importorskip("torch")
        device = f"cuda:{torch.cuda.device_count() + 7}"
        with pytest.raises(AcceleratorFailed, match=rf"on {device} failed: .*fedcore.aggregation.device"):
            TorchArithmetic(device)


def test_a_device_without_memory_adds_nothing_and_says_so() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch finds no CUDA device")
    cuda = TorchArithmetic("cuda")
    total, _ = cuda.take(np.ones(10), share=False)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(AcceleratorFailed, match="out of memory"):
            cuda.add(total, np.ones(1 << 24))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert cuda.host(total).tolist() == [1.0] * 10
