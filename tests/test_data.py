"""Data: what is read, from where, in which order, and that nothing is read wrongly without an error."""

import bz2
import errno
import functools
import gzip
import http.server
import io
import json
import logging
import os
import pickle
import random
import struct
import sys
import threading
import types
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import ExifTags, Image
from torchvision.transforms import InterpolationMode, functional
from torchvision.transforms._presets import ImageClassification

from trainer import data as data_module
from trainer.data import (
    TORCHVISION,
    Images,
    Normalize,
    Subset,
    check_labels,
    constructor_keywords,
    decode,
    eval_transform,
    load_data,
    printable,
    stratified_split,
    to_rgb,
    train_transform,
)
from trainer.errors import DataError, UsageError

WHITE = [255, 255, 255]


def rows(image):
    """[3, H, W] -> nested lists [H][W][3], to compare with pixels written as a reader sees them."""
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).tolist()


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def png(depth, color, *lines, width, palette=b"", transparent=b""):
    """A PNG file written byte by byte: Pillow cannot write all kinds that it reads."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, len(lines), depth, color, 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header)]
    parts += [chunk(b"PLTE", palette)] * bool(palette) + [chunk(b"tRNS", transparent)] * bool(transparent)
    parts += [chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines))), chunk(b"IEND", b"")]
    return io.BytesIO(b"".join(parts))


def words(*values):
    return struct.pack(f">{len(values)}H", *values)


def write(path, color=(1, 2, 3), size=(4, 4)):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def write_classes(root, **counts):
    """PNGs `root/CLASS/N.png`; the red of a pixel is the number of the class, its green the number of the image."""
    for number, (name, count) in enumerate(sorted(counts.items())):
        for i in range(count):
            write(Path(root) / name / f"{i:03}.png", (number, i, 7))
    return str(root)


# Decoding


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "GIF", "JPEG"])
def test_every_format_gives_the_pixels_that_were_written(kind):
    image = Image.new("RGB", (3, 2), (200, 100, 50))
    result = decode(encoded(image, kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert result.shape == (3, 2, 3)
    expected = torch.tensor([200, 100, 50]).view(3, 1, 1).expand(3, 2, 3)
    assert (result.int() - expected).abs().max() <= (3 if kind == "JPEG" else 0)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 77, [77, 77, 77]),
        ("1", 1, WHITE),
        ("1", 0, [0, 0, 0]),
        ("LA", (0, 51), [204, 204, 204]),  # 51/255 is a fifth black over white
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 51), [255, 204, 204]),
        ("RGBA", (255, 0, 0, 255), [255, 0, 0]),
        ("CMYK", (0, 255, 255, 0), [255, 0, 0]),
        ("CMYK", (0, 0, 0, 204), [51, 51, 51]),
        ("YCbCr", (128, 128, 128), [128, 128, 128]),
        ("I", 257 * 9, [9, 9, 9]),
        ("I;16", 257 * 9, [9, 9, 9]),
    ],
)
def test_modes(mode, value, expected):
    image = Image.new(mode, (2, 1), value)
    assert rows(to_rgb(image)) == [[expected, expected]]


def test_16_bit_grey_is_scaled_and_not_saturated():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    grey = decode(encoded(Image.fromarray(values), "PNG"))
    assert grey.float().mean() == pytest.approx(127.5, abs=0.1)  # Pillow's convert("RGB") has 254.5
    assert torch.equal(grey[0].flatten()[::257], torch.arange(256, dtype=torch.uint8))
    assert torch.equal(grey, decode(encoded(Image.fromarray(values), "TIFF")))


def test_16_bit_colour_and_alpha():
    assert rows(decode(png(16, 2, words(0, 257 * 128, 65535), width=1))) == [[[0, 128, 255]]]
    assert rows(decode(png(16, 4, words(0, 257 * 51), width=1))) == [[[204, 204, 204]]]
    assert rows(decode(png(16, 6, words(65535, 0, 0, 257 * 51), width=1))) == [[[255, 204, 204]]]


@pytest.mark.parametrize(
    ("depth", "color", "line", "transparent", "expected"),
    [
        (1, 0, b"\x40", words(1), [[0, 0, 0], WHITE]),
        (1, 0, b"\x40", words(0), [WHITE, WHITE]),
        (2, 0, b"\x60", words(1), [WHITE, [170, 170, 170]]),
        (4, 0, b"\x37", words(3), [WHITE, [119, 119, 119]]),
        (8, 0, b"\x07\x09", words(7), [WHITE, [9, 9, 9]]),
        (16, 0, words(257, 257 * 9), words(257), [WHITE, [9, 9, 9]]),
        (8, 2, bytes([7, 9, 8, 1, 1, 1]), words(7, 9, 8), [WHITE, [1, 1, 1]]),
        (16, 2, words(0, 384, 512, 768, 0, 0), words(0, 384, 512), [WHITE, [3, 0, 0]]),
    ],
)
def test_the_transparent_colour_of_a_png_is_white(depth, color, line, transparent, expected):
    assert rows(decode(png(depth, color, line, width=2, transparent=transparent))) == [expected]


def test_palettes():
    palette = bytes([255, 0, 0, 0, 0, 255])
    line = b"\x01"  # two pixels of 4 bits: colours 0 and 1
    assert rows(decode(png(4, 3, line, width=2, palette=palette))) == [[[255, 0, 0], [0, 0, 255]]]
    some = png(4, 3, line, width=2, palette=palette, transparent=bytes([51]))
    assert rows(decode(some)) == [[[255, 204, 204], [0, 0, 255]]]
    one = png(4, 3, line, width=2, palette=palette, transparent=bytes([255, 0]))
    assert rows(decode(one)) == [[[255, 0, 0], WHITE]]


# Where the stored top left corner is shown, [row, column], for each EXIF orientation.
CORNERS = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", CORNERS)
def test_exif_orientation_is_applied(kind, orientation):
    image = Image.new("RGB", (32, 16))
    image.paste((255, 0, 0), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    result = decode(encoded(image, kind, exif=exif, quality=95))
    assert result.shape == ((3, 32, 16) if orientation > 4 else (3, 16, 32))
    row, column = CORNERS[orientation]
    assert result[0, row, column] > 240
    assert (result[0] > 128).sum() == 64  # and red nowhere else


def test_exif_orientation_of_16_bit_grey():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(np.array([[257, 514, 771]], np.uint16))
    assert rows(decode(encoded(image, "PNG", exif=exif))) == [[[1] * 3], [[2] * 3], [[3] * 3]]


def test_damaged_exif_does_not_lose_the_image():
    image = encoded(Image.new("RGB", (3, 2), (9, 9, 9)), "PNG", exif=b"Exif\0\0garbage")
    assert decode(image).shape == (3, 2, 3)


def test_cmyk_jpeg():
    result = decode(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert rows(result)[4][4] == pytest.approx([255, 0, 0], abs=3)


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (5, 4), color) for color in ((255, 0, 0), (0, 0, 255))]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})):
        file = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert Image.open(file).n_frames == 2
        assert rows(decode(file)) == [[[255, 0, 0]] * 5] * 4


def test_one_pixel(tmp_path):
    path = write(tmp_path / "dot.png", (9, 8, 7), (1, 1))
    assert rows(decode(path)) == rows(decode(str(path))) == [[[9, 8, 7]]]
    for augment in ("none", "flip", "crop"):
        transform = train_transform(augment, size=8, resize=9, interpolation=InterpolationMode.BICUBIC)
        assert rows(transform(decode(path))) == [[[9, 8, 7]] * 8] * 8


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.new("F", (2, 2), 0.5), "floating-point"),
        (Image.new("I", (2, 2), 65536), "65536"),
        (Image.new("I", (2, 2), -1), "-1"),
    ],
)
def test_pixels_without_a_range_are_errors_that_name_the_file(tmp_path, image, reason):
    image.save(tmp_path / "scan.tif")
    with pytest.raises(DataError, match=rf"scan\.tif.*{reason}"):
        decode(tmp_path / "scan.tif")


def test_files_that_cannot_be_read_are_errors_that_name_them(tmp_path):
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8))
    for kind in ("jpg", "png", "webp", "bmp", "tif", "gif"):
        path = tmp_path / f"cut.{kind}"
        noise.save(path)
        assert decode(path).shape == (3, 64, 64)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(DataError, match=rf"cut\.{kind}: .*\w{{4}}"):
            decode(path)
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "program.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
    (tmp_path / "other.jpg").write_bytes(b"P6 1 1 255\n...")
    for name in ("empty.jpg", "text.jpg", "program.jpg", "other.jpg", "gone.jpg", ""):
        with pytest.raises(DataError, match=f"cannot read .*{name}"):
            decode(tmp_path / name)


@pytest.mark.filterwarnings(r"ignore:::PIL\.")  # as the module does, but pytest puts its own filters before
def test_no_damage_raises_anything_else():
    noise = np.random.RandomState(0).randint(0, 256, (24, 24, 3), np.uint8)
    generator = random.Random(0)
    reasons = []
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"):
        exif = Image.Exif()
        exif[0x0112] = 6
        good = encoded(Image.fromarray(noise), kind, exif=exif).getvalue()
        for _ in range(60):
            bad = bytearray(good)
            for _ in range(generator.randint(1, 6)):
                bad[generator.randrange(min(len(bad), 200))] = generator.randrange(256)
            try:
                assert decode(io.BytesIO(bad)).shape[0] == 3
            except DataError as error:
                reasons.append(str(error))
    assert len(reasons) > 30
    assert not [reason for reason in reasons if "\n" in reason]


def test_bombs(tmp_path, monkeypatch):
    path = write(tmp_path / "bomb.png", size=(6, 6))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # the error comes at twice that
    with pytest.raises(DataError, match=r"bomb\.png.*36 pixels"):
        decode(path)


def test_warnings_of_pillow_do_not_get_out(program, tmp_path):
    """In a process of its own, as pytest puts its filters before those of the module."""
    path = write(tmp_path / "large.png", size=(4, 4))
    code = "import warnings; from PIL import Image; from trainer.data import decode; Image.MAX_IMAGE_PIXELS = 10; "
    code += "warnings.simplefilter('error', RuntimeWarning, append=True); "
    (tmp_path / "code.py").write_text(code + f"assert decode({str(path)!r}).shape == (3, 4, 4)")
    done = program(target=tmp_path / "code.py", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_errors_of_the_machine_are_not_blamed_on_the_file(tmp_path, monkeypatch):
    def too_many(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", too_many)
    with pytest.raises(OSError, match="Too many open files") as caught:
        decode(tmp_path / "good.png")
    assert caught.value.errno == errno.EMFILE


# Splitting


def test_split_keeps_the_shares_of_the_classes():
    labels = [0] * 50 + [1] * 10 + [2] * 2 + [3]
    random.Random(0).shuffle(labels)
    train, val = stratified_split(labels, 0.2, seed=0)
    assert sorted(train + val) == list(range(len(labels)))
    assert (train, val) == (sorted(train), sorted(val))
    assert Counter(labels[i] for i in val) == {0: 10, 1: 2, 2: 1}
    assert Counter(labels[i] for i in train) == {0: 40, 1: 8, 2: 1, 3: 1}
    assert Counter(labels[i] for i in stratified_split(labels, 0.99, seed=0)[0]) == {0: 1, 1: 1, 2: 1, 3: 1}


def test_split_depends_on_the_seed_alone():
    labels = [0] * 10 + [1] * 10
    assert stratified_split(labels, 0.3, seed=0)[1] == [0, 5, 7, 11, 15, 16]  # the same on every machine, for ever
    assert stratified_split(labels, 0.3, seed=1)[1] != stratified_split(labels, 0.3, seed=0)[1]
    more = stratified_split([*labels, 1, 1, 1, 1], 0.3, seed=0)[1]
    assert [i for i in more if i < 10] == [0, 5, 7]  # new images of class 1 do not move class 0


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 20, float("nan")])
def test_split_refuses_other_fractions(fraction):
    with pytest.raises(UsageError, match="between 0 and 1"):
        stratified_split([0, 0, 1, 1], fraction, seed=0)


# Folders


def test_train_and_val_folders(tmp_path):
    write_classes(tmp_path / "train", cat=3, ant=2, bee=1)
    write_classes(tmp_path / "val", cat=1, ant=1, bee=1)
    train, val = load_data(str(tmp_path))
    assert train.classes == val.classes == ("ant", "bee", "cat")
    assert train.labels == [0, 0, 1, 2, 2, 2]
    assert val.labels == [0, 1, 2]
    assert len(train) == 6
    assert train.name(5) == str(tmp_path / "train/cat/002.png") == train.path(5) == train.path(-1)
    assert [rows(train[i])[0][0] for i in range(6)] == [
        [0, 0, 7], [0, 1, 7], [1, 0, 7], [2, 0, 7], [2, 1, 7], [2, 2, 7]
    ]  # fmt: skip
    with pytest.raises(IndexError):
        train.path(6)


@pytest.mark.parametrize("names", [("val", "valid", "validation", "test"), ("validation", "test"), ("test",)])
def test_validation_folders_in_order_of_preference(tmp_path, names):
    write_classes(tmp_path / "train", a=2, b=2)
    for i, name in enumerate(names):
        write_classes(tmp_path / name, a=1 + i, b=1)
    _, val = load_data(str(tmp_path))
    assert val.name(0).startswith(str(tmp_path / names[0] / "a"))
    assert len(val) == 2


@pytest.mark.parametrize("below", ["", "train"])
def test_one_folder_is_split(tmp_path, below, caplog):
    write_classes(tmp_path / below, a=10, b=5, c=1)
    (tmp_path / below / "test.txt").touch()
    train, val = load_data(tmp_path, val_fraction=0.2, seed=3)
    assert Counter(train.labels) == {0: 8, 1: 4, 2: 1}
    assert Counter(val.labels) == {0: 2, 1: 1}
    names = [images.name(i) for images in (train, val) for i in range(len(images))]
    assert len(set(names)) == 16
    for images in (train, val):
        for i, label in enumerate(images.labels):
            assert rows(images[i])[0][0][0] == label
    again = load_data(str(tmp_path), val_fraction=0.2, seed=3)[1]
    assert [again.name(i) for i in range(3)] == [val.name(i) for i in range(3)]
    assert "classes without validation images: c" in caplog.text


def test_test_folder_without_classes_is_not_used(tmp_path, caplog):
    write_classes(tmp_path / "train", a=5, b=5)
    write(tmp_path / "test/1.png")
    train, val = load_data(str(tmp_path))
    assert (len(train), len(val)) == (8, 2)
    assert "test has no class folders" in caplog.text


def test_class_called_train(tmp_path):
    write_classes(tmp_path, train=2, bus=2)
    assert load_data(str(tmp_path))[0].classes == ("bus", "train")


def test_splits_by_other_names_are_not_classes(tmp_path):
    write_classes(tmp_path / "training", a=2, b=2)
    write_classes(tmp_path / "validation", a=2, b=2)
    with pytest.raises(DataError, match="training, validation: expected train/ and val/"):
        load_data(str(tmp_path))


def test_order_does_not_depend_on_the_disk(tmp_path, monkeypatch):
    write_classes(tmp_path, a=6, b=6)
    write(tmp_path / "a/deep/er/x.png")
    before = [images.name(i) for images in load_data(tmp_path) for i in range(len(images))]

    class Reversed:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = list(entries)[::-1]

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            pass

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", Reversed)
    assert [images.name(i) for images in load_data(tmp_path) for i in range(len(images))] == before


def test_images_in_nested_folders_count_to_the_top_one(tmp_path):
    write_classes(tmp_path, a=1, b=2)
    write(tmp_path / "a/0/may/x.JPEG")
    images = data_module._class_folders(str(tmp_path))
    assert images.classes == ("a", "b")
    assert images.labels == [0, 0, 1, 1]
    assert [images.name(i).removeprefix(f"{tmp_path}/") for i in range(2)] == ["a/0/may/x.JPEG", "a/000.png"]


def test_validation_labels_are_mapped_by_name(tmp_path, caplog):
    write_classes(tmp_path / "train", a=2, b=2, c=2)
    write(tmp_path / "val/c/x.png", (2, 0, 0))
    write(tmp_path / "val/a/x.png", (0, 0, 0))
    _, val = load_data(str(tmp_path))
    assert val.classes == ("a", "b", "c")
    assert val.labels == [0, 2] == [rows(val[i])[0][0][0] for i in range(2)]
    assert "classes without validation images: b" in caplog.text


def test_extra_validation_class(tmp_path):
    write_classes(tmp_path / "train", a=2, b=2)
    write_classes(tmp_path / "val", a=2, zebra=2)
    with pytest.raises(DataError, match=r"zebra\. Training has a, b; validation has a, zebra"):
        load_data(str(tmp_path))


def test_extensions_in_any_case_and_what_is_ignored(tmp_path, caplog):
    write_classes(tmp_path, a=1, b=1)
    for extension in ("jpg", "JPEG", "Png", "webp", "bmp", "tif", "TIFF", "GIF"):
        write(tmp_path / f"a/x.{extension}")
    for name in ("a/x.heic", "a/notes.txt", "b/Notes.TXT", "b/LICENSE", ".DS_Store", "a/.hidden.png", ".git/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    write(tmp_path / "loose.png")
    images = data_module._class_folders(str(tmp_path))
    assert images.labels == [0] * 9 + [1]
    assert all(images[i].shape == (3, 4, 4) for i in range(10))
    assert "ignored 4 files: .txt (2), .heic (1), no extension (1)" in caplog.text
    assert "ignored 1 images outside the class folders, such as loose.png" in caplog.text


def test_symbolic_links_never_multiply_images(tmp_path, caplog):
    root = tmp_path / "root"
    write_classes(root, a=3, b=3)
    (root / "a/loop").symlink_to(root)
    (root / "a/self").symlink_to(root / "a")
    (root / "a/other").symlink_to(root / "b")
    (root / "b/up").symlink_to(tmp_path)
    (root / "around").symlink_to(root)
    (root / "alias").symlink_to(root / "b")
    (root / "b/again.png").symlink_to(root / "b/000.png")
    (root / "a/of-b.png").symlink_to(root / "b/000.png")
    (root / "b/broken.png").symlink_to(root / "gone.png")
    (root / "b/ouroboros.png").symlink_to(root / "b/ouroboros.png")
    images = data_module._class_folders(str(root))
    assert images.classes == ("a", "b")
    assert images.labels == [0, 0, 0, 1, 1, 1]
    assert [rows(images[i])[0][0][0] for i in range(6)] == images.labels
    assert "ignored 8 links to what is counted already, such as" in caplog.text
    assert "ignored 2 broken links, such as b/broken.png" in caplog.text


def test_symbolic_links_to_images_elsewhere_are_followed(tmp_path):
    write_classes(tmp_path / "pool", x=3, y=2)
    root = tmp_path / "root"
    for name, number in (("b", 0), ("b", 1), ("c", 2)):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"{number}.png").symlink_to(tmp_path / f"pool/x/00{number}.png")
    (root / "a").symlink_to(tmp_path / "pool/y")
    images = data_module._class_folders(str(root))
    assert images.classes == ("a", "b", "c")
    assert images.labels == [0, 0, 1, 1, 2]
    assert [rows(images[i])[0][0][:2] for i in range(5)] == [[1, 0], [1, 1], [0, 0], [0, 1], [0, 2]]


ODD_NAMES = [b"with space", "naïve 日本".encode(), b"new\nline", b"caf\xe9", b"\x1b[31mred", b"n" * 251]


def test_odd_file_names(tmp_path, capsys):
    for folder in (b"a", b"b\xff\n"):
        for name in ODD_NAMES:
            path = os.path.join(os.fsencode(tmp_path), folder, name + b".png")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(encoded(Image.new("RGB", (2, 2), (5, 5, 5)), "PNG").getvalue())
    images = pickle.loads(pickle.dumps(data_module._class_folders(str(tmp_path))))
    assert images.classes == ("a", "b\\xff\\n")
    assert len(images) == 12
    for i in range(12):
        assert rows(images[i])[0][0] == [5, 5, 5]
        images.name(i).encode()  # strictly
        assert images.name(i).isprintable()
    assert any(images.name(i).endswith("a/caf\\xe9.png") for i in range(6))
    assert any("naïve 日本" in images.name(i) for i in range(6))


def test_file_removed_after_the_scan(tmp_path):
    images = data_module._class_folders(write_classes(tmp_path, a=2, b=2))
    (tmp_path / "b/001.png").unlink()
    with pytest.raises(DataError, match=r"b/001\.png.*No such file"):
        images[3]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no class folders"),
        (["x.png"], "no class folders.*1 images outside"),
        (["a/x.png"], "one class, a: expected two or more"),
        (["a/x.png", "b/x.png", "c/x.txt"], r"no images in \S*/c: remove"),
        (["a/x.png", "b/x.png"], "no class has a second image"),
        (["train/a/x.png", "train/b/x.png", "val/a/x.txt"], r"no images in \S*/val/a: remove"),
    ],
)
def test_folders_without_data_are_errors(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        load_data(str(tmp_path))


# Labels


@pytest.mark.parametrize("label", [2, -1, -100, 1.0, None, True, np.int64(1)])
def test_labels_that_are_no_index_are_errors(label):
    class Own(Images):
        classes = ("a", "b")

    images = Own()
    images.labels = [0, 1, label]
    with pytest.raises(DataError, match=r"Own\[2\] has the label .*an int from 0 to 1"):
        check_labels(images)
    images.labels = [0, 1]
    check_labels(images)
    with pytest.raises(NotImplementedError):
        images[0]


def test_subsets_of_subsets(tmp_path):
    images = data_module._class_folders(write_classes(tmp_path, a=3, b=3))
    subset = Subset(Subset(images, [5, 0, 3]), [2, 0])
    assert subset.labels == [1, 1]
    assert [rows(subset[i])[0][0] for i in range(2)] == [[1, 0, 7], [1, 2, 7]]
    assert subset.name(1) == images.name(5)


# Data sets by name


def test_digits():
    train, val = load_data("digits")
    assert len(train) + len(val) == 1797
    assert train.classes == tuple("0123456789")
    counts = Counter(train.labels + val.labels)
    assert [counts[i] for i in range(10)] == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert all(abs(n - 0.2 * counts[i]) <= 0.5 for i, n in Counter(val.labels).items())
    image = train[0]
    assert image.shape == (3, 8, 8)
    assert image.dtype == torch.uint8
    assert torch.equal(image[0], image[2])
    assert set(torch.stack([train[i] for i in range(100)]).unique().tolist()) == {
        0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255
    }  # fmt: skip
    assert val.name(0) == "digits[8]"


def test_digits_file():
    path = Path(data_module.__file__).with_name("digits.npz")
    assert path.stat().st_size < 100_000
    with np.load(path, allow_pickle=False) as file:
        assert {key: (file[key].dtype, file[key].shape) for key in file} == {
            "images": (np.uint8, (1797, 8, 8)),
            "labels": (np.uint8, (1797,)),
        }
    text = path.with_suffix(".md").read_text()
    for needed in (
        "Alpaydin",
        "10.24432/C50P49",
        "creativecommons.org/licenses/by/4.0",
        "archive.ics.uci.edu/dataset/80",
    ):
        assert needed in text


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    with np.load(Path(data_module.__file__).with_name("digits.npz")) as file:
        assert (file["images"] == digits.images).all()
        assert (file["labels"] == digits.target).all()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("cifar", r"no folder 'cifar' and no data set of that name \(did you mean CIFAR10"),
        ("nowhere/at/all", "no folder 'nowhere/at/all' and"),
        ("", "no folder"),
        ("VOCDetection", "VOCDetection is not a data set of images with one class"),
        ("fakedata", "FakeData is not"),
    ],
)
def test_unknown_names(data, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=rf"{message}.*digits, CIFAR10.*EuroSAT"):
        load_data(data)


def test_unknown_folders(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UsageError, match=rf"did you mean {tmp_path}/photos\?"):
        load_data(f"{tmp_path}/fotos/")
    (tmp_path / "photos.zip").touch()
    with pytest.raises(UsageError, match=r"photos\.zip' is not a folder"):
        load_data(f"{tmp_path}/photos.zip")


def test_folder_wins_over_name(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    write_classes("MNIST", a=2, b=2)
    assert load_data("MNIST")[0].classes == ("a", "b")
    assert "taking the folder" in caplog.text
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_data("~/MNIST")[0].classes == ("a", "b")
    write_classes("digits", a=2, b=2)
    assert len(load_data("digits")[0].classes) == 10, "what the demo is must not depend on the folder it starts in"
    assert "give ./digits" in caplog.text
    assert load_data("./digits")[0].classes == ("a", "b")


@pytest.mark.parametrize("name", TORCHVISION)
def test_arguments_are_those_of_the_constructor(name, tmp_path):
    """Every keyword is accepted, and so is every split: an empty folder is missing its files, nothing else."""
    cls = getattr(torchvision.datasets, name)
    assert cls.__name__ == name
    keywords = constructor_keywords(cls)
    assert {"root"} <= keywords
    assert ("download" in keywords) == (name not in ("ImageNet", "FER2013"))
    for arguments in TORCHVISION[name] or ({},):
        assert set(arguments) <= keywords
        arguments = arguments | ({"download": False} if "download" in keywords else {})
        with pytest.raises((RuntimeError, FileNotFoundError, ImportError), match=r"not|No") as caught:
            cls(str(tmp_path), **arguments)
        assert "Unknown value" not in str(caught.value)


def test_constructor_keywords_follow_kwargs():
    assert {"split", "train", "download"} <= constructor_keywords(torchvision.datasets.EMNIST)
    assert {"loader", "split"} <= constructor_keywords(torchvision.datasets.ImageNet)
    assert not {"download"} & constructor_keywords(torchvision.datasets.ImageNet)
    assert not {"is_valid_file"} & constructor_keywords(torchvision.datasets.EuroSAT)


def idx(array):
    kind = {"uint8": 8, "int32": 12}[array.dtype.name]
    return (
        struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape)
        + array.astype(array.dtype.newbyteorder(">")).tobytes()
    )


def squares(labels, *shape):
    """Grey images, each all of the value of its label times ten."""
    return np.stack([np.full(shape, label * 10, np.uint8) for label in labels])


def colored(path, label):
    write(path, (label * 10,) * 3)


def make_mnist(root, monkeypatch, folder="MNIST", prefixes=("train", "t10k")):
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for prefix, labels in zip(prefixes, ([5, 0, 4], [7, 2]), strict=True):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(squares(labels, 28, 28)))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.array(labels, np.uint8)))


def make_emnist(root, monkeypatch):
    make_mnist(root, monkeypatch, "EMNIST", ("emnist-balanced-train", "emnist-balanced-test"))


def make_qmnist(root, monkeypatch):
    raw = root / "QMNIST/raw"
    raw.mkdir(parents=True)
    for part, labels in (("train", [5, 0, 4]), ("test", [7, 2])):
        table = np.array([[label, 1, 2, 3, 4, 5, 6, 7] for label in labels], np.int32)
        (raw / f"qmnist-{part}-images-idx3-ubyte").write_bytes(idx(squares(labels, 28, 28)))
        (raw / f"qmnist-{part}-labels-idx2-int").write_bytes(idx(table))


def make_usps(root, monkeypatch):
    for name, labels in (("usps.bz2", [5, 0, 4, 7]), ("usps.t.bz2", [7, 2])):
        values = [label * 20 / 255 - 1 + 1e-3 for label in labels]
        lines = [
            f"{label + 1} " + " ".join(f"{i + 1}:{v}" for i in range(256))
            for label, v in zip(labels, values, strict=True)
        ]
        (root / name).write_bytes(bz2.compress("\n".join(lines).encode()))


def make_cifar10(root, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: os.path.isfile(path))
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    for name, labels in [(f"data_batch_{i}", [i]) for i in range(1, 6)] + [("test_batch", [7, 2])]:
        content = {"data": squares(labels, 3072), "labels": labels}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {i}" for i in range(10)]}))


def make_stl10(root, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda path, md5: True)
    folder = root / "stl10_binary"
    folder.mkdir()
    for part, labels in (("train", [5, 0, 4]), ("test", [7, 2])):
        squares(labels, 3, 96, 96).tofile(folder / f"{part}_X.bin")
        (np.array(labels, np.uint8) + 1).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"class {i}" for i in range(10)))


def make_svhn(root, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda path, md5: True)
    monkeypatch.setattr("torchvision.datasets.svhn.download_url", lambda *_: None)
    for part, labels in (("train", [5, 0, 4, 7]), ("test", [7, 2])):
        images = squares(labels, 32, 32, 3).transpose(1, 2, 3, 0)
        numbers = np.array([[label or 10] for label in labels], np.uint8)
        scipy_io.savemat(root / f"{part}_32x32.mat", {"X": images, "y": numbers})


def make_flowers102(root, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5: True)
    for number, label in enumerate([5, 0, 4, 7, 2], 1):
        colored(root / f"flowers-102/jpg/image_{number:05}.jpg", label)
    scipy_io.savemat(root / "flowers-102/imagelabels.mat", {"labels": np.array([[5, 0, 4, 7, 2]]) + 1})
    ids = {"trnid": [[1, 2, 3]], "valid": [[4, 5]], "tstid": [[1, 1]]}
    scipy_io.savemat(root / "flowers-102/setid.mat", {key: np.array(value) for key, value in ids.items()})


def make_fer2013(root, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.fer2013.check_integrity", lambda path, md5: True)
    (root / "fer2013").mkdir()
    parts = [(5, "Training"), (0, "Training"), (4, "Training"), (7, "PublicTest"), (2, "PrivateTest")]
    lines = [f"{label},{' '.join([str(label * 10)] * 48 * 48)},{part}" for label, part in parts]
    (root / "fer2013/fer2013.csv").write_text(
        "\n".join(["emotion,pixels,Usage", *lines, f"7,{'70 ' * 48 * 48},Training"])
    )


def make_dtd(root, monkeypatch):
    for part, labels in (("train", [5, 0, 4, 7, 2]), ("val", [7, 2])):
        for i, label in enumerate(labels):
            colored(root / f"dtd/dtd/images/class {label}/{part}{i}.jpg", label)
        lines = [f"class {label}/{part}{i}.jpg" for i, label in enumerate(labels)]
        (root / "dtd/dtd/labels").mkdir(exist_ok=True)
        (root / f"dtd/dtd/labels/{part}1.txt").write_text("\n".join(lines))


def make_food101(root, monkeypatch):
    (root / "food-101/meta").mkdir(parents=True)
    for part, labels in (("train", [5, 0, 4, 7, 2]), ("test", [7, 2])):
        meta = {f"class {label}": [f"class {label}/{part}"] for label in labels}
        (root / f"food-101/meta/{part}.json").write_text(json.dumps(meta))
        for label in labels:
            colored(root / f"food-101/images/class {label}/{part}.jpg", label)


def make_gtsrb(root, monkeypatch):
    for label in range(8):
        colored(root / f"gtsrb/GTSRB/Training/{label:05}/x.ppm", label)
    lines = ["Filename;Width;ClassId"]
    for i, label in enumerate([7, 2]):
        colored(root / f"gtsrb/GTSRB/Final_Test/Images/{i}.ppm", label)
        lines.append(f"{i}.ppm;4;{label}")
    (root / "gtsrb/GT-final_test.csv").write_text("\n".join(lines))


def make_pets(root, monkeypatch):
    for part, labels in (("trainval", [0, 1, 2]), ("test", [2, 1, 0])):
        lines = []
        for label in labels:
            colored(root / f"oxford-iiit-pet/images/great_{label}_{part}.jpg", label)
            lines.append(f"great_{label}_{part} {label + 1} 1 1")
        (root / "oxford-iiit-pet/annotations").mkdir(exist_ok=True)
        (root / f"oxford-iiit-pet/annotations/{part}.txt").write_text("\n".join(lines))


def make_aircraft(root, monkeypatch):
    folder = root / "fgvc-aircraft-2013b/data"
    for part, labels in (("train", [5, 0, 4]), ("val", [7, 2])):
        for i, label in enumerate(labels):
            colored(folder / f"images/{part}{i}.jpg", label)
        lines = [f"{part}{i} class {label}" for i, label in enumerate(labels)]
        (folder / f"images_variant_{part}.txt").write_text("\n".join(lines))
    (folder / "variants.txt").write_text("\n".join(f"class {i}" for i in range(8)))


def make_clevr(root, monkeypatch):
    for part, labels in (("train", [5, 0, 4, 7]), ("val", [7, 2])):
        scenes = []
        for i, label in enumerate(labels):
            colored(root / f"clevr/CLEVR_v1.0/images/{part}/{i}.png", label)
            scenes.append({"image_filename": f"{i}.png", "objects": [{}] * label})
        (root / "clevr/CLEVR_v1.0/scenes").mkdir(exist_ok=True)
        (root / f"clevr/CLEVR_v1.0/scenes/CLEVR_{part}_scenes.json").write_text(json.dumps({"scenes": scenes}))


def make_cars(root, monkeypatch):
    scipy_io = pytest.importorskip("scipy.io")
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    for part, labels, file in (
        ("train", [5, 0, 4], "devkit/cars_train_annos.mat"),
        ("test", [7, 2], "cars_test_annos_withlabels.mat"),
    ):
        for i, label in enumerate(labels):
            colored(folder / f"cars_{part}/{i}.jpg", label)
        table = np.array([(f"{i}.jpg", label + 1) for i, label in enumerate(labels)], [("fname", "O"), ("class", "O")])
        scipy_io.savemat(folder / file, {"annotations": table})
    scipy_io.savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array([f"class {i}" for i in range(8)], "O")})


def make_imagenette(root, monkeypatch):
    wnids = sorted(torchvision.datasets.Imagenette._WNID_TO_CLASS)
    for part, labels in (("train", range(10)), ("val", [7, 2])):
        for label in labels:
            colored(root / f"imagenette2/{part}/{wnids[label]}/x.jpeg", label)


def make_sst2(root, monkeypatch):
    for part in ("train", "valid"):
        for label, name in enumerate(("negative", "positive")):
            colored(root / f"rendered-sst2/{part}/{name}/x.png", label)


def make_country211(root, monkeypatch):
    for part in ("train", "valid"):
        for label in range(3):
            colored(root / f"country211/{part}/class {label}/x.jpg", label)


@pytest.mark.parametrize(
    ("name", "make", "train_labels", "val_labels", "classes", "title"),
    [
        ("MNIST", make_mnist, [5, 0, 4], [7, 2], {0: "0 - zero", 9: "9 - nine"}, "MNIST test[0]"),
        ("EMNIST", make_emnist, [5, 0, 4], [7, 2], {0: "0", 46: "t"}, "EMNIST balanced test[0]"),
        ("QMNIST", make_qmnist, [5, 0, 4], [7, 2], {9: "9 - nine"}, "QMNIST test[0]"),
        ("USPS", make_usps, [5, 0, 4, 7], [7, 2], {7: "7"}, "USPS test[0]"),
        ("cifar10", make_cifar10, [1, 2, 3, 4, 5], [7, 2], {9: "class 9"}, "CIFAR10 test[0]"),
        ("stl10", make_stl10, [5, 0, 4], [7, 2], {9: "class 9"}, "STL10 test[0]"),
        ("SVHN", make_svhn, [5, 0, 4, 7], [7, 2], {7: "7"}, "SVHN test[0]"),
        ("FLOWERS102", make_flowers102, [5, 0, 4], [7, 2], {}, "Flowers102 val[0]"),
        ("fer2013", make_fer2013, [5, 0, 4, 7], [7, 2], {7: "7"}, "FER2013 test[0]"),
        ("DTD", make_dtd, [3, 0, 2, 4, 1], [4, 1], {4: "class 7"}, "DTD val[0]"),
        ("FGVCAircraft", make_aircraft, [5, 0, 4], [7, 2], {7: "class 7"}, "FGVCAircraft val[0]"),
        ("CLEVRClassification", make_clevr, [5, 0, 4, 7], [7, 2], {7: "7"}, "CLEVRClassification val[0]"),
        ("stanfordcars", make_cars, [5, 0, 4], [7, 2], {7: "class 7"}, "StanfordCars test[0]"),
        ("Food101", make_food101, [3, 0, 2, 4, 1], [4, 1], {4: "class 7"}, "Food101 test[0]"),
        ("GTSRB", make_gtsrb, [0, 1, 2, 3, 4, 5, 6, 7], [7, 2], {7: "7"}, "GTSRB test[0]"),
        ("OxfordIIITPet", make_pets, [0, 1, 2], [2, 1, 0], {2: "Great 2"}, "OxfordIIITPet test[0]"),
        ("Imagenette", make_imagenette, list(range(10)), [2, 7], {0: "tench, Tinca tinca"}, "Imagenette val[0]"),
        ("RenderedSST2", make_sst2, [0, 1], [0, 1], {1: "positive"}, "RenderedSST2 val[0]"),
        ("Country211", make_country211, [0, 1, 2], [0, 1, 2], {2: "class 2"}, "Country211 valid[0]"),
    ],
)
def test_torchvision_data_sets(tmp_path, monkeypatch, name, make, train_labels, val_labels, classes, title):
    make(tmp_path, monkeypatch)
    train, val = load_data(name, root=tmp_path)
    assert (train.labels, val.labels) == (train_labels, val_labels)
    assert train.classes == val.classes
    assert {i: train.classes[i] for i in classes} == classes
    assert val.name(0) == title
    for images in (train, pickle.loads(pickle.dumps(val))):
        for i, label in enumerate(images.labels):
            number = int(train.classes[label][-1]) if train.classes[label].startswith("class") else label
            assert images[i].dtype == torch.uint8
            assert images[i].shape[0] == 3
            assert (images[i].int() - number * 10).abs().max() <= 2  # the picture of that label


def make_eurosat(root, monkeypatch):
    for label in range(3):
        for i in range(5):
            colored(root / f"eurosat/2750/class {label}/{i}.jpg", label)


def test_files_of_torchvision_are_decoded_by_our_rules(tmp_path, monkeypatch):
    make_eurosat(tmp_path, monkeypatch)
    Image.new("RGBA", (2, 2)).save(tmp_path / "eurosat/2750/class 0/0.png")
    (tmp_path / "eurosat/2750/class 2/9.jpg").touch()
    images = data_module._open_torchvision("EuroSAT", str(tmp_path), {})
    assert rows(images[0]) == [[[0] * 3] * 4] * 4
    assert rows(images[1]) == [[WHITE] * 2] * 2
    with pytest.raises(DataError, match=r"EuroSAT\[16\]: .*class 2/9\.jpg"):
        images[16]


def make_caltech101(root, monkeypatch):
    pytest.importorskip("scipy.io")
    for label in range(3):
        for i in range(5):
            colored(root / f"caltech101/101_ObjectCategories/class {label}/image_{i + 1:04}.jpg", label)
    colored(root / "caltech101/101_ObjectCategories/BACKGROUND_Google/image_0001.jpg", 9)


def make_caltech256(root, monkeypatch):
    for label in range(3):
        for i in range(5):
            colored(root / f"caltech256/256_ObjectCategories/class {label}/{label + 1:03}_{i + 1:04}.jpg", label)


def make_sun397(root, monkeypatch):
    for label in range(3):
        for i in range(5):
            colored(root / f"SUN397/c/class {label}/sun_{i}.jpg", label)
    (root / "SUN397/ClassName.txt").write_text("\n".join(f"/c/class {label}" for label in range(3)))
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda *a: random.sample(found := list(rglob(*a)), len(found)))


def make_semeion(root, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.semeion.check_integrity", lambda path, md5: True)
    lines = [[label / 25.5] * 256 + [float(i == label) for i in range(3)] for label in range(3) for _ in range(5)]
    np.savetxt(root / "semeion.data", lines)


@pytest.mark.parametrize("make", [make_eurosat, make_caltech101, make_caltech256, make_sun397, make_semeion])
def test_torchvision_data_sets_without_parts_are_split(tmp_path, monkeypatch, make):
    make(tmp_path, monkeypatch)
    name = make.__name__.removeprefix("make_")
    parts = [load_data(name, root=str(tmp_path), val_fraction=0.4, seed=1) for _ in range(2)]
    for train, val in parts:
        assert Counter(train.labels) == {0: 3, 1: 3, 2: 3}
        assert Counter(val.labels) == {0: 2, 1: 2, 2: 2}
        for images in (train, val):
            for i, label in enumerate(images.labels):
                assert (images[i].int() - label * 10).abs().max() <= 2
                assert images.classes[label].endswith(str(label))
    if name == "sun397":  # the same files, in whatever order the disk has them
        files = [
            [val.images.images.dataset._image_files[val.images.indices[i]] for i in val.indices] for _, val in parts
        ]
        assert files[0] == files[1]


def test_labels_of_pcam_are_read_at_once(tmp_path, monkeypatch):
    opened = []

    class File:
        def __init__(self, path):
            opened.append(path.name)
            self.array = {"x": squares([1, 0, 1], 96, 96, 3), "y": np.array([1, 0, 1]).reshape(3, 1, 1, 1)}

        def __enter__(self):
            return self.array

        def __exit__(self, *_):
            pass

    monkeypatch.setitem(sys.modules, "h5py", types.SimpleNamespace(File=File))
    (tmp_path / "pcam").mkdir()
    for files in torchvision.datasets.PCAM._FILES.values():
        for name, *_ in files.values():
            (tmp_path / "pcam" / name).touch()
    train, val = load_data("pcam", root=str(tmp_path))
    assert train.labels == val.labels == [1, 0, 1]
    assert train.classes == ("0", "1")
    assert (train[2] == 10).all()
    assert opened.count("camelyonpatch_level_2_split_valid_y.h5") == 2  # for the labels, and for a first image


class Places(torch.utils.data.Dataset):
    """Without a list of labels, and with labels of numpy."""

    class_to_idx = {"b": 1, "a": 0}  # noqa: RUF012

    def __len__(self):
        return 3

    def __getitem__(self, index):
        if index > 2:
            raise IndexError
        return Image.new("L", (2, 2), index), np.int64(index % 2)


def test_labels_are_read_from_the_images_as_a_last_resort(caplog):
    caplog.set_level(logging.INFO)
    images = data_module.TorchvisionImages("places", Places())
    assert images.labels == [0, 1, 0]
    assert images.classes == ("a", "b")
    assert rows(images[2]) == [[[2, 2, 2]] * 2] * 2
    assert "places: reading all 3 images" in caplog.text
    assert len(list(images)) == 3  # a loop ends
    images.labels.append(0)
    with pytest.raises(DataError, match=r"cannot read places\[3\]: IndexError"):
        images[3]


# Downloads


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves the folder `server.folder`, and lists the requests in `server.requests`."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            server.requests.append(self.path)
            super().do_GET()

    folder = tmp_path / "served"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    server.folder, server.requests, server.url = folder, [], f"http://127.0.0.1:{server.server_port}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setenv("no_proxy", "*")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def mnist_server(server, monkeypatch):
    make_mnist(server.folder, monkeypatch)
    names = []
    for file in (server.folder / "MNIST/raw").iterdir():
        names.append(f"{file.name}.gz")
        (server.folder / names[-1]).write_bytes(gzip.compress(file.read_bytes()))
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [server.url])
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", [(name, None) for name in names])
    return server


def test_download_happens_once(mnist_server, tmp_path):
    train, val = load_data("mnist", root=str(tmp_path / "root"))
    assert (train.labels, val.labels) == ([5, 0, 4], [7, 2])
    count = len(mnist_server.requests)
    assert count >= 4
    assert load_data("mnist", root=str(tmp_path / "root"))[0].labels == [5, 0, 4]
    assert len(mnist_server.requests) == count


def test_failed_download(monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:1/"])
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(
        DataError, match=rf"MNIST could not be loaded: .*refused.*{tmp_path}/root.*torchvision's layout"
    ):
        load_data("mnist", root=str(tmp_path / "root"))


def test_interrupted_download(tmp_path, monkeypatch):
    make_usps(tmp_path, monkeypatch)
    whole = (tmp_path / "usps.t.bz2").read_bytes()
    (tmp_path / "usps.t.bz2").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"USPS could not be loaded: .*interrupted download"):
        load_data("usps", root=str(tmp_path))


def test_stanford_cars_is_not_downloaded(tmp_path):
    pytest.importorskip("scipy.io")
    with pytest.raises(DataError, match="StanfordCars could not be loaded: Dataset not found"):
        load_data("StanfordCars", root=str(tmp_path))


def test_missing_packages(tmp_path, monkeypatch):
    make_caltech101(tmp_path, monkeypatch)
    make_flowers102(tmp_path, monkeypatch)
    for module in ("scipy", "scipy.io", "h5py", "gdown"):
        monkeypatch.setitem(sys.modules, module, None)
    for name, package in (
        ("Flowers102", "scipy"),
        ("StanfordCars", "scipy"),
        ("Caltech101", "scipy"),
        ("PCAM", "h5py"),
    ):
        with pytest.raises(UsageError, match=f"{name}.*pip install {package}"):
            load_data(name, root=str(tmp_path))
    monkeypatch.setitem(sys.modules, "h5py", os)  # any module
    with pytest.raises(UsageError, match=r"PCAM.*pip install gdown"):
        load_data("PCAM", root=str(tmp_path))


# Transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=generator).permute(2, 0, 1)


@pytest.mark.parametrize("interpolation", [InterpolationMode.BILINEAR, InterpolationMode.BICUBIC])
@pytest.mark.parametrize(
    ("height", "width", "size", "resize"), [(75, 100, 56, 64), (33, 20, 24, 24), (9, 9, 24, 28), (40, 40, 32, 20)]
)
def test_evaluation_is_the_preset_on_a_pillow_image_but_for_rounding(height, width, size, resize, interpolation):
    preset = ImageClassification(crop_size=size, resize_size=resize, interpolation=interpolation, mean=MEAN, std=STD)
    image = picture(height, width)
    result = eval_transform(size=size, resize=resize, interpolation=interpolation)(image)
    assert result.dtype == torch.uint8
    assert result.shape == (3, size, size)
    std = torch.tensor(STD).view(3, 1, 1)
    away = (Normalize(MEAN, STD)(result[None])[0] - preset(functional.to_pil_image(image))) * std * 255
    assert away.abs().max() < 1.01
    assert (away.abs() > 0.5).float().mean() < 0.3


@pytest.mark.parametrize(("side", "size"), [(None, (300, 400)), (151, (300, 400)), (150, (150, 200)), (37, (38, 50))])
def test_a_large_jpeg_may_come_smaller(tmp_path, side, size):
    smooth = np.linspace(0, 255, 300 * 400 * 3).reshape(300, 400, 3).astype(np.uint8)
    image = Image.fromarray(smooth)
    image.save(tmp_path / "a.jpg", quality=95)
    found = decode(tmp_path / "a.jpg", side=side)
    assert found.shape == (3, *size)
    shrunk = functional.resize(torch.from_numpy(smooth).permute(2, 0, 1), list(size), antialias=True)
    assert (found.float() - shrunk.float()).abs().mean() < 2
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert decode(tmp_path / "turned.jpg", side=side).shape == (3, *size[::-1])
    image.save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png", side=side).shape == (3, 300, 400)


def test_normalize():
    normalize = Normalize(MEAN, STD)
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    result = normalize(images)
    assert result.dtype == torch.float32
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (MEAN, STD))
    assert torch.allclose(result.double(), (images.double() / 255 - mean) / std, rtol=0, atol=1e-6)
    assert normalize(images.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    assert not normalize.state_dict()
    assert not list(normalize.parameters())


@pytest.mark.parametrize("augment", ["none", "flip", "crop"])
def test_training_transforms(augment):
    options = {"size": 24, "resize": 28, "interpolation": InterpolationMode.BILINEAR}
    transform = pickle.loads(pickle.dumps(train_transform(augment, **options)))
    image = picture(60, 40)

    def draw(seed):
        torch.manual_seed(seed)
        result = transform(image)
        assert result.shape == (3, 24, 24)
        assert result.dtype == torch.uint8
        return result.numpy().tobytes()

    seen = [draw(seed) for seed in range(20)]
    assert seen == [draw(seed) for seed in range(20)]  # torch's generator decides all
    plain = eval_transform(**options)(image)
    if augment == "crop":
        assert len(set(seen)) == 20
    else:
        kinds = {"none": [plain], "flip": [plain, plain.flip(2)]}[augment]
        assert set(seen) == {kind.numpy().tobytes() for kind in kinds}


def test_unknown_augmentation():
    with pytest.raises(UsageError, match="'mixup': expected one of none, flip, crop"):
        train_transform("mixup", size=8, resize=8, interpolation=InterpolationMode.BILINEAR)


def test_printable():
    assert printable(Path("a b/日本")) == "a b/日本"
    assert printable(b"a\nb\xff") == printable("a\nb\udcff") == "a\\nb\\xff"
