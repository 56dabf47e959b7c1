"""Signals as tasks: every sample once and at its time, as wfdb gives it; what is wrong with a record is said in one sentence."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnnp.data import read_signals
from bnnp.data.collection import Collection, divide
from bnnp.data.records import open_records

# wfdb uses what pandas deprecates.
with warnings.catch_warnings(action="ignore"):
    wfdb = pytest.importorskip("wfdb")
signal = pytest.importorskip("scipy.signal")

Array = np.ndarray[Any, Any]
ECG = next((p / "shared" / "data" / "ecg" for p in Path(__file__).resolve().parents if (p / "shared" / "data" / "ecg").is_dir()), None)
RATE, SECONDS = 100.0, 21.3


def wave(seed: int = 0, leads: int = 2, rate: float = RATE, seconds: float = SECONDS) -> Array:
    """Return smooth signals in mV."""
    t = np.arange(round(seconds * rate)) / rate
    rng = np.random.default_rng(seed)
    return np.stack([sum(rng.normal() * np.sin(2 * np.pi * f * t + 6 * rng.random()) for f in (0.5, 1.2, 3.1)) for _ in range(leads)], 1)


def write(folder: Path, name: str = "rec", samples: Array | None = None, **given: Any) -> Path:
    """Write a record; gaps are NaN."""
    values = wave() if samples is None else samples
    said = {"fs": RATE, "units": ["mV"] * values.shape[1], "sig_name": ["II", "V5"][: values.shape[1]], "fmt": ["16"] * values.shape[1]}
    with warnings.catch_warnings(action="ignore"):
        wfdb.wrsamp(name, p_signal=values, write_dir=str(folder), **{**said, **given})
    return folder / name


def annotate(path: Path, samples: list[int], symbols: list[str], extension: str = "atr") -> None:
    with warnings.catch_warnings(action="ignore"):
        wfdb.wrann(path.name, extension, np.array(samples), symbols, fs=RATE, write_dir=str(path.parent))


def stored(path: Path) -> Array:
    """Return the samples as wfdb reads them, after their rounding to whole levels."""
    with warnings.catch_warnings(action="ignore"):
        return np.asarray(wfdb.rdrecord(str(path)).p_signal)


def same(a: Collection, b: Collection, atol: float = 0.0) -> None:
    assert list(a.names) == list(b.names) and list(a.sizes) == list(b.sizes)
    for one, other in zip(a, b, strict=True):
        for left, right in zip(one, other, strict=True):
            np.testing.assert_allclose(left, right, rtol=0, atol=atol)


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize(("window", "stride"), [(2.0, None), (2.0, 0.5), (1.55, 0.7), (3.0, 5.0)])
def test_windows_are_stretches_of_the_record(tmp_path: Path, window: float, stride: float | None, lazy: bool) -> None:
    path = write(tmp_path)
    whole = stored(path)
    tasks = read_signals(path, leads=["V5", "II"], window=window, stride=stride, lazy=lazy)
    n, index, begin = round(window * RATE), 0, 0
    while begin + n <= len(whole):
        x, y, mask = tasks[index]
        np.testing.assert_allclose(x[:, 0], np.arange(n) / RATE + begin / RATE - begin / RATE, atol=1e-9)
        np.testing.assert_array_equal(y, whole[begin : begin + n, ::-1])
        assert mask.all() and tasks.names[index].startswith("rec ") and float(tasks.names[index].split()[1]) == pytest.approx(begin / RATE)
        index += 1
        begin = round(index * (stride or window) * RATE)
    assert len(tasks) == index and tasks.lazy is lazy and tasks.ordered and set(tasks.groups or ()) == {"rec"}
    starts = np.round(np.arange(len(tasks)) * (stride or window) * RATE)
    assert tasks.overlap == sum(starts[1:] < starts[0] + n)
    assert [str(c) for c in (*tasks.inputs, *tasks.outputs)] == ["time [s]", "V5 [mV]", "II [mV]"]


def test_a_record_is_found_by_any_of_its_names(tmp_path: Path) -> None:
    path = write(tmp_path)
    tasks = read_signals(path)
    for source in (str(path), f"{path}.hea", Path(f"{path}.dat"), tmp_path, tmp_path / "r*", [path], f"{tmp_path}/*.hea"):
        same(read_signals(source), tasks)
        assert read_signals(source).fingerprint == tasks.fingerprint
    array = read_signals({"rec": (stored(path)[:, :1], RATE)})
    same(array, tasks)
    assert [c.name for c in array.outputs] == ["signal"] and [c.name for c in tasks.outputs] == ["II"]
    assert any("The output is II" in note for note in tasks.notes)


def test_several_records_are_groups_in_one_unit(tmp_path: Path) -> None:
    a = write(tmp_path, "a")
    b = write(tmp_path, "b", 1e3 * wave(1), units=["uV", "uV"], sig_name=["ii", "X"])
    tasks = read_signals(tmp_path, window=5.0)
    assert tasks.groups is not None and list(tasks.groups) == ["a"] * 4 + ["b"] * 4 and tasks.names[5] == "b 5 s"
    np.testing.assert_allclose(np.concatenate([y for _, y, _ in tasks[4:]])[:, 0], stored(b)[:2000, 0] / 1e3, rtol=1e-12)
    assert any("converted from uV to mV" in note for note in tasks.notes)
    assert len(divide(tasks, 0.25, 0.25).train) == 4
    with pytest.raises(ValueError, match=r"Expected the lead V5 in record b. Got ii, X.*V5\|ii"):
        read_signals(tmp_path, leads="V5")
    other = read_signals([a, b], leads="V5|X")
    assert [c.name for c in other.outputs] == ["V5"] and any("V5 is X in b" in note for note in other.notes)
    write(tmp_path, "c", sig_name=["Y", "Z"])
    with pytest.raises(ValueError, match=r"a lead that all records have. Got a \(II, V5\), b \(ii, X\), c \(Y, Z\).*leads='II\|ii\|Y'"):
        read_signals(tmp_path)


@pytest.mark.parametrize("rate", [50.0, 125.0, 33.0, 100.0])
@pytest.mark.parametrize("part", [{}, {"start": 3.21, "stop": -4.0}])
def test_another_rate_is_that_of_the_whole_record(tmp_path: Path, rate: float, part: dict[str, float]) -> None:
    path = write(tmp_path)
    lazy, loaded = (read_signals(path, rate=rate, window=2.0, stride=1.0, lazy=how, **part) for how in (True, False))
    same(lazy, loaded, atol=1e-12)
    # The waves are far slower than either rate, so they are hardly changed, but near the ends.
    exact = wave()[:, 0]
    for (x, y, _), name in zip(loaded, loaded.names, strict=True):
        t = float(name.split()[1]) + x[:, 0]
        inside = (t > 0.5) & (t < SECONDS - 0.5)
        # A name gives the time to 3 decimals.
        np.testing.assert_allclose(y[inside, 0], np.interp(t, np.arange(len(exact)) / RATE, exact)[inside], atol=0.03)
        np.testing.assert_allclose(np.diff(x[:, 0]), 1 / rate, rtol=1e-9)
    up, down = {50.0: (1, 2), 125.0: (5, 4), 33.0: (33, 100), 100.0: (1, 1)}[rate]
    if not part:
        twin = signal.resample_poly(np.pad(stored(path)[:, 0], 200 * down, mode="edge"), up, down)[200 * up :]
        np.testing.assert_allclose(
            np.concatenate([y[: round(rate)] for _, y, _ in loaded])[:, 0], twin[: len(loaded) * round(rate)], atol=1e-9
        )


def test_a_wave_too_fast_for_the_rate_is_taken_out() -> None:
    t = np.arange(3000) / 300.0
    y = np.concatenate([y for _, y, _ in read_signals((np.sin(2 * np.pi * 90 * t), 300.0), rate=100.0)])
    assert np.abs(y[50:-50]).max() < 0.01


def test_gaps_are_masked(tmp_path: Path) -> None:
    samples = wave()
    samples[230:260, 0] = np.nan
    samples[400:600] = np.nan
    path = write(tmp_path, samples=samples)
    tasks = read_signals(path, leads=["II", "V5"])
    assert len(tasks) == 9 and "rec 4 s" not in tasks.names, "a window without a sample is left out"
    for x, y, mask in tasks:
        np.testing.assert_array_equal(mask, ~np.isnan(y))
        assert np.isfinite(x).all()
    _, y, mask = tasks[1]
    assert np.flatnonzero(~mask[:, 0]).tolist() == list(range(30, 60)) and mask[:, 1].all()
    assert any("2 of 10 tasks have gaps" in note for note in tasks.notes) and any("1 of 10 tasks have no sample" in n for n in tasks.notes)
    half = read_signals(path, leads=["II", "V5"], rate=50.0)
    _, z, seen = half[1]
    assert np.flatnonzero(~seen[:, 0]).tolist() == list(range(15, 30))
    np.testing.assert_allclose(z[seen[:, 1], 1], y[::2, 1][seen[:, 1]], atol=0.1)
    same(half, read_signals(path, leads=["II", "V5"], rate=50.0, lazy=True).subset([0, 1, 3, 4, 5, 6, 7, 8, 9]), atol=0.1)


def test_flat_lines_are_counted_and_kept(tmp_path: Path) -> None:
    samples = wave()
    samples[400:800, 0] = 0.25
    for given in ({}, {"rate": 50.0, "window": 1.0}):
        tasks = read_signals(write(tmp_path, samples=samples), **given)
        assert any(re.match(r"[234] of \d+ tasks have a lead that does not change", note) for note in tasks.notes)


def test_a_part_of_a_record(tmp_path: Path) -> None:
    path = write(tmp_path)
    for given, first, last in (({"start": 5.0}, 5.0, SECONDS), ({"stop": 6.0}, 0.0, 6.0), ({"start": -8.0}, SECONDS - 8, SECONDS)):
        part = read_signals(path, window=1.0, **given)
        times = [float(name.split()[1]) for name in part.names]
        assert first <= times[0] < first + 0.011 and last - 2 < times[-1] <= last - 1 + 1e-6
    whole = read_signals(path, window=1.0)
    recipe = json.loads(json.dumps(read_signals(path, window=1.0, stop=6.0).recipe))
    assert len(read_signals(path, recipe=recipe)) == 6 and len(read_signals(path, recipe=recipe, stop=float("inf"))) == len(whole)
    with pytest.raises(ValueError, match="start before stop inside rec"):
        read_signals(path, start=50.0)


@pytest.mark.parametrize("rate", [None, 50.0, 60.0])
def test_beats_are_counted_from_their_peak(tmp_path: Path, rate: float | None) -> None:
    path = write(tmp_path)
    annotate(path, [5, 301, 433, 500, 640, 2125], ["N", "N", "V", "+", "A", "N"])
    tasks = read_signals(path, beats=("atr", 0.2, 0.5), rate=rate, centre=True)
    assert tasks.names == ["rec 3.01 s N", "rec 4.33 s V", "rec 6.4 s A"] and tasks.ordered
    whole, own = stored(path)[:, 0], rate or RATE
    for (x, y, _), peak in zip(tasks, (301, 433, 640), strict=True):
        assert -0.2 - 1e-9 <= x[0, 0] < -0.2 + 1 / own and 0.5 - 2.01 / own < x[-1, 0] < 0.5 and np.median(y) == pytest.approx(0, abs=1e-12)
        at = np.interp(peak / RATE + x[:, 0], np.arange(len(whole)) / RATE, whole)
        np.testing.assert_allclose(y[:, 0], at - np.median(at), atol=0.02 if rate else 1e-9)
    assert read_signals(path, task="beat").names == read_signals(path, task=["beat"]).names  # type: ignore[arg-type]  # as the command says it
    assert any("mark no beat are skipped: 1" in note for note in tasks.notes) and any(
        "edge are left out: 2" in note for note in tasks.notes
    )
    same(read_signals(path, recipe=json.loads(json.dumps(tasks.recipe))), tasks)
    with pytest.raises(
        FileNotFoundError, match=r"annotations of beats in .*rec.qrs. Got no such file. Files of this record: rec.atr, rec.dat"
    ):
        read_signals(path, beats=("qrs", 0.2, 0.5))


def test_annotations_are_those_that_wfdb_reads(tmp_path: Path) -> None:
    path = write(tmp_path)
    rng = np.random.default_rng(0)
    gaps, symbols = rng.choice([1, 7, 1023, 1024, 5000, 70000, 10**7], 300), rng.choice(list('NLRBAaJSVrFejnE/fQ?+~|sTD"p^tu![]x()'), 300)
    at = np.cumsum(gaps)
    with warnings.catch_warnings(action="ignore"):
        wfdb.wrann(
            "rec", "own", at, list(symbols), aux_note=["(AFIB" if s == "+" else "" for s in symbols], fs=250.0, write_dir=str(tmp_path)
        )
    (record,) = open_records(path, None)[0]
    samples, found, others = record.beats("own")
    beat = np.isin(symbols, list("NLRBAaJSVrFejnE/fQ?"))
    assert found == symbols[beat].tolist() and others == (~beat).sum()
    np.testing.assert_array_equal(samples, np.round(at[beat] * RATE / 250.0))


def test_windows_that_overlap_a_hundredfold_say_so(tmp_path: Path) -> None:
    tasks = read_signals(write(tmp_path), window=10, stride=0.1)
    assert tasks.overlap == 99
    parts, starts = divide(tasks, 0.0, 0.1), [float(name.split()[1]) for name in tasks.names]
    assert max(starts[i] for i in parts.train) + 10 <= min(starts[i] for i in parts.test) + 1e-9


def test_beats_that_share_samples_overlap(tmp_path: Path) -> None:
    path = write(tmp_path)
    annotate(path, list(range(100, 1000, 30)), ["N"] * 30)
    assert read_signals(path, beats=("atr", 0.2, 0.5)).overlap == 2
    assert read_signals(path, beats=("atr", 0.1, 0.2)).overlap == 0


def test_a_whole_record_is_a_task(tmp_path: Path) -> None:
    path = write(tmp_path)
    x, y, _ = read_signals(path, task="record")[0]
    np.testing.assert_array_equal(y[:, 0], stored(path)[:, 0])
    np.testing.assert_allclose(x[:, 0], np.arange(len(y)) / RATE)


def test_a_later_record_is_read_by_the_recipe_written_down(tmp_path: Path) -> None:
    first = read_signals(write(tmp_path, "a"), leads=["II", "V5"], window=1.5, stride=0.5, rate=50.0, centre=True)
    recipe = json.loads(json.dumps(first.recipe))
    same(read_signals(tmp_path / "a", recipe=recipe), first)
    b = write(tmp_path, "b", 1e3 * wave(1, rate=250.0), units=["uV", "uV"], fs=250.0)
    second = read_signals(b, recipe=recipe)
    assert second.outputs == first.outputs and len(second[0][0]) == 75 and np.abs(second[0][1]).max() < 10
    c = write(tmp_path, "c", sig_name=["MLII", "V1"])
    with pytest.raises(ValueError, match=r"the lead II in record c\. Got MLII, V1"):
        read_signals(c, recipe=recipe)
    third = read_signals(c, recipe=recipe, leads=["MLII", "V1"])
    same(third.subset([]), first.subset([]))
    assert third.outputs == first.outputs and any("MLII, V1 stand in for II, V5" in note for note in third.notes)
    for given, said in (({"window": 3.0}, "Got window beside it"), ({"leads": "MLII"}, "Got 1: MLII")):
        with pytest.raises(ValueError, match=said):
            read_signals(c, recipe=recipe, **given)
    with pytest.raises(ValueError, match="Got a recipe for 'grid'"):
        read_signals(c, recipe={"kind": "grid"})
    d = write(tmp_path, "d", units=["mmHg", "mV"])
    with pytest.raises(ValueError, match=r"II in mV, as in the first record or the recipe\. Got mmHg in d"):
        read_signals(d, recipe=recipe)


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    path, other = write(tmp_path), write(tmp_path, "other", wave(1))
    (tmp_path / "copy").mkdir()
    for file in tmp_path.glob("rec.*"):
        shutil.copy(file, tmp_path / "copy")
    assert read_signals(path).fingerprint == read_signals(tmp_path / "copy").fingerprint != read_signals(other).fingerprint
    assert read_signals((wave(), RATE)).fingerprint != read_signals((wave(), 99.0)).fingerprint != read_signals((wave(1), 99.0)).fingerprint


def test_a_record_in_segments_is_one_record(tmp_path: Path) -> None:
    write(tmp_path, "s1", wave()[:1000])
    write(tmp_path, "s2", wave()[1500:])
    (tmp_path / "multi.hea").write_text("multi/3 2 100 2130\ns1 1000\n~ 500\ns2 630\n")
    tasks = read_signals(tmp_path, leads=["V5"], window=1.0)
    assert set(tasks.groups or ()) == {"multi"} and len(tasks) == 16
    np.testing.assert_allclose(tasks[10][1][:, 0], stored(tmp_path / "s2")[:100, 1])
    assert tasks.names[10] == "multi 15 s"
    write(tmp_path, "s3", wave()[:1000, :1], sig_name=["V5"])
    (tmp_path / "layout.hea").write_text("layout 2 100 0\n~ 0 200 16 0 0 0 0 II\n~ 0 200 16 0 0 0 0 V5\n")
    (tmp_path / "varied.hea").write_text("varied/4 2 100 2500\nlayout 0\ns1 1000\n~ 500\ns3 1000\n")
    tasks = read_signals(tmp_path / "varied", leads=["II", "V5"], window=2.0)
    assert [mask.any(0).tolist() for _, _, mask in tasks[4:7]] == [[True, True], [False, True], [False, True]]
    (tmp_path / "s3.hea").unlink()
    with pytest.raises(FileNotFoundError, match=r"Expected .*s3.hea, a segment of varied"):
        read_signals(tmp_path / "varied")


def test_a_record_that_lists_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop.hea").write_text("loop/1 2 100 500\nloop 500\n")
    with pytest.raises(ValueError, match=r"the segment loop of .* to be an ordinary record"):
        read_signals(tmp_path / "loop")


def test_a_lead_with_more_samples_in_a_frame_is_averaged(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(-500, 500, (600, 3)).astype("<i2")
    frames.tofile(tmp_path / "fast.dat")
    for length in ("600", ""):  # a header need not say how many frames there are
        (tmp_path / "fast.hea").write_text(f"fast 2 100 {length}\nfast.dat 16x2 200/mV 16 0 0 0 0 II\nfast.dat 16 200/mV 16 0 0 0 0 V5\n")
        tasks = read_signals(tmp_path / "fast", leads=["II", "V5"], task="record")
        np.testing.assert_allclose(tasks[0][1] * 200, np.stack([frames[:, :2].mean(1), frames[:, 2]], 1), atol=0.5 + 1e-9)
        assert any("averaged to 100 Hz" in note for note in tasks.notes)


@pytest.mark.parametrize("fmt", ["16", "212", "24", "32", "80"])
def test_a_file_cut_short_is_refused(tmp_path: Path, fmt: str) -> None:
    path = write(tmp_path, fmt=[fmt, fmt])
    assert len(read_signals(path)) == 10
    content = Path(f"{path}.dat").read_bytes()
    for kept in (len(content) - 1, len(content) // 2, 0):
        Path(f"{path}.dat").write_bytes(content[:kept])
        with pytest.raises(
            ValueError, match=rf"Expected {len(content)} bytes in .*rec.dat, as its header says. Got {kept}: it is cut short"
        ):
            read_signals(path)
    Path(f"{path}.dat").unlink()
    with pytest.raises(FileNotFoundError, match=r"Expected .*rec.dat, which the header rec.hea names. Got no such file"):
        read_signals(path)


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "", "rec")
    header = Path(f"{path}.hea")
    good = header.read_text()
    annotate(path, [500], ["N"])
    Path(f"{path}.atr").write_bytes(Path(f"{path}.atr").read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"at the end of the annotations .*rec.atr. Got none: it is cut short"):
        read_signals(path, task="beat")
    for text in (
        "",
        "# only a remark\n",
        "rec\n",
        "\x00\x01\x02",
        "rec 2 0 100\n",
        good.replace("rec 2", "rec x"),
        "rec 2 100 100\nrec.dat 16\n",
    ):
        header.write_text(text)
        with pytest.raises(ValueError, match=r"Expected.*rec"):
            read_signals(path)
    header.write_bytes(np.random.default_rng(0).bytes(400))
    with pytest.raises((ValueError, FileNotFoundError), match="Expected"):
        read_signals(path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.csv").write_text("time,y\n0,1\n")
    refused: list[tuple[Any, type[Exception], str]] = [
        (tmp_path / "nowhere", FileNotFoundError, r"the WFDB header .*nowhere.hea. Got no such file. Check the path"),
        (tmp_path / "t.csv", FileNotFoundError, "use read_table"),
        (tmp_path / "x*", FileNotFoundError, "match .*x"),
        (tmp_path / "empty", ValueError, "in the folder .*empty. Got none"),
        ([], ValueError, "an empty list"),
        (3, TypeError, "the path of a WFDB record"),
        ("s3://bucket/rec", FileNotFoundError, "Got no such file"),
        ((np.zeros((2, 3, 4)), 100.0), ValueError, r"samples with shape \(n,\)"),
        ((np.zeros(100), 0.0), ValueError, "a positive number of samples"),
        ((np.full(100, np.inf), 10.0), ValueError, "finite samples"),
        ({"a": np.zeros(100)}, TypeError, r"a pair \(samples, rate\)"),
    ]
    for source, kind, said in refused:
        with pytest.raises(kind, match=said):
            read_signals(source)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"task": "day"}, "task as 'window', 'beat' or 'record'"),
        ({"task": "window", "beats": ("atr", 0.1, 0.1)}, "beats only with"),
        ({"window": 0.0}, "Got none|at least|above 0"),
        ({"window": -1.0}, "above 0"),
        ({"stride": 0.0}, "above 0"),
        ({"rate": 0.0}, "above 0"),
        ({"rate": 1e-9}, "a rate not far from"),
        ({"window": 0.001}, "at least 2 samples"),
        ({"window": 100.0}, "at least one window with samples. Got none.*shorter than a window"),
        ({"leads": ["signal", "signal"]}, "different leads"),
        ({"leads": ["II", "V5"]}, "the lead II"),
        ({"beats": ("atr", 0.0, 0.0)}, "seconds before, seconds after"),
        ({"task": "beat"}, "a WFDB record with annotations"),
    ],
)
def test_what_cannot_be_cut_is_said(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_signals((wave(leads=1), RATE), **given)


@pytest.mark.skipif(ECG is None, reason="the ECG sample is not there")
def test_real_records_are_read_as_they_are() -> None:
    assert ECG is not None
    for header in sorted(ECG.glob("*.hea")):
        path = header.with_suffix("")
        whole = stored(path)
        tasks, lazy = read_signals(path), read_signals(path, lazy=True)
        n = len(tasks[0][0])
        np.testing.assert_array_equal(np.concatenate([y[:, 0] for _, y, _ in tasks]), whole[: n * len(tasks), 0])
        np.testing.assert_array_equal(lazy[3][1], tasks[3][1])
        if header.with_suffix(".atr").is_file():
            with warnings.catch_warnings(action="ignore"):
                expected = wfdb.rdann(str(path), "atr")
            samples, symbols, others = open_records(path, None)[0][0].beats("atr")
            assert len(samples) + others == len(expected.sample)
            assert set(zip(samples.tolist(), symbols, strict=True)) <= set(zip(expected.sample.tolist(), expected.symbol, strict=True))
            beats = read_signals(path, task="beat")
            assert len(beats) > 100 and {name.split()[-1] for name in beats.names} >= {"N"}
    several = read_signals(ECG, leads="MLII|II", rate=100.0)
    assert len(set(several.groups or ())) == len(list(ECG.glob("*.hea"))) and set(several.sizes) == {200}
