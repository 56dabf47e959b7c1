"""From records to the numbers that are told: divergences from the posterior with their errors, and whether estimates of evidence agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["divergence", "judge", "summarise", "tables"]

Record = Mapping[str, Any]
Key = tuple[str, float, int | None]
TOLERANCE = 3.0
"""Two estimates agree if they differ by less than so many standard errors of their difference, or by `SMALL`."""
SMALL = 0.1
UNSURE = 0.5
"""From this standard error of a logarithm on, the delta method that it comes from is no longer to be believed."""
BRIDGED = ", bridged"
"""What is added to the name of tempering where its particles are used for bridges between temperatures instead of mean weights."""

TOLD = ("value", "error", "pareto_k", "overlap", "bennett", "bennett_error", "stages", "ancestors")


def divergence(evidence: Record, rows: Sequence[Sequence[float]], errors: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return KL(q || p) = log evidence - bound, with shape (seeds, tasks), its mean, the standard error of that, and each seed's mean.

    The error is Monte Carlo's, of bounds and evidence, not that of having drawn these tasks. The evidence of a task is the same for all
    seeds, so its error does not shrink with them.
    """
    tasks, seeds = len(evidence["value"]), len(rows)
    kl = [[z - bound for z, bound in zip(evidence["value"], row, strict=True)] for row in rows]
    of_bounds = sum(e**2 for row in errors for e in row) / (tasks * seeds) ** 2
    error = math.sqrt(sum(e**2 for e in evidence["error"]) / tasks**2 + of_bounds)
    by_seed = [sum(row) / tasks for row in kl]
    return {"kl": kl, "mean": sum(by_seed) / seeds, "error": error, "by_seed": by_seed, "within_error": sum(by_seed) / seeds < 2 * error}


def judge(reference: Record, estimate: Record) -> dict[str, Any]:
    """Return how far an estimate lies from the reference, task by task, and on how many tasks they agree."""
    less = [a - b for a, b in zip(estimate["value"], reference["value"], strict=True)]
    spread = [math.hypot(a, b) for a, b in zip(estimate["error"], reference["error"], strict=True)]
    agree = [abs(d) < max(SMALL, TOLERANCE * s) for d, s in zip(less, spread, strict=True)]
    return {"less_reference": less, "spread": spread, "agree": sum(agree), "of": len(agree)}


def _single(record: Record) -> dict[str, Any]:
    """Return the record of an estimate, of which there is one row.

    A standard error of a logarithm cannot grow beyond that of one population that outweighs the others. From `UNSURE` on, the distance to
    what bridges make of the same particles stands in its place, where that is more.
    """
    kept = {key: record[key][0] for key in TOLD if record.get(key) is not None}
    if "bennett" in kept:
        pairs = zip(kept["value"], kept["error"], kept["bennett"], strict=True)
        kept["error"] = [error if error < UNSURE else max(error, abs(value - other)) for value, error, other in pairs]
    return {**kept, "seconds": record["seconds"]}


def _weighted(evidence: Record, own: Sequence[Record]) -> dict[str, Any] | None:
    """Return what is left between the evidence and its estimate by the importance weights of a method's draws, and the worst Pareto k."""
    if any("weighted" not in r for r in own):
        return None
    rows, errors, k = ([row for r in own for row in r[key]] for key in ("weighted", "weighted_error", "pareto_k"))
    found = divergence(evidence, rows, errors)
    return {"mean": found["mean"], "error": found["error"], "pareto_k": max(v for row in k for v in row)}


def _bridged(one: Mapping[str, Any]) -> dict[str, Any]:
    """Return the estimate that bridges between neighbouring temperatures make of the same particles."""
    return {"value": one["bennett"], "error": one["bennett_error"], "seconds": 0.0}


def reference(config: Mapping[str, Any], noise: float) -> str:
    """Return the name of the estimate that bounds are held against at this noise."""
    name: str = config.get("reference_at", {}).get(f"{noise:g}", config["reference"])
    return name


def summarise(records: Mapping[Key, Record], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return, by noise, the evidence, and by method and noise the divergence from the posterior.

    Arguments:
        records: by method, noise and seed.
        config: whose `reference` names the estimate of the evidence that bounds are held against.
    """
    estimators = [m for m, plan in config["methods"].items() if plan.get("evidence")]
    evidence: dict[str, Any] = {}
    for noise in config["noises"]:
        found = {m: _single(records[m, noise, None]) for m in estimators if (m, noise, None) in records}
        found = {**found, **{m + BRIDGED: _bridged(one) for m, one in found.items() if "bennett" in one}}
        name = reference(config, noise)
        if name in found:
            others = {m: judge(found[name], one) for m, one in found.items() if m != name}
            evidence[f"{noise:g}"] = {"reference": name, "estimates": found, "against_reference": others}
    methods: dict[str, Any] = {}
    for method, plan in config["methods"].items():
        if plan.get("evidence"):
            continue
        for noise in config["noises"]:
            own = [r for (m, at, _), r in sorted(records.items(), key=lambda kr: kr[0][2] or 0) if m == method and at == noise]
            if own and f"{noise:g}" in evidence:
                rows, errors = ([row for r in own for row in r[key]] for key in ("value", "error"))
                z = evidence[f"{noise:g}"]["estimates"][reference(config, noise)]
                row = {"bounds": rows, **divergence(z, rows, errors), "seconds": sum(r["seconds"] for r in own)}
                row["weighted"] = _weighted(z, own)
                row["bound_error"] = math.sqrt(sum(e**2 for of in errors for e in of)) / (len(rows) * len(rows[0]))
                methods.setdefault(method, {})[f"{noise:g}"] = row
    whole = {key: config[key] for key in ("noises", "tasks")}
    return {**whole, "evidence": evidence, "methods": methods}


def _number(value: float, error: float) -> str:
    digits = 2 if error < 1 else 1 if error < 10 else 0
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def tables(table: Mapping[str, Any]) -> str:
    """Return the tables in Markdown."""
    noises = [f"{n:g}" for n in sorted(table["noises"]) if f"{n:g}" in table["evidence"]]
    parts = ["# Tables\n", "KL(q || posterior) in nats, mean over tasks and seeds, ± the standard error of Monte Carlo:\n"]
    rows = []
    for method, of in table["methods"].items():
        cells = [_number(of[n]["mean"], of[n]["error"]) if n in of else "" for n in noises]
        rows.append([method, *cells, f"{sum(one['seconds'] for one in of.values()):.0f}"])
    parts.append(_table(["method", *noises, "seconds in all"], rows))
    parts.append(
        "What is left after importance weighting of a method's own draws, and in brackets the largest Pareto k (below 0.7: trust it):\n"
    )
    rows = []
    for method, of in table["methods"].items():
        cells = [of[n]["weighted"] if n in of else None for n in noises]
        rows.append([method, *("" if c is None else f"{_number(c['mean'], c['error'])} ({c['pareto_k']:.1f})" for c in cells)])
    parts.append(_table(["method", *noises], rows))
    for n in (n for n in noises if n in ("0.0346", "0.1")):
        parts.append(f"Noise {n}, task by task, one number for each seed:\n")
        numbers = list(range(1, table["tasks"] + 1))
        rows = []
        for method, of in table["methods"].items():
            if n in of:
                rows.append([method, *(", ".join(f"{row[i - 1]:.2f}" for row in of[n]["kl"]) for i in numbers)])
        parts.append(_table(["method", *(f"task {i}" for i in numbers)], rows))
    parts.append("Log evidence of each task, ± its standard error:\n")
    parts.append(_table(*_evidence_rows(table, noises)))
    return "\n".join(parts)


def _evidence_rows(table: Mapping[str, Any], noises: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for n in noises:
        of = table["evidence"][n]
        for method, one in of["estimates"].items():
            judged = of["against_reference"].get(method)
            told = "reference" if judged is None else f"{judged['agree']} of {judged['of']}"
            values = [_number(v, e) for v, e in zip(one["value"], one["error"], strict=True)]
            k = ", ".join(f"{v:.1f}" for v in one["pareto_k"]) if "pareto_k" in one else ""
            rows.append([n, method, *values, told, k, f"{one['seconds']:.0f}"])
    tasks = [f"task {i + 1}" for i in range(table["tasks"])]
    return ["noise", "estimate", *tasks, "agrees on", "Pareto k", "seconds"], rows
