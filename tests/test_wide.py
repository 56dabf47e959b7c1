"""Laws of wide layers: what goes through them is what goes through explicit weights made of the same noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import reference
from bnnp import chain, wide
from bnnp.factors import Sites
from bnnp.objectives import OBJECTIVES
from bnnp.priors import PLAIN
from laws import COMBINATIONS, Combination, randn, relative_error
from test_combinations import a_batch, central_slope
from test_priors import moved

S, T, N, M, D = 3, 2, 4, 3, 5


def normal(seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=g, dtype=torch.float64)


def explicit(kind: str, given: Any, A: Tensor, sites: Sites, seed: int) -> Tensor:
    """The same through Matheron's rule for each unit, with all noise laid out."""
    core, like = given.core, sites.resid
    k, shared = core.rank, core.blocks == 1 and sites.root_prec.shape[-1] == 1
    size = wide._units_at_once(S, T, k)
    source = normal(1)
    source((4,))
    z = source((S, T, N, D)) if shared else None
    e0, zs = [], []
    for i in range(0, D, size):
        c = min(size, D - i)
        e0.append(wide._noise(seed, i if shared else 2 * i, (S, T, c, k), like))
        zs.append(z[..., i : i + c] if z is not None else wide._noise(seed, 2 * i + 1, (S, T, N, c), like))
    noise, observed = torch.cat(e0, dim=-2), torch.cat(zs, dim=-1)
    L = core.project(torch.eye(A.shape[-1], dtype=torch.float64)).transpose(0, 1).expand(D, -1, -1)
    B = sites.root_prec.expand(*sites.resid.shape).unsqueeze(-1) * torch.einsum("stnp,upk->stnuk", A[:, :, :N], L)
    B = B.movedim(-2, -3)  # (Sa, T, U, N, k)
    r = (sites.root_prec * sites.resid).mT - observed.mT  # (S, T, U, N)
    gap = r - (B @ noise.unsqueeze(-1)).squeeze(-1)
    G = torch.eye(N, dtype=torch.float64) + B @ B.mT
    eps = noise + (B.mT @ torch.linalg.solve(G, gap.unsqueeze(-1))).squeeze(-1)
    W = given.mean + torch.einsum("upk,stuk->stup", L, eps)
    return A @ W.mT


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("one_noise", [False, True])
@pytest.mark.parametrize("once", [False, True])
def test_a_wide_layer_gives_what_explicit_weights_give(kind: str, one_noise: bool, once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wide, "CHUNK_BYTES", 8 * S * T * 9 * 2)  # two units at a time
    (layer,), g = moved(kind, (6, D)), torch.Generator().manual_seed(2)
    A = randn(1 if once else S, T, N + M, 7, generator=g).requires_grad_()
    resid, root = randn(1 if once else S, T, N, D, generator=g), randn(T, N, 1 if one_noise else D, generator=g).exp()
    root[0, 2:] = 0.0
    sites = Sites(resid.requires_grad_(), root.expand(len(A), *root.shape).clone().requires_grad_())
    seeds: list[int] = []
    crc = wide.zlib.crc32
    monkeypatch.setattr(wide.zlib, "crc32", lambda data: seeds.append(crc(data)) or seeds[-1])
    H, kl = wide.propagate(layer.given(), A, sites, S, normal(1), torch.float64)
    want = explicit(kind, layer.given(), A, sites, seeds[0])
    assert relative_error(H, want) <= 1e-9
    factors = layer.given().core.project(torch.eye(7, dtype=torch.float64)).transpose(0, 1).expand(D, -1, -1).detach()
    for s in range(len(A)):
        for t in range(T):
            prec = sites.root_prec.detach().square().expand(*resid.shape)[s, t]
            y = resid.detach()[s, t] + A.detach()[s, t, :N] @ layer.mean.detach().T
            units = reference.layer_conditionals(A.detach()[s, t, :N], list(factors), layer.mean.detach(), y, prec)
            assert abs(float(kl[s, t].detach() - sum(u["kl_eps"] for u in units))) <= 1e-9
    leaves, weights = [A, sites.resid, sites.root_prec, *layer.parameters()], randn(*H.shape, generator=g)
    for got, expected in zip(
        torch.autograd.grad((H * weights).sum(), leaves, retain_graph=True),
        torch.autograd.grad((want * weights).sum(), leaves),
        strict=True,
    ):
        assert relative_error(got, expected) <= 1e-8


SOME = [one for one in COMBINATIONS if one.last != "drawn" and one.kind not in ("per_layer", "network")]


@pytest.mark.parametrize("one", SOME, ids=str)
def test_objectives_through_wide_layers_have_the_gradient_of_their_value(one: Combination, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "WIDE_BYTES", 0)
    model = one.build(hidden=(7, 6))  # more weights than points
    batch = a_batch(one)
    learned = [p for p in model.parameters() if p.requires_grad]
    g = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in learned]
    seen: list[int] = []
    monkeypatch.setattr(chain, "propagate", lambda *args: seen.append(1) or wide.propagate(*args))
    for name in ("avi", "npml", "pp_avi"):

        def value(name: str = name) -> Tensor:
            return OBJECTIVES[name](model, batch, 4, torch.Generator().manual_seed(3)).sum()

        grads = torch.autograd.grad(value(), learned, allow_unused=True)
        slope = sum(float((d * v).sum()) for d, v in zip(grads, direction, strict=True) if d is not None)
        central = central_slope(value, learned, direction)
        # Noise that a seed is made of is float32 here as in training, so a step may not change it: the draws stay the same.
        assert abs(slope - central) <= (1e-3 if one.kind == "heavy_tailed" else 1e-5) * max(1.0, abs(slope)), name
    assert seen


@pytest.mark.parametrize("kind", PLAIN)
def test_kept_and_passed_by_weights_have_the_same_distribution(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objectives agree in expectation: within 5 standard errors over 300 draws."""
    one = Combination(kind, "exact", shared_noise=True)
    model, batch = one.build(hidden=(9, 8)), a_batch(one)
    values = []
    for limit in (0, 2**60):
        monkeypatch.setattr(chain, "WIDE_BYTES", limit)
        with torch.no_grad():
            values.append(torch.stack([OBJECTIVES["avi"](model, batch, 8, torch.Generator().manual_seed(i)) for i in range(300)]))
    gap, error = (values[0].mean(0) - values[1].mean(0)).abs(), (values[0].var(0) / 300 + values[1].var(0) / 300).sqrt()
    assert bool((gap <= 5 * error + 1e-9).all())
