"""timm's pieces, put together as its train.py does.

Follows https://github.com/huggingface/pytorch-image-models/blob/main/train.py: `create_model`, `create_dataset`,
`create_loader` (uint8 batches, normalised by its prefetcher), `create_optimizer_v2`, `create_scheduler_v2` stepped by
update, `AverageMeter`, a host sync only where it logs, four data workers; frozen by `timm.utils.freeze`, which turns
BatchNorm layers into `FrozenBatchNorm2d`, that is, eval mode.
Unequal: no augmentation, label smoothing or EMA, and the last, smaller batch is used, as on all sides; no checkpoints.
"""

import os

import torch
from job import MOMENTUM, Tuned, arguments, cores, ready, result, state
from timm import create_model
from timm.data import create_dataset, create_loader, create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy, freeze

args = arguments(__doc__)
loaders, classes = [], 0
for part in ("train", "val"):
    dataset = create_dataset("", root=os.path.join(args.data, part))
    classes = len(dataset.reader.class_to_idx)
    loader = create_loader(
        dataset,
        input_size=(3, args.size, args.size),
        batch_size=args.batch_size,
        is_training=part == "train",
        color_jitter=0.0,
        interpolation="bilinear",
        mean=args.mean,
        std=args.std,
        num_workers=cores if args.tuned else 4,
        device=args.device,
    )
    loader.loader.batch_sampler.drop_last = False
    if args.augment == "none" or part == "val":
        dataset.transform = create_transform(
            args.size,
            interpolation="bilinear",
            crop_pct=args.size / args.resize,
            use_prefetcher=True,
        )
    loaders.append(loader)
train, val = loaders
model = create_model(args.model, num_classes=classes)
model.load_state_dict(state(args), strict=False)
if args.frozen:
    freeze(model, [name for name, part in model.named_children() if name != "fc" and list(part.parameters())])
if args.tuned:
    model = Tuned(model, args)
model.to(args.device)
optimizer = create_optimizer_v2(model, opt="momentum", lr=args.lr, momentum=MOMENTUM, weight_decay=0.0)
scheduler, _ = create_scheduler_v2(
    optimizer, num_epochs=args.epochs, updates_per_epoch=len(train), step_on_epochs=False, warmup_epochs=0
)
updates = 0
ready()

for epoch in range(args.epochs):
    model.train()
    losses = AverageMeter()
    for images, labels in train:
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        updates += 1
        scheduler.step_update(updates)
        if updates % 50 == 0:
            losses.update(loss.item(), len(images))
            print(f"train {epoch} [{updates}] loss {losses.avg:.4f}")

    model.eval()
    top1 = AverageMeter()
    with torch.inference_mode():
        for images, labels in val:
            (percent,) = accuracy(model(images), labels)
            top1.update(percent.item(), len(images))
    print(f"test {epoch} accuracy {top1.avg:.3f}")
result(accuracy=top1.avg / 100)
