"""One door for all sources: what a file is follows from its content or name, and every reader is behind it."""

from __future__ import annotations

import gzip
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnnp.data import Collection, kind_of, read, read_table

TABLE = "who,t,y\n" + "".join(f"{who},{t},{t + ord(who)}\n" for who in "abc" for t in range(4))


def table(path: Path) -> Path:
    path.write_text(TABLE)
    return path


def parquet(path: Path) -> Path:
    pandas = pytest.importorskip("pandas")
    pandas.read_csv(table(path.with_suffix(".csv"))).to_parquet(path)
    path.with_suffix(".csv").unlink()
    return path


def grid(path: Path) -> Path:
    xarray = pytest.importorskip("xarray")
    ds = xarray.Dataset({"v": (("time", "lat"), np.arange(12.0).reshape(3, 4))}, {"time": [0, 1, 2], "lat": [1.0, 2.0, 3.0, 4.0]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds.to_zarr(path) if path.suffix == ".zarr" else ds.to_netcdf(path)
    return path


def record(path: Path) -> Path:
    wfdb = pytest.importorskip("wfdb")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wave = np.sin(np.arange(500.0) / 9)[:, None]
        wfdb.wrsamp(path.name, fs=100, units=["mV"], sig_name=["II"], p_signal=wave, fmt=["16"], write_dir=str(path.parent))
    return path


def idx(path: Path) -> Path:
    path.write_bytes(gzip.compress(struct.pack(">HBBIII", 0, 8, 3, 3, 5, 5) + bytes(range(75))))
    return path


def pictures(path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    (path / "inside").mkdir(parents=True)
    for i in range(3):
        image.fromarray(np.full((5, 5), 40 * i, np.uint8)).save(path / "inside" / f"{i}.png")
    return path


SOURCES = [
    ("t.csv", table, "table", {"task": "who"}),
    ("t.data", table, "table", {"task": "who"}),
    ("t", table, "table", {"task": "who"}),
    ("t.parquet", parquet, "table", {"task": "who"}),
    ("p.bin", parquet, "table", {"task": "who"}),
    ("g.nc", grid, "grid", {}),
    ("g.zarr", grid, "grid", {}),
    ("g.unknown", grid, "grid", {}),
    ("r", record, "signal", {"window": 1.0}),
    ("r.hea", record, "signal", {"window": 1.0}),
    ("i-images-idx3-ubyte.gz", idx, "images", {}),
    ("folder", pictures, "images", {}),
]


@pytest.mark.parametrize(("name", "make", "kind", "choices"), SOURCES, ids=[name for name, *_ in SOURCES])
def test_a_file_is_read_as_what_it_is(name: str, make: Any, kind: str, choices: dict[str, Any], tmp_path: Path) -> None:
    """By path, as the one file of a folder with a page beside it, and again by its recipe: the same tasks."""
    make(tmp_path / name.removesuffix(".hea"))
    path = tmp_path / name
    if name == "p.bin" or name == "g.unknown":
        assert path.exists(), "told by its first bytes"
    assert kind_of(path) == kind_of(str(path)) == kind
    tasks = read(path, **choices)
    assert tasks.recipe["kind"] == kind and len(tasks) >= 3
    again = read(path, recipe=tasks.recipe)
    assert again.fingerprint == tasks.fingerprint and list(again.names) == list(tasks.names)
    np.testing.assert_array_equal(again[1][0], tasks[1][0])
    np.testing.assert_array_equal(again[1][1], tasks[1][1])
    if kind != "signal" and not path.is_dir():
        (tmp_path / "README.md").write_text("a page")
        (tmp_path / ".hidden").write_text("")
        (tmp_path / "a-labels-idx1-ubyte.gz").write_bytes(b"")
        assert len(read(tmp_path, **choices)) == len(tasks)


def test_objects_in_memory_are_told_apart() -> None:
    pandas, xarray = pytest.importorskip("pandas"), pytest.importorskip("xarray")
    assert kind_of(pandas.DataFrame({"a": [1]})) == "table"
    assert kind_of(xarray.Dataset()) == kind_of(xarray.DataArray([1.0])) == "grid"
    assert kind_of(np.zeros((2, 3, 3))) == "images" and kind_of((np.zeros(5), 10.0)) == "signal"
    ready = Collection.of([(np.zeros((2, 1)), np.ones(2))], ["t"], ["y"])
    assert read(ready) is ready
    with pytest.raises(TypeError, match="Got int"):
        kind_of(3)


def test_patterns_and_lists_of_files(tmp_path: Path) -> None:
    a, b = grid(tmp_path / "a.nc"), grid(tmp_path / "b.nc")
    assert kind_of(str(tmp_path / "*.nc")) == kind_of([a, b]) == "grid"


@pytest.mark.parametrize(
    ("name", "choices", "words"),
    [
        ("gone.csv", {}, "Beside it are: other, t.csv"),
        ("no/gone.csv", {}, "There is no folder"),
        ("other", {}, "Got .*other with a.txt, b.txt"),
        ("t.csv", {"task": "who", "leads": ["II"]}, "Got leads"),
        ("t.csv", {"kind": "tables"}, "Expected kind among table, grid, signal, images"),
    ],
)
def test_what_is_no_source_is_told(name: str, choices: dict[str, Any], words: str, tmp_path: Path) -> None:
    table(tmp_path / "t.csv")
    (tmp_path / "other").mkdir()
    for letter in "ab":
        (tmp_path / "other" / f"{letter}.txt").write_text("")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        read(tmp_path / name, **choices)


def test_choices_that_are_none_were_not_made(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv")
    assert list(read(path, task="who", leads=None, patch=None).names) == list(read_table(path, task="who").names)
