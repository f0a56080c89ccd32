"""Fine-tune a vision model: freeze it, cut it where training begins, and train the part after the cut.

accelerate launch --config_file accelerate_configs/cpu.yaml train.py                     # the built-in demo, 98 %
accelerate launch --config_file accelerate_configs/gpu.yaml train.py --data ~/photos --model resnet50
accelerate launch --config_file accelerate_configs/multi_gpu.yaml train.py --data ~/photos --train head layer4
accelerate launch --config_file accelerate_configs/gpu.yaml train.py --data ~/photos --model resnet50 --resume auto
"""

import trainer
from trainer.cli import cleaning_up, end_at_once, parse
from trainer.config import Config, settle_augment, to_dict


@cleaning_up()  # signal handlers and locks, for a program that goes on afterwards, such as a notebook
def main(config: Config) -> None:
    """One run. The launcher chooses devices, processes and precision; `config` holds every other choice."""
    accelerator, say = trainer.start(exact=config.run.exact, timeout=config.run.timeout), trainer.print_main
    stop = trainer.Preemption(accelerator, time_limit=config.run.time_limit, save_minutes=config.run.save_minutes)

    # 1. Where to start, with which settings: at the checkpoint --resume names, at the newest, or anew.
    config, run = trainer.open_run(accelerator, config)
    recipe = trainer.load_recipe(config.run.recipe)  # your own data, model, loss, metrics: trainer/recipe.py
    optim, seed, exact, device = config.optim, config.run.seed, config.run.exact, accelerator.device

    # 2. Images, the same on all processes. Bad settings and bad data end the run here, before anything takes long.
    workers = trainer.Workers.of(accelerator, config.speed.workers, minutes=config.run.timeout)
    data = trainer.open_data(accelerator, config.data, recipe.images, seed=seed, known=run.data, workers=workers)
    plan = trainer.BatchPlan(len(data.train), optim.batch_size, optim.micro_batch, accelerator.num_processes)

    # 3. The model: pretrained features under a new head. One process downloads, then the others find the file.
    classifier = trainer.main_first(accelerator, recipe.classifier, config, data.classes)
    model, spec = classifier.model.to(device), classifier.input
    normalize = spec.normalize(device)  # images as decoded, uint8 [B, 3, S, S] -> float

    # 4. Freeze, then cut: the trunk runs in eval mode, without autograd; DDP and the optimizer see only the tail.
    freeze_plan = trainer.freeze(model, config.model.train, head=classifier.head)
    config = settle_augment(config, head_alone=freeze_plan.within(classifier.head))
    train_set, val_set = trainer.transformed(data, recipe.transforms(config.data, spec), config.speed, spec, seed=seed)
    sample = normalize(val_set.some(8).to(device))
    split = trainer.split_model(model, sample[:1])
    if config.speed.compile_tail:
        split.tail.compile(dynamic=False)  # for each shape by itself: a resumed run must come to the same program

    # 5. The trunk's output depends on the image alone: without augmentation it is computed once, and kept.
    features = trainer.Features(
        accelerator,
        split.trunk,
        normalize,
        sample,
        {"val": val_set, "train": train_set},
        config=config.speed,
        epochs=int(optim.settled().epochs) - run.epochs,
        plan=plan,
        exact=exact,
        folder=run.path / "features",
        workers=workers,
    )
    say(f"data    {data}", f"model   {config.model.model} at {spec.size} px, {classifier.origin}")
    say(f"train   {freeze_plan}", f"split   {split}", f"batch   {plan}", features.plan)
    say(f"run     {run.path}, on {device.type} in {trainer.precision(accelerator)}")

    about = {"config": to_dict(config), "recipe": recipe.sources(), "decided": {"compiled": features.compiled}}
    about |= {"freeze_plan": freeze_plan.to_dict(), "base": classifier.base} | data.state()
    optimizer = recipe.optimizer(model, optim.settled(), fused=accelerator.scaler is None)
    loop = trainer.Trainer(
        accelerator, model, split.tail, optimizer, plan, optim, recipe=recipe, seed=seed, exact=exact, about=about
    )
    if run.state is not None:
        loop.load(run.state)
        say(f"resume  {run.source}: epoch {loop.epoch} of {loop.epochs} done, step {loop.step}")
    if loop.finished(patience=optim.patience):
        say("finished already: nothing to train. Give more --epochs or --patience, or a new --output.")
        return

    # 6. Train. From here on the folder is this run's: locked, its state in status.json, saved however it ends.
    reports = {"freeze_plan.json": freeze_plan.content(), "weights_report.json": classifier.report_content()}
    training = trainer.training(run, loop, stop, config=config, reports=reports, name_of=data.train.name)
    with training, features:
        val, train = features.open("val", between=stop.check), features.open("train", between=stop.check)
        trainer.tune(loop, train, config, run, between=stop.check)  # --lr auto: many heads, compared on training images
        with trainer.Logs(loop, run.path, track=config.run.track) as logs:
            while not loop.finished(patience=optim.patience):
                logs.start_epoch(loop)
                for step in loop.steps(train):
                    logs.after_step(loop)
                    if stop.check() | trainer.due(step, config.run.save_every):  # | and not or: check() is a collective
                        loop.save(run.checkpoints, keep=config.run.keep)
                    loop.check(step, config.run)
                best = loop.finish_epoch(loop.evaluate(val, between=stop.check))
                logs.end_epoch(loop, best=best)
                loop.save(run.checkpoints, best=best, keep=config.run.keep)
                if best:
                    logs.show_predictions(loop, val, val_set, data.classes, recipe.prediction)
        loop.check_frozen()
    say(f"done: {loop}; {run.checkpoints / 'best.pt'}")


if __name__ == "__main__":
    end_at_once()
    config = parse(__doc__)  # before `trainer.run_and_exit` imports torch: --help answers at once
    trainer.run_and_exit(main, config)
