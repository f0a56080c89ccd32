"""Write a trained model as files for others, each compared with it: `python -m trainer export`.

export/
    README.md            model card
    model.json           classes, transforms, how to build the model, its origin; sha256 of this and of the files
    tail.safetensors     tail: the trained tensors; with the base that model.json names they are the model
    model.pt             merged: a state dict for the module that torchvision builds
    model.pt2            program: torch.export, for any number of images
    model.onnx           onnx: the same for other runtimes
    model.npz            npz: the merged tensors as numpy arrays
"""

import importlib.util
import json
import os
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from trainer.commands import hub
from trainer.commands.arguments import Export
from trainer.commands.loaded import (
    ABOUT,
    MERGED,
    TAIL,
    Loaded,
    digest,
    find,
    home_of,
    load_frozen,
    load_merged,
    print_differences,
    stock,
)
from trainer.commands.model_card import model_card
from trainer.commands.opened import open_images
from trainer.data.datasets import Digits
from trainer.data.transforms import LONGEST, InputSpec
from trainer.errors import DataError, UsageError
from trainer.model.freezing import trained_tensors
from trainer.storage import files

FORMATS = {"tail": TAIL, "merged": MERGED, "program": "model.pt2", "onnx": "model.onnx", "npz": "model.npz"}
Case = tuple[Tensor, Tensor]  # input of a model, and its expected logits


def export(command: Export) -> Path:
    """Write a trained model in some formats, open each file again, and compare it with the model.

    Returns:
        The folder. Nothing appears in it before all files have been compared.

    Raises:
        UsageError: an unknown format, a missing package, a folder that exists already, or as `loading.load` raises it.
        DataError: a file computes other logits than the model.
        CheckpointError: as `loading.load` raises it.
        OSError: a file cannot be written, or not be pushed.
    """
    _check_formats(command.formats)
    if command.push:
        hub.check(command.push)
    path = find(command.run)
    if path.name in FORMATS.values():
        raise UsageError(f"{path} is an export itself; expected a run or a checkpoint.")
    home = home_of(path)
    folder = Path(os.path.expanduser(command.output)).resolve() if command.output else home / "export"
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and not (command.overwrite and (folder / ABOUT).is_file()):
        raise UsageError(f"{folder} exists already; replace an export with --overwrite, or give another --output.")
    loaded = load_frozen(path, device="cpu", weights=command.weights, recipe=command.recipe)
    print_differences(loaded.recipe, loaded.about)
    if command.preprocessing and (len(loaded.input.mean) != 3 or loaded.input.max_value != 255):
        raise UsageError("--preprocessing is for 8-bit RGB images; this model takes others. Export without it.")
    images, title = _sample(loaded)

    about = {key: value for key, value in loaded.about.items() if key not in ("format", "optimizer", "scaler", "ema")}
    about |= {"builder": loaded.builder, "input": asdict(loaded.input), "files": {}}
    about |= {"checkpoint": path.name, "torch": torch.__version__, "torchvision": torchvision.__version__}
    about |= {"preprocessing": command.preprocessing}
    temporary = (folder if folder.is_dir() else folder.parent) / f".tmp-{folder.name}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        for kind in command.formats:
            file, exact = temporary / FORMATS[kind], kind in ("tail", "merged", "npz")
            _write_about(temporary / ABOUT, about)  # the tail is read with it
            raw = command.preprocessing and not exact
            cases = _cases(loaded, images, raw=raw)
            difference = _difference(
                _WRITERS[kind](loaded, file, cases, raw), cases, file.name, share=0 if exact else 0.02 if raw else 1e-3
            )
            facts = {"sha256": files.sha256_of(file), "largest_difference": difference}
            about["files"][file.name] = facts | {"compared_on": title}
            same = "bit-equal logits" if difference == 0 else f"logits differ by {difference:.1e} at most"
            print(f"{folder / file.name}  {file.stat().st_size / 1e6:,.1f} MB  {same} on {title}", flush=True)
        _write_about(temporary / ABOUT, about)
        card = model_card(about, home.absolute().name)
        files.replace(temporary / "README.md", card.encode())
        _swap(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"done: {folder}")
    if command.push:
        print(f"pushed: {hub.push(folder, command.push, about=about, name=home.absolute().name)}")
    return folder


def _check_formats(formats: tuple[str, ...]) -> None:
    for name in formats:
        if name in ("pickle", "pkl", "pth", "model"):
            raise UsageError(
                f"--formats {name}: a pickle of the whole model is not written. It names classes by their place in "
                "today's code, so that it breaks with the next version, and to open it is to run whatever code it "
                "holds. Take merged, a state dict that torchvision's own model loads, or program, which needs no code."
            )
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise UsageError(f"--formats {' '.join(unknown) or 'is empty'}: expected some of {', '.join(FORMATS)}.")
    needed = ("onnx", "onnxscript", "onnxruntime") if "onnx" in formats else ()
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UsageError(f'--formats onnx needs {", ".join(missing)}: pip install -e ".[onnx]"')


def _sample(loaded: Loaded) -> tuple[list[Tensor], str]:
    """Four images of the run's validation, else digits, or noise for a model of other images; and their name."""
    images, data = None, loaded.config.data
    here = (os.path.isdir(os.path.expanduser(folder)) for folder in (data.data, data.data_root))
    if data.data.lower() == "digits" or os.path.exists(data.data) or any(here):  # else it would be downloaded
        with suppress(ValueError, OSError):
            images = open_images(loaded).images
    title, spec = "validation images", loaded.input
    if images is None and (len(spec.mean), spec.max_value) == (3, 255):
        images, title = Digits(), "built-in digits (the run's images are not here)"
    if images is None:
        shape, generator = (len(spec.mean), spec.size, spec.size), torch.Generator().manual_seed(0)
        return [spec.max_value * torch.rand(shape, generator=generator) for _ in range(4)], "4 images of noise"
    count = min(4, len(images))
    return [images[place * len(images) // count] for place in range(count)], f"{count} {title}"


@torch.no_grad()
def _cases(loaded: Loaded, images: list[Tensor], *, raw: bool) -> list[Case]:
    """All images as a batch, and the first alone; `raw`: each in its own size, and the first twice."""
    resized = torch.stack([loaded.transform.resize(image) for image in images])  # [N, ..., C, S, S]
    ready = loaded.transform.normalize(resized.to(loaded.transform.device))
    given = ready = [ready, ready[:1]]
    if raw:
        given = [image[None].contiguous() for image in images] + [images[0].repeat(2, 1, 1, 1)]
        ready = [*ready[0].split(1), ready[1].repeat(2, 1, 1, 1)]
    return [(some, loaded.model(batch)) for some, batch in zip(given, ready, strict=True)]


@torch.no_grad()
def _difference(model: Callable[[Tensor], Tensor], cases: list[Case], name: str, *, share: float) -> float:
    """The largest difference of a logit; DataError if it is more than a `share` of the logits' own spread."""
    largest = 0.0
    for given, expected in cases:
        found = model(given)
        difference = (found - expected).abs().max().item() if found.shape == expected.shape else float("inf")
        if not difference <= share * (expected - expected.mean()).abs().max().item():
            raise DataError(f"{name} computes other logits than the model, by {difference:.3g}: nothing was exported.")
        largest = max(largest, difference)
    return largest


def _write_tail(loaded: Loaded, file: Path, cases: list[Case], raw: bool) -> nn.Module:
    tensors = {name: value.detach().clone().contiguous() for name, value in trained_tensors(loaded.model).items()}
    files.replace(file, safetensors.torch.save(tensors))
    return load_frozen(file, device="cpu", recipe=loaded.recipe).model


def _write_merged(loaded: Loaded, file: Path, cases: list[Case], raw: bool) -> nn.Module:
    torch.save(loaded.model.state_dict(), file)
    model = _plain_copy(loaded)
    model.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return model


def _plain_copy(loaded: Loaded) -> nn.Module:
    """The same module with other values, in eval mode: torchvision's, or that of the recipe."""
    if loaded.builder is not None:
        return stock(loaded.builder).eval()
    return loaded.recipe.classifier(loaded.config, loaded.classes).model.eval()


def _write_npz(loaded: Loaded, file: Path, cases: list[Case], raw: bool) -> nn.Module:
    np.savez(file, **{name: value.numpy() for name, value in loaded.model.state_dict().items()})
    model = _plain_copy(loaded)
    with np.load(file, allow_pickle=False) as arrays:
        load_merged(model, {name: torch.from_numpy(arrays[name]) for name in arrays.files})
    return model


def _write_program(loaded: Loaded, file: Path, cases: list[Case], raw: bool) -> nn.Module:
    torch.export.save(_program(loaded, cases, raw), file)
    return torch.export.load(file).module()


def _write_onnx(loaded: Loaded, file: Path, cases: list[Case], raw: bool) -> Callable[[Tensor], Tensor]:
    import onnxruntime  # pyright: ignore[reportMissingImports]  # optional: the extra [onnx]

    size = sum(value.nbytes for value in loaded.model.state_dict().values())
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own deprecations
        program = _program(loaded, cases, raw)  # external_data: a protobuf ends at 2 GiB
        torch.onnx.export(program, f=str(file), dynamo=True, verbose=False, external_data=size > 1.5e9, **names)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


_WRITERS = {
    "tail": _write_tail,
    "merged": _write_merged,
    "npz": _write_npz,
    "program": _write_program,
    "onnx": _write_onnx,
}


@torch.no_grad()
def _program(loaded: Loaded, cases: list[Case], raw: bool) -> torch.export.ExportedProgram:
    """The model as a graph, for any number of images; `raw`: with the preprocessing, for any size of them."""
    model, example, dims = loaded.model, cases[-1][0][[0, 0]], {0: torch.export.Dim("batch")}
    if raw:
        model = nn.Sequential(Preprocess(loaded.input), model).eval()
        dims |= {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
        example = torch.zeros(2, 3, 96, 128, dtype=torch.uint8)
    return torch.export.export(model, (example.contiguous(),), dynamic_shapes=(dims,))


class Preprocess(nn.Module):
    """uint8 [B, 3, H, W] of any size to the model's input, float [B, 3, S, S], in operations of any runtime.

    Resizing with antialiasing and cropping are a product with one matrix per side. Pixels are nearly all equal to
    those of `InputSpec.eval_transform`; others differ by 1/255, or, where a few pixels are enlarged to many, by 2/255.
    """

    def __init__(self, spec: InputSpec):
        super().__init__()
        self.size, self.resize, self.cubic = spec.size, spec.resize, spec.interpolation == "bicubic"
        self.normalize = spec.normalize()

    def forward(self, images: Tensor) -> Tensor:
        height, width = (torch.full((), side) for side in images.shape[-2:])
        short = torch.minimum(height, width)
        down = self._weights(torch.arange(images.shape[-2]), height, short)  # [S, H]
        right = self._weights(torch.arange(images.shape[-1]), width, short)  # [S, W]
        rows = (images.float() @ right.T).clamp(0, 255).round()  # 8 bits between the two, as Pillow has it
        return self.normalize((down @ rows).clamp(0, 255).round())

    def _weights(self, inputs: Tensor, side: Tensor, short: Tensor) -> Tensor:
        """The share of each input pixel in each pixel of the crop: the filters of `interpolate(antialias=True)`."""
        over = (side - LONGEST * short).clamp(min=0)  # a very long side is first cut, as `eval_transform` does it
        start = (over - over.remainder(2)) / 2
        kept = side - 2 * start
        resized = torch.div(self.resize * kept, short, rounding_mode="floor")
        first = torch.round((resized - self.size) / 2)
        scale = kept / resized
        centres = start + (torch.arange(self.size) + first + 0.5) * scale
        x = ((inputs + 0.5 - centres[:, None]) / scale.clamp(min=1)).abs()
        if self.cubic:  # Keys, 1981, with a = -0.5
            near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
            weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
        else:
            weights = (1 - x).clamp(min=0)
        return weights / weights.sum(dim=1, keepdim=True)


def _write_about(path: Path, about: dict[str, Any]) -> None:
    about = about | {"sha256": digest(about)}
    files.replace(path, json.dumps(about, indent=1, ensure_ascii=False).encode() + b"\n")


def _swap(temporary: Path, folder: Path) -> None:
    """Put a finished folder in its place, or its files in place of those of an old export; other files there stay."""
    for path in [*temporary.iterdir(), temporary]:
        files.sync(path)
    if folder.exists():
        names = (ABOUT, "README.md", "model.onnx.data", *FORMATS.values())
        for name in names:  # model.json first: no mixture of two exports is one
            files.ops.remove(folder / name)
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == ABOUT):
            files.ops.rename(path, folder / path.name)
        files.sync(folder)
    else:
        files.ops.rename(temporary, folder)
    files.sync(folder.parent)
