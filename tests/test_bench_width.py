"""The benchmark of wide networks: its limits, its ladders, its table and its memory of earlier runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from benchmarks import width as bench
from benchmarks.width import OWN, SHARED, TWIN, Ladder, Limits, Result

import bnnp

LIMITS = Limits(2.0**33, 90.0)
SHARED_ROW = Ladder("shared", SHARED, "float64")


def _fake(calls: list[tuple[Ladder, int]], last: int) -> Callable[[Ladder, int, int, Limits], Result]:
    """Return a stand-in for `measure`: a millisecond for each unit, twice that on the clock, and no memory beyond the width `last`."""

    def measure(ladder: Ladder, width: int, threads: int, limits: Limits) -> Result:
        calls.append((ladder, width))
        if width > last:
            return Result("memory")
        return Result("done", 2e-3 * width, 1e-3 * width, 2.0**30, 10 * width, (1.0,))

    return measure


@pytest.mark.parametrize("prior", list(bench.variants()))
@pytest.mark.parametrize("noise", [OWN, SHARED])
def test_a_step_moves_the_parameters_of_every_prior(prior: str, noise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bnnp.BNNP] = []
    build = bnnp.BNNP

    def kept(*args: object, **options: object) -> bnnp.BNNP:
        made.append(build(*args, **options))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(bnnp, "BNNP", kept)
    step, parameters = bench.our_step(Ladder(prior, noise, "float64"), 3)
    before = [p.detach().clone() for p in made[0].prior.means()]
    assert parameters == sum(p.numel() for p in made[0].parameters())
    assert [layer.d_out for layer in made[0].prior] == [3, 3, 1]
    assert bool(step().isfinite())
    assert not any(torch.equal(a, b) for a, b in zip(before, made[0].prior.means(), strict=True))


def test_the_twin_takes_the_same_step() -> None:
    step, parameters = bench.twin_step(3)
    first = step()
    assert bool(first.isfinite()) and not torch.equal(first, step())
    p, d = (2, 4, 4), (3, 3, 1)
    prior = sum(u * (2 * k + k * k) for u, k in zip(d, p, strict=True))
    nets = sum(3 * 64 + 65 * 64 + 65 * out for out in (6, 6, 1))
    assert parameters == prior + nets + 1  # the noise


def test_a_row_ends_at_the_first_width_that_fails_and_what_is_known_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Ladder, int]] = []
    monkeypatch.setattr(bench, "measure", _fake(calls, last=512))
    file = tmp_path / "new" / "found.jsonl"
    options = ["--priors", "shared", "--noise", "shared", "--widths", "4096", "16", "512", "1024", "--no-twin", "--json", str(file)]
    bench.main(options)
    first = capsys.readouterr().out
    assert calls == [(Ladder("shared", SHARED, "float64"), w) for w in (16, 512, 1024)] + [
        (Ladder("shared", SHARED, "float32"), w) for w in (512, 1024)
    ]
    assert "| `shared` | one noise a point | float64 | 0.032 s, 1.0 | 1 s, 1.0 | > 8 GiB |" in first
    assert "width 512 under 1 s: no (1 s in float64)" in first
    assert "4,096" not in first  # nothing was tried there
    assert [json.loads(line)["status"] for line in file.read_text().splitlines()] == ["done", "done", "memory", "done", "memory"]
    bench.main([*options, "--resume", "--cpu"])
    again = capsys.readouterr().out
    assert len(calls) == 5
    assert "| 0.016 s, 1.0 | 0.51 s, 1.0 | > 8 GiB |" in again
    assert "width 512 under 1 s: yes (0.51 s in float64)" in again
    bench.main([*options, "--resume", "--limit", "7"])
    assert len(calls) == 10  # results under other limits do not stand


def test_quick_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Ladder, int]] = []
    monkeypatch.setattr(bench, "measure", _fake(calls, last=10**6))
    bench.main(["--quick", "--priors", "diagonal"])
    assert max(width for _, width in calls) == 128
    assert {ladder.prior for ladder, _ in calls} == {"diagonal", TWIN}


def test_what_is_no_file_of_results_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text('{"prior": "shared"}\n')
    with pytest.raises(ValueError, match=r"Got KeyError.* in line 1"):
        bench.load(file, {})
    header = {"threads": 1}
    file.write_text(bench.line_of(header, SHARED_ROW, 16, Result("over")))
    assert math.isnan(bench.load(file, header)[SHARED_ROW, 16].seconds)
    assert bench.load(file, {"threads": 2}) == {}
    with pytest.raises(SystemExit):
        bench.main(["--resume"])
    with pytest.raises(SystemExit, match="Got nonsense"):
        bench.main(["--priors", "nonsense"])


def test_table_says_why_there_is_no_number() -> None:
    results = {
        (SHARED_ROW, 4096): Result("over"),
        (Ladder(TWIN, OWN, "float64"), 4096): Result("failed", note="process ended with code -9"),
    }
    lines = bench.format_table(results, LIMITS, "seconds").splitlines()
    assert "> 90 s" in lines[2]
    assert "failed" in lines[3] and "code -9" in lines[-1]
    assert (
        bench.format_goals(results, "seconds").splitlines()[-1] == "`shared`, one noise a point, width 4,096 under 20 s: no (not reached)"
    )


def test_cell_runs_in_a_process_of_its_own() -> None:
    ballast = torch.ones(2**27, dtype=torch.float64)  # 1 GiB of the parent, which must not count
    result = bench.measure(Ladder(TWIN, OWN, "float64"), 2, 1, LIMITS)
    assert result.status == "done", result.note
    assert 0 < result.cpu and 0 < result.seconds
    assert len(result.runs) > bench.REPEATS
    assert 0 < result.peak < ballast.nbytes


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="address space is limited on Linux only")
def test_cell_that_needs_too_much_memory_is_told_apart() -> None:
    result = bench.measure(Ladder(TWIN, OWN, "float64"), 64, 1, Limits(3e7, 60.0))
    assert result.status == "memory", result.note


@pytest.mark.slow
def test_cell_is_stopped_in_time() -> None:
    assert bench.measure(Ladder(TWIN, OWN, "float64"), 64, 1, Limits(2.0**33, 1.0)).status == "over"
