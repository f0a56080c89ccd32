"""Exact totals of per-sample values, over batches and over processes."""

import torch
from accelerate import Accelerator
from torch import Tensor


class Totals:
    """Sums of per-sample vectors and the number of samples, on the device: no host copy until `means`.

    Sums are float64 (float32 on MPS, which has no float64): counts of samples and of hits stay exact integers, so a
    ratio of them is the same for any number of processes.
    """

    def __init__(self, device: torch.device):
        self._dtype = torch.float32 if device.type == "mps" else torch.float64
        self._device = device
        self._names: list[str] = []
        self._sums: Tensor | None = None  # [number of metrics + 1], the last being the count

    def add(self, values: dict[str, Tensor]) -> None:
        """Add one batch: vectors of shape `[B]`, the same names each time."""
        names = sorted(values)
        row = torch.stack([values[name].detach().sum(dtype=self._dtype) for name in names])
        row = torch.cat([row, row.new_full((1,), len(values[names[0]]))])
        self._names, self._sums = names, row if self._sums is None else self._sums + row

    def over_processes(self, accelerator: Accelerator) -> "Totals":
        """The totals of all processes, on each of them (a collective). A process may have added nothing."""
        if accelerator.num_processes == 1:
            return self
        from accelerate.utils import gather_object

        total = Totals(self._device)
        rows = gather_object([(self._names, None if self._sums is None else self._sums.tolist())])
        for names, row in rows:  # in the order of the ranks
            if row is not None:
                row = torch.tensor(row, dtype=self._dtype, device=self._device)
                total._names, total._sums = names, row if total._sums is None else total._sums + row
        return total

    @property
    def count(self) -> int:
        """Samples added (a host copy)."""
        return 0 if self._sums is None else int(self._sums[-1].item())

    def sums(self) -> tuple[list[str], list[float]]:
        """Names, and their sums with the count last (one host copy): a mark for `means(since=...)`."""
        return (self._names, []) if self._sums is None else (self._names, self._sums.tolist())

    def means(self, *, since: tuple[list[str], list[float]] = ([], [])) -> dict[str, float]:
        """The mean of each metric over the samples added (one host copy), since a mark if one is given.

        Empty before the first sample.
        """
        names, sums = self.sums()
        if since[1]:
            sums = [now - before for now, before in zip(sums, since[1], strict=True)]
        return {name: value / sums[-1] for name, value in zip(names, sums, strict=False)} if any(sums[-1:]) else {}
