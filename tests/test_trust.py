"""Laws of self-diagnosis: importance weights are densities, evidence is evidence, ranks are uniform where inference is exact."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import bnnp
import reference
import scenarios
from bnnp import trust
from bnnp.networks import BNNP
from bnnp.tasks import Context, collate
from laws import INSTANCES, randn, random_layer, relative_error
from test_networks import build, data, exact_of_tiny

LAWS = pytest.mark.parametrize("kind, shared", INSTANCES, ids=lambda value: str(value))
LAST = pytest.mark.parametrize("last_layer", ["exact", "amortised"])


@LAWS
@pytest.mark.parametrize("space", ["weight", "function"])
def test_the_log_ratio_is_that_of_two_gaussian_densities(kind: str, shared: bool, space: str) -> None:
    from bnnp.conjugate import condition

    layer = random_layer(kind, shared, 0, (3, 2), 3)
    q = condition(layer.prior.given().core, layer.A, layer.sites, space)
    eps = randn(4, *q.mean.shape, generator=torch.Generator().manual_seed(1))
    cov = q.covariance.expand(*q.mean.shape, q.mean.shape[-1])
    k = eps.shape[-1]
    want = torch.zeros(eps.shape[:3])
    for index in torch.cartesian_prod(*(torch.arange(n) for n in eps.shape[:3])):
        i, s, t = (int(v) for v in index)
        for u in range(eps.shape[3]):
            log_q = reference.gaussian_log_density(eps[i, s, t, u], q.mean[s, t, u].detach(), cov[s, t, u].detach())
            want[i, s, t] += log_q - reference.gaussian_log_density(eps[i, s, t, u], torch.zeros(k).double(), torch.eye(k).double())
    assert relative_error(q.log_ratio(eps), want) <= 1e-6


def tiny(activation: str, last_layer: str) -> BNNP:
    """A network of one hidden unit whose pseudo-observations say little, so that q is as wide as the exact posterior."""
    model = BNNP(1, 1, hidden=(1,), prior="diagonal", activation=activation, last_layer=last_layer, seed=3).double()
    output = list(model._layers[0].net)[-1]  # type: ignore[arg-type]
    with torch.no_grad():
        output.bias[1] += 3.0  # type: ignore[index, operator]
    return model


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@LAST
def test_importance_weighted_evidence_is_the_evidence(activation: str, last_layer: str) -> None:
    """Against quadrature over the weights of a network with one hidden unit."""
    model = tiny(activation, last_layer)
    x, y = scenarios.random_task(6, 1, 1, torch.Generator().manual_seed(0))
    exact = exact_of_tiny(model, x, y, x, activation)
    posterior = model.condition(x, y, num_samples=100_000)
    d = posterior.diagnose()
    assert abs(float(d.log_evidence - exact["log_evidence"])) < 5 * float(d.log_evidence_se) + 1e-3
    assert float(d.elbo) <= float(d.log_evidence) and relative_error(d.gap, d.log_evidence - d.elbo) <= 1e-9
    assert float(d.log_evidence_se) < 0.1
    batch = bnnp.TaskBatch(collate([(x, y)]), collate([(x, y)]))
    values = torch.stack([bnnp.objectives.iw_avi(model, batch, 16, torch.Generator().manual_seed(i)).detach() for i in range(200)])
    error = float(values.std()) / math.sqrt(200)
    assert float(d.elbo) - 3 * error < float(values.mean()) < float(exact["log_evidence"]) + 3 * error


def test_the_importance_weighted_objective_is_its_definition() -> None:
    model, tasks = build(), data((4, 0, 3))
    batch = bnnp.TaskBatch(collate(tasks), collate(tasks))
    from bnnp.objectives import training_noise

    value = bnnp.objectives.iw_avi(model, batch, 6, torch.Generator().manual_seed(0))
    particles = model.particles(model.scale(batch.context), 6, training_noise(model, torch.Generator().manual_seed(0)), canonical=True)
    want = particles.log_weights.exp().mean(0).log() - batch.context.counts * model.scaling.log_volume
    assert relative_error(value, want) <= 1e-9
    assert float(value[1].detach()) == pytest.approx(0.0, abs=1e-12)


def test_reweighted_predictions_come_closer_to_the_exact_posterior() -> None:
    model = tiny("tanh", "exact")
    x, y = scenarios.random_task(6, 1, 1, torch.Generator().manual_seed(0))
    grid = torch.linspace(-2, 2, 5, dtype=torch.float64).unsqueeze(-1)
    exact = exact_of_tiny(model, x, y, grid, "tanh")
    posterior = model.condition(x, y, num_samples=50_000)
    plain, weighted = (posterior.predict(grid, reweight=how).mean[:, 0] for how in (False, True))
    off, on = (float((mean - exact["mean"]).abs().max()) for mean in (plain, weighted))
    assert on < 0.3 * off and on < 0.01


@LAST
def test_one_exact_layer_has_equal_weights(last_layer: str) -> None:
    model, (x, y) = build(hidden=(), last_layer=last_layer), data((5,))[0]
    d = model.condition(x, y, num_samples=50).diagnose()
    assert relative_error(d.effective_sample_size, torch.tensor(50.0)) <= 1e-9
    assert float(d.pareto_k) == 0.0 and float(d.log_evidence_se) <= 1e-9
    assert (float(d.gap) <= 1e-9) == (last_layer == "exact")


def trained(x_spread: float = 1.0) -> tuple[BNNP, list[Any]]:
    g = torch.Generator().manual_seed(0)
    tasks = []
    for _ in range(40):
        x = x_spread * randn(20, 1, generator=g)
        tasks.append((x, torch.sin(x + 3 * float(torch.rand((), generator=g))) + 0.1 * randn(20, 1, generator=g)))
    model = BNNP(1, 1, hidden=(8,), prior=bnnp.Prior("shared", spread=0.9), shared_noise=True, activation="tanh").double()
    bnnp.meta_train(model, tasks, steps=150, learning_rate=2e-2, progress=False, context=(3, 10))
    return model, tasks


def test_distances_and_sentences_tell_inside_from_outside() -> None:
    model, tasks = trained()
    x, y = tasks[0]
    inside = model.condition(x[:8], y[:8], num_samples=256).diagnose()
    assert "like those of meta-training" in inside.sentence and float(inside.distance_x) < 1 and float(inside.p_value_y) > 0.01
    far = model.condition(x[:8] + 8, y[:8], num_samples=256).diagnose()
    assert float(far.distance_x) > 2 and "inputs lie outside" in far.sentence
    asked = model.condition(x[:8], y[:8]).predict(torch.tensor([[0.0], [8.0]]))  # a familiar context, and a target that is not
    assert asked.distance_x.shape == (2,) and float(asked.distance_x[0]) < 1 < 2 < float(asked.distance_x[1])
    strange = model.condition(x[:8], y[:8] + 6 * (-1) ** torch.arange(8).unsqueeze(-1), num_samples=256).diagnose()
    assert float(strange.p_value_y) < 0.01 and float(strange.distance_y) > 1 and "unlike what the learned prior" in strange.sentence
    many = model.condition(x.repeat(3, 1), y.repeat(3, 1), num_samples=256).diagnose()
    assert "60 points, and meta-training showed at most 10" in many.sentence
    few = model.condition(x[:8], y[:8], num_samples=30).diagnose()
    assert "too few to tell" in few.sentence or "too unequal" in few.sentence
    none = model.condition(x[:0], y[:0], num_samples=256).diagnose()
    assert "no data yet" in none.sentence and math.isnan(float(none.distance_x))
    fresh = BNNP(1, 1, hidden=(4,)).condition(x[:5], y[:5], num_samples=100).diagnose()
    assert "not meta-trained" in fresh.sentence and math.isnan(float(fresh.distance_x))


def test_what_came_by_updates_is_looked_at_and_copies_do_not_count() -> None:
    model, tasks = trained()
    x, y = tasks[0]
    for start in (model.condition(x[:0], y[:0], num_samples=256), model.condition(x[:8], y[:8], num_samples=256)):
        far = start.update(x[:8] + 40, y[:8] + 30).diagnose()
        assert float(far.distance_x) > 2 and "inputs lie outside" in far.sentence
    wild = model.condition(x[:2], y[:2], num_samples=256).update(x, y + 4 * (-1) ** torch.arange(20).unsqueeze(-1))
    before, after = wild.diagnose(), wild.resample().diagnose()
    assert float(wild.effective_sample_size) < 128
    assert float(after.effective_sample_size) < 2 * float(before.effective_sample_size) + 10


def test_the_prior_check_is_calibrated_on_the_prior_itself() -> None:
    """Data sets of the prior have p-values that are uniform to the resolution of a few repetitions."""
    model, _ = trained()
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).unsqueeze(-1)
    y = model.prior_samples(x, 120, seed=77, noisy=True)
    p = model.condition(x.expand(120, -1, -1), y, num_samples=2).diagnose(seed=5).p_value_y
    assert float(p.min()) >= 1 / 257
    for level in (0.1, 0.5):
        assert abs(float((p <= level).double().mean()) - level) < 4 * math.sqrt(level * (1 - level) / 120) + 0.02


def test_many_tasks_are_diagnosed_one_by_one() -> None:
    model, tasks = trained()
    xs, ys = [x[:n] for n, (x, _) in zip((5, 0, 9), tasks, strict=False)], [y[:n] for n, (_, y) in zip((5, 0, 9), tasks, strict=False)]
    together = model.condition(xs, ys, num_samples=100).diagnose()
    for t in range(3):
        alone = model.condition(xs[t], ys[t], num_samples=100).diagnose()
        for key in ("log_evidence", "elbo", "effective_sample_size", "pareto_k"):
            assert relative_error(getattr(together, key)[t], getattr(alone, key)) <= 1e-9, key
        assert together.sentence[t].split("(")[0] == str(alone.sentence).split("(")[0]


def test_the_bound_of_class_labels_has_a_whole_gradient() -> None:
    model, (x, y) = build(likelihood=bnnp.Bernoulli()), data((6,))[0]
    batch = bnnp.TaskBatch(collate([(x, (y > 4).double())]), collate([(x, y)]))
    posterior = model(batch.context, num_samples=3)
    both = [
        torch.autograd.grad(v.sum(), [next(iter(model.prior)).relative_mean], retain_graph=True)[0] for v in (posterior.elbo, -posterior.kl)
    ]
    assert relative_error(both[0], both[1]) > 1e-3


def test_class_labels_are_diagnosed() -> None:
    model, (x, y) = build(likelihood=bnnp.Bernoulli()), data((6,))[0]
    d = model.condition(x, (y > 4).double(), num_samples=100).diagnose()
    assert math.isfinite(float(d.log_evidence)) and 0 < float(d.p_value_y) <= 1
    streamed = model.condition(x, (y > 4).double(), num_samples=100, context_batch_size=4).diagnose()
    assert relative_error(streamed.log_evidence, d.log_evidence) <= 1e-9


# --- simulation-based calibration --------------------------------------------------------------------------------------


def test_calibration_of_the_exact_case_is_uniform() -> None:
    model = BNNP(2, 1, hidden=(), prior="per_unit").double()
    result = bnnp.sbc(model, x=data((6,))[0][0], repetitions=300, num_samples=19, batch_size=100, seed=1)
    assert result.num_ranks == 19 and min(result.p_values.values()) > 0.01 / len(result.p_values)
    assert all(ranks.shape == (300,) and 0 <= int(ranks.min()) and int(ranks.max()) <= 19 for ranks in result.ranks.values())


@pytest.mark.slow
def test_calibration_of_the_exact_case_is_uniform_with_many_repetitions() -> None:
    model = BNNP(2, 1, hidden=(), prior="per_unit").double()
    result = bnnp.sbc(model, x=data((6,))[0][0], repetitions=5000, num_samples=99, batch_size=250, seed=2)
    assert min(result.p_values.values()) > 0.01 / len(result.p_values)


def test_calibration_notices_an_untrained_posterior() -> None:
    model = BNNP(1, 1, hidden=(6,), activation="tanh").double()
    result = bnnp.sbc(model, x=torch.linspace(-2, 2, 15).unsqueeze(-1), repetitions=200, num_samples=19, batch_size=100)
    assert min(result.p_values.values()) < 1e-3
    assert "spread" in result.table()


def test_calibration_without_inputs_asks_for_them() -> None:
    with pytest.raises(ValueError, match=r"Expected inputs x.*not meta-trained"):
        bnnp.sbc(BNNP(1, 1, hidden=(3,)))
    model, _ = trained()
    assert set(bnnp.sbc(model, repetitions=4, num_samples=5, num_points=6).ranks) >= {"f at input 3", "layer 2, squared norm"}


def test_calibration_ranks_are_independent_between_repetitions() -> None:
    """Repetitions of one batch share no noise: ranks of the same data in one batch differ."""
    model = BNNP(1, 1, hidden=(), prior="per_unit").double()
    result = bnnp.sbc(model, x=[[0.0], [1.0]], repetitions=60, num_samples=9, batch_size=60)
    assert len(result.ranks["f at input 1"].unique()) >= 8
    same = Context(torch.zeros(2, 3, 1).double(), torch.ones(2, 3, 1).double(), torch.ones(2, 3, dtype=torch.bool))
    (drawn,) = trust._posterior_draws(model, same, 9, torch.Generator().manual_seed(0))
    assert float((drawn[:, 0] - drawn[:, 1]).detach().abs().min()) > 0.0
