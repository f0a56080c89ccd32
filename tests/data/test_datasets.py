"""Data sets by name: the digits, torchvision's, and their downloads."""

import bz2
import functools
import gzip
import http.server
import json
import logging
import os
import pickle
import random
import struct
import sys
import threading
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from pictures import WHITE, rows, write
from PIL import Image

from trainer.data import datasets
from trainer.data.datasets import TORCHVISION, constructor_keywords
from trainer.data.open import load_data
from trainer.errors import DataError, UsageError


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
    path = Path(datasets.__file__).with_name("digits.npz")
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
    sklearn = pytest.importorskip("sklearn.datasets")
    digits = sklearn.load_digits()
    with np.load(Path(datasets.__file__).with_name("digits.npz")) as file:
        assert (file["images"] == digits.images).all()
        assert (file["labels"] == digits.target).all()


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
    images = datasets._open_torchvision("EuroSAT", str(tmp_path), {})
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
    images = datasets.TorchvisionImages("places", Places())
    assert images.labels == [0, 1, 0]
    assert images.classes == ("a", "b")
    assert rows(images[2]) == [[[2, 2, 2]] * 2] * 2
    assert "places: reading all 3 images" in caplog.text
    assert len(list(images)) == 3  # a loop ends
    images.labels.append(0)
    with pytest.raises(DataError, match=r"cannot read places\[3\]: IndexError"):
        images[3]


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
    assert val.origin.startswith("torchvision's test split, on which the best epoch is chosen")
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
