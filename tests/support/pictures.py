"""Image files for tests, down to single bytes."""

import io
import struct
import zlib
from pathlib import Path

import torch
from PIL import Image

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
