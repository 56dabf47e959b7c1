"""Tables that are damaged, odd or not tables: one clear error with the row, or the right answer; nothing else."""

from __future__ import annotations

import builtins
import gzip
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bnnp.data import read_points, read_table
from bnnp.data.collection import Collection

GOOD = "who,t,x,y\na,1,0.5,1\na,2,0.7,3\nb,1,0.2,2\nb,2,0.1,5\n"
ROLES: dict[str, Any] = {"task": "who", "inputs": ["t", "x"], "outputs": "y"}


def put(folder: Path, content: str | bytes, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(source: Any, pattern: str, kind: type[Exception] = ValueError, **how: Any) -> None:
    """Check that a table is refused with one sentence that says what was expected, what was found, and what to do."""
    with pytest.raises(kind) as caught:
        read_table(source, **(how or ROLES))
    text = str(caught.value)
    assert re.search(pattern, text, re.DOTALL), text
    assert text.startswith("Expected"), text
    assert "Got" in text, text
    assert caught.value.__suppress_context__ or caught.value.__context__ is None  # no library's traceback above ours


BROKEN = {
    "empty": (b"", "Got an empty file"),
    "blank": (b"\n  \n\t\n", "Got an empty file"),
    "comments only": (b"# who\n# knows\n", "Got an empty file but for comments"),
    "header only": (b"who,t,x,y\n", "Got the header only: 'who', 't', 'x', 'y'"),
    "NUL": (GOOD.replace("0.7", "0\0007").encode(), "NUL bytes .the first is byte 26"),
    "control": (GOOD.replace("0.7", "0\x017").encode(), "control character .* in line 3"),
    "JSON": (b'[{"who": 1, "t": 2}]', "Got JSON. Save it as CSV"),
    "page": (b"<!DOCTYPE html>\n<html>", "Got a page in HTML"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "Got an image"),
    "Excel": (b"PK\x03\x04" + bytes(50), "Excel workbook. .*save the sheet as CSV"),
    "netCDF": (b"\x89HDF\r\n", "read_grid"),
    "executable": (b"\x7fELF\x02\x01\x01" + bytes(9), "binary"),
    "utf-16 without its mark": (GOOD.encode("utf-16-le"), "utf-16-le"),
    "half a utf-16 letter": (GOOD.encode("utf-16")[:-1], "Expected text in utf-16"),
    "cut gzip": (gzip.compress(GOOD.encode() * 99)[:-20], "Expected a whole gzip file"),
    "bad gzip": (gzip.compress(GOOD.encode())[:15] + b"xxxxxxxxxxxx", "Expected a whole gzip file"),
    "Parquet in name only": (b"PAR1" + bytes(99), "Expected a whole Parquet file"),
    "duplicated names": (GOOD.replace("x", "t").encode(), "Got 't' more than once"),
    "too long a row": (GOOD.replace("0.7,3", "0.7,3,9").encode(), "Expected 4 fields in every row .* Got 5 in row 3"),
    "too short a row": (GOOD.replace("0.7,3", "3").encode(), "Expected 4 fields in every row .* Got 3 in row 3"),
    "both": (GOOD.replace("0.7,3", "3").replace("0.1", "1,1").encode(), "Got 3 in row 3"),
    "cut off": (GOOD.encode()[:-6], "Got 3 in row 5. .*cut off"),
    "ragged after blank lines": (b"\n# c\n" + GOOD.replace("\n", "\n\n").replace("0.7,3", "3").encode(), "Got 3 in row 7"),
    "ragged after a quoted line end": (GOOD.replace("a,1", '"a\nz",1').replace("0.2,", "").encode(), "Got 3 in row 5"),
    "open quote": (GOOD.replace("b,1", '"b,1').encode(), "Expected"),
    "text in a column of numbers": (GOOD.replace("0.7", "0.7 m").encode(), "numbers.* in column 'x'. Got '0.7 m' in row 3"),
    "text in outputs": (GOOD.replace(",3", ",high").encode(), "numbers.* in column 'y'. Got 'high' in row 3"),
    "decimal comma in one row": (GOOD.replace("0.7", '"0,7"').encode(), "Got '0,7' in row 3"),
    "no input": (GOOD.replace("0.7", "").encode(), "a value of the input 'x' .* Got none in row 3. .*drop_missing_inputs"),
    "no task": (GOOD.replace("b,1", "NA,1").encode(), "name of a task in column 'who' .* Got none in row 4"),
    "infinite input": (GOOD.replace("0.7", "inf").encode(), "finite numbers in column 'x'. Got inf in row 3"),
    "infinite output": (GOOD.replace(",3", ",-inf").encode(), "finite numbers in column 'y'. Got -inf in row 3"),
    "too large a number": (GOOD.replace(",3", ",1e999").encode(), "finite numbers in column 'y'. Got inf in row 3"),
    "tasks of one point": (GOOD.replace("a,1", "c,1").replace("b,1", "d,1").encode(), "at least 2 points .* Got none of 4 points in 4"),
    "no output at all": (re.sub(r",\d\n", ",\n", GOOD).encode(), "none of 0 points"),
    "outputs that never vary": (re.sub(r",\d\n", ",7\n", GOOD).encode(), "outputs that vary. Got 'y' with the value 7"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_with_its_fault(name: str, tmp_path: Path) -> None:
    content, pattern = BROKEN[name]
    path = put(tmp_path, content)
    refused(path, pattern)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["table.csv"]


def test_the_file_that_the_broken_ones_were_made_from_is_whole(tmp_path: Path) -> None:
    found = read_table(put(tmp_path, GOOD), **ROLES)
    assert found.names == ["a", "b"]
    assert found.notes == ()


def test_a_damaged_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = np.arange(4000)
    pd.DataFrame({"who": rows % 9, "t": rows, "x": np.random.default_rng(0).random(4000), "y": rows / 2}).to_parquet(path)
    raw = path.read_bytes()
    assert len(read_table(path, **ROLES)) == 9
    for length in (5, 8, 100, len(raw) // 2, len(raw) - 1):
        refused(put(tmp_path, raw[:length]), "Expected a whole Parquet file")
    twisted = bytearray(raw)
    twisted[200:9000] = bytes(b ^ 255 for b in twisted[200:9000])
    refused(put(tmp_path, bytes(twisted)), "Expected a whole Parquet file")
    pd.DataFrame({"who": []}).to_parquet(path)
    refused(path, "Expected rows in .* 0 rows")


def test_what_is_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "none.csv", "Got no such file", FileNotFoundError)
    refused("https://example.org/a.csv", "nothing is downloaded", FileNotFoundError)
    refused(tmp_path, "Got the folder")
    refused("a\0b.csv", "Expected a table at", OSError)
    refused("x" * 5000, "Expected a table at", OSError)
    refused(put(tmp_path, GOOD) / "more.csv", "Expected a table at", OSError)
    for odd in (None, 3, np.zeros((3, 2)), [1, 2], {"a": [1]}, b"a.csv"):
        refused(odd, "Expected the path of a table, or a frame", TypeError)
    path = put(tmp_path, GOOD)
    path.chmod(0)
    if os.geteuid() == 0:  # root may read everything

        def denied(*_: Any, **__: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(builtins, "open", denied)
    refused(path, "Got no permission", PermissionError)


@pytest.mark.parametrize(("package", "suffix"), [("pandas", "csv"), ("pyarrow", "parquet")])
def test_a_missing_package_is_named_with_its_extra(package: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"a.{suffix}"
    pd.DataFrame({"who": [1, 1], "x": [0, 1], "y": [1.0, 2.0]}).to_parquet(path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"Expected {package}, .*bnnp\[table\]"):
        read_table(path, task="who")


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "utf-8", "utf-8-sig", "utf-16"])
def test_letters_of_every_encoding_arrive(encoding: str, tmp_path: Path) -> None:
    path = put(tmp_path, GOOD.replace("a,", "Ærø,").replace("x,y", "größe,y").encode(encoding))
    for given_encoding in (None, encoding):
        found = read_table(path, task="who", inputs=["t", "größe"], encoding=given_encoding)
        assert "Ærø" in found.names
        assert any("not UTF-8" in note for note in found.notes) == (given_encoding is None and encoding in ("cp1252", "latin-1"))


def test_a_wrong_encoding_is_refused_or_noted(tmp_path: Path) -> None:
    path = put(tmp_path, GOOD.replace("a,", "Ærø,").encode("cp1252"))
    refused(path, "Got bytes that are not", **ROLES, encoding="utf-8")
    refused(path, "Expected an encoding that Python knows", **ROLES, encoding="klingon")
    refused(path, "Expected an encoding that Python knows", **ROLES, encoding="base64")
    assert read_table(put(tmp_path, GOOD.encode("utf-16-le")), **ROLES, encoding="utf-16-le").names == ["a", "b"]


MISUSED = {
    "no task": ({}, "Expected many data sets.*'who': 2 tasks of about 2 points.*--task who"),
    "a column that is not there": ({**ROLES, "task": "whom"}, "Expected a column 'whom' .* Got .*'who', 't', 'x', 'y'. Did you mean 'who'"),
    "output as input": ({**ROLES, "outputs": "x"}, "Got 'x' as both"),
    "twice": ({**ROLES, "inputs": ["x", "x"]}, "different names"),
    "none": ({**ROLES, "inputs": []}, "different names"),
    "no output left": ({"task": ["t", "x", "y"], "inputs": "who"}, "Expected outputs, columns to predict. Got none"),
    "no input left": ({"task": ["who", "t", "x"], "outputs": "y"}, "Expected inputs, columns to predict from. Got none"),
    "stride alone": ({**ROLES, "stride": 3}, "Expected a window with the stride"),
    "no window": ({**ROLES, "window": 0}, "Expected window above 0"),
    "negative": ({**ROLES, "window": -1.5, "order": "t"}, "Expected window above 0"),
    "not a number": ({**ROLES, "window": float("nan"), "order": "t"}, "Expected window above 0"),
    "yes": ({**ROLES, "window": True}, "Expected window above 0"),
    "words": ({**ROLES, "window": "a while"}, "Expected window above 0"),
    "time without dates": ({**ROLES, "window": "3 days", "order": "t"}, "an order column of dates"),
    "fraction of a row": ({**ROLES, "window": 1.5}, "in rows, a whole number"),
    "two measures": ({**ROLES, "window": 2, "stride": 1.0, "order": "t"}, "both in rows or both in units"),
    "too dense": ({**ROLES, "window": 2.0, "stride": 1e-9, "order": "t"}, "at most 1000 windows"),
    "too long": ({**ROLES, "window": 50}, "Expected windows of at least 2 points .*Got none .*shorter window"),
    "order of text": ({"inputs": "x", "outputs": "y", "task": "t", "order": "who"}, "Expected numbers or dates in 'who'"),
    "units of nothing": ({**ROLES, "inputs": "x", "units": {"t": "s"}}, "Expected units of inputs and outputs"),
    "wrong names": ({**ROLES, "names": ["who", "x"]}, "Expected 4 names"),
    "delimiter": ({**ROLES, "delimiter": ",,"}, "Expected a delimiter of one plain character"),
    "another delimiter": ({**ROLES, "delimiter": ";"}, "Expected a column 'who' .* Got the columns 'who,t,x,y'"),
    "recipe and roles": ({**ROLES, "recipe": {"kind": "table"}}, "Got both a recipe and task, inputs, outputs"),
    "recipe of a grid": ({"recipe": {"kind": "grid"}}, "Got one of kind 'grid'"),
    "half a recipe": ({"recipe": {"kind": "table", "task": ["who"]}}, "damaged"),
    "no recipe": ({"recipe": 3}, "Expected the recipe of a table"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSED)
def test_a_wrong_word_is_answered_with_the_right_ones(name: str, tmp_path: Path) -> None:
    how, pattern = MISUSED[name]
    path = put(tmp_path, GOOD)
    if how:
        refused(path, pattern, **how)
    else:
        with pytest.raises(ValueError, match=re.compile(pattern, re.DOTALL)):
            read_table(path)


@pytest.mark.parametrize("how", [{"task": 3}, {"inputs": [1]}, {"order": ["t"]}, {"names": "abcd"}, {"outputs": {"y": 1}}])
def test_names_of_another_type_are_refused(how: dict[str, Any], tmp_path: Path) -> None:
    refused(put(tmp_path, GOOD), "Got", TypeError, **{**ROLES, **how})


def frame(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"who": [1, 1, 1, 2, 2, 2], "x": [0, 1, 2, 0, 1, 2], "y": np.arange(6.0), **columns})


@pytest.mark.parametrize(
    ("texts", "pattern"),
    [
        (["01/02/2020"] * 3 + ["02/03/2020", "03/04/2020", "04/05/2020"], "Got '01/02/2020' in row 1 and '02/03/2020' in row 4.*day_first"),
        (["13/02/2020"] * 3 + ["02/13/2020"] * 3, "Got '13/02/2020' in row 1 and '02/13/2020' in row 4"),
        (["2020-01-01"] * 3 + ["2020-01-02", "2020-02-30", "2020-01-03"], "Expected dates.* Got '2020-02-30' in row 5"),
        (["2020-01-01"] * 3 + ["2020-01-02", "soon", "2020-01-03"], "Expected dates.* Got 'soon' in row 5"),
        (["01/02/20"] * 3 + ["02/03/20"] * 3, "all four digits of the year.* Got '01/02/20' in row 1"),
        (["1", "2", "3", "n/a", "five", "6"], "Expected numbers.* Got 'five' in row 5"),
        (["1", "two", "3", "4", "5", "6?"], "Got 'two' in row 2, and as much in 1 more rows"),
        ([[1], [2], [3], [4], [5], [6]], "Got list in row 1"),
        ([{}] * 6, "Got dict in row 1"),
    ],
)
def test_columns_of_mixed_kinds_are_refused_with_their_rows(texts: list[Any], pattern: str) -> None:
    refused(frame(x=texts), pattern, task="who", inputs="x", outputs="y")


def test_too_many_different_texts_are_no_category() -> None:
    many = pd.DataFrame({"who": np.arange(120) % 3, "x": [f"n{i}" for i in range(120)], "y": np.arange(120.0)})
    refused(many, "at most 50 different texts in column 'x'. Got 120 .*categories", task="who", inputs="x", outputs="y")
    refused(many.rename(columns={"x": "y", "y": "x"}), "at most 50 different texts in column 'y'", task="who", inputs="x", outputs="y")
    assert read_table(many, task="who", inputs="x", outputs="y", categories="x").x_dim == 120
    refused(frame(z=list("ababab")), "labels as the only output", task="who", inputs="x", outputs=["y", "z"])


def test_a_later_file_that_does_not_fit_is_refused_with_its_row() -> None:
    dates = [f"2020-01-0{d}" for d in (1, 2, 3)] * 2
    fine = frame(kind=list("uvwuvw"), day=dates)
    recipe = json.loads(json.dumps(dict(read_table(fine, task="who", inputs=["x", "kind", "day"], outputs="y").recipe)))
    assert len(read_table(fine, recipe=recipe)) == 2
    refused(fine.assign(kind=list("uvwuvz")), "one of 'u', 'v', 'w' in column 'kind'. Got 'z' in row 6", recipe=recipe)
    refused(fine.assign(day=np.arange(6)), "Expected dates in column 'day'", recipe=recipe)
    refused(fine.assign(x=list("abcdef")), "Expected numbers in column 'x'", recipe=recipe)
    refused(fine.drop(columns="x"), "Expected a column 'x'", recipe=recipe)
    refused(fine.assign(y=np.nan), "none of 0 points", recipe=recipe)
    assert sum(read_table(fine.assign(y=np.nan), recipe=recipe, outputs_needed=False).sizes) == 6
    with pytest.raises(ValueError, match="Got none in rows 2, 4"):
        read_points(fine.assign(x=[0, None, 2, None, 1, 2]), recipe)


def test_a_column_that_cannot_be_guessed_is_listed_with_its_trouble(tmp_path: Path) -> None:
    path = put(tmp_path, 'who,price\na,"1,234"\na,999\nb,5\nb,7\n')
    refused(path, "price +mixed +4 different \\('1,234' in row 2\\)", task="who")


def test_missing_inputs_can_be_left_out_and_are_counted() -> None:
    gaps = frame(x=[0, None, 2, 0, None, None])
    refused(gaps, "Got none in rows 2, 5, 6", task="who", inputs="x", outputs="y")
    found = read_table(gaps, task="who", inputs="x", outputs="y", drop_missing_inputs=True)
    assert found.names == ["1"]
    assert "3 points without 'x' were left out." in found.notes
    assert "1 task with fewer than 2 points was left out: '2'." in found.notes


def test_empty_rows_at_the_end_are_left_out(tmp_path: Path) -> None:
    found = read_table(put(tmp_path, GOOD + ",,,\n,,,\n"), **ROLES)
    assert list(found.sizes) == [2, 2]
    assert found.notes == ("2 empty rows were left out.",)


def test_two_columns_of_one_name_are_refused_in_frames() -> None:
    refused(pd.DataFrame([[1, 2, 3]] * 4, columns=["a", "b", "a"]), "Got 'a' more than once", task="b")


# Fuzzing. Whatever the bytes and words are: a collection, or an error that says what was expected.

SEEN: Counter[str] = Counter()
WORDS = st.sampled_from(
    [
        *["a", "b", "x y", '"', '"q"', "\t", "'", "\u2028", "\ufeff", "é", "#", "{x}", "_", "true", "None", "NA", "", "?", "-"],
        *["0", "1", "7", "2.5", "-3e2", "nan", "inf", "1,5", "1e400", "99999999999999999999", "１"],
        *["2020-01-02", "13/01/2020", "01/02/2020", "2020-13-45", "10:30", "00:99"],
    ]
)
NAMES = st.sampled_from(["a", "b", "c", "column_1", "column_2", "column_3", "", "z"])
SOMES = st.none() | NAMES | st.lists(NAMES, max_size=3)
HOW = st.fixed_dictionaries(
    {},
    optional={
        "task": SOMES,
        "inputs": SOMES,
        "outputs": SOMES,
        "order": st.none() | NAMES,
        "window": st.none() | st.sampled_from([1, 2, 3, 0, -1, 2.0, 0.5, 1e-300, 1e300, "2", "1 h", "soon"]),
        "stride": st.none() | st.sampled_from([1, 2, 1.0, 0.5, "1 d"]),
        "categories": st.none() | NAMES,
        "names": st.none() | st.just(["a", "b", "c"]),
        "day_first": st.none() | st.booleans(),
        "outputs_needed": st.booleans(),
        "drop_missing_inputs": st.booleans(),
    },
)


def only_our_errors(folder: Path, content: bytes, how: dict[str, Any]) -> None:
    """Read a table, and check that it ends in one of two ways and leaves the folder as it was."""
    path = folder / "table"
    path.write_bytes(content)
    try:
        found = read_table(path, **how)
        assert isinstance(found, Collection)
        for x, y, mask in found:
            assert np.isfinite(x).all()
            assert (np.isfinite(y) == mask).all()
            assert len(x) > 1
        assert found.describe().tasks == len(found) > 0
        again = read_table(path, recipe=json.loads(json.dumps(dict(found.recipe))), **{k: v for k, v in how.items() if k in AGAIN})
        assert again.names == found.names
        SEEN["read"] += 1
    except (ValueError, OSError, TypeError) as error:
        assert str(error).startswith("Expected"), repr(error)
        SEEN["refused"] += 1
    assert path.read_bytes() == content
    assert os.listdir(folder) == ["table"]


WRITTEN = st.fixed_dictionaries(
    {"task": NAMES},
    optional={
        "window": st.sampled_from([2, 1.5]),
        "names": st.just(["a", "b", "c"]),
        "delimiter": st.sampled_from([",", ";", " ", "\t", "é", '"', ""]),
        "encoding": st.sampled_from(["utf-8", "utf-16", "cp1252", "utf-7", "nonsense", "idna", "unicode_escape"]),
    },
)
AGAIN = ("names", "delimiter", "encoding", "outputs_needed", "drop_missing_inputs")
OFTEN = settings(max_examples=520, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@OFTEN
@given(content=st.binary(max_size=80), how=WRITTEN)
def test_any_bytes_end_in_a_collection_or_an_error_of_ours(content: bytes, how: dict[str, Any], tmp_path: Path) -> None:
    only_our_errors(tmp_path, content, how)


@OFTEN
@given(content=st.text(max_size=80), how=WRITTEN, start=st.sampled_from(["", "a,b,c\n1,2,3\n1,3,4\n", "PAR1", "\x1f\x8b"]))
def test_any_text_ends_in_a_collection_or_an_error_of_ours(content: str, how: dict[str, Any], start: str, tmp_path: Path) -> None:
    only_our_errors(tmp_path, (start + content).encode("utf-8", "surrogatepass"), how)


@OFTEN
@given(
    rows=st.lists(st.lists(WORDS, min_size=3, max_size=3), min_size=1, max_size=7),
    header=st.booleans(),
    delimiter=st.sampled_from([",", ";", "\t", " ", "|"]),
    end=st.sampled_from(["\n", "\r\n", "\n\n", "\r"]),
    extra=st.sampled_from(["", "", "", ",", "x"]),
    how=HOW,
)
def test_any_near_table_ends_in_a_collection_or_an_error_of_ours(
    rows: list[list[str]], header: bool, delimiter: str, end: str, extra: str, how: dict[str, Any], tmp_path: Path
) -> None:
    lines = [["a", "b", "c"]] * header + rows
    content = end.join(delimiter.join(line) for line in lines) + extra
    only_our_errors(tmp_path, content.encode(), {"task": "a" if header else "column_1", **how})


NAMED = ["u", "v"]
NUMBERS = ["0", "1", "2.5", "-3e2", "7", "0.1", "NA", "1e3", "+4"]
KINDS = [
    NAMED,
    ["1", "2", "3"],
    NUMBERS,
    ["2020-01-02", "2020-01-03", "2020-02-01 10:30", ""],
    ["13/01/2020", "01/02/2020", "02/02/2020"],
    ["true", "false", ""],
    ["10:30", "11:00", "00:10"],
]


@st.composite
def tables(draw: st.DrawFn) -> str:
    """Draw tables of a name, an input of any kind, a number and anything, with now and then a cell or a character that does not fit."""
    pools = [NAMED, draw(st.sampled_from(KINDS)), NUMBERS, draw(st.sampled_from(KINDS))]
    lines = [list("abcd"), *map(list, draw(st.lists(st.tuples(*map(st.sampled_from, pools)), min_size=5, max_size=9)))]
    spoilt = draw(st.integers(0, 5))
    if spoilt == 0:
        lines[draw(st.integers(0, len(lines) - 1))][draw(st.integers(0, 3))] = draw(WORDS)
    delimiter = draw(st.sampled_from([",", ";", "\t"]))
    text = "\n".join(delimiter.join(line) for line in lines)
    if spoilt == 1:
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.characters(codec="utf-8")) + text[at + draw(st.integers(0, 1)) :]
    return text


FITTING = st.fixed_dictionaries(
    {
        "task": st.just("a"),
        "inputs": st.sampled_from(["b", ["b", "d"], "d"]),
        "outputs": st.just("c"),
    },
    optional={
        "drop_missing_inputs": st.just(True),
        "order": st.sampled_from(["b", "d"]),
        "window": st.sampled_from([2, 2, 3, 3.0, "2 days"]),
        "stride": st.just(1),
        "categories": st.sampled_from(["b", "d"]),
        "outputs_needed": st.booleans(),
    },
)


@OFTEN
@given(content=tables(), how=FITTING)
def test_any_small_table_ends_in_a_collection_or_an_error_of_ours(content: str, how: dict[str, Any], tmp_path: Path) -> None:
    only_our_errors(tmp_path, content.encode(), how)


def test_the_fuzzing_saw_both_ends() -> None:
    if SEEN["read"] + SEEN["refused"] < 2000:
        pytest.skip("needs the tests above in the same process")
    assert min(SEEN["read"], SEEN["refused"]) > 100
