"""Decoding: pixels of every kind of file, and errors that name it."""

import errno
import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import WHITE, encoded, png, rows, words, write
from PIL import ExifTags, Image
from torchvision.transforms import functional

from trainer.data.images import decode, printable, to_rgb
from trainer.data.transforms import InputSpec
from trainer.errors import DataError


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
        transform = InputSpec(8, 9, interpolation="bicubic").train_transform(augment)
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


def test_printable():
    assert printable(Path("a b/日本")) == "a b/日本"
    assert printable(b"a\nb\xff") == printable("a\nb\udcff") == "a\\nb\\xff"
