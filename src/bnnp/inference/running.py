"""From a target and the name of an engine to draws: build, start, update, resume, sample, report."""

from __future__ import annotations

import inspect
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bnnp.inference import amortised, ensemble, gaussian_vi, givi, hmc, laplace, mala, nuts, sghmc, sgld, smc, swag
from bnnp.inference.engine import Build, Draws
from bnnp.inference.functional import Functional
from bnnp.inference.resuming import Stored, fingerprint
from bnnp.inference.target import Target
from bnnp.posterior import Posterior
from bnnp.progress import ProgressLine
from bnnp.seeds import check_count

__all__ = ["ENGINES", "Inference", "find", "run"]

ENGINES: dict[str, Build] = {
    "amortised": amortised.build,
    "ensemble": ensemble.build,
    "full_vi": gaussian_vi.full,
    "givi": givi.build,
    "hmc": hmc.build,
    "laplace": laplace.build,
    "laplace_diagonal": laplace.build_diagonal,
    "laplace_last_layer": laplace.build_last_layer,
    "mala": mala.build,
    "mean_field": gaussian_vi.mean_field,
    "nuts": nuts.build,
    "per_layer_vi": gaussian_vi.per_layer,
    "per_unit_vi": gaussian_vi.per_unit,
    "sghmc": sghmc.build,
    "sgld": sgld.build,
    "smc": smc.build,
    "swag": swag.build,
}
"""Every engine by its name."""

FEWEST_STARTS = 64
"""How many draws of a posterior an engine that starts from it is given at least."""


def find(engine: str | Build) -> Build:
    """Return the `build` function of an engine that is given by name or as it is.

    Raises:
        ValueError: a name that is not known.
    """
    if isinstance(engine, str):
        if engine not in ENGINES:
            raise ValueError(f"Expected an engine among {', '.join(sorted(ENGINES))}. Got {engine!r}.")
        return ENGINES[engine]
    if not callable(engine):
        raise TypeError(f"Expected an engine as a name or a build function. Got {type(engine).__name__}.")
    return engine


@dataclass(frozen=True, eq=False)
class Inference:
    """Hold what an engine found.

    Arguments:
        name: of the engine.
        draws: of eps.
        report: how far they can be trusted: name -> numbers with shape (T,).
        seconds: of all tasks together, from building to the report.
        gradients: gradients of the log-joint that were computed for each task.
        posterior: of the draws, where the target is a network; None for other targets.
    """

    name: str
    draws: Draws
    report: dict[str, Tensor]
    seconds: float
    gradients: int
    posterior: Posterior | None


def check_settings(build: Build, settings: dict[str, Any]) -> None:
    """Raise ValueError where an engine has no such setting, or lacks one that it needs."""
    parameters = inspect.signature(build).parameters.values()
    own = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "start"}
    if any(p.kind is p.VAR_KEYWORD for p in parameters) or not own:
        return  # what takes anything checks for itself
    unknown = sorted(set(settings) - {*own, "start"})
    lacking = [name for name, p in own.items() if p.default is p.empty and name not in settings]
    if unknown or lacking:
        what = f"Got {', '.join(unknown)}" if unknown else f"Got no {', '.join(lacking)}, which has no default"
        raise ValueError(f"Expected settings of the engine among {', '.join(own)}. {what}.")


def run(
    target: Target,
    engine: str | Build = "nuts",
    *,
    num_samples: int = 128,
    seed: int = 0,
    warm_start: Posterior | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **settings: Any,
) -> Inference:
    """Run an engine on a target to its end and return what it found.

    Arguments:
        target: a `Functional`, or any other target.
        engine: a name among `ENGINES`, or the `build` function of any engine.
        num_samples: number of draws in the result.
        seed: of everything random.
        warm_start: a posterior of the same tasks, such as the amortised one, from which the engine starts.
        folder: keep the state there, at least every half a minute, with a log of JSON lines: the same call goes on where it was stopped
            and gives the same draws. Seconds add up.
        progress: show a line of progress on standard error.
        settings: of the engine.

    Raises:
        ValueError: settings out of range, a posterior of other tasks, or a folder with another run.
        TypeError: a warm start where the target is no network.

    Example:
        >>> import bnnp
        >>> F = bnnp.inference.functional(bnnp.BNNP(1, 1, hidden=(4,)), [[0.0], [1.0]], [[0.1], [0.2]], collapse=True)
        >>> found = run(F, "hmc", num_samples=8, warmup=10, draws=10)
        >>> found.posterior.predict([[0.5]]).mean.shape
        torch.Size([1, 1])
    """
    check_count(num_samples, "num_samples")
    build = find(engine)
    check_settings(build, settings)
    begun = time.perf_counter()
    network = target.batched if isinstance(target, Functional) else None
    if warm_start is not None:
        if not isinstance(warm_start, Posterior):
            raise TypeError(f"Expected warm_start as a posterior, such as model.condition gives. Got {type(warm_start).__name__}.")
        if network is None:
            raise TypeError(
                f"Expected a functional for a warm start. Got {type(target).__name__}. Give the engine start=draws of eps instead."
            )
        if settings.get("start") is not None:
            raise ValueError("Expected one of warm_start and start. Got both.")
        settings["start"] = network.start(warm_start, max(num_samples, FEWEST_STARTS), seed)
    on = target if network is None else network
    built = build(on, **settings)
    kept = None if folder is None else Path(folder)
    stored = Stored(kept, "" if kept is None else fingerprint(on, build, seed, settings))
    found = stored.load()
    done, before, state = (0, 0.0, built.init(seed)) if found is None else found
    line = ProgressLine(built.num_updates, progress)
    try:
        for i in range(done, built.num_updates):
            state = built.update(state)
            line.show(i + 1, built.name)
            stored.store(i + 1, built.num_updates, before + time.perf_counter() - begun, state)
    finally:
        line.close()
    draws = built.sample(state, num_samples, seed)
    report = built.report(state)
    seconds = before + time.perf_counter() - begun
    posterior = None
    if isinstance(target, Functional):
        of_single = [t.squeeze(1) if target.single and t is not None else t for t in (draws.eps, draws.log_weights)]
        assert of_single[0] is not None
        through = target if built.through is None else built.through(state)
        through = through.task(0) if target.single and not through.single else through
        posterior = through.posterior(of_single[0], of_single[1])
    return Inference(built.name, draws, report, seconds, int(state.gradients), posterior)
