"""The job that every side does: the same files, pixels, weights, optimizer and number of steps.

A folder of JPEGs (train/CLASS/*.jpg, val/CLASS/*.jpg), a ResNet of torchvision whose weights come from one file, a new
head; SGD with momentum 0.9 and no weight decay, the rate falling along a cosine to zero; an evaluation each epoch. Each
peer script does it in its own idiom, and prints two lines that `run.py` reads: `ready`, when data and model are built,
and `result {"accuracy": ...}`, of the last epoch.

`--as-shipped`: precision, train or eval mode, data workers and habits (printing, saving) are those of the example that
the script follows. `--tuned`: what the example's own switches can do; `--bf16` and `--compile` come with it where they
pay on this machine, which `run.py` tries out beforehand.
"""

import argparse
import json
import os

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models, transforms

MOMENTUM = 0.9
cores = len(os.sched_getaffinity(0))


def arguments(doc: str) -> argparse.Namespace:
    """The command line that all peers share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--as-shipped", action="store_true", help="as the example that it follows")
    how.add_argument("--tuned", action="store_true", help="with every switch that makes it faster")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--weights", required=True, help="state dict of torchvision's model")
    parser.add_argument("--train", choices=("head", "all"), default="head")
    parser.add_argument("--augment", choices=("none", "crop"), default="none")
    parser.add_argument("--size", type=int, default=224, help="side of the square the model sees, pixels")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--output", required=True, help="folder that it may write to")
    args = parser.parse_args()
    torch.manual_seed(0)
    args.frozen = args.train == "head"
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset = models.get_model_weights(args.model).DEFAULT.transforms()
    args.resize = round(args.size * preset.resize_size[0] / preset.crop_size[0])
    args.mean, args.std = preset.mean, preset.std
    return args


def geometry(args: argparse.Namespace) -> dict[str, list]:
    """Transforms of PIL images to PIL images of the model's size, for the folders "train" and "val"."""
    plain = [transforms.Resize(args.resize), transforms.CenterCrop(args.size)]
    crop = [transforms.RandomResizedCrop(args.size), transforms.RandomHorizontalFlip()]
    return {"train": crop if args.augment == "crop" else plain, "val": plain}


def image_folders(args: argparse.Namespace) -> dict[str, datasets.ImageFolder]:
    """The usual chain: PIL, resize, crop, float, normalise, all in the worker."""
    end = [transforms.ToTensor(), transforms.Normalize(args.mean, args.std)]
    chains = {part: transforms.Compose(chain + end) for part, chain in geometry(args).items()}
    return {part: datasets.ImageFolder(os.path.join(args.data, part), chain) for part, chain in chains.items()}


def loaders(args: argparse.Namespace, *, workers: int, **extra) -> tuple[DataLoader, DataLoader]:
    """DataLoaders of `image_folders`; `workers` as shipped, else one a core that lives through all epochs."""
    if args.tuned:
        workers, extra = cores, {"persistent_workers": True, "pin_memory": args.device.type == "cuda", **extra}
    parts = image_folders(args).items()
    return tuple(
        DataLoader(part, args.batch_size, shuffle=name == "train", num_workers=workers, **extra) for name, part in parts
    )


def state(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """The weights without the head."""
    saved = torch.load(args.weights, weights_only=True)
    return {name: value for name, value in saved.items() if not name.startswith("fc.")}


def network(args: argparse.Namespace, classes: int) -> nn.Module:
    """torchvision's model with the weights of the file and a new head, its trunk frozen as the tutorial does it."""
    net = models.get_model(args.model, weights=None)
    net.load_state_dict(state(args), strict=False)
    if args.frozen:
        net.requires_grad_(False)
    net.fc = nn.Linear(net.fc.in_features, classes)
    return Tuned(net, args) if args.tuned else net


class Tuned(nn.Module):
    """What any script can do to a model with a head named `fc`: channels_last, compile; a frozen trunk in eval mode,
    outside autograd, and in bf16 by autocast even where the framework's own switch leaves the CPU out."""

    def __init__(self, net: nn.Module, args: argparse.Namespace):
        super().__init__()
        self.fc, net.fc = net.fc, nn.Identity()
        net.to(memory_format=torch.channels_last)
        self.frozen, self.bf16 = args.frozen, args.bf16
        self.trunk = torch.compile(net) if args.compile else net

    def train(self, mode: bool = True) -> "Tuned":
        super().train(mode)
        self.trunk.train(mode and not self.frozen)
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        grad = torch.is_grad_enabled() and not self.frozen
        with torch.set_grad_enabled(grad), torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            features = self.trunk(images)  # [B, F]
        return self.fc(features.float())


def cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """To be stepped after each update."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def ready() -> None:
    """Data and model are built; what follows is training."""
    print("ready", flush=True)


def result(**values: object) -> None:
    """What this process found, as one line of JSON."""
    print("result", json.dumps(values), flush=True)
