"""From the records of single trainings to the scores of methods: what was chosen, and how well it does on the test."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["METHODS", "RIVALS", "SCORES", "mean_se", "summarise", "text"]

SCORES = ("joint", "marginal", "rmse")
RIVALS = ("mean of tasks", "Gaussian process")
KINDS = ("fraction", "shrunk", "either")
METHODS = ("fixed", "learned", *(f"{kind}, chosen" for kind in KINDS), *(f"{kind}, in hindsight" for kind in KINDS[:2]))
"""Fraction and shrinkage are chosen on held-out tasks, for each collection; in hindsight, one is best on the test over all seeds."""


def mean_se(values: list[float]) -> tuple[float, float]:
    """Return the mean over seeds and its standard error."""
    array = np.array(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else math.nan


def family(name: str) -> tuple[str, ...]:
    """Return the families that a candidate belongs to: no fraction and all of it, endless and no shrinkage are the ends of both."""
    if name in ("fixed", "learned"):
        return KINDS
    return ("fraction" if name.startswith("fraction") else "shrunk", "either")


def summarise(found: Mapping[Any, dict[str, Any]], config: dict[str, Any]) -> dict[str, Any]:
    """Return a report: source -> group -> scores of candidates and methods on each test, one value for each seed.

    Arguments:
        found: records by job, of all seeds.
        config: settings of the study.
    """
    report: dict[str, Any] = {}
    for source, group in dict.fromkeys((job.source, job.group) for job in found):
        report.setdefault(source, {})[group] = _group({j: r for j, r in found.items() if (j.source, j.group) == (source, group)})
    oracles = {job.source: record for job, record in found.items() if job.candidate == "oracle"}
    for source, record in oracles.items():
        report[source]["oracle"] = {score: float(np.mean(record["test"]["test"][score])) for score in SCORES}
    report["cpu_seconds"] = sum(record["cpu_seconds"] for record in found.values())
    report["trainings"] = sum("divergence" in record for record in found.values())
    return report


def _group(found: Mapping[Any, dict[str, Any]]) -> dict[str, Any]:
    """Return the report of one collection size or variant."""
    seeds = sorted({job.seed for job in found})
    names = list(dict.fromkeys(job.candidate for job in found if job.candidate not in (*RIVALS, "oracle")))
    tests = list(dict.fromkeys(name for record in found.values() for name in record.get("test", {})))
    validation: dict[str, list[float]] = {name: [] for name in names}
    scores: dict[str, dict[str, dict[str, list[float]]]] = {}
    divergence: dict[str, list[float]] = {name: [] for name in names}
    for name in [*names, *RIVALS]:
        scores[name] = {test: {score: [] for score in SCORES} for test in tests}
        for seed in seeds:
            own = [record for job, record in found.items() if job.candidate == name and job.seed == seed]
            held_out = [value for record in own for value in record.get("validation", {}).get("joint", [])]
            last = [record for record in own if "test" in record]
            if name in validation:
                validation[name].append(float(np.mean(held_out)) if held_out else -math.inf)
                divergence[name].append(last[0]["divergence"])
            for test in tests:
                for score in SCORES:
                    scores[name][test][score].append(float(np.mean(last[0]["test"][test][score])))
    chosen = {
        kind: [max((n for n in names if kind in family(n)), key=lambda n, i=i: validation[n][i]) for i in range(len(seeds))]
        for kind in KINDS
    }
    best = {
        kind: max((n for n in names if kind in family(n)), key=lambda n: float(np.mean([scores[n][t]["joint"] for t in tests])))
        for kind in KINDS
    }
    for kind in KINDS:
        scores[f"{kind}, chosen"] = {
            test: {score: [scores[name][test][score][i] for i, name in enumerate(chosen[kind])] for score in SCORES} for test in tests
        }
        scores[f"{kind}, in hindsight"] = scores[best[kind]]
    return {"validation": validation, "scores": scores, "divergence": divergence, "chosen": chosen, "hindsight": best, "seeds": seeds}


def _compared(group: dict[str, Any], a: str, b: str, score: str = "joint") -> tuple[float, float]:
    """Return how far a method is ahead of another, mean over seeds and standard error, seed by seed; over all tests."""
    tests = group["scores"][a]
    each = [
        float(np.mean([group["scores"][a][t][score][i] - group["scores"][b][t][score][i] for t in tests]))
        for i in range(len(group["seeds"]))
    ]
    return mean_se(each)


def text(report: dict[str, Any]) -> str:
    """Return the tables of the README."""
    lines = [f"{report['trainings']} trainings, {report['cpu_seconds'] / 60:.0f} minutes of one core in all"]
    for source, groups in report.items():
        if not isinstance(groups, dict):
            continue
        sized = {name: group for name, group in groups.items() if name != "oracle"}
        for test in dict.fromkeys(t for group in sized.values() for t in group["scores"]["fixed"]):
            for score in SCORES:
                lines += ["", f"{source}{'' if test == 'test' else ', ' + test}: {score}", "", "| method | " + " | ".join(sized) + " |"]
                lines.append("|---|" + "---|" * len(sized))
                for method in (*METHODS, *RIVALS):
                    cells = [_cell(group["scores"][method][test][score]) for group in sized.values()]
                    lines.append(f"| {method} | " + " | ".join(cells) + " |")
                if "oracle" in groups:
                    lines.append("| exact posterior | " + " | ".join([f"{groups['oracle'][score]:.3f}"] * len(sized)) + " |")
        lines += [
            "",
            f"{source}: chosen",
            "",
            "| collection | fractions | shrinkages | in hindsight | shrunk - fraction | shrunk - best fraction |",
        ]
        lines.append("|---|---|---|---|---|---|")
        for name, group in sized.items():
            own = [", ".join(_short(n) for n in group["chosen"][kind]) for kind in ("fraction", "shrunk")]
            ahead = [_compared(group, "shrunk, chosen", other) for other in ("fraction, chosen", "fraction, in hindsight")]
            best = f"{_short(group['hindsight']['fraction'])}; {_short(group['hindsight']['shrunk'])}"
            lines.append(f"| {name} | {own[0]} | {own[1]} | {best} | " + " | ".join(f"{m:+.3f} ± {se:.3f}" for m, se in ahead) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    mean, se = mean_se(values)
    return f"{mean:.0f} ± {se:.0f}" if abs(mean) >= 20 else f"{mean:.3f} ± {se:.3f}"


def _short(name: str) -> str:
    return name.removeprefix("fraction ").removeprefix("shrinkage ")
