"""From scores and diagnostics of single tasks to tables: which diagnostic warns, of what, and how often for nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnnp.trust import HEAVY, SURPRISING
from experiments.trust.statistics import FloatArray, auc, mean, rank_correlation, share

FIELDS = (
    "log_evidence",
    "log_evidence_se",
    "elbo",
    "gap",
    "effective_sample_size",
    "pareto_k",
    "distance_x",
    "distance_y",
    "p_value_y",
)
# Larger means more alarming once multiplied by the sign.
SIGNS = {
    "pareto_k": 1,
    "gap": 1,
    "effective_sample_size": -1,
    "distance_x": 1,
    "distance_y": 1,
    "p_value_y": -1,
    "evidence_per_point": -1,
}
DIAGNOSTICS = (*SIGNS, "sentence")
SCORES = ("joint", "marginal")
COLLAPSE = 0.95  # quantile of the inside tasks' regret above which a score counts as collapsed
SEVERE = 0.5  # nats per target: a loss that matters, however near to the oracle a model comes inside

Records = Mapping[str, Mapping[str, Any]]


def warns(sentence: str) -> bool:
    """Say whether a sentence of `Posterior.diagnose` warns against the posterior; "Take care" is counted apart."""
    return sentence.startswith("Do not trust")


def values(record: Mapping[str, Any], name: str) -> FloatArray:
    """Return one diagnostic of the tasks of a record, as it is; the sentence as 1 where it warns.

    The log evidence per point is made here: `diagnose` gives that of all points together.
    """
    if name == "sentence":
        return np.array([float(warns(s)) for s in record["sentence"]])
    if name == "evidence_per_point":
        return np.array(record["log_evidence"], dtype=np.float64) / np.array(record["points"], dtype=np.float64)
    return np.array(record[name], dtype=np.float64)


def alarm(record: Mapping[str, Any], name: str) -> FloatArray:
    """Return one diagnostic so that larger is more alarming; where it has no value it counts as alarming."""
    found = SIGNS.get(name, 1) * values(record, name)
    return np.where(np.isnan(found), np.inf, found)


def regret(record: Mapping[str, Any], inside: Mapping[str, Any], score: str) -> FloatArray:
    """Return what the model loses per target, in nats: to the true process, or where that is not known to its own median inside."""
    reached = np.array(record[score], dtype=np.float64)
    oracle = np.array(record[f"oracle_{score}"], dtype=np.float64)
    return np.where(np.isnan(oracle), np.median(inside[score]), oracle) - reached


def inside_of(records: Records) -> Mapping[str, Any]:
    """Return the record of the inside tasks."""
    return next(record for record in records.values() if record["family"] == "inside")


def summarise(records: Records) -> dict[str, Any]:
    """Return all tables of one model.

    Arguments:
        records: kind -> measurements of its tasks, one of them of family "inside".

    Returns:
        `kinds`: kind -> regret, shares of collapsed and severe scores, share of warning sentences, medians, areas for membership and rank
        correlations with the regret; `pooled`: score -> areas for bad scores and rank correlations over all kinds.
        Every estimate is a pair (value, standard error).
    """
    inside = inside_of(records)
    limits = {score: float(np.quantile(regret(inside, inside, score), COLLAPSE)) for score in SCORES}
    by_kind = {kind: _kind_table(record, inside, limits) for kind, record in records.items()}
    return {
        "tasks": sum(len(record["joint"]) for record in records.values()),
        "collapse_above": limits,
        "kinds": by_kind,
        "pooled": {score: _pooled(records, inside, score, limits[score]) for score in SCORES},
        "missing": {name: int(sum(np.isnan(values(r, name)).sum() for r in records.values())) for name in SIGNS},
    }


def _kind_table(record: Mapping[str, Any], inside: Mapping[str, Any], limits: Mapping[str, float]) -> dict[str, Any]:
    lost = {score: regret(record, inside, score) for score in SCORES}
    found: dict[str, Any] = {
        "family": record["family"],
        "tasks": len(record["joint"]),
        "score": {score: mean(np.array(record[score])) for score in SCORES},
        "regret": {score: mean(lost[score]) for score in SCORES},
        "median_regret": {score: float(np.median(lost[score])) for score in SCORES},
        "collapsed": {score: share(lost[score] > limits[score]) for score in SCORES},
        "severe": {score: share(lost[score] > SEVERE) for score in SCORES},
        "warned": share(values(record, "sentence") > 0),
        "take_care": share(_told_to_take_care(record)),
        "heavy_weights": share(values(record, "pareto_k") > HEAVY),
        "unlikely_outputs": share(values(record, "p_value_y") < SURPRISING),
        "median": {name: _median(values(record, name)) for name in SIGNS},
        "rank_correlation": {name: rank_correlation(alarm(record, name), lost["joint"]) for name in DIAGNOSTICS},
    }
    if record is not inside:
        found["auc"] = {name: auc(alarm(record, name), alarm(inside, name)) for name in DIAGNOSTICS}
    return found


def _told_to_take_care(record: Mapping[str, Any]) -> NDArray[np.bool_]:
    return np.array([sentence.startswith("Take care") for sentence in record["sentence"]])


def _median(x: FloatArray) -> float:
    """Return the median of what has a value, NaN for none."""
    known = x[~np.isnan(x)]
    return float(np.median(known)) if len(known) else float("nan")


def _pooled(records: Records, inside: Mapping[str, Any], score: str, limit: float) -> dict[str, Any]:
    """Return areas for membership and for two readings of a bad score, rank correlations, and what the sentence does."""
    lost = np.concatenate([regret(record, inside, score) for record in records.values()])
    outside = np.concatenate([np.full(len(record["joint"]), record["family"] != "inside") for record in records.values()])
    alarms = {name: np.concatenate([alarm(record, name) for record in records.values()]) for name in DIAGNOSTICS}
    warned = alarms["sentence"] > 0
    careful = np.concatenate([_told_to_take_care(record) for record in records.values()])
    found: dict[str, Any] = {
        "membership": {name: auc(a[outside], a[~outside]) for name, a in alarms.items()},
        "rank_correlation": {name: rank_correlation(a, lost) for name, a in alarms.items()},
        "rank_correlation_outside": {name: rank_correlation(a[outside], lost[outside]) for name, a in alarms.items()},
        "sentence": {
            "inside, warned (false alarms)": share(warned[~outside]),
            "inside, told to take care": share(careful[~outside]),
            "outside, warned": share(warned[outside]),
            "outside, told to take care": share(careful[outside]),
        },
    }
    for reading, edge in (("collapse", limit), ("severe", SEVERE)):
        bad = lost > edge
        found[reading] = {name: auc(a[bad], a[~bad]) for name, a in alarms.items()}
        found[f"{reading}_outside"] = {name: auc(a[bad & outside], a[~bad & outside]) for name, a in alarms.items()}
        found["sentence"] |= {
            f"outside with regret above {edge:.3g}, warned": share(warned[outside & bad]),
            f"outside with regret up to {edge:.3g}, warned": share(warned[outside & ~bad]),
            f"warned, with regret above {edge:.3g}": share(bad[warned]),
            f"not warned, with regret above {edge:.3g}": share(bad[~warned]),
        }
    return found


def check_table(by_number: Mapping[str, Records]) -> dict[str, Any]:
    """Return the areas for membership and for a collapse, pooled, and medians inside, for each number of particles."""
    found = {}
    for number, records in by_number.items():
        table, inside = summarise(records), inside_of(records)
        pooled = table["pooled"]["joint"]
        found[number] = {
            "tasks": table["tasks"],
            "membership": pooled["membership"],
            "collapse": pooled["collapse"],
            "severe": pooled["severe"],
            "median_inside": table["kinds"][next(k for k, r in records.items() if r is inside)]["median"],
            "false_alarms": pooled["sentence"]["inside, warned (false alarms)"],
            "warned_outside": pooled["sentence"]["outside, warned"],
            "take_care_inside": pooled["sentence"]["inside, told to take care"],
            "heavy_weights_inside": share(values(inside, "pareto_k") > HEAVY),
            "regret_inside": mean(regret(inside, inside, "joint")),
        }
    return found


def text(report: Mapping[str, Any]) -> str:
    """Return the tables as text for the README: one row for each kind of task, one table for each model."""
    parts = []
    for name, table in report.items():
        rows = [("kind of task", "regret", "collapsed", "severe", "warned", *(n.replace("_", " ") for n in DIAGNOSTICS[:-1]))]
        for kind, row in table["kinds"].items():
            areas = [pair(row["auc"][n]) for n in DIAGNOSTICS[:-1]] if "auc" in row else ["" for _ in DIAGNOSTICS[:-1]]
            bad = (percent(row[reading]["joint"]) for reading in ("collapsed", "severe"))
            rows.append((kind, pair(row["regret"]["joint"], 3), *bad, percent(row["warned"]), *areas))
        edge = table["collapse_above"]["joint"]
        heading = f"{name}, {table['tasks']} tasks, collapsed above {edge:.3g}, severe above {SEVERE}; area for outside against inside"
        parts += [heading, _table(rows)]
        for score in SCORES:
            pooled = table["pooled"][score]
            lines = [line for line in pooled if line != "sentence"]
            rows = [(f"all kinds, {score} score", *(n.replace("_", " ") for n in DIAGNOSTICS))]
            rows += [(line.replace("_", " "), *(pair(pooled[line][n]) for n in DIAGNOSTICS)) for line in lines]
            parts += [_table(rows), "\n".join(f"{percent(v)} {k}" for k, v in pooled["sentence"].items())]
    return "\n\n".join(parts)


def pair(estimate: Sequence[float], digits: int = 2) -> str:
    """Return "value ± error"."""
    value, error = estimate
    return "none" if np.isnan(value) else f"{value:.{digits}f} ± {error:.{digits}f}"


def percent(estimate: Sequence[float]) -> str:
    """Return "value ± error %"."""
    value, error = estimate
    digits = 1 if 0.0 < min(value, 1.0 - value) < 0.1 else 0
    return "none" if np.isnan(value) else f"{100 * value:.{digits}f} ± {100 * error:.{digits}f} %"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
