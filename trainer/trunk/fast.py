"""The trunk at full speed.

What runs is a copy of it: BatchNorm folded into the convolutions before it, channels last, in bf16 where the launcher
says bf16, on a CPU with sums and activations fused into convolutions, compiled where that pays. The model that is
trained, saved, exported and fingerprinted stays as it is.
"""

import hashlib
import logging
import time
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.model.freezing import digest
from trainer.processes.cores import has_bf16
from trainer.processes.together import gather, on_main
from trainer.text import counted
from trainer.trunk.fusion import folded_copy, fuse_convolutions

# How far the features may be from those of the plain trunk, as a share of their 2-norm: bf16 has 8 bits, and every
# layer rounds.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# What compiling costs, in seconds, and the share of the time that it leaves, for a prediction: measured with ResNet-50
# at 224 px on two cores of an AMD EPYC, where it leaves 0.85 to 0.9 of fp32 and of bf16; with AMX it leaves less.
_COMPILE_SECONDS, _COMPILED_SHARE = 25.0, 0.85

log = logging.getLogger(__name__)


class FastTrunk(nn.Module):
    """Gives what a trunk gives, faster: float `[B, 3, S, S]` → tuple of tensors `[B, ...]`, without autograd.

    Args:
        accelerator: for the precision.
        trunk: frozen, in eval mode; not changed.
        sample: a few images as the trunk gets them, to compare the two on, and to measure.

    Attributes:
        most: images in one forward; more are taken in turn: in bf16 two cores of an AMD EPYC take 42 images a second
            through a ResNet-50 in batches of 16, 37 in batches of 64, which leave the caches.
        what: how it differs from the plain one, for people.
        seconds: what an image takes.
    """

    def __init__(self, accelerator: Accelerator, trunk: nn.Module, sample: Tensor):
        super().__init__()
        self.accelerator, self.most = accelerator, 256 if sample.device.type == "cuda" else 16
        self._plain = [trunk]  # in a list: no part of this module
        self.dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        self.module: nn.Module | None = None
        self._compiled: Any = None
        self._shape: torch.Size | None = None
        self._fused = 0
        self.what = "as it is"
        if accelerator.mixed_precision != "fp16":  # its range is too small for some trunks: autocast knows where
            self._hasten(sample)
        self.seconds = self._time(sample)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if len(images) > self.most:
            parts = [self(some) for some in images.split(self.most)]
            return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
        # no_grad, not inference_mode: autograd refuses to save inference tensors for the tail's backward.
        with torch.no_grad():
            if self.module is None:
                with self.accelerator.autocast():
                    return self._plain[0](images)
            images = images.to(self.dtype, memory_format=torch.channels_last)
            # Compiled for one shape: the last batch, which is smaller, is not worth another compilation.
            run = self._compiled if images.shape == self._shape else self.module
            return run(images)

    @property
    def compiled(self) -> bool:
        """Whether `compile` has compiled it."""
        return self._compiled is not None

    def fingerprint(self) -> str:
        """A hash of its code, its tensors and how it runs: of all that its features depend on, but the images."""
        plain = self._plain[0]
        sha256 = hashlib.sha256(f"{self.what} {self.dtype} {plain} {getattr(plain, 'code', '')}".encode())
        for name, tensor in plain.state_dict().items():
            sha256.update(f"{name} {digest(tensor)}".encode())
        return sha256.hexdigest()

    def compile(self, shape: torch.Size, *, images: float | None = None) -> bool:
        """Compile it (`torch.compile`) for batches of one shape; says whether it is compiled now (a collective).

        Args:
            shape: `[B, 3, S, S]`.
            images: how many are to come: too few do not pay for it. None: compile in any case.
        """
        if self.module is None:
            return False
        eager, good = self.seconds, True
        share = 1.0 if self._fused else _COMPILED_SHARE
        saves = images is None or images * eager * (1 - share) > _COMPILE_SECONDS
        if not on_main(self.accelerator, lambda: saves):  # clocks differ between processes, decisions must not
            return False
        sample = torch.rand(shape, device=self.accelerator.device)
        expected = self(sample)
        try:
            # On a CPU its weights are constants, in the order that suits the CPU.
            options: dict[str, Any] = {"freezing": sample.device.type == "cpu"}
            module, *_ = self._copy(self.dtype, None)  # the compiler fuses by itself
            self._compiled, self._shape = torch.compile(module, options=options), sample.shape
            _check(self(sample), expected, _TOLERANCE[self.dtype])
            self.seconds = self._time(sample)
        except Exception as error:  # no C++ compiler, an operation that it does not know
            log.warning("the trunk is not compiled: %s", str(error).strip().splitlines()[0])
            good = False
        faster = images is None or self.seconds < eager
        if all(gather(self.accelerator, good)) and on_main(self.accelerator, lambda: faster):
            self.what += ", compiled"
            return True
        self._compiled, self._shape, self.seconds = None, None, eager
        return False

    def gain_of_bf16(self, sample: Tensor) -> float:
        """How many times faster it would be in bf16, measured; 1 where the hardware has none."""
        if self.module is None or self.compiled or self.dtype != torch.float32 or not has_bf16(sample.device.type):
            return 1.0
        module, seconds = self.module, self._time(sample)
        try:
            self.module, *_ = self._copy(torch.bfloat16, sample if self._fused else None)
            self.dtype = torch.bfloat16
            return seconds / self._time(sample)
        finally:
            self.module, self.dtype = module, torch.float32

    def _hasten(self, sample: Tensor) -> None:
        expected = self(sample)
        fusing = sample.device.type == "cpu" and torch.backends.mkldnn.is_available()
        for some in (sample, None) if fusing else (None,):
            try:
                self.module, self._fused, what = self._copy(self.dtype, some)
                _check(self(sample), expected, _TOLERANCE[self.dtype])
            except Exception as error:  # fx fails in many ways on code that it cannot follow
                log.info("the trunk is not %s: %s", "folded" if some is None else "fused", error)
                self.module, self._fused = None, 0
            else:
                self.what = what
                return

    def _copy(self, dtype: torch.dtype, sample: Tensor | None) -> tuple[nn.Module, int, str]:
        """A faster copy of the trunk; how many convolutions are fused, 0 without a sample; what is done to it."""
        module, folded = folded_copy(self._plain[0])
        module.to(dtype).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # the stubs lack it
        fused, what = 0, [f"{counted(folded, 'BatchNorm')} folded"]
        if sample is not None:
            with torch.no_grad():
                fused = fuse_convolutions(module, sample.to(dtype, memory_format=torch.channels_last))
            what.append(f"{counted(fused, 'convolution')} fused with what follows")
        return module, fused, ", ".join([*what, "channels last", str(dtype).removeprefix("torch.")])

    def _time(self, sample: Tensor, repeats: int = 2) -> float:
        """Seconds for an image of `sample`: the least of some."""
        found = []
        for _ in range(repeats):
            began = time.perf_counter()
            for value in self(sample):
                value.flatten()[0].item()  # waits for the device
            found.append(time.perf_counter() - began)
        return min(found) / len(sample)


def _check(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        distance = (one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-12)
        if not distance < tolerance:
            raise ArithmeticError(f"its features are off by {distance:.1e} of their norm")
