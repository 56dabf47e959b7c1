"""From records of single runs to tables: means and standard errors over tasks, differences to the amortised posterior, what was paid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bnnp.evaluation import mean_and_se

Record = dict[str, Any]
Table = dict[str, dict[str, dict[str, dict[str, Any]]]]

BASE = "amortised"
AS_IT_IS, INTEGRATED = "as it is", "last layer integrated out"
MIXED = 1.05
"""Chains whose R-hat is above this, in any monitored quantity, are said not to have mixed."""


def summarise(records: Mapping[tuple[str, str, str], Record], order: Sequence[str]) -> Table:
    """Return process -> prior -> row -> what is told of it.

    Arguments:
        records: by process, prior and row.
        order: of the rows.
    """
    table: Table = {}
    for process, prior, row in sorted(records, key=lambda key: order.index(key[2])):
        base = records.get((process, "learned", BASE))
        table.setdefault(process, {}).setdefault(prior, {})[row] = _row(records[process, prior, row], base)
    return table


def _row(record: Record, base: Record | None) -> dict[str, Any]:
    """Return one row; differences to the amortised posterior are paired over tasks."""
    if "failed" in record:
        return {"failed": record["failed"]}
    found: dict[str, Any] = {"chosen": record["chosen"]}
    for how, scores in record["scores"].items():
        found[how] = {name: list(mean_and_se(torch.tensor(values, dtype=torch.float64))) for name, values in scores.items()}
    if base is not None and "scores" in base:
        pairs = [torch.tensor(r["scores"][AS_IT_IS]["joint"], dtype=torch.float64) for r in (record, base)]
        found["ahead of amortised"] = list(mean_and_se(pairs[0] - pairs[1]))
    tasks = len(record["scores"][AS_IT_IS]["joint"])
    found |= {"seconds_per_task": record["seconds"] / tasks, "gradients": record["gradients"], "tasks": tasks}
    found["report"] = {name: _spread(values) for name, values in record["report"].items() if values}
    rhat = record["report"].get("rhat")
    if rhat and any(r == r for r in rhat):  # of one draw a chain there is none
        found["tasks_mixed"] = sum(r < MIXED for r in rhat)
    return found


def _spread(values: Sequence[float]) -> list[float | None]:
    """Return median and extremes over tasks; None for what is not finite."""
    tensor = torch.tensor([v for v in values if v == v], dtype=torch.float64)
    if not len(tensor):
        return [None, None, None]
    each = [
        float(tensor.quantile(0.5)) if bool(tensor.isfinite().all()) else float(tensor.median()),
        float(tensor.min()),
        float(tensor.max()),
    ]
    return [value if math.isfinite(value) else None for value in each]


def gains(table: Table, row: str = "NUTS") -> dict[str, dict[str, Any]]:
    """Return for each process how many times as long a row takes a task as the amortised posterior, and how far it is ahead for that."""
    found: dict[str, dict[str, Any]] = {}
    for process, priors in table.items():
        rows = priors.get("learned", {})
        if all(name in rows and "failed" not in rows[name] for name in (row, BASE)):
            seconds = [rows[name]["seconds_per_task"] for name in (row, BASE)]
            found[process] = {"seconds": seconds, "times": seconds[0] / seconds[1], "given up": rows[row]["ahead of amortised"]}
    return found


def overview(table: Table, score: str = "joint", how: str = AS_IT_IS) -> str:
    """Return one score of all engines under both priors; where the last layer is integrated out anyhow, that is what there is."""
    columns = [(process, prior) for process, priors in table.items() for prior in priors]
    names = list(dict.fromkeys(name for process, prior in columns for name in table[process][prior]))
    lines = ["| engine | " + " | ".join(f"{process}, {prior}" for process, prior in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in names:
        cells = []
        for process, prior in columns:
            row = table[process][prior].get(name)
            cells.append("" if row is None else "failed" if "failed" in row else pm(row.get(how, row[AS_IT_IS])[score]))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def tables(table: Table) -> str:
    """Return all tables as Markdown."""
    parts = ["## Joint log density per target, both priors\n", overview(table)]
    parts += ["## The same, with the last layer integrated out given each engine's draws of the hidden layers\n"]
    parts += [overview(table, how=INTEGRATED), "## CRPS, both priors (smaller is better)\n", overview(table, "crps")]
    told = gains(table)
    if told:
        parts.append("## What the amortised posterior saves, and what it gives up to NUTS\n")
        parts.append("| process | seconds a task: NUTS | amortised | times | joint log density given up |\n|---|---|---|---|---|")
        for process, of in told.items():
            nuts, own = of["seconds"]
            parts.append(f"| {process} | {nuts:.2g} | {own:.2g} | {of['times']:.0f} | {pm(of['given up'], signed=True)} |")
        parts.append("")
    for process, priors in table.items():
        parts.append(f"## {process}\n")
        for prior, rows in priors.items():
            parts += [f"### {prior} prior\n", _scores(rows), ""]
    return "\n".join(parts)


def _scores(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "| engine | joint log density | the same, last layer integrated out | less amortised | marginal log density | CRPS | RMSE "
        "| inside 80 % | seconds a task | gradients | R-hat: median, largest | tasks mixed |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "failed" in row:
            lines.append(f"| {name} | failed: {row['failed'].splitlines()[0][:80]} |" + " |" * 10)
            continue
        own, free = row[AS_IT_IS], row.get(INTEGRATED)
        rhat = row["report"].get("rhat")
        cells = [
            name,
            pm(own["joint"]),
            pm(free["joint"]) if free else "",
            pm(row["ahead of amortised"], signed=True) if "ahead of amortised" in row and name != BASE else "",
            pm(own["marginal"]),
            pm(own["crps"]),
            pm(own["rmse"]),
            f"{100 * own['inside_80'][0]:.0f}",
            f"{row['seconds_per_task']:.2g}",
            f"{row['gradients']}",
            f"{number(rhat[0])}, {number(rhat[2])}" if "tasks_mixed" in row else "",
            f"{row['tasks_mixed']} of {row['tasks']}" if "tasks_mixed" in row else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def number(value: float | None) -> str:
    """Return a number of a diagnostic, or that it is not finite."""
    return "not finite" if value is None else f"{value:.2f}"


def pm(pair: Sequence[float], signed: bool = False) -> str:
    """Return a mean and its standard error, with fewer digits where it is large."""
    mean, error = pair
    digits = 3 if abs(mean) < 9.9995 else 1 if abs(mean) < 999.95 else 0
    return f"{mean:{'+' if signed else ''}.{digits}f} ± {error:.{digits}f}"
