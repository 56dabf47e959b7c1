"""What commands share: arguments that take several words, errors as one line and an exit code, and tables for people."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bnnp.config import Config, ConfigError, read_config
from bnnp.evaluation import Evaluation
from bnnp.training import TrainingError

__all__ = ["DONE", "FAILED", "FAULT", "STOPPED", "WRONG", "ask", "expanded", "give", "numbers", "quoted", "settings_from", "table", "told"]

DONE, FAILED, WRONG, FAULT, STOPPED = 0, 1, 2, 70, 130
NARROWEST = 100  # columns of text in a file or pipe, and at least in a terminal: a cut number is worse than a wrapped line
SEVERAL = {"--task", "--inputs", "--outputs", "--leads", "--names", "--quantiles", "--shares", "--set"}
"""Options that take all words up to the next option."""


def expanded(words: Sequence[str]) -> list[str]:
    """Return arguments with each of several words of an option behind an option of its own: --inputs a b as --inputs a --inputs b.

    A word that is the name of a file, with a dot or a slash in it, ends the row, so that `--inputs a b data.csv` is understood.
    """
    result: list[str] = []
    words = list(words)
    while words:
        word = words.pop(0)
        if word not in SEVERAL:
            result.append(word)
            continue
        first = True
        while words and not (words[0].startswith("-") and len(words[0]) > 1) and (first or not _is_file(words[0])):
            result += [word, words.pop(0)]
            first = False
        if first:
            result.append(word)  # nothing follows: let the parser complain
    return result


def _is_file(word: str) -> bool:
    return ("." in word or os.sep in word) and Path(word).exists()


@contextmanager
def told(as_json: bool = False, stopped: str = "Stopped.", folder: Path | None = None) -> Iterator[None]:
    """Turn what goes wrong into one message and an exit code; a fault of the program itself says so.

    Arguments:
        as_json: print the message as JSON too.
        stopped: what to say after Ctrl-C.
        folder: of a run that can be gone on with, once there is a record in it.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        again = f" Go on with: bnnp resume {quoted(folder)}" if folder is not None and (folder / "run.json").exists() else ""
        _say("Stopped", f"\n{stopped}{again}", as_json)
        raise typer.Exit(STOPPED) from None
    except BrokenPipeError:  # whoever read our output has seen enough
        sys.stdout = open(os.devnull, "w")
        raise typer.Exit(DONE) from None
    except (ValueError, FileNotFoundError, TypeError) as error:
        if not _ours(error) and os.environ.get("BNNP_DEBUG"):
            raise
        _say(type(error).__name__, str(error), as_json)
        raise typer.Exit(WRONG if _ours(error) or not isinstance(error, TypeError) else FAULT) from None
    except (ImportError, OSError, TrainingError, RuntimeError, MemoryError) as error:
        if os.environ.get("BNNP_DEBUG"):
            raise
        _say(type(error).__name__, str(error) or "not enough memory", as_json)
        raise typer.Exit(FAILED) from None
    except Exception as error:
        if os.environ.get("BNNP_DEBUG"):
            raise
        words = f"{error}. This is a fault of the program, not of your data: please report it, with what BNNP_DEBUG=1 prints."
        _say(type(error).__name__, words, as_json)
        raise typer.Exit(FAULT) from None


def quoted(path: Path | str | None) -> str:
    """Return a path as a shell takes it."""
    return shlex.quote(str(path))


def _ours(error: BaseException) -> bool:
    return isinstance(error, ConfigError) or "Expected" in str(error)


def _say(kind: str, words: str, as_json: bool) -> None:
    typer.echo(words if kind == "Stopped" else f"{kind}: {words}", err=True)
    if as_json:
        typer.echo(json.dumps({"error": words.strip(), "type": kind}))


def give(as_json: bool, value: Any, show: Callable[[], None]) -> None:
    """Print a result: as JSON, or for people."""
    if as_json:
        typer.echo(json.dumps(_plain(value), indent=1, default=str))
    else:
        show()


def _plain(value: Any) -> Any:
    """Return what JSON can hold: it knows no NaN, and no numbers of NumPy."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _Quiet(Console):
    """Go on without a word where whoever read our output has seen enough: what is under way is not less wanted."""

    def on_broken_pipe(self) -> None:
        """Print to nowhere from here on."""
        self.quiet = True
        sys.stdout = open(os.devnull, "w")


def ask() -> Console:
    """Return where results for people go."""
    return _Quiet(highlight=False, width=max(Console().width, NARROWEST))


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    drawn = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name, *cells in zip(header, *rows, strict=True):
        drawn.add_column(escape(name), justify="left" if any(cell[:1].isalpha() for cell in cells) else "right", overflow="fold")
    for row in rows:
        drawn.add_row(*map(escape, row))
    ask().print(drawn)


SHOWN = ("joint_log_density", "marginal_log_density", "rmse", "crps", "accuracy", "brier", "coverage_0.5", "coverage_0.8", "coverage_0.95")


def numbers(found: Mapping[float, Evaluation]) -> tuple[list[str], list[list[str]]]:
    """Return scores as a header and rows: one for each score, a column for each share of context."""
    first = next(iter(found.values())).summary
    rows = []
    for name in (name for name in SHOWN if name in first):
        cells = [found[share].summary[name] for share in found]
        rows.append([name.replace("_", " "), *(f"{mean:.4g} ± {_error(se)}" for mean, se in cells)])
    return ["score", *(f"{100 * share:g} % seen" for share in found)], rows


def _error(se: float) -> str:
    return f"{se:.2g}" if math.isfinite(se) else "?"


def settings_from(path: Path | None, said: Sequence[str] | None, **flags: Any) -> Config:
    """Return settings: those of a file, over them KEY=VALUE, over them flags.

    Raises:
        ConfigError: a mistake in any of them.
    """
    config = Config() if path is None else read_config(path)
    for word in said or ():
        key, sign, value = word.partition("=")
        if not sign or "." not in key:
            raise ConfigError(f"--set: Expected section.key=value, such as training.steps=500. Got {word!r}.")
        config = _set(config, key.strip(), value.strip())
    for name, value in flags.items():
        if value is not None:
            config = config.replace(**{name: value})
    return config


def _set(config: Config, name: str, value: str) -> Config:
    try:
        read = tomllib.loads(f"x = {value}")["x"]
    except (ValueError, RecursionError):
        read = value  # a word without quotes
    section, _, key = name.partition(".")
    return Config({section: {key: read}}).over(config)
