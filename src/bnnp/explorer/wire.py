"""What comes from a page: plain JSON, checked value by value before anything else sees it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

__all__ = ["EXACT", "Array", "flag", "index", "number", "one_of", "parse", "plain", "rows", "shown", "text", "whole"]

EXACT = 17
"""Digits with which a number comes back as it was: a page tells points apart by their inputs."""

Array = np.ndarray[Any, np.dtype[np.float64]]


def parse(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a request.

    Raises:
        ValueError: it is no JSON object, or holds NaN or an infinity, which JSON has not.
    """
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"Expected a JSON object. Got {len(body)} bytes that are none: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"Expected a JSON object. Got {type(found).__name__}.")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"Expected finite numbers. Got {name}.")


def number(body: Mapping[str, Any], key: str, low: float = -math.inf, high: float = math.inf, default: float | None = None) -> float:
    """Return a finite number from a request, between bounds."""
    value = body.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value) or not low <= value <= high:
        span = "" if math.isinf(low) and math.isinf(high) else f" from {low:g} to {high:g}"
        raise ValueError(f"Expected {key} as a number{span}. Got {shown(value)}.")
    return float(value)


def whole(body: Mapping[str, Any], key: str, low: int, high: int, default: int | None = None) -> int:
    """Return a whole number from a request, between bounds."""
    value = body.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"Expected {key} as a whole number from {low} to {high}. Got {shown(value)}.")
    return value


def index(body: Mapping[str, Any], key: str, count: int) -> int:
    """Return the number of something of which there are `count`."""
    if count == 0:
        raise ValueError(f"Expected {key} of something that is there. Got {shown(body.get(key))}, and there is nothing yet.")
    return whole(body, key, 0, count - 1)


def text(body: Mapping[str, Any], key: str, most: int = 200, default: str | None = None) -> str:
    """Return a short text from a request."""
    value = body.get(key, default)
    if not isinstance(value, str) or len(value) > most:
        raise ValueError(f"Expected {key} as a text of at most {most} characters. Got {shown(value)}.")
    return value


def one_of(body: Mapping[str, Any], key: str, known: tuple[str, ...], default: str | None = None) -> str:
    """Return one of some words."""
    value = body.get(key, default)
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"Expected {key} among {', '.join(known)}. Got {shown(value)}.")
    return value


def flag(body: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """Return true or false."""
    value = body.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"Expected {key} as true or false. Got {shown(value)}.")
    return value


def rows(value: Any, name: str, width: int, most: int, gaps: bool = False) -> Array:
    """Return a list of rows of `width` numbers as an array (n, width).

    Arguments:
        value: what came.
        name: of it, for messages.
        width: of a row.
        most: number of rows.
        gaps: null is allowed, and becomes NaN.
    """
    if not isinstance(value, list) or len(value) > most:
        size = f" of {len(value)}" if isinstance(value, list) else ""
        raise ValueError(f"Expected {name} as a list of at most {most} rows. Got {type(value).__name__}{size}.")
    found = np.empty((len(value), width))
    for i, row in enumerate(value):
        if not isinstance(row, list) or len(row) != width:
            raise ValueError(f"Expected row {i} of {name} as a list of {width} numbers. Got {shown(row)}.")
        for j, entry in enumerate(row):
            if entry is None and gaps:
                found[i, j] = np.nan
            elif isinstance(entry, bool) or not isinstance(entry, int | float) or not _finite(entry):
                raise ValueError(f"Expected a finite number in row {i} of {name}. Got {shown(entry)}.")
            else:
                found[i, j] = entry
    return found


def _finite(value: float) -> bool:
    """Tell whether a number is finite and no larger than the network's precision can hold."""
    return abs(value) < 1e30


def shown(value: Any) -> str:
    """Return a value as a message quotes it."""
    quoted = repr(value)
    return quoted if len(quoted) <= 60 else quoted[:57] + "..."


def plain(value: Any, digits: int = 6) -> Any:
    """Return an array or a number as JSON knows it, to so many digits; what is not finite becomes null.

    Example:
        >>> plain(np.array([[1.23456789, np.nan]])), plain(2.0)
        ([[1.23457, None]], 2.0)
    """
    if isinstance(value, np.ndarray):
        return [plain(v, digits) for v in value] if value.ndim > 1 else [_rounded(v, digits) for v in value.tolist()]
    return _rounded(float(value), digits)


def _rounded(value: float, digits: int) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None
