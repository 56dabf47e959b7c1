"""Laws of the objectives: their definitions by the slow twin, their gradients by finite differences, who gets a gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import bnnp
import reference
from bnnp.objectives import OBJECTIVES, training_noise
from bnnp.streaming import Stream
from bnnp.tasks import TaskBatch, collate, make_context
from laws import INSTANCES, relative_error, unit_factors
from test_networks import build, data, padded

LAWS = pytest.mark.parametrize("kind, shared", INSTANCES, ids=lambda value: str(value))
LAST = pytest.mark.parametrize("last_layer", ["exact", "amortised"])
ALL = pytest.mark.parametrize("objective", sorted(OBJECTIVES))
S = 3


def batch(sizes_c: tuple[int, ...] = (5, 0, 3), sizes_t: tuple[int, ...] = (2, 4, 3)) -> TaskBatch:
    return TaskBatch(collate(data(sizes_c)), collate(data(sizes_t, seed=2)))


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pieces(model: bnnp.BNNP, points: bnnp.Context, t: int) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Scaled data of one task without its padding, and its pseudo-observations with their precisions, layer by layer."""
    scaled, keep = model.scale(points), points.mask[t]
    sites = [model.chain.pseudo(i, scaled, scaled.x)[:2] for i in range(len(model.layers))]
    cut = [(y[t][keep].detach(), root.expand(*y.shape)[t][keep].square().detach()) for y, root in sites]
    return scaled.x[t][keep], scaled.y[t][keep], cut


@LAWS
@LAST
@pytest.mark.parametrize("residual", [False, True])
def test_objectives_are_their_definitions_given_the_drawn_weights(kind: str, shared: bool, last_layer: str, residual: bool) -> None:
    model, data_batch = build(kind, shared, last_layer, hidden=(4, 2), residual=residual), batch()
    noise = model.likelihood.noise_std.detach()  # type: ignore[operator, union-attr]
    priors = [(layer.mean.detach(), [L.detach() for L in unit_factors(layer)]) for layer in model.prior]
    volume = float(model.scaling.y_scale.log().sum())
    with torch.no_grad():
        particles = model.particles(model.scale(data_batch.context), S, training_noise(model, generator()))
        streams = [Stream(lambda points=points: [model.scale(points)]) for points in (data_batch.context, data_batch.target)]
        both, _ = model.chain.paired_particles(*streams, S, training_noise(model, generator()))
        got = {name: f(model, data_batch, S, generator()) for name, f in OBJECTIVES.items()}
        cold = {name: OBJECTIVES[name](model, data_batch, S, generator(), beta=0.3) for name in ("avi", "pp_avi")}
    for t in range(3):
        (xc, yc, sites_c), (xt, yt, sites_t) = pieces(model, data_batch.context, t), pieces(model, data_batch.target, t)
        hidden = [W[:, t] for W in particles.weights]
        last = reference.collapsed(xc, yc, xt, yt, hidden, priors[-1], sites_c[-1][1], noise, S, "tanh", residual)
        kl = reference.hidden_kl(xc, hidden, priors[:-1], sites_c[:-1], "tanh", residual)
        paired = [W[:, t] for W in both.weights]
        npvi = reference.npvi(xc, xt, yt, paired, priors, sites_c, sites_t, noise, S, "tanh", residual)["value"]
        n, m = len(xc) * volume, len(xt) * volume
        want = {
            "avi": reference.avi(last["ell_c"], kl, last["kl"]) - n,
            "npml": reference.npml(last["log_pt"]) - m,
            "pp_avi": reference.pp_avi(last["log_pt"], last["ell_c"], kl, last["kl"]) - n - m,
            "npvi": npvi - m,
        }
        for name, value in want.items():
            assert relative_error(got[name][t], value) <= 1e-9, name
        assert relative_error(cold["avi"][t], reference.avi(last["ell_c"], kl, last["kl"], 0.3) - n) <= 1e-9
        mixed = reference.npml(last["log_pt"]) - m
        assert relative_error(cold["pp_avi"][t], 0.3 * mixed + reference.avi(last["ell_c"], kl, last["kl"], 0.3) - n) <= 1e-9


@ALL
@LAWS
@LAST
def test_gradients_agree_with_finite_differences(objective: str, kind: str, shared: bool, last_layer: str) -> None:
    model = build(kind, shared, last_layer, hidden=(4, 3), y_dim=1, activation="silu")
    data_batch = TaskBatch(collate(data((5, 2), y_dim=1)), collate(data((2, 4), y_dim=1, seed=2)))

    def value() -> Tensor:
        return OBJECTIVES[objective](model, data_batch, S, generator()).sum()

    value().backward()  # type: ignore[no-untyped-call]
    g = generator(11)
    with torch.no_grad():
        direction = {p: torch.randn(p.shape, generator=g, dtype=p.dtype) for p in model.parameters() if p.requires_grad}
        slope = sum(float((p.grad * d).sum()) for p, d in direction.items() if p.grad is not None)
        h, ends = 1e-5, []
        for sign in (1, -1):
            for p, d in direction.items():
                p += sign * h * d
            ends.append(float(value()))
            for p, d in direction.items():
                p -= sign * h * d
    assert abs(slope - (ends[0] - ends[1]) / (2 * h)) <= 1e-5 * max(1.0, abs(slope))


@ALL
@LAWS
@LAST
def test_every_learned_parameter_gets_a_gradient_and_every_frozen_one_none(
    objective: str, kind: str, shared: bool, last_layer: str
) -> None:
    for learn_mean, learn_scale in ((True, True), (False, True), (True, False), (False, False)):
        model = build(kind, shared, last_layer)
        model.prior.learn(mean=learn_mean, scale=learn_scale)
        OBJECTIVES[objective](model, batch(), S, generator()).sum().backward()  # type: ignore[no-untyped-call]
        frozen = set() if learn_mean else {id(p) for p in model.prior.means()}
        frozen |= set() if learn_scale else {id(p) for p in model.prior.scales()}
        for name, p in model.named_parameters():
            if id(p) in frozen:
                assert p.grad is None, name
            elif last_layer == "amortised" and objective == "iw_avi" and name.startswith("layers.2.net"):
                assert p.grad is None, name  # the last layer is integrated out: its inference network is not asked
            elif last_layer == "amortised" and objective == "npml" and name == "likelihood.raw_noise":
                assert p.grad is not None
            else:
                assert p.grad is not None and float(p.grad.abs().max()) > 0, name


@ALL
@LAWS
def test_garbage_in_the_padding_reaches_neither_value_nor_gradient(objective: str, kind: str, shared: bool) -> None:
    found = []
    for garbage in (0.0, math.nan):
        model = build(kind, shared, "amortised")
        context, _ = make_context(*padded(data((4, 0, 6)), garbage), x_dim=2, y_dim=2)
        target, _ = make_context(*padded(data((3, 5, 2), seed=2), garbage), x_dim=2, y_dim=2)
        value = OBJECTIVES[objective](model, TaskBatch(context, target), S, generator())
        value.sum().backward()  # type: ignore[no-untyped-call]
        found.append((value, [p.grad for p in model.parameters() if p.grad is not None]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.parametrize("objective", ["avi", "npml", "pp_avi"])
def test_padding_changes_the_value_in_nothing_but_the_draw(objective: str) -> None:
    """With the last layer alone there is nothing to draw, so padded and sliced batches agree to rounding."""
    model = build(hidden=())
    sizes_c, sizes_t = (4, 0, 6), (3, 5, 2)
    together = OBJECTIVES[objective](model, batch(sizes_c, sizes_t), S, generator())
    for t in range(3):
        context, target = collate([data(sizes_c)[t]]), collate([data(sizes_t, seed=2)[t]])
        alone = OBJECTIVES[objective](model, TaskBatch(context, target), S, generator())
        assert relative_error(alone[0], together[t]) <= 1e-9


def test_npvi_of_an_exact_linear_model_is_the_predictive_density() -> None:
    """Where both posteriors are exact, E log p(Y_t | W) - KL(q(. | c + t) || q(. | c)) = log p(Y_t | D_c) = NPML."""
    model = build(hidden=())
    npvi, npml = (OBJECTIVES[name](model, batch(), S, generator()) for name in ("npvi", "npml"))
    assert relative_error(npvi, npml) <= 1e-9


def test_avi_and_pp_avi_of_an_exact_linear_model_are_evidences() -> None:
    """log p(Y_c) from AVI, and log p(Y_c) + log p(Y_t | Y_c) = log p(Y_c, Y_t) from PP-AVI."""
    model, data_batch = build(hidden=()), batch()
    joined = TaskBatch(data_batch.context.join(data_batch.target), data_batch.target)
    evidence = OBJECTIVES["avi"](model, joined, S, generator())
    assert relative_error(OBJECTIVES["pp_avi"](model, data_batch, S, generator()), evidence) <= 1e-9


@ALL
def test_a_drawn_last_layer_gives_probabilities_and_finite_gradients(objective: str) -> None:
    model = build(likelihood=bnnp.Bernoulli())
    labels = [(x, (y > 4).double()) for x, y in data((5, 0, 3))]
    targets = [(x, (y > 4).double()) for x, y in data((2, 2, 2), seed=2)]
    value = OBJECTIVES[objective](model, TaskBatch(collate(labels), collate(targets)), S, generator())
    value.sum().backward()  # type: ignore[no-untyped-call]
    assert bool((value <= 0).all()) and all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
