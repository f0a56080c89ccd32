"""Folders: which images are found, in which order, and what is said of the rest."""

import io
import os
import pickle
import shutil
from collections import Counter

import pytest
import torch
from pictures import encoded, rows, write, write_classes
from PIL import Image, features

from trainer.data import folders
from trainer.data.images import EXTENSIONS, decode
from trainer.data.open import load_data
from trainer.errors import DataError


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
    images = folders._class_folders(str(tmp_path))
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
    images = folders._class_folders(str(tmp_path))
    assert images.labels == [0] * 9 + [1]
    assert all(images[i].shape == (3, 4, 4) for i in range(10))
    assert "ignored 4 files: .txt (2), .heic (1), no extension (1)" in caplog.text
    assert "ignored 1 image outside the class folders, such as loose.png" in caplog.text


@pytest.mark.parametrize("extension", ["jfif", "JPE", "avif"])
def test_rarer_names_of_image_files(tmp_path, extension):
    write_classes(tmp_path, a=1, b=1)
    if extension == "avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    kind = "AVIF" if extension == "avif" else "JPEG"
    (tmp_path / f"a/x.{extension}").write_bytes(encoded(Image.new("RGB", (4, 4), (200, 100, 50)), kind).getvalue())
    images = folders._class_folders(str(tmp_path))
    assert len(images) == 3
    assert (images[1][:, 0, 0].int() - torch.tensor([200, 100, 50])).abs().max() <= 4


@pytest.mark.skipif(".heic" in EXTENSIONS, reason="pillow-heif is here")
def test_heic_is_named_with_the_remedy(tmp_path, caplog):
    write_classes(tmp_path, a=1, b=1)
    (tmp_path / "a/x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert len(folders._class_folders(str(tmp_path))) == 2
    assert "ignored 1 file: .heic (1)" in caplog.text
    assert ".heic can be read with: pip install 'pillow-heif'" in caplog.text
    (tmp_path / "a/x.heic").rename(tmp_path / "a/x.jpg")
    for given in (tmp_path / "a/x.jpg", io.BytesIO((tmp_path / "a/x.jpg").read_bytes())):
        with pytest.raises(DataError, match=r"cannot read .*pip install 'pillow-heif'"):
            decode(given)


def test_what_programs_leave_is_no_data(tmp_path, caplog):
    for below in ("train", "val"):
        write_classes(tmp_path / below, ant=2, bee=2)
    for name in (
        "train/ant/@eaDir/000.jpg/SYNOPHOTO_THUMB_M.jpg",
        "train/__MACOSX/ant/x.png",
        "train/$RECYCLE.BIN/x/x.png",
        "train/lost+found/x.png",
        "train/ant/.thumbnails/x.png",
        "train/ant/._000.png",
        "train/ant/Thumbs.db",
        "test/@eaDir/a/x.png",
        "valid/@eaDir/a/x.png",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        if path.suffix != ".db":
            write(path)
    train, val = load_data(tmp_path)
    assert train.classes == ("ant", "bee")
    assert (len(train), len(val)) == (4, 4)
    assert "ignored 4 folders that a program left, such as $RECYCLE.BIN" in caplog.text
    assert "ignored 1 hidden folder, such as ant/.thumbnails" in caplog.text
    assert "ignored 1 hidden image, such as ant/._000.png" in caplog.text
    shutil.rmtree(tmp_path / "val")  # thumbnails alone are no class folders
    assert load_data(tmp_path)[1].origin == "20 % split off by seed 0"


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
    images = folders._class_folders(str(root))
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
    images = folders._class_folders(str(root))
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
    images = pickle.loads(pickle.dumps(folders._class_folders(str(tmp_path))))
    assert images.classes == ("a", "b\\xff\\n")
    assert len(images) == 12
    for i in range(12):
        assert rows(images[i])[0][0] == [5, 5, 5]
        images.name(i).encode()  # strictly
        assert images.name(i).isprintable()
    assert any(images.name(i).endswith("a/caf\\xe9.png") for i in range(6))
    assert any("naïve 日本" in images.name(i) for i in range(6))


def test_file_removed_after_the_scan(tmp_path):
    images = folders._class_folders(write_classes(tmp_path, a=2, b=2))
    (tmp_path / "b/001.png").unlink()
    with pytest.raises(DataError, match=r"b/001\.png.*No such file"):
        images[3]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no class folders"),
        (["x.png"], "no class folders.*1 image outside"),
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
