"""Pyro's samplers on a functional: the same density, the same posterior as our NUTS, a learned prior, and nothing global touched."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from tests.engines import linear_problem, moment_errors
from torch import Tensor

import bnnp
from bnnp.inference import Functional, diagnostics, functional, nuts, run
from bnnp.inference.adapters.pyro import potential, pyro_model
from bnnp.seeds import seeded

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pyro = pytest.importorskip("pyro")
    from pyro.infer import MCMC, NUTS


def drawn(kernel: Any, draws: int, warmup: int, **settings: Any) -> Tensor:
    """Draws of one chain of Pyro, with its own seed, the global generator as it was."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        mcmc = MCMC(kernel, num_samples=draws, warmup_steps=warmup, disable_progbar=True, **settings)
        mcmc.run()
        return mcmc.get_samples()["eps"]


def test_the_model_and_the_potential_are_the_log_joint() -> None:
    F = linear_problem().target.task(0)
    at = torch.randn(F.dim, generator=seeded(0, "at"), dtype=torch.float64)
    trace = pyro.poutine.trace(pyro.poutine.condition(pyro_model(F), {"eps": at})).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), F.log_joint(at))
    start, energy = potential(F)
    torch.testing.assert_close(energy({"eps": at}), -F.log_joint(at))
    assert start["eps"].shape == (F.dim,)
    assert torch.equal(potential(F, at)[0]["eps"], at)


def test_pyro_s_nuts_finds_the_exact_posterior() -> None:
    exact = linear_problem()
    initial, energy = potential(exact.target.task(1))
    eps = drawn(NUTS(potential_fn=energy), 200, 60, initial_params=initial)
    effective = float(diagnostics.ess_bulk(eps[:, None]).min())
    assert effective > 40
    assert max(moment_errors(eps[:, None], exact.mean[1:], exact.cov[1:], effective)) < 4.5


def test_one_task_at_a_time() -> None:
    for adapter in (pyro_model, potential):
        with pytest.raises(ValueError, match=r"one task without a task axis. Got 2. Use functional.task\(i\)"):
            adapter(linear_problem().target)


def small_network() -> tuple[Functional, Tensor]:
    g = seeded(3, "small network")
    model = bnnp.BNNP(1, 1, hidden=(4,), prior="diagonal", likelihood=bnnp.Gaussian(0.3, learn_noise=False)).double()
    x = torch.linspace(-2, 2, 8, dtype=torch.float64)[:, None]
    y = x.sin() + 0.3 * torch.randn(8, 1, generator=g, dtype=torch.float64)
    return functional(model, x, y), torch.linspace(-3, 3, 5, dtype=torch.float64)[:, None]


@pytest.mark.slow
def test_our_nuts_agrees_with_pyro_s() -> None:
    F, at = small_network()
    initial, energy = potential(F)
    theirs = F.outputs(drawn(NUTS(potential_fn=energy), 250, 100, initial_params=initial), at)[..., 0]  # (draws, points)
    found = run(F, nuts.build, num_samples=800, num_chains=8, warmup=100, draws=100, seed=1)
    assert found.report["rhat"].item() < 1.05
    ours = F.outputs(found.draws.eps[:, 0], at)[..., 0]
    error = diagnostics.mcse_mean(theirs[:, None])
    own = ours.std(0) / math.sqrt(float(found.report["ess_bulk"]))
    assert ((theirs.mean(0) - ours.mean(0)).abs() / (error.square() + own.square()).sqrt()).max() < 4.5
    # The standard deviation of a near-normal quantity has an error of std / sqrt(2 n).
    n = float(diagnostics.ess_bulk(theirs[:, None]).min())
    assert ((theirs.std(0) / ours.std(0)).log().abs()).max() < 4.5 * math.sqrt(0.5 / n + 0.5 / float(found.report["ess_bulk"]))


def test_a_learned_prior_in_pyro_s_nuts_and_nothing_global_touched() -> None:
    g = seeded(0, "lines")
    x = 4 * torch.rand(30, 12, 1, generator=g) - 2
    y = 2 * x + torch.randn(30, 1, 1, generator=g) + 0.5 * torch.randn(x.shape, generator=g)
    model = bnnp.BNNP(1, 1, hidden=(6,), likelihood=bnnp.Gaussian(0.5))
    bnnp.meta_train(model, list(zip(x, y, strict=True)), steps=200, learning_rate=2e-2, seed=0, progress=False)
    xc, yc, xt = torch.tensor([[0.5]]), torch.tensor([[1.5]]), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    before, store = torch.get_rng_state(), dict(pyro.get_param_store().items())
    error = {}
    for name, prior in (("learned", None), ("fixed", "diagonal")):
        F = functional(model, xc, yc, prior=prior)
        eps = drawn(NUTS(pyro_model(F), max_tree_depth=4), 40, 40)
        error[name] = (F.predict(eps, xt).mean - (2 * xt + 0.5)).square().mean().sqrt()
    assert torch.equal(torch.get_rng_state(), before)
    assert dict(pyro.get_param_store().items()) == store
    # One point says where the line is, if the prior knows that it is a line, and how steep.
    assert error["learned"] < 0.6
    assert error["fixed"] > 1.2
