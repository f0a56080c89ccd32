"""A trained model as files that others can use, each re-opened and compared before it counts as written.

export/
    README.md            model card
    model.json           classes, transforms, how to build the model, where it is from; sha256 of it and of the files
    tail.safetensors     tail: what was trained; with the base that model.json names it is the model
    model.pt             merged: a state dict for the module that torchvision builds
    model.pt2            program: torch.export, for any number of images
    model.onnx           onnx: the same for other runtimes
    model.npz            npz: the merged tensors as numpy arrays
"""

import hashlib
import importlib.util
import json
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from trainer.backbones import InputSpec
from trainer.data import Digits, Normalize
from trainer.errors import DataError, UsageError
from trainer.evaluation import validation_images
from trainer.freezing import trained_tensors
from trainer.loading import ABOUT, MERGED, TAIL, Loaded, digest, find, load, load_merged, stock

FORMATS = {"tail": TAIL, "merged": MERGED, "program": "model.pt2", "onnx": "model.onnx", "npz": "model.npz"}
Case = tuple[Tensor, Tensor]  # what a model is given, and the logits expected


def export(
    run: str,
    *,
    formats: tuple[str, ...] = ("tail", "merged"),
    output: str | None = None,
    preprocessing: bool = False,
    overwrite: bool = False,
    weights: str | None = None,
) -> Path:
    """Write a trained model in some `formats`; see `__main__.Export`. Gives the folder, in which nothing appears before
    all of it has been compared.

    Raises:
        UsageError: an unknown format, a missing package, a folder that is there already.
        DataError: a file does not give the model's own logits.
        Besides what `loading.load` raises.
    """
    _check_formats(formats)
    path = find(run)
    if path.name in FORMATS.values():
        raise UsageError(f"{path} is an export itself; expected a run or a checkpoint.")
    home = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    folder = Path(os.path.expanduser(output)).resolve() if output else home / "export"
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and not (overwrite and (folder / ABOUT).is_file()):
        raise UsageError(f"{folder} is there already; replace an export with --overwrite, or give another --output.")
    loaded = load(path, device="cpu", weights=weights)
    if loaded.builder is None:
        raise UsageError("a module of your own is not torchvision's to build: torch.save(model.state_dict(), FILE).")
    images, title = _sample(loaded.about)

    about = {key: value for key, value in loaded.about.items() if key not in ("format", "optimizer", "scaler", "ema")}
    about |= {"builder": loaded.builder, "input": asdict(loaded.input), "preprocessing": preprocessing, "files": {}}
    about |= {"checkpoint": path.name, "torch": torch.__version__, "torchvision": torchvision.__version__}
    temporary = (folder if folder.is_dir() else folder.parent) / f".tmp-{folder.name}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        for kind in formats:
            file, exact = temporary / FORMATS[kind], kind in ("tail", "merged", "npz")
            _write_about(temporary / ABOUT, about)  # the tail is read with it
            raw = preprocessing and not exact
            cases = _cases(loaded, images, raw=raw)
            difference = _difference(
                _WRITERS[kind](loaded, file, cases, raw), cases, file.name, share=0 if exact else 0.02 if raw else 1e-3
            )
            facts = {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "largest_difference": difference}
            about["files"][file.name] = facts | {"compared_on": title}
            same = "bit-equal logits" if difference == 0 else f"logits differ by {difference:.1e} at most"
            print(f"{folder / file.name}  {file.stat().st_size / 1e6:,.1f} MB  {same} on {title}", flush=True)
        _write_about(temporary / ABOUT, about)
        (temporary / "README.md").write_text(_card(about, home.absolute().name), encoding="utf-8")
        _swap(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"done: {folder}")
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


# ------------------------------------------------------------------------------------------------------- comparison


def _sample(about: dict[str, Any]) -> tuple[list[Tensor], str]:
    """Four images uint8 [3, H, W] of the run's validation, else of the digits, and what to call them."""
    images, data = None, about["config"]["data"]
    here = (os.path.isdir(os.path.expanduser(data[name])) for name in ("data", "data_root"))
    if data["data"].lower() == "digits" or any(here):  # else it would be downloaded
        try:
            images = validation_images(about)
        except (ValueError, OSError):
            images = None
    title = "validation images" if images is not None else "built-in digits (the run's images are not here)"
    images = images if images is not None else Digits()
    count = min(4, len(images))
    return [images[place * len(images) // count] for place in range(count)], f"{count} {title}"


@torch.no_grad()
def _cases(loaded: Loaded, images: list[Tensor], *, raw: bool) -> list[Case]:
    """All images as a batch, and the first alone; `raw`: each in its own size, and the first twice."""
    ready = torch.stack([loaded.transform(image) for image in images])  # [N, 3, S, S]
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
            raise DataError(f"{name} gives other logits than the model, by {difference:.3g}: nothing was exported.")
        largest = max(largest, difference)
    return largest


# ----------------------------------------------------------------- writers: each gives what it wrote, opened again


def _write_tail(loaded: Loaded, file: Path, cases: list[Case], raw: bool) -> nn.Module:
    tensors = {name: value.detach().clone().contiguous() for name, value in trained_tensors(loaded.model).items()}
    file.write_bytes(safetensors.torch.save(tensors))
    return load(file, device="cpu").model


def _write_merged(loaded: Loaded, file: Path, cases: list[Case], raw: bool) -> nn.Module:
    torch.save(loaded.model.state_dict(), file)
    model = stock(loaded.builder).eval()
    model.load_state_dict(torch.load(file, weights_only=True), strict=True)
    return model


def _write_npz(loaded: Loaded, file: Path, cases: list[Case], raw: bool) -> nn.Module:
    np.savez(file, **{name: value.numpy() for name, value in loaded.model.state_dict().items()})
    model = stock(loaded.builder).eval()
    with np.load(file, allow_pickle=False) as arrays:
        load_merged(model, {name: torch.from_numpy(arrays[name]) for name in arrays.files})
    return model


def _write_program(loaded: Loaded, file: Path, cases: list[Case], raw: bool) -> nn.Module:
    torch.export.save(_program(loaded, cases, raw), file)
    return torch.export.load(file).module()


def _write_onnx(loaded: Loaded, file: Path, cases: list[Case], raw: bool) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    size = sum(value.nbytes for value in loaded.model.state_dict().values())
    names = {"input_names": ["images"], "output_names": ["logits"]}
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
    model, example, dims = loaded.model, cases[-1][0].expand(2, -1, -1, -1), {0: torch.export.Dim("batch")}
    if raw:
        model = nn.Sequential(Preprocess(loaded.input), model).eval()
        dims |= {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
        example = torch.zeros(2, 3, 96, 128, dtype=torch.uint8)
    return torch.export.export(model, (example.contiguous(),), dynamic_shapes=(dims,))


class Preprocess(nn.Module):
    """uint8 [B, 3, H, W] of any size to what the model takes, float [B, 3, S, S], in operations of any runtime.

    Resizing with antialiasing and cropping are a product with one matrix per side. Pixels are within 1/255 of those of
    `data.eval_transform`, and nearly all the same.
    """

    def __init__(self, spec: InputSpec):
        super().__init__()
        self.size, self.resize, self.cubic = spec.size, spec.resize, spec.interpolation == "bicubic"
        self.normalize = Normalize(spec.mean, spec.std)

    def forward(self, images: Tensor) -> Tensor:
        height, width = (torch.full((), side) for side in images.shape[-2:])
        short = torch.minimum(height, width)
        down = self._weights(torch.arange(images.shape[-2]), height, short)  # [S, H]
        right = self._weights(torch.arange(images.shape[-1]), width, short)  # [S, W]
        rows = (images.float() @ right.T).clamp(0, 255).round()  # 8 bits between the two, as Pillow has it
        return self.normalize((down @ rows).clamp(0, 255).round())

    def _weights(self, inputs: Tensor, side: Tensor, short: Tensor) -> Tensor:
        """How much of each input pixel is in each of the crop: the filters of `interpolate(antialias=True)`."""
        resized = torch.div(self.resize * side, short, rounding_mode="floor")
        first = torch.round((resized - self.size) / 2)
        scale = side / resized
        centres = (torch.arange(self.size) + first + 0.5) * scale
        x = ((inputs + 0.5 - centres[:, None]) / scale.clamp(min=1)).abs()
        if self.cubic:  # Keys, 1981, with a = -0.5
            near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
            weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
        else:
            weights = (1 - x).clamp(min=0)
        return weights / weights.sum(dim=1, keepdim=True)


# ----------------------------------------------------------------------------------------------------------- files


def _write_about(path: Path, about: dict[str, Any]) -> None:
    about = about | {"sha256": digest(about)}
    path.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _swap(temporary: Path, folder: Path) -> None:
    """Put a finished folder in its place, or its files in the place of an old export's: what else is there stays."""
    for path in [*temporary.iterdir(), temporary]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if not folder.exists():
        os.replace(temporary, folder)
        return
    for name in (ABOUT, "README.md", "model.onnx.data", *FORMATS.values()):  # model.json first: no mixture is an export
        (folder / name).unlink(missing_ok=True)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == ABOUT):
        os.replace(path, folder / path.name)


_USE = {
    TAIL: """import trainer  # the template; it finds the frozen weights again
loaded = trainer.load("tail.safetensors")""",
    MERGED: """import torch
from torchvision import datasets, models
from torchvision.transforms import v2 as T
model = models.get_model({model!r}{arguments}).eval()
model.load_state_dict(torch.load("model.pt", weights_only=True))
prepare = T.Compose([T.PILToTensor(), T.Resize({resize}, T.InterpolationMode({interpolation!r})), T.CenterCrop({size}),
                     T.ToDtype(torch.float, scale=True), T.Normalize({mean}, {std})])
logits = model(prepare(datasets.folder.default_loader("photo.jpg"))[None])  # [1, {count}]""",
    "model.pt2": 'import torch\nlogits = torch.export.load("model.pt2").module()(images)  # {images}',
    "model.onnx": """import onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
(logits,) = session.run(None, {{"images": images}})  # {images}""",
    "model.npz": 'import numpy\narrays = numpy.load("model.npz")  # by the names of the state dict',
}
_CARD = """# {name}: {model}, {count} classes

torchvision's `{model}`, fine-tuned on `{data}` for {epoch} epochs. Validation: {val}.
Classes, in the order of the logits: {classes}.

{uses}
{auxiliary}
## Images

RGB, rotated as EXIF says, transparency on white. The shorter side is resized to {resize} pixels ({interpolation},
antialiased), then the central {size}×{size} is cut out. Values from 0 to 1, minus {mean}, divided by {std}.

## Where it is from

- frozen weights: {base}; trained: {train}
- checkpoint `{checkpoint}`, step {step}; torch {torch}, torchvision {torchvision}
- the terms of the frozen weights, and of the training images, go with it

## Checked

Each file was opened again, and its logits compared with the trained model's.

| file | compared on | largest difference | sha256 |
|---|---|---|---|
{rows}
"""


def _card(about: dict[str, Any], name: str) -> str:
    """The README.md of an export."""
    builder, classes = dict(about["builder"]), about["classes"]
    values = {**about, **about["input"], "name": name, "model": builder.pop("name"), "count": len(classes)}
    shape = "uint8 [B, 3, H, W], of any size" if about["preprocessing"] else "float [B, 3, {size}, {size}]"
    values["images"] = shape.format(**values)
    values["arguments"] = "".join(f", {key}={value!r}" for key, value in builder.items())
    values["classes"] = ", ".join(classes[:50]) + (", …" if len(classes) > 50 else "")
    values["val"] = ", ".join(f"{key} {value:.4f}" for key, value in sorted(about["metrics"].get("val", {}).items()))
    values["base"] = " ".join(f"{key} {value}" for key, value in about["base"].items())
    values["train"], values["data"] = " ".join(about["config"]["model"]["train"]), about["config"]["data"]["data"]
    uses = [f"## {file}\n\n```python\n{_USE[file].format(**values)}\n```\n" for file in about["files"]]
    auxiliary = "\nIt has no auxiliary classifiers: torchvision's `{model}` takes it with `aux_logits=False`.\n"
    values["auxiliary"] = auxiliary.format(**values) if "aux_logits" in builder else ""
    rows = []
    for file, facts in about["files"].items():
        difference = f"{facts['largest_difference']:.1e}" if facts["largest_difference"] else "none, to the bit"
        rows.append(f"| `{file}` | {facts['compared_on']} | {difference} | `{facts['sha256'][:16]}…` |")
    return _CARD.format(**{**values, "uses": "\n".join(uses), "rows": "\n".join(rows)})
