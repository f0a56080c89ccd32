"""`Trainer`: train an epoch, evaluate, save, load; and the promises that hold through all four.

1. Frozen parts are never in train mode, never in autograd, never in a file.
2. The gradient of a window is the mean over its samples, for any accumulation, any number of processes and a shorter
   last window: losses are summed and divided by the number of samples in the window.
3. Nothing random is carried from step to step; see `sampling`.
4. Every sample is used once an epoch, and counted once in an evaluation.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer import checkpoint
from trainer.errors import CheckpointError, NumericalError
from trainer.features import Source
from trainer.freezing import check_fingerprint, fingerprint, trained_tensors
from trainer.metrics import Totals
from trainer.processes import from_main
from trainer.sampling import BatchPlan, random_key
from trainer.steps import Step, check_outputs, classification

AfterStep = Callable[["Trainer", Totals], None]


class Trainer:
    """Trains the tail of a model.

    Args:
        accelerator: as `processes.start` gives it; wraps the tail, the optimizer and, for fp16, a GradScaler.
        model: the whole model, frozen and split; never wrapped, it names the parameters it shares with the tail.
        tail: its trainable part; `tail(*inputs)` gives logits.
        optimizer: over the model's trainable parameters.
        plan: batch sizes; its progress is counted in global samples.
        lr: progress, 0 to 1, → learning rate.
        epochs: length of the run; what progress is a share of.
        step: `(model, batch) → {"loss": [B], ...}`, see `steps`.
        clip_norm: largest 2-norm of the gradient of a window; None clips nothing.
        seed: of the sample order and of the randomness in a step.
        about: entries that go into checkpoints as they are: "freeze_plan", "classes", "base", "config".

    Attributes:
        epoch: finished epochs. step: optimizer steps. samples: training samples used, over all processes.
        rate: learning rate of the last step.
        metrics: {"train": ..., "val": ..., "best": ...} as of the last finished epoch; the epoch loop sets it.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        tail: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        plan: BatchPlan,
        lr: Callable[[float], float],
        epochs: int,
        step: Step | None = None,
        clip_norm: float | None = None,
        seed: int = 0,
        about: dict[str, Any],
    ):
        self.accelerator, self.model = accelerator, model
        # Only the tail: no frozen parameter is reduced, no frozen BatchNorm buffer broadcast.
        self.tail, self.optimizer = accelerator.prepare(tail, optimizer)
        self.plan, self.lr, self.epochs, self.seed = plan, lr, epochs, seed
        self.step_function, self.clip_norm = step or classification(), clip_norm
        self.about, self.fingerprint = about, fingerprint(model)
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.epoch = self.step = self.samples = self.skipped_samples = 0
        self.rate = 0.0
        self.metrics: dict[str, dict[str, float]] = {}
        self._outputs_checked = False
        self._scaler_state: dict[str, Any] | None = None  # carried through a part of the run without a scaler

    # ------------------------------------------------------------------------------------------------ training

    def train_epoch(
        self, source: Source, *, after_step: Callable[["Trainer", Totals], None] | None = None
    ) -> dict[str, float]:
        """Train on every sample of `source` once, in the order of this epoch.

        Args:
            source: features of the training set.
            after_step: called on every process after each optimizer step, with this process's totals so far.

        Returns:
            The means over the epoch, over all processes: "loss" and the step's other metrics.

        Raises:
            NumericalError: a loss or gradient is not finite; nothing has been updated by it, on any process.
        """
        rank, totals = self.accelerator.process_index, Totals(self.accelerator.device)
        windows = list(self.plan.windows(seed=self.seed, epoch=self.epoch))
        shares = [self.plan.share(window, rank=rank) for window in windows]
        batches = source.batches([micro.indices for share in shares for micro in share], epoch=self.epoch)
        self.tail.train()
        for window, share in zip(windows, shares, strict=True):
            self._window(window, share, batches, totals)
            if after_step is not None:
                after_step(self, totals)
        self.epoch += 1
        return totals.over_processes(self.accelerator).means()

    def _window(self, window: list[int], share: list, batches, totals: Totals) -> None:
        """One optimizer step: forward and backward of this process's micro-batches, reduction, update."""
        # The rate at the middle of the window: neither the first step of a warm-up nor the last of a decay is zero.
        done = self.samples - self.skipped_samples + len(window) / 2
        self.rate = self.lr(done / (self.epochs * self.plan.samples))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate

        for micro in share:
            batch = next(batches)
            torch.manual_seed(random_key(self.seed, "step", self.step, micro.number))
            last = micro is share[-1]  # gradients are reduced once, in the last backward of the window
            with nullcontext() if last else self.accelerator.no_sync(self.tail):
                outputs = self.step_function(self.tail, batch)
                if not self._outputs_checked:
                    check_outputs(outputs, size=len(micro.indices))
                    self._outputs_checked = True
                # DDP averages over processes; the window's mean is over its samples.
                share_of_mean = self.plan.processes / len(window) * micro.counts
                self.accelerator.backward(outputs["loss"].sum() * share_of_mean)
            if micro.counts:
                totals.add(outputs)

        # Reduced gradients are the same on every process, so is their norm, and so is this decision. With a scaler
        # an infinite norm is expected now and then: it skips the update and lowers its scale.
        norm = self.accelerator.clip_grad_norm_(self.trainable, self.clip_norm or math.inf)
        if self.accelerator.scaler is None and not torch.isfinite(norm):
            self.optimizer.zero_grad()
            raise NumericalError(
                f"the gradient of step {self.step + 1} (epoch {self.epoch + 1}) is not finite, learning rate "
                f"{self.rate:.3g}; no weight was changed by it. Its samples start with {window[:8]}. "
                "Lower --lr, add --clip-norm 1, or look at those images."
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.samples += len(window)
        if self.accelerator.optimizer_step_was_skipped:
            self.skipped_samples += len(window)

    # ---------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self, source: Source) -> dict[str, float]:
        """The means of the step's values over every sample of `source`, each counted once, on every process."""
        model = self.accelerator.unwrap_model(self.tail)  # the wrapper would wait for processes that have no batch left
        model.eval()
        self._agree_on_buffers()
        totals = Totals(self.accelerator.device)
        for batch in source.batches(self._eval_batches(source), epoch=0):
            totals.add(self.step_function(model, batch))
        totals = totals.over_processes(self.accelerator)
        assert totals.count == len(source), f"evaluated {totals.count} samples of {len(source)}"
        return totals.means()

    @torch.no_grad()
    def logits(self, source: Source, indices: list[int]) -> Tensor:
        """The logits `[len(indices), C]` of some samples, on this process alone."""
        model = self.accelerator.unwrap_model(self.tail)
        model.eval()
        return torch.cat([model(*batch["inputs"]).float() for batch in source.batches([indices], epoch=0)])

    def _eval_batches(self, source: Source) -> list[list[int]]:
        return self.plan.eval_batches(len(source), rank=self.accelerator.process_index)

    def _agree_on_buffers(self) -> None:
        """BatchNorm statistics of the tail are the main process's: between two steps the others' may differ."""
        if self.accelerator.num_processes > 1:
            for tensor in trained_tensors(self.model).values():
                if not isinstance(tensor, nn.Parameter):
                    torch.distributed.broadcast(tensor, src=0)

    # --------------------------------------------------------------------------------------------- checkpoints

    def state(self) -> checkpoint.State:
        """What a checkpoint holds; see `checkpoint.KEYS`."""
        scaler = self.accelerator.scaler
        return {
            "model": {name: tensor.detach().cpu().clone() for name, tensor in trained_tensors(self.model).items()},
            "optimizer": checkpoint.optimizer_state(self.optimizer.optimizer, self.model),
            "scaler": self._scaler_state if scaler is None else scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "samples": self.samples,
            "skipped_samples": self.skipped_samples,
            "metrics": self.metrics,
            "fingerprint": self.fingerprint,
            **self.about,
        }

    def save(self, folder: Path, *, best: bool = False, keep: int = 2) -> Path:
        """Write a checkpoint of this moment, by the main process (a collective).

        Args:
            folder: where the run's checkpoints live; created if missing.
            best: also copy it to `best.pt`.
            keep: how many of the newest stay.

        Raises:
            OSError: the file could not be written; older checkpoints are untouched.
        """

        def write() -> Path:
            folder.mkdir(parents=True, exist_ok=True)
            path = checkpoint.path_of(folder, self.step)
            checkpoint.write(path, self.state())
            if best:
                checkpoint.copy(path, folder / "best.pt")
            checkpoint.prune(folder, keep=keep)
            return path

        return from_main(self.accelerator, write)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint: tail, optimizer, scaler, counters (a collective: the main process reads).

        Raises:
            CheckpointError: damaged, or not of this model, these classes, this optimizer or these frozen weights; says
                what was expected and what was found. The model is then unchanged.
        """
        state = from_main(self.accelerator, lambda: checkpoint.read(path))
        for name in ("classes", "freeze_plan"):
            if state[name] != self.about[name]:
                raise CheckpointError(f"{path} has other {name}: {state[name]}; this run has {self.about[name]}.")
        check_fingerprint(self.fingerprint, state["fingerprint"])
        if state["samples"] != state["epoch"] * self.plan.samples:
            raise CheckpointError(
                f"{path} used {state['samples']:,} images in {state['epoch']} epochs; "
                f"this training set has {self.plan.samples:,}. Continue with the data it was trained on."
            )
        live, optimizer = trained_tensors(self.model), self.optimizer.optimizer
        checkpoint.check_tensors(state["model"], live)
        optimizer.load_state_dict(checkpoint.positional_state(state["optimizer"], optimizer, self.model))
        with torch.no_grad():
            for name, tensor in live.items():
                tensor.copy_(state["model"][name])
        self._scaler_state = state["scaler"]
        if self.accelerator.scaler is not None and self._scaler_state:
            self.accelerator.scaler.load_state_dict(self._scaler_state)
        self.epoch, self.step, self.samples = state["epoch"], state["step"], state["samples"]
        self.skipped_samples, self.metrics = state["skipped_samples"], state["metrics"]
