"""Tables as tasks: what a slow loop over the rows gives, from every source of the same table, and again from a recipe."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest

import bnnp
from bnnp.data import read_points, read_table
from bnnp.data.collection import Collection

ABALONE = Path(__file__).parents[2] / "shared" / "data" / "abalone" / "abalone.data"
ROLES: dict[str, Any] = {"task": "site", "inputs": ["t", "x"], "outputs": ["y", "z"]}


def rows_of(seed: int = 0, sites: int = 7, most: int = 12) -> list[dict[str, Any]]:
    """Return rows of a table in random order; times differ within a site, some outputs are missing."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(sites):
        for t in rng.permutation(50)[: rng.integers(2, most + 1)]:
            y, z = rng.normal(size=2).tolist()
            hole = rng.random()
            rows.append(
                {
                    "site": f"s{i}",
                    "t": int(t),
                    "x": float(rng.normal()),
                    "depth": int(rng.integers(0, 9)),
                    "y": None if hole < 0.2 else y,
                    "z": None if 0.1 < hole < 0.3 else z,
                }
            )
    return [rows[i] for i in rng.permutation(len(rows))]


def write(path: Path, rows: list[dict[str, Any]], delimiter: str = ",", missing: str = "", header: bool = True, **others: Any) -> Path:
    """Write rows as delimited text, floats with all their digits."""
    with open(path, "w", newline="", encoding=others.pop("encoding", "utf-8")) as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator=others.pop("end", "\n"), **others)
        if header:
            writer.writerow(rows[0])
        writer.writerows([missing if value is None else value for value in row.values()] for row in rows)
    return path


def twin(path: Path, task: str, inputs: list[str], outputs: list[str], order: str | None = None) -> dict[str, Any]:
    """Return tasks by looping over rows; None for a task of one point."""
    tasks: dict[str, list[tuple[float, list[float], list[float]]]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for i, row in enumerate(csv.DictReader(file)):
            y = [float(row[name]) if row[name] else float("nan") for name in outputs]
            if not all(np.isnan(y)):
                point = (float(row[order]) if order else i, [float(row[name]) for name in inputs], y)
                tasks.setdefault(row[task], []).append(point)
    found = {}
    for name, points in tasks.items():
        points = sorted(points, key=lambda point: point[0])
        if len(points) > 1:
            found[name] = (np.array([x for _, x, _ in points]), np.array([y for _, _, y in points]))
    return found


def same(one: Collection, other: Collection) -> bool:
    """Say whether two collections hold the same tasks under the same names, bit for bit."""
    equal = list(one.names) == list(other.names) and one.inputs == other.inputs and one.outputs == other.outputs
    return equal and all(
        all(np.array_equal(p, q, equal_nan=p.dtype.kind == "f") for p, q in zip(a, b, strict=True)) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("order", [None, "t"])
@pytest.mark.parametrize("seed", range(8))
def test_tasks_are_those_of_a_loop_over_the_rows(tmp_path: Path, seed: int, order: str | None) -> None:
    path = write(tmp_path / "a.csv", rows_of(seed))
    expected = twin(path, "site", ["t", "x"], ["y", "z"], order)
    found = read_table(path, **ROLES, order=order)
    assert sorted(found.names) == sorted(expected)
    assert list(found.sizes) == [len(expected[name][0]) for name in found.names]
    for name, (x, y, mask) in zip(found.names, found, strict=True):
        np.testing.assert_array_equal(x, expected[name][0])
        np.testing.assert_array_equal(y, expected[name][1])
        np.testing.assert_array_equal(mask, ~np.isnan(expected[name][1]))


def test_with_an_order_the_order_of_the_rows_does_not_matter(tmp_path: Path) -> None:
    rows = rows_of(3)
    collections = []
    for seed in range(4):
        shuffled = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
        collections.append(read_table(write(tmp_path / f"{seed}.csv", shuffled), **ROLES, order="t"))
    assert all(same(collections[0], other) and collections[0].fingerprint == other.fingerprint for other in collections[1:])
    turned = [{name: row[name] for name in reversed(row)} for row in rows]
    assert same(collections[0], read_table(write(tmp_path / "turned.csv", turned), **ROLES, order="t"))


def test_without_an_order_rows_stay_in_the_order_of_the_table(tmp_path: Path) -> None:
    frame = pd.DataFrame({"task": [1, 2, 1, 2, 1], "x": [5, 1, 3, 0, 9], "y": [0.0, 1, 2, 3, 4]})
    assert [x.ravel().tolist() for x, _, _ in read_table(frame, task="task")] == [[5, 3, 9], [1, 0]]


def commented(path: Path, rows: list[dict[str, Any]]) -> Path:
    write(path, rows)
    path.write_text("# measured in May\n#\n\n" + path.read_text("utf-8"), "utf-8")
    return path


def hashed_header(path: Path, rows: list[dict[str, Any]]) -> Path:
    write(path, rows, " ", missing="nan")
    path.write_text("# " + path.read_text("utf-8"), "utf-8")
    return path


def comma(path: Path, rows: list[dict[str, Any]]) -> Path:
    turned = [{name: str(v).replace(".", ",") if isinstance(v, float) else v for name, v in row.items()} for row in rows]
    return write(path, turned, ";")


def aligned(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = [list(rows[0]), *([("NA" if value is None else str(value)) for value in row.values()] for row in rows)]
    path.write_text("\n".join("  ".join(f"{cell:>24}" for cell in line) for line in lines), "utf-8")
    return path


def packed(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_bytes(gzip.compress(write(path, rows).read_bytes()))
    return path


def blanks(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(write(path, rows).read_text("utf-8").replace("\n", "\n\n  \n"), "utf-8")
    return path


def r_style(path: Path, rows: list[dict[str, Any]]) -> Path:
    head, *lines = write(path, rows).read_text("utf-8").splitlines()
    path.write_text("\n".join([head, *(f"r{i},{line}" for i, line in enumerate(lines))]), "utf-8")
    return path


class Columns:
    """Be a frame of no known library."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.frame = pd.DataFrame(rows)
        self.columns = list(rows[0])

    def __len__(self) -> int:
        return len(self.frame)

    def __getitem__(self, name: str) -> Any:
        return self.frame[name].to_numpy()


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pl.DataFrame(rows).write_parquet(path)
    return path


SOURCES: dict[str, Callable[[Path, list[dict[str, Any]]], Any]] = {
    "tabs": lambda path, rows: write(path, rows, "\t"),
    "semicolons": lambda path, rows: write(path, rows, ";"),
    "bars": lambda path, rows: write(path, rows, "|"),
    "spaces": lambda path, rows: write(path, rows, " ", missing="?"),
    "aligned": aligned,
    "decimal comma": comma,
    "quoted": lambda path, rows: write(path, rows, quoting=csv.QUOTE_ALL),
    "windows": lambda path, rows: write(path, rows, end="\r\n"),
    "old mac": lambda path, rows: write(path, rows, end="\r"),
    "mark": lambda path, rows: write(path, rows, encoding="utf-8-sig"),
    "utf-16": lambda path, rows: write(path, rows, encoding="utf-16"),
    "comments": commented,
    "header in a comment": hashed_header,
    "blank lines": blanks,
    "names of rows": r_style,
    "gzip": packed,
    **{f"missing {w}": lambda path, rows, w=w: write(path, rows, missing=w) for w in ("NA", "n/a", "nan", "null", "-", "?", " NA ")},
    "parquet": parquet,
    "pandas": lambda path, rows: pd.DataFrame(rows),
    "pandas, nullable": lambda path, rows: pd.DataFrame(rows).convert_dtypes(),
    "pandas, category": lambda path, rows: pd.DataFrame(rows).astype({"site": "category"}),
    "pandas, indexed": lambda path, rows: pd.DataFrame(rows).set_index("site"),
    "polars": lambda path, rows: pl.DataFrame(rows),
    "polars, lazy": lambda path, rows: pl.DataFrame(rows).lazy(),
    "another frame": lambda path, rows: Columns(rows),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_of_a_table_gives_the_same_tasks(name: str, tmp_path: Path) -> None:
    rows = rows_of(1)
    plain = read_table(write(tmp_path / "plain.csv", rows), **ROLES)
    found = read_table(SOURCES[name](tmp_path / "data", rows), **ROLES)
    assert same(plain, found)
    assert plain.fingerprint == found.fingerprint


def test_a_file_without_a_header_is_found_out(tmp_path: Path) -> None:
    rows = rows_of(1)
    plain = read_table(write(tmp_path / "plain.csv", rows), **ROLES)
    bare = write(tmp_path / "bare.data", rows, header=False)
    found = read_table(bare, task="column_1", inputs=["column_2", "column_3"], outputs=["column_5", "column_6"])
    assert "no names of columns" in found.notes[0]
    named = read_table(bare, names=list(rows[0]), **ROLES)
    assert same(plain, named)
    assert not any("no names" in note for note in named.notes)
    assert [x.tolist() for x, _, _ in found] == [x.tolist() for x, _, _ in plain]
    # A later file with a header is read by it, whatever order its columns have.
    turned = write(tmp_path / "turned.csv", [dict(reversed(row.items())) for row in rows])
    assert same(plain, read_table(turned, recipe=named.recipe))


def test_years_as_names_of_columns_are_names_when_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "years.csv"
    path.write_text("1999,2000,2001\n1,2,3\n1,3,4\n2,2,2\n2,5,6\n")
    assert read_table(path, task="1999", inputs="2000", outputs="2001").names == ["1", "2"]
    assert read_table(path, task="column_1", inputs="column_2", outputs="column_3").names == ["1", "2"]  # 1999 is a task of one point


def through_json(recipe: Any) -> Any:
    return json.loads(json.dumps(recipe))


MIXED = pd.DataFrame(
    {
        "who": list("aaabbbccc"),
        "when": ["2020-01-0" + d for d in "123123123"],
        "colour": ["red", "blue", "red", "green", "red", "blue", "blue", "green", "red"],
        "size": [1, 2, 3, 1, 2, 3, 3, 2, 1],
        "on": [True, False, True, True, False, False, True, True, False],
        "at": ["08:00", "09:30", "10:00", "08:15", "09:30", "10:00", "08:00", "09:30", "12:00:36"],
        "y": [1.0, 2, 3, 4, 5, 6, 7, 8, 9],
        "class": ["low", "low", "high", "low", "high", "high", "low", "high", "mid"],
    }
)


@pytest.mark.parametrize(
    "how",
    [
        {"inputs": ["when", "colour", "on", "at"], "outputs": "y"},
        {"inputs": ["when"], "outputs": "class", "order": "when"},
        {"inputs": ["size", "colour"], "outputs": "y", "categories": ["size"], "units": {"y": "kg"}},
        {"inputs": ["when"], "outputs": ["y", "size"], "order": "when", "window": 2, "stride": 1},
        {"inputs": ["when", "on"], "outputs": "y", "order": "when", "window": "2 days", "stride": "24 h"},
        {},
    ],
)
def test_a_recipe_reads_the_table_again(how: dict[str, Any]) -> None:
    first = read_table(MIXED, task="who", **how)
    again = read_table(MIXED[[*reversed(MIXED.columns)]].assign(extra=1), recipe=through_json(first.recipe))
    assert same(first, again)
    assert first.recipe == again.recipe == through_json(first.recipe)
    assert (first.ordered, first.overlap, first.groups) == (again.ordered, again.overlap, again.groups)


def test_values_become_the_numbers_that_the_notes_say() -> None:
    found = read_table(MIXED, task="who", inputs=["when", "colour", "on", "at"], outputs="y", units={"y": "kg"})
    assert [str(c) for c in found.inputs] == ["when [h]", "colour=blue", "colour=green", "colour=red", "on", "at [h]"]
    assert str(found.outputs[0]) == "y [kg]"
    assert found[0][0].tolist() == [[0, 0, 0, 1, 1, 8], [24, 1, 0, 0, 0, 9.5], [48, 0, 0, 1, 1, 10]]
    assert found[2][0][2, 5] == pytest.approx(12.01)
    assert [n.split()[0] for n in found.notes] == ["'when'", "'colour'", "In", "'at'"]
    labels = read_table(MIXED, task="who", inputs="size", outputs="class")
    assert [y.ravel().tolist() for _, y, _ in labels] == [[1, 1, 0], [1, 0, 0], [1, 0, 2]]
    assert labels.recipe["labels"] == {"class": ["high", "low", "mid"]}


def test_a_later_file_is_on_the_same_clock() -> None:
    first = read_table(MIXED, task="who", inputs=["when"], outputs="y")
    later = MIXED.assign(when=MIXED["when"].str.replace("-01-", "-02-"))
    x = read_table(later, recipe=through_json(first.recipe))[0][0]
    np.testing.assert_array_equal(x - first[0][0], np.full((3, 1), 31 * 24.0))


@pytest.mark.parametrize(
    ("texts", "hours"),
    [
        (["2020-02-03", "2020-02-04"], [0, 24]),
        (["2020/02/03", "2020/02/13"], [0, 240]),
        (["2020-02-03T12:00:00Z", "2020-02-03T14:00:00+01:00"], [0, 1]),
        (["2020-02-03 12:00:00.5", "2020-02-03 13:00:00.5"], [0, 1]),
        (["03/02/2020", "13/02/2020"], [0, 240]),
        (["02/03/2020", "02/13/2020"], [0, 240]),
        (["3.2.2020 06:00", "4.2.2020 18:30"], [0, 36.5]),
        (["3 Feb 2020", "4 February 2020"], [0, 24]),
        (["03-FEB-2020", "05-FEB-2020"], [0, 48]),
        (["Feb 3, 2020", "Feb 4, 2020"], [0, 24]),
        (["02/13/2020 11:00 AM", "02/13/2020 1:00 pm"], [0, 2]),
        (["2020-01", "2020-02"], [0, 31 * 24]),
        (["2020-02-03 24:00", "2020-02-04 01:00"], [0, 1]),
    ],
)
def test_dates_are_read_in_every_common_form(texts: list[str], hours: list[float]) -> None:
    frame = pd.DataFrame({"who": [1, 1, 2, 2], "when": texts * 2, "y": [1.0, 2, 3, 4]})
    found = read_table(frame, task="who", inputs="when", outputs="y")
    scale = {"d": 24, "h": 1, "s": 1 / 3600}[found.inputs[0].unit]
    np.testing.assert_allclose(found[0][0].ravel() * scale, hours, rtol=1e-12)


def test_many_dates_are_read_as_few_are() -> None:
    when = pd.date_range("2019-03-01", periods=3000, freq="h")
    frame = pd.DataFrame({"who": np.arange(3000) % 3, "when": when, "y": np.arange(3000.0)})
    expected = read_table(frame, task="who", inputs="when", outputs="y")
    for form in ("%Y-%m-%d %H:%M:%S", "%Y-%m-%dT%H:%M", "%Y/%m/%d %H:%M", "%d.%m.%Y %H:%M"):
        assert same(expected, read_table(frame.assign(when=when.strftime(form)), task="who", inputs="when", outputs="y")), form
    assert same(expected, read_table(frame.assign(when=when.tz_localize("UTC")), task="who", inputs="when", outputs="y"))


def test_day_first_decides_what_nothing_else_does() -> None:
    frame = pd.DataFrame({"who": [1, 1, 2, 2], "when": ["01/02/2020", "01/03/2020"] * 2, "y": [1.0, 2, 3, 4]})
    spans = [read_table(frame, task="who", inputs="when", outputs="y", day_first=day)[0][0][1, 0] for day in (True, False)]
    assert spans == [29, 24]  # days to the first of March, hours to the third of January
    recipe = read_table(frame, task="who", inputs="when", outputs="y", day_first=True).recipe
    assert read_table(frame, recipe=through_json(recipe))[0][0][1, 0] == 29


def test_missing_outputs_are_masked_and_points_without_any_left_out() -> None:
    frame = pd.DataFrame(
        {"who": [1, 1, 1, 2, 2, 2], "x": [0, 1, 2, 0, 1, 2], "y": [1, None, 3, 4, None, 6], "z": [1, 2, None, None, None, 5]}
    )
    found = read_table(frame, task="who", inputs="x", outputs=["y", "z"])
    assert [mask.tolist() for _, _, mask in found] == [[[True, True], [False, True], [True, False]], [[True, False], [True, True]]]
    assert "1 point without any output was left out." in found.notes
    everything = read_table(frame, task="who", inputs="x", outputs=["y", "z"], outputs_needed=False)
    assert list(everything.sizes) == [3, 3]
    assert not everything[1][2][1].any()


def test_the_description_counts_what_is_there() -> None:
    rows = rows_of(2)
    told = read_table(pd.DataFrame(rows), **ROLES).describe()
    assert told.kind == "table"
    assert told.tasks == 7
    kept = [row for row in rows if row["y"] is not None or row["z"] is not None]
    assert told.inputs[1]["max"] == max(row["x"] for row in kept)
    assert told.outputs[0]["missing"] == pytest.approx(np.mean([row["y"] is None for row in kept]))


def test_several_columns_name_tasks_together() -> None:
    frame = pd.DataFrame({"a": [1, 1, 1, 1, 10, 10, 2, 2], "b": list("xxyyxxxx"), "t": [0, 1] * 4, "y": np.arange(8.0)})
    found = read_table(frame, task=["a", "b"])
    assert found.names == ["1 / x", "1 / y", "2 / x", "10 / x"]
    assert found.groups == ["1", "1", "2", "10"]


def test_tasks_named_by_dates_are_in_order_of_time() -> None:
    days = ["13.01.2020", "02.02.2020", "01.03.2020"]
    frame = pd.DataFrame({"day": np.repeat(days[::-1], 2), "x": [0, 1] * 3, "y": np.arange(6.0)})
    found = read_table(frame, task="day")
    assert found.ordered
    assert found.names == days
    assert not read_table(MIXED, task="who", inputs="size", outputs="y").ordered


@pytest.mark.parametrize("value", [7, 7.0, 7.5, "007", "7.50", True, "true", "2020-01-02"])
def test_a_task_has_one_name_in_every_source(value: Any, tmp_path: Path) -> None:
    frame = pd.DataFrame({"who": [value, value, "b", "b"] if isinstance(value, str) else [value, value, type(value)(0), type(value)(0)]})
    frame = frame.assign(x=[0, 1, 0, 1], y=[1.0, 2, 3, 4])
    path, other = tmp_path / "a.csv", tmp_path / "a.parquet"
    frame.to_csv(path, index=False)
    frame.to_parquet(other)
    names = [read_table(source, task="who").names for source in (frame, path, other)]
    assert names[0] == names[1] == names[2]


def test_large_whole_numbers_stay_apart_as_names(tmp_path: Path) -> None:
    big = 2**60
    frame = pd.DataFrame({"who": [big, big, big + 1, big + 1], "x": [0, 1, 0, 1], "y": [1.0, 2, 3, 4]})
    frame.to_csv(tmp_path / "a.csv", index=False)
    assert read_table(frame, task="who").names == read_table(tmp_path / "a.csv", task="who").names == [str(big), str(big + 1)]


@pytest.mark.parametrize(("window", "stride"), [(4, 4), (4, 1), (5, 3), (3, 7), (2, 2)])
def test_windows_of_rows_are_those_of_a_loop(window: int, stride: int) -> None:
    frame = pd.DataFrame(rows_of(5, sites=4, most=20))
    found = read_table(frame, task="site", inputs=["t", "x"], outputs="y", order="t", window=window, stride=stride, outputs_needed=False)
    expected, above = [], []
    for name, part in frame.sort_values(["site", "t"]).groupby("site"):
        x = part[["t", "x"]].to_numpy()
        for start in range(0, len(part) - window + 1, stride):
            own = x[start : start + window].copy()
            own[:, 0] -= own[0, 0]
            expected.append(own)
            above.append(name)
    assert len(expected) > 2
    assert found.groups == above
    assert all(np.array_equal(x, own) for (x, _, _), own in zip(found, expected, strict=True))
    assert found.ordered
    assert found.overlap == sum(k * stride < window for k in range(1, 20))
    assert len(set(found.names)) == len(found)


@pytest.mark.parametrize(("window", "stride"), list(itertools.product([3.0, 7.5, 10.0], [2.0, 7.5, 9.5])))
def test_windows_of_time_are_those_of_a_loop(window: float, stride: float) -> None:
    frame = pd.DataFrame(rows_of(6, sites=5, most=30))
    found = read_table(frame, task="site", inputs=["x"], outputs="y", order="t", window=window, stride=stride, outputs_needed=False)
    step = float(np.median(np.concatenate([np.diff(np.sort(part)) for _, part in frame.groupby("site")["t"]])))
    expected = []
    for _, part in frame.sort_values(["site", "t"]).groupby("site"):
        t, x = part["t"].tolist(), part["x"].to_numpy()
        k = 0
        while t[0] + k * stride + window <= t[-1] + step:
            inside = [t[0] + k * stride <= value < t[0] + k * stride + window for value in t]
            k += 1
            if sum(inside) > 1:
                expected.append(x[inside])
    assert len(expected) > 2
    assert all(np.array_equal(x.ravel(), own) for (x, _, _), own in zip(found, expected, strict=True))
    assert found.overlap == sum(k * stride < window for k in range(1, 20))


def test_windows_of_one_series_start_at_zero_and_are_named_by_their_date() -> None:
    when = pd.date_range("2019-03-01", periods=240, freq="h")
    frame = pd.DataFrame({"time": when, "level": np.sin(np.arange(240.0))})
    found = read_table(frame, window="24 h", outputs="level")
    assert len(found) == 10
    assert found.names[1] == "from 2019-03-02"
    assert str(found.inputs[0]) == "time [d]"
    np.testing.assert_allclose(found[3][0].ravel(), np.arange(24) / 24, atol=1e-12)
    assert found.groups is None
    in_rows = read_table(frame, window=24, outputs="level")
    assert [x.tolist() for x, _, _ in in_rows] == [x.tolist() for x, _, _ in found]
    reversed_rows = read_table(frame[::-1], window=24, outputs="level")
    assert same(in_rows, reversed_rows)


def test_windows_without_a_column_of_time_are_cut_as_rows_stand() -> None:
    frame = pd.DataFrame({"x": [3, 1, 2, 5, 4, 0], "y": [0.0, 1, 2, 3, 4, 5]})
    found = read_table(frame, window=2, inputs="x", outputs="y")
    assert [x.ravel().tolist() for x, _, _ in found] == [[3, 1], [2, 5], [4, 0]]
    assert found.names == ["from row 1", "from row 3", "from row 5"]
    assert "Rows were taken to be in order of time as they stand." in found.notes


def test_a_series_without_inputs_is_read_by_the_number_of_the_row(tmp_path: Path) -> None:
    path = tmp_path / "levels.txt"
    path.write_text("level\n" + "\n".join(map(str, range(1, 8))), "utf-8")
    found = read_table(path, window=3, stride=2)
    assert [x.ravel().tolist() for x, _, _ in found] == [[0, 1, 2]] * 3
    assert [y.ravel().tolist() for _, y, _ in found] == [[1, 2, 3], [3, 4, 5], [5, 6, 7]]
    assert "'row' was taken" in " ".join(found.notes)
    assert same(found, read_table(path, recipe=through_json(found.recipe)))
    assert read_points(pd.DataFrame({"row": [2.5]}), found.recipe, outputs=False)[0][0].tolist() == [[2.5]]
    with pytest.raises(ValueError, match="Expected a column 'row'"):
        read_points(path, found.recipe)


def test_gaps_in_a_series_cost_nothing_and_are_told() -> None:
    frame = pd.DataFrame({"t": [0, 1, 2, 3, 1e9, 1e9 + 1, 1e9 + 2, 1e9 + 3], "y": np.arange(8.0)})
    found = read_table(frame, window=2.0, order="t")
    assert [len(x) for x, _, _ in found] == [2, 2, 2, 2]
    assert any("499,999,998 windows with fewer than 2 points were left out" in note for note in found.notes)
    rough = pd.DataFrame({"t": [*range(20), 100, 200, 300, 400], "y": np.arange(24.0)})
    assert any("There are gaps" in note for note in read_table(rough, window=4, order="t").notes)


def test_windows_never_mix_series() -> None:
    frame = pd.DataFrame({"site": np.repeat([1, 2, 3], 5), "t": list(range(5)) * 3, "y": np.repeat([1.0, 2.0, 3.0], 5)})
    for window in (3, 3.0):
        assert all(len(set(y.ravel())) == 1 for _, y, _ in read_table(frame, task="site", order="t", window=window, stride=type(window)(1)))


def test_what_never_varies_is_left_out_and_stays_out() -> None:
    frame = pd.DataFrame({"who": [1, 1, 2, 2], "x": [0, 1, 2, 3], "flat": [5, 5, 5, 5], "kind": ["a"] * 4, "y": [1.0, 2, 3, 4]})
    found = read_table(frame, task="who", inputs=["flat", "x", "kind"], outputs="y")
    assert [c.name for c in found.inputs] == ["x"]
    again = read_table(frame.assign(flat=[1, 2, 3, 4]), recipe=through_json(found.recipe))
    assert same(found, again)


def test_points_are_read_for_a_model_of_a_table() -> None:
    recipe = through_json(read_table(MIXED, task="who", inputs=["when", "colour"], outputs="y").recipe)
    order = [5, 0, 3, 8, 1]
    points = read_points(MIXED.iloc[order], recipe)
    assert points.names == ["b", "a", "c"]  # in the order of their first rows
    assert points[1][0].tolist() == [[0, 0, 0, 1], [24, 1, 0, 0]]
    assert points[1][1].tolist() == [[1], [2]]
    one = read_points(MIXED.iloc[order].drop(columns=["who", "y"]), recipe, outputs=False)
    assert len(one) == 1
    np.testing.assert_array_equal(one[0][0][:, 0], [48, 0, 0, 48, 24])
    assert not one[0][2].any()
    assert one[0][1].shape == (5, 1)
    coded = pd.DataFrame({"when": [0.0, 24.0], "colour=blue": [0, 1], "colour=green": [0, 0], "colour=red": [1, 0], "y": [1.0, 2.0]})
    given = read_points(coded, recipe)
    np.testing.assert_array_equal(given[0][0], points[1][0])
    assert given.inputs == points.inputs
    assert len(read_points(MIXED.iloc[:1], recipe)) == 1  # one point is enough to be conditioned on


def test_points_of_windows_are_taken_as_given() -> None:
    recipe = read_table(MIXED, task="who", inputs=["when"], outputs="y", order="when", window=2).recipe
    points = read_points(pd.DataFrame({"when": [5.0, 1.0], "y": [1.0, None]}), through_json(recipe))
    assert points[0][0].tolist() == [[5], [1]]
    assert points[0][2].tolist() == [[True], [False]]
    with pytest.raises(ValueError, match="Expected numbers in column 'when'"):
        read_points(MIXED[["when", "y"]], recipe)


def test_points_are_read_for_a_model_of_anything_else() -> None:
    frame = pd.DataFrame({"latitude": [50.0, 51.0], "longitude": [0.0, 1.0], "t2m": [280.0, 281.0], "task": ["u", "v"]})
    names = (["longitude", "latitude"], ["t2m"])
    points = read_points(frame, {"kind": "grid"}, columns=names)
    assert points[0][0].tolist() == [[0, 50], [1, 51]]
    assert points.recipe == {"kind": "grid"}
    assert read_points(frame, {"kind": "grid"}, columns=names, task="task").names == ["u", "v"]
    with pytest.raises(ValueError, match="Expected a column 't2m'"):
        read_points(frame.drop(columns="t2m"), {"kind": "grid"}, columns=names)
    with pytest.raises(ValueError, match="names of the model's inputs"):
        read_points(frame, {"kind": "grid"})


def test_guesses_are_said() -> None:
    frame = pd.DataFrame(
        {
            "who": [1, 1, 1, 2, 2, 2],
            "x": [0, 1, 2, 0, 1, 2],
            "name": list("abcdef"),
            "flat": [1] * 6,
            "y": np.arange(6.0),
            "z": np.arange(6.0),
        }
    )
    found = read_table(frame, task="who")
    assert [c.name for c in found.outputs] == ["z"]
    text = " ".join(found.notes)
    assert "the last column of numbers, 'z', was taken" in text
    assert "'flat' (never varies)" in text
    said = read_table(frame, task="who", inputs=["x"], outputs=["y"])
    assert said.notes == ()


def test_an_index_that_was_written_along_is_no_input(tmp_path: Path) -> None:
    frame = pd.DataFrame({"who": [1, 1, 2, 2], "x": [0, 1, 3, 2], "y": [1.0, 2, 3, 4]})
    frame.to_csv(tmp_path / "a.csv")
    found = read_table(tmp_path / "a.csv", task="who")
    assert [c.name for c in found.inputs] == ["x"]
    assert any("'column_1' (numbers the rows)" in note for note in found.notes)
    stamped = frame.set_index(pd.date_range("2020-01-01", periods=4))
    assert "The index of the frame was not used; give it a name to use it." in read_table(stamped, task="who").notes
    named = read_table(stamped.rename_axis("day"), task="who")
    assert [c.name for c in named.inputs] == ["day", "x"]


def test_abalone_by_sex_is_called_few() -> None:
    if not ABALONE.is_file():
        pytest.skip(f"needs {ABALONE}")
    with pytest.raises(ValueError, match=r"(?s)Expected many data sets.*'column_1': 3 tasks.*are few"):
        read_table(ABALONE)
    found = read_table(ABALONE, task="sex", names="sex length diameter height whole shucked viscera shell rings".split())
    assert found.names == ["F", "I", "M"]
    assert sum(found.sizes) == 4177
    assert "3 tasks are few" in found.describe().advice[0]


def test_tasks_of_a_table_are_learned_from_and_judged() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"who": np.repeat(np.arange(12), 8), "x": rng.normal(size=96), "kind": rng.choice(["a", "b"], 96)})
    frame["y"] = frame["who"] + frame["x"]
    frame.loc[::7, "y"] = np.nan
    tasks = read_table(frame, task="who")
    model = bnnp.BNNP(tasks.x_dim, tasks.y_dim, hidden=(4,))
    bnnp.meta_train(model, tasks, steps=3, seed=0)
    assert np.isfinite(bnnp.evaluate(model, tasks, context_fraction=0.5, seed=0, num_samples=4).summary["joint_log_density"][0])


def big(path: Path, rows: int) -> pd.DataFrame:
    """Write a long table, and return it."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"site": rng.integers(0, rows // 400, rows), "t": np.arange(rows), "x": rng.normal(size=rows), "y": rng.normal(size=rows)}
    )
    pl.DataFrame(frame).write_csv(path)
    return frame


@pytest.mark.parametrize("rows", [200_000, pytest.param(2_000_000, marks=pytest.mark.slow)])
def test_a_long_table_is_read_whole_and_a_fault_at_its_end_is_named(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "big.csv"
    frame = big(path, rows)
    found = read_table(path, task="site", inputs=["t", "x"], outputs="y", order="t")
    assert sum(found.sizes) == rows
    part = frame[frame["site"] == 17]
    np.testing.assert_array_equal(found[found.find("17")][0], part[["t", "x"]].to_numpy())
    with open(path, "a", encoding="utf-8") as file:
        file.write("5,oops,1.0,2.0\n")
    with pytest.raises(ValueError, match=f"'oops' in row {rows + 2}"):
        read_table(path, task="site", inputs=["t", "x"], outputs="y")
