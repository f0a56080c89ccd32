"""Run the frozen trunk faster: a copy of it is changed, and compared with the original.

In the copy BatchNorms are folded into the convolutions before them, tensors are in channels_last format, and in bf16
if the launcher says bf16. On a CPU, sums and activations are fused into convolutions. It is compiled if that saves more
time than it takes. The model that is trained, saved, exported and fingerprinted does not change.
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

# Largest distance of the features from those of the plain trunk, relative to their 2-norm: bf16 has 8 bits, and each
# layer rounds.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# Seconds that compiling takes, and the time of an image afterwards relative to before. Measured with ResNet-50 at
# 224 px on two cores of an AMD EPYC: 0.85 to 0.9 in fp32 and in bf16; less with AMX.
_COMPILE_SECONDS, _COMPILED_SHARE = 25.0, 0.85

log = logging.getLogger(__name__)


class FastTrunk(nn.Module):
    """Returns the features that a trunk returns, faster and without autograd: `[B, 3, S, S]` → tuple of `[B, ...]`.

    Args:
        accelerator: its precision is used.
        trunk: frozen, in eval mode; it is not changed.
        sample: a few images as the trunk takes them, with which the copy is checked and timed.

    Attributes:
        most: largest number of images in one forward; more are divided. On two cores of an AMD EPYC, ResNet-50 in bf16
            takes 42 images a second in batches of 16, and 37 in batches of 64, which do not fit the caches.
        what: how it differs from the plain trunk, as text.
        seconds: time of one image.
    """

    def __init__(self, accelerator: Accelerator, trunk: nn.Module, sample: Tensor):
        super().__init__()
        self.accelerator, self.most = accelerator, 256 if sample.device.type == "cuda" else 16
        self._plain = [trunk]  # in a list, so that it is not a submodule
        self.dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
        self.module: nn.Module | None = None
        self._compiled: Any = None
        self._shape: torch.Size | None = None
        self._fused = 0
        self.what = "as it is"
        if (
            accelerator.mixed_precision != "fp16"
        ):  # fp16 has too small a range for some trunks; autocast knows where to use it
            self._hasten(sample)
        self.seconds = self._time(sample)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if len(images) > self.most:
            parts = [self(some) for some in images.split(self.most)]
            return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))
        # no_grad, because autograd cannot save the tensors of inference_mode for the backward of the tail.
        with torch.no_grad():
            if self.module is None:
                with self.accelerator.autocast():
                    return self._plain[0](images)
            images = images.to(self.dtype, memory_format=torch.channels_last)
            # Compiled for one shape; for the last batch, which is smaller, another compilation would take too long.
            run = self._compiled if images.shape == self._shape else self.module
            return run(images)

    @property
    def compiled(self) -> bool:
        """Whether it has been compiled."""
        return self._compiled is not None

    def fingerprint(self) -> str:
        """A sha256 of everything but the images that features depend on: code, tensors, and the way it runs."""
        plain = self._plain[0]
        sha256 = hashlib.sha256(f"{self.what} {self.dtype} {plain} {getattr(plain, 'code', '')}".encode())
        for name, tensor in plain.state_dict().items():
            sha256.update(f"{name} {digest(tensor)}".encode())
        return sha256.hexdigest()

    def compile(self, shape: torch.Size, *, images: float | None = None) -> bool:
        """Compile it with `torch.compile` for batches of one shape, if that saves time (a collective).

        Args:
            shape: `[B, 3, S, S]`.
            images: number of images that will be computed; None: compile in any case.

        Returns:
            Whether it is compiled now: the same on every process.
        """
        if self.module is None:
            return False
        eager, good = self.seconds, True
        share = 1.0 if self._fused else _COMPILED_SHARE
        saves = images is None or images * eager * (1 - share) > _COMPILE_SECONDS
        if not on_main(self.accelerator, lambda: saves):  # the clocks of processes differ, their decisions must not
            return False
        sample = torch.rand(shape, device=self.accelerator.device)
        expected = self(sample)
        try:
            # On a CPU weights become constants in the memory layout that suits it.
            options: dict[str, Any] = {"freezing": sample.device.type == "cpu"}
            module, *_ = self._copy(
                self.dtype, None
            )  # without fused convolutions, because the compiler fuses them itself
            self._compiled, self._shape = torch.compile(module, options=options), sample.shape
            _check_close(self(sample), expected, _TOLERANCE[self.dtype])
            self.seconds = self._time(sample)
        except Exception as error:  # such as no C++ compiler, or an unknown operation
            log.warning("the trunk is not compiled: %s", str(error).strip().splitlines()[0])
            good = False
        faster = images is None or self.seconds < eager
        if all(gather(self.accelerator, good)) and on_main(self.accelerator, lambda: faster):
            self.what += ", compiled"
            return True
        self._compiled, self._shape, self.seconds = None, None, eager
        return False

    def gain_of_bf16(self, sample: Tensor) -> float:
        """How many times faster it would be in bf16, measured; 1 if the hardware has no bf16."""
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
        """Use the fastest copy whose features are right: with fused convolutions, without, or none."""
        expected = self(sample)
        fusing = sample.device.type == "cpu" and torch.backends.mkldnn.is_available()
        for some in (sample, None) if fusing else (None,):
            try:
                self.module, self._fused, what = self._copy(self.dtype, some)
                _check_close(self(sample), expected, _TOLERANCE[self.dtype])
            except Exception as error:  # fx fails in many ways on code that it cannot trace
                log.info("the trunk is not %s: %s", "folded" if some is None else "fused", error)
                self.module, self._fused = None, 0
            else:
                self.what = what
                return

    def _copy(self, dtype: torch.dtype, sample: Tensor | None) -> tuple[nn.Module, int, str]:
        """A faster copy of the trunk; the number of fused convolutions (0 without a sample); a text about it."""
        module, folded = folded_copy(self._plain[0])
        module.to(dtype).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # the stubs lack it
        fused, what = 0, [f"{counted(folded, 'BatchNorm')} folded"]
        if sample is not None:
            with torch.no_grad():
                fused = fuse_convolutions(module, sample.to(dtype, memory_format=torch.channels_last))
            what.append(f"{counted(fused, 'convolution')} fused with what follows")
        return module, fused, ", ".join([*what, "channels last", str(dtype).removeprefix("torch.")])

    def _time(self, sample: Tensor, repeats: int = 2) -> float:
        """Seconds for one image of `sample`: the shortest of a few measurements."""
        found = []
        for _ in range(repeats):
            began = time.perf_counter()
            for value in self(sample):
                value.flatten()[0].item()  # waits for the device
            found.append(time.perf_counter() - began)
        return min(found) / len(sample)


def _check_close(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    """Raise ArithmeticError if features differ by more than `tolerance` of their 2-norm."""
    for one, other in zip(found, expected, strict=True):
        distance = (one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-12)
        if not distance < tolerance:
            raise ArithmeticError(f"its features are off by {distance:.1e} of their norm")
