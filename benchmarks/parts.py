"""What `run.py` starts besides training runs: the inputs, and parts that are measured inside one process.

    python benchmarks/parts.py {photos,weights,probe,steps,decode,checkpoint,extract} --help

A photo is a random landscape: noise whose spectrum falls as that of photographs does (1/f; Field, 1987,
https://doi.org/10.1364/JOSAA.4.002379), so that JPEG needs as many bytes and as much time as for a real one. Its class
is a spot with the angle of a grating and with a hue, strong enough for random features to tell the classes apart: a few
images more or less say that something else was computed, and not that a toss fell differently. The weights are random,
as there may be nothing to download; their BatchNorm statistics are measured on the photos, as those of pretrained
weights fit the images they were trained on.
"""

import argparse
import os
import subprocess
import sys
import time
from collections import deque
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from job import MOMENTUM, Tuned, cores, cosine, result
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import datasets, models, transforms

import trainer
from trainer.config import OptimConfig, SpeedConfig
from trainer.data.loader import BatchLoader
from trainer.data.transforms import InputSpec
from trainer.optim import build_optimizer
from trainer.storage import checkpoint as stored
from trainer.trunk.features import CachedFeatures


def photo(rng: np.random.Generator, label: int, classes: int, width: int, height: int) -> Image.Image:
    fall = 1 / np.maximum(np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]), 1 / width)
    noise = rng.normal(size=(4, *fall.shape)) + 1j * rng.normal(size=(4, *fall.shape))
    grey, *colours = np.fft.irfft2(noise * fall, s=(height, width))
    angle, period, phase = np.pi * label / classes, width / 40, rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:height, :width]
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period + phase)
    near = np.exp(-3 * ((x / width - rng.uniform(0.35, 0.65)) ** 2 + (y / height - rng.uniform(0.35, 0.65)) ** 2))
    hue = np.cos(2 * np.pi * (label / classes - np.arange(3) / 3))
    pixels = np.stack([grey / grey.std() + 0.4 * colour / colour.std() for colour in colours], axis=-1)
    pixels += near[..., None] * (rng.uniform(1, 2) * wave[..., None] + rng.uniform(2, 4) * hue)
    return Image.fromarray((128 + 45 * pixels).clip(0, 255).astype(np.uint8))


def photos(args: argparse.Namespace) -> None:
    """OUTPUT/{train,val}/CLASS/*.jpg, complete or not there; the same on every machine."""
    temporary = args.output.with_name(f".{args.output.name}.{os.getpid()}")
    for part, number in (("train", args.images), ("val", args.val)):
        for index in range(number):
            rng, label = np.random.default_rng([index, part == "val", args.classes]), index % args.classes
            folder = temporary / part / f"class{label:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            photo(rng, label, args.classes, args.width, args.height).save(folder / f"{index:05d}.jpg", quality=90)
    temporary.rename(args.output)


def weights(args: argparse.Namespace) -> None:
    """A state dict of torchvision's model, with 1,000 classes."""
    chain = [transforms.Resize((args.size, args.size)), transforms.ToTensor()]
    chain += [transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    images = datasets.ImageFolder(args.data / "train", transforms.Compose(chain))
    torch.manual_seed(0)
    net = models.get_model(args.model, weights=None)
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
        if name.endswith(
            ".bn3"
        ):  # many random layers, one after the other, make all images alike: more of the shortcuts
            nn.init.constant_(module.weight, 0.2)
    with torch.no_grad():
        for batch in torch.arange(0, len(images), max(1, len(images) // 256)).split(32):
            net(torch.stack([images[index][0] for index in batch]))
    torch.save(net.state_dict(), args.output)


def seconds(function) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def probe(args: argparse.Namespace) -> None:
    """Which of bf16 and torch.compile would make `--images` forwards (and backwards) fastest, compilation included."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    has_bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.ops.mkldnn._is_mkldnn_bf16_supported()
    images = torch.randn(args.batch_size, 3, args.size, args.size, device=device)
    forecast, speed = {}, {}
    for bf16 in (False, True) if has_bf16 else (False,):
        for compiled in (False, True):
            torch.compiler.reset()
            how = argparse.Namespace(frozen=args.train == "head", bf16=bf16, compile=compiled)
            net = Tuned(models.get_model(args.model, weights=None), how).to(device).train()
            step = lambda batch, net=net: net(batch).sum().backward()  # noqa: E731
            first = seconds(lambda step=step: (step(images), step(images[1:])))  # two batch sizes, two compilations
            each = min(seconds(lambda step=step: step(images)) for _ in range(3)) / len(images)
            forecast[bf16, compiled] = first * compiled + each * args.images
            speed[f"{'bf16' if bf16 else 'fp32'}{' compiled' if compiled else ''}"] = round(1 / each, 1)
    bf16, compiled = min(forecast, key=forecast.get)
    result(bf16=bf16, compile=compiled, images_per_second=speed)


def separable(samples: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features `[N, F]` and labels `[N]` of 10 classes that a linear head can tell apart."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (samples,), generator=draw)
    centres = 0.2 * torch.randn(10, features, generator=draw)
    return torch.randn(samples, features, generator=draw) + centres[labels], labels


def our_trainer(accelerator: Accelerator, model: nn.Module, tail: nn.Module, *, samples: int, config: OptimConfig):
    """The template's Trainer, for 10 classes."""
    about = {"freeze_plan": {}, "classes": list("0123456789"), "base": {}, "config": {}}
    plan = trainer.BatchPlan(samples, 64, None, accelerator.num_processes)
    optimizer, recipe = build_optimizer(model, config, fused=accelerator.scaler is None), trainer.Recipe()
    return trainer.Trainer(accelerator, model, tail, optimizer, plan=plan, config=config, recipe=recipe, about=about)


def steps(args: argparse.Namespace) -> None:
    """Seconds a step takes beyond its arithmetic, on features that are there already."""
    torch.manual_seed(0)
    (inputs, labels), lr = separable(args.images + 2000, 2048), 0.01
    model, number = nn.Linear(2048, 10), -(-args.images // 64)
    ours = args.side == "template"
    accelerator = trainer.start() if ours else Accelerator(cpu=not torch.cuda.is_available())
    device, held = accelerator.device, (inputs[args.images :], labels[args.images :])
    if ours:
        kept = CachedFeatures((inputs[: args.images].to(device),), labels[: args.images].to(device))
        config = OptimConfig(
            epochs=args.epochs, optimizer="sgd", lr=lr, warmup=0.0, weight_decay=0.0, momentum=MOMENTUM
        )
        loop = our_trainer(accelerator, model.to(device), model, samples=args.images, config=config)

        def epoch() -> None:
            deque(loop.steps(kept), maxlen=0)
            loop.finish_epoch({"accuracy": 0.0})
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)
        loader = DataLoader(TensorDataset(inputs[: args.images], labels[: args.images]), 64, shuffle=True)
        model, optimizer, loader, scheduler = accelerator.prepare(
            model, optimizer, loader, cosine(optimizer, args.epochs * number)
        )

        def epoch() -> None:
            total_loss = 0.0
            for some, label in loader:
                loss = F.cross_entropy(model(some), label)
                total_loss += loss.detach().float()
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()

    head, some, label = nn.Linear(2048, 10).to(device), inputs[:64].to(device), labels[:64].to(device)
    plain = torch.optim.SGD(head.parameters(), lr=lr, momentum=MOMENTUM)

    def arithmetic() -> None:
        for _ in range(number):
            F.cross_entropy(head(some), label).backward()
            plain.step()
            plain.zero_grad()

    times = np.array([(seconds(epoch), seconds(arithmetic)) for _ in range(args.epochs)])[1:] / number
    step, alone = np.median(times, axis=0)  # the first epoch warms up
    with torch.no_grad():
        accuracy = float((model(held[0].to(device)).argmax(1).cpu() == held[1]).float().mean())
    extra = {"whole step µs": step * 1e6, "arithmetic µs": alone * 1e6}
    result(seconds=step - alone, accuracy=accuracy, samples=len(held[1]), extra=extra)


def decode(args: argparse.Namespace) -> None:
    """Seconds an image from file to normalised float batch, on one core."""
    torch.set_num_threads(1)
    preset, resize = models.get_model_weights("resnet50").DEFAULT.transforms(), round(args.size * 256 / 224)
    ours, _ = trainer.load_data(args.data)
    spec = InputSpec(args.size, resize, tuple(preset.mean), tuple(preset.std))
    keyed, normalize = trainer.KeyedDataset(ours, spec.eval_transform(), seed=0), spec.normalize()
    requests = [[(0, index) for index in some.tolist()] for some in torch.arange(len(ours)).split(32)]
    chain = [transforms.Resize(resize), transforms.CenterCrop(args.size), transforms.ToTensor()]
    chain = transforms.Compose([*chain, transforms.Normalize(preset.mean, preset.std)])
    folder = datasets.ImageFolder(args.data / "train", chain)
    sides = {
        "template": lambda: (normalize(batch["image"]) for batch in BatchLoader(keyed)(requests)),
        "pil": lambda: (images for images, _ in DataLoader(folder, 32)),
    }
    scale = 255 * torch.tensor(preset.std).view(3, 1, 1)  # a full pass of both: files are in the page cache, too
    pairs = zip(sides["template"](), sides["pil"](), strict=True)
    furthest = max(float(((a - b) * scale).abs().max()) for a, b in pairs)
    each = min(seconds(lambda: deque(sides[args.side](), maxlen=0)) for _ in range(args.epochs)) / len(ours)
    extra = {"images/s a core": 1 / each, "largest difference, of 255": furthest}
    result(seconds=each, same=furthest <= 1.01, extra=extra)  # 1, and the rounding of floats


def checkpoint(args: argparse.Namespace) -> None:
    """Seconds that training waits for a checkpoint of a head-only run with AdamW, and its bytes."""
    torch.manual_seed(0)
    net = models.get_model(args.model, weights=None)
    net.fc = nn.Linear(net.fc.in_features, 10)
    inputs, labels = separable(640, net.fc.in_features)
    ours = args.side == "template"
    accelerator = trainer.start() if ours else Accelerator(cpu=not torch.cuda.is_available())
    net, inputs, labels = (value.to(accelerator.device) for value in (net, inputs, labels))
    trainer.freeze(net, ["head"], head=["fc"])
    folders = [args.output / str(number) for number in range(args.epochs)]
    if ours:
        tail = trainer.split_model(net, torch.zeros(1, 3, 64, 64, device=accelerator.device)).tail
        config = OptimConfig(epochs=1, lr=1e-3, schedule="constant", warmup=0.0)
        loop = our_trainer(accelerator, net, tail, samples=640, config=config)
        deque(loop.steps(CachedFeatures((inputs,), labels)), maxlen=0)
        save, load = loop.save, lambda folder: loop.load(stored.read(next(folder.iterdir())))
    else:
        net, optimizer = accelerator.prepare(net, torch.optim.AdamW(net.fc.parameters(), lr=1e-3))
        for some, label in zip(inputs.split(64), labels.split(64), strict=True):
            accelerator.backward(F.cross_entropy(net.fc(some), label))
            optimizer.step()
            optimizer.zero_grad()
        save, load = accelerator.save_state, accelerator.load_state
    if args.side == "torch":

        def save(folder: Path) -> None:
            folder.mkdir(parents=True)
            torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, folder / "last.pt")

        def load(folder: Path) -> None:
            net.load_state_dict(torch.load(folder / "last.pt", weights_only=True)["model"])

    times = [seconds(partial(save, folder)) for folder in folders]
    before = net.fc(inputs).detach().clone()
    nn.init.zeros_(net.fc.weight)
    size = sum(path.stat().st_size for path in folders[0].rglob("*") if path.is_file())
    load(folders[0])
    after = net.fc(inputs)
    accuracy = float((after.argmax(1) == labels).float().mean())
    result(seconds=np.median(times), same=torch.equal(before, after), accuracy=accuracy, extra={"kB": size / 1000})


def extract(args: argparse.Namespace) -> None:
    """Seconds for the features of the training photos, one core a process."""
    if args.side == "ideal":  # what two cores can do for two processes that have nothing to do with each other
        flags = [flag for flag in sys.argv[2:] if flag != "ideal"]
        commands = [[sys.executable, __file__, "extract", "one", *flags, "--core", str(core)] for core in (0, 1)]
        pair = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
        lines = [process.communicate()[0].splitlines()[-1].split() for process in pair]
        taken = max(float(line[1]) for line in lines) / 2
        result(seconds=taken, accuracy=float(lines[0][2]), samples=int(lines[0][3]))
        return
    core = args.core or int(os.environ.get("LOCAL_RANK", "0"))
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[core % cores]})
    torch.set_num_threads(1)
    accelerator = trainer.start()
    ours, _ = trainer.load_data(args.data)
    classifier = trainer.build_model(args.model, len(ours.classes), weights=str(args.weights), image_size=args.size)
    spec, workers = classifier.input, trainer.Workers.of(accelerator, None, minutes=0)
    images, normalize = trainer.KeyedDataset(ours, spec.eval_transform(), seed=0), spec.normalize()
    trainer.freeze(classifier.model, ["head"], head=classifier.head)
    sample = normalize(images.some(8))
    trunk = trainer.split_model(classifier.model, sample[:1]).trunk
    plan, config = trainer.BatchPlan(len(images), 64, 32, accelerator.num_processes), SpeedConfig(compile="off")
    features = trainer.Features(
        accelerator, trunk, normalize, sample, {"photos": images}, config=config, plan=plan, workers=workers
    )
    accelerator.wait_for_everyone()
    start = time.perf_counter()
    kept = features.open("photos")
    accelerator.wait_for_everyone()
    taken = time.perf_counter() - start
    found, labels = kept.inputs[0], kept.labels
    means = torch.stack([found[::2][labels[::2] == label].mean(0) for label in range(len(ours.classes))])
    right = torch.cdist(found[1::2], means).argmin(1) == labels[1::2]  # nearest mean of a class, on the other half
    if args.side == "one":
        print("extracted", taken, float(right.float().mean()), len(right))
    elif accelerator.is_main_process:
        result(seconds=taken, accuracy=float(right.float().mean()), samples=len(right))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = (photos, weights, probe, steps, decode, checkpoint, extract)
    parser.add_argument("part", choices=[part.__name__ for part in parts])
    parser.add_argument("side", nargs="?", default="template")
    for name in ("data", "output", "weights"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--train", default="head", help="of probe: head or all")
    parser.add_argument("--images", type=int, default=1000, help="training photos; forwards to come; feature rows")
    parser.add_argument("--val", type=int, default=500, help="validation photos")
    for name, value in {"classes": 10, "width": 500, "height": 375, "size": 224, "batch-size": 64, "core": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--epochs", type=int, default=10, help="times that the part is measured")
    args = parser.parse_args()
    next(part for part in parts if part.__name__ == args.part)(args)


if __name__ == "__main__":
    main()
