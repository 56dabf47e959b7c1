"""Images from files as tasks: one image is one data set, from the place of a pixel to its grey value or colours.

Folders of pictures, the IDX files of MNIST and its kin, and arrays of numpy are read alike. `bnnp.data.images` holds what is common to
images as tasks, wherever they are from.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bnnp.data.collection import Collection, Column, Triple
from bnnp.data.images import pixel_grid
from bnnp.data.sources import fingerprint, listed

__all__ = ["read_images"]

FloatArray = np.ndarray[Any, np.dtype[np.float64]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]

IN_MEMORY = 200 * 2**20
"""Images that take up to this many bytes, decoded, are read at once."""
MANY = 4096
"""More points than this in a task make learning slow; the reader says so."""
MOST = 2**24
"""Images of more pixels are refused: each pixel is a point."""
ENDINGS = {".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm"}
IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
GREY, COLOURS = ("grey",), ("red", "green", "blue")
LUMA = np.array([0.299, 0.587, 0.114])
"""Grey of a colour, as ITU-R 601 has it."""


@dataclass(frozen=True, eq=False)
class _Source:
    """Hold images of one height and width: how many, their names, and how one is read.

    `get` gives the levels of an image with shape (h, w, channels), NaN where a pixel is transparent or missing, and the largest level.
    """

    names: list[str]
    shape: tuple[int, int]
    coloured: bool
    get: Callable[[int], tuple[Any, float]]
    mark: str
    lazy: bool
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None


def read_images(
    source: Any,
    *,
    size: tuple[int, int] | None = None,
    colour: bool | None = None,
    labels: Any = None,
    dequantise: bool | None = None,
    seed: int | None = None,
    lazy: bool | None = None,
    recipe: Mapping[str, Any] | None = None,
) -> Collection:
    """Read images as a collection of tasks.

    The inputs are the row and the column of a pixel in [-1, 1], as `pixel_grid` gives them; the outputs are its grey value, or red, green
    and blue, in [0, 1]. Transparent pixels, and NaN in arrays, are masked.

    Arguments:
        source: folder of pictures (with the folders inside it), one picture, an IDX file (also gzipped), a .npy or .npz file, or an array
            with shape (n, h, w) or (n, h, w, channels), channels 1 to 4 (grey, grey and alpha, colours, colours and alpha).
        size: height and width to bring all images to; proportions are not kept. Default: theirs, which must be one.
        colour: True for three outputs, False for grey. Default: True where any image has colours.
        labels: "folder", the path of an IDX file of labels, the name of an array in the .npz, or one label for each image. They become the
            groups: `divide` then holds out whole classes where there are ten or more. Default: none.
        dequantise: add noise that fills the gap between two levels, v = (level + u) / levels with u uniform on [0, 1). Values that stand on
            256 levels are no density: without it, a Gaussian model earns as much log-density as it likes. Default: False, v = level / 255.
        seed: of that noise. Default: 0.
        lazy: False reads all at once, True an image when it is asked for. Default: by the size.
        recipe: of a collection read before; these images are read in the same way. Only `size`, `labels` and `lazy` may be given beside it.

    Returns:
        The tasks, named by file or number.

    Raises:
        FileNotFoundError: there is no such file or folder.
        ValueError: a file is damaged or no image, sizes differ, or values are not those of images.
        ImportError: Pillow is needed and not installed.

    Example:
        >>> c = read_images(np.full((3, 8, 8), 255, dtype=np.uint8))
        >>> len(c), c[0][1].max(), c.recipe["shape"]
        (3, np.float64(1.0), [8, 8])
    """
    given = {"colour": colour, "dequantise": dequantise, "seed": seed}
    said = [name for name, value in given.items() if value is not None]
    if recipe is not None and (said or recipe.get("kind") != "images"):
        got = f"{', '.join(said)} beside it" if said else f"a recipe for {recipe.get('kind')!r}"
        raise ValueError(f"Expected the recipe of images, with size, labels and lazy at most. Got {got}.")
    if size is not None and (len(size) != 2 or min(size) < 2):
        raise ValueError(f"Expected size as (height, width) of at least 2 pixels each. Got {size!r}.")
    wanted = size if size is not None or recipe is None or not recipe["resized"] else tuple(recipe["shape"])
    opened = _open(source, wanted, lazy)
    notes = [*opened.notes]
    height, width = wanted or opened.shape
    if height * width > MOST:
        raise ValueError(f"Expected images of at most {MOST} pixels. Got {height} x {width}. Give size=(64, 64) or so to shrink them.")
    if recipe is None:
        coloured = opened.coloured if colour is None else bool(colour)
        made: dict[str, Any] = {
            "kind": "images", "shape": [int(height), int(width)], "resized": size is not None, "colour": coloured,
            "channels": list(COLOURS if coloured else GREY), "dequantise": bool(dequantise), "seed": int(seed or 0),
        }  # fmt: skip
    else:
        made = {**recipe, "shape": [int(height), int(width)]}
        if [height, width] != list(recipe["shape"]) and size is None:
            raise ValueError(
                f"Expected images of {recipe['shape'][0]} x {recipe['shape'][1]} pixels, as in the recipe. Got {height} x {width}. Give "
                f"size={tuple(recipe['shape'])} to bring them to that, or size={(height, width)} to keep theirs on the same square."
            )
    if opened.coloured and not made["colour"]:
        notes.append("Colours are turned to grey (ITU-R 601).")
    if wanted is not None and wanted != opened.shape:
        notes.append(f"All images are brought to {height} x {width} pixels; their proportions are not kept.")
    if made["dequantise"]:
        notes.append(f"Noise fills the gap between two levels (seed {made['seed']}).")
    if height * width > MANY:
        notes.append(f"An image has {height * width} points; size=(32, 32) or so makes learning faster.")
    groups = None if labels is None else _labels(labels, opened, source)
    grid = pixel_grid(int(height), int(width), dtype=torch.float64).numpy()
    grid.setflags(write=False)
    return Collection(
        lambda i: _task(opened, i, grid, made), [len(grid)] * len(opened.names), opened.names, (Column("row"), Column("column")),
        tuple(Column(name) for name in made["channels"]), made, tuple(notes), opened.mark, False, groups, opened.lazy,
    )  # fmt: skip


def _task(source: _Source, index: int, grid: FloatArray, recipe: Mapping[str, Any]) -> Triple:
    levels, top = source.get(index)
    levels = np.asarray(levels, dtype=np.float64)
    height, width = recipe["shape"]
    if levels.shape[:2] != (height, width):
        levels = _resize(levels, height, width)
    if levels.shape[2] == 3 and not recipe["colour"]:
        levels = (levels @ LUMA)[:, :, None]
    if levels.shape[2] == 1 and recipe["colour"]:
        levels = np.repeat(levels, 3, axis=2)
    if not recipe["dequantise"]:
        values = levels / top
    elif top == 1.0 and (levels % 1 > 0).any():
        raise ValueError("Expected images of whole levels, to fill the gaps between them. Got fractions. Leave out dequantise.")
    else:
        noise = np.random.default_rng([recipe["seed"], index]).random(levels.shape)
        values = (np.round(levels) + noise) / (top + 1)
    y = values.reshape(height * width, -1)
    return grid, y, ~np.isnan(y)


def _resize(levels: Any, height: int, width: int) -> FloatArray:
    """Return an image of another size; a pixel that mostly comes from missing ones is missing."""
    pillow = _pillow()

    def channel(values: FloatArray) -> FloatArray:
        image = pillow.fromarray(values.astype(np.float32))
        return np.asarray(image.resize((width, height), pillow.Resampling.BILINEAR), dtype=np.float64)

    seen = ~np.isnan(levels)
    result = np.empty((height, width, levels.shape[2]))
    for j in range(levels.shape[2]):
        weight = channel(seen[:, :, j].astype(np.float64))
        blend = channel(np.where(seen[:, :, j], levels[:, :, j], 0.0))
        result[:, :, j] = np.where(weight > 0.5, blend / np.maximum(weight, 0.5), np.nan)
    return result


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('Reading pictures, and another size, need Pillow. Run: pip install "bnnp[image]".') from error
    return Image


# --- sources


def _open(source: Any, size: tuple[int, ...] | None, lazy: bool | None) -> _Source:
    if not isinstance(source, str | os.PathLike):
        if not hasattr(source, "__array__") and not isinstance(source, list | tuple):
            raise TypeError(f"Expected a path or an array of images. Got {type(source).__name__}.")
        values = np.asarray(source)
        return _array(values, hashlib.sha256(f"{values.shape}{values.dtype}".encode() + values.tobytes()).hexdigest()[:16], False)
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"Expected a folder of pictures, or a file of images, {path}. Got no such file. Check the path.")
    if path.is_dir():
        return _folder(path, size, lazy)
    with path.open("rb") as file:
        head = file.read(8)
    if not head:
        raise ValueError(f"Expected images in {path}. Got an empty file.")
    mark = fingerprint([path])
    if head[:6] == b"\x93NUMPY" or head[:4] == b"PK\x03\x04":
        return _array(_numpy(path, head[:2] == b"PK", lazy), mark, path.stat().st_size > IN_MEMORY)
    if head[:2] == b"\x1f\x8b" or (head[:2] == b"\0\0" and len(head) > 2 and head[2] in IDX_TYPES):
        return _array(_idx(path, lazy), mark, path.stat().st_size > IN_MEMORY and head[:2] == b"\0\0")
    if path.suffix.lower() in ENDINGS:
        return _pictures([path], path.parent, 0, size, lazy)
    raise ValueError(f"Expected a picture, an IDX file, .npy or .npz in {path}. Got a file that starts with {head[:4]!r}. Convert it.")


def _array(values: Any, mark: str, slow: bool) -> _Source:
    """Return the images of an array."""
    if values.ndim == 2:
        raise ValueError(
            f"Expected images with shape (n, h, w) or (n, h, w, channels). Got {values.shape}. For one image, pass image[None]."
        )
    if values.ndim not in (3, 4) or (values.ndim == 4 and values.shape[3] not in (1, 2, 3, 4)) or not values.size:
        raise ValueError(f"Expected images with shape (n, h, w) or (n, h, w, channels), channels 1 to 4. Got shape {values.shape}.")
    kind, notes = values.dtype.kind, []
    if kind not in "uifb":
        raise ValueError(f"Expected images of numbers. Got {values.dtype}.")
    top = {1: 255.0, 2: 65535.0}.get(values.dtype.itemsize, 255.0) if kind == "u" else 255.0 if kind == "i" else 1.0
    if kind in "if" or (kind == "u" and values.dtype.itemsize > 2):
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        if not (low >= 0 and high <= top):
            raise ValueError(
                f"Expected values from 0 to {top:g} in images of {values.dtype}. Got {low:g} to {high:g}. Bring them there first."
            )
        if kind == "i":
            notes.append("Whole numbers are taken as levels from 0 to 255.")
    deep = values[..., None] if values.ndim == 3 else values
    channels = deep.shape[3]

    def get(i: int) -> tuple[Any, float]:
        return _masked(np.asarray(deep[i]), top), top

    if channels in (2, 4):
        notes.append("Pixels with an alpha below one half are missing.")
    names, shape = [str(i) for i in range(len(deep))], (int(deep.shape[1]), int(deep.shape[2]))
    return _Source(names, shape, channels > 2, get, mark, slow, tuple(notes))


def _masked(levels: Any, top: float) -> Any:
    """Return the levels as numbers; a last channel of alpha becomes missing pixels."""
    if levels.shape[2] in (1, 3):
        return levels
    levels = levels.astype(np.float64)
    return np.where(levels[:, :, -1:] < top / 2, np.nan, levels[:, :, :-1])


def _numpy(path: Path, archive: bool, lazy: bool | None, key: str | None = None) -> Any:
    """Read a .npy or .npz file; nothing in it is executed."""
    large = path.stat().st_size > IN_MEMORY if lazy is None else lazy
    try:
        if not archive and large:
            return np.load(path, allow_pickle=False, mmap_mode="r")
        # Opened here, since numpy leaves a damaged file open.
        with path.open("rb") as file:
            if not archive:
                return np.load(file, allow_pickle=False)
            arrays = np.load(file, allow_pickle=False)
            images = [name for name in arrays.files if arrays[name].ndim in (3, 4)] if key is None else [key]
            if len(images) != 1 or images[0] not in arrays.files:
                there = listed([f"{name} {arrays[name].shape}" for name in arrays.files])
                raise LookupError(f"Expected one array of images in {path}. Got {there}. Load it, and pass the array.")
            return arrays[images[0]]
    except LookupError as error:
        raise ValueError(error.args[0] if error.args else str(error)) from None
    except (ValueError, EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"Expected numbers in {path}. Got: {str(error).splitlines()[0]}. It is damaged, or holds Python objects."
        ) from None
    except Exception as error:  # zipfile has errors of its own
        raise ValueError(f"Expected an archive of arrays in {path}. Got: {error}. It is damaged; take another copy.") from None


def _idx(path: Path, lazy: bool | None, labels: bool = False) -> Any:
    """Read an IDX file, gzipped or not: two zero bytes, the type, the number of axes, their lengths, and the values."""
    with path.open("rb") as plain:
        zipped = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        file: Any = gzip.GzipFile(fileobj=plain) if zipped else plain
        try:
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in IDX_TYPES or not 1 <= head[3] <= 4:
                raise ValueError(f"Expected an IDX file {path}, which starts with two zero bytes. Got {head!r}. Take another file.")
            lengths = file.read(4 * head[3])
            shape = tuple(int(n) for n in np.frombuffer(lengths[: len(lengths) // 4 * 4], ">u4"))
            kind = np.dtype(IDX_TYPES[head[2]])
            need = prod(shape) * kind.itemsize
            if len(shape) < head[3] or not need:
                raise ValueError(f"Expected the lengths of {head[3]} axes in {path}. Got {shape}. The file is empty or cut short.")
            if labels != (len(shape) == 1):
                what = ("labels, with one axis,", "images, with three or four axes,")[not labels]
                raise ValueError(f"Expected {what} in {path}. Got shape {shape}. Is it the other of two files?")
            large = path.stat().st_size > IN_MEMORY if lazy is None else lazy
            if not zipped and path.stat().st_size == 4 + 4 * len(shape) + need and large:
                return np.memmap(path, kind, "r", 4 + 4 * len(shape), shape)
            blocks, left = [], need + 1
            while left and (block := file.read(min(left, 2**24))):
                blocks.append(block)
                left -= len(block)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"Expected a whole gzip file {path}. Got: {error}. It is damaged or cut short; take another copy.") from None
    if left != 1:
        got = f"{need + 1 - left}" if left else "more"
        raise ValueError(f"Expected {need} bytes of values of shape {shape} in {path}. Got {got}. It is damaged; take another copy.")
    return np.frombuffer(b"".join(blocks), kind).reshape(shape)


def _folder(path: Path, size: tuple[int, ...] | None, lazy: bool | None) -> _Source:
    files = sorted(p for p in path.rglob("*") if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts))
    pictures = [p for p in files if p.suffix.lower() in ENDINGS]
    if not pictures:
        there = Counter(p.suffix or "no ending" for p in files)
        raise ValueError(
            f"Expected pictures ({', '.join(sorted(ENDINGS))}) in the folder {path}. Got {len(files)} files ({listed(list(there), 6)}). "
            "Name another folder, or one file of it."
        )
    return _pictures(pictures, path, len(files) - len(pictures), size, lazy)


def _pictures(files: Sequence[Path], root: Path, others: int, size: tuple[int, ...] | None, lazy: bool | None) -> _Source:
    """Return pictures in files: their headers are read now, their pixels when they are asked for, or now where they are few."""
    heads = [_decode(path, header=True) for path in files]
    sizes = Counter((h, w) for h, w, _, _, _ in heads)
    if len(sizes) > 1 and size is None:
        several = listed([f"{h} x {w} ({n})" for (h, w), n in sizes.most_common()], 6)
        raise ValueError(f"Expected images of one size (height x width) in {root}. Got {several}. Give size=(32, 32) to bring them to one.")
    coloured = any(bands > 2 for _, _, bands, _, _ in heads)
    total = (len(files) * prod(size) if size is not None else sum(h * w for h, w, _, _, _ in heads)) * (3 if coloured else 1)
    slow = lazy if lazy is not None else 8 * total > IN_MEMORY
    notes = []
    if len(sizes) > 1:
        notes.append(f"Images of {len(sizes)} sizes, from {min(sizes)} to {max(sizes)}, are resized.")
    if any(bands in (2, 4) for _, _, bands, _, _ in heads):
        notes.append("Pixels with an alpha below one half are missing.")
    if frames := sum(n > 1 for _, _, _, n, _ in heads):
        notes.append(f"{frames} files have several pictures; the first of each is taken.")
    if others:
        notes.append(f"{others} files with another ending are left out.")

    def decoded(i: int) -> tuple[Any, float]:
        height, width, _, top, levels = _decode(files[i], header=False)
        levels = _masked(levels, top)
        return (levels if size is None or (height, width) == tuple(size) else _resize(levels, *size)), top

    loaded = None if slow else [decoded(i) for i in range(len(files))]
    get = decoded if loaded is None else loaded.__getitem__
    names = [p.relative_to(root).as_posix() for p in files]
    classes = tuple(p.relative_to(root).parts[0] if len(p.relative_to(root).parts) > 1 else "" for p in files)
    shape = next(iter(sizes)) if len(sizes) == 1 else (0, 0)
    return _Source(names, shape, coloured, get, fingerprint(list(files), root), slow, tuple(notes), classes)


def _decode(path: Path, header: bool) -> tuple[int, int, int, Any, Any]:
    """Return height, width, number of bands, and either the number of pictures and None, or the largest level and the levels."""
    pillow = _pillow()
    from PIL import ImageOps

    with warnings.catch_warnings(action="ignore"):
        try:
            with pillow.open(path) as image:
                swap = image.format in ("JPEG", "TIFF", "WEBP") and image.getexif().get(274, 1) >= 5
                mode = image.mode
                alpha = mode in ("LA", "La", "RGBA", "RGBa", "PA") or "transparency" in image.info
                bands = (1 if mode in ("1", "L", "LA", "La", "F", "I") or mode.startswith("I;16") else 3) + alpha
                if header:
                    width, height = image.size[::-1] if swap else image.size
                    return height, width, bands, getattr(image, "n_frames", 1), None
                upright = ImageOps.exif_transpose(image)
                if mode in ("F", "I") or mode.startswith("I;16"):
                    levels, top = np.asarray(upright), 1.0 if mode == "F" else 65535.0
                else:
                    levels, top = np.asarray(upright.convert(("L", "LA", "RGB", "RGBA")[bands - 1])), 255.0
        except PermissionError:
            raise PermissionError(f"Expected to read {path}. Got no permission. Ask its owner, or copy it.") from None
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises errors of many kinds on a damaged file
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"Expected a picture in {path}. Got: {said}. It is damaged or none; mend it or take it away.") from None
    if top == 1.0 and not (levels.min() >= 0 and levels.max() <= 1):
        raise ValueError(f"Expected values from 0 to 1 in {path}. Got {levels.min():g} to {levels.max():g}. Bring them there first.")
    deep = levels[:, :, None] if levels.ndim == 2 else levels
    return deep.shape[0], deep.shape[1], deep.shape[2], top, deep


def _labels(labels: Any, opened: _Source, source: Any) -> list[str]:
    """Return the label of each image."""
    if isinstance(labels, str) and labels == "folder":
        if opened.classes is None or not any(opened.classes):
            raise ValueError(
                "Expected a folder with a folder for each class. Got none inside. Leave out labels, or give one for each image."
            )
        found: Any = opened.classes
    elif isinstance(labels, str | os.PathLike):
        path = Path(labels)
        if path.is_file():
            found = _idx(path, False, labels=True)
        elif isinstance(source, str | os.PathLike) and Path(source).suffix.lower() == ".npz":
            found = _numpy(Path(source), True, False, key=str(labels))
        else:
            raise FileNotFoundError(f"Expected labels as 'folder', an IDX file, or one for each image. Got {labels!r}, which is no file.")
    else:
        found = labels
    texts = [str(label) for label in (found.tolist() if isinstance(found, np.ndarray) else found)]
    if len(texts) != len(opened.names):
        raise ValueError(f"Expected {len(opened.names)} labels, one for each image. Got {len(texts)}.")
    return texts
