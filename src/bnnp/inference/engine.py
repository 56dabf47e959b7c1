"""One shape for every engine: build, then init, update, sample and report; see `bnnp.inference.running` for what goes through them.

An engine is a value of five functions over an immutable state, bound to its target and settings by `build` in the engine's own file. All of
them work on every task, and on all chains or samples of each, at once. What an engine gives is always the same: draws of eps, possibly
weighted, and numbers that say how far they can be trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnnp.inference.target import Target

__all__ = ["Build", "Draws", "Engine", "picked"]


@dataclass(frozen=True, eq=False)
class Draws:
    """Hold draws of eps.

    Arguments:
        eps: with shape (n, T, dim).
        log_weights: log importance weights with shape (n, T), not normalised; None where the draws are equally good.
    """

    eps: Tensor
    log_weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Engine:
    """Hold an engine bound to its target and settings.

    Arguments:
        name: what it is called in tables.
        target: what it works on, with a task axis.
        num_updates: how often `update` is to be called.
        init: from a seed to the first state.
        update: from a state to the next.
        sample: from a state, a number n and a seed to n draws.
        report: from a state to numbers with shape (T,): "rhat", "ess_bulk", "ess_tail", "acceptance", "divergences", "elbo",
            "log_evidence", "log_evidence_se", whichever the engine has.
        through: from a state to the functional through which its draws predict, where that is not the target.
    """

    name: str
    target: Target
    num_updates: int
    init: Callable[[int], Any]
    update: Callable[[Any], Any]
    sample: Callable[[Any, int, int], Draws]
    report: Callable[[Any], dict[str, Tensor]]
    through: Callable[[Any], Functional] | None = None


Build = Callable[..., Engine]
<<<<<<< HEAD
"""What binds an engine to a target: `build(target, *, start=None, **settings)`."""
=======


@dataclass(frozen=True, eq=False)
class Inference:
    """Hold what an engine found.

    Arguments:
        name: of the engine.
        draws: of eps.
        report: how far they can be trusted: name -> numbers with shape (T,).
        seconds: of all tasks together, from building to the last draw.
        gradients: gradients of the log-joint that were computed for each task.
        posterior: of the draws, where the target is a network; None for other targets.
    """

    name: str
    draws: Draws
    report: dict[str, Tensor]
    seconds: float
    gradients: int
    posterior: Posterior | None


def run(
    target: Target,
    engine: Build,
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
        engine: the `build` function of an engine, such as `bnnp.inference.hmc.build`.
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
    """
    check_count(num_samples, "num_samples")
    begun = time.perf_counter()
    network = target.batched if isinstance(target, Functional) else None
    if warm_start is not None:
        if network is None:
            raise TypeError(
                f"Expected a functional for a warm start. Got {type(target).__name__}. Give the engine start=draws of eps instead."
            )
        settings["start"] = network.start(warm_start, max(num_samples, FEWEST_STARTS), seed)
    on = target if network is None else network
    built = engine(on, **settings)
    kept = None if folder is None else Path(folder)
    stored = Stored(kept, "" if kept is None else fingerprint(on, engine, seed, settings))
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
>>>>>>> P


def picked(eps: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Return n draws (n, T, dim) of kept ones (K, T, dim): spread evenly, in random order, and again from the first where K < n."""
    K = len(eps)
    at = (torch.arange(n) * K) // n if n <= K else torch.arange(n) % K
    return eps[at[torch.randperm(n, generator=generator)].to(eps.device)]
