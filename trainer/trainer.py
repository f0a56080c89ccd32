"""`Trainer`: train an epoch, evaluate, save, load; and the promises that hold through all four.

1. Frozen parts are never in train mode, never in autograd, never in a file.
2. The gradient of a window is the mean over its samples, for any accumulation, any number of processes and a shorter
   last window: losses are summed and divided by the number of samples in the window.
3. Nothing random is carried from step to step; see `sampling`.
4. Every sample is used once an epoch, and counted once in an evaluation.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from trainer import checkpoint
from trainer.errors import CheckpointError, NumericalError, UsageError
from trainer.evaluation import evaluate
from trainer.features import Source
from trainer.freezing import check_fingerprint, digest, fingerprint, trained_tensors
from trainer.metrics import Totals, means
from trainer.processes import from_main
from trainer.sampling import BatchPlan, Micro, random_key, seed_all
from trainer.steps import Batch, Step, check_outputs, classification

_MOST_SKIPS = 20  # in a row: a GradScaler that finds its scale needs fewer (65,536 = 2¹⁶)

AfterStep = Callable[["Trainer"], None]


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
        exact: sum the gradients of micro-batches in one order on any number of processes (see `_reduce_in_order`).
        about: entries that go into checkpoints as they are: "freeze_plan", "classes", "data", ...

    Attributes:
        epoch: finished epochs. step: optimizer steps. samples: training samples used, over all processes.
        rate: learning rate of the last step.
        totals: of this process in the epoch under way.
        metrics: {"train": ..., "val": ..., "best": ...} as of the last finished epoch.
        saved: whether the last save succeeded.

    Raises:
        UsageError: `exact`, and a BatchNorm that trains.
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
        exact: bool = False,
        about: dict[str, Any],
    ):
        self.accelerator, self.model = accelerator, model
        # Only the tail: no frozen parameter is reduced, no frozen BatchNorm buffer broadcast.
        self.tail, self.optimizer = accelerator.prepare(tail, optimizer)
        self.plan, self.lr, self.epochs, self.seed = plan, lr, epochs, seed
        self.step_function, self.clip_norm, self.exact = step or classification(), clip_norm, exact
        self.about, self.fingerprint = {"data": {}, **about}, fingerprint(model)
        self.trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.epoch = self.step = self.samples = self.skipped_samples = 0
        self.rate = 0.0
        self.totals = Totals(accelerator.device)
        self.metrics: dict[str, dict[str, float]] = {}
        self.saved, self._saver = True, checkpoint.Saver()
        self._outputs_checked = self._epoch_trained = self._settled = False
        self._skipped_in_a_row = 0
        self._scaler_state: dict[str, Any] | None = None  # carried through a part of the run without a scaler
        buffers = trained_tensors(model).keys() - self.trainable.keys()
        self._trunk_batch = plan.micro_batch
        self._one_to_try = bool(buffers) and plan.smallest == 1
        if buffers and exact:
            raise UsageError(
                "--exact: a BatchNorm that trains keeps statistics of the batches that its own process saw, here "
                f"{min(buffers)}. Leave it frozen (--train without it), or train without --exact."
            )

    # ------------------------------------------------------------------------------------------------ training

    def train_epoch(self, source: Source, *, after_step: AfterStep | None = None) -> dict[str, float]:
        """Train on what is left of the epoch: every sample of `source` once an epoch, in the order of this epoch.

        Args:
            source: features of the training set.
            after_step: called on every process after each optimizer step.

        Returns:
            The means over the whole epoch, over all processes: "loss" and the step's other metrics.

        Raises:
            NumericalError: a loss or gradient is not finite; nothing has been updated by it, on any process.
            UsageError: a BatchNorm that trains cannot take the smallest micro-batch, of one image.
        """
        assert not self._epoch_trained, f"epoch {self.epoch + 1} is trained; finish_epoch() begins the next"
        start = self.samples - self.epoch * self.plan.samples  # not 0 if a checkpoint was written in mid-epoch
        windows = list(self.plan.windows(seed=self.seed, epoch=self.epoch, start=start))
        rank = self.accelerator.process_index
        shares = [self.plan.share(window, rank=rank, filler=not self.exact) for window in windows]
        batches = source.batches([micro.indices for share in shares for micro in share], epoch=self.epoch)
        self.tail.train()
        if windows and self._one_to_try:
            batches = self._try_one(batches)
        if windows and self.accelerator.num_processes > 1 and not (self.exact or self._settled):
            batches = self._settle(shares[0][0], batches)
        for window, share in zip(windows, shares, strict=True):
            self._update(window, share, batches)
            if after_step is not None:
                after_step(self)
        self._epoch_trained = True
        return means(self.totals.over_processes(self.accelerator))

    def finish_epoch(self, **metrics: dict[str, float]) -> None:
        """Count the epoch as done, once it is trained and evaluated; `metrics` go into its checkpoint."""
        self.epoch, self.metrics, self._epoch_trained = self.epoch + 1, metrics, False
        self.totals = Totals(self.accelerator.device)

    def _update(self, window: list[int], share: list[Micro], batches: Iterator[Batch]) -> None:
        """One optimizer step: forward and backward of this process's micro-batches, reduction, update."""
        self.rate = self._rate_of(self.samples - self.skipped_samples, len(window))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate

        if self.exact:
            self._reduce_in_order(window, share, batches)
        else:
            for micro in share:
                last = micro is share[-1]  # DDP reduces in this backward, and averages over processes
                with nullcontext() if last else self.accelerator.no_sync(self.tail):
                    self._backward(micro, next(batches), scale=self.plan.processes / len(window))

        # Reduced gradients are the same on every process, so is their norm, and so is this decision. With a scaler
        # an infinite norm is expected now and then: it skips the update and lowers its scale.
        if self.clip_norm or self.accelerator.scaler is not None:
            norm = self.accelerator.clip_grad_norm_(self.trainable.values(), self.clip_norm or math.inf)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.trainable.values() if p.grad is not None])
        if self.accelerator.scaler is None and not math.isfinite(norm):
            self._stop_on("the gradient is not finite", window)
        # Around the wrapper where it has nothing to add: it inspects signatures, and looks for packages, at every step.
        optimizer = self.optimizer.optimizer if self.accelerator.scaler is None else self.optimizer
        optimizer.step()
        optimizer.zero_grad()
        self.step += 1
        self.samples += len(window)
        skipped = self.accelerator.scaler is not None and self.accelerator.optimizer_step_was_skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if skipped:
            self.skipped_samples += len(window)
        if self._skipped_in_a_row == _MOST_SKIPS:
            self._stop_on(f"the GradScaler skipped {_MOST_SKIPS} steps in a row", window)

    def _rate_of(self, done: int, size: int) -> float:
        """The rate at the middle of a window: neither the first step of a warm-up nor the last of a decay is zero."""
        return self.lr((done + size / 2) / (self.epochs * self.plan.samples))

    def _backward(self, micro: Micro, batch: Batch, *, scale: float) -> None:
        """Forward and backward of one micro-batch; adds `scale` times the sum of its losses to the gradient."""
        seed_all(random_key(self.seed, "step", self.step, micro.number))
        outputs = self.step_function(self.tail, batch)
        if not self._outputs_checked:
            check_outputs(outputs, size=len(micro.indices))
            self._outputs_checked = True
        loss = outputs["loss"].sum() * (scale * micro.counts)
        (loss if self.accelerator.scaler is None else self.accelerator.scaler.scale(loss)).backward()
        if micro.counts:
            self.totals.add(outputs)

    def _settle(self, micro: Micro, batches: Iterator[Batch]) -> Iterator[Batch]:
        """A backward for nothing, so that DDP arranges its buckets now; gives the batches again.

        After its first backward DDP puts the parameters into the order in which their gradients came. With their place
        in a bucket changes the order in which more than two processes are summed: without this, the first step after a
        resume would have other bits than the same step of a run that was not interrupted.
        """
        first = next(batches)
        with _same_buffers(self.tail):
            self._backward(micro._replace(counts=False), first, scale=0.0)
        self.optimizer.zero_grad()
        self._settled = True
        return chain([first], batches)

    def _try_one(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Find out now, not at the end of the epoch, whether the tail can train on one image; gives the batches."""
        first = next(batches)
        try:
            with torch.no_grad(), _same_buffers(self.tail):
                self.accelerator.unwrap_model(self.tail)(*(tensor[:1] for tensor in first["inputs"]))
        except ValueError as error:
            raise UsageError(
                f"a BatchNorm that trains cannot take the last micro-batch of an epoch, which has one image: {error} "
                f"({self.plan}). Choose another --batch-size or --micro-batch, or leave BatchNorm frozen."
            ) from error
        self._one_to_try = False
        return chain([first], batches)

    def _reduce_in_order(self, window: list[int], share: list[Micro], batches: Iterator[Batch]) -> None:
        """The gradient of a window as g₀ + g₁ + ..., of its micro-batches in their order, on any number of processes.

        DDP adds what each process has accumulated: another order for another number of processes, and other bits.
        """
        ranks, micros = self.plan.processes, math.ceil(len(window) / self.plan.micro_batch)
        parameters = list(self.trainable.values())
        total = None
        for first in range(0, micros, ranks):  # in each round, process r has the micro-batch number first + r
            if first // ranks < len(share):
                with self.accelerator.no_sync(self.tail):
                    self._backward(share[first // ranks], next(batches), scale=1 / len(window))
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            self.optimizer.zero_grad()
            rows = [flat]
            if ranks > 1:
                rows = [torch.empty_like(flat) for _ in range(ranks)]
                torch.distributed.all_gather(rows, flat)
            for row in rows[: micros - first]:
                total = row if total is None else total + row
        for parameter, gradient in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = gradient.view_as(parameter)

    def _stop_on(self, reason: str, window: list[int]) -> None:
        """End the run, on every process: nothing has been updated by this window."""
        self.optimizer.zero_grad()
        raise NumericalError(
            f"{reason} in step {self.step + 1} (epoch {self.epoch + 1}), at learning rate {self.rate:.3g}; no weight "
            "was changed by it. Lower --lr, add --clip-norm 1, or look at the images of the step.",
            step=self.step + 1,
            samples=window,
        )

    def check_replicas(self) -> None:
        """Compare the trainable parameters of all processes, bit by bit (a collective).

        Raises:
            NumericalError: on every process; names the first parameter that differs and the processes that have it.
        """
        mine = {name: digest(parameter) for name, parameter in self.trainable.items()}
        found = gather_object([mine]) if self.accelerator.num_processes > 1 else [mine]
        for name in mine:
            other = [rank for rank, digests in enumerate(found) if digests[name] != found[0][name]]
            if other:
                raise NumericalError(
                    f"after step {self.step} the replicas of {name} differ: processes {other} from process 0. Continue "
                    "from the last checkpoint; if it happens again, suspect the hardware.",
                    step=self.step,
                )

    def check_frozen(self) -> None:
        """Compare the frozen parameters and buffers, on all processes, with those at the start (a collective).

        Raises:
            NumericalError: on every process; names the first tensor that changed and the processes where it did.
        """
        now = fingerprint(self.model)
        mine = [name for name, expected in self.fingerprint.items() if now.get(name) != expected]
        found = gather_object([mine]) if self.accelerator.num_processes > 1 else [mine]
        for names in filter(None, found):
            ranks = [rank for rank, others in enumerate(found) if names[0] in others]
            raise NumericalError(
                f"after step {self.step} the frozen {names[0]} is not what it was at the start (processes {ranks}; "
                f"{len(names)} of {len(now)} frozen tensors changed). Something writes to it: look for code that sets "
                "its values or takes its module out of eval mode. Checkpoints of this run hold only what trains.",
                step=self.step,
            )

    # ---------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, source: Source, *, between: Callable[[], None] = lambda: None) -> dict[str, float]:
        """The means of the step's values over every sample of `source`, each counted once, on every process.

        Args:
            source: features of the validation set.
            between: called after each batch, the same number of times on every process.
        """
        model = self.accelerator.unwrap_model(self.tail)  # the wrapper would wait for processes that have no batch left
        self._agree_on_buffers()
        self._trunk_batch = getattr(source, "batch", None) or self.plan.micro_batch
        return evaluate(self.accelerator, model, source, plan=self.plan, step=self.step_function, between=between)

    @torch.no_grad()
    def logits(self, source: Source, indices: list[int]) -> Tensor:
        """The logits `[len(indices), C]` of some samples, on this process alone."""
        model = self.accelerator.unwrap_model(self.tail)
        model.eval()
        return torch.cat([model(*batch["inputs"]).float() for batch in source.batches([indices], epoch=0)])

    def _agree_on_buffers(self) -> None:
        """BatchNorm statistics of the tail are the main process's: between two steps the others' may differ."""
        if self.accelerator.num_processes > 1:
            for tensor in trained_tensors(self.model).values():
                if not isinstance(tensor, nn.Parameter):
                    torch.distributed.broadcast(tensor, src=0)

    # --------------------------------------------------------------------------------------------- checkpoints

    def state(self) -> checkpoint.State:
        """What a checkpoint holds; see `checkpoint.KEYS` (a collective)."""
        totals = self.totals.over_processes(self.accelerator)
        scaler = self.accelerator.scaler
        return {
            "model": {name: tensor.detach().cpu().clone() for name, tensor in trained_tensors(self.model).items()},
            "optimizer": checkpoint.optimizer_state(self.optimizer.optimizer, self.model),
            "scaler": self._scaler_state if scaler is None else scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "samples": self.samples,
            "skipped_samples": self.skipped_samples,
            "totals": totals,
            "metrics": self.metrics,
            "training_samples": self.plan.samples,
            "compute": {
                "device": self.accelerator.device.type,
                "precision": self.accelerator.mixed_precision,
                "micro_batch": self.plan.micro_batch,
                "trunk_batch": self._trunk_batch,
            },
            "fingerprint": self.fingerprint,
            **self.about,
        }

    def save(self, folder: Path, *, best: bool = False, keep: int = 2, final: bool = False) -> Path | None:
        """Write a checkpoint of this moment, by the main process (a collective); see `checkpoint.Saver`.

        Args:
            folder: where the run's checkpoints live; created if missing.
            best: also write it to `best.pt`.
            keep: how many of the newest stay, at least 2.
            final: there will be no next save: a failure is an error.

        Returns:
            The file; None if it could not be written.

        Raises:
            OSError: it could not be written, the third time in a row; older checkpoints are untouched.
        """
        state = self.state()
        save = partial(self._saver.save, folder, state, best=best, keep=keep, final=final)
        path = from_main(self.accelerator, save)
        self.saved = path is not None
        return path

    def load(self, path: Path) -> None:
        """Continue from a checkpoint: tail, optimizer, scaler, counters (a collective: the main process reads).

        Raises:
            CheckpointError: damaged, or not of this model, these classes, this optimizer or these frozen weights; says
                what was expected and what was found. The model is then unchanged.
        """
        state = from_main(self.accelerator, lambda: checkpoint.read(path))
        if state["training_samples"] != self.plan.samples:
            raise CheckpointError(
                f"{path} was trained on {state['training_samples']:,} images; this training set has "
                f"{self.plan.samples:,}. Continue with the data it was trained on."
            )
        for name in ("classes", "freeze_plan"):
            if state[name] != self.about[name]:
                raise CheckpointError(f"{path} has other {name}: {state[name]}; this run has {self.about[name]}.")
        check_fingerprint(self.fingerprint, state["fingerprint"])
        if state["data"] != self.about["data"]:
            raise CheckpointError(f"{path} has other data: {state['data']}; this run has {self.about['data']}.")
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
        if self.samples:
            last = (self.samples - 1) % self.plan.samples % self.plan.batch_size + 1  # the window that ends here
            self.rate = self._rate_of(self.samples - self.skipped_samples - last, last)
        main = self.accelerator.is_main_process  # the sums of all, on any number of processes: one goes on from them
        self.totals = Totals(self.accelerator.device, start=state["totals"] if main else None)
        self._epoch_trained = False


@contextmanager
def _same_buffers(module: nn.Module) -> Iterator[None]:
    """What is tried on a module does not count: a BatchNorm that trains has not seen it."""
    before = {name: value.clone() for name, value in module.named_buffers()}
    try:
        yield
    finally:
        for name, value in module.named_buffers():
            value.copy_(before[name])
