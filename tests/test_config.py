"""Files of settings: what is printed is read again, and every mistake is told with its line and key."""

from __future__ import annotations

import math
import string
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bnnp.config import SETTINGS, Config, ConfigError, read_config

FUZZ = settings(max_examples=1000, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "run.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path


def test_every_example_is_a_setting_that_may_be_set(tmp_path: Path) -> None:
    sections = dict.fromkeys(s.section for s in SETTINGS)
    text = "\n".join(f"[{name}]\n" + "\n".join(f"{s.key} = {s.example}" for s in SETTINGS if s.section == name) for name in sections)
    config = read_config(write(tmp_path, text))
    assert all(config.get(s.name) is not None for s in SETTINGS)
    assert read_config(write(tmp_path, config.toml())).values == config.values


@pytest.mark.parametrize("kind", [None, "table", "grid", "signal", "images"])
def test_what_is_printed_reads_as_nothing_set(kind: str | None, tmp_path: Path) -> None:
    text = Config().toml(kind)
    assert read_config(write(tmp_path, text)).values == {}
    shown = [line for line in text.splitlines() if " = " in line]
    assert len(shown) == sum(kind is None or not s.kinds or kind in s.kinds for s in SETTINGS)
    uncommented = "\n".join(line.removeprefix("# ") if " = " in line else line for line in text.splitlines())
    assert tomllib.loads(uncommented)


def test_all_mistakes_are_told_with_line_and_key(tmp_path: Path) -> None:
    text = """# mine
[data]
task = 3

[model]
hiden = [3]
prior = "foo"
[ training ]
  steps = -4
"batch_size" = true
context = [0.5, 2.0]
[modle]
x = 1
"""
    with pytest.raises(ConfigError) as caught:
        read_config(write(tmp_path, text))
    found = str(caught.value).splitlines()
    assert [line.split(":")[0].split("run.toml, ")[1] for line in found] == [
        "line 3, data.task",
        "line 6, model.hiden",
        "line 7, model.prior",
        "line 9, training.steps",
        "line 10, training.batch_size",
        "line 11, training.context",
        "line 12, modle",
    ]
    assert "Did you mean hidden?" in found[1] and "Did you mean model?" in found[6]
    assert all("Expected" in line and "Got" in line for line in found)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model.hidden = 3", 1),
        ("\nmodel = { hidden = 3 }", 2),
        ("[model]\n\n'hidden' = 3", 3),
        ("x = 1", 1),
        ("[[model]]\nhidden = [3]", "?"),
        ("[model.hidden]\na = 1", 1),
    ],
)
def test_the_line_is_found_in_other_ways_of_writing(text: str, line: int | str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"line {line if line != '?' else '.'}"):
        read_config(write(tmp_path, text))


@pytest.mark.parametrize("text", [b"\xff\xfe[\x00", b"\x00\x01", "steps = ", "[training", "a = 1\na = 2", "x = " + "[" * 5000])
def test_what_is_no_toml_is_told(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run.toml: Expected .* Got"):
        read_config(write(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_config(tmp_path / "a.toml")
    with pytest.raises(FileNotFoundError, match="a folder"):
        read_config(tmp_path)


def test_settings_over_settings() -> None:
    first, second = Config({"model": {"hidden": [8]}}), Config({"model": {"hidden": [9], "prior": "shared"}, "split": {"seed": 3}})
    assert first.over(second).values == {"model": {"hidden": [8], "prior": "shared"}, "split": {"seed": 3}}
    assert first.replace(model__prior="shared", split__seed=None).values == {"model": {"hidden": [8], "prior": "shared"}}
    with pytest.raises(ConfigError, match=r"training\.steps"):
        first.replace(training__steps=0)


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from([s.name for s in SETTINGS]) | st.text(min_size=1).map(lambda k: f"model.{k.replace('.', '')}")


@FUZZ
@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_values_are_settings_or_mistakes(values: dict[str, Any]) -> None:
    """What is accepted is printed and read again as it was; nothing else than a `ConfigError` comes of the rest."""
    nested: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        nested.setdefault(section, {})[key] = value
    try:
        config = Config(nested)
    except ConfigError as error:
        assert "Expected" in str(error)
        return
    again = tomllib.loads(config.toml())
    assert {k: v for k, v in again.items() if v} == {k: v for k, v in config.to_dict().items() if v}


RAW = ("1", "-1", "true", '"a"', "[1, 2]", "{a = 1}", "1e400", "nan", "[", '"', "1979-05-27")
LINES = st.one_of(
    st.sampled_from([f"[{s}]" for s in ("data", "model", "training", "split", "zzz", "", "a.b", "[model]")]),
    st.builds(lambda s, v: f"{s.key} = {v}", st.sampled_from(SETTINGS), st.sampled_from(RAW)),
    st.builds(lambda s: f"{s.key} = {s.example}", st.sampled_from(SETTINGS)),
    st.text(alphabet=string.printable, max_size=12),
)
FILES = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")),
    st.lists(LINES, max_size=8).map(lambda rows: "\n".join(rows).encode()),
)


@FUZZ
@example(b"\xef\xbb\xbf[model]\nhidden = [3]")
@given(FILES)
def test_any_file_is_read_or_refused(tmp_path: Path, data: bytes) -> None:
    path = write(tmp_path, data)
    try:
        config = read_config(path)
    except ConfigError as error:
        assert str(path) in str(error) and "Expected" in str(error)
    else:
        assert all(not isinstance(v, float) or math.isfinite(v) for keys in config.values.values() for v in keys.values())
    assert [p.name for p in tmp_path.iterdir()] == ["run.toml"] and path.read_bytes() == data


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize("line", ["steps = {n}", "context = [0.1, {n}]", "context = [1, {n}]"])
def test_numbers_without_end_are_mistakes_like_others(digits: int, line: str, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[training]\n" + line.format(n="1" + "0" * digits) + "\n")
    with pytest.raises(ConfigError, match="Expected"):
        read_config(tmp_path / "run.toml")


def test_a_tab_is_a_delimiter_and_any_letter_may_name_a_column(tmp_path: Path) -> None:
    config = Config({"data": {"delimiter": "\t", "units": {"\U0001f642 \x7f": "mg"}}})
    (tmp_path / "run.toml").write_text(config.toml(), encoding="utf-8")
    assert read_config(tmp_path / "run.toml") == config
    with pytest.raises(ConfigError, match="one character"):
        Config({"data": {"delimiter": ",,"}})
