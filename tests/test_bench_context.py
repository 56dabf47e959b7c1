"""The benchmark of large contexts: its data, its guard, its table and its memory of earlier runs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import context as bench
from benchmarks.context import Cell, Result, Settings

SETTINGS = Settings(batch=7, threads=1)
GIB = 2.0**30


def _fake(calls: list[Cell], status: str = "done") -> Callable[[Cell, Settings, float], Result]:
    """Return a stand-in for `measure`: a full pass takes 10 MB a point, batches 100 MB, all of them 1 ms a point."""

    def measure(cell: Cell, settings: Settings, limit: float) -> Result:
        calls.append(cell)
        peak = 1e7 * cell.size if cell.how == "full" else 1e8
        seconds = 1e-3 * cell.size if status == "done" else math.nan
        return Result(status, seconds, peak, 2e8, limit)

    return measure


def test_every_source_holds_the_same_points(tmp_path: Path) -> None:
    x, y = bench.points(0, 20)
    assert x.shape == y.shape == (20, 1)
    parts = list(bench.batches(20, 7))
    assert [len(part[0]) for part in parts] == [7, 7, 6]
    for whole, side in ((x, 0), (y, 1)):
        np.testing.assert_array_equal(np.concatenate([part[side] for part in parts]), whole)
    bench.write_points(tmp_path / "points", 20, 7)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "points").reshape(20, 2), np.concatenate([x, y], axis=1))
    assert np.abs(x).max() <= 2.0
    assert len(np.unique(x)) == 20


def test_cells_come_with_small_sizes_first_and_files_only_at_the_largest() -> None:
    cells = bench.cells_of([1000, 100], ["per_unit", "shared"], ["condition", "step"], twin="lean")
    assert len(cells) == len(set(cells)) == 2 * (2 * 2 * 2 + 2) + 2 * 2
    assert [c.size for c in cells] == sorted(c.size for c in cells)
    assert {(c.what, c.size) for c in cells if c.how in ("file", "generator")} == {("condition", 1000)}
    assert not [c for c in bench.cells_of([100], ["shared"], ["step"], twin=None) if c.how == "twin"]


def test_guard_draws_the_line_through_what_was_measured() -> None:
    cell = Cell("condition", "shared", "full", 1000)
    fallback = bench.needed_bytes(cell, {})
    assert fallback == 1000 * bench.BYTES_PER_POINT["condition"]["shared"]
    known = {dataclasses.replace(cell, size=n): Result("done", 1.0, 50.0 + 3.0 * n, 0.0) for n in (10, 100)}
    assert bench.needed_bytes(cell, known) == pytest.approx(3050.0)
    others = {dataclasses.replace(c, prior="per_unit"): r for c, r in known.items()}
    assert bench.needed_bytes(cell, others) == fallback
    assert bench.needed_bytes(dataclasses.replace(cell, how="batched"), known) == 0.0


def test_guard_of_the_twin_grows_with_the_square() -> None:
    for what in ("condition", "step"):
        small, large = (bench.needed_bytes(Cell(what, "published", "twin", n), {}) for n in (10**4, 10**5))
        assert small > 500 * GIB
        assert 90.0 < large / small < 100.0


def test_run_measures_what_fits_and_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Cell] = []
    monkeypatch.setattr(bench, "measure", _fake(calls))
    monkeypatch.setattr(bench, "_available_memory", lambda: 16 * GIB)
    file = tmp_path / "new" / "found.json"
    options = ["--sizes", "1e3", "1e4", "1e5", "--what", "condition", "--priors", "shared", "--json", str(file)]
    bench.main(options)
    first = capsys.readouterr().out
    assert Cell("condition", "shared", "full", 1000) in calls
    assert Cell("condition", "shared", "full", 10**5) not in calls  # would need 1,000 GB
    assert "not run:" in first
    assert "needs about 931 GiB" in first
    assert "condition shared 1.00" in first
    assert "condition shared from a file" in first
    stored = json.loads(file.read_text())
    assert stored["summary"]["slope"]["condition shared"] == pytest.approx(1.0)
    measured = len(calls)
    bench.main([*options, "--resume"])
    again = capsys.readouterr().out
    assert len(calls) == measured
    assert again.split("\n\n", 1)[1] == first.split("\n\n", 1)[1]
    bench.main([*options, "--resume", "--what", "condition", "step", "--twin", "published"])
    assert {c.what for c in calls[measured:]} == {"step"}


def test_a_cell_over_its_time_is_run_again_only_with_more_of_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Cell] = []
    monkeypatch.setattr(bench, "measure", _fake(calls, "over"))
    options = ["--sizes", "10", "--what", "step", "--priors", "shared", "--twin", "none", "--json", str(tmp_path / "f.json"), "--resume"]
    for limit, expected in (("5", 2), ("5", 2), ("4", 2), ("6", 4)):
        bench.main([*options, "--limit", limit])
        assert len(calls) == expected


def test_other_settings_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    bench.save(file, SETTINGS, {Cell("step", "shared", "full", 10): Result("failed", note="it broke")})
    assert bench.load(file, SETTINGS)[Cell("step", "shared", "full", 10)].note == "it broke"
    with pytest.raises(ValueError, match=r"settings of this run. Got \{'batch': 7\}"):
        bench.load(file, dataclasses.replace(SETTINGS, batch=8))
    file.write_text("[]")
    with pytest.raises(ValueError, match="as an earlier run wrote it"):
        bench.load(file, SETTINGS)
    with pytest.raises(SystemExit):
        bench.main(["--resume"])


def test_table_says_what_is_missing() -> None:
    results = {
        Cell("step", "shared", "full", 10): Result("not run", needs=50 * GIB),
        Cell("step", "shared", "batched", 10): Result("over", peak=3 * 2.0**20, base=2.0**20, limit=900.0),
        Cell("step", "published", "twin", 10): Result("failed", note="process ended with code -9"),
    }
    line = bench.format_table(results).splitlines()[1]
    for words in ("not run:", "needs about 50 GiB", "over 900", ">= 3", ">= 4", "failed:", "process ended with code -9"):
        assert words in line
    assert bench.summarise(results) == {"memory": {}, "memory_of_many": {}, "slope": {}}


def test_summary_compares_the_largest_size_with_smaller_ones() -> None:
    peaks = {100: 1.0, 1000: 10.0, 10**4: 16.0, 10**5: 20.0}
    results = {Cell("step", "shared", "batched", n): Result("done", 2.0 * n**1.5, peak, 0.0) for n, peak in peaks.items()}
    results[Cell("step", "shared", "file", 10**5)] = Result("done", 1.0, 24.0, 0.0)
    found = bench.summarise(results)
    assert found["memory"] == {"step shared": 2.0, "step shared from a file": 2.4}
    assert found["memory_of_many"] == {"step shared": 1.25, "step shared from a file": 1.5}
    assert found["slope"] == {"step shared": pytest.approx(1.5)}
    assert "step shared 2.00 (1.25); step shared from a file 2.40 (1.50)" in bench.format_summary(results)


def test_cell_runs_in_a_process_of_its_own() -> None:
    ballast = torch.ones(2**26, dtype=torch.float64)  # 512 MiB of the parent, which must not count
    settings = dataclasses.replace(SETTINGS, steady=bench._allocator() is not None)
    result = bench.measure(Cell("condition", "published", "twin", 10), settings, 100.0)
    assert result.status == "done"
    assert result.seconds > 0
    assert 0 < result.peak < ballast.nbytes
    assert result.base > 0


@pytest.mark.slow
def test_cell_is_stopped_in_time() -> None:
    result = bench.measure(Cell("condition", "published", "twin", 300), SETTINGS, 0.0)
    assert result.status == "over"
    assert math.isnan(result.seconds)
    assert result.base > 0


@pytest.mark.parametrize("prior", ["per_unit", "shared"])
def test_all_ways_to_read_the_context_give_the_same_posterior(prior: str, tmp_path: Path) -> None:
    path = tmp_path / "points"
    bench.write_points(path, 200, 70)
    means = []
    for how in ("full", "batched", "file", "generator"):
        posterior: Any = bench.our_work(Cell("condition", prior, how, 200), 70, path)()
        means.append(posterior.predict([[-1.0], [0.5]]).mean)
    for mean in means[1:]:
        torch.testing.assert_close(mean, means[0], rtol=1e-8, atol=1e-8)


def test_step_of_ours_runs_in_batches() -> None:
    for how in ("full", "batched"):
        loss = bench.our_work(Cell("step", "shared", how, 150), 70, Path())()
        assert isinstance(loss, torch.Tensor)
        assert bool(loss.isfinite())
