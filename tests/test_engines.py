"""What holds for every engine: one shape of draws and reports, the same seed the same draws, resuming, one task or many, warm starts."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.laws import randn
from torch import Tensor

import bnnp
from bnnp.inference import ENGINES, Functional, Inference, functional, run
from bnnp.inference.resuming import Stored, fingerprint, pack, unpack
from bnnp.inference.running import find

SHORT: dict[str, dict[str, Any]] = {
    "ensemble": {"members": 3, "steps": 4},
    "hmc": {"num_chains": 2, "warmup": 5, "draws": 6},
    "mala": {"num_chains": 2, "warmup": 5, "draws": 6},
    "nuts": {"num_chains": 2, "warmup": 5, "draws": 6, "max_depth": 3},
    "sghmc": {"num_chains": 2, "climb": 3, "warmup": 3, "steps": 6, "thin": 1},
    "sgld": {"num_chains": 2, "climb": 3, "warmup": 3, "steps": 6, "thin": 1},
    "smc": {"num_particles": 8, "num_populations": 2, "num_moves": 1, "num_leapfrog": 2},
    "swag": {"climb": 3, "steps": 6, "every": 2, "rank": 2, "batch_size": 2},
    "givi": {"steps": 4, "num_inducing": 3},
    "laplace": {"steps": 4},
    "laplace_diagonal": {"steps": 4},
    "laplace_last_layer": {"steps": 4},
    **{name: {"steps": 4, "estimator": "path"} for name in ("mean_field", "per_unit_vi", "per_layer_vi", "full_vi")},
}
FROM_NOTHING = {"amortised"}  # engines for which there is nothing to start from


@lru_cache
def network() -> tuple[bnnp.BNNP, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    model = bnnp.BNNP(1, 1, hidden=(4,), prior="shared", likelihood=bnnp.Gaussian(0.3), activation="tanh").double()
    for parameter in model.parameters():
        parameter.data += 0.2 * randn(*parameter.shape, generator=g)
    x = randn(2, 5, 1, generator=g)
    mask = torch.tensor([[True] * 5, [True] * 4 + [False]])
    return model, x, torch.sin(2 * x), mask


def target(single: bool = False, **settings: Any) -> Functional:
    model, x, y, mask = network()
    return functional(model, x[0], y[0], **settings) if single else functional(model, x, y, mask, **settings)


def settings_of(name: str) -> dict[str, Any]:
    return {"model": network()[0], "num_particles": 16} if name == "amortised" else SHORT[name]


def found(name: str, F: Functional, **more: Any) -> Inference:
    return run(F, name, **{"num_samples": 5, **settings_of(name), **more})


OF_ALL_LAYERS = {name for name in ENGINES if name.startswith("laplace")}  # engines that need f itself


@pytest.mark.parametrize(("name", "collapse"), [(n, c) for n in ENGINES for c in (False, True) if not c or n not in OF_ALL_LAYERS])
def test_every_engine_gives_draws_a_posterior_and_a_report(name: str, collapse: bool) -> None:
    F = target(collapse=collapse)
    batches = {} if name != "swag" or not collapse else {"batch_size": None}  # a collapsed last layer couples the points
    result = found(name, F, **batches)
    assert result.draws.eps.shape == (5, 2, F.dim) and bool(result.draws.eps.isfinite().all())
    assert result.draws.log_weights is None or result.draws.log_weights.shape == (5, 2)
    assert result.report and all(value.shape == (2,) for value in result.report.values())
    assert result.gradients >= 0 and result.seconds > 0
    assert result.posterior is not None
    predictive = result.posterior.predict([[0.0], [1.0]])
    assert predictive.mean.shape == (2, 2, 1) and bool(predictive.mean.isfinite().all())
    again = found(name, F, **batches)
    assert torch.equal(again.draws.eps, result.draws.eps)
    other = found(name, F, seed=1, **batches)
    assert not torch.equal(other.draws.eps, result.draws.eps)


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_takes_one_task_without_a_task_axis(name: str) -> None:
    one, batched = found(name, target(single=True)), found(name, target(single=True).batched)
    assert torch.equal(one.draws.eps, batched.draws.eps)
    assert one.posterior is not None and one.posterior.predict([[0.0]]).mean.shape == (1, 1)


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    """The state after two updates goes through a file, and the rest of the run does not notice."""
    F, settings = target(), settings_of(name)
    build = find(name)
    engine = build(F, **settings)
    state = engine.init(0)
    for _ in range(min(2, engine.num_updates)):
        state = engine.update(state)
    stored = Stored(tmp_path, fingerprint(F, build, 0, settings), every=0.0)
    stored.store(2, engine.num_updates + 2, 1.0, state)
    loaded = Stored(tmp_path, fingerprint(F, build, 0, settings)).load()
    assert loaded is not None and loaded[:2] == (2, 1.0)
    for _ in range(min(2, engine.num_updates), engine.num_updates):
        state = engine.update(state)
    resumed = loaded[2]
    second = build(F, **settings)
    for _ in range(min(2, engine.num_updates), engine.num_updates):
        resumed = second.update(resumed)
    assert torch.equal(engine.sample(state, 5, 0).eps, second.sample(resumed, 5, 0).eps)
    for key, value in engine.report(state).items():
        torch.testing.assert_close(second.report(resumed)[key], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", sorted(set(ENGINES) - FROM_NOTHING))
def test_every_engine_may_start_from_another_posterior(name: str) -> None:
    model, x, y, mask = network()
    posterior = model.condition(x, y, mask, num_samples=8)
    warm, cold = found(name, target(), warm_start=posterior), found(name, target())
    assert not torch.equal(warm.draws.eps, cold.draws.eps)


@pytest.mark.parametrize("name", ENGINES)
def test_states_hold_nothing_but_numbers(name: str) -> None:
    engine = find(name)(target(), **settings_of(name))
    tensors: dict[str, Tensor] = {}
    state = unpack(pack(engine.update(engine.init(0)), tensors), tensors)
    assert isinstance(state.gradients, int)


def test_names_and_settings_that_are_not_there() -> None:
    with pytest.raises(ValueError, match="Expected an engine among amortised, "):
        run(target(), "gibbs")
    with pytest.raises(TypeError, match="Expected an engine as a name"):
        run(target(), 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Expected settings of the engine among num_chains, .* Got chains"):
        run(target(), "nuts", chains=3)
    with pytest.raises(ValueError, match="Got no model, which has no default"):
        run(target(), "amortised")
    with pytest.raises(TypeError, match="Expected warm_start as a posterior"):
        run(target(), "hmc", warm_start=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Expected collapse as True or False"):
        target(collapse="yes")
    assert len({fingerprint(target(), find(name), 0, {}) for name in ENGINES}) == len(ENGINES)
