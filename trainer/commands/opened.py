"""The images that a trained model is tested on: its run's own validation images, or others."""

from dataclasses import dataclass, replace

from trainer.commands.loaded import Loaded
from trainer.config import DataConfig
from trainer.data.bad_images import without
from trainer.data.content import content, shared
from trainer.data.files import Decoded
from trainer.data.images import Images
from trainer.data.labels import match_classes
from trainer.data.loader import KeyedDataset
from trainer.data.open import Data, load_test
from trainer.errors import DataError, UsageError
from trainer.recipes import Recipe


@dataclass
class Opened:
    """The images that a run is evaluated on.

    Attributes:
        images: the images; labels are numbered as the run's classes.
        dataset: the same, under the recipe's transform for evaluation.
        own: whether they are the run's own validation images, wherever they lie now.
        seen: how many of them the run was trained on, by their bytes; None if that is not known.
        note: what to know about them; "" for nothing.
    """

    images: Images
    dataset: KeyedDataset
    own: bool
    seen: int | None
    note: str


def open_images(loaded: Loaded, data: str | None = None) -> Opened:
    """Open the validation images of a run, or other images.

    Args:
        loaded: the run.
        data: the run's own images in another place, of which its validation images are taken: they are recognised by
            their content. Or other images: the validation part, or all where there is none; for a recipe that opens
            its own images, those that it returns for validation. None: the run's own.

    Raises:
        UsageError, DataError: as the recipe's `images` or `load_test` raise them; or the classes are not the run's.
    """
    config, recipe = loaded.config, loaded.recipe
    place = replace(config.data, data=data or config.data.data)
    own_images = data is None or recipe.images is not Recipe().images
    try:
        parts = _parts(loaded, place)
        known = data is not None or "training" in (loaded.about.get("data") or {})
        problem = _difference(loaded, parts) if known else ""
    except (UsageError, DataError) as error:
        if own_images:
            raise
        parts, problem = None, str(error)
    if parts is None or (problem and not own_images):
        images = load_test(place.data, loaded.classes, root=place.data_root)
        if images.path(0) and (len(loaded.input.mean), loaded.input.max_value) != (3, 255):
            images = Decoded(images, loaded.input.decode)
    else:
        images = parts.val
        if data is None and tuple(images.classes) != loaded.classes:
            found, expected = (", ".join(classes) for classes in (images.classes, loaded.classes))
            raise DataError(f"{place.data} has the classes {found} now; the model was trained on {expected}.")
        match_classes(loaded.classes, images)
    seen, note = None, ""
    if problem and data is None:
        note = f"these are not the run's images any more, so it may have been trained on some of them: {problem}"
    elif problem:
        seen = trained_on(loaded, images)
        note = "it is not known whether the run was trained on some of these images: its own cannot be compared"
        if seen is not None:
            warning = "; the numbers are better than on new images" if seen else ""
            note = f"{seen:,} of these images were seen in training{warning}"
    if config.speed.fast_decode:
        images.shrink(2 * loaded.input.resize)
    return Opened(images, dataset_of(loaded, images), not problem, seen, note)


def dataset_of(loaded: Loaded, images: Images) -> KeyedDataset:
    """Images under the recipe's transform for evaluation."""
    return KeyedDataset(images, loaded.recipe.transforms(loaded.config.data, loaded.input)[1], seed=0)


def trained_on(loaded: Loaded, images: Images) -> int | None:
    """How many of some images a run was trained on; None if its own images are not there any more, or no files."""
    try:
        parts = _parts(loaded, loaded.config.data)
        comparable = (images.path(0) is None) == (parts.train.path(0) is None)
        return len(shared(images, parts.train)) if comparable and not _difference(loaded, parts) else None
    except (UsageError, DataError, OSError):
        return None


def _parts(loaded: Loaded, config: DataConfig) -> Data:
    """The images as the run split them, without those that it left out."""
    found = loaded.recipe.images(config, seed=loaded.config.run.seed)
    skipped = (loaded.about.get("data") or {}).get("skipped", [[], []])
    train, val = (without(part, keys) for part, keys in zip(found, skipped, strict=True))
    return Data(train, val, config.data, skipped)


def _difference(loaded: Loaded, parts: Data) -> str:
    """In what the images differ from those of the run; "" if in nothing."""
    stored = loaded.about.get("data") or {}
    if "training" not in stored:
        return "the checkpoint does not say which they were"
    parts.content = [content(part) for part in (parts.train, parts.val)] if stored.get("content") else []
    try:
        parts.check_same(stored)
    except DataError as error:
        return str(error).partition(". ")[0]
    return ""
