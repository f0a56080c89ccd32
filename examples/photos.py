"""Make a small folder of real photos to try `--data FOLDER` with: crops of two photos, a class for each.

    pip install -e ".[examples]"                         # for the two photos of scikit-learn (CC BY 2.0)
    python examples/photos.py photos
    python examples/photos.py photos --photos beach.jpg forest.jpg                 # or two or more of your own

Writes OUT/{train,val}/{china,flower}/000.jpg ... Training crops come from the left three quarters of each photo,
validation crops from the right quarter, so the two share no part of it.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

WIDTH = 640  # pixels; every photo is scaled to this width
SIDES = 96, 160  # smallest and largest side of a crop, in pixels
SPLITS = {"train": (0, 480, 300), "val": (480, WIDTH, 100)}  # first column, end column, crops of each photo


def sample_photos():
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        hint = "`pip install scikit-learn` for its two sample photos, or name your own: --photos A.jpg B.jpg"
        raise SystemExit(f"error: scikit-learn is not installed. {hint}") from None
    return [Path(name) for name in load_sample_images().filenames]


def load(path):
    photo = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    photo = photo.resize((WIDTH, round(photo.height * WIDTH / photo.width)))
    if photo.height < SIDES[1]:
        raise SystemExit(f"error: {path} is too wide: scaled to {WIDTH}x{photo.height}, {SIDES[1]} rows are needed")
    return photo


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", type=Path, help="folder to write, new or empty")
parser.add_argument("--photos", type=Path, nargs="+", help="two or more; the file names become the class names")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
photos = {path.stem: load(path) for path in args.photos or sample_photos()}
if len(photos) < max(2, len(args.photos or [])):
    parser.error("--photos: give two or more, with different names (each is a class, named after its file)")
if args.out.exists() and any(args.out.iterdir()):
    parser.error(f"{args.out} is not empty; its crops would be mixed with the new ones")
rng = np.random.default_rng(args.seed)
for split, (start, end, count) in SPLITS.items():
    for name, photo in photos.items():
        (args.out / split / name).mkdir(parents=True)
        for index in range(count):
            side = rng.integers(SIDES[0], SIDES[1] + 1)
            left, top = rng.integers(start, end - side + 1), rng.integers(0, photo.height - side + 1)
            crop = photo.crop((left, top, left + side, top + side))
            crop.save(args.out / split / name / f"{index:03d}.jpg", quality=90)
print(f"{args.out}: {', '.join(photos)}, {SPLITS['train'][2]} training and {SPLITS['val'][2]} validation crops each")
