"""Images from files as tasks: every pixel once and at its place, whatever holds the images; what is wrong is said by file."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnnp.data.image_files as module
from bnnp.data import read_images
from bnnp.data.collection import Collection, divide
from bnnp.data.images import pixel_grid

Image = pytest.importorskip("PIL.Image")

Array = np.ndarray[Any, Any]
MNIST = next(
    (p / "shared" / "data" / "mnist" for p in Path(__file__).resolve().parents if (p / "shared" / "data" / "mnist").is_dir()), None
)


def pixels(n: int = 5, shape: tuple[int, ...] = (6, 4), seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def idx(values: Array) -> bytes:
    """Write an IDX file by hand."""
    kind = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}[values.dtype.str[1:]]
    head = struct.pack(f">BBBB{values.ndim}I", 0, 0, kind, values.ndim, *values.shape)
    return head + values.astype(values.dtype.newbyteorder(">")).tobytes()


def save(folder: Path, images: Array, names: list[str] | None = None) -> Path:
    """Write each image as a picture without loss."""
    for i, image in enumerate(images):
        path = folder / (f"{i:03}.png" if names is None else names[i])
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def same(a: Collection, b: Collection, atol: float = 0.0) -> None:
    assert list(a.sizes) == list(b.sizes) and len(a) > 0
    for one, other in zip(a, b, strict=True):
        for left, right in zip(one, other, strict=True):
            np.testing.assert_allclose(left, right, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3)])
@pytest.mark.parametrize("lazy", [True, False])
def test_a_task_is_a_loop_over_the_pixels(tmp_path: Path, shape: tuple[int, ...], lazy: bool) -> None:
    images = pixels(shape=shape)
    tasks = read_images(save(tmp_path, images), lazy=lazy)
    assert len(tasks) == 5 and tasks.lazy is lazy and tasks.names[1] == "001.png" and not tasks.ordered and tasks.groups is None
    assert [c.name for c in tasks.inputs] == ["row", "column"]
    assert [c.name for c in tasks.outputs] == (["grey"] if len(shape) == 2 else ["red", "green", "blue"])
    for image, (x, y, mask) in zip(images, tasks, strict=True):
        row = 0
        for i in range(6):
            for j in range(4):
                np.testing.assert_allclose(x[row], [2 * i / 5 - 1, 2 * j / 3 - 1], atol=1e-15)
                np.testing.assert_array_equal(y[row], np.atleast_1d(image[i, j] / 255))
                row += 1
        assert mask.all() and row == len(x)
        np.testing.assert_allclose(x, pixel_grid(6, 4).numpy(), atol=1e-6)


def test_whatever_holds_the_images_they_are_the_same(tmp_path: Path) -> None:
    images = pixels()
    tasks = read_images(images)
    (tmp_path / "a-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "a-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(5))
    np.savez_compressed(tmp_path / "b.npz", images[..., None])
    for name in ("a-idx3-ubyte", "a-idx3-ubyte.gz", "a.npy", "a.npz", "b.npz"):
        for lazy in (None, True):
            same(read_images(tmp_path / name, lazy=lazy), tasks)
    same(read_images(save(tmp_path / "folder", images)), tasks)
    same(read_images(tmp_path / "folder" / "002.png"), tasks.subset([2]))
    same(read_images(images / 255.0), tasks, atol=1e-15)
    same(read_images(images.astype(np.int64)), tasks)
    same(read_images(images.astype(np.uint16) * 257), tasks, atol=1e-15)
    (tmp_path / "b-idx").write_bytes(idx((images / 255).astype(np.float32)))
    same(read_images(tmp_path / "b-idx"), tasks, atol=1e-7)


@pytest.mark.parametrize("ending", ["bmp", "tif", "gif", "webp", "pgm"])
def test_kinds_of_pictures_are_read(tmp_path: Path, ending: str) -> None:
    images = pixels()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.{ending}", **({"lossless": True} if ending == "webp" else {}))
    same(read_images(tmp_path, colour=False), read_images(images), atol=1e-6)


def test_modes_of_pictures_are_read(tmp_path: Path) -> None:
    grey, alpha = pixels(1)[0], np.where(np.arange(24).reshape(6, 4) % 3 == 0, 0, 255).astype(np.uint8)
    colours = pixels(1, (6, 4, 3))[0]
    expected: dict[str, tuple[Array, Array | None]] = {}
    Image.fromarray(np.stack([grey, alpha], 2)).save(tmp_path / "la.png")
    expected["la.png"] = grey / 255, alpha
    Image.fromarray(np.concatenate([colours, alpha[:, :, None]], 2)).save(tmp_path / "rgba.png")
    expected["rgba.png"] = colours / 255, alpha
    Image.fromarray(grey.astype(np.uint16) * 200).save(tmp_path / "deep.png")
    expected["deep.png"] = grey * 200.0 / 65535, None
    Image.fromarray(grey > 99).save(tmp_path / "bit.png")
    expected["bit.png"] = np.where(grey > 99, 1.0, 0.0), None
    Image.fromarray(colours).quantize(24).save(tmp_path / "palette.png")
    expected["palette.png"] = np.asarray(Image.open(tmp_path / "palette.png").convert("RGB")) / 255, None
    Image.fromarray((grey / 255).astype(np.float32)).save(tmp_path / "float.tif")
    expected["float.tif"] = (grey / 255).astype(np.float32), None
    for name, (values, seen) in expected.items():
        ((_, y, mask),) = read_images(tmp_path / name)
        deep = values.reshape(24, -1)
        assert y.shape == deep.shape
        observed = np.ones(24, bool) if seen is None else seen.ravel() > 0
        np.testing.assert_array_equal(mask, np.repeat(observed[:, None], deep.shape[1], 1))
        np.testing.assert_allclose(y[mask], deep[mask], atol=1e-12)
    together = read_images(tmp_path)
    assert together.y_dim == 3 and any("alpha" in note for note in together.notes)
    grey_ones = read_images(tmp_path, colour=False)
    i = list(grey_ones.names).index("rgba.png")
    np.testing.assert_allclose(grey_ones[i][1][alpha.ravel() > 0, 0], (colours / 255 @ [0.299, 0.587, 0.114]).ravel()[alpha.ravel() > 0])


def test_a_camera_held_upright_gives_an_upright_image(tmp_path: Path) -> None:
    image = Image.fromarray(np.kron(pixels(1, (3, 2))[0], np.ones((8, 8), np.uint8)))
    turned = image.transpose(Image.Transpose.ROTATE_90)
    tag = Image.Exif()
    tag[274] = 6
    turned.save(tmp_path / "turned.jpg", exif=tag, quality=100)
    image.save(tmp_path / "upright.jpg", quality=100)
    tasks = read_images(tmp_path)
    assert tasks.recipe["shape"] == [24, 16]
    np.testing.assert_allclose(tasks[0][1], tasks[1][1], atol=0.02)


def test_missing_pixels_of_arrays_are_masked() -> None:
    images = pixels() / 255.0
    images[2, 1, 1] = np.nan
    _, y, mask = read_images(images)[2]
    assert (~mask).sum() == 1 and np.isnan(y[5, 0]) and not mask[5, 0]
    deep = np.concatenate([pixels(2, (6, 4, 3)), np.zeros((2, 6, 4, 1), np.uint8)], 3)
    deep[:, 2, 2, 3] = 255
    assert read_images(deep)[0][2].sum(0).tolist() == [1, 1, 1]


def test_images_of_several_sizes_are_brought_to_one_when_asked(tmp_path: Path) -> None:
    save(tmp_path, pixels(3))
    save(tmp_path / "more", pixels(2, (8, 8)))
    with pytest.raises(ValueError, match=r"Expected images of one size .*6 x 4 \(3\), 8 x 8 \(2\).*size=\(32, 32\)"):
        read_images(tmp_path)
    tasks = read_images(tmp_path, size=(4, 4))
    assert (
        set(tasks.sizes) == {16} and any("proportions" in note for note in tasks.notes) and any("2 sizes" in note for note in tasks.notes)
    )
    assert all(0 <= y.min() <= y.max() <= 1 for _, y, _ in tasks)
    same(read_images(tmp_path, size=(4, 4), lazy=True), tasks)
    flat = np.full((1, 9, 7), 100, np.uint8)
    np.testing.assert_allclose(read_images(flat, size=(3, 5))[0][1], 100 / 255, atol=1e-6)
    blocks = pixels(1, (3, 3))
    np.testing.assert_allclose(
        read_images(np.kron(blocks, np.ones((1, 9, 9), np.uint8)), size=(3, 3))[0][1][4, 0], blocks[0, 1, 1] / 255, atol=0.25
    )
    holes = np.full((1, 8, 8), 0.5)
    holes[0, :4, :4] = np.nan
    _, y, mask = read_images(holes, size=(4, 4))[0]
    assert mask.reshape(4, 4)[2:].all() and not mask[0, 0]
    np.testing.assert_allclose(y[mask], 0.5, atol=1e-6)


def test_noise_fills_the_gap_between_levels(tmp_path: Path) -> None:
    images = pixels(50)
    tasks = read_images(images, dequantise=True, seed=3)
    y = np.concatenate([y for _, y, _ in tasks])[:, 0]
    np.testing.assert_array_equal(np.floor(y * 256), images.ravel())
    u = y * 256 - images.ravel()
    assert 0 <= u.min() < 0.01 and 0.99 < u.max() < 1 and abs(u.mean() - 0.5) < 0.03
    same(read_images(images, recipe=json.loads(json.dumps(tasks.recipe))), tasks)
    same(read_images(save(tmp_path, images), dequantise=True, seed=3, lazy=True), tasks)
    assert (read_images(images, dequantise=True, seed=4)[0][1] != tasks[0][1]).all() and any("seed 3" in note for note in tasks.notes)
    with pytest.raises(ValueError, match="images of whole levels"):
        read_images(images / 255.0, dequantise=True)[0]


def test_classes_are_groups_when_asked(tmp_path: Path) -> None:
    images = pixels(6)
    save(tmp_path / "f", images, ["cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png", "dog/c.png", "emu/a.png"])
    assert read_images(tmp_path / "f").groups is None
    assert read_images(tmp_path / "f", labels="folder").groups == ["cat", "cat", "dog", "dog", "dog", "emu"]
    (tmp_path / "labels.gz").write_bytes(gzip.compress(idx(np.arange(6, dtype=np.uint8) // 2)))
    assert read_images(images, labels=tmp_path / "labels.gz").groups == ["0", "0", "1", "1", "2", "2"]
    np.savez(tmp_path / "a.npz", images=images, kind=np.array(list("ababab")))
    assert read_images(tmp_path / "a.npz", labels="kind").groups == list("ababab")
    tasks = read_images(pixels(40), labels=[i % 20 for i in range(40)])
    parts = divide(tasks, 0.2, 0.2)
    assert {tasks.groups[i] for i in parts.test}.isdisjoint({tasks.groups[i] for i in parts.train})  # type: ignore[index]
    for labels, kind, said in (
        ("folder", ValueError, "a folder for each class"),
        ([1, 2], ValueError, "Expected 6 labels, one for each image. Got 2"),
        ("nowhere", FileNotFoundError, "'nowhere', which is no file"),
    ):
        with pytest.raises(kind, match=re.escape(said)):
            read_images(images, labels=labels)


def test_later_images_are_read_by_the_recipe_written_down(tmp_path: Path) -> None:
    first = read_images(save(tmp_path / "a", pixels(3, (6, 4, 3))), colour=False)
    recipe = json.loads(json.dumps(first.recipe))
    same(read_images(tmp_path / "a", recipe=recipe), first)
    assert recipe == {
        "kind": "images",
        "shape": [6, 4],
        "resized": False,
        "colour": False,
        "channels": ["grey"],
        "dequantise": False,
        "seed": 0,
    }
    large = save(tmp_path / "b", pixels(2, (12, 8)))
    with pytest.raises(ValueError, match=r"images of 6 x 4 pixels, as in the recipe. Got 12 x 8. Give size=\(6, 4\)"):
        read_images(large, recipe=recipe)
    assert read_images(large, recipe=recipe, size=(6, 4)).recipe["shape"] == [6, 4]
    finer = read_images(large, recipe=recipe, size=(12, 8))
    assert finer.recipe["shape"] == [12, 8] and finer[0][0].min() == -1 and finer[0][0].max() == 1
    resized = json.loads(json.dumps(read_images(large, size=(5, 5)).recipe))
    same(read_images(large, recipe=resized), read_images(large, size=(5, 5)))
    assert read_images(tmp_path / "a", recipe=resized).y_dim == 1
    for given, said in (
        ({"recipe": recipe, "colour": True}, "Got colour beside it"),
        ({"recipe": {"kind": "grid"}}, "a recipe for 'grid'"),
    ):
        with pytest.raises(ValueError, match=said):
            read_images(large, **given)


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", pixels()), save(tmp_path / "b", pixels(seed=1))
    shutil.copytree(a, tmp_path / "c")
    marks = [read_images(source).fingerprint for source in (a, tmp_path / "c", b, pixels(), pixels(seed=1))]
    assert marks[0] == marks[1] and len(set(marks)) == 4


def test_large_sources_are_read_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pixels()
    save(tmp_path / "f", images)
    (tmp_path / "i").write_bytes(idx(images))
    np.save(tmp_path / "a.npy", images)
    monkeypatch.setattr(module, "IN_MEMORY", 10)
    for name in ("f", "i", "a.npy"):
        tasks = read_images(tmp_path / name)
        assert tasks.lazy
        same(tasks, read_images(images))
    (tmp_path / "f" / "002.png").write_bytes((tmp_path / "f" / "002.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"Expected a picture in .*002.png"):
        list(read_images(tmp_path / "f"))


def test_large_images_are_advised_to_shrink() -> None:
    assert any("size=(32, 32)" in note for note in read_images(np.zeros((2, 80, 80), np.uint8)).notes)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kept", [0, 3, 7, 15, 16, 40, -1])
def test_an_idx_file_cut_short_is_refused(tmp_path: Path, zipped: bool, kept: int) -> None:
    whole = idx(pixels())
    (tmp_path / "i").write_bytes(gzip.compress(whole[:kept]) if zipped else whole[:kept])
    with pytest.raises(ValueError, match="Expected"):
        read_images(tmp_path / "i")
    zipped_short = gzip.compress(whole)
    (tmp_path / "z.gz").write_bytes(zipped_short[: len(zipped_short) * 2 // 3])
    with pytest.raises(ValueError, match=r"a whole gzip file|bytes of values"):
        read_images(tmp_path / "z.gz")


def test_other_files_are_refused(tmp_path: Path) -> None:
    whole = idx(pixels())
    content = {
        "longer": (whole + b"\0", "Got more"),
        "labels": (idx(np.arange(5, dtype=np.uint8)), r"images, with three or four axes, in .*Is it the other of two files"),
        "axes": (b"\0\0\x08\x07" + whole[4:], "which starts with two zero bytes"),
        "huge": (b"\0\0\x08\x03" + b"\xff" * 12 + bytes(30), "bytes of values"),
        "short": (b"\0\0", "a picture, an IDX file"),
        "none": (idx(pixels(0)), "empty or cut short"),
        "noise": (b"\x07" + np.random.default_rng(0).bytes(500), "a picture, an IDX file"),
        "text.csv": (b"a,b\n1,2\n", "a picture, an IDX file"),
        "notagzip.gz": (b"\x1f\x8b" + bytes(40), "a whole gzip file"),
        "text.gz": (gzip.compress(b"hello, world"), "which starts with two zero bytes"),
        "a.npy": (b"\x93NUMPY" + bytes(30), "Expected numbers in"),
        "b.npz": (b"PK\x03\x04" + bytes(30), "Expected"),
        "p.png": (b"\x89PNG\r\n\x1a\n" + bytes(30), r"Expected a picture in .*p.png"),
    }
    for name, (data, said) in content.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=said):
            read_images(tmp_path / name)
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "two.npz", a=pixels(), b=pixels())
    save(tmp_path / "good", pixels())
    (tmp_path / "good" / "001.png").write_bytes(b"no picture")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    refused: list[tuple[Any, type[Exception], str]] = [
        (tmp_path / "objects.npy", ValueError, "holds Python objects"),
        (tmp_path / "two.npz", ValueError, r"one array of images in .*a \(5, 6, 4\), b"),
        (tmp_path / "good", ValueError, r"a picture in .*001.png. Got.*mend it or take it away"),
        (tmp_path / "empty", ValueError, "Got 0 files"),
        (tmp_path / "texts", ValueError, r"Got 1 files \(.txt\)"),
        (tmp_path / "nowhere", FileNotFoundError, "Got no such file"),
        (3.0, TypeError, "a path or an array"),
        (pixels()[0], ValueError, r"For one image, pass image\[None\]"),
        (pixels(5, (6, 4, 7)), ValueError, "channels 1 to 4"),
        (np.zeros((0, 3, 3)), ValueError, "channels 1 to 4"),
        (np.array([[["a"]]]), ValueError, "images of numbers"),
        (np.full((1, 3, 3), 2.0), ValueError, "from 0 to 1 in images of float64. Got 2 to 2"),
        (np.full((1, 3, 3), -1), ValueError, "from 0 to 255"),
        (np.broadcast_to(np.uint8(0), (1, 5000, 5000)), ValueError, r"at most 16777216 pixels. Got 5000 x 5000. Give size="),
        (np.zeros((3, 1, 5)), ValueError, "at least 2 x 2"),
    ]
    for source, kind, said in refused:
        with pytest.raises(kind, match=said):
            read_images(source)
    for size in ((1, 4), (4,), (4, 4, 4)):
        with pytest.raises(ValueError, match="size as"):
            read_images(pixels(), size=size)  # type: ignore[arg-type]
    (tmp_path / "good" / "001.png").unlink()
    (tmp_path / "good" / "notes.txt").write_text("not a picture")
    assert any("1 files with another ending" in note for note in read_images(tmp_path / "good").notes)


@pytest.mark.skipif(MNIST is None, reason="the MNIST sample is not there")
def test_real_images_are_read_as_they_are() -> None:
    assert MNIST is not None
    images, labels = (next(MNIST.glob(f"*{end}-ubyte.gz")) for end in ("images-idx3", "labels-idx1"))
    raw = np.frombuffer(gzip.decompress(images.read_bytes())[16:], np.uint8)
    tasks = read_images(images, labels=labels)
    assert np.concatenate([y for _, y, _ in tasks[:100]])[:, 0] == pytest.approx(raw[: 100 * tasks.sizes[0]] / 255, abs=0)
    assert sum(tasks.sizes) == len(raw) and set(tasks.groups or ()) == set("0123456789")
    with pytest.raises(ValueError, match="Is it the other of two files"):
        read_images(labels)
