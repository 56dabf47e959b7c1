"""Another likelihood for a network that is there: its noise is given in the units of y, and nothing of it is left to be learned."""

from __future__ import annotations

import torch

from bnnp.likelihoods import Likelihood
from bnnp.networks import BNNP

__all__ = ["rebound"]


def rebound(likelihood: Likelihood, model: BNNP, dtype: torch.dtype) -> Likelihood:
    """Return another likelihood in the units of a model's network.

    Raises:
        ValueError: a likelihood of other outputs, or with parameters to learn.
        TypeError: no likelihood.
    """
    if not isinstance(likelihood, Likelihood):
        raise TypeError(f"Expected likelihood as one of bnnp's, such as bnnp.Gaussian(). Got {type(likelihood).__name__}.")
    if likelihood.scale_y != model.likelihood.scale_y or likelihood.f_dim(model.y_dim) != model.likelihood.f_dim(model.y_dim):
        raise ValueError(
            f"Expected a likelihood of as many network outputs as the model's {type(model.likelihood).__name__}. "
            f"Got {type(likelihood).__name__}. Build a model with it."
        )
    bound = likelihood.bind(model.y_dim).to(model.device, dtype)
    config, learned = likelihood.config(), dict(likelihood.named_parameters())
    given = [flag for flag in ("learn_noise", "learn_scale") if flag in config]
    # A likelihood that another model has learned is bound as it was constructed: what it learned is in units that are not known here.
    forgets = any(p.shape == learned[name].shape and not torch.equal(p, learned[name].to(p)) for name, p in bound.named_parameters())
    if any(config[flag] for flag in given) or (forgets and not given):
        raise ValueError(
            "Expected a likelihood whose noise is given in the units of y, as in Gaussian(0.3, learn_noise=False), for nothing is learned "
            f"here. Got {type(likelihood).__name__} with parameters to learn. Leave it out to take what the model has learned."
        )
    bound.rescale(model.scaling.y_scale)
    own = dict(model.likelihood.named_buffers())
    for name, level in bound.named_buffers():
        # What f = 0 stands for, such as the mean count, belongs to the network.
        if name == "log_level" and name in own:
            level.copy_(own[name])
    return bound.to(model.device, dtype).requires_grad_(False)
