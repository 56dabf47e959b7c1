"""From the output of the network to the distribution of y.

A likelihood knows its own noise and scores outputs; it does not know the network. Everything here is in the network's
units; `rescale` and `fit` tell a likelihood what it has to know of the user's.
"""

from __future__ import annotations

from bnnp.likelihoods.base import Likelihood, noise_factor, noise_of
from bnnp.likelihoods.bounded import Beta
from bnnp.likelihoods.counts import NegativeBinomial, Poisson
from bnnp.likelihoods.gaussian import Gaussian, Heteroscedastic
from bnnp.likelihoods.labels import Bernoulli, Categorical
from bnnp.likelihoods.multivariate import MultivariateGaussian
from bnnp.likelihoods.student import StudentT

__all__ = [
    "LIKELIHOODS",
    "Bernoulli",
    "Beta",
    "Categorical",
    "Gaussian",
    "Heteroscedastic",
    "Likelihood",
    "MultivariateGaussian",
    "NegativeBinomial",
    "Poisson",
    "StudentT",
    "noise_factor",
    "noise_of",
]

LIKELIHOODS: dict[str, type[Likelihood]] = {
    kind.__name__.lower(): kind
    for kind in (Bernoulli, Beta, Categorical, Gaussian, Heteroscedastic, MultivariateGaussian, NegativeBinomial, Poisson, StudentT)
}
