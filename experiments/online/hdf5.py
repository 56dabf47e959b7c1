"""Read one array of numbers from a netCDF-4 file, which is an HDF5 file, with NumPy and zlib alone.

It knows the part of the format that the netCDF library writes today for a few variables: superblock 2 or 3, version 2 object
headers, links stored in the root group's header, contiguous or chunked layout (version 3), compression by deflate with or without
shuffling. What it does not know it names and refuses.

References:
    HDF5 file format specification, version 3.0, The HDF Group.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["read_array"]

Array = np.ndarray[Any, np.dtype[Any]]

SIGNATURE = b"\x89HDF\r\n\x1a\n"
DATASPACE, LINK_INFO, DATATYPE, LINK, LAYOUT, FILTERS, CONTINUATION = 0x01, 0x02, 0x03, 0x06, 0x08, 0x0B, 0x10
DEFLATE, SHUFFLE = 1, 2
UNDEFINED = 2**64 - 1


def read_array(path: str | Path, name: str) -> Array:
    """Return the variable `name` of the root group.

    Arguments:
        path: the file.
        name: of the variable, such as "latitude".

    Returns:
        Its numbers as they are stored: attributes such as a scale are not applied.

    Raises:
        ValueError: not an HDF5 file, no such variable, or a part of the format that is not read here.
    """
    data = Path(path).read_bytes()
    if data[:8] != SIGNATURE:
        raise ValueError(f"Expected an HDF5 (netCDF-4) file at {path}. Got {data[:8]!r} there. Convert it with nccopy -k nc4.")
    if data[8] not in (2, 3) or data[9:11] != b"\x08\x08":
        raise ValueError(f"Expected superblock version 2 or 3 with 8-byte addresses in {path}. Got {data[8]}. Rewrite it with nccopy.")
    links = _links(data, _u64(data, 36))
    if name not in links:
        raise ValueError(f"Expected a variable {name!r} in {path}. Got {', '.join(sorted(links)) or 'links stored elsewhere'}.")
    messages = dict(_messages(data, links[name]))
    missing = [key for key in (DATASPACE, DATATYPE, LAYOUT) if key not in messages]
    if missing:
        raise ValueError(f"Expected {name!r} in {path} to be an array. Got an object without header messages {missing}.")
    return _values(data, _shape(messages[DATASPACE]), _dtype(messages[DATATYPE]), messages[LAYOUT], _filters(messages.get(FILTERS)))


def _u64(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 8], "little")


def _messages(data: bytes, address: int) -> Iterator[tuple[int, bytes]]:
    """Yield type and body of the messages of a version 2 object header, continuations included."""
    if data[address : address + 5] != b"OHDR\x02":
        raise ValueError(f"Expected a version 2 object header. Got {data[address : address + 5]!r}. Rewrite the file with nccopy.")
    flags = data[address + 5]
    at = address + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
    width = 1 << (flags & 3)
    blocks = [(at + width, int.from_bytes(data[at : at + width], "little"))]
    head = 6 if flags & 4 else 4  # with the order of creation, or without
    while blocks:
        at, size = blocks.pop(0)
        end = at + size
        while at + head <= end:
            kind, length = data[at], int.from_bytes(data[at + 1 : at + 3], "little")
            body = data[at + head : at + head + length]
            if kind == CONTINUATION:
                start, size = struct.unpack_from("<QQ", body)
                blocks.append((start + 4, size - 8))  # between its signature and its checksum
            yield kind, body
            at += head + length


def _links(data: bytes, root: int) -> dict[str, int]:
    """Return the addresses of the objects that the root group names."""
    links = {}
    for kind, body in _messages(data, root):
        if kind == LINK_INFO:
            flags = body[1]
            if _u64(body, 2 + (8 if flags & 1 else 0)) != UNDEFINED:
                raise ValueError("Expected at most eight variables in the root group, named in its header. Got more. Split the file.")
        elif kind == LINK:
            flags, at = body[1], 2
            hard = not flags & 0x08 or body[at] == 0
            at += (1 if flags & 0x08 else 0) + (8 if flags & 0x04 else 0) + (1 if flags & 0x10 else 0)
            width = 1 << (flags & 3)
            length = int.from_bytes(body[at : at + width], "little")
            at += width
            if hard:
                links[body[at : at + length].decode("utf-8")] = _u64(body, at + length)
    return links


def _shape(body: bytes) -> tuple[int, ...]:
    rank, start = body[1], 8 if body[0] == 1 else 4
    return struct.unpack_from(f"<{rank}Q", body, start)


def _dtype(body: bytes) -> np.dtype[Any]:
    kind, bits, size = body[0] & 0x0F, body[1], int.from_bytes(body[4:8], "little")
    if kind not in (0, 1) or size not in (1, 2, 4, 8):
        raise ValueError(f"Expected whole or floating-point numbers of 1 to 8 bytes. Got type class {kind} of {size} bytes.")
    letter = "f" if kind == 1 else "i" if bits & 0x08 else "u"
    return np.dtype(f"{'>' if bits & 1 else '<'}{letter}{size}")


def _filters(body: bytes | None) -> list[int]:
    """Return the filters in the order in which they were applied."""
    if body is None:
        return []
    version, count = body[0], body[1]
    if version != 2:
        raise ValueError(f"Expected a filter list of version 2. Got version {version}. Rewrite the file with nccopy.")
    found, at = [], 2
    for _ in range(count):
        (number,) = struct.unpack_from("<H", body, at)
        if number not in (DEFLATE, SHUFFLE):
            raise ValueError(f"Expected chunks compressed by deflate, with or without shuffling. Got filter {number}. Use nccopy -d 4.")
        (values,) = struct.unpack_from("<H", body, at + 4)
        found.append(number)
        at += 6 + 4 * values
    return found


def _values(data: bytes, shape: tuple[int, ...], dtype: np.dtype[Any], layout: bytes, filters: list[int]) -> Array:
    version, kind = layout[0], layout[1]
    if version != 3 or kind not in (1, 2):
        raise ValueError(f"Expected a contiguous or chunked layout, version 3. Got class {kind}, version {version}. Rewrite the file.")
    if kind == 1:
        return np.frombuffer(data, dtype, math.prod(shape), _u64(layout, 2)).reshape(shape).copy()
    rank = layout[2] - 1
    chunk = struct.unpack_from(f"<{rank}I", layout, 11)
    values = np.zeros(shape, dtype)
    for corner, skipped, raw in _chunks(data, _u64(layout, 3), rank):
        for place in reversed(range(len(filters))):
            if not skipped >> place & 1:
                raw = zlib.decompress(raw) if filters[place] == DEFLATE else _unshuffle(raw, dtype.itemsize)
        block = np.frombuffer(raw, dtype).reshape(chunk)
        # Chunks at the border are stored whole and reach beyond the array.
        inside = tuple(slice(a, min(a + c, n)) for a, c, n in zip(corner, chunk, shape, strict=True))
        values[inside] = block[tuple(slice(0, s.stop - s.start) for s in inside)]
    return values


def _unshuffle(raw: bytes, size: int) -> bytes:
    """Put the bytes of each number together again: they are stored first bytes first, then all second bytes, and so on."""
    return np.frombuffer(raw, np.uint8).reshape(size, -1).T.tobytes()


def _chunks(data: bytes, address: int, rank: int) -> Iterator[tuple[tuple[int, ...], int, bytes]]:
    """Yield corner, mask of filters left out, and stored bytes of each chunk of a version 1 B-tree."""
    if address == UNDEFINED:
        return
    if data[address : address + 5] != b"TREE\x01":
        raise ValueError(f"Expected a B-tree of chunks. Got {data[address : address + 5]!r}. The file is damaged.")
    level, (entries,) = data[address + 5], struct.unpack_from("<H", data, address + 6)
    at = address + 24
    for _ in range(entries):
        size, skipped = struct.unpack_from("<II", data, at)
        corner = struct.unpack_from(f"<{rank}Q", data, at + 8)
        at += 8 + 8 * (rank + 1)
        child = _u64(data, at)
        at += 8
        if level:
            yield from _chunks(data, child, rank)
        else:
            yield corner, skipped, data[child : child + size]
