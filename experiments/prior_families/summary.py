"""From the records of single runs to tables: scores with standard errors over tasks, costs, and what is left at equal time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Record = dict[str, Any]
Key = tuple[str, str, str, int]  # problem, net, prior, seed
FloatArray = NDArray[np.float64]
KINDS = ("joint", "marginal")
BASE = "shared"  # what the others are compared with
FIXED = "fixed"


def estimate(values: FloatArray) -> list[float]:
    """Return the mean over tasks and its standard error, for values with shape (tasks,)."""
    return [float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan]


def _per_task(runs: Sequence[Record], condition: str, kind: str) -> FloatArray:
    """Return one score for each task, the mean over the seeds."""
    return np.mean([run["scores"][condition][kind] for run in runs], axis=0)


def at_time(curve: Sequence[Sequence[float]], seconds: float) -> float:
    """Return the best validation score that a run had reached after so many seconds, NaN if none was taken by then."""
    known = [score for _, t, score in curve if t <= seconds]
    return max(known, default=math.nan)


def summarise(records: Mapping[Key, Record], references: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return problem -> tables.

    Arguments:
        records: what was measured.
        references: problem -> scores of oracle and rivals, and the energy distance of two sets of true functions.

    Returns:
        For each problem `references` (name -> kind -> condition -> [mean, standard error]), `same` (that energy distance), and `nets`:
        width -> prior -> its row, see `_row`.
    """
    found: dict[str, Any] = {}
    for problem, known in references.items():
        nets: dict[str, Any] = {}
        for net in dict.fromkeys(n for p, n, _, _ in records if p == problem):
            runs: dict[str, list[Record]] = {}
            for (p, n, prior, _), record in sorted(records.items(), key=lambda item: item[0][3]):
                if (p, n) == (problem, net):
                    runs.setdefault(prior, []).append(record)
            order = list(dict.fromkeys(prior for p, n, prior, _ in records if (p, n) == (problem, net)))
            nets[net] = {prior: _row(prior, runs) for prior in order}
        scores = {
            name: {kind: {c: estimate(np.array(both[kind])) for c, both in of.items()} for kind in KINDS}
            for name, of in known["scores"].items()
        }
        found[problem] = {"references": scores, "same": known["energy_distance"], "nets": nets}
    return found


def _row(prior: str, runs: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """Return what is known of one prior in one net on one problem.

    `joint`, `marginal` and `inside_80`: condition -> [mean, standard error over tasks], seeds averaged for each task; `seeds`:
    condition -> joint score of each seed; `less_base`: condition -> the paired difference in joint score to `BASE`; `step_ms`,
    `train_seconds`: processor time; `numbers`: learned; `validation`, `validation_at_equal_time`: means over seeds, the time being
    that of the fastest learned prior; `energy_distance`: mean over seeds.
    """
    own = [run for run in runs[prior] if "failed" not in run]
    row: dict[str, Any] = {"runs": len(runs[prior]), "failed": [run["failed"] for run in runs[prior] if "failed" in run]}
    if not own:
        return row
    conditions = list(own[0]["scores"])
    for kind in (*KINDS, "inside_80"):
        row[kind] = {c: estimate(_per_task(own, c, kind)) for c in conditions}
    row["seeds"] = {c: [float(np.mean(run["scores"][c]["joint"])) for run in own] for c in conditions}
    base = [run for run in runs.get(BASE, []) if "failed" not in run]
    if base:
        row["less_base"] = {c: estimate(_per_task(own, c, "joint") - _per_task(base, c, "joint")) for c in conditions}
    learned = [run["seconds"] for name, of in runs.items() if name != FIXED for run in of if "failed" not in run]
    limit = min(learned, default=math.nan)
    means = {
        "step_ms": [1e3 * run["step_seconds"] for run in own],
        "train_seconds": [run["seconds"] for run in own],
        "numbers": [run["numbers"] for run in own],
        "validation": [run["validation"] for run in own],
        "validation_at_equal_time": [at_time(run["curve"], limit) for run in own],
        "energy_distance": [run["energy_distance"] for run in own],
        "noise_std": [run["noise_std"][0] for run in own],
        "skipped": [run["skipped"] for run in own],
    }
    return {**row, "equal_seconds": limit, **{key: float(np.mean(values)) for key, values in means.items()}}


def overview(table: Mapping[str, Any], net: str) -> dict[str, dict[str, Any]]:
    """Return prior -> problem -> the paired difference in joint score to `BASE`, the mean over the conditions, with the larger error.

    The same tasks are scored in every condition, so that averaging does not make the error smaller.
    """
    found: dict[str, dict[str, Any]] = {}
    for problem, of in table.items():
        for prior, row in of["nets"].get(net, {}).items():
            if "less_base" in row:
                pairs = np.array(list(row["less_base"].values()))
                found.setdefault(prior, {})[problem] = [float(pairs[:, 0].mean()), float(pairs[:, 1].max())]
    return found


def rate_scores(records: Mapping[tuple[str, str, int, float], Record]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return problem -> prior -> learning rate -> the best validation score, the mean over seeds; None where training failed.

    Arguments:
        records: of (problem, prior, seed, learning rate).
    """
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for problem, prior, _, rate in sorted(records, key=lambda key: key[3]):
        scores = [r.get("validation") for (p, q, _, t), r in records.items() if (p, q, t) == (problem, prior, rate)]
        row = found.setdefault(problem, {}).setdefault(prior, {})
        row[str(rate)] = None if any(score is None for score in scores) else float(np.mean(np.array(scores, dtype=np.float64)))
    return found


# --- words -----------------------------------------------------------------------------------------------------------


def _pair(pair: Sequence[float] | None, sign: str = "") -> str:
    return "" if pair is None else f"{pair[0]:{sign}.3f} ± {pair[1]:.3f}"


def _number(value: float | None, pattern: str) -> str:
    return "" if value is None or math.isnan(value) else pattern.format(value)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def problem_table(of: Mapping[str, Any], net: str) -> str:
    """Return the table of one problem and one net as Markdown."""
    rows_of = of["nets"][net]
    conditions = next(list(row["joint"]) for row in rows_of.values() if "joint" in row)
    head = ["prior", *(f"{kind}, {c}" for kind in KINDS for c in conditions), "between seeds", "inside 80 %", "energy distance"]
    head += ["validation", "at equal time", "learned numbers", "ms a step"]
    rows = []
    for prior, row in rows_of.items():
        if "joint" not in row:
            rows.append([f"`{prior}`", "failed", *[""] * (len(head) - 2)])
            continue
        seeds = row["seeds"].values()
        name = f"`{prior}`" + (f" ({len(row['failed'])} of {row['runs']} failed)" if row["failed"] else "")
        cells = [name, *(_pair(row[kind][c]) for kind in KINDS for c in conditions)]
        cells += [f"{max(max(s) - min(s) for s in seeds):.3f}" if all(len(s) > 1 for s in seeds) else ""]
        cells += [" / ".join(f"{100 * row['inside_80'][c][0]:.0f}" for c in conditions), _number(row["energy_distance"], "{:.3f}")]
        cells += [_number(row["validation"], "{:.3f}"), _number(row["validation_at_equal_time"], "{:.3f}")]
        rows.append([*cells, f"{row['numbers']:,.0f}", f"{row['step_ms']:.1f}"])
    for name, scores in of["references"].items():
        rows.append([name, *(_pair(scores[kind][c]) for kind in KINDS for c in conditions), *[""] * (len(head) - 5)])
    return _markdown(head, rows)


def overview_table(table: Mapping[str, Any], net: str) -> str:
    """Return `overview` as Markdown, with the cost of each prior beside it."""
    problems = [problem for problem, of in table.items() if net in of["nets"]]
    found = overview(table, net)
    head = ["prior", *problems, f"ms a step, `{BASE}` = 1", f"learned numbers, `{BASE}` = 1"]
    rows = []
    for prior, of in found.items():
        ratios = []
        for key in ("step_ms", "numbers"):
            values = [table[p]["nets"][net][prior][key] / table[p]["nets"][net][BASE][key] for p in of if table[p]["nets"][net][BASE][key]]
            ratios.append(f"{np.exp(np.mean(np.log(values))):.2g}" if values and min(values) > 0 else "0")
        rows.append([f"`{prior}`", *("failed" if p not in of else "0" if prior == BASE else _pair(of[p], "+") for p in problems), *ratios])
    return _markdown(head, rows)


def tables(table: Mapping[str, Any]) -> str:
    """Return all tables as Markdown."""
    nets = list(dict.fromkeys(net for of in table.values() for net in of["nets"]))
    parts = []
    for net in nets:
        parts.append(f"## Width {net}: joint log density per target, less that of `{BASE}`\n\n{overview_table(table, net)}")
        for problem, of in table.items():
            if net in of["nets"]:
                same = f"Two sets of true functions are at an energy distance of {of['same']:.3f}."
                parts.append(f"### {problem}, width {net}\n\n{problem_table(of, net)}\n\n{same}")
    return "\n\n".join(parts) + "\n"


def rate_table(found: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> str:
    """Return what `rate_scores` found as Markdown, nothing where there is nothing."""
    parts = []
    for problem, rows in found.items():
        rates = sorted({rate for row in rows.values() for rate in row}, key=float)
        cells = [[f"`{prior}`", *(_number(row.get(rate), "{:.3f}") for rate in rates)] for prior, row in rows.items()]
        parts.append(f"\n## {problem}: validation score at other learning rates\n\n{_markdown(['prior', *rates], cells)}\n")
    return "".join(parts)
