"""What computes: NumPy, or PyTorch on a CPU or a CUDA device, with equal results to the last bit.

Equal bits are a must, not a nicety: a server that takes over from a dead one computes its model again, and the digests
are compared. So every operation is one rounding in float64, the same one everywhere. NumPy and PyTorch do so if

* sums and products of two arrays are written one by one (no ``addcmul``, no ``add(alpha=...)``);
* nothing is divided by a Python number, which PyTorch does on CUDA by multiplying with its reciprocal: ``number`` makes
  an operand of it;
* nothing is summed over an axis, where the order of additions is the library's own.

PyTorch is optional; it is imported by ``choose`` and only when a device other than the CPU is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from fedcore.errors import LocalError
from fedcore.wire.arrays import Floats

Doubles = npt.NDArray[np.float64]
Array: TypeAlias = Any
"""float64[n], a NumPy array or a torch tensor: what both know of ``+ * /`` and slices."""

BLOCK = 1 << 22
"""Elements that go to a CUDA device at a time: 32 MiB, enough for the full speed of the bus."""


class AcceleratorFailed(LocalError):
    """The device that computes has no memory left, or broke; the CPU can do the work."""


class Arithmetic(Protocol):
    """The few operations that sums and rules need beside ``+ * /`` of arrays."""

    @property
    def name(self) -> str:
        """For logs."""
        ...

    def take(self, values: Doubles, *, share: bool) -> tuple[Array, bool]:
        """Return values as an array, and whether it may be changed; with ``share`` it need not be a copy."""
        ...

    def add(self, total: Array, values: Doubles) -> None:
        """Add values to an array in place, wholly or, where memory is short, not at all."""
        ...

    def doubles(self, values: Floats) -> Array:
        """Return float32 values as a float64 array."""
        ...

    def number(self, value: float) -> Array:
        """Return a number as an operand."""
        ...

    def floats(self, values: Array) -> Floats:
        """Return an array's values rounded to float32; too large ones become infinite."""
        ...

    def host(self, values: Array) -> Doubles:
        """Return an array's values in the computer's memory, without a copy where possible."""
        ...


class NumpyArithmetic:
    """NumPy: one thread, nothing to install."""

    name = "NumPy"

    def take(self, values: Doubles, *, share: bool) -> tuple[Array, bool]:
        return (values, False) if share else (values.copy(), True)

    def add(self, total: Array, values: Doubles) -> None:
        np.add(total, values, out=total)

    def doubles(self, values: Floats) -> Array:
        return values.astype(np.float64)

    def number(self, value: float) -> Array:
        return np.float64(value)

    def floats(self, values: Array) -> Floats:
        with np.errstate(over="ignore"):  # the caller looks whether all is finite
            rounded: Floats = values.astype(np.float32)
        return rounded

    def host(self, values: Array) -> Doubles:
        array: Doubles = values
        return array


NUMPY = NumpyArithmetic()


class TorchArithmetic:
    """PyTorch on one of its devices."""

    def __init__(self, device: str) -> None:
        """Compute on ``cpu``, ``cuda`` or ``cuda:N``.

        Raises:
            ImportError: there is no PyTorch.
            AcceleratorFailed: the device does not work.
        """
        import torch

        self._torch = torch
        self._device = torch.device(device)
        self._cpu = self._device.type == "cpu"
        self.name = f"PyTorch {torch.__version__} on {device}"
        if not self._cpu:
            with self._guarded():
                self._number(1.0).item()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Name what PyTorch raises for a device without memory and for a broken one."""
        try:
            yield
        except (RuntimeError, AssertionError) as error:  # the latter: PyTorch without CUDA
            if self._cpu:
                raise
            reason = str(error).partition("\n")[0]
            raise AcceleratorFailed(
                f"{self.name} failed: {reason}",
                hint="the CPU does the work until the next start; free the device's memory, or set "
                "fedcore.aggregation.device to cpu",
            ) from error

    def _tensor(self, values: npt.NDArray[np.generic]) -> Array:
        """View values as a tensor of the CPU; PyTorch has no read-only tensors, so those are copied."""
        return self._torch.from_numpy(values if values.flags.writeable else values.copy())

    def _number(self, value: float) -> Array:
        return self._torch.tensor(value, dtype=self._torch.float64, device=self._device)

    def take(self, values: Doubles, *, share: bool) -> tuple[Array, bool]:
        if self._cpu:
            tensor = self._tensor(values)
            return (tensor, False) if share else (tensor.clone(), True)
        with self._guarded():
            return self._tensor(values).to(self._device), True

    def add(self, total: Array, values: Doubles) -> None:
        if self._cpu:
            total.add_(self._tensor(values))
            return
        with self._guarded():  # all the memory that it takes is had before anything is added
            stage = self._torch.empty(min(BLOCK, values.size), dtype=self._torch.float64, device=self._device)
            for start in range(0, values.size, BLOCK):
                block = self._tensor(values[start : start + BLOCK])
                staged = stage[: block.numel()]
                staged.copy_(block)
                total[start : start + BLOCK].add_(staged)
            self._torch.cuda.synchronize(self._device)  # an error is to be seen here, not by the next one

    def doubles(self, values: Floats) -> Array:
        with self._guarded():
            if self._cpu:
                return self._tensor(values).to(self._torch.float64)
            return self._tensor(values).to(self._device).to(self._torch.float64)

    def number(self, value: float) -> Array:
        with self._guarded():
            return self._number(value)

    def floats(self, values: Array) -> Floats:
        with self._guarded():
            rounded: Floats = values.to(self._torch.float32).cpu().numpy()
        return rounded

    def host(self, values: Array) -> Doubles:
        with self._guarded():
            array: Doubles = values.cpu().numpy()
        return array


def choose(device: str) -> tuple[Arithmetic, str]:
    """Choose what computes, once at the start.

    Args:
        device: ``cpu`` for NumPy; ``cuda`` for PyTorch on CUDA; ``auto`` for the latter where it can be had.

    Returns:
        The arithmetic, and why it is not CUDA, with the remedy; "" where it is, or where ``cpu`` was asked for.
    """
    if device == "cpu":
        return NUMPY, ""
    try:
        import torch
    except ImportError:
        return NUMPY, "PyTorch is not installed: pip install 'fedcore[torch]'"
    if not torch.cuda.is_available():
        return NUMPY, (
            f"PyTorch {torch.__version__} finds no CUDA device: see nvidia-smi, and that PyTorch is a build for CUDA"
        )
    try:
        return TorchArithmetic("cuda"), ""
    except AcceleratorFailed as error:
        return NUMPY, str(error)
