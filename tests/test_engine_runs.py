"""Runs of engines: one shape for all, resumed bit for bit, refused where they do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engines import gaussian_target, linear_problem
from torch import Tensor

import bnnp
from bnnp.inference import Draws, Engine, Target, functional, run, running
from bnnp.inference.engine import picked
from bnnp.inference.proposals import Gaussian
from bnnp.inference.resuming import pack, unpack
from bnnp.seeds import seeded


@dataclass(frozen=True)
class Step:
    size: float
    taken: tuple[int, ...]


@dataclass(frozen=True)
class Walk:
    eps: Tensor
    kept: tuple[Tensor, ...]
    step: Step
    gradients: int
    generator: torch.Generator


def init(target: Target, start: Tensor | None, seed: int) -> Walk:
    eps = torch.zeros(target.num_tasks, target.dim, dtype=target.dtype) if start is None else start[0]
    return Walk(eps, (), Step(0.3, ()), 0, seeded(seed, "walk"))


def update(target: Target, stop_at: int, state: Walk) -> Walk:
    if len(state.kept) == stop_at:
        raise KeyboardInterrupt
    eps = state.eps + state.step.size * torch.randn(state.eps.shape, generator=state.generator, dtype=target.dtype)
    step = replace(state.step, taken=(*state.step.taken, len(state.kept)))
    return replace(state, eps=eps, kept=(*state.kept, eps), step=step, gradients=state.gradients + 1)


def build(target: Target, *, updates: int = 6, size: float = 0.3, start: Tensor | None = None, stop_at: int = -1) -> Engine:
    def sample(state: Walk, n: int, seed: int) -> Draws:
        return Draws(picked(torch.stack(state.kept), n, seeded(seed, "pick")))

    def report(state: Walk) -> dict[str, Tensor]:
        return {"acceptance": torch.ones(target.num_tasks)}

    return Engine("walk", target, updates, partial(init, target, start), partial(update, target, stop_at), sample, report)


def interrupted(target: Target, *, updates: int = 6, start: Tensor | None = None) -> Engine:
    return build(target, updates=updates, start=start, stop_at=3)


def test_a_run_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = gaussian_target()
    whole = run(target, build, num_samples=4)
    monkeypatch.setattr(running, "fingerprint", lambda target, engine, seed, settings: "the same run")
    monkeypatch.setattr("bnnp.inference.resuming.time.monotonic", iter(float(i * 100) for i in range(100)).__next__)
    with pytest.raises(KeyboardInterrupt):
        run(target, interrupted, num_samples=4, folder=tmp_path)
    assert [json.loads(line)["updates"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3]
    resumed = run(target, build, num_samples=4, folder=tmp_path)
    assert torch.equal(resumed.draws.eps, whole.draws.eps) and resumed.gradients == 6
    again = run(target, build, num_samples=4, folder=tmp_path)  # nothing is left to do
    assert torch.equal(again.draws.eps, whole.draws.eps)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    "change",
    [
        lambda target: (target, {"seed": 1}),
        lambda target: (target, {"updates": 7}),
        lambda target: (target, {"start": torch.ones(1, 2, 4).double()}),
        lambda target: (gaussian_target(seed=1), {}),
    ],
)
def test_another_run_is_not_taken_for_this_one(tmp_path: Path, change: Callable[[Any], tuple[Any, dict[str, Any]]]) -> None:
    target = gaussian_target()
    run(target, build, folder=tmp_path)
    run(target, build, folder=tmp_path)
    other, settings = change(target)
    with pytest.raises(ValueError, match=r"Expected the run .* Choose another folder"):
        run(other, build, folder=tmp_path, **settings)


def test_a_run_from_another_proposal_is_another(tmp_path: Path) -> None:
    target = gaussian_target()
    settings: dict[str, Any] = {"num_particles": 4, "num_populations": 1, "folder": tmp_path}
    near, far = (Gaussian(target.mean + shift, torch.ones_like(target.mean)) for shift in (0.0, 3.0))
    first = run(target, "smc", proposal=near, **settings)
    assert torch.equal(run(target, "smc", proposal=near, **settings).draws.eps, first.draws.eps)
    with pytest.raises(ValueError, match=r"Expected the run .* Choose another folder"):
        run(target, "smc", proposal=far, **settings)


def test_states_come_back_as_they_were() -> None:
    g = seeded(0, "state")
    state = Walk(torch.ones(2), (torch.zeros(1), torch.full((), torch.inf)), Step(float("inf"), (1, 2)), 3, g)
    tensors: dict[str, Tensor] = {}
    back = unpack(json.loads(json.dumps(pack(state, tensors))), tensors)
    assert isinstance(back, Walk) and back.step == state.step and len(back.kept) == 2 and torch.isinf(back.kept[1])
    assert torch.equal(torch.randn(3, generator=back.generator), torch.randn(3, generator=g))
    away: dict[str, Tensor] = {}
    placed = pack((torch.zeros(2, device="meta"), torch.zeros(2)), away)
    assert [t.device.type for t in unpack(placed, {key: torch.zeros(2) for key in away})] == ["meta", "cpu"]
    with pytest.raises(TypeError, match="Got a part of type function"):
        pack((lambda: 0,), {})
    with pytest.raises(ValueError, match="Expected the state of a known engine"):
        unpack({"is": "os:system", "fields": {}}, {})


def test_one_task_has_no_task_axis() -> None:
    exact = linear_problem(num_tasks=1)
    single = exact.target.task(0)
    found = run(single, build, num_samples=5)
    assert found.posterior is not None and found.posterior.single
    assert found.posterior.predict(exact.x[0]).mean.shape == (4, 1)
    batched = run(exact.target, build, num_samples=5)
    assert torch.equal(found.draws.eps, batched.draws.eps)


def test_a_warm_start_begins_at_draws_of_the_posterior() -> None:
    model = bnnp.BNNP(1, 1, hidden=(3,)).double()
    x, y = torch.zeros(2, 1), torch.ones(2, 1)
    posterior, target = model.condition(x, y, num_samples=4), functional(model, x, y)
    found = run(target, build, warm_start=posterior, num_samples=1, updates=1)
    first = target.start(posterior, 64, 0)[0]
    step = 0.3 * torch.randn(1, target.dim, generator=seeded(0, "walk"), dtype=torch.float64)
    torch.testing.assert_close(found.draws.eps[0], first + step)
    with pytest.raises(ValueError, match="Expected one of warm_start and start"):
        run(target, build, warm_start=posterior, start=torch.zeros(2, 1, target.dim))
    with pytest.raises(TypeError, match="Expected a functional for a warm start"):
        run(gaussian_target(), build, warm_start=posterior)


def test_a_batch_with_padding_counts_what_is_there() -> None:
    """Of a target whose tasks differ in size, log-joints from all points of the smaller one are those of all points."""

    class Ragged(Target):
        dim, num_tasks, counts = 1, 2, torch.tensor([2, 5])  # type: ignore[assignment]

        def log_likelihood(self, eps: Tensor, batch: Tensor | None = None) -> Tensor:
            batch = torch.arange(5).expand(2, 5) if batch is None else batch
            return (-(eps - batch).square() * (batch < self.counts.unsqueeze(-1))).sum(-1)

    target, eps = Ragged(), torch.full((2, 1), 0.3, dtype=torch.float64)
    g = seeded(0, "batches")
    for _ in range(4):
        batch = target.draw_batch(3, g)
        assert target.batch_counts(batch).tolist() == [2, 3]
        torch.testing.assert_close(target.log_joint(eps, batch)[0], target.log_joint(eps)[0])
    mean = torch.stack([target.log_joint(eps, target.draw_batch(3, g))[1] for _ in range(2000)])
    assert abs(float(mean.mean() - target.log_joint(eps)[1])) < 4.5 * float(mean.std()) / 2000**0.5


def test_draws_are_spread_over_all_that_was_kept() -> None:
    kept = torch.arange(10.0).reshape(10, 1, 1)
    g = seeded(0, "pick")
    assert sorted(picked(kept, 5, g).flatten().tolist()) == [0, 2, 4, 6, 8]
    assert sorted(picked(kept, 20, g).flatten().tolist()) == sorted([*range(10), *range(10)])
