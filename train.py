"""Fine-tune a torchvision backbone.

accelerate launch --config_file accelerate_configs/cpu.yaml train.py                     # the built-in demo
accelerate launch --config_file accelerate_configs/gpu.yaml train.py --data ~/photos --model resnet50
accelerate launch --config_file accelerate_configs/multi_gpu.yaml train.py --data ~/photos --train head layer4
accelerate launch --config_file accelerate_configs/gpu.yaml train.py --data ~/photos --model resnet50 --resume auto
"""

from functools import partial
from pathlib import Path

import trainer
from trainer.config import Config, default_name, parse, resumed, to_dict
from trainer.preemption import end_at_once


def main(config: Config) -> None:
    accelerator, say = trainer.start(exact=config.run.exact, timeout=config.run.timeout), trainer.say
    config = trainer.from_main(accelerator, partial(resumed, config))  # one, on any number of machines
    data, model, optim, run = config.data, config.model, config.optim, config.run
    guard = trainer.Preemption(accelerator, time_limit=run.time_limit, save_minutes=run.save_minutes)

    # Where the run lives, and where it starts: at the checkpoint --resume names, at the newest one, or afresh.
    choose = partial(trainer.open_run, run.output, run.resume, default_name(config), overwrite=run.overwrite)
    folder = trainer.from_main(accelerator, choose)

    # Data and model: one process downloads, then the others find it done.
    load = partial(trainer.load_data, data.data, val_fraction=data.val_fraction, seed=run.seed, root=data.data_root)
    train_images, val_images = trainer.in_turn(accelerator, load)
    classes = list(train_images.classes)
    # What cannot be read is found now, not in the third hour; a resumed run leaves out what it left out before.
    workers = trainer.cores_per_process(accelerator) if data.workers is None else data.workers
    loading = {"workers": workers, "timeout": 60 * run.timeout}
    check = partial(trainer.check_images, check=data.check_data, skip=data.bad_images == "skip", **loading)
    known = trainer.from_main(accelerator, folder.skipped)
    (train_images, val_images), skipped = check(accelerator, (train_images, val_images), known=known)
    match = trainer.Match(**model.matching())
    build = partial(trainer.build_model, model.name, len(classes), weights=model.weights, match=match)
    backbone = trainer.in_turn(accelerator, partial(build, image_size=data.image_size, seed=run.seed))
    network, spec = backbone.model.to(accelerator.device), backbone.input
    model.weights = backbone.base.get("weights", model.weights)  # by name: "default" may be another one next year

    # Images are uint8 until they are on the device, where they are normalised.
    for images in (train_images, val_images) if data.fast_decode else ():
        images.shrink(2 * spec.resize)  # twice: a random crop enlarges a part
    shape = {"size": spec.size, "resize": spec.resize, "interpolation": spec.interpolation}
    augment = trainer.train_transform(data.augment, **shape)
    train_set = trainer.KeyedDataset(train_images, train_images.labels, augment, seed=run.seed)
    val_set = trainer.KeyedDataset(val_images, val_images.labels, trainer.eval_transform(**shape), seed=run.seed)
    normalize = trainer.Normalize(spec.mean, spec.std).to(accelerator.device)

    # Freeze, then cut: the trunk runs in eval mode, outside autograd; the tail is what is trained, saved and resumed.
    freeze_plan = trainer.freeze(network, model.train, head=backbone.head)
    sample = normalize(val_set.some(8).to(accelerator.device))
    parts = trainer.split_model(network, sample[:1])
    if model.compile_tail:
        parts.tail.compile(dynamic=False)  # for each shape by itself: a resumed run must not come to another program
    plan = trainer.BatchPlan(len(train_set), optim.batch_size, optim.micro_batch, accelerator.num_processes)
    say(f"data    {data.data}: {len(train_set):,} training, {len(val_set):,} validation images, {len(classes)} classes")
    if any(skipped):
        say(f"        unreadable, left out: {sum(map(len, skipped))}")
    say(f"model   {model.name} at {spec.size} px, {backbone.origin}")
    say(f"train   {freeze_plan}", f"split   {parts}", f"batch   {plan}")

    # The trunk's output is a function of the image alone: what is not augmented goes through it once.
    place = {"folder": Path(run.cache_dir or folder.path / "features"), "memory": run.cache_memory}
    place |= {"lasting": run.cache_dir is not None, "batch": plan.micro_batch if run.exact else None}
    features = trainer.Features(accelerator, parts.trunk, normalize, sample, **place, **loading)
    train = features.stream(train_set, views=1 if data.augment == "none" else data.views)
    val = features.stream(val_set, views=1)
    say(*features.plan(val=val, train=train, epochs=optim.epochs, micro=plan.micro_batch, compile=model.compile))
    model.compile = "on" if features.compiled else "off"  # a resumed run must not find otherwise
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    say(f"run     {folder.path}, on {accelerator.device.type} in {precision}")
    trainer.agree(accelerator, data=train_images.digest, validation=val_images.digest)

    settings = {"lr": optim.lr, "weight_decay": optim.weight_decay, "momentum": optim.momentum}
    optimizer = trainer.build_optimizer(network, optim.optimizer, **settings, fused=accelerator.scaler is None)
    loop = trainer.Trainer(
        accelerator,
        network,
        parts.tail,
        optimizer,
        plan=plan,
        lr=partial(trainer.learning_rate, peak=optim.lr, schedule=optim.schedule, warmup=optim.warmup),
        epochs=optim.epochs,
        step=trainer.classification(label_smoothing=optim.label_smoothing),
        clip_norm=optim.clip_norm,
        seed=run.seed,
        exact=run.exact,
        about={
            "freeze_plan": freeze_plan.to_dict(),
            "classes": classes,
            "data": {"training": train_images.digest(), "validation": val_images.digest(), "skipped": skipped},
            "base": backbone.base,
            "config": to_dict(config),
        },
    )
    if folder.source is not None:
        loop.load(folder.source)
        say(f"resume  {folder.source}: epoch {loop.epoch} of {optim.epochs} done, step {loop.step}")

    def done() -> bool:
        unbeaten = loop.epoch - loop.metrics.get("best", {}).get("epoch", loop.epoch)
        return loop.epoch >= optim.epochs or (optim.patience is not None and unbeaten >= optim.patience)

    if done():
        say("finished already: nothing to train. Give more --epochs or --patience, or a new --output.")
        return
    kept = {"plan": freeze_plan, "report": backbone.report, "best": loop.metrics.get("best")}
    begin = partial(folder.begin, to_dict(config), **kept)
    loop.metrics |= {"best": trainer.from_main(accelerator, begin)}

    logs = trainer.Logs(accelerator, folder.path, epochs=optim.epochs, step=loop.step)

    def after_step(loop: trainer.Trainer) -> None:
        logs.after_step(loop)
        if guard.check() | (run.save_every is not None and loop.step % run.save_every == 0):
            loop.save(folder.checkpoints, keep=run.keep)
        if run.check_replicas is not None and loop.step % run.check_replicas == 0:
            loop.check_replicas()
        if run.check_frozen is not None and loop.step % run.check_frozen == 0:
            loop.check_frozen()

    with folder.outcome(loop, guard, name_of=train_images.name, keep=run.keep):
        val, train = (features.keep(part, between=guard.check) for part in (val, train))
        while not done():
            logs.start_epoch(loop)
            train_means = loop.train_epoch(train, after_step=after_step)
            val_means = loop.evaluate(val, between=guard.check)
            best = val_means["accuracy"] > loop.metrics["best"].get("accuracy", -1.0)
            top = {**val_means, "epoch": loop.epoch + 1} if best else loop.metrics["best"]
            loop.finish_epoch(train=train_means, val=val_means, best=top)
            logs.end_epoch(loop, best=best)
            if best:
                logs.show_predictions(loop, val, val_set, classes)
            loop.save(folder.checkpoints, best=best, keep=run.keep)
        loop.check_frozen()
    logs.close()
    features.close()
    if loop.epoch < optim.epochs:
        say(f"stopped early: no better validation accuracy for {optim.patience} epochs")
    say(f"done: best validation accuracy {loop.metrics['best']['accuracy']:.2%}; {folder.checkpoints / 'best.pt'}")


if __name__ == "__main__":
    end_at_once()
    config = parse(__doc__)  # before run_and_exit imports torch: --help answers at once
    trainer.run_and_exit(main, config)
