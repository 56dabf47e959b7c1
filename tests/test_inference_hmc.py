"""HMC, NUTS and MALA: exact moments, exact mechanics, calibration on a network, and a broken acceptance step that does not pass it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from tests.engines import gaussian_target, linear_problem, moment_errors

from bnnp.inference import hmc, mala, nuts, run

BUILDS: dict[str, Callable[..., Any]] = {"hmc": hmc.build, "nuts": nuts.build, "mala": mala.build}
SHORT: dict[str, dict[str, Any]] = {
    "hmc": {"warmup": 200, "draws": 400},
    "nuts": {"warmup": 200, "draws": 400},
    "mala": {"warmup": 400, "draws": 3000, "keep": 3000},
}


@pytest.mark.parametrize("name", BUILDS)
def test_moments_of_a_gaussian_within_the_engine_s_own_error(name: str) -> None:
    target = gaussian_target()
    found = run(target, BUILDS[name], num_samples=4 * SHORT[name]["draws"], seed=1, **{"keep": 400, **SHORT[name]})
    assert found.report["rhat"].max() < 1.02
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
    found = run(problem.target, BUILDS[name], num_samples=4 * SHORT[name]["draws"], seed=2, **{"keep": 400, **SHORT[name]})
    effective = float(found.report["ess_bulk"].min())
    off_mean, off_var = moment_errors(found.draws.eps, problem.mean, problem.cov, effective)
    assert off_mean < 4.5
    assert off_var < 4.5
    assert found.posterior is not None
    mean = found.posterior.predict(problem.x).mean[..., 0]
    assert ((mean - problem.f_mean) / problem.f_std).abs().max() < 4.5 / math.sqrt(effective)
