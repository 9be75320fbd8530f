"""Pictures that a world draws of what a method made: PNG files in the run's folder, written by the standard library alone."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

FOLDER = "pictures"  # below a run's folder


def png(image: Tensor) -> bytes:
    """image (H, W, 3) uint8 -> the bytes of a PNG file."""
    height, width, _ = image.shape
    raw = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), image.cpu().reshape(height, -1)], 1)  # filter 0 before each row

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw.numpy().tobytes(), 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def write(folder: Path, images: dict[str, Tensor]):
    """Write {name: image} as folder/pictures/name.png."""
    for name, image in images.items():
        (folder / FOLDER).mkdir(exist_ok=True)
        (folder / FOLDER / f"{name}.png").write_bytes(png(image))
