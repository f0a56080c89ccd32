"""Exact totals of per-sample values, over batches and over processes."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

_UNIT = 2.0**-24  # values are rounded to multiples of this, which is less than the precision of a float32 near 1
_BATCHES = 64
Sums = dict[str, float]  # the sum of each metric over samples, and the number of samples as "samples"


class Totals:
    """Sums of per-sample values and the number of samples, kept on the device until they are read.

    Values are rounded to multiples of 2⁻²⁴ and summed in float64, where such sums are exact up to 2²⁹. Therefore the
    order of batches and the number of processes do not change a bit of a mean. (MPS has no float64; there, sums are
    float32.)

    Args:
        device: device of the values.
        start: sums to continue from; None: zero.
    """

    def __init__(self, device: torch.device, start: Sums | None = None):
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._names = sorted(start or {})
        self._sums = torch.tensor([(start or {})[name] for name in self._names], dtype=self._dtype, device=device)
        self._waiting: list[dict[str, Tensor]] = []

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the values of one batch: vectors `[B]` under the same names each time; "outputs" is ignored."""
        self._waiting.append({name: value.detach() for name, value in values.items() if name != "outputs"})
        if (
            len(self._waiting) == _BATCHES
        ):  # summed together, because summing takes as long as half of a step of a small head
            self._sum()

    def _sum(self) -> None:
        if not self._waiting:
            return
        vectors = {name: torch.cat([values[name] for values in self._waiting]) for name in self._waiting[0]}
        self._waiting.clear()
        rows = {name: self._exact(vector) for name, vector in vectors.items()}
        rows["samples"] = self._sums.new_full((), len(next(iter(vectors.values()))))
        names = sorted(rows)
        row = torch.stack([rows[name] for name in names])
        self._sums = self._sums + row if self._names else row
        self._names = names

    def _exact(self, value: Tensor) -> Tensor:
        if value.is_floating_point() and self._dtype == torch.float64:
            value = (value.double() / _UNIT).round() * _UNIT  # exact, because it is a power of two; NaN stays NaN
        return value.sum(dtype=self._dtype)

    def sums(self) -> Sums:
        """The sums, copied from the device; empty before the first batch."""
        self._sum()
        return dict(zip(self._names, self._sums.tolist(), strict=True))

    def over_processes(self, accelerator: Accelerator) -> Sums:
        """The sums over all processes, some of which may have added nothing (a collective)."""
        if accelerator.num_processes == 1:
            return self.sums()
        found = [sums for sums in gather_object([self.sums()]) if sums]
        return {name: sum(sums[name] for sums in found) for name in found[0]} if found else {}


def means(sums: Sums, *, since: Sums | None = None) -> dict[str, float]:
    """The mean of each metric over samples; empty if there are none.

    Args:
        sums: of all samples.
        since: earlier sums, whose samples do not count; None: all samples count.
    """
    rest = {name: value - (since or {}).get(name, 0.0) for name, value in sums.items()}
    samples = rest.pop("samples", 0.0)
    return {name: value / samples for name, value in rest.items()} if samples else {}
