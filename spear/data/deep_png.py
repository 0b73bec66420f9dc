"""PNG pictures of 16 bits in each channel, which Pillow cuts to 8: read here, so that nothing is lost."""

import struct
import zlib

import numpy as np
from jaxtyping import UInt16

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # of the colour types: grey, colours, each with transparency


def read(content: bytes) -> UInt16[np.ndarray, "H W C"]:
    """The picture, transparency left out: one channel, or three. Raises `ValueError` for another kind of file."""
    header, data = b"", []
    place = len(SIGNATURE) if content.startswith(SIGNATURE) else len(content)
    while place + 8 <= len(content):
        size, kind = struct.unpack(">I4s", content[place : place + 8])
        body, place = content[place + 8 : place + 8 + size], place + 12 + size
        header = body if kind == b"IHDR" else header
        data += [body] if kind == b"IDAT" else []
    if len(header) != 13:
        raise ValueError("no PNG")
    width, height, bits, colours, *_, interlaced = struct.unpack(">IIBBBBB", header)
    if bits != 16 or colours not in CHANNELS or interlaced:
        raise ValueError("a PNG of 16 bits in each channel is read if it is not interlaced")
    channels = CHANNELS[colours]
    stride = 2 * channels * width
    raw = zlib.decompressobj().decompress(b"".join(data), height * (stride + 1))
    if len(raw) != height * (stride + 1):
        raise ValueError("truncated")
    rows = _unfiltered(np.frombuffer(raw, np.uint8).reshape(height, stride + 1), 2 * channels)
    values = rows.view(">u2").astype(np.uint16).reshape(height, width, channels)
    return values[..., : 1 if channels < 3 else 3]


def _unfiltered(rows: np.ndarray, pixel: int) -> np.ndarray:
    """The rows without their filters (PNG, 9), each of which predicts a byte from those before and above it."""
    done = np.zeros((len(rows) + 1, rows.shape[1] - 1 + pixel), np.uint8)  # with a pixel and a row of zeros before
    for above, row, filtered in zip(done, done[1:], rows, strict=False):
        kind, body = int(filtered[0]), filtered[1:]
        if kind > 4:
            raise ValueError(f"a row has the filter {kind}, which is none")
        if kind in (0, 2):
            row[pixel:] = body + (above[pixel:] if kind else 0)
            continue
        for k in range(0, len(body), pixel):
            left, up, corner = row[k : k + pixel], above[k + pixel : k + 2 * pixel], above[k : k + pixel]
            row[k + pixel : k + 2 * pixel] = body[k : k + pixel] + _predicted(kind, left, up, corner)
    return np.ascontiguousarray(done[1:, pixel:])


def _predicted(kind: int, left: np.ndarray, up: np.ndarray, corner: np.ndarray) -> np.ndarray:
    if kind == 1:
        return left
    a, b, c = (x.astype(np.int32) for x in (left, up, corner))
    if kind == 3:
        return ((a + b) // 2).astype(np.uint8)
    near = np.abs(np.stack([b - c, a - c, a + b - 2 * c]))  # Paeth: the nearest to a + b - c, in this order
    return np.where((near[0] <= near[1]) & (near[0] <= near[2]), left, np.where(near[1] <= near[2], up, corner))
