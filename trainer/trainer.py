"""`Trainer`: train an epoch, evaluate, save, load; and the promises that hold through all four.

1. Frozen parts are never in train mode, never in autograd, never in a file.
2. The gradient of a step is the mean over its samples, for any accumulation, any number of processes and a shorter last
   step: losses are summed and divided by the number of samples.
3. Nothing random is carried from step to step; see `data.sampling`.
4. Every sample is used once in an epoch, and counted once in an evaluation.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer import checks
from trainer.config import OptimConfig, RunConfig
from trainer.data.sampling import BatchPlan, Micro, random_key, seed_all
from trainer.errors import CheckpointError, NumericalError, UsageError
from trainer.evaluation import Metrics, evaluate
from trainer.metrics import Totals, means
from trainer.model.freezing import check_fingerprint, fingerprint, trained_tensors
from trainer.processes.together import on_main, print_main
from trainer.reduction import rehearse, sum_in_order
from trainer.steps import Batch, Step, check_outputs
from trainer.storage import checkpoint
from trainer.storage.optimizer_state import group_values, optimizer_state, positional_state
from trainer.trunk.features import Source

_MOST_SKIPS = 20  # in a row: a GradScaler that looks for its scale needs fewer (65,536 = 2¹⁶)


def due(step: int, every: int | None) -> bool:
    """Whether something is due that happens every so many steps; None: never."""
    return every is not None and step % every == 0


class TrainingRecipe(Protocol):
    """The parts of a recipe that a Trainer uses."""

    @property
    def step(self) -> Callable[[OptimConfig], Step]: ...
    @property
    def learning_rate(self) -> Callable[[OptimConfig], Callable[[float], float]]: ...
    @property
    def metrics(self) -> Metrics | None: ...
    @property
    def score(self) -> Callable[[dict[str, float]], float]: ...


class Trainer:
    """Trains the tail of a model.

        for step in trainer.steps(train):                  # one optimizer step each, to the end of the epoch
            ...
        best = trainer.finish_epoch(trainer.evaluate(val))
        trainer.save(folder, best=best)

    Args:
        accelerator: from `processes.startup.start`; wraps the tail, the optimizer and, for fp16, a GradScaler.
        model: the whole model, frozen and split; never wrapped. It names the parameters, which it shares with the tail.
        tail: its trainable part; `tail(*inputs)` returns logits.
        optimizer: over the model's trainable parameters. Each group keeps the ratio of its learning rate to the highest
            of all groups. A group may have a "schedule" of its own: progress, 0 to 1, → its learning rate. One with
            methods `train` and `eval`, such as schedule-free ones, is in train mode during steps, and in eval mode
            during evaluations and saves: its weights of eval mode are those that are evaluated, saved and exported.
        plan: batch sizes; progress is counted in global samples.
        config: `epochs` and `clip_norm`, and whatever the recipe takes from it.
        recipe: its `step`, `learning_rate`, `metrics` and `score`; see trainer/recipe.py.
        seed: of the sample order and of the randomness within a step.
        exact: sum gradients in one order on any number of processes, see `reduction.sum_in_order`.
        about: entries of checkpoints that the trainer only passes on: "freeze_plan", "classes", "data", ...

    Attributes:
        epoch, step, samples: finished epochs, optimizer steps, and training samples used over all processes.
        rate: learning rate of the last step.
        totals: sums of the metrics of this process in the current epoch.
        metrics: {"train": {...}, "val": {...}, "best": {..., "epoch": n}} of the last finished epoch.
        saved: whether the last save succeeded.
        within_step: whether sums and buffers count a part of a step already, so that nothing may be saved now.

    Raises:
        UsageError: `exact` with a BatchNorm that trains; or the optimizer's parameters are not those that train.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        tail: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: BatchPlan,
        config: OptimConfig,
        *,
        recipe: TrainingRecipe,
        seed: int = 0,
        exact: bool = False,
        about: dict[str, Any],
    ):
        self.accelerator, self.model = accelerator, model
        self.trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
        checks.check_trainable(model, self.trainable, optimizer)
        # Only the tail: no frozen parameter is reduced, no frozen BatchNorm buffer broadcast.
        self.tail, self.optimizer = accelerator.prepare(tail, optimizer)
        highest = max(group["lr"] for group in optimizer.param_groups)
        self._groups, self._ratios = group_values(optimizer), [g["lr"] / highest for g in optimizer.param_groups]
        self.plan, self.recipe, self.seed, self.exact = plan, recipe, seed, exact
        self.configure(config)
        self.step_function, self.metrics_function, self.score = recipe.step(config), recipe.metrics, recipe.score
        checks.check_functions(self.lr, self.step_function)
        self.about, self.fingerprint = {"data": {}, **about}, fingerprint(model)
        self.epoch = self.step = self.samples = self.skipped_samples = self._skipped_in_a_row = 0
        self.rate = 0.0
        self.totals = Totals(accelerator.device)
        self.metrics: dict[str, dict[str, float]] = {}
        self.saved, self._saver = True, checkpoint.Saver()
        self.within_step = self._outputs_checked = self._epoch_trained = False
        self._scaler_state: dict[str, Any] | None = None  # kept while a run continues without a scaler
        buffers = trained_tensors(model).keys() - self.trainable.keys()
        self._trunk_batch = plan.micro_batch
        # What `reduction.rehearse` has still to do.
        self.try_one_image = bool(buffers) and plan.smallest == 1
        self.arrange_buckets = accelerator.num_processes > 1 and not exact
        if buffers and exact:
            raise UsageError(
                "--exact: a BatchNorm that trains keeps statistics of the batches that its own process saw, here "
                f"{min(buffers)}. Leave it frozen (--train without it), or train without --exact."
            )

    def configure(self, config: OptimConfig) -> None:
        """Set the schedule of the learning rate, the number of epochs, and clipping; see `OptimConfig.settled`."""
        config = config.settled()
        self.lr, self.epochs, self.clip_norm = self.recipe.learning_rate(config), int(config.epochs), config.clip_norm

    # ------------------------------------------------------------------------------------------------ training

    def steps(self, source: Source) -> Iterator[int]:
        """Train on the rest of the epoch, one optimizer step at a time: each sample once, in the order of this epoch.

        All processes take the same steps. The loop may be left after any step: the trainer can then be saved, and
        another call continues where it stopped.

        Args:
            source: features of the training set.

        Yields:
            The number of optimizer steps so far.

        Raises:
            NumericalError: a loss or gradient is not finite; nothing has been updated by it, on any process.
            UsageError: a BatchNorm that trains cannot take the smallest micro-batch, of one image; or what trains was
                changed since the trainer was built.
        """
        assert not self._epoch_trained, f"epoch {self.epoch + 1} is trained; finish_epoch() begins the next"
        checks.check_trainable(self.model, self.trainable, self.optimizer)
        start = self.samples - self.epoch * self.plan.samples  # not 0 after a resume within the epoch
        windows = list(self.plan.windows(seed=self.seed, epoch=self.epoch, start=start))
        rank = self.accelerator.process_index
        shares = [self.plan.share(window, rank=rank, filler=not self.exact) for window in windows]
        batches = source.batches([micro.indices for share in shares for micro in share], epoch=self.epoch)
        self.tail.train()
        if windows:
            batches = rehearse(self, shares[0], batches)
        for window, share in zip(windows, shares, strict=True):
            self._update(window, share, batches)
            self._epoch_trained = window is windows[-1]
            yield self.step
        self._epoch_trained = True

    def finish_epoch(self, val: dict[str, float]) -> bool:
        """Count the epoch as done, once it is trained and evaluated (a collective).

        Args:
            val: metrics of the validation set, from `evaluate`.

        Returns:
            Whether this epoch is the best so far: the first with the highest score. NaN is never best.

        Raises:
            UsageError: `score` needs a metric that there is not.
        """
        train, best = means(self.totals.over_processes(self.accelerator)), self.metrics.get("best", {})
        known = self._score(best) if best else -math.inf
        is_best = self._score(val) > known
        self.epoch, self._epoch_trained = self.epoch + 1, False
        self.metrics = {"train": train, "val": val, "best": {**val, "epoch": self.epoch} if is_best else best}
        self.totals = Totals(self.accelerator.device)
        return is_best

    def finished(self, *, patience: int | None = None) -> bool:
        """Whether all epochs are done, or the last `patience` epochs were no better than an earlier one."""
        unbeaten = self.epoch - self.metrics.get("best", {}).get("epoch", self.epoch)
        return self.epoch >= self.epochs or (patience is not None and unbeaten >= patience)

    def __str__(self) -> str:
        best = dict(self.metrics.get("best", {}))
        epoch, early = int(best.pop("epoch", 0)), " (stopped early: no better one since)" * (self.epoch < self.epochs)
        values = ", ".join(f"{name} {value:.4f}" for name, value in sorted(best.items()))
        return f"best validation epoch {epoch}{early}: {values}" if best else "no epoch is the best yet"

    def _score(self, val: dict[str, float]) -> float:
        try:
            return self.score({name: value for name, value in val.items() if name != "epoch"})
        except KeyError as error:
            known = ", ".join(sorted(val.keys() - {"epoch"}))
            raise UsageError(
                f"the score of an epoch needs the metric {error}, and the validation metrics are {known}. Let score() "
                "of the recipe use one of these, or let step() or metrics() return the missing one."
            ) from error

    def _update(self, window: list[int], share: list[Micro], batches: Iterator[Batch]) -> None:
        """One optimizer step: forward and backward of this process's micro-batches, reduction, update."""
        self.optimizer.train()
        self.rate = self._set_rates(self.samples - self.skipped_samples, len(window))
        if self.exact:
            sum_in_order(self, window, share, batches)
        else:
            for micro in share:
                last = micro is share[-1]  # DDP reduces in this backward, and averages over processes
                with nullcontext() if last else self.accelerator.no_sync(self.tail):
                    self.backward(micro, next(batches), scale=self.plan.processes / len(window))

        # Reduced gradients are the same on every process, so is their norm, and so is this decision. With a scaler
        # an infinite norm is expected now and then: it skips the update and lowers its scale.
        if self.clip_norm or self.accelerator.scaler is not None:
            norm: Any = self.accelerator.clip_grad_norm_(self.trainable.values(), self.clip_norm or math.inf)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.trainable.values() if p.grad is not None])
        if self.accelerator.scaler is None and not math.isfinite(norm):
            self._stop_on("the gradient is not finite", window)
        # Bypass the wrapper where it has nothing to add: it inspects signatures, and looks for packages, at every step.
        optimizer = self.optimizer.optimizer if self.accelerator.scaler is None else self.optimizer
        optimizer.step()
        optimizer.zero_grad()
        self.step, self.samples, self.within_step = self.step + 1, self.samples + len(window), False
        skipped = self.accelerator.scaler is not None and self.accelerator.optimizer_step_was_skipped
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        self.skipped_samples += len(window) * skipped
        if self._skipped_in_a_row == _MOST_SKIPS:
            self._stop_on(f"the GradScaler skipped {_MOST_SKIPS} steps in a row", window)

    def _set_rates(self, done: int, size: int) -> float:
        """Set the rate of each group, at the middle of a step: neither the first nor the last of a run is zero."""
        progress = (done + size / 2) / (self.epochs * self.plan.samples)
        rate = self.lr(progress)
        for group, ratio in zip(self.optimizer.param_groups, self._ratios, strict=True):
            group["lr"] = group["schedule"](progress) if "schedule" in group else rate * ratio
        return rate

    def backward(self, micro: Micro, batch: Batch, *, scale: float) -> None:
        """Forward and backward of one micro-batch; adds `scale` times the sum of its losses to the gradient."""
        seed_all(random_key(self.seed, "step", self.step, micro.number))
        self.within_step = True
        outputs = self.step_function(self.tail, batch)
        if not self._outputs_checked:
            check_outputs(outputs, size=len(micro.indices))
            self._outputs_checked = True
        loss = outputs["loss"].sum() * (scale * micro.counts)
        (loss if self.accelerator.scaler is None else self.accelerator.scaler.scale(loss)).backward()
        if micro.counts:
            self.totals.add(outputs)

    def _stop_on(self, reason: str, window: list[int]) -> None:
        """End the run, on every process: nothing has been updated by this step."""
        self.optimizer.zero_grad()
        raise NumericalError(
            f"{reason} in step {self.step + 1} (epoch {self.epoch + 1}), at learning rate {self.rate:.3g}; no weight "
            "was changed by it. Lower --lr, add --clip-norm 1, or look at the images of the step.",
            step=self.step + 1,
            samples=window,
        )

    # -------------------------------------------------------------------------------------------------- checks

    def check(self, step: int, config: RunConfig) -> None:
        """Check replicas and frozen tensors at the steps that `check_replicas` and `check_frozen` of `config` name."""
        if due(step, config.check_replicas):
            self.check_replicas()
        if due(step, config.check_frozen):
            self.check_frozen()

    def check_replicas(self) -> None:
        """Compare the trainable parameters of all processes, bit by bit (a collective); see `checks.check_replicas`."""
        checks.check_replicas(self.accelerator, self.trainable, step=self.step)

    def check_frozen(self) -> None:
        """Compare the frozen tensors with those at the start (a collective); see `checks.check_frozen`."""
        checks.check_frozen(self.accelerator, self.model, self.fingerprint, step=self.step)

    # ---------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, source: Source, *, between: Callable[[], Any] = lambda: None) -> dict[str, float]:
        """The metrics of a validation set, each sample counted once, on every process (a collective).

        Args:
            source: features of the validation set.
            between: called after each batch, the same number of times on every process.
        """
        self.optimizer.eval()
        model = self.accelerator.unwrap_model(self.tail)  # the wrapper would wait for processes that have no batch left
        self._agree_on_buffers()
        self._trunk_batch = getattr(source, "batch", None) or self.plan.micro_batch
        return evaluate(
            self.accelerator,
            model,
            source,
            plan=self.plan,
            step=self.step_function,
            metrics=self.metrics_function,
            between=between,
        )

    @torch.no_grad()
    def outputs(self, source: Source, indices: list[int]) -> Tensor:
        """The outputs `[len(indices), ...]` of the tail for some samples, on this process alone."""
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
        self.optimizer.eval()
        totals = self.totals.over_processes(self.accelerator)
        scaler = self.accelerator.scaler
        state = {
            "model": {name: tensor.detach().cpu().clone() for name, tensor in trained_tensors(self.model).items()},
            "optimizer": optimizer_state(self.optimizer.optimizer, self.model, self._groups),
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
        return checkpoint.State(**state)

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
        path = on_main(self.accelerator, partial(self._saver.save, folder, state, best=best, keep=keep, final=final))
        self.saved = path is not None
        return path

    def load(self, state: checkpoint.State) -> None:
        """Continue from a checkpoint: tail, optimizer, scaler, counters.

        Args:
            state: its content, from `checkpoint.read`; the same on every process.

        Raises:
            CheckpointError: damaged, or not of this model, these classes, this optimizer or these frozen weights; says
                what was expected and what was found. The model is then unchanged.
        """
        if state["training_samples"] != self.plan.samples:
            raise CheckpointError(
                f"the checkpoint was trained on {state['training_samples']:,} images; this training set has "
                f"{self.plan.samples:,}. Continue with the data it was trained on."
            )
        for name in ("classes", "freeze_plan"):
            if state[name] != self.about[name]:
                raise CheckpointError(
                    f"the checkpoint has other {name}: {state[name]}; this run has {self.about[name]}."
                )
        check_fingerprint(self.fingerprint, state["fingerprint"])
        for part in ("training", "validation"):
            was, now = state["data"].get(part), self.about["data"].get(part)
            if was != now:
                raise CheckpointError(f"the checkpoint has other data for {part}: {was}; this run has {now}.")
        self.optimizer.eval()  # as it was saved
        print_main(*checks.recipe_differences(state["recipe"], self.about.get("recipe", {})))
        live, optimizer = trained_tensors(self.model), self.optimizer.optimizer
        checkpoint.check_tensors(state["model"], live)
        optimizer.load_state_dict(positional_state(state["optimizer"], optimizer, self.model))
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
            self.rate = self._set_rates(self.samples - self.skipped_samples - last, last)
        main = self.accelerator.is_main_process  # the sums of all, on any number of processes: one continues from them
        self.totals = Totals(self.accelerator.device, start=state["totals"] if main else None)
        self._epoch_trained = False
