"""What a frozen trunk makes of images: a row of features for each."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.config import SpeedConfig
from trainer.data.images import Images
from trainer.data.loader import KeyedDataset, Workers
from trainer.data.sampling import BatchPlan
from trainer.errors import UsageError
from trainer.model.classifiers import Classifier
from trainer.model.freezing import freeze
from trainer.model.split import split_model
from trainer.processes.together import on_main
from trainer.trunk.features import Features

_BATCH = 64  # images


class Pooled(nn.Module):
    """A trunk, and the mean of its maps and tokens: images `[B, ...]` to one tensor `[B, D]`, in a tuple.

    Args:
        trunk: frozen; a tuple of tensors.
        ndims: the dimensions of each.
    """

    def __init__(self, trunk: nn.Module, ndims: Sequence[int]):
        super().__init__()
        self.trunk, self.ndims = trunk, ndims

    def forward(self, images: Tensor) -> tuple[Tensor]:
        rows = [
            values.flatten(2).mean(dim=2) if ndim > 3 else values.mean(dim=1) if ndim == 3 else values
            for values, ndim in zip(self.trunk(images), self.ndims, strict=False)
        ]
        return (torch.cat(rows, dim=1),)


def features_of(
    accelerator: Accelerator,
    classifier: Classifier,
    parts: Sequence[Images],
    *,
    transform: Callable[[Tensor], Tensor],
    config: SpeedConfig,
    workers: Workers = Workers(),
) -> Tensor:
    """Features `[N, D]` of all images, part after part, from what is before the head: on the device of every process,
    each of which computes its share (a collective).

    Args:
        classifier: its head is not used.
        parts: images that can all be read.
        transform: of evaluation.
        config: where features are kept meanwhile.
        workers: load the images.

    Raises:
        UsageError: the model cannot be cut before its head.
    """
    model, normalize = classifier.model.to(accelerator.device), classifier.input.normalize(accelerator.device)
    datasets = {
        f"part {place}": KeyedDataset(images, transform, seed=0) for place, images in enumerate(parts) if images
    }
    sample = normalize(next(iter(datasets.values())).some(8).to(accelerator.device))
    freeze(model, ("head",), head=classifier.head)
    split = split_model(model, sample[:1])
    if not split.has_trunk:
        raise UsageError(f"the model cannot be cut before its head ({split}): an audit needs its features.")
    with torch.no_grad():
        trunk = Pooled(split.trunk, [values.ndim for values in split.trunk(sample[:1])]).eval()
    ranks, found = accelerator.num_processes, []
    folder = Path(on_main(accelerator, tempfile.mkdtemp, prefix="audit-"))
    features = Features(
        accelerator,
        trunk,
        normalize,
        sample,
        datasets,
        config=config,
        plan=BatchPlan(max(sum(map(len, parts)), ranks), _BATCH * ranks, _BATCH, ranks),
        folder=folder,
        workers=workers,
    )
    with features:
        for name, dataset in datasets.items():
            batches = [*torch.arange(len(dataset)).split(_BATCH)]
            source = features.open(name).batches([batch.tolist() for batch in batches], epoch=0)
            found += [batch["inputs"][0].float() for batch in source]
    return torch.cat(found)
