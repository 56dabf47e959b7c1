"""HMC, NUTS and MALA: exact moments, exact mechanics, calibration on a network, and a broken acceptance step that does not pass it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engines import GaussianTarget, gaussian_target, linear_problem, moment_errors
from torch import Tensor

import bnnp
from bnnp.calibration import uniformity
from bnnp.inference import Functional, Target, adaptation, functional, hmc, mala, nuts, run
from bnnp.inference.adaptation import DualAveraging, Moments, Point, first_step, kinetic, leapfrog, schedule
from bnnp.inference.chains import State
from bnnp.inference.resuming import pack, unpack
from bnnp.seeds import seeded

BUILDS: dict[str, Callable[..., Any]] = {"hmc": hmc.build, "nuts": nuts.build, "mala": mala.build}
SHORT: dict[str, dict[str, Any]] = {
    "hmc": {"num_chains": 12, "warmup": 80, "draws": 120},
    "nuts": {"num_chains": 12, "warmup": 80, "draws": 80},
    "mala": {"num_chains": 40, "warmup": 100, "draws": 200},
}


@pytest.mark.parametrize("name", BUILDS)
def test_moments_of_a_gaussian_within_the_engine_s_own_error(name: str) -> None:
    target = gaussian_target()
    found = run(target, BUILDS[name], num_samples=SHORT[name]["num_chains"] * SHORT[name]["draws"], seed=1, **SHORT[name])
    assert found.report["rhat"].max() < 1.05
    assert found.report["divergences"].max() == 0
    for t in range(target.num_tasks):
        own = slice(t, t + 1)
        effective = float(found.report["ess_bulk"][t])
        assert effective > 200
        off_mean, off_var = moment_errors(found.draws.eps[:, own], target.mean[own], target.cov[own], effective)
        assert off_mean < 4.5, t
        assert off_var < 4.5, t


@pytest.mark.parametrize("name", BUILDS)
def test_the_posterior_of_a_one_layer_network(name: str) -> None:
    problem = linear_problem()
    found = run(problem.target, BUILDS[name], num_samples=SHORT[name]["num_chains"] * SHORT[name]["draws"], seed=2, **SHORT[name])
    effective = float(found.report["ess_bulk"].min())
    off_mean, off_var = moment_errors(found.draws.eps, problem.mean, problem.cov, effective)
    assert off_mean < 4.5
    assert off_var < 4.5
    assert found.posterior is not None
    mean = found.posterior.predict(problem.x).mean[..., 0]
    assert ((mean - problem.f_mean) / problem.f_std).abs().max() < 4.5 / math.sqrt(effective)


def stay(target: GaussianTarget, build: Callable[..., Any], chains: int = 6000, updates: int = 3, **settings: Any) -> tuple[float, float]:
    """Errors of the moments of many chains that began at exact draws, after a few updates, in standard errors."""
    exact = torch.distributions.MultivariateNormal(target.mean, target.cov)
    noise = torch.randn(chains, target.num_tasks, target.dim, generator=seeded(7, "exact"), dtype=torch.float64)
    start = exact.loc + torch.einsum("tij,ntj->nti", exact.scale_tril, noise)
    engine = build(target, num_chains=chains, warmup=0, draws=updates, start=start, **settings)
    state = engine.init(3)
    assert torch.equal(state.eps, start)
    for _ in range(updates):
        state = engine.update(state)
    report = engine.report(state)
    assert 0.3 < report["acceptance"].min() < report["acceptance"].max() < 0.95, "a step that is always taken tests nothing"
    assert (state.eps != start).any(-1).float().mean() > 0.5
    return moment_errors(state.eps, target.mean, target.cov, chains)


LARGE = {"hmc": {"step_size": 0.35, "num_leapfrog": 3}, "nuts": {"step_size": 0.3, "max_depth": 4}, "mala": {"step_size": 0.35}}


@pytest.mark.parametrize("name", BUILDS)
def test_chains_that_begin_in_the_posterior_stay_there(name: str) -> None:
    assert max(stay(gaussian_target(), BUILDS[name], **LARGE[name])) < 4.5


def test_without_the_right_acceptance_they_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(hmc, "accepted", always)
        assert max(stay(gaussian_target(), hmc.build, **LARGE["hmc"])) > 10
    with monkeypatch.context() as broken:
        right = mala.log_proposal
        broken.setattr(mala, "log_proposal", lambda to, eps, gradient, step, mass: right(to, eps, -gradient, step, mass))
        assert max(stay(gaussian_target(), mala.build, step_size=0.2)) > 10
    with monkeypatch.context() as broken:
        broken.setattr(nuts, "log_uniform", lambda like, g: torch.full_like(like, -100.0))  # takes every point
        assert max(stay(gaussian_target(), nuts.build, **LARGE["nuts"])) > 8


def always(gained: Tensor, generator: torch.Generator) -> Tensor:
    """A test of log u < exp(gained) instead of log u < gained: never false where the density is not zero."""
    return torch.rand(gained.shape, generator=generator, dtype=gained.dtype).log() < gained.exp()


# --- mechanics ---------------------------------------------------------------------------------------------------


def points(target: Target, chains: int, mass: float = 1.0, seed: int = 0) -> tuple[Point, Tensor]:
    g = seeded(seed, "points")
    eps = torch.randn(chains, target.num_tasks, target.dim, generator=g, dtype=torch.float64)
    inverse_mass = mass * (0.5 + torch.rand(target.num_tasks, target.dim, generator=g, dtype=torch.float64))
    return Point(eps, adaptation.momentum(eps, inverse_mass, g), *adaptation.value_and_grad(target, eps)), inverse_mass


def test_leapfrog_steps_go_back_where_they_came_from_and_keep_volume() -> None:
    target = linear_problem().target
    start, inverse_mass = points(target, 3)
    step = torch.tensor([0.05, 0.11], dtype=torch.float64)
    here = start
    for _ in range(7):
        here = leapfrog(target, here, step, inverse_mass)
    assert (here.eps - start.eps).abs().min() > 0.01
    for _ in range(7):
        here = leapfrog(target, here, -step, inverse_mass)
    torch.testing.assert_close(here.eps, start.eps, rtol=0, atol=1e-11)
    torch.testing.assert_close(here.momentum, start.momentum, rtol=0, atol=1e-11)

    def moved(z: Tensor) -> Tensor:
        eps, p = z.chunk(2, dim=-1)
        there = leapfrog(target, Point(eps, p, *adaptation.value_and_grad(target, eps)), step, inverse_mass)
        return torch.cat([there.eps, there.momentum], dim=-1)

    at = torch.cat([start.eps[:1], start.momentum[:1]], dim=-1)
    nudge = 1e-5 * torch.eye(2 * target.dim, dtype=torch.float64)[:, None, :]
    jacobian = (moved(at + nudge) - moved(at - nudge)) / 2e-5  # (2 dim, T, 2 dim)
    torch.testing.assert_close(torch.linalg.det(jacobian.movedim(1, 0)), torch.ones(2).double(), rtol=0, atol=1e-7)


def test_rejections_shrink_as_the_square_of_the_step() -> None:
    target = gaussian_target(num_tasks=1)
    exact = torch.distributions.MultivariateNormal(target.mean, target.cov)
    noise = torch.randn(4000, 1, target.dim, generator=seeded(0, "exact"), dtype=torch.float64)
    eps = exact.loc + torch.einsum("tij,ntj->nti", exact.scale_tril, noise)
    unit = torch.ones(1, target.dim, dtype=torch.float64)
    start = Point(eps, adaptation.momentum(eps, unit, seeded(1, "momentum")), *adaptation.value_and_grad(target, eps))
    rejected = []
    for steps in (10, 20, 40):
        here = start
        for _ in range(steps):
            here = leapfrog(target, here, torch.full((1,), 1.5 / steps, dtype=torch.float64), unit)
        gained = kinetic(start.momentum, unit) - start.value - kinetic(here.momentum, unit) + here.value
        rejected.append(float(1 - gained.clamp(max=0).exp().mean()))
    assert 0.001 < rejected[2] < rejected[0] < 0.3
    assert rejected[0] / rejected[1] == pytest.approx(4, rel=0.1)
    assert rejected[1] / rejected[2] == pytest.approx(4, rel=0.1)


def test_one_leapfrog_step_is_a_step_of_mala() -> None:
    target = linear_problem().target
    start, inverse_mass = points(target, 5)
    step = torch.tensor([0.3, 0.5], dtype=torch.float64)
    there = leapfrog(target, start, step, inverse_mass)
    by_energy = kinetic(start.momentum, inverse_mass) - start.value - kinetic(there.momentum, inverse_mass) + there.value
    forth = mala.log_proposal(there.eps, start.eps, start.gradient, step, inverse_mass)
    back = mala.log_proposal(start.eps, there.eps, there.gradient, step, inverse_mass)
    torch.testing.assert_close(there.value + back - start.value - forth, by_energy)


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 4])
def test_a_tree_is_whole_where_no_subtree_of_it_turns(depth: int) -> None:
    target = gaussian_target(num_tasks=3, seed=2)
    start, inverse_mass = points(target, 40, mass=0.3)
    step = torch.tensor([0.1, 0.25, 0.4], dtype=torch.float64) * torch.where(torch.arange(40) % 2 == 0, 1.0, -1.0)[:, None]
    energy = kinetic(start.momentum, inverse_mass) - start.value
    going = torch.ones_like(energy, dtype=torch.bool)
    tree = nuts.grow(target, start, step, inverse_mass, energy, depth, going, seeded(0, "tree"))
    trajectory = [start]
    for _ in range(2**depth):
        trajectory.append(leapfrog(target, trajectory[-1], step, inverse_mass))
    p = [at.momentum for at in trajectory[1:]]
    turned = torch.zeros_like(going)
    for size in (2**i for i in range(1, depth + 1)):
        for first in range(0, 2**depth, size):
            part = p[first : first + size]
            rho = (torch.stack(part).sum(0) - 0.5 * (part[0] + part[-1])) * inverse_mass
            turned |= ((rho * part[0]).sum(-1) <= 0) | ((rho * part[-1]).sum(-1) <= 0)
    assert torch.equal(tree.whole, ~turned)
    if depth > 2:
        assert 0.05 < turned.double().mean() < 0.95
    whole = tree.whole
    gains = torch.stack([energy - kinetic(at.momentum, inverse_mass) + at.value for at in trajectory[1:]])
    torch.testing.assert_close(tree.log_weight[whole], gains.logsumexp(0)[whole])
    torch.testing.assert_close(tree.edge.eps[whole], trajectory[-1].eps[whole])
    torch.testing.assert_close(tree.momentum[whole], torch.stack(p).sum(0)[whole])
    torch.testing.assert_close(tree.acceptance[whole], gains.clamp(max=0).exp().sum(0)[whole])
    assert bool((tree.leaves[whole] == 2**depth).all())
    among = torch.stack([(tree.chosen.eps == at.eps).all(-1) for at in trajectory[1:]]).any(0)
    assert bool(among[whole].all())


# --- warm-up -----------------------------------------------------------------------------------------------------


def test_dual_averaging_finds_the_step_with_the_wanted_acceptance() -> None:
    step = DualAveraging.start(torch.tensor([-4.0, 0.0, 3.0], dtype=torch.float64))
    scale = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    for _ in range(2000):
        step = step.update((-step.log_step.exp() / scale).exp(), 0.8)
    torch.testing.assert_close(step.settle().log_step.exp(), -math.log(0.8) * scale, rtol=0.02, atol=0)


def test_the_first_step_crosses_the_wanted_acceptance() -> None:
    scale = torch.tensor([1e-4, 0.3, 50.0], dtype=torch.float64)
    found, calls = first_step(lambda step: (-step / scale).expand(4, 3), scale)
    ratio = (found.exp() / scale / -math.log(0.8)).log2()
    assert ratio.abs().max() <= 1.0, "within a factor of two of where the acceptance is 0.8"
    assert calls < 20


def test_pooled_moments_are_those_of_all_draws() -> None:
    x = torch.randn(9, 4, 2, 3, generator=seeded(0, "moments"), dtype=torch.float64) * 3 + 100
    moments = Moments.start(x[0])
    for part in x:
        moments = moments.update(part)
    n, var = 36, x.flatten(0, 1).var(0)
    torch.testing.assert_close(moments.mean, x.mean((0, 1)))
    torch.testing.assert_close(moments.inverse_mass(), var * n / (n + 5) + 5e-3 / (n + 5))


@pytest.mark.parametrize("warmup", [0, 5, 20, 60, 149, 150, 151, 333, 1000, 4000])
def test_windows_fill_the_warm_up(warmup: int) -> None:
    first, ends = schedule(warmup)
    if warmup < 20:
        assert ends == ()
        return
    assert warmup - max(50, warmup // 10) - 1 <= ends[-1] < warmup
    lengths = [b - a for a, b in zip((first, *ends), ends, strict=False)]
    assert min(lengths) > 0
    assert all(b >= 2 * a for a, b in itertools.pairwise(lengths))


def test_the_mass_is_learned_and_the_acceptance_is_near_the_wanted() -> None:
    scale = torch.tensor([[0.1, 0.3, 1.0]], dtype=torch.float64)
    target = GaussianTarget(
        torch.zeros(1, 3).double(), torch.diag_embed(scale.square()), torch.zeros(1).double(), torch.zeros(1, 2, 3).double()
    )
    engine = hmc.build(target, num_chains=8, warmup=100, draws=40, trajectory=1.2)
    state = engine.init(0)
    for _ in range(engine.num_updates):
        state = engine.update(state)
    assert ((state.inverse_mass.sqrt() / scale).log().abs() < 0.25).all()
    assert 0.7 < float(engine.report(state)["acceptance"]) < 0.97
    assert float(engine.report(state)["step_size"]) > 0.5
    plain = run(target, hmc.build, num_chains=8, warmup=30, draws=5, trajectory=0.3, adapt_mass=False)
    assert float(plain.report["step_size"]) < 0.3


# --- densities that cannot be computed everywhere ----------------------------------------------------------------


class Walled(GaussianTarget):
    """Half of a standard normal: where the first element is negative the density is not a number."""

    def log_likelihood(self, eps: Tensor, batch: Tensor | None = None) -> Tensor:
        return torch.where(eps[..., 0] < 0, torch.nan, 0.0 * eps.sum(-1))


@pytest.mark.parametrize("name", BUILDS)
def test_a_density_that_is_not_a_number_is_zero(name: str) -> None:
    target = Walled(
        torch.zeros(1, 2).double(), torch.eye(2).double().expand(1, 2, 2), torch.zeros(1).double(), torch.zeros(1, 2, 2).double()
    )
    settings: dict[str, Any] = {"step_size": 0.6, **({} if name == "mala" else {"max_depth": 3} if name == "nuts" else {"num_leapfrog": 2})}
    found = run(target, BUILDS[name], num_samples=4000, num_chains=20, warmup=30, draws=200, seed=4, **settings)
    eps = found.draws.eps[:, 0]
    assert bool((eps[:, 0] >= 0).all())
    effective = float(found.report["ess_bulk"])
    assert effective > 200
    assert abs(float(eps[:, 0].mean()) - math.sqrt(2 / math.pi)) < 4.5 * math.sqrt((1 - 2 / math.pi) / effective)
    assert found.report["divergences"].min() > 0


def test_a_density_that_is_nowhere_finite_is_refused() -> None:
    class Nowhere(GaussianTarget):
        def log_likelihood(self, eps: Tensor, batch: Tensor | None = None) -> Tensor:
            return torch.nan * eps.sum(-1)

    target = Nowhere(**vars(gaussian_target()))
    with pytest.raises(ValueError, match="Expected a log-joint that is finite where chains start"):
        hmc.build(target).init(0)


# --- the shape of an engine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDS)
def test_the_same_seed_gives_the_same_draws_and_tasks_have_noise_of_their_own(name: str) -> None:
    one = gaussian_target(num_tasks=1)
    twice = GaussianTarget(*(torch.cat([t, t]) for t in (one.mean, one.cov, one.log_z, one.shares)))
    settings = {"warmup": 20, "draws": 12, "keep": 5}
    a, b, c = (run(twice, BUILDS[name], num_samples=9, seed=s, **settings) for s in (0, 0, 1))
    assert torch.equal(a.draws.eps, b.draws.eps)
    assert not torch.equal(a.draws.eps, c.draws.eps)
    assert not torch.isclose(a.draws.eps[:, 0], a.draws.eps[:, 1]).any()
    assert a.draws.eps.shape == (9, 2, 4)
    assert all(v.shape == (2,) for v in a.report.values())


@pytest.mark.parametrize("name", BUILDS)
def test_gradients_are_counted_and_draws_are_thinned(name: str) -> None:
    class Counting(GaussianTarget):
        calls = 0

        def value_and_grad(
            self, eps: Tensor, batch: Tensor | None = None, inverse_temperature: float | Tensor = 1.0
        ) -> tuple[Tensor, Tensor]:
            type(self).calls += len(eps)
            return super().value_and_grad(eps, batch, inverse_temperature)

    target = Counting(**vars(gaussian_target()))
    engine = BUILDS[name](target, num_chains=3, warmup=25, draws=11, keep=4)
    state = engine.init(0)
    for _ in range(engine.num_updates):
        state = engine.update(state)
    assert state.gradients == Counting.calls > 36 * 3
    assert len(state.traces) == 11
    assert len(state.kept) == 4
    assert torch.equal(state.kept[-1][:, :1], state.kept[-1][:, :1].clone())
    # Even thinning of the few takes from every chain.
    drawn = engine.sample(state, 3, 0).eps
    assert sorted(int((torch.stack(state.kept) == d).all(-1).all(-1).any(0).nonzero()) for d in drawn) == [0, 1, 2]


def test_chains_start_where_they_are_told() -> None:
    target = gaussian_target()
    start = torch.arange(10.0).double()[:, None, None].expand(10, 2, 4)
    assert hmc.build(target, start=start).init(0).eps[:, 0, 0].tolist() == [0, 2, 4, 6]
    assert hmc.build(target, num_chains=3, start=start[:2]).init(0).eps[:, 0, 0].tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", BUILDS)
def test_updates_are_pure(name: str) -> None:
    engine = BUILDS[name](gaussian_target(), warmup=0, draws=5, step_size=0.1)
    state = engine.init(0)
    first, again = engine.update(state), engine.update(state)
    assert not torch.equal(first.eps, state.eps)
    assert torch.equal(first.eps, again.eps)
    assert torch.equal(engine.update(first).eps, engine.update(again).eps)


@pytest.mark.parametrize("name", BUILDS)
def test_a_state_can_be_stored_and_goes_on(name: str) -> None:
    engine = BUILDS[name](gaussian_target(), warmup=22, draws=10)
    state = engine.init(0)
    for _ in range(15):
        state = engine.update(state)
    tensors: dict[str, Tensor] = {}
    tree = json.loads(json.dumps(pack(state, tensors)))
    copied = unpack(tree, {key: value.clone() for key, value in tensors.items()})
    assert isinstance(copied, State)
    for _ in range(17):
        state, copied = engine.update(state), engine.update(copied)
    assert torch.equal(engine.sample(state, 8, 0).eps, engine.sample(copied, 8, 0).eps)


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (hmc.build, {"num_chains": 0}, "num_chains as a positive integer"),
        (hmc.build, {"warmup": -1}, "warmup as an integer, at least 0. Got -1"),
        (hmc.build, {"draws": 0}, "draws as a positive integer"),
        (hmc.build, {"target_accept": 1.0}, "target_accept between 0 and 1"),
        (hmc.build, {"trajectory": 0.0}, "trajectory as a positive number"),
        (hmc.build, {"num_leapfrog": 0}, "num_leapfrog as a positive integer"),
        (hmc.build, {"step_size": math.nan}, "step_size as a positive number, or None"),
        (nuts.build, {"max_depth": 0}, "max_depth as a positive integer"),
        (mala.build, {"keep": 0}, "keep as a positive integer"),
        (nuts.build, {"start": torch.zeros(3, 2)}, r"start as draws of eps with shape \(n, 2, 4\)"),
    ],
)
def test_settings_out_of_range_are_refused(build: Callable[..., Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(gaussian_target(), **settings)


def test_no_draws_before_the_warm_up_is_over() -> None:
    engine = hmc.build(gaussian_target(), warmup=30)
    state = engine.update(engine.init(0))
    assert engine.report(state)["rhat"].isnan().all()
    with pytest.raises(ValueError, match="past their warm-up"):
        engine.sample(state, 1, 0)


# --- simulation-based calibration --------------------------------------------------------------------------------


def simulated(num_tasks: int, seed: int) -> tuple[Functional, Tensor]:
    """A small network's task drawn from its prior, and the eps that it was drawn with, many times."""
    g, noise, points = seeded(seed, "simulated"), 0.3, 4
    model = bnnp.BNNP(1, 1, hidden=(3,), prior="diagonal", likelihood=bnnp.Gaussian(noise, learn_noise=False)).double()
    x = 4 * torch.rand(num_tasks, points, 1, generator=g, dtype=torch.float64) - 2
    empty = functional(model, x, torch.zeros_like(x))
    truth = torch.randn(num_tasks, empty.dim, generator=g, dtype=torch.float64)
    y = empty.outputs(truth, x) + noise * torch.randn(x.shape, generator=g, dtype=torch.float64)
    return empty.on(x, y), truth


def ranked(num_tasks: int, build: Callable[..., Any], seed: int = 0, **settings: Any) -> Tensor:
    """p-values of the ranks of f at five inputs, |eps|^2 and the log-joint of the truth among the engine's draws."""
    target, truth = simulated(num_tasks, seed)
    draws = settings["num_chains"] * settings["keep"]
    found = run(target, build, num_samples=draws, seed=seed, **settings)

    def quantities(eps: Tensor) -> Tensor:
        return torch.cat([target.monitor(eps), target.log_joint(eps).unsqueeze(-1)], dim=-1)

    ranks = (quantities(found.draws.eps) < quantities(truth)).sum(0)
    return uniformity(ranks, draws, simulations=999)


LIGHT: dict[str, dict[str, Any]] = {
    "hmc": {"warmup": 50, "draws": 32, "trajectory": 1.5},
    "nuts": {"warmup": 60, "draws": 25, "max_depth": 4},
    "mala": {"warmup": 200, "draws": 300},
}


def test_the_truth_is_anywhere_among_the_draws() -> None:
    assert ranked(80, hmc.build, num_chains=8, keep=4, **LIGHT["hmc"]).min() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDS)
def test_the_truth_is_anywhere_among_the_draws_in_many_tasks(name: str) -> None:
    assert ranked(400, BUILDS[name], seed=1, num_chains=8, keep=5, **LIGHT[name]).min() > 0.01


def test_a_broken_acceptance_step_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hmc, "accepted", always)
    settings: dict[str, Any] = {"num_chains": 8, "keep": 4, "warmup": 20, "draws": 32, "num_leapfrog": 3}
    assert ranked(80, hmc.build, step_size=0.25, **settings).min() < 0.002
