"""One page's task: its points, their posterior, and what is asked of it. No network, no browser: plain values in, plain values out.

The posterior is a function of the state alone: the first `conditioned` points were conditioned on together, those after them came by
`Posterior.update`. An added point is such an update as long as half of the particles count; whatever else changes conditions afresh. So
undo, redo and a reload give back the very same posterior.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from bnnp.explorer import wire
from bnnp.explorer.answers import curve, field, score
from bnnp.explorer.subject import Subject
from bnnp.explorer.wire import EXACT, Array, plain
from bnnp.likelihoods import Gaussian, MultivariateGaussian
from bnnp.networks import BNNP
from bnnp.posterior import Posterior

__all__ = ["GRID", "MOST_POINTS", "MOST_SAMPLES", "Session", "State", "with_noise"]

MOST_POINTS = 5000
MOST_SAMPLES = 512
MOST_CURVES = 30
GRID = 200
"""Inputs along the axis at which a curve is worked out."""
MAP_SAMPLES = 3
HISTORY = 200
PREVIEW_SECONDS = 0.06
"""While a point is dragged, particles are left out so that conditioning takes about this long."""
DIAGNOSED = 256
"""Particles of a diagnosis: with fewer than 100 it says little."""
NOISE = (0.05, 20.0)
MODES = ("curve", "map")


@dataclass(frozen=True, eq=False)
class State:
    """Hold what the posterior depends on, and what is shown beside it.

    Arguments:
        x: inputs of the points with shape (n, d_x).
        y: outputs with shape (n, d_y), NaN where not observed.
        conditioned: number of points that were conditioned on together; the others came by update, in their order.
        target_x: inputs of the rest of a task that was loaded, which the model does not see.
        target_y: their outputs.
        task: name of that task, "" where none was loaded.
    """

    x: Array
    y: Array
    conditioned: int
    target_x: Array
    target_y: Array
    task: str = ""


def with_noise(model: BNNP, factor: float) -> BNNP:
    """Return a copy of a Gaussian model whose noise has `factor` times its standard deviation; the model itself stays as it is.

    An upper bound of the noise belongs to learning and is not kept.
    """
    other = copy.deepcopy(model).requires_grad_(False).cpu()
    likelihood = other.likelihood
    with torch.no_grad():
        if isinstance(likelihood, Gaussian):
            noise = likelihood.noise_std * factor
            likelihood.bound = None
            likelihood.raw_noise.copy_(noise.log())
        elif isinstance(likelihood, MultivariateGaussian):
            likelihood.log_diagonal.add_(float(np.log(factor)))
            likelihood.lower.mul_(factor)
        elif factor != 1:
            raise ValueError(f"Expected a model with Gaussian noise. Got {type(likelihood).__name__}: its noise cannot be changed here.")
    return other


class Session:
    """Hold the state of one page and answer what it asks.

    Arguments:
        subject: the model and what is known of its data.
        samples: number of particles at the start.
    """

    def __init__(self, subject: Subject, samples: int = 64) -> None:
        if not max(1, subject.model.prior.components) <= samples <= MOST_SAMPLES:
            raise ValueError(f"Expected samples from {max(1, subject.model.prior.components)} to {MOST_SAMPLES}. Got {samples}.")
        self.subject = subject
        none_x, none_y = np.zeros((0, subject.x_dim)), np.zeros((0, subject.y_dim))
        self.state = State(none_x, none_y, 0, none_x, none_y)
        self.samples, self.noise, self.curves = samples, 1.0, 10
        self.mode, self.axis, self.output = ("map" if subject.map_first else "curve"), 0, 0
        self.held, self.others = subject.middle.tolist(), [None if subject.gaps else v for v in subject.usual_y.tolist()]
        self.low, self.high = float(subject.low[0]), float(subject.high[0])
        self.past: list[State] = []
        self.future: list[State] = []
        self.mark, self._gesture = "", ""
        self._model = with_noise(subject.model, 1.0)
        self._found: tuple[State, int, Posterior] | None = None
        self._seconds_per_particle: dict[int, float] = {}

    # --- the posterior -------------------------------------------------------------------------------------------

    def posterior(self) -> Posterior:
        """Return the posterior of the state as it is now, kept until that changes."""
        found = self._found
        if found is None or found[0] is not self.state or found[1] != self.samples:
            self._found = (self.state, self.samples, self._replayed(self.state, self.samples))
            found = self._found
        return found[2]

    def _replayed(self, state: State, samples: int) -> Posterior:
        n = state.conditioned
        posterior = self._condition(state.x[:n], state.y[:n], samples)
        return self._told(posterior, state.x[n:], state.y[n:]) if n < len(state.x) else posterior

    def _condition(self, x: Array, y: Array, samples: int) -> Posterior:
        start = time.perf_counter()
        posterior = self._model.condition(*_seen(x, y), num_samples=samples)
        self._seconds_per_particle[_size(len(x))] = (time.perf_counter() - start) / samples
        return posterior

    @staticmethod
    def _told(posterior: Posterior, x: Array, y: Array) -> Posterior:
        return posterior.update(*_seen(x, y))

    def _preview(self) -> Posterior:
        """Return a posterior of so few particles that it is there soon."""
        each = self._seconds_per_particle.get(_size(len(self.state.x)))
        count = self.samples if each is None else max(8, min(self.samples, int(PREVIEW_SECONDS / each)))
        components = self._model.prior.components
        # Little is won by a few particles less, and the picture would jump when the point is let go.
        if count > 0.7 * self.samples or count < components:
            return self.posterior()
        return self._condition(self.state.x, self.state.y, count)

    # --- changes -------------------------------------------------------------------------------------------------

    def apply(self, verb: str, body: Mapping[str, Any]) -> None:
        """Make one change; what is refused leaves everything as it was.

        Raises:
            ValueError: a verb that is not known, or values that are not legal.
        """
        change = self._changes.get(verb)
        if change is None:
            raise ValueError(f"Expected a change among {', '.join(sorted(self._changes))}. Got {verb!r}.")
        change(self, body)

    def _keep(self, state: State, gesture: str = "") -> None:
        """Take a new state; changes of one gesture are one step of the history."""
        if not gesture or gesture != self._gesture:
            self.past = [*self.past[-HISTORY:], self.state]
        self.state, self.future, self._gesture = state, [], gesture

    def _add(self, body: Mapping[str, Any]) -> None:
        before = self.state
        self._room(1)
        x = wire.rows([body.get("x")], "x", self.subject.x_dim, 1)
        y = self.subject.legal(wire.rows([body.get("y")], "y", self.subject.y_dim, 1, gaps=True))
        state = replace(before, x=np.concatenate([before.x, x]), y=np.concatenate([before.y, y]))
        told = self._told(self.posterior(), x, y)
        if float(told.effective_sample_size) < 0.5 * self.samples:
            state = replace(state, conditioned=len(state.x))
            told = self._condition(state.x, state.y, self.samples)
        self._keep(state)
        self._found = (state, self.samples, told)

    def _move(self, body: Mapping[str, Any]) -> None:
        before, x, y = self.state, self.state.x.copy(), self.state.y.copy()
        i = wire.index(body, "index", len(x))
        to_x = wire.rows([body.get("x")], "x", self.subject.x_dim, 1)
        to_y = self.subject.legal(wire.rows([body.get("y")], "y", self.subject.y_dim, 1, gaps=True))
        x[i], y[i] = to_x[0], to_y[0]
        self._keep(replace(before, x=x, y=y, conditioned=len(x)), wire.text(body, "gesture", 60, ""))

    def _remove(self, body: Mapping[str, Any]) -> None:
        indices = body.get("indices")
        if not isinstance(indices, list) or not indices:
            raise ValueError(f"Expected indices as a list of numbers of points. Got {wire.shown(indices)}.")
        count = len(self.state.x)
        keep = np.ones(count, dtype=bool)
        for i in indices:
            keep[wire.index({"indices": i}, "indices", count)] = False
        self._keep(self._afresh(self.state.x[keep], self.state.y[keep]), wire.text(body, "gesture", 60, ""))

    def _paint(self, body: Mapping[str, Any]) -> None:
        """Add many points, in place of those at the same inputs."""
        x = wire.rows(body.get("x"), "x", self.subject.x_dim, MOST_POINTS)
        y = self.subject.legal(wire.rows(body.get("y"), "y", self.subject.y_dim, MOST_POINTS, gaps=True))
        if len(x) != len(y) or not len(x):
            raise ValueError(f"Expected as many rows of x as of y, and at least one. Got {len(x)} and {len(y)}.")
        last = {tuple(row): i for i, row in enumerate(x.tolist())}  # where one input comes twice, the later value
        chosen = sorted(last.values())
        x, y = x[chosen], y[chosen]
        keep = [tuple(row) not in last for row in self.state.x.tolist()]
        kept_x, kept_y = self.state.x[keep], self.state.y[keep]
        self._room(len(x), len(kept_x))
        state = self._afresh(np.concatenate([kept_x, x]), np.concatenate([kept_y, y]))
        self._keep(state, wire.text(body, "gesture", 60, ""))

    def _clear(self, body: Mapping[str, Any]) -> None:
        none_x, none_y = self.state.x[:0], self.state.y[:0]
        self._keep(State(none_x, none_y, 0, none_x, none_y))

    def _refresh(self, body: Mapping[str, Any]) -> None:
        self._keep(self._afresh(self.state.x, self.state.y))

    def _load(self, body: Mapping[str, Any]) -> None:
        """Show some points of a task of the data, and keep the rest as targets."""
        x, y, name = self.subject.task(wire.index(body, "task", self.subject.count))
        share = wire.number(body, "share", 0.0, 1.0, 0.25)
        order = np.random.default_rng(wire.whole(body, "seed", 0, 2**31 - 1, 0)).permutation(len(x))
        count = min(MOST_POINTS, round(share * len(x)))
        if wire.flag(body, "at_least_one", True) and len(x):
            count = max(1, count)
        seen, rest = np.sort(order[:count]), np.sort(order[count:][:MOST_POINTS])
        self._keep(State(x[seen], y[seen], len(seen), x[rest], y[rest], name))

    def _undo(self, body: Mapping[str, Any]) -> None:
        if self.past:
            *self.past, state = self.past
            self.future, self.state, self._gesture = [*self.future, self.state], state, ""

    def _redo(self, body: Mapping[str, Any]) -> None:
        if self.future:
            *self.future, state = self.future
            self.past, self.state, self._gesture = [*self.past, self.state], state, ""

    def _set(self, body: Mapping[str, Any]) -> None:
        """Set what is asked of the posterior: nothing of it is part of the history."""
        least = self._model.prior.components
        samples = wire.whole(body, "samples", max(1, least), MOST_SAMPLES, self.samples)
        noise = wire.number(body, "noise", *NOISE, self.noise)
        curves = wire.whole(body, "curves", 0, MOST_CURVES, self.curves)
        mode = wire.one_of(body, "mode", MODES, self.mode)
        axis, output = wire.whole(body, "axis", 0, self.subject.x_dim - 1, self.axis), self.output
        output = wire.whole(body, "output", 0, self.subject.y_dim - 1, output)
        low, high = wire.number(body, "low", default=self.low), wire.number(body, "high", default=self.high)
        held = wire.rows([body.get("held", self.held)], "held", self.subject.x_dim, 1)[0]
        others = self.subject.legal(wire.rows([body.get("others", self.others)], "others", self.subject.y_dim, 1, gaps=True), alone=True)[0]
        if axis != self.axis and "low" not in body and "high" not in body:
            low, high = float(self.subject.low[axis]), float(self.subject.high[axis])
        if not high - low > 1e-9 * max(abs(low), abs(high)):
            raise ValueError(f"Expected an axis from a smaller to a larger number. Got {low:g} to {high:g}.")
        if mode == "map" and self.subject.lattice is None:
            raise ValueError(f"Expected a model of two inputs for a map. Got one of {self.subject.x_dim}.")
        if noise != self.noise:
            self._model, self._found = with_noise(self.subject.model, noise), None
        self.samples, self.noise, self.curves, self.mode = samples, noise, curves, mode
        self.axis, self.output, self.low, self.high, self.held = axis, output, low, high, held.tolist()
        self.others = [None if np.isnan(v) else float(v) for v in others]

    _changes: Mapping[str, Callable[[Session, Mapping[str, Any]], None]] = {
        "add": _add, "move": _move, "remove": _remove, "paint": _paint, "clear": _clear, "refresh": _refresh, "load": _load,
        "undo": _undo, "redo": _redo, "set": _set,
    }  # fmt: skip

    def _afresh(self, x: Array, y: Array) -> State:
        return replace(self.state, x=x, y=y, conditioned=len(x))

    def _room(self, more: int, there: int | None = None) -> None:
        there = len(self.state.x) if there is None else there
        if there + more > MOST_POINTS:
            raise ValueError(f"Expected at most {MOST_POINTS} points. Got {there + more}. Condition on more of them in Python.")

    def snapshot(self) -> Session:
        """Return a session that no change of this one reaches."""
        return copy.copy(self)  # states, models and posteriors are never changed in place

    # --- answers -------------------------------------------------------------------------------------------------

    def answer(self, preview: bool = False) -> dict[str, Any]:
        """Return what the page shows: the prediction and how it came about."""
        start = time.perf_counter()
        posterior = self._preview() if preview else self.posterior()
        conditioned = time.perf_counter()
        found: dict[str, Any] = {"mode": self.mode}
        if self.mode == "map":
            assert self.subject.lattice is not None
            found |= field(posterior, self.subject.lattice.cells, self.output, MAP_SAMPLES)
        else:
            x = np.tile(np.asarray(self.held, dtype=np.float64), (GRID, 1))
            x[:, self.axis] = np.linspace(self.low, self.high, GRID)
            found |= {"x": plain(x[:, self.axis], EXACT), **curve(posterior, x, self.output, self.curves)}
        return {
            **found,
            "count": len(self.state.x),
            "updates": len(self.state.x) - self.state.conditioned,
            "particles": posterior.num_samples,
            "effective": plain(float(posterior.effective_sample_size), 4),
            "elbo": plain(float(posterior.elbo)),
            "undo": len(self.past),
            "redo": len(self.future),
            "seconds": [plain(conditioned - start, 3), plain(time.perf_counter() - conditioned, 3)],
        }

    def describe(self, targets: bool = True) -> dict[str, Any]:
        """Return the state and the settings, for a page that opens."""
        state = self.state
        found: dict[str, Any] = {
            "points": {"x": plain(state.x, EXACT), "y": plain(state.y, EXACT)},
            "task": state.task,
            "settings": {
                "samples": self.samples, "noise": self.noise, "curves": self.curves, "mode": self.mode, "axis": self.axis,
                "output": self.output, "held": plain(np.asarray(self.held), EXACT), "others": self.others, "low": self.low,
                "high": self.high,
            },
        }  # fmt: skip
        return {**found, "targets": {"x": plain(state.target_x, EXACT), "y": plain(state.target_y, EXACT)}} if targets else found

    def diagnose(self) -> dict[str, Any]:
        """Return how far the posterior can be trusted, and how well targets are predicted where there are any.

        It conditions afresh on all points with more particles than the page asks for, which takes longer than a change may.
        """
        state, model = self.state, self._model
        each = self._seconds_per_particle.get(_size(len(state.x)), 0.0)
        count = max(self.samples, DIAGNOSED if each * DIAGNOSED < 3 else 100, model.prior.components)
        posterior = model.condition(*_seen(state.x, state.y), num_samples=count)
        found = posterior.diagnose()
        answer = {
            "sentence": found.sentence,
            "particles": count,
            "log_evidence": plain(float(found.log_evidence)),
            "log_evidence_se": plain(float(found.log_evidence_se), 3),
            "effective": plain(float(found.effective_sample_size), 4),
            "pareto_k": plain(float(found.pareto_k), 3),
        }
        if not len(state.target_x):
            return answer
        shown = set(map(tuple, state.x.tolist()))
        hidden = [tuple(row) not in shown for row in state.target_x.tolist()]  # what was painted over is no longer a target
        return {**answer, "score": score(posterior, state.target_x[hidden], state.target_y[hidden])}


def _size(n: int) -> int:
    """Return a class of numbers of points that cost about the same."""
    return n.bit_length()


def _seen(x: Array, y: Array) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return points as `BNNP.condition` takes them: a mask only where an output is missing."""
    missing = np.isnan(y)
    mask = torch.as_tensor(~missing) if missing.any() else None
    return torch.as_tensor(x), torch.as_tensor(np.where(missing, 0.0, y)), mask
