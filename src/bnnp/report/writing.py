"""The report of a run: everything that a reader asks of a model, in the order in which it is asked."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bnnp import plots, plots_data
from bnnp.checkpoint import write_atomically
from bnnp.data.collection import Collection, Column, Description, Triple
from bnnp.evaluation import Model
from bnnp.linalg import NotPositiveDefiniteError
from bnnp.report.judging import BATCH, OWN, Case, Finding, Judged, Verdict, affordable, cases, compare, findings, judge, shares_of
from bnnp.report.page import Html, bullets, details, figure, number, page, paragraph, pre, section, table, uncertain
from bnnp.rivals import default_rivals, left_out
from bnnp.runs import RECORD, Run, read_record

__all__ = ["Report", "write_report"]

Progress = Callable[[str], None]
SCORES = {
    "joint_log_density": "joint log density",
    "marginal_log_density": "marginal log density",
    "rmse": "RMSE",
    "crps": "CRPS",
    "accuracy": "accuracy",
    "brier": "Brier score",
    "coverage_0.5": "in 50 %",
    "coverage_0.8": "in 80 %",
    "coverage_0.95": "in 95 %",
}
DIAGNOSED, DIAGNOSED_POINTS, PARTICLES = 10, 200, 128
LISTED = 8  # names in a list
MOST_DRAWN = 20_000  # targets in a picture


@dataclass(frozen=True)
class Report:
    """Hold what a report says.

    Arguments:
        path: of the page.
        scores: one row for each share of context, method and score: "share", "method", "score", "mean", "se".
        verdicts: how the model compares with the best rival.
        findings: what speaks against the model or the test, with advice.
        notes: what was left out or made smaller.
        test_tasks: how many were judged.
        seconds: that it took.
    """

    path: Path
    scores: tuple[dict[str, Any], ...]
    verdicts: tuple[Verdict, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    test_tasks: int
    seconds: float

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return the warnings alone."""
        return tuple(finding.warning for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain numbers, strings and lists; what is not finite becomes None."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(v) for key, v in value.items()}
            if isinstance(value, list | tuple):
                return [plain(v) for v in value]
            return None if isinstance(value, float) and not math.isfinite(value) else str(value) if isinstance(value, Path) else value

        found: dict[str, Any] = plain({**asdict(self), "warnings": self.warnings})
        return found


@dataclass(eq=False)
class _Facts:
    """Gather what the sections are written from."""

    run: Run
    train: Collection
    test: Collection
    known: Description
    records: list[dict[str, Any]]
    result: Mapping[str, Any]
    judged: list[Judged] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    found: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seed: int = 0
    num_samples: int = 64

    @property
    def middle(self) -> Judged:
        """Return what was judged with the middle size of context."""
        return self.judged[len(self.judged) // 2]


def write_report(
    run: Run,
    train: Collection,
    test: Collection,
    out: str | os.PathLike[str],
    *,
    context: Sequence[float] | None = None,
    seed: int = 0,
    num_samples: int = 64,
    max_tasks: int = 100,
    progress: Progress | None = None,
) -> Report:
    """Write one HTML page about a run: its data, its training, its scores beside those of rivals, and what to do next.

    Test tasks are cut at random into context and targets, at two or three sizes of context. The page is complete in itself and replaces an
    older one in one step.

    Arguments:
        run: the model, with what is known of its data.
        train: the tasks it was learned from; rivals learn from them too.
        test: tasks it has not seen.
        out: the file.
        context: shares of a task's points that are context; where not given, 2.5, 10 and 25 % of a grid, 5, 20 and 50 % of an image, 10, 30
            and 50 % of anything else.
        seed: of the choice of tasks, the cuts, and all draws.
        num_samples: particles.
        max_tasks: at most so many test tasks are judged, taken at random.
        progress: called with a few words at each stage.

    Returns:
        What the page says, as numbers and sentences.

    Raises:
        ValueError: there are no test tasks, no training tasks, or they do not have the columns of the model.
        OSError: the file cannot be written.
    """
    start, tell = time.monotonic(), progress or (lambda words: None)
    shares = _checked(run, train, test, context, max_tasks)
    facts = _Facts(run, train, test, train.describe(), *_training_of(run), seed=seed, num_samples=num_samples)
    tell("rivals")
    rivals = _rivals(facts)
    points = shares[len(shares) // 2] * float(np.median(test.sizes))
    most = min(max_tasks, affordable(run.model, points, num_samples))
    picked = np.sort(np.random.default_rng(seed).permutation(len(test))[:most])
    if len(picked) < len(test):
        facts.notes.append(f"{len(picked)} of {len(test)} test tasks were judged, taken at random, to save time.")
    for i, share in enumerate(shares):
        tell(f"scores with {100 * share:g} % seen")
        cut = cases(test, [int(p) for p in picked], share, i + 1, run.model, seed)
        if not cut:
            raise ValueError("Expected test tasks with at least 2 points that the model can be given. Got none.")
        facts.judged.append(judge(run.model, rivals, cut, share, num_samples, seed))
    _note_sizes(facts)
    for score in ("joint_log_density", "marginal_log_density"):
        facts.verdicts += [verdict for judged in facts.judged if (verdict := compare(judged, score)) is not None]
    tell("diagnoses")
    facts.found = findings(run.model, train, test, facts.judged, facts.verdicts, facts.records, _pareto(facts))
    tell("pictures")
    content = _page(facts)
    write_atomically(Path(out), content.encode())
    rows = [
        {"share": judged.share, "method": method, "score": score, "mean": mean, "se": se}
        for judged in facts.judged
        for method, found in judged.scores.items()
        for score, (mean, se) in found.summary.items()
    ]
    taken = time.monotonic() - start
    return Report(Path(out), tuple(rows), tuple(facts.verdicts), tuple(facts.found), tuple(facts.notes), len(facts.middle.cases), taken)


def _checked(run: Run, train: Collection, test: Collection, context: Sequence[float] | None, max_tasks: int) -> tuple[float, ...]:
    for name, tasks in (("training", train), ("test", test)):
        if len(tasks) == 0:
            raise ValueError(f"Expected {name} tasks. Got none. Hold out a part of the data, or give data of the same kind.")
        if (tasks.x_dim, tasks.y_dim) != (run.model.x_dim, run.model.y_dim):
            raise ValueError(
                f"Expected {name} tasks with {run.model.x_dim} inputs and {run.model.y_dim} outputs, as the model has. Got {tasks.x_dim} "
                f"and {tasks.y_dim}."
            )
    shares = tuple(sorted(float(share) for share in context)) if context is not None else shares_of(run.kind)
    if not shares or not all(0 <= share < 1 for share in shares):
        raise ValueError(f"Expected shares of context, each from 0 to below 1. Got {context}.")
    if max_tasks < 1:
        raise ValueError(f"Expected max_tasks of at least 1. Got {max_tasks}.")
    return shares


def _training_of(run: Run) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
    """Return the records of the training log and the result of the fit, as far as they are there."""
    if run.folder is None:
        return [], {}
    record = read_record(run.folder) if (run.folder / RECORD).is_file() else {}
    records = []
    for path in (run.folder / "fit" / "log.jsonl", run.folder / "log.jsonl"):
        if path.is_file():
            for line in path.read_text("utf-8").splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    continue  # a line that a killed process left half-written
                if isinstance(row, dict) and isinstance(row.get("step"), int):
                    records.append(row)
            break
    result = record.get("result")
    return records, result if isinstance(result, dict) else {}


def _rivals(facts: _Facts) -> dict[str, Model]:
    sentence = left_out(facts.run.model.likelihood)
    facts.notes += [sentence] if sentence else []
    try:
        with warnings.catch_warnings(action="ignore"):  # jitter that a rival needed is no concern of the reader's
            return default_rivals(facts.train, facts.seed, facts.run.model.likelihood)
    except NotPositiveDefiniteError as error:
        facts.notes.append(f"There are no rivals: one of them could not be fitted to the training tasks ({error}).")
        return {}


def _note_sizes(facts: _Facts) -> None:
    """Say which test tasks were left out, and where points were."""
    every = [case for judged in facts.judged for case in judged.cases]
    full = max(case.points for case in every)
    if any(case.thinned for case in every):
        facts.notes.append(
            f"Large tasks were thinned: at most 2,000 points of a context and 200 targets were used (the largest task has {full} points)."
        )
    for judged in facts.judged:
        facts.notes += [note for note in judged.notes if note not in facts.notes]
    if facts.test.ordered:
        facts.notes.append("Neighbouring test tasks resemble one another: standard errors take them as independent, and are too small.")


@torch.no_grad()
def _pareto(facts: _Facts) -> torch.Tensor | None:
    """Return Pareto k of the posteriors of some test tasks."""
    cut, model = facts.middle.cases[:DIAGNOSED], facts.run.model
    found = []
    for start in range(0, len(cut), BATCH):
        for case in cut[start : start + BATCH]:
            x, y, mask = (part[:DIAGNOSED_POINTS] for part in case.context)
            seen = mask if model.missing_outputs else None
            posterior = model.condition(x, y, mask=seen, num_samples=PARTICLES, seed=facts.seed)
            found.append(posterior.diagnose(facts.seed).pareto_k.double().cpu())
    return torch.stack(found) if found else None


def _page(facts: _Facts) -> str:
    outputs, inputs = _listed(facts.run.outputs), _listed(facts.run.inputs)
    title = f"Report: {outputs} from {inputs}"
    sections = [
        section("verdict", "In short", *_verdict(facts)),
        section("data", "The data", *_data(facts)),
        section("model", "The model", *_model(facts)),
        section("training", "Training", *_training(facts)),
        section("prior", "What the prior generates", *_prior(facts)),
        section("scores", "Scores on test tasks", *_scores(facts)),
        section("calibration", "Calibration", *_calibration(facts)),
        section("tasks", "Best and worst tasks", *_tasks(facts)),
        section("next", "What to do next", *_next(facts)),
    ]
    return page(title, Html(_asked(facts)), sections)


def _listed(columns: Sequence[Column | str]) -> str:
    names = [str(column) for column in columns]
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _asked(facts: _Facts) -> Html:
    run, source = facts.run, facts.run.data.get("path")
    where = f" The data are from {source}." if source else ""
    return paragraph(
        f"What was asked: learn from {len(facts.train)} tasks how {_listed(run.outputs)} depends on {_listed(run.inputs)}, so that a new "
        f"task is predicted, with its uncertainty, from a few of its points.{where}",
        kind="lead",
    )


def _verdict(facts: _Facts) -> list[Html]:
    parts = [
        Html(f'<div class="box {verdict.word}">{paragraph(verdict.sentence)}</div>')
        for verdict in facts.verdicts
        if verdict.score == "joint_log_density"
    ]
    if not facts.verdicts:
        parts.append(paragraph("There is no rival to compare with."))
    if facts.found:
        parts += [Html("<h3>Warnings</h3>")]
        parts += [Html(f'<div class="box warning">{paragraph(finding.warning)}</div>') for finding in facts.found]
    else:
        parts.append(paragraph("Nothing that was checked speaks against the model."))
    return parts


def _data(facts: _Facts) -> list[Html]:
    known, how = facts.known, facts.run.division.get("how")
    low, middle, high = known.points
    sizes = f"{low}" if low == high else f"{low} to {high} (median {middle:g})"
    rows = [
        [str(Column(row["name"], row["unit"])), side, *_range(row), missing]
        for side, columns in (("input", known.inputs), ("output", known.outputs))
        for row in columns
        for missing in [f"{100 * row['missing']:.3g} %" if row.get("missing") else "none"]
    ]
    parts = [
        paragraph(f"{len(facts.train)} training tasks of {sizes} points, and {len(facts.test)} test tasks."),
        table(["column", "", "smallest", "mean", "largest", "missing"], rows),
    ]
    if known.sampled < known.tasks:
        parts.append(paragraph(f"Ranges are those of {known.sampled} training tasks, evenly spaced.", kind="soft"))
    if how:
        parts.append(paragraph(f"What was held out was chosen {how}." if str(how).startswith("at random") else f"Held out: {how}."))
    # What was learned from the data at the fit, such as the day a date counts from, is only in its record: a second reading learns nothing.
    said = list(dict.fromkeys([*facts.run.data.get("notes", ()), *known.notes, *known.advice]))
    if said:
        parts += [Html("<h3>What was dropped, encoded or assumed</h3>"), bullets(said)]
    else:
        parts.append(paragraph("Nothing was dropped, encoded or assumed."))
    return [*parts, figure(plots_data.collection(facts.train, facts.seed), "Some training tasks, taken at random.")]


def _range(row: Mapping[str, Any]) -> list[str]:
    """Return smallest, mean and largest value; what is nothing beside the others is 0."""
    values = [float(row[name]) for name in ("min", "mean", "max")]
    size = max(map(abs, values))
    return [number(0.0 if abs(value) < 1e-12 * size else value, 4) for value in values]


def _model(facts: _Facts) -> list[Html]:
    model, run = facts.run.model, facts.run
    config = model.config
    likelihood, prior = config["likelihood"], config["prior"]
    hidden = " and ".join(str(width) for width in config["hidden"]) or "none: a linear model"
    rows: list[list[str]] = [
        ["hidden layers", f"{hidden} ({config['activation']})" if config["hidden"] else hidden],
        ["prior", str(prior["kind"]) + (f", {100 * prior['fraction']:g} % of it learned" if prior.get("fraction", 1.0) < 1 else "")],
        ["likelihood", str(likelihood["kind"])],
        ["last layer", str(config["last_layer"])],
        ["parameters", f"{sum(p.numel() for p in model.parameters()):,}"],
    ]
    if model.noise_std is not None:
        noise = model.noise_std.detach().cpu().double().reshape(-1).tolist()
        names = [str(column) for column in run.outputs]
        spread = [f"{name} {number(value)}" for name, value in zip(names, noise, strict=False)]
        rows.append(["noise, standard deviation", ", ".join(spread[:LISTED])])
    if facts.result.get("seconds") is not None:
        rows.append(["training took", _duration(float(facts.result["seconds"]))])
    elif facts.records and facts.records[-1].get("seconds") is not None:
        rows.append(["training took", _duration(float(facts.records[-1]["seconds"]))])
    parts = [table(["setting", "value"], rows, kind="words")]
    settings = list(_flat(run.config))
    if settings:
        parts.append(details("All settings of the fit", table(["setting", "value"], settings, kind="words")))
    return [*parts, details("What was learned of the prior, layer by layer", pre(str(model.prior.summary())))]


def _flat(config: Mapping[str, Any], name: str = "") -> list[list[str]]:
    rows: list[list[str]] = []
    for key, value in config.items():
        full = f"{name}.{key}" if name else str(key)
        rows += _flat(value, full) if isinstance(value, Mapping) else [[full, json.dumps(value, default=str)]]
    return rows


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.1f} minutes"


def _training(facts: _Facts) -> list[Html]:
    if not facts.records:
        return [paragraph("There is no log of the training.")]
    last = facts.records[-1]
    scores = [(float(r["validation"]), int(r["step"])) for r in facts.records if r.get("validation") is not None]
    words = f"{last['step']} steps."
    if scores:
        best, step = max(scores)
        words += f" The best score on validation tasks, {number(best)} nats per target point, was reached at step {step}."
    if last.get("skipped"):
        words += f" {last['skipped']} steps were left out because loss or gradient was not finite."
    parts = [paragraph(words)]
    if scores:
        held = plots.learning_curve(facts.records, "", title="Validation tasks", label="log density per target point\n(higher is better)")
        parts.append(figure(held, "The score on validation tasks, which chooses the step that is kept."))
    own = plots.learning_curve(facts.records, validation="", title="Training tasks", label="objective per task (higher is better)")
    return [*parts, figure(own, "The objective on batches of training tasks.")]


def _prior(facts: _Facts) -> list[Html]:
    words = "What the learned prior makes up, noise included, beside real tasks. They should look alike."
    return [figure(plots_data.prior(facts.run, facts.train, facts.seed), words)]


def _scores(facts: _Facts) -> list[Html]:
    judged = facts.middle
    parts = [
        paragraph(
            f"{len(judged.cases)} test task{'' if len(judged.cases) == 1 else 's'}, each cut at random into what is seen and what is to "
            "be predicted; all methods see the same. "
            "Means over tasks ± their standard errors. Log densities are in nats for each target point, higher is better: joint, of all "
            "targets of a task together; marginal, one by one. RMSE and CRPS are in the units of the output, lower is better. The last "
            "columns say how many targets lie in the central intervals of 50, 80 and 95 %."
        )
    ]
    if facts.run.model.y_dim > 1:
        parts.append(
            paragraph("Log densities are summed over the outputs; RMSE and CRPS are means over outputs, whatever their units.", kind="soft")
        )
    for found in facts.judged:
        points = [len(case.context[0]) for case in found.cases]
        between = f"{min(points)} to {max(points)}" if min(points) < max(points) else f"{points[0]}"
        parts.append(Html(f"<h3>{found.words}</h3>"))
        parts.append(paragraph(f"{between} {'point of a task is' if max(points) == 1 else 'points of a task are'} seen.", kind="soft"))
        parts.append(_score_table(found, facts.run.outputs[0].unit if len(facts.run.outputs) == 1 else ""))
        parts += [paragraph(words) for words in dict.fromkeys(v.sentence for v in facts.verdicts if v.share == found.share)]
    parts.append(
        paragraph(
            "Differences are taken task by task. Ahead or behind means by more than two standard errors. The rival is the best of all on "
            "these very test tasks, which favours it a little.",
            kind="soft",
        )
    )
    return [*parts, *([bullets(facts.notes)] if facts.notes else [])]


def _score_table(judged: Judged, unit: str) -> Html:
    known = [name for name in SCORES if any(name in found.summary for found in judged.scores.values())]
    rows = []
    for method, found in judged.scores.items():
        cells = [method]
        for name in known:
            percent = name.startswith("coverage") or name == "accuracy"
            mean, se = found.summary.get(name, (math.nan, math.nan))
            cells.append(_percent(mean, se) if percent else uncertain(mean, se))
        rows.append(cells)
    header = [SCORES[name] + (f" [{unit}]" if unit and name in ("rmse", "crps") else "") for name in known]
    return table(["method", *header], rows, own=list(judged.scores).index(OWN), kind="scores")


def _percent(mean: float, se: float) -> str:
    return "–" if math.isnan(mean) else f"{100 * mean:.0f} ± {100 * se:.0f} %" if math.isfinite(se) else f"{100 * mean:.0f} %"


def _calibration(facts: _Facts) -> list[Html]:
    pit = {judged.words: found.pit.numpy() for judged in facts.judged if (found := judged.scores[OWN]).pit is not None}
    if not pit:
        return [paragraph("Outputs are class labels: see accuracy and Brier score above.")]
    fig = plots.calibration(pit, independent=len(facts.middle.cases))
    return [
        paragraph("Lines on the diagonal, and bars that reach the dashed marks, mean that stated probabilities are right."),
        figure(fig, "How often true values lie where the model says. The band takes each task as one independent value.", broad=True),
    ]


def _tasks(facts: _Facts) -> list[Html]:
    judged = facts.middle
    scores = judged.scores[OWN].per_task["joint_log_density"].numpy()
    order = [int(i) for i in np.argsort(-scores)]
    shown = {"best": order[:1], "middle": order[len(order) // 2 : len(order) // 2 + 1], "worst": order[::-1][:2]}
    parts = [paragraph(f"By the joint log density of the targets, {judged.words}.")]
    done: set[int] = set()
    for word, places in shown.items():
        for i in places:
            if i in done:
                continue
            done.add(i)
            case = judged.cases[i]
            fig = plots_data.prediction(facts.run, case.context, _unseen(facts, case), facts.num_samples, facts.seed, title=case.name)
            parts.append(Html(f"<h3>{word[0].upper() + word[1:]}</h3>"))
            words = f"Task {case.name}: {number(float(scores[i]))} nats per target point; {len(case.context[0])} points seen."
            parts.append(figure(fig, words, broad=fig.get_figwidth() > 8))
    listed = order[::-1][:10]
    rows = [[judged.cases[i].name, str(len(judged.cases[i].context[0])), number(float(scores[i]))] for i in listed]
    if len(rows) < 2:
        return parts
    return [*parts, details(f"The {len(rows)} worst tasks", table(["task", "points seen", "joint log density"], rows))]


def _unseen(facts: _Facts, case: Case) -> Triple:
    """Return the targets of a picture; of a map all cells, so that there are no holes where targets were thinned or outputs missing."""
    x, y, mask = facts.test[case.index]
    if plots_data.Lattice.of(x, facts.run.inputs, facts.run.kind) is None:
        return case.target
    seen = {row.tobytes() for row in case.context[0]}
    keep = np.array([row.tobytes() not in seen for row in np.ascontiguousarray(x)], dtype=np.bool_)
    return x[keep][:MOST_DRAWN], y[keep][:MOST_DRAWN], mask[keep][:MOST_DRAWN]


def _next(facts: _Facts) -> list[Html]:
    advice = list(dict.fromkeys(finding.advice for finding in facts.found))
    if not advice:
        advice = ["Use it on tasks like these: bnnp predict. Ask of every new task how far its posterior can be trusted: bnnp diagnose."]
    made = (
        f"Made by bnnp with seed {facts.seed} and {facts.num_samples} particles. The same run, the same data and the same seed give the "
        "same numbers."
    )
    return [bullets(advice), paragraph(made, kind="soft")]
