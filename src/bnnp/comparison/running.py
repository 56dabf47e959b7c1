"""Run engines on the same padded batch of tasks, under the same log-joint, and score each by the code that scores everything else."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnnp.checkpoint import model_header, write_atomically
from bnnp.comparison.results import Comparison, Result
from bnnp.evaluation import check_tasks, evaluate, plain_task
from bnnp.importance import log_mean_exp, psis
from bnnp.inference import ENGINES, functional, run
from bnnp.inference.engine import Build
from bnnp.likelihoods import Likelihood
from bnnp.networks import BNNP
from bnnp.posterior import Posterior
from bnnp.priors import NetworkPrior, Prior
from bnnp.seeds import check_count
from bnnp.tasks import Task

__all__ = ["Row", "compare"]

AMORTISED = "amortised"
"""The engine that is the model's own forward pass, with its last layer in closed form."""
WHOLE, WHOLE_WITH = ("laplace", "laplace_diagonal", "laplace_last_layer", "swag"), ("batch_size", "anchored")
"""Engines that work on all layers, and settings that make others do so: points, or their noise, must not be coupled."""
GRID_POINTS, FUNCTIONS = 100, 5
"""Of the curves that are kept for pictures."""
FEWEST_FOR_PARETO = 25

PriorLike = str | Prior | BNNP | NetworkPrior | None


@dataclass(frozen=True)
class Row:
    """Say what one row of a comparison runs; what is None is as in the call of `compare`.

    Arguments:
        name: in the table.
        engine: its name, or its `build` function.
        prior: as of `bnnp.inference.functional`; the model itself for its own where the call names another.
        settings: of the engine.
        warm_start: start from the amortised posterior.
        collapse: integrate the last layer out.
        num_samples: number of draws.
    """

    name: str
    engine: str | Build
    prior: PriorLike = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    warm_start: bool | None = None
    collapse: bool | None = None
    num_samples: int | None = None

    @property
    def engine_name(self) -> str:
        """Return the name of the engine: of a function that of its module."""
        build = self.engine
        while isinstance(build, partial):
            build = build.func
        return build if isinstance(build, str) else str(getattr(build, "__module__", "engine")).rpartition(".")[2]

    @property
    def passes(self) -> bool:
        """Return whether it is the model's forward pass and nothing else."""
        return self.engine == AMORTISED and not self.settings


def compare(
    model: BNNP,
    tasks: Sequence[Sequence[Any] | Task],
    engines: Sequence[str | Row | Mapping[str, Any] | Build] = (AMORTISED, "nuts"),
    *,
    prior: PriorLike = None,
    likelihood: Likelihood | None = None,
    context_fraction: float | tuple[float, float] | None = None,
    collapse: bool | None = None,
    num_samples: int = 128,
    seed: int = 0,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    warm_start: bool = False,
    reference: str | None = None,
    shown: int = 3,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> Comparison:
    """Run inference engines on the same tasks under the same prior and noise, and score their predictions.

    All tasks of a row run at once, as one padded batch. A row whose engine fails keeps its message; the others go on.

    Arguments:
        model: gives network, scaling, likelihood and prior; its forward pass is the row "amortised".
        tasks: (xc, yc, xt, yt), or pairs (x, y) together with `context_fraction`; with masks as of `bnnp.evaluate`.
        engines: names of `bnnp.inference.ENGINES`, `build` functions, `Row` objects, or dictionaries with the arguments of one.
        prior: None for the model's own; another as of `bnnp.inference.functional`.
        likelihood: another than the model's own, such as `Gaussian(0.1, learn_noise=False)`, for all rows, the amortised one too.
        context_fraction: share of context points, for pairs.
        collapse: integrate the last layer out; where not given, wherever the likelihood has a closed form for it, but for engines that work
            on all layers or take batches of points.
        num_samples: draws that predict.
        seed: of the splits and of every engine.
        settings: name of an engine -> its settings.
        warm_start: start the engines from the amortised posterior.
        reference: name of the row that others are compared with; the first where not given.
        shown: of how many tasks predictions are kept for pictures, where input and output have one dimension.
        folder: where finished rows are kept, one small JSON file each; what is there is not run again, and a row that was stopped goes on.
        progress: show a line of progress on standard error.

    Returns:
        A `Comparison`.

    Raises:
        ValueError: no rows, two of one name, tasks that do not fit, or a folder of another comparison.

    Example:
        >>> x = torch.linspace(-1, 1, 8).unsqueeze(-1)
        >>> found = compare(BNNP(1, 1, hidden=(4,)), [(x, x), (x, -x)], ["amortised"], context_fraction=0.5, num_samples=4)
        >>> found.best().name
        'amortised'
    """
    if not isinstance(model, BNNP):
        raise TypeError(f"Expected model as a bnnp.BNNP. Got {type(model).__name__}.")
    rows = [_row(given) for given in engines]
    names = [row.name for row in rows]
    if not rows or len({_slug(name) for name in names}) < len(names):
        raise ValueError(f"Expected at least one engine, each row with a name of its own. Got {names}. Use Row(name, engine, ...).")
    if reference is not None and reference not in names:
        raise ValueError(f"Expected reference as one of {names}. Got {reference!r}.")
    unknown = sorted(set(settings or {}) - {row.engine_name for row in rows})
    if unknown:
        raise ValueError(f"Expected settings of engines that run. Got those of {unknown}.")
    check_count(num_samples, "num_samples")
    splits = check_tasks([plain_task(task) for task in tasks], context_fraction, seed)
    study = _Study(model, splits, prior, likelihood, collapse, num_samples, seed, dict(settings or {}), warm_start, shown, progress)
    found = [study.row(row, None if folder is None else Path(folder)) for row in rows]
    return Comparison(found, names[0] if reference is None else reference, len(splits))


def _row(given: str | Row | Mapping[str, Any] | Build) -> Row:
    """Return what was asked for as a row, its engine known."""
    if isinstance(given, Mapping):
        wrong = sorted(set(given) - {f.name for f in dataclasses.fields(Row)})
        if wrong or "engine" not in given:
            raise ValueError(f"Expected a row with an engine and fields of bnnp.comparison.Row. Got {sorted(given)}.")
        given = Row(**{"name": "", **given})
    row = given if isinstance(given, Row) else Row("", given)
    if isinstance(row.engine, str) and row.engine not in (*ENGINES, AMORTISED):
        raise ValueError(f"Expected an engine of {', '.join(sorted({*ENGINES, AMORTISED}))}, or a build function. Got {row.engine!r}.")
    if not isinstance(row.engine, str) and not callable(row.engine):
        raise TypeError(f"Expected an engine as a name, a Row or a build function. Got {type(row.engine).__name__}.")
    return row if row.name else dataclasses.replace(row, name=row.engine_name)


@dataclass(frozen=True, eq=False)
class _Study:
    """Hold what all rows share."""

    model: BNNP
    splits: list[Any]
    prior: PriorLike
    likelihood: Likelihood | None
    collapse: bool | None
    num_samples: int
    seed: int
    settings: dict[str, Mapping[str, Any]]
    warm_start: bool
    shown: int
    progress: bool

    def filled(self, row: Row) -> Row:
        """Return a row with what it leaves to the call."""
        likelihood = self.model.likelihood if self.likelihood is None else self.likelihood
        settings = {**self.settings.get(row.engine_name, {}), **row.settings}
        whole = row.engine_name in WHOLE or any(settings.get(name) for name in WHOLE_WITH)
        collapse = next((c for c in (row.collapse, self.collapse) if c is not None), likelihood.conjugate and not whole)
        return dataclasses.replace(
            row,
            prior=self.prior if row.prior is None else row.prior,
            settings=settings,
            warm_start=(self.warm_start if row.warm_start is None else row.warm_start) and row.engine != AMORTISED,
            collapse=likelihood.conjugate if row.engine == AMORTISED else collapse,
            num_samples=check_count(self.num_samples if row.num_samples is None else row.num_samples, "num_samples"),
        )

    def row(self, row: Row, folder: Path | None) -> Result:
        """Return what a row finds, from its file where that is there."""
        row = self.filled(row)
        file = None if folder is None else folder / f"{_slug(row.name)}.json"
        key = self.key(row) if file is not None else ""
        if file is not None and file.is_file():
            kept = json.loads(file.read_text("utf-8"))
            if kept.pop("key", None) != key:
                raise ValueError(
                    f"Expected {file} to be of this model, these tasks and settings. Got another. Use a folder for each comparison."
                )
            return Result.from_dict(kept)
        assert row.warm_start is not None and row.collapse is not None and row.num_samples is not None
        result = Result(row.name, row.engine_name, self.words(row.prior), row.warm_start, row.collapse, row.num_samples)
        try:
            result = self.found(row, result, folder)
        except Exception as error:
            return dataclasses.replace(result, failed=f"{type(error).__name__}: {error}")
        if file is not None:
            write_atomically(file, json.dumps({"key": key, **result.to_dict()}).encode())
        return result

    def found(self, row: Row, blank: Result, folder: Path | None) -> Result:
        """Run a row and score what it finds."""
        source = _Source(self, row, None if folder is None else folder / f"{_slug(row.name)}.state")
        scores = evaluate(source, self.splits, num_samples=blank.num_samples, seed=self.seed, batch_size=len(self.splits))
        assert source.posterior is not None
        return dataclasses.replace(
            blank,
            scores=dict(scores.summary),
            per_task={name: values.tolist() for name, values in scores.per_task.items()},
            diagnostics={name: values.detach().cpu().double().flatten().tolist() for name, values in source.report.items()},
            seconds=source.seconds,
            gradients=source.gradients,
            collapsed=source.posterior.particles.last is not None,
            num_samples=source.posterior.num_samples,
            curves=_curves(source.posterior, self.splits, self.shown, self.seed),
            posterior=source.posterior,
        )

    def words(self, prior: PriorLike) -> str:
        """Return a prior in words."""
        if isinstance(prior, str | Prior):
            return f"{prior if isinstance(prior, str) else prior.kind}, fixed"
        return "learned" if prior is None or prior is self.model else "of another model"

    def amortised(self, xc: Tensor, yc: Tensor, mask: Tensor | None, count: int, likelihood: Likelihood | None) -> Posterior:
        """Return the model's own posterior, with the likelihood of the comparison."""
        model = self.model
        if likelihood is not None:
            model = copy.deepcopy(model)
            model.likelihood = likelihood.to(model.device, model.dtype)
        with torch.no_grad():
            return model.condition(xc, yc, mask=mask, num_samples=count, seed=self.seed)

    def key(self, row: Row) -> str:
        """Return what tells one row from another."""
        plain = [
            row.name,
            row.engine_name,
            sorted(row.settings.items()),
            row.warm_start,
            row.collapse,
            row.num_samples,
            self.seed,
            self.shown,
        ]
        if not isinstance(row.engine, str):
            plain.append(_bound(row.engine))
        parts = [
            model_header(self.model),
            plain,
            None if self.likelihood is None else [type(self.likelihood).__name__, self.likelihood.config()],
        ]
        digest = hashlib.sha256(json.dumps(parts, default=str).encode())
        prior = row.prior
        digest.update(repr(prior).encode() if isinstance(prior, str | Prior | None) else b"module")
        modules = [self.model, *([prior] if isinstance(prior, torch.nn.Module) else []), *([self.likelihood] if self.likelihood else [])]
        tensors = [t for module in modules for t in module.state_dict().values()] + [t for split in self.splits for t in split]
        for tensor in tensors:
            digest.update(str(tuple(tensor.shape)).encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(eq=False)
class _Source:
    """Be a model for `evaluate`: condition by running an engine, and remember what it said."""

    study: _Study
    row: Row
    folder: Path | None
    posterior: Posterior | None = None
    report: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = math.nan
    gradients: int = 0

    def condition(self, xc: Tensor, yc: Tensor, mask: Tensor | None = None, num_samples: int = 64, seed: int = 0) -> Posterior:
        """Return the posterior that the row's engine finds."""
        study, row = self.study, self.row
        with torch.enable_grad():
            if row.passes:
                return self._passed(xc, yc, mask, num_samples)
            begun = time.perf_counter()
            F = functional(study.model, xc, yc, mask, prior=row.prior, likelihood=study.likelihood, collapse=bool(row.collapse))
            own = None if study.likelihood is None else copy.deepcopy(F.likelihood)
            built = time.perf_counter() - begun
            begun = time.perf_counter()
            start = study.amortised(xc, yc, mask, num_samples, own) if row.warm_start else None
            started = time.perf_counter() - begun
            build = ENGINES[row.engine] if isinstance(row.engine, str) else row.engine
            options: dict[str, Any] = {"num_samples": num_samples, "seed": seed, "progress": study.progress, "folder": self.folder}
            options |= {"model": study.model} if row.engine == AMORTISED else {}
            found = run(F, build, warm_start=start, **{**options, **row.settings})
        assert found.posterior is not None
        # What an earlier process spent on a run that goes on here is in its own seconds.
        self.seconds, self.gradients = built + started + found.seconds, found.gradients
        self.posterior, self.report = found.posterior, found.report
        return found.posterior

    def _passed(self, xc: Tensor, yc: Tensor, mask: Tensor | None, count: int) -> Posterior:
        """Return the model's forward pass."""
        study, own = self.study, None
        if self.row.prior is not None and self.row.prior is not study.model:
            raise ValueError(
                f"Expected the model's own prior for the amortised posterior. Got one that is {study.words(self.row.prior)}, which its "
                "inference networks do not know. Use another engine for this row."
            )
        if study.likelihood is not None:
            own = copy.deepcopy(functional(study.model, xc, yc, mask, likelihood=study.likelihood).likelihood)
        begun = time.perf_counter()
        self.posterior = study.amortised(xc, yc, mask, count, own)
        self.seconds = time.perf_counter() - begun
        self.report = _report(self.posterior)
        return self.posterior


def _report(posterior: Posterior) -> dict[str, Tensor]:
    """Return what the importance weights say of the amortised posterior."""
    weights = posterior.log_importance
    evidence, error = log_mean_exp(weights)
    report = {"elbo": posterior.particles.mean(posterior.bounds), "log_evidence": evidence, "log_evidence_se": error}
    return report | ({"pareto_k": psis(weights)[1]} if len(weights) >= FEWEST_FOR_PARETO else {})


@torch.no_grad()
def _curves(posterior: Posterior, splits: Sequence[Any], shown: int, seed: int) -> list[dict[str, Any]]:
    """Return predictions of the first tasks on a grid, rounded, for pictures; none but for one input and one output."""
    if shown < 1 or posterior.model.x_dim != 1 or posterior.y_dim != 1 or posterior.likelihood.labels:
        return []
    some = splits[:shown]
    x = torch.cat([part for split in some for part in (split[0], split[3])])
    low, high = float(x.min()), float(x.max())
    margin = 0.05 * (high - low) or 1.0
    grid = torch.linspace(low - margin, high + margin, GRID_POINTS, dtype=x.dtype).unsqueeze(-1)
    predictive = posterior.predict(grid)
    functions = torch.stack([f(grid) for f in posterior.sample_functions(FUNCTIONS, seed)])
    lines = {"mean": predictive.mean, "lower": predictive.quantile(0.05), "upper": predictive.quantile(0.95)}
    found = []
    for t, (xc, yc, _, xt, yt, _) in enumerate(some):
        points = {"xc": xc, "yc": yc, "xt": xt, "yt": yt}
        curve = {name: line[t] for name, line in lines.items()} | points | {"x": grid}
        samples = [_rounded(f[t]) for f in functions]
        found.append({"task": t, **{name: _rounded(values) for name, values in curve.items()}, "samples": samples})
    return found


def _bound(build: Build) -> list[Any]:
    """Return the name of a build function and what was bound to it."""
    found: list[Any] = []
    while isinstance(build, partial):
        found += [str(build.args), sorted((key, str(value)) for key, value in build.keywords.items())]
        build = build.func
    return [f"{getattr(build, '__module__', '')}.{getattr(build, '__qualname__', type(build).__qualname__)}", *found]


def _slug(name: str) -> str:
    """Return a name of a row as that of a file."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{v:.5g}") for v in values.flatten().tolist()]
