"""The settings of a fit as a TOML file: one table of what there is, from which files are printed, checked and read.

A setting that is absent is chosen from the data. Every mistake is reported with the line and the key, all of them at once.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bnnp.layers import ACTIVATIONS
from bnnp.likelihoods import LIKELIHOODS
from bnnp.objectives import OBJECTIVES
from bnnp.priors import PRIORS

__all__ = ["SETTINGS", "Config", "ConfigError", "Setting", "read_config"]

Check = Callable[[Any], Any]


class ConfigError(ValueError):
    """Report all mistakes of a file of settings, each with its line and key."""


def _number(least: float = -math.inf, above: float = -math.inf, most: float = math.inf, whole: bool = False) -> Check:
    kind = "a whole number" if whole else "a number"
    bounds = [f"of at least {least:g}"] * (least > -math.inf) + [f"above {above:g}"] * (above > -math.inf)
    words = " ".join([kind, *bounds, *([f"and at most {most:g}"] if most < math.inf else [])])

    def check(value: Any) -> Any:
        right = isinstance(value, int) if whole else isinstance(value, int | float)
        if isinstance(value, bool) or not right or not (_finite(value) and least <= value <= most and value > above):
            raise ValueError(words)
        return value

    return check


def _finite(value: int | float) -> bool:
    """Tell whether a number is one that a float can hold; TOML's whole numbers have no end."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _flag(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _text(value: Any) -> Any:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text that is not empty")
    return value


def _character(value: Any) -> Any:
    if not isinstance(value, str) or len(value) != 1:
        raise ValueError("one character")
    return value


def _names(value: Any) -> Any:
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise ValueError("a name, or a list of names")
    if len(set(value)) < len(value):
        raise ValueError("names that differ")
    return value


def _one_of(*names: str) -> Check:
    def check(value: Any) -> Any:
        if value not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return value

    return check


def _row(each: Check, words: str, length: int | None = None, rising: bool = False, empty: bool = False) -> Check:
    def check(value: Any) -> Any:
        if not isinstance(value, list) or (length is not None and len(value) != length) or (not value and not empty):
            raise ValueError(words)
        try:
            checked = [each(v) for v in value]
        except ValueError:
            raise ValueError(words) from None
        if rising and checked[0] > checked[-1]:
            raise ValueError(words)
        return checked

    return check


def _steps(value: Any) -> Any:
    """Check a table from a dimension's name to a number of cells."""
    if (
        not isinstance(value, dict)
        or not value
        or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in value.values())
    ):
        raise ValueError("a table of dimensions and whole numbers from 1, such as { latitude = 16, longitude = 16 }")
    return value


def _stride(value: Any) -> Any:
    """Check a step: a number, a time, or cells along each dimension."""
    return _steps(value) if isinstance(value, dict) else _length(value)


def _length(value: Any) -> Any:
    if isinstance(value, str) and value.strip():
        return value
    try:
        return _number(above=0)(value)
    except ValueError:
        raise ValueError('a number above 0, or a time such as "24 h"') from None


def _beats(value: Any) -> Any:
    words = "the ending of the file of annotations and seconds before and after a beat"
    if not isinstance(value, list) or len(value) != 3 or not isinstance(value[0], str):
        raise ValueError(words)
    try:
        return [value[0], *map(_number(least=0), value[1:])]
    except ValueError:
        raise ValueError(words) from None


def _units(value: Any) -> Any:
    if not isinstance(value, dict) or not value or not all(isinstance(v, str) for v in value.values()):
        raise ValueError("a table of columns and units")
    return value


def _context(value: Any) -> Any:
    words = "a range such as [0.1, 0.6], shares between 0 and 1, or [3, 30], numbers of points"
    if not isinstance(value, list) or len(value) != 2 or any(isinstance(v, bool) or not isinstance(v, int | float) for v in value):
        raise ValueError(words)
    low, high = value
    counts = isinstance(low, int) and isinstance(high, int)
    if not (0 < low <= high) or not _finite(high) or (not counts and not high < 1):
        raise ValueError(words)
    return value


@dataclass(frozen=True)
class Setting:
    """Describe one setting.

    Arguments:
        section: of the file.
        key: in the section.
        check: returns the value as it is used, or raises a ValueError with what was expected.
        help: for people, one line.
        example: a value in TOML, shown where none is set.
        kinds: of sources it speaks of; empty for all.
    """

    section: str
    key: str
    check: Check
    help: str
    example: str
    kinds: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return section and key."""
        return f"{self.section}.{self.key}"


_T, _G, _S, _I = "table", "grid", "signal", "images"
_COUNT, _POSITIVE, _SHARE = _number(least=1, whole=True), _number(above=0), _number(least=0, most=0.9)

SETTINGS: tuple[Setting, ...] = (
    Setting("data", "task", _names, "column(s) that name tasks; dimension of a grid; window, beat or record", '"patient"', (_T, _G, _S)),
    Setting("data", "inputs", _names, "columns, dimensions or variables to predict from", '["day", "age"]', (_T, _G)),
    Setting("data", "outputs", _names, "columns or variables to predict", '["value"]', (_T, _G)),
    Setting("data", "order", _text, "column that orders the rows of a task", '"day"', (_T,)),
    Setting("data", "window", _length, "length of windows: rows (whole), units of `order` (7.0), seconds", "50", (_T, _S)),
    Setting("data", "stride", _stride, "from the start of one window to the next; cells of patches", "25", (_T, _S, _G)),
    Setting("data", "units", _units, "of columns, for people", '{ dose = "mg" }', (_T,)),
    Setting("data", "categories", _names, "columns of numbers that are categories", '["site"]', (_T,)),
    Setting("data", "names", _names, "of the columns of a file without a header", '["a", "b", "c"]', (_T,)),
    Setting("data", "day_first", _flag, "03/04/2020 is in April", "true", (_T,)),
    Setting("data", "delimiter", _character, "between the columns of a text file", '";"', (_T,)),
    Setting("data", "encoding", _text, "of a text file", '"latin-1"', (_T,)),
    Setting("data", "drop_missing_inputs", _flag, "leave out points of which an input is missing", "true", (_T,)),
    Setting("data", "patch", _steps, "cells of a patch along each dimension", "{ latitude = 16, longitude = 16 }", (_G,)),
    Setting("data", "relative", _flag, "coordinates of a patch count from its centre", "true", (_G,)),
    Setting("data", "every", _steps, "take every so manieth cell along a dimension", "{ latitude = 2, longitude = 2 }", (_G,)),
    Setting("data", "leads", _names, "leads of a signal", '["II"]', (_S,)),
    Setting("data", "rate", _POSITIVE, "samples in a second that a signal is brought to", "125", (_S,)),
    Setting("data", "beats", _beats, "annotations, and seconds before and after each beat", '["atr", 0.25, 0.45]', (_S,)),
    Setting("data", "start", _number(), "where a signal starts to count, in seconds; below 0 from its end", "60.0", (_S,)),
    Setting("data", "stop", _number(), "where it ends, in the same way", "-300.0", (_S,)),
    Setting("data", "centre", _flag, "take its median off each window", "true", (_S,)),
    Setting("data", "size", _row(_number(least=2, whole=True), "[height, width]", 2), "pixels of resized images", "[28, 28]", (_I,)),
    Setting("data", "colour", _flag, "three outputs for an image instead of one grey value", "false", (_I,)),
    Setting("data", "labels", _text, '"folder" or a file of labels; they are held out whole where there are ten', '"folder"', (_I,)),
    Setting("data", "dequantise", _flag, "fill the gaps between 256 levels with noise, so that densities mean something", "true", (_I,)),
    Setting("split", "validation", _SHARE, "share of the tasks held out to choose the step that is kept", "0.15"),
    Setting("split", "test", _SHARE, "share held out for the report", "0.15"),
    Setting("split", "seed", _number(least=0, whole=True), "of the random choice", "0"),
    Setting("model", "hidden", _row(_COUNT, "a list of widths", empty=True), "widths of the hidden layers", "[64, 64]"),
    Setting("model", "net_hidden", _row(_COUNT, "a list of widths", empty=True), "those of the inference networks", "[32, 32]"),
    Setting("model", "prior", _one_of(*sorted(PRIORS)), "structure of the prior", '"matrix_normal"'),
    Setting("model", "spread", _number(least=0, most=0.999), "how far apart the prior's means of the units start", "0.9"),
    Setting("model", "input_scale", _POSITIVE, "how quickly functions of the prior vary at the start", "1.0"),
    Setting("model", "fraction", _number(least=0, most=1), "share of the prior that is learned", "1.0"),
    Setting("model", "likelihood", _one_of(*sorted(LIKELIHOODS)), "distribution of an output given the network", '"gaussian"'),
    Setting("model", "noise_std", _POSITIVE, "of Gaussian noise where learning starts, in standard deviations of y", "0.3"),
    Setting("model", "classes", _number(least=2, whole=True), "number of classes of a categorical likelihood", "3"),
    Setting("model", "activation", _one_of(*sorted(ACTIVATIONS)), "of the hidden layers", '"tanh"'),
    Setting("model", "residual", _flag, "add a layer's input to its output where widths agree", "false"),
    Setting("model", "last_layer", _one_of("exact", "amortised"), "how the last layer is inferred", '"exact"'),
    Setting("model", "shared_noise", _flag, "one pseudo-noise for a point, shared by the units", "true"),
    Setting("model", "missing_outputs", _flag, "points may have some of their outputs missing", "false"),
    Setting("model", "temperature", _flag, "learn how much less a point counts in large contexts", "false"),
    Setting("model", "dtype", _one_of("float32", "float64"), "precision of the network", '"float32"'),
    Setting("model", "factor_dtype", _one_of("float32", "float64"), "precision of factorisations", '"float64"'),
    Setting("training", "objective", _one_of(*sorted(OBJECTIVES)), "what is maximised", '"pp_avi"'),
    Setting("training", "steps", _COUNT, "number of steps", "2000"),
    Setting("training", "batch_size", _COUNT, "tasks in a step", "5"),
    Setting("training", "num_samples", _COUNT, "particles in training", "8"),
    Setting("training", "learning_rate", _POSITIVE, "of the first step", "3e-3"),
    Setting("training", "final_learning_rate", _POSITIVE, "of the last step", "1e-4"),
    Setting("training", "context", _context, "how much of a task is context: shares, or numbers of points", "[0.1, 0.6]"),
    Setting("training", "max_points", _number(least=2, whole=True), "points of a larger task that a step sees", "500"),
    Setting("training", "shrinkage", _number(least=0), "price of the prior's divergence from N(0, I/p), for few tasks", "0.0"),
    Setting("training", "trial_steps", _number(least=0, whole=True), "steps of a short trial of each candidate network; 0 for none", "200"),
    Setting("training", "seed", _number(least=0, whole=True), "of weights, batches and draws", "0"),
    Setting("training", "checkpoint_every", _COUNT, "steps between checkpoints", "100"),
)  # fmt: skip
BY_NAME = {setting.name: setting for setting in SETTINGS}
SECTIONS = tuple(dict.fromkeys(setting.section for setting in SETTINGS))


@dataclass(frozen=True)
class Config:
    """Hold settings by section; what is absent is chosen from the data.

    Arguments:
        values: section -> key -> value.

    Raises:
        ConfigError: a setting that does not exist, or a value that cannot be.

    Example:
        >>> print(Config({"model": {"hidden": [32]}}).get("model.hidden"))
        [32]
    """

    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checked, problems = _checked(self.values)
        if problems:
            raise ConfigError("\n".join(f"{name}: {words}" for name, words in problems))
        object.__setattr__(self, "values", checked)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a setting by "section.key", or the default."""
        section, key = name.split(".")
        return self.values.get(section, {}).get(key, default)

    def section(self, name: str) -> dict[str, Any]:
        """Return what is set in a section."""
        return dict(self.values.get(name, {}))

    def replace(self, **settings: Any) -> Config:
        """Return other settings, named section__key; None leaves a setting as it is."""
        values = {section: dict(keys) for section, keys in self.values.items()}
        for name, value in settings.items():
            section, key = name.split("__")
            if value is not None:
                values.setdefault(section, {})[key] = list(value) if isinstance(value, tuple) else value
        return Config(values)

    def over(self, rest: Config) -> Config:
        """Return these settings, completed by those of `rest`."""
        sections = dict.fromkeys([*rest.values, *self.values])
        return Config({s: {**rest.values.get(s, {}), **self.values.get(s, {})} for s in sections})

    def toml(self, kind: str | None = None) -> str:
        """Return the settings as a TOML file, with a comment for each; what is not set stands there as a comment.

        Arguments:
            kind: of the source; settings of other kinds are left out.
        """
        lines = ["# Settings of `bnnp fit`. What is commented out is chosen from the data."]
        for section in SECTIONS:
            lines += ["", f"[{section}]"]
            for setting in SETTINGS:
                if setting.section == section and (kind is None or not setting.kinds or kind in setting.kinds):
                    value = self.get(setting.name)
                    shown = f"# {setting.key} = {setting.example}" if value is None else f"{setting.key} = {_toml(value)}"
                    lines.append(f"{shown:<44} # {setting.help}")
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain numbers, strings and lists."""
        plain: dict[str, Any] = json.loads(json.dumps(self.values))
        return plain


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml(k)} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # JSON leaves DEL as it is, and may name characters by surrogates; TOML allows neither.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else json.dumps(value)


def _checked(values: Any) -> tuple[dict[str, dict[str, Any]], list[tuple[str, str]]]:
    """Return the settings as they are used, and what is wrong with them by name."""
    checked: dict[str, dict[str, Any]] = {}
    problems: list[tuple[str, str]] = []
    for section, keys in values.items():
        if section not in SECTIONS:
            problems.append((section, f"Expected one of the sections {', '.join(SECTIONS)}. Got [{section}].{_near(section, SECTIONS)}"))
        elif not isinstance(keys, Mapping):
            problems.append((section, f"Expected a section, [{section}]. Got {keys!r}. Put settings below the section's name."))
        else:
            own = [setting.key for setting in SETTINGS if setting.section == section]
            for key, value in keys.items():
                name = f"{section}.{key}"
                if key not in own:
                    problems.append((name, f"Expected a setting of [{section}]: {', '.join(own)}. Got {key!r}.{_near(key, own)}"))
                    continue
                try:
                    checked.setdefault(section, {})[key] = BY_NAME[name].check(value)
                except ValueError as error:
                    problems.append((name, f"Expected {error}. Got {value!r}. For instance: {key} = {BY_NAME[name].example}"))
    return checked, problems


def _near(name: str, names: Any) -> str:
    """Return a hint where a known name is nearly the same."""
    near = difflib.get_close_matches(name.lower(), list(names), 1)
    return f" Did you mean {near[0]}?" if near else ""


def read_config(path: Any) -> Config:
    """Read and check a TOML file of settings.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it is no TOML, or settings are wrong; the message has a line for each mistake, with line and key.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a TOML file at {path}. Got {'a folder' if path.is_dir() else 'no such file'}. See: bnnp config")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        values = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: Expected a text in UTF-8. Got a byte that is none at position {error.start}.") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits is a plain ValueError
        raise ConfigError(f"{path}: Expected TOML. Got something else: {error}. See `bnnp config` for an example.") from None
    _, problems = _checked(values)
    if problems:
        lines = _lines(text)
        told = [f"{path}, line {lines.get(name) or lines.get(name.split('.')[0], '?')}, {name}: {words}" for name, words in problems]
        raise ConfigError("\n".join(told))
    return Config(values)


def _lines(text: str) -> dict[str, int]:
    """Return the line on which each section and setting stands; TOML's reader does not tell."""
    found: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if heading := re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line):
            section = _plain_key(heading[1])
            found.setdefault(section, number)
        elif key := re.match(r"\s*([\w\-.\"' ]+?)\s*=", line):
            name = _plain_key(key[1])
            found.setdefault(f"{section}.{name}" if section else name, number)
            for inner in re.findall(r"[{,]\s*([\w\-\"']+)\s*=", line) if not section else ():
                found.setdefault(f"{name}.{_plain_key(inner)}", number)
    return found


def _plain_key(key: str) -> str:
    return ".".join(part.strip().strip("\"'") for part in key.split("."))
