import copy
import math
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from launching import TINY_RUN

import trainer
from trainer.config import OptimConfig
from trainer.errors import CheckpointError, NumericalError, UsageError
from trainer.metrics import means
from trainer.model.freezing import frozen_tensors
from trainer.optim import build_optimizer
from trainer.storage import checkpoint
from trainer.storage.optimizer_state import optimizer_state
from trainer.storage.state import State
from trainer.trunk.features import CachedFeatures


def _loop(
    model,
    *,
    train=("block", "fc"),
    samples=21,
    batch=8,
    micro=4,
    epochs=3,
    lr=0.05,
    optimizer="adamw",
    build=build_optimizer,
    clip_norm=None,
    step=None,
    learning_rate=None,
    **options,
):
    plan = trainer.freeze(model, train)
    parts = trainer.split_model(model, torch.zeros(1, 3, 8, 8))
    config = OptimConfig(epochs, optimizer=optimizer, lr=lr, schedule="constant", warmup=0.0, clip_norm=clip_norm)
    recipe = trainer.Recipe()
    recipe = replace(recipe, step=lambda _: step) if step else recipe
    recipe = replace(recipe, learning_rate=lambda _: learning_rate) if learning_rate else recipe
    return trainer.Trainer(
        Accelerator(cpu=True),
        model,
        parts.tail,
        build(model, config),
        plan=trainer.BatchPlan(samples, batch, micro, 1),
        config=config,
        recipe=recipe,
        about={"freeze_plan": plan.to_dict(), "classes": ["a", "b", "c"], "base": {}, "config": {}},
        **options,
    ), _source(parts, samples)


def _train(loop, source, after_step=lambda loop: None):
    """Train an epoch; returns the means of the training metrics."""
    for _ in loop.steps(source):
        after_step(loop)
    return means(loop.totals.sums())


VAL = {"accuracy": 0.5, "loss": 1.0}


def _source(parts, samples):
    images = torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return CachedFeatures(parts.trunk(images), torch.arange(samples) % 3)


def test_an_epoch_uses_every_sample_once_and_moves_only_what_trains(tiny):
    loop, source = _loop(tiny)
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    counts = []
    train = _train(
        loop, source, after_step=lambda loop: counts.append((loop.step, loop.samples, loop.totals.sums()["samples"]))
    )
    assert counts == [(1, 8, 8), (2, 16, 16), (3, 21, 21)]
    assert train.keys() == {"loss", "accuracy"}
    assert (loop.epoch, loop.step, loop.samples, loop.rate) == (0, 3, 21, 0.05)
    assert loop.finish_epoch(VAL)
    assert (loop.epoch, loop.metrics) == (1, {"train": train, "val": VAL, "best": {**VAL, "epoch": 1}})
    frozen = frozen_tensors(tiny).keys()
    assert {name for name, tensor in tiny.state_dict().items() if not torch.equal(tensor, before[name])} == (
        before.keys() - frozen
    )


@pytest.mark.parametrize("name", ["conv.weight", "bn.running_mean"])
def test_a_frozen_tensor_that_moves_is_named(tiny, name):
    loop, source = _loop(tiny)
    _train(loop, source)
    loop.check_frozen()
    tiny.state_dict()[name].view(torch.int32).flatten()[0] ^= 1
    with pytest.raises(
        NumericalError, match=rf"after step 3 the frozen {name} is not what it was.*1 of 7 frozen"
    ) as caught:
        loop.check_frozen()
    assert (caught.value.exit_code, caught.value.step) == (70, 3)


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulated_gradients_are_those_of_one_big_batch(tiny, micro):
    """SGD without momentum: the change of a weight is its gradient. 21 = 8 + 8 + 5: the last window is short."""
    tiny.late.p = 0.0  # dropout differs between micro-batches, as it should
    loop, source = _loop(tiny, train=["fc"], micro=micro, optimizer="sgd", lr=1.0)
    for group in loop.optimizer.param_groups:
        group["momentum"], group["weight_decay"] = 0.0, 0.0
    fc = torch.nn.Linear(8, 3)
    fc.load_state_dict(tiny.fc.state_dict())
    for window in loop.plan.windows(seed=0, epoch=0):
        features = source.inputs[0][window]
        loss = torch.nn.functional.cross_entropy(fc(features), source.labels[window])
        gradients = torch.autograd.grad(loss, list(fc.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(fc.parameters(), gradients, strict=True):
                parameter -= gradient
    _train(loop, source)
    torch.testing.assert_close(tiny.fc.weight, fc.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tiny.fc.bias, fc.bias, rtol=1e-5, atol=1e-6)


def test_each_micro_batch_of_each_step_draws_its_own_numbers(tiny):
    draws = []

    def step(model, batch):
        draws.append(torch.rand(()).item())
        return trainer.classification()(model, batch)

    loop, source = _loop(tiny, step=step)
    _train(loop, source)
    loop.finish_epoch(VAL)
    _train(loop, source)
    assert len(set(draws)) == len(draws) == 12  # 21 = 8 + 8 + 5 samples in micro-batches of 4, two epochs


def test_clipping(tiny):
    loop, source = _loop(tiny, train=["fc"], optimizer="sgd", lr=1.0, clip_norm=1e-3, samples=8)
    for group in loop.optimizer.param_groups:
        group["momentum"], group["weight_decay"] = 0.0, 0.0
    before = torch.cat([parameter.detach().flatten() for parameter in tiny.fc.parameters()])
    _train(loop, source)
    after = torch.cat([parameter.detach().flatten() for parameter in tiny.fc.parameters()])
    assert (after - before).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_evaluation_counts_each_sample_once_and_has_no_dropout(tiny):
    loop, source = _loop(tiny)
    first, again = loop.evaluate(source), loop.evaluate(source)
    assert first == again
    tiny.eval()
    outputs = loop.outputs(source, list(range(21)))
    assert first["accuracy"] == (outputs.argmax(1) == source.labels).sum().item() / 21
    loss = torch.nn.functional.cross_entropy(outputs, source.labels).item()
    assert first["loss"] == pytest.approx(loss, rel=1e-6)
    assert not loop.tail.training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(tiny, value):
    def step(model, batch):
        loss = model(*batch["inputs"]).square().sum(1)
        return {"loss": loss * torch.where(batch["index"] == 5, value, 1.0)}

    loop, source = _loop(tiny, train=["fc"], samples=8, step=step)
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    with pytest.raises(NumericalError, match=r"gradient is not finite in step 1 \(epoch 1\)") as stop:
        _train(loop, source)
    assert (stop.value.step, sorted(stop.value.samples)) == (1, list(range(8)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())
    assert (loop.step, loop.samples) == (0, 0)


def test_a_custom_step_is_checked_once_and_averaged_per_sample(tiny):
    def step(model, batch):
        loss = torch.nn.functional.cross_entropy(model(*batch["inputs"]), batch["label"], reduction="none")
        return {"loss": loss, "index": batch["index"]}

    loop, source = _loop(tiny, step=step)
    assert _train(loop, source)["index"] == 10.0
    assert loop.evaluate(source)["index"] == 10.0
    loop, source = _loop(tiny, step=lambda model, batch: {"loss": model(*batch["inputs"]).mean()})
    with pytest.raises(ValueError, match=r"expected one value per sample, shape \(4,\)"):
        _train(loop, source)


def test_a_scaler_skips_lowers_its_scale_and_comes_back(tiny, tmp_path):
    """The scaler of fp16, on a CPU: one infinite gradient costs one update, no step of the schedule, half the scale."""
    bad = {"step": 1}

    def step(model, batch):
        loss = model(*batch["inputs"]).square().sum(1)
        return {"loss": loss * (math.inf if loop.step == bad["step"] else 1.0)}

    loop, source = _loop(tiny, train=["fc"], step=step)
    _with_scaler(loop)
    weights, progress = [], []
    loop.lr = lambda share: progress.append(share) or 0.05
    _train(loop, source, after_step=lambda *_: weights.append(tiny.fc.weight.detach().clone()))
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(weights[0], weights[1])
    assert (loop.step, loop.samples, loop.skipped_samples) == (3, 21, 8)
    assert progress == [4 / 63, 12 / 63, (8 + 2.5) / 63]
    assert loop.accelerator.scaler.get_scale() == 512.0

    path = loop.save(tmp_path)
    other, _ = _loop(tiny, train=["fc"], step=step)
    other.load(checkpoint.read(path))  # without a scaler
    path = other.save(tmp_path / "plain")
    third, _ = _loop(tiny, train=["fc"], step=step)
    _with_scaler(third)
    third.load(checkpoint.read(path))
    assert third.accelerator.scaler.get_scale() == 512.0
    assert third.skipped_samples == 8


def _with_scaler(loop):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    loop.accelerator.scaler = scaler
    loop.optimizer.scaler = scaler
    loop.optimizer._accelerate_step_called = False
    loop.optimizer._optimizer_original_step_method = loop.optimizer.optimizer.step
    loop.optimizer._optimizer_patched_step_method = _patched(loop.optimizer, loop.optimizer.optimizer.step)


def _patched(optimizer, method):
    def patched(*args, **kwargs):
        optimizer._accelerate_step_called = True
        return method(*args, **kwargs)

    return patched


def test_two_and_two_epochs_are_four_to_the_bit(tiny, tmp_path):
    whole, source = _loop(tiny, epochs=4)
    start = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    for _ in range(4):
        _train(whole, source)
        whole.finish_epoch(VAL)
        if whole.epoch == 2:
            path = whole.save(tmp_path)
    end = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}

    tiny.load_state_dict(start)
    again, source = _loop(tiny, epochs=4)
    again.load(checkpoint.read(path))
    assert (again.epoch, again.step) == (2, 6)
    torch.manual_seed(99)  # nothing random is carried
    for _ in range(2):
        _train(again, source)
        again.finish_epoch(VAL)
    assert all(torch.equal(tensor, end[name]) for name, tensor in tiny.state_dict().items())
    left, right = (optimizer_state(loop.optimizer.optimizer, tiny)["state"] for loop in (again, whole))
    assert all(torch.equal(left[name][key], right[name][key]) for name in right for key in right[name])


class _Averaging(torch.optim.SGD):
    """SGD that keeps the mean of its weights; in eval mode the weights are that mean."""

    training = True

    @torch.no_grad()
    def step(self):
        assert self.training
        super().step()
        count = self.param_groups[0]["count"] = self.param_groups[0].get("count", 0) + 1  # not of a parameter
        for weight, state in self.state.items():
            state["mean"] = state.get("mean", torch.zeros_like(weight)).lerp(weight, 1 / count)

    def train(self):
        self._change(True)

    def eval(self):
        self._change(False)

    @torch.no_grad()
    def _change(self, training):
        for weight, state in self.state.items() if training != self.training else ():
            held = weight.clone()
            weight.copy_(state["mean"])
            state["mean"].copy_(held)
        self.training = training


def _build_averaging(model, config):
    return _Averaging([p for p in model.parameters() if p.requires_grad], lr=config.lr, momentum=0.5)


def test_an_optimizer_with_two_modes_is_evaluated_and_saved_in_eval_mode(tiny, tmp_path):
    kept = []

    def loop_of(model):
        return _loop(model, train=("fc",), samples=24, build=_build_averaging)

    loop, source = loop_of(copy.deepcopy(tiny))
    expected, _ = loop_of(copy.deepcopy(tiny))
    _train(loop, source, after_step=lambda loop: kept.append(loop.model.fc.weight.detach().clone()))
    mean = torch.stack(kept).mean(0)
    val = loop.evaluate(source)
    assert torch.allclose(loop.model.fc.weight, mean, atol=1e-6)
    assert not torch.allclose(mean, kept[-1], atol=1e-4)
    loop.finish_epoch(val)
    loop.save(tmp_path / "end")
    loop.save(tmp_path / "end")  # twice: nothing changes places again
    assert torch.equal(checkpoint.newest(tmp_path / "end")[1].model["fc.weight"], loop.model.fc.weight)

    steps = loop.steps(source)
    next(steps)
    loop.save(tmp_path / "middle")
    list(steps)
    for _ in range(2):
        _train(expected, source)
        expected.finish_epoch(expected.evaluate(source))
    loop.finish_epoch(loop.evaluate(source))
    for place in ("end", "middle"):
        resumed, _ = loop_of(copy.deepcopy(tiny))
        resumed.load(checkpoint.newest(tmp_path / place)[1])
        assert place != "end" or resumed.evaluate(source) == val
        _train(resumed, source)
        resumed.finish_epoch(resumed.evaluate(source))
        for other in (loop, expected):
            assert torch.equal(resumed.model.fc.weight, other.model.fc.weight)
            assert resumed.metrics["val"] == other.metrics["val"]


class _Flat(torch.nn.Sequential):
    """A BatchNorm on vectors, which one image has no statistics for."""

    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(192, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3))


def test_a_last_image_that_a_batchnorm_cannot_take_is_found_at_once():
    model = _Flat()
    loop, source = _loop(model, train=("2", "3"))  # 21 = 2 windows of 4 + 4, and one of 4 + 1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UsageError, match=r"one image: Expected more than 1 value .* \(the last of 5 images\)"):
        _train(loop, source)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert loop.step == 0


def test_after_a_resume_the_rate_is_that_of_the_last_step(tiny, tmp_path):
    """It is logged with an epoch of which only the evaluation was left to do."""
    loop, source = _loop(tiny)
    loop.lr = lambda progress: progress
    saved = []
    for _ in range(2):
        _train(loop, source, after_step=lambda loop: saved.append((loop.rate, loop.save(tmp_path, keep=9))))
        loop.finish_epoch(VAL)
    for rate, path in saved:
        fresh, _ = _loop(tiny)
        fresh.lr = loop.lr
        fresh.load(checkpoint.read(path))
        assert fresh.rate == rate


def test_a_checkpoint_holds_what_trained_and_nothing_else(tiny, tmp_path):
    loop, source = _loop(tiny)
    _train(loop, source)
    loop.finish_epoch(VAL)
    path = loop.save(tmp_path, best=True, keep=2)
    state = torch.load(path, weights_only=True)
    assert list(state) == ["format", *(name for name in State.__dataclass_fields__ if name != "format")]
    norm = [f"block.1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    assert set(state["model"]) == {"block.0.weight", "block.0.bias", *norm, "fc.weight", "fc.bias"}
    assert set(state["optimizer"]["state"]) == set(state["freeze_plan"]["trainable"])
    assert (state["epoch"], state["step"], state["samples"]) == (1, 3, 21)
    assert (tmp_path / "best.pt").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s["model"].pop("fc.bias"), "missing fc.bias"),
        (lambda s: s["model"].update({"extra.weight": torch.zeros(2)}), "unexpected extra.weight"),
        (lambda s: s["model"].update({"fc.bias": torch.zeros(5)}), r"fc.bias is torch.float32 \(5,\)"),
        (
            lambda s: vars(s).update(classes=["a", "c", "b"]),
            r"other classes: \['a', 'c', 'b'\]; this run has \['a', 'b', 'c'\]",
        ),
        (lambda s: s["freeze_plan"].update(train=["fc"]), "other freeze_plan"),
        (lambda s: s["optimizer"].update(kind="SGD"), "trained with SGD; this run uses AdamW"),
        (lambda s: s["optimizer"]["state"].pop("fc.weight"), "missing fc.weight"),
        (lambda s: s["optimizer"]["state"]["fc.bias"].pop("exp_avg_sq"), "of fc.bias is not like that of the other"),
        (lambda s: s["optimizer"]["state"].update({"fc.bias": []}), "of fc.bias is not like that of the other"),
        (lambda s: s["fingerprint"].update({"conv.bias": "0" * 16}), "conv.bias: expected sha256 0000"),
        (lambda s: vars(s).update(training_samples=22), "trained on 22 images; this training set has 21"),
    ],
)
def test_loading_what_does_not_fit_changes_nothing_and_says_what(tiny, tmp_path, change, says):
    loop, source = _loop(tiny)
    _train(loop, source)
    state = loop.state()
    change(state)
    path = checkpoint.path_of(tmp_path, 3)
    checkpoint.write(path, state)
    fresh, _ = _loop(tiny)
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    with pytest.raises(CheckpointError, match=says):
        fresh.load(checkpoint.read(path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())
    assert (fresh.epoch, len(fresh.optimizer.state)) == (0, 0)


def _ends(program, folder, *options, processes):
    """Run tiny_run.py to its end; gives the final state of each process."""
    done = program(folder, *options, target=TINY_RUN, cwd=folder.parent, processes=processes)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"end.{rank}.pt", weights_only=True) for rank in range(processes)]


# 33 and 37 samples in windows of 8: the last window leaves some processes without a micro-batch.
# SGD without clipping: AdamW and a clipped norm would hide a gradient of the wrong scale.
RUNS = {
    "streamed": ["--workers", "1", "--optimizer", "sgd", "--clip", "inf"],
    "cached": ["--cache", "--samples", "33"],
}


@pytest.fixture(scope="module")
def alone(program, tmp_path_factory):
    """One process with and without a cache: what the others are compared with."""
    folder = tmp_path_factory.mktemp("alone")
    return {name: _ends(program, folder / name, *options, processes=1)[0] for name, options in RUNS.items()}


@pytest.mark.parametrize(
    ("name", "processes"), [("streamed", 2), pytest.param("streamed", 4, marks=pytest.mark.slow), ("cached", 2)]
)
def test_processes_agree_with_each_other_and_with_one(program, alone, tmp_path, name, processes):
    expected, states = alone[name], _ends(program, tmp_path / "run", *RUNS[name], processes=processes)
    for state in states:
        assert all(torch.equal(state["replica"][name], states[0]["replica"][name]) for name in state["replica"])
        assert (state["step"], state["samples"]) == (expected["step"], expected["samples"])
        assert state["metrics"]["val"]["accuracy"] == expected["metrics"]["val"]["accuracy"]
        for part in ("train", "val"):
            assert state["metrics"][part]["loss"] == pytest.approx(expected["metrics"][part]["loss"], rel=1e-5)
    for name, value in expected["model"].items():
        assert ((states[0]["model"][name] - value).norm() / value.norm()).item() < 1e-5, name
    assert all(state["fingerprint"] == expected["fingerprint"] for state in states)


def test_replicas_with_a_batchnorm_that_trains_stay_equal(program, tmp_path):
    """Its statistics are the main process's when they are evaluated and saved."""
    first, second = _ends(program, tmp_path / "run", "--train", "block", "fc", "--epochs", "2", processes=2)
    assert all(torch.equal(first["replica"][name], second["replica"][name]) for name in first["replica"])
    assert first["metrics"] == second["metrics"]
