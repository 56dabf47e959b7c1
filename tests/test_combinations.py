"""The laws of a network, held by every prior, last layer and amortiser: one suite, one generator of what goes together."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bnnp
from bnnp.objectives import OBJECTIVES
from bnnp.priors import PRIORS, Mixture
from bnnp.tasks import TaskBatch, collate
from laws import COMBINATIONS, Combination, relative_error
from test_networks import padded

ALL = pytest.mark.parametrize("one", COMBINATIONS, ids=str)


def answers(posterior: bnnp.Posterior, xt: Tensor, yt: Tensor) -> dict[str, Tensor]:
    p = posterior.predict(xt)
    return {
        "mean": p.mean,
        "std": p.std,
        "joint": p.log_prob(yt, joint=True),
        "marginal": p.log_prob(yt),
        "sample": p.sample(5, noisy=False, seed=3).movedim(0, -1),
        "weights": posterior.sample_weights(5, seed=4)[-1].movedim(0, -1),
        "elbo": posterior.elbo,
        "kl": posterior.kl,
        "importance": posterior.log_importance.movedim(0, -1),
        "reweighted": posterior.predict(xt, reweight=True).mean,
    }


def agree(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for key, value in want.items():
        assert relative_error(got[key], value) <= tolerance or torch.allclose(got[key], value, atol=1e-13), key


@ALL
def test_padded_tasks_in_any_company_equal_one_after_another(one: Combination) -> None:
    model, tasks = one.build(), one.tasks((4, 0, 9, 1))
    xt, yt = one.tasks((3,), seed=2)[0]
    batch = answers(model.condition(*padded(tasks, math.nan), num_samples=6, seed=8), xt, yt.expand(4, -1, -1))
    for t, (x, y) in enumerate(tasks):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(t))
        alone = answers(model.condition(x[order], y[order], num_samples=6, seed=8), xt, yt)
        agree({key: value[t] for key, value in batch.items()}, alone)


@ALL
@pytest.mark.parametrize("points", [2, 14])
def test_a_stream_gives_what_the_whole_gives(one: Combination, points: int) -> None:
    model, (x, y) = one.build(), one.tasks((points,))[0]
    xt, yt = one.tasks((3,), seed=2)[0]
    want = answers(model.condition(x, y, num_samples=5, seed=2), xt, yt)
    agree(answers(model.condition(x, y, num_samples=5, seed=2, context_batch_size=3), xt, yt), want)
    order = torch.randperm(points, generator=torch.Generator().manual_seed(0))
    cuts = [order[:1], order[1:]]
    agree(answers(model.condition([(x[c], y[c]) for c in cuts], num_samples=5, seed=2), xt, yt), want)


@ALL
def test_without_data_the_posterior_is_the_prior(one: Combination) -> None:
    model = one.build()
    empty = model.condition(torch.zeros(0, 2), torch.zeros(0, 2), num_samples=6)
    for value in (empty.kl, empty.elbo, empty.log_importance):
        if one.kind != "mixture":
            assert float(value.abs().max()) <= 1e-12
    assert abs(float(empty.kl)) <= 1e-12 and abs(float(empty.log_importance.logsumexp(0) - math.log(6))) <= 1e-12


@ALL
def test_updates_add_up(one: Combination, tmp_path: Path) -> None:
    model, ((xa, ya), (xb, yb), (xc, yc)) = one.build(), one.tasks((5, 2, 3))
    xt, yt = one.tasks((3,), seed=2)[0]
    start = model.condition(xa, ya, num_samples=6, seed=1)
    together = start.update(torch.cat([xb, xc]), torch.cat([yb, yc]))
    steps = start.update(xb, yb).update(xc, yc)
    agree(answers(steps, xt, yt), answers(together, xt, yt))
    agree({"evidence": steps.log_evidence}, {"evidence": together.log_evidence}, 1e-8)
    steps.save(tmp_path / "posterior")
    agree(answers(bnnp.load_posterior(tmp_path / "posterior", model), xt, yt), answers(steps, xt, yt), 1e-14)
    picked = steps.resample(seed=3)
    assert bool(picked.predict(xt).log_prob(yt).isfinite().all()) and float(picked.effective_sample_size) == 6.0


@ALL
def test_a_model_survives_its_file_and_what_is_not_learned_stays(one: Combination, tmp_path: Path) -> None:
    model, tasks = one.build(), one.tasks((6, 7, 8, 6))
    bnnp.save(model, tmp_path / "model")
    again = bnnp.load(tmp_path / "model")
    assert again.config == model.config
    for (name, p), (other, q) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert name == other and torch.equal(p, q) and p.requires_grad == q.requires_grad
    (x, y), (xt, yt) = tasks[0], tasks[1]
    agree(answers(again.condition(x, y, num_samples=4), xt, yt), answers(model.condition(x, y, num_samples=4), xt, yt), 0.0)
    before = {name: value.detach().clone() for name, value in again.named_parameters()}
    masks = {f"layers.{i}.": layer.learned for i, layer in enumerate(again.prior)}
    for _ in range(2):  # a second call learns no more of it than the first
        bnnp.meta_train(again, tasks, steps=2, batch_size=2, num_samples=4, learning_rate=0.1, progress=False)
    moved = dict(again.named_parameters())
    for i, layer in enumerate(again.prior):
        mask, prefix = masks[f"layers.{i}."], f"layers.{i}.prior."
        means = [name for name in before if name.startswith(prefix) and name.endswith("relative_mean")]
        for name in means:
            changed = moved[name] != before[name]
            assert torch.equal(changed, torch.ones_like(changed) if mask is None else mask), name
        if mask is not None:  # the prior of what is not learned is N(0, I / p), whatever stands in the parameters
            torch.testing.assert_close(layer.mean[~mask], torch.zeros(int((~mask).sum()), dtype=torch.float64))
            C = layer.covariance()
            off = ~mask.unsqueeze(-1) | ~mask.unsqueeze(-2)
            eye = torch.eye(layer.p, dtype=torch.float64).expand_as(C) / layer.p
            torch.testing.assert_close(C[off], eye[off], atol=1e-12, rtol=0)


def a_batch(one: Combination) -> TaskBatch:
    return TaskBatch(collate(one.tasks((5, 2, 3))), collate(one.tasks((2, 4, 3), seed=5)))


def objectives_of(one: Combination) -> list[str]:
    skip = {"npvi"} if one.kind == "mixture" or ("temperature", True) in one.options else set()
    return sorted(set(OBJECTIVES) - skip)


def central_slope(value: Callable[[], Tensor], learned: list[Tensor], direction: list[Tensor]) -> float:
    """The slope of a value along a direction, by central differences of the fourth order."""
    found = []
    for step in (2e-5, 1e-5, -1e-5, -2e-5):
        with torch.no_grad():
            for p, v in zip(learned, direction, strict=True):
                p.add_(step * v)
            found.append(float(value()))
            for p, v in zip(learned, direction, strict=True):
                p.sub_(step * v)
    return (8 * (found[1] - found[2]) - (found[0] - found[3])) / 12e-5


@ALL
def test_objectives_have_the_gradient_of_their_value(one: Combination) -> None:
    """Along a random direction, against central differences of the same draws; in batches, value and gradient are the same."""
    model, batch = one.build(), a_batch(one)
    learned = [p for p in model.parameters() if p.requires_grad]
    g = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in learned]

    def value(name: str, **sizes: Any) -> Tensor:
        return OBJECTIVES[name](model, batch, 4, torch.Generator().manual_seed(3), **sizes).sum()

    for name in objectives_of(one):
        whole = value(name)
        grads = torch.autograd.grad(whole, learned, allow_unused=True)
        slope = sum(float((d * v).sum()) for d, v in zip(grads, direction, strict=True) if d is not None)
        central = central_slope(lambda name=name: value(name), learned, direction)  # type: ignore[misc]
        # A heavy-tailed layer's scale is interpolated linearly between knots: its gradient has steps there.
        assert abs(slope - central) <= (1e-3 if one.kind == "heavy_tailed" else 1e-5) * max(1.0, abs(slope)), name
        parts = value(name, context_batch_size=2, target_batch_size=3)
        assert relative_error(parts, whole) <= 1e-9, name
        for p, q in zip(torch.autograd.grad(parts, learned, allow_unused=True), grads, strict=True):
            if p is not None and q is not None:
                assert relative_error(p, q) <= 1e-7, name


@ALL
def test_everything_learned_gets_a_gradient_and_nothing_frozen_does(one: Combination) -> None:
    model, batch = one.build(), a_batch(one)
    for frozen in (False, True):
        model.prior.learn(not frozen, not frozen)
        model.zero_grad(set_to_none=True)
        OBJECTIVES["pp_avi"](model, batch, 6, torch.Generator().manual_seed(3)).sum().backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None) == p.requires_grad, name
            silent = ".prior." in name and (frozen or one.fraction < 1)
            if p.requires_grad and not silent and "strict_lower" not in name and "lower_output" not in name:
                assert float(p.grad.abs().max()) > 0, name  # type: ignore[union-attr]
    assert not any(p.requires_grad for layer in model.prior for p in layer.parameters())


@pytest.mark.parametrize("kind", PRIORS)
def test_a_prior_starts_at_the_fan_in_scale(kind: str) -> None:
    model = bnnp.BNNP(2, 2, hidden=(3,), prior=kind).double()
    for layer in model.prior:
        p = layer.p
        parts = layer.parts if isinstance(layer, Mixture) else [layer]
        for part in parts:
            C, unit = part.covariance().detach(), (0.9 if kind == "mixture" else 1.0) / p
            variance = C.diagonal(dim1=-2, dim2=-1)
            torch.testing.assert_close(variance, torch.full((layer.d_out, p), unit).double())
            assert float((C - torch.diag_embed(variance)).abs().max()) <= (0.011 / p if kind == "low_rank" else 1e-12)
        if kind != "low_rank":
            means = torch.stack([part.mean for part in parts]).square().sum().detach()
            want = 0.5 * len(parts) * layer.d_out * p * (math.log(1 / 0.9) - 0.1) if kind == "mixture" else 0.0
            total = sum(float(part.divergence().detach()) for part in parts)
            assert abs(total - want - 0.5 * p * float(means)) <= 1e-9
