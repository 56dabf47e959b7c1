"""Outputs that were not observed: they add nothing, whatever stands there, and all that was seen of a point counts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import bnnp
import reference
from bnnp.tasks import Context, collate, make_context, split
from laws import INSTANCES, randn, relative_error, unit_factors

F64 = torch.float64
Data = tuple[Tensor, Tensor, Tensor]


def build(kind: str = "per_unit", shared: bool = False, seed: int = 0, **options: Any) -> bnnp.BNNP:
    settings = {"hidden": (5,), "activation": "tanh", "missing_outputs": True, **options}
    model = bnnp.BNNP(2, 3, prior=kind, shared_noise=shared, **settings).double()
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.3 * randn(*parameter.shape, generator=g)
    y = torch.rand(50, 3, generator=g, dtype=F64)
    y = y.clamp(0.01, 0.99) if isinstance(model.likelihood, bnnp.Beta) else y.round() if model.likelihood.discrete else 5 - 2 * y
    model.fit_scaling([bnnp.Task(2 + 3 * randn(50, 2, generator=g), y)])
    return model


def data(n: int, seed: int = 1) -> Data:
    """Inputs, outputs in (0, 1), and a mask with gaps in which no point is empty."""
    g = torch.Generator().manual_seed(seed)
    seen = torch.rand(n, 3, generator=g) < 0.6
    seen[torch.arange(n), torch.arange(n) % 3] = True
    return 2 + 3 * randn(n, 2, generator=g), torch.rand(n, 3, generator=g, dtype=F64).clamp(0.01, 0.99), seen


def filled(y: Tensor, seen: Tensor, garbage: float) -> Tensor:
    return torch.where(seen, y, torch.full_like(y, garbage))


LIKELIHOODS = {
    "gaussian": {},
    "amortised": {"last_layer": "amortised"},
    "studentt": {"likelihood": bnnp.StudentT()},
    "heteroscedastic": {"likelihood": bnnp.Heteroscedastic()},
    "beta": {"likelihood": bnnp.Beta()},
    "bernoulli": {"likelihood": bnnp.Bernoulli()},
    "poisson": {"likelihood": bnnp.Poisson()},
}


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -7.5])
def test_what_was_not_seen_may_be_anything(name: str, garbage: float) -> None:
    model, (x, y, seen), (xt, yt, seen_t) = build(**LIKELIHOODS[name]), data(7), data(5, seed=2)
    if model.likelihood.discrete:
        y, yt = y.round(), yt.round()
    found = []
    for fill in (0.5 if name == "beta" else 0.0, garbage):
        posterior = model.condition(x, filled(y, seen, fill), mask=seen, num_samples=4).update(xt, filled(yt, seen_t, fill), mask=seen_t)
        p = posterior.predict(xt)
        each = p.log_prob(filled(yt, seen_t, fill), mask=seen_t)
        joint = p.log_prob(filled(yt, seen_t, fill), mask=seen_t, joint=True)
        crps = p.crps(filled(yt, seen_t, fill), mask=seen_t)
        found.append([posterior.elbo, posterior.kl, posterior.log_evidence, p.mean, p.std, each, joint, crps])
        assert bool((crps[~seen_t] == 0).all()) and bool(each.isfinite().all())
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    flipped = model.condition(x, y, mask=seen.roll(1, -1), num_samples=4)
    assert relative_error(flipped.predict(xt).mean, found[0][3]) > 1e-6  # the mask matters


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_a_point_of_which_nothing_was_seen_is_masked(name: str) -> None:
    model, (x, y, seen), (xt, yt, _) = build(**LIKELIHOODS[name]), data(7), data(5, seed=2)
    if model.likelihood.discrete:
        y, yt = y.round(), yt.round()
    holes = seen.clone()
    holes[2] = False
    keep = holes.any(-1)
    masked = model.condition(x, y, mask=holes, num_samples=4)
    dropped = model.condition(x[keep], y[keep], mask=seen[keep], num_samples=4)
    assert int(masked.counts) == 6
    assert relative_error(masked.elbo, dropped.elbo) < 1e-9
    p, q = masked.predict(xt), dropped.predict(xt)
    assert relative_error(p.log_prob(yt, joint=True), q.log_prob(yt, joint=True)) < 1e-9
    whole = torch.ones(7, 3, dtype=torch.bool)
    assert relative_error(model.condition(x, y, mask=whole, num_samples=4).elbo, model.condition(x, y, num_samples=4).elbo) < 1e-12


@pytest.mark.parametrize("kind, shared", INSTANCES, ids=str)
def test_a_linear_model_regresses_each_output_on_its_own_rows(kind: str, shared: bool) -> None:
    model, (x, y, seen), (xt, yt, seen_t) = build(kind, shared, hidden=()), data(9), data(5, seed=2)
    s, prior = model.scaling, next(iter(model.prior))
    noise, means, factors = model.likelihood.noise_std.detach(), prior.mean.detach(), torch.stack(unit_factors(prior)).detach()  # type: ignore[operator, union-attr]
    A, At = (torch.cat([s.x(v), torch.ones(len(v), 1, dtype=F64)], dim=-1) for v in (x, xt))
    posterior = model.condition(x, y, mask=seen, num_samples=3)
    p = posterior.predict(xt)
    evidence, joint = torch.zeros((), dtype=F64), torch.zeros((), dtype=F64)
    for j in range(3):
        at, to = seen[:, j], seen_t[:, j]
        prec = torch.full((int(at.sum()),), float(noise[j]) ** -2, dtype=F64)
        block = reference.condition_block(A[at], factors[j], means[j], s.y(y)[at, j], prec)
        cov = At @ block["w_cov"] @ At.T + noise[j] ** 2 * torch.eye(5, dtype=F64)
        assert relative_error(p.mean[:, j], (At @ block["w_mean"]) * s.y_scale[j] + s.y_shift[j]) < 1e-9
        assert relative_error(p.std[:, j], cov.diagonal().sqrt() * s.y_scale[j]) < 1e-9
        evidence = evidence + block["log_z"] - at.sum() * s.y_scale[j].log()
        own = reference.gaussian_log_density(s.y(yt)[to, j], (At @ block["w_mean"])[to], cov[to][:, to])
        joint = joint + own - to.sum() * s.y_scale[j].log()
    assert relative_error(posterior.elbo, evidence) < 1e-9
    assert relative_error(p.log_prob(yt, joint=True, mask=seen_t), joint) < 1e-9
    updated = posterior.update(xt, yt, mask=seen_t)
    assert relative_error(updated.log_evidence, joint) < 1e-9
    assert relative_error(updated.elbo, evidence + joint) < 1e-9


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_batches_streams_and_files_agree(name: str, tmp_path: Path) -> None:
    model, (x, y, seen), (xt, yt, seen_t) = build(**LIKELIHOODS[name]), data(8), data(5, seed=2)
    if model.likelihood.discrete:
        y, yt = y.round(), yt.round()
    seen[:4] = True  # a batch without a gap, beside one with gaps
    alone = model.condition(x, y, mask=seen, num_samples=4)
    streamed = model.condition(x, y, mask=seen, num_samples=4, context_batch_size=4)
    batches = [(x[:4], y[:4]), (x[4:], y[4:], seen[4:])]
    listed = model.condition(batches, num_samples=4)
    X, Y = torch.zeros(2, 10, 2, dtype=F64), torch.full((2, 10, 3), math.nan, dtype=F64)
    mask = torch.zeros(2, 10, 3, dtype=torch.bool)
    X[0, 1:9], Y[0, 1:9], mask[0, 1:9] = x, y, seen
    X[1, :5], Y[1, :5], mask[1, :5] = xt, yt, seen_t
    padded = model.condition(X, Y, mask=mask, num_samples=4)
    model.save(tmp_path / "m")
    alone.save(tmp_path / "p")
    again = bnnp.load_posterior(tmp_path / "p", bnnp.load(tmp_path / "m"))
    want = [alone.elbo, alone.predict(xt).log_prob(yt, mask=seen_t, joint=True)]
    for other in (streamed, listed, again):
        assert relative_error(other.elbo, want[0]) < 1e-9
        assert relative_error(other.predict(xt).log_prob(yt, mask=seen_t, joint=True), want[1]) < 1e-9
        assert other.sample.points.seen is not None
    assert relative_error(padded.elbo[0], want[0]) < 1e-9
    both = padded.predict(xt).log_prob(yt.expand(2, -1, -1), mask=seen_t.expand(2, -1, -1), joint=True)
    assert relative_error(both[0], want[1]) < 1e-9
    more = [(p.update(xt, yt, mask=seen_t) if p is not streamed else p).elbo for p in (alone, again)]
    assert relative_error(more[1], more[0]) < 1e-9
    assert relative_error(alone.refresh(xt, yt, seen_t).elbo, model.condition(
        torch.cat([x, xt]), torch.cat([y, yt]), mask=torch.cat([seen, seen_t]), num_samples=4).elbo) < 1e-9  # fmt: skip


@pytest.mark.parametrize("objective", ["pp_avi", "avi", "npml", "npvi", "iw_avi"])
@pytest.mark.parametrize("name", ["gaussian", "studentt"])
def test_objectives_look_only_at_what_was_seen(objective: str, name: str) -> None:
    model = build(**LIKELIHOODS[name])
    tasks = [data(6, seed=3), data(4, seed=4)]
    half = [(x[:3], y[:3], s[:3]) for x, y, s in tasks], [(x[3:], y[3:], s[3:]) for x, y, s in tasks]
    batch = bnnp.TaskBatch(collate(half[0]), collate(half[1]))
    other = bnnp.TaskBatch(*(collate([(x, filled(y, s, 1e30), s) for x, y, s in part]) for part in half))
    of = bnnp.objectives.OBJECTIVES[objective]
    values = [of(model, b, 3, torch.Generator().manual_seed(0)) for b in (batch, other)]
    assert torch.equal(values[0], values[1])
    sliced = of(model, batch, 3, torch.Generator().manual_seed(0), context_batch_size=2, target_batch_size=2)
    noise = 1e-9 if objective != "npvi" else 1e-8
    at_once = of(model, batch, 3, torch.Generator().manual_seed(0), context_batch_size=3, target_batch_size=3)
    assert relative_error(sliced, at_once) < noise
    grads = torch.autograd.grad(values[1].sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    assert all(grad is None or bool(grad.isfinite().all()) for grad in grads)


def test_the_scaling_is_that_of_what_was_seen() -> None:
    x, y, seen = data(30)
    model = bnnp.BNNP(2, 3, hidden=(3,), missing_outputs=True).double()
    model.fit_scaling(bnnp.tasks.as_tasks([(x, filled(y, seen, math.nan), seen)] * 2, 2, 3, F64))
    for j in range(3):
        own = y[seen[:, j], j]
        assert float(model.scaling.y_shift[j]) == pytest.approx(float(own.mean()))
        assert float(model.scaling.y_scale[j]) == pytest.approx(float(own.std(correction=0)))


def test_tasks_with_masks_are_cut_joined_and_moved_whole() -> None:
    tasks = [data(6), data(4, seed=5)]
    batch = collate([(x, filled(y, s, math.nan), s) for x, y, s in tasks])
    assert batch.seen is not None and bool(batch.y.isfinite().all())
    assert batch.counts.tolist() == [6, 4] and batch.values.shape == (int(tasks[0][2].sum() + tasks[1][2].sum()),)
    cut = split(batch, torch.tensor([2, 1]), torch.Generator().manual_seed(0))
    joined = cut.context.join(cut.target)
    for t, (_, y, s) in enumerate(tasks):
        got = joined.y[t][joined.observed[t]].sort().values
        assert torch.equal(got, y[s].sort().values)
    assert joined.rows(0, 2).to(torch.float32).observed.shape == (2, 2, 3)
    plain = Context(batch.x, batch.y, batch.mask)
    assert plain.join(batch).observed.shape == (2, 12, 3)
    full, _ = make_context(np.zeros((3, 2)), np.zeros((3, 3)), np.ones((3, 3), bool), x_dim=2, y_dim=3)
    assert full.seen is None


def test_meta_training_and_scores_take_masks() -> None:
    tasks = [(x.float(), filled(y, s, math.nan).float(), s) for x, y, s in (data(8, seed=i) for i in range(6))]
    model = bnnp.BNNP(2, 3, hidden=(4,), missing_outputs=True)
    result = bnnp.meta_train(model, tasks, validation=tasks[:2], steps=4, progress=False)
    assert result.best_score is not None and result.skipped == 0
    scores = bnnp.evaluate(model, tasks, context_fraction=0.5, num_samples=8)
    assert scores.pit is not None and all(math.isfinite(mean) for mean, _ in scores.summary.values())
    x, y, s = tasks[0]
    one = bnnp.evaluate(model, [(x[:4], y[:4], s[:4], x[4:], y[4:], s[4:])], num_samples=8, seed=3)
    p = model.condition(x[:4], y[:4], mask=s[:4], num_samples=8, seed=3).predict(x[4:])
    assert one.summary["joint_log_density"][0] == pytest.approx(float(p.log_prob(y[4:], joint=True, mask=s[4:])) / 4, rel=1e-5)
    assert one.summary["mae"][0] == pytest.approx(float((p.mean - y[4:])[s[4:]].abs().mean()), rel=1e-5)
    assert len(one.pit) == int(s[4:].sum())  # type: ignore[arg-type]
    assert math.isfinite(float(model.condition(x, y, mask=s, num_samples=32).diagnose().distance_y))


def test_a_model_that_was_not_built_for_gaps_says_so() -> None:
    model, (x, y, seen) = bnnp.BNNP(2, 3, hidden=(3,)).double(), data(5)
    for call in (
        lambda: model.condition(x, y, mask=seen),
        lambda: model.condition(x, y, mask=seen, context_batch_size=2),
        lambda: model.condition(x, y).update(x, y, mask=seen),
        lambda: bnnp.meta_train(model, [(x, y, seen)] * 3, steps=1),
    ):
        with pytest.raises(ValueError, match="missing_outputs=True"):
            call()
    assert bool(model.condition(x, y).predict(x).log_prob(y, mask=seen).isfinite().all())  # targets may have gaps all the same
    with pytest.raises(ValueError, match=r"or \(5, 3\), one per output"):
        model.condition(x, y, mask=seen[:, :2])
    with pytest.raises(ValueError, match=r"finite numbers in yc. Got nan at index \(0, "):
        model.condition(x, filled(y, ~seen, math.nan), mask=seen)
