"""The study of streams: its ways do what they say, it resumes, and its small reader of netCDF-4 files reads and refuses."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiments.online import era5, pictures, run
from experiments.online.hdf5 import read_array
from experiments.online.streams import BLOCK, ORDERS, WAYS, follow, in_order, oracle

import bnnp
from bnnp.data.synthetic import Sawtooth

CONFIG = json.loads((Path(run.__file__).parent / "config.json").read_text())
DATA = Path(os.environ.get("BNNP_DATA", "../shared/data"))
SMALL = {"stream": {"context": 5, "points": 30, "particles": 8}, "tasks": {"sawtooth": 2}}


def small_source(seed: int = 0) -> run.Source:
    """Return an untrained network and two short streams."""
    model = bnnp.BNNP(1, 1, hidden=(6, 6), prior="shared", shared_noise=True, activation="sine", seed=seed)
    tasks = Sawtooth().tasks(2, seed=3, num_points=35)
    model.fit_scaling([bnnp.Task(x, y) for x, y in tasks])
    return run.Source(model, [(task.x, task.y) for task in tasks])


@pytest.fixture
def source() -> run.Source:
    """Return a small source."""
    return small_source()


def test_scores_of_a_stream_add_up_to_the_evidence_that_updates_report(source: run.Source) -> None:
    x, y = source.streams[0]
    for key in ("last layer", "reweighted", "resampled"):
        total = sum(follow(source.model, WAYS[key], x, y, 5, 8)["log_prob"])
        posterior = source.model.condition(x[:5], y[:5], num_samples=8)
        for n in range(5, len(x)):
            posterior, _ = WAYS[key].step(posterior, x[n : n + 1], y[n : n + 1], n + 1)
        assert total == pytest.approx(float(posterior.log_evidence), abs=2e-3), key


def test_every_point_is_conditioning_on_all_points(source: run.Source) -> None:
    x, y = source.streams[0]
    found = follow(source.model, WAYS["every point"], x, y, 5, 8)
    by_hand = [
        float(source.model.condition(x[:n], y[:n], num_samples=8).predict(x[n : n + 1]).log_prob(y[n : n + 1])) for n in range(5, 35)
    ]
    assert found["log_prob"] == pytest.approx(by_hand, abs=1e-4)
    assert found["afresh"] == 30 and found["ess"] == pytest.approx([8.0] * 30)


def test_ways_are_what_their_names_say(source: run.Source) -> None:
    x, y = source.streams[0]
    found = {key: follow(source.model, way, x, y, 5, 8) for key, way in WAYS.items()}
    assert found["last layer"]["ess"] == pytest.approx([8.0] * 30)
    assert found["reweighted"]["distinct"] == 8 and found["reweighted"]["afresh"] == 0
    assert min(found["resampled"]["ess"]) >= 4.0 and min(found["when few"]["ess"]) >= 2.0
    assert found["every tenth"]["afresh"] == 3
    # The same points at which it was conditioned afresh, so the same predictions there.
    at = [n - 5 for n in (10, 20, 30)]
    assert [found["every tenth"]["log_prob"][i] for i in at] == pytest.approx([found["every point"]["log_prob"][i] for i in at], abs=1e-4)


def test_order_of_a_stream() -> None:
    x, y = torch.tensor([[1.0, 2.0], [0.0, 5.0], [1.0, 1.0]]), torch.arange(3.0).unsqueeze(-1)
    assert in_order(x, y, "random")[1].flatten().tolist() == [0.0, 1.0, 2.0]
    assert in_order(x, y, "increasing")[1].flatten().tolist() == [1.0, 2.0, 0.0]


def test_oracle_is_the_exact_predictive() -> None:
    process = Sawtooth()
    task = process.tasks(1, seed=2, num_points=12)[0]
    x, y = task.x, task.y
    by_hand = [float(process.log_prob(x[:n], y[:n], x[n : n + 1], y[n : n + 1])) for n in range(4, 12)]
    assert oracle(process, x, y, 4) == pytest.approx(by_hand, abs=1e-8)


def test_study_runs_resumes_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: run.Source) -> None:
    monkeypatch.setattr(run, "load_source", lambda *a: source)
    results = run.run_source("sawtooth", tmp_path, DATA, SMALL, progress=False)
    assert set(results) == set(ORDERS)
    assert results["random"]["ways"]["every tenth"]["gap"] == [0.0, 0.0]
    assert len(results["random"]["ways"]["reweighted"]["curve"]["mean"]) == 30 // BLOCK
    assert results["random"]["ways"]["every point"]["tasks"] == 1
    monkeypatch.setattr(run, "follow", lambda *a: pytest.fail("ran again what was there"))
    assert run.run_source("sawtooth", tmp_path, DATA, SMALL, progress=False) == results
    pictures.study(results, "sawtooth", SMALL["stream"]).savefig(tmp_path / "picture.png")
    assert "exact oracle" in pictures.table(results, "a title")


def test_maps_need_their_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Give the folder that holds it with --data"):
        era5.Maps(tmp_path, CONFIG["era5"])


@pytest.mark.skipif(not (DATA / CONFIG["era5"]["file"]).is_file(), reason="the ERA5 sample is not there; BNNP_DATA names its folder")
def test_maps_are_cut_by_time_and_streams_keep_their_places() -> None:
    maps = era5.Maps(DATA, CONFIG["era5"])
    assert maps.train[-1] + 1 == maps.validation[0] and maps.validation[-1] + 1 == maps.test[0]
    assert 200.0 < float(maps.y.min()) < float(maps.y.max()) < 330.0  # kelvin
    assert len(maps.x.unique(dim=0)) == len(maps.x) == maps.y.shape[1]
    x, y = maps.streams(2, 50, seed=0)[1]
    place = int((maps.x == x[7]).all(-1).nonzero())
    assert float(y[7]) == float(maps.y[maps.test[-1], place])
    assert np.mean(maps.climatology(x, y)) < 0.0


# --- the reader -------------------------------------------------------------------------------------------------------


def message(kind: int, body: bytes) -> bytes:
    """Return a header message."""
    return struct.pack("<BHB", kind, len(body), 0) + body


def header(*messages: bytes) -> bytes:
    """Return a version 2 object header with one block of messages; checksums are not read."""
    body = b"".join(messages)
    return b"OHDR\x02\x01" + struct.pack("<H", len(body)) + body + b"\0" * 4


def hdf5(path: Path, values: Any, chunk: tuple[int, ...]) -> None:
    """Write one array, in shuffled and deflated chunks, as a file with one variable "a"."""
    link = lambda at: header(message(0x06, b"\x01\x00\x01a" + struct.pack("<Q", at)))  # noqa: E731
    root = 48
    array = root + len(link(0))
    size, rank = values.itemsize, values.ndim
    space = b"\x02" + bytes([rank, 0, 1]) + struct.pack(f"<{rank}Q", *values.shape)
    kind = b"\x11\x20\x1f\x00" + struct.pack("<I", size) + bytes(12)
    filters = b"\x02\x02" + struct.pack("<HHHI", 2, 0, 1, size) + struct.pack("<HHHI", 1, 0, 1, 4)
    layout = lambda at: b"\x03\x02" + bytes([rank + 1]) + struct.pack(f"<Q{rank + 1}I", at, *chunk, size)  # noqa: E731
    parts = lambda at: header(message(1, space), message(3, kind), message(0x0B, filters), message(8, layout(at)))  # noqa: E731
    tree = array + len(parts(0))
    corners = [c for c in np.ndindex(*values.shape) if all(i % n == 0 for i, n in zip(c, chunk, strict=True))]
    entry = 8 + 8 * (rank + 1) + 8
    at, keys, stored = tree + 24 + entry * len(corners), b"", b""
    for corner in corners:
        block = np.zeros(chunk, values.dtype)
        part = values[tuple(slice(i, i + n) for i, n in zip(corner, chunk, strict=True))]
        block[tuple(slice(0, n) for n in part.shape)] = part
        raw = zlib.compress(np.frombuffer(block.tobytes(), np.uint8).reshape(-1, size).T.tobytes())
        keys += struct.pack(f"<II{rank + 1}QQ", len(raw), 0, *corner, 0, at + len(stored))
        stored += raw
    start = b"\x89HDF\r\n\x1a\n\x02\x08\x08\x00" + struct.pack("<QQQQ", 0, 2**64 - 1, 0, root) + bytes(4)
    node = b"TREE\x01\x00" + struct.pack("<HQQ", len(corners), 2**64 - 1, 2**64 - 1)
    path.write_bytes(start + link(array) + parts(tree) + node + keys + stored)


def test_reader_puts_chunks_together(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    hdf5(tmp_path / "a.nc", values, (3, 2))
    np.testing.assert_array_equal(read_array(tmp_path / "a.nc", "a"), values)


def test_reader_names_what_it_cannot_read(tmp_path: Path) -> None:
    hdf5(tmp_path / "a.nc", np.zeros((2, 2), np.float32), (2, 2))
    with pytest.raises(ValueError, match=r"Expected a variable .t2m. .* Got a"):
        read_array(tmp_path / "a.nc", "t2m")
    (tmp_path / "b.nc").write_bytes(b"CDF\x01" + bytes(20))
    with pytest.raises(ValueError, match="Expected an HDF5"):
        read_array(tmp_path / "b.nc", "a")
    data = (tmp_path / "a.nc").read_bytes()
    (tmp_path / "c.nc").write_bytes(data.replace(struct.pack("<HHHI", 1, 0, 1, 4), struct.pack("<HHHI", 32015, 0, 1, 4)))
    with pytest.raises(ValueError, match="Got filter 32015"):
        read_array(tmp_path / "c.nc", "a")
