"""One row of the study: an engine with its settings, under one of two priors, that answers as a model does and keeps what it cost."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import bnnp
from bnnp.inference import ENGINES, functional, run
from bnnp.objectives import avi
from bnnp.seeds import seeded
from bnnp.tasks import Context, TaskBatch
from experiments.prior_transfer.problems import Config, process_of

DTYPES = {"float64": torch.float64, "float32": torch.float32}
Row = dict[str, Any]
Report = dict[str, list[float]]


class Answering:
    """Answer with the posterior of a row's engine, run on the very context that is asked about.

    After an answer, `seconds` (of the processor, all tasks together), `gradients` (of one task) and `report` (one number for each task) say
    what it took; `integrated` is the posterior of the same draws of the hidden layers with the last one integrated out, or None where
    the answer has that already.
    """

    def __init__(self, process: str, model: bnnp.BNNP, row: Row, prior: str, config: Config) -> None:
        self.process, self.model, self.row, self.config = process, model, row, config
        self.prior = None if prior == "learned" else str(config["fixed_prior"])
        self.seconds, self.gradients = 0.0, 0
        self.report: Report = {}
        self.integrated: Any = None

    def condition(self, xc: Tensor, yc: Tensor, mask: Tensor | None = None, num_samples: int = 64, seed: int = 0) -> Any:
        """Return the posterior of each task."""
        start = time.process_time()
        with torch.enable_grad():  # the evaluation asks under no_grad
            answer = KINDS[self.row["kind"]](self, xc, yc, mask, num_samples, seed)
        self.seconds += time.process_time() - start
        if self.row["kind"] == "engine":
            self._integrate(xc, yc, mask)
        return answer

    def functional(self, xc: Tensor, yc: Tensor, mask: Tensor | None, collapse: bool, dtype: torch.dtype = torch.float64) -> Any:
        """Return the log-joint of the tasks under the row's prior."""
        return functional(self.model, xc, yc, mask, prior=self.prior, collapse=collapse, dtype=dtype)

    def oracle(self, xc: Tensor, yc: Tensor, mask: Tensor | None, num_samples: int, seed: int) -> Any:
        """Return the exact posterior of the process."""
        process: Any = process_of(self.process, self.config)
        return process.condition(xc, yc, mask=mask)

    def amortised(self, xc: Tensor, yc: Tensor, mask: Tensor | None, num_samples: int, seed: int) -> Any:
        """Return the posterior of one pass, its particles reweighted by their importance or its last layer drawn, if the row says so."""
        posterior = self.model.condition(xc, yc, mask=mask, num_samples=num_samples, seed=seed)
        if self.row.get("drawn", False):  # what engines over all layers are held against: exact given the hidden layers, and as many draws
            target = self.functional(xc, yc, mask, False)
            return target.posterior(target.start(posterior, num_samples, seed))
        if not self.row.get("reweight", False):
            return posterior
        told = posterior.diagnose()
        self._note({"pareto_k": told.pareto_k, "effective_sample_size": told.effective_sample_size, "log_evidence": told.log_evidence})
        return _Reweighted(posterior)

    def engine(self, xc: Tensor, yc: Tensor, mask: Tensor | None, num_samples: int, seed: int) -> Any:
        """Return what an engine of the package finds."""
        row = self.row
        dtype = DTYPES[row.get("dtype", self.config["precision"][self.process])]
        target = self.functional(xc, yc, mask, row.get("collapse", False), dtype)
        start = self.model.condition(xc, yc, mask=mask, num_samples=num_samples, seed=seed) if row.get("warm") else None
        # Bound here, since some engines have a setting of the name of an argument of `run`.
        engine = functools.partial(ENGINES[row["engine"]], **row.get("settings", {}))
        found = run(target, engine, num_samples=num_samples, seed=seed, warm_start=start)
        self.gradients = found.gradients
        self._note(found.report)
        self.draws = found.draws
        return found.posterior

    def no_inference(self, xc: Tensor, yc: Tensor, mask: Tensor | None, num_samples: int, seed: int) -> Any:
        """Return draws of the hidden layers from the prior, which saw no data, with the last layer integrated out given them."""
        target = self.functional(xc, yc, mask, True)
        eps = torch.randn(num_samples, 1, target.dim, generator=seeded(seed, "prior"), dtype=torch.float64)
        return target.posterior(eps.expand(-1, target.num_tasks, -1))

    def fit(self, xc: Tensor, yc: Tensor, mask: Tensor | None, num_samples: int, seed: int) -> Any:
        """Return the posterior of inference networks that were trained on this one task, under the fixed prior."""
        settings = self.row["settings"]
        model = fixed_twin(self.model, self.config)
        x, y = xc[:, mask[0]] if mask is not None else xc, yc[:, mask[0]] if mask is not None else yc
        context = Context(x, y, torch.ones_like(x[..., 0], dtype=torch.bool))
        batch = TaskBatch(context, Context.empty(1, 1, 1, like=x))
        generator, optimiser = seeded(seed, "fit"), torch.optim.Adam(model.parameters(), lr=settings["learning_rate"])
        rate = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, settings["steps"])
        elbo = torch.zeros(1)
        for _ in range(settings["steps"]):
            elbo = avi(model, batch, settings["num_samples"], generator)
            optimiser.zero_grad()
            (-elbo.sum()).backward()
            optimiser.step()
            rate.step()
        self.gradients = settings["steps"] * settings["num_samples"]
        self._note({"elbo": elbo.detach()}, add=True)
        return model.condition(x, y, num_samples=num_samples, seed=seed)

    def _integrate(self, xc: Tensor, yc: Tensor, mask: Tensor | None) -> None:
        """Keep the posterior of the draws of the hidden layers, given which the last one is known in closed form."""
        if not self.row.get("collapse", False):
            target = self.functional(xc, yc, mask, collapse=True)
            self.integrated = target.posterior(self.draws.eps[..., : target.dim], self.draws.log_weights)

    def _note(self, report: dict[str, Tensor], add: bool = False) -> None:
        for name, values in report.items():
            told = values.double().reshape(-1).tolist()
            self.report[name] = self.report.get(name, []) + told if add else told


class Given:
    """Answer with a posterior that is there."""

    def __init__(self, posterior: Any) -> None:
        self.posterior = posterior

    def condition(self, xc: Tensor, yc: Tensor, mask: Tensor | None = None, num_samples: int = 64, seed: int = 0) -> Any:
        """Return it."""
        return self.posterior


class _Reweighted:
    """Predict with particles weighted by their importance."""

    def __init__(self, posterior: bnnp.Posterior) -> None:
        self.posterior = posterior

    def predict(self, xt: Tensor) -> bnnp.Predictive:
        """Return the reweighted prediction."""
        return self.posterior.predict(xt, reweight=True)


def fixed_twin(model: bnnp.BNNP, config: Config) -> bnnp.BNNP:
    """Return an untrained network like another, with its scaling, whose prior is N(0, 1/p) and stays so."""
    # The same distribution as "diagonal", whose covariances are all alike, for one factorisation instead of one for each unit.
    plain = bnnp.Prior("shared", learn_mean=False, learn_scale=False)
    twin = bnnp.BNNP(
        1,
        1,
        prior=plain,
        likelihood=bnnp.Gaussian(config["noise"], learn_noise=False),
        activation=model.config["activation"],
        **config["network"],
    )
    twin.scaling = copy.deepcopy(model.scaling)
    twin.likelihood.rescale(twin.scaling.y_scale)
    return twin


KINDS: dict[str, Callable[..., Any]] = {
    "oracle": Answering.oracle,
    "amortised": Answering.amortised,
    "no inference": Answering.no_inference,
    "engine": Answering.engine,
    "fit": Answering.fit,
}
