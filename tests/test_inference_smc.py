"""Tempering: evidence and moments are right within their own errors, whatever the path, and Z is unbiased."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from tests.engines import gaussian_target, linear_problem, moment_errors
from torch import Tensor

import bnnp
from bnnp.inference import Target, functional, run, smc
from bnnp.inference.amortised import Amortised
from bnnp.inference.proposals import Gaussian
from bnnp.seeds import seeded

PATHS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "fixed": {"temperatures": 8},
    "ais": {"temperatures": [0.001, 0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0], "resample": False},
}


def problem(name: str) -> tuple[Target, Tensor, Tensor, Tensor]:
    if name == "gaussian":
        t = gaussian_target()
        return t, t.mean, t.cov, t.log_z
    p = linear_problem()
    return p.target, p.mean, p.cov, p.log_evidence


def in_errors(found: Tensor, error: Tensor, want: Tensor) -> float:
    return float(((found - want).abs() / error).max())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ["gaussian", "linear"])
def test_it_finds_the_evidence_and_the_moments(name: str, path: str) -> None:
    target, mean, cov, log_z = problem(name)
    found = run(target, smc.build, num_samples=8 * 200, num_populations=8, num_particles=200, num_moves=4, seed=2, **PATHS[path])
    report = found.report
    assert in_errors(report["log_evidence"], report["log_evidence_se"], log_z) < 4.5
    assert float(report["log_evidence_se"].max()) < 0.15
    if path != "ais":
        assert in_errors(report["log_evidence_bar"], report["log_evidence_bar_se"], log_z) < 5.5  # seven degrees of freedom
    log_weights = found.draws.log_weights
    assert log_weights is not None
    equal = run(target, smc.build, num_samples=4000, num_populations=8, num_particles=200, num_moves=4, seed=2, **PATHS[path]).draws
    assert equal.log_weights is None
    # Moves do not decorrelate resampled particles wholly: a quarter of them counts.
    assert max(moment_errors(equal.eps, mean, cov, float(1600 / 4) if path != "ais" else 80.0)) < 4.5
    W = log_weights.softmax(0).unsqueeze(-1)
    assert float(((W * found.draws.eps).sum(0) - equal.eps.mean(0)).abs().max()) < 0.05


@pytest.mark.parametrize("path", ["fixed", "ais"])
def test_the_evidence_is_unbiased(path: str) -> None:
    """The mean of exp(log_z) over many small populations is the evidence: not so for its logarithm, and not with a broken weight."""
    target, _, _, log_z = problem("linear")
    engine = smc.build(target, num_populations=800, num_particles=10, num_moves=1, **PATHS[path])
    state = engine.init(0)
    for _ in range(engine.num_updates):
        state = engine.update(state)
    ratio = (state.log_z - log_z).exp()
    error = ratio.std(0) / math.sqrt(800)
    assert float(error.max()) < 0.12
    assert float(((ratio.mean(0) - 1) / error).abs().max()) < 4
    assert float((state.log_z - log_z).mean(0).max()) < -0.02  # Jensen: populations this small err below
    assert float((engine.report(state)["log_evidence"] - log_z).abs().max()) < 4 * float(error.max())


def test_the_standard_error_is_that_of_repeated_runs() -> None:
    target = linear_problem().target
    found = [run(target, smc.build, num_samples=4, num_particles=50, num_populations=6, temperatures=8, seed=s).report for s in range(10)]
    spread = torch.stack([r["log_evidence"] for r in found]).std(0)
    claimed = torch.stack([r["log_evidence_se"].square() for r in found]).mean(0).sqrt()
    assert bool((claimed > 0.5 * spread).all()) and bool((claimed < 2.5 * spread).all())


def test_a_base_of_ones_own_leads_to_the_same_evidence() -> None:
    target, mean, _, log_z = problem("gaussian")
    draws = mean + torch.randn(400, *mean.shape, generator=seeded(0, "draws"), dtype=torch.float64) @ torch.eye(4, dtype=torch.float64)
    for settings in ({"proposal": Gaussian.fitted(draws)}, {"start": draws}):
        found = run(target, smc.build, num_samples=1200, num_particles=200, num_populations=6, num_moves=3, seed=1, **settings)
        assert in_errors(found.report["log_evidence"], found.report["log_evidence_se"], log_z) < 4.5


@pytest.mark.slow
def test_from_the_amortised_posterior_collapsed_and_not() -> None:
    """A small network: from the prior, from an amortised posterior that is far off, with the last layer and without: one evidence."""
    model = bnnp.BNNP(1, 1, hidden=(3,), prior="per_unit", activation="tanh", likelihood=bnnp.Gaussian(0.3, learn_noise=False)).double()
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    y = torch.sin(3 * x)
    found = []
    for collapse in (True, False):
        F = functional(model, [x, x[:3]], [y, -y[:3]], collapse=collapse)
        for settings in ({}, {"proposal": Amortised(F, model), "ess": 0.85, "num_moves": 3}):
            if settings or collapse:
                r = run(F, smc.build, num_samples=4, num_particles=60, num_populations=4, seed=3, **settings).report
                found.append((r["log_evidence"], r["log_evidence_se"]))
    (a, a_se), *others = found
    for b, b_se in others:
        assert bool(((a - b).abs() < 4.5 * (a_se.square() + b_se.square()).sqrt()).all()), found
    assert float(torch.stack([se for _, se in found]).max()) < 0.35


def test_without_resampling_there_is_no_second_estimate() -> None:
    r = run(problem("linear")[0], smc.build, num_samples=4, num_particles=8, **PATHS["ais"]).report
    assert bool(r["log_evidence_bar"].isnan().all()) and bool(r["log_evidence_bar_se"].isnan().all())


class Cliff(Target):
    """A likelihood that cannot be computed on one side: the engine treats it as zero."""

    dim, num_tasks = 2, 1

    @property
    def counts(self) -> Tensor:
        return torch.ones(1)

    def log_likelihood(self, eps: Tensor, batch: Tensor | None = None) -> Tensor:
        return torch.where(eps[..., 0] > 0, -eps[..., 1].square(), torch.nan)


def test_what_cannot_be_computed_has_no_density() -> None:
    found = run(Cliff(), smc.build, num_samples=400, num_particles=100, seed=0)
    want = math.log(0.5) - 0.5 * math.log(3)
    assert in_errors(found.report["log_evidence"], found.report["log_evidence_se"], torch.tensor([want]).double()) < 4.5
    assert bool((found.draws.eps[..., 0] > 0).all())


def test_a_run_that_ends_too_early_says_so() -> None:
    target, _, _, _ = problem("linear")
    built = smc.build(target, max_stages=2, num_particles=50, num_populations=4)
    state = built.init(0)
    for _ in range(built.num_updates):
        state = built.update(state)
    r = built.report(state)
    assert bool((r["inverse_temperature"] == 1).all()) and bool((r["stages"] == 2).all())
    assert float(r["log_evidence_se"].min()) > 0.3
    wide = built.report(dataclasses.replace(state, log_z=10 * state.log_z))  # populations far apart: an error of more than 1
    assert bool((wide["log_evidence_se"] >= 4.99 * state.log_z.std(0)).all()) and float(wide["log_evidence_se"].max()) > 2


def test_same_seed_same_result_and_tasks_do_not_meet() -> None:
    target, _, _, _ = problem("linear")
    a, b, c = (run(target, smc.build, num_samples=16, num_particles=16, num_populations=1, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.draws.eps, b.draws.eps) and not torch.equal(a.draws.eps, c.draws.eps)
    assert a.gradients > 0 and bool(a.report["log_evidence_se"].isfinite().all())
    assert a.posterior is not None and a.posterior.num_tasks == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ess": 1.0}, "Expected ess between 0 and 1"),
        ({"acceptance": 0.0}, "Expected acceptance between"),
        ({"step_size": -1.0}, "Expected step_size to be positive"),
        ({"resample": False}, "Expected fixed temperatures for AIS"),
        ({"temperatures": [0.5, 0.4, 1.0]}, "Expected inverse temperatures that increase"),
        ({"temperatures": [0.5]}, "Expected inverse temperatures that increase"),
        ({"num_particles": 0}, "Expected num_particles as a positive integer"),
        ({"start": torch.zeros(3, 4)}, "Expected start with shape"),
        ({"start": torch.zeros(3, 1, 4)}, "Expected start with shape"),
        ({"start": torch.zeros(3, 2, 4), "proposal": Gaussian(torch.zeros(2, 4), torch.ones(2, 4))}, "Expected a proposal or a start"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        smc.build(gaussian_target(), **settings)
