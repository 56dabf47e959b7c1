"""Other libraries recover the posterior through the adapters, and would not with another constant."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from tests.engines import Exact, linear_problem, moment_errors
from torch import Tensor

import bnnp
from bnnp.inference import functional
from bnnp.inference.adapters import laplace, numpy_callable, posteriors


@pytest.fixture(scope="module")
def exact() -> Exact:
    return linear_problem()


@pytest.fixture
def library() -> Any:
    """The library posteriors; what it and its parts warn of at import is their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("posteriors")


def network(**settings: Any) -> Any:
    model = bnnp.BNNP(1, 1, hidden=(5,), activation="tanh", seed=1).double()
    x = torch.linspace(-1, 1, 6, dtype=torch.float64)[:, None]
    return functional(model, x, torch.sin(2 * x), **settings)


def test_the_log_posterior_is_that_of_one_point() -> None:
    F = network()
    log_posterior, T = posteriors.log_posterior(F), posteriors.temperature(F)
    eps = torch.randn(3, F.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value, fit = log_posterior(eps[0], None)
    torch.testing.assert_close(value / T, F.log_joint(eps[0]))
    torch.testing.assert_close(fit, F.log_likelihood(eps[0]))
    torch.testing.assert_close(log_posterior(eps, None)[0] / T, F.log_joint(eps).sum())
    pairs = [torch.tensor([i, j]) for i in range(6) for j in range(i)]
    mean = torch.stack([log_posterior(eps[0], pair)[0] for pair in pairs]).mean()
    torch.testing.assert_close(mean / T, F.log_joint(eps[0]))


def drawn(library: Any, exact: Exact, T: float, chains: int = 400, steps: int = 500) -> Tensor:
    """Ends of so many chains of the library's SGHMC, from draws of the exact posterior: its Euler steps need friction and patience."""
    transform = library.sgmcmc.sghmc.build(posteriors.log_posterior(exact.target.task(0)), lr=0.02, alpha=4.0, temperature=T)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = torch.distributions.MultivariateNormal(exact.mean[0], exact.cov[0]).sample((chains,))
        state = transform.init(start, momenta=T**0.5 * torch.randn_like(start))
        for _ in range(steps):
            state, _ = transform.update(state, None)
    return state.params.unsqueeze(1)  # type: ignore[no-any-return]


def test_sghmc_of_posteriors_recovers_the_posterior(library: Any, exact: Exact) -> None:
    T = posteriors.temperature(exact.target.task(0))
    assert max(moment_errors(drawn(library, exact, T), exact.mean[:1], exact.cov[:1], 400)) < 5
    assert max(moment_errors(drawn(library, exact, 2 * T), exact.mean[:1], exact.cov[:1], 400)) > 8


def test_sgld_of_posteriors_makes_the_steps_of_this_package(library: Any, exact: Exact) -> None:
    """With a learning rate of N h, given the same noise: so its stationary law is that of `bnnp.inference.sgld`."""
    F, h = exact.target.task(0), 1e-3
    transform = library.sgmcmc.sgld.build(
        posteriors.log_posterior(F), lr=h / posteriors.temperature(F), temperature=posteriors.temperature(F)
    )
    eps = exact.mean[0] + 0.1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state, _ = transform.update(transform.init(eps), None)
        torch.manual_seed(0)
        z = torch.randn_like(eps)
    torch.testing.assert_close(state.params, eps + h * F.value_and_grad(eps)[1] + (2 * h) ** 0.5 * z)


def test_vi_of_posteriors_recovers_the_mean_field_posterior(library: Any, exact: Exact) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchopt = pytest.importorskip("torchopt")
    F = exact.target.task(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transform = library.vi.diag.build(
            posteriors.log_posterior(F),
            torchopt.adam(lr=lambda i: 0.05 * 0.99**i),
            temperature=posteriors.temperature(F),
            n_samples=16,
            init_log_sds=-1.0,
        )
        state = transform.init(exact.mean[0] + 0.2)
        for _ in range(500):
            state, _ = transform.update(state, None)
    std = exact.cov[0].inverse().diagonal().rsqrt()
    assert float(((state.params - exact.mean[0]) / std).abs().max()) < 0.2
    torch.testing.assert_close(state.log_sd_diag.exp(), std, rtol=0.1, atol=0)


def test_the_numpy_callable_has_the_value_and_the_gradient() -> None:
    F = network()
    fun = numpy_callable.value_and_grad(F)
    eps = np.random.default_rng(0).standard_normal((3, F.dim))
    values, gradients = fun(eps)
    torch.testing.assert_close(torch.tensor(values), F.log_joint(torch.tensor(eps)))
    for e, v, g in zip(eps, values, gradients, strict=True):
        value, gradient = fun(e)
        assert isinstance(value, float)
        assert value == pytest.approx(v)
        np.testing.assert_allclose(gradient, g)
        step = 1e-5 * np.eye(F.dim)
        numeric = [(fun(e + s)[0] - fun(e - s)[0]) / 2e-5 for s in step]
        np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-5)
    eps.flags.writeable = False
    assert fun(eps)[1].shape == eps.shape
    value, gradient = fun(np.full(F.dim, 1e200))
    assert value == -np.inf
    assert not gradient.any()


def test_scipy_finds_the_posterior_through_it(exact: Exact) -> None:
    optimize = pytest.importorskip("scipy.optimize")
    fun = numpy_callable.value_and_grad(exact.target.task(0))
    found = optimize.minimize(lambda e: tuple(-part for part in fun(e)), np.zeros(3), jac=True, method="BFGS", options={"gtol": 1e-8})
    np.testing.assert_allclose(found.x, exact.mean[0].numpy(), atol=1e-6)


def test_a_sampler_of_ten_lines_of_numpy_recovers_the_posterior(exact: Exact) -> None:
    fun, rng = numpy_callable.value_and_grad(exact.target.task(0)), np.random.default_rng(0)
    eps, kept = rng.standard_normal((300, 3)), []
    for i in range(60):
        start, p = eps, rng.standard_normal(eps.shape)
        (value, g), h = fun(eps), 0.08 * rng.uniform(0.8, 1.2)
        energy = value - 0.5 * (p**2).sum(-1)
        for _ in range(12):
            p = p + 0.5 * h * g
            eps = eps + h * p
            value, g = fun(eps)
            p = p + 0.5 * h * g
        accepted = np.log(rng.uniform(size=len(eps))) < value - 0.5 * (p**2).sum(-1) - energy
        eps = np.where(accepted[:, None], eps, start)
        kept += [eps] if i >= 40 else []
    draws = torch.tensor(np.concatenate(kept[::10]))
    assert max(moment_errors(draws.unsqueeze(1), exact.mean[:1], exact.cov[:1], 300)) < 5


def test_the_module_has_the_outputs_and_eps_as_its_parameter() -> None:
    F = network()
    eps = torch.randn(F.dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net = laplace.Network(F, eps)
    assert [(name, p.shape) for name, p in net.named_parameters()] == [("eps", (F.dim,))]
    torch.testing.assert_close(net(F.scaled.x[0]), F.outputs(eps))
    net(F.scaled.x[0]).sum().backward()
    assert net.eps.grad is not None
    assert bool((net.eps.grad != 0).any())
    # As such libraries call it: with parameters of their own, mapped over points.
    other = {"eps": eps + 1}
    found = torch.func.vmap(lambda x: torch.func.functional_call(net, other, (x[None],))[0])(F.scaled.x[0])
    torch.testing.assert_close(found, F.outputs(eps + 1))
    assert float(laplace.Network(F).eps.detach().abs().sum()) == 0


def test_wrong_functionals_are_named(exact: Exact) -> None:
    for adapter in (posteriors.log_posterior, posteriors.temperature, numpy_callable.value_and_grad, laplace.Network):
        with pytest.raises(ValueError, match="Expected the functional of one task"):
            adapter(exact.target)
    with pytest.raises(ValueError, match="with collapse=False"):
        laplace.Network(network(collapse=True))
    with pytest.raises(ValueError, match="Expected eps with shape"):
        laplace.Network(network(), torch.zeros(3))
