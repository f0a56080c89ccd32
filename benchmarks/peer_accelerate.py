"""Accelerate's own vision example.

Follows https://github.com/huggingface/accelerate/blob/main/examples/cv_example.py: frozen by `requires_grad`, the whole
model in train mode, images normalised on the device, optimizer, loaders and scheduler prepared, `gather_for_metrics`,
four data workers, no checkpoint.
Unequal: torchvision's ResNet for timm's, SGD and cosine for Adam and OneCycle; `python` starts it, no launcher.
"""

import os

import torch
from accelerate import Accelerator
from job import MOMENTUM, arguments, cores, cosine, geometry, network, ready, result
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import Compose, ToTensor

args = arguments(__doc__)
accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else "no")
sets = {
    part: ImageFolder(os.path.join(args.data, part), Compose([*chain, ToTensor()]))
    for part, chain in geometry(args).items()
}
options = {"num_workers": cores, "persistent_workers": True} if args.tuned else {"num_workers": 4}
train = DataLoader(sets["train"], args.batch_size, shuffle=True, **options)
val = DataLoader(sets["val"], args.batch_size, shuffle=False, **options)
model = network(args, len(sets["train"].classes)).to(accelerator.device)
mean = torch.tensor(args.mean)[None, :, None, None].to(accelerator.device)
std = torch.tensor(args.std)[None, :, None, None].to(accelerator.device)
optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=MOMENTUM)
scheduler = cosine(optimizer, args.epochs * len(train))
model, optimizer, train, val, scheduler = accelerator.prepare(model, optimizer, train, val, scheduler)
ready()

for epoch in range(args.epochs):
    model.train()
    for images, labels in train:
        outputs = model((images - mean) / std)
        loss = torch.nn.functional.cross_entropy(outputs, labels)
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()

    model.eval()
    accurate = elements = 0
    for images, labels in val:
        with torch.no_grad():
            outputs = model((images - mean) / std)
        predictions, references = accelerator.gather_for_metrics((outputs.argmax(dim=-1), labels))
        elements += references.shape[0]
        accurate += (predictions == references).long().sum()
    accelerator.print(f"epoch {epoch}: {100 * accurate.item() / elements:.2f}")
result(accuracy=accurate.item() / elements)
accelerator.end_training()
