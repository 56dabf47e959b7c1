"""The studies of real data: rivals against slow twins, how data are cut, and runs in miniature on made-up files of the same formats."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiments.common import gaussian, meanfield, study
from experiments.common.gaussian import FittedGP, Kernel, PlacesNormal, learn, log_marginal
from experiments.ecg_windows import run as ecg
from experiments.era5_fields import run as era5
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal, kl_divergence

_FLOAT = torch.float64


def kernel(shape: str, **changes: float) -> Kernel:
    numbers = {"amplitude": 1.5, "noise": 0.2, "level": 0.7, "level_std": 0.4, **changes}
    return Kernel.of({"shape": shape, "lengths": [0.5, 1.1], **numbers})


def points(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 2, generator=g, dtype=_FLOAT) * 3, torch.randn(n, 1, generator=g, dtype=_FLOAT)


@pytest.mark.parametrize("shape", gaussian.SHAPES)
def test_kernels_are_their_formulas_and_the_marginal_likelihood_that_of_dense_normals(shape: str) -> None:
    k, (x, y) = kernel(shape), points(6)
    K = torch.empty(6, 6, dtype=_FLOAT)
    for i in range(6):
        for j in range(6):
            r = float(((x[i] - x[j]) / torch.tensor([0.5, 1.1])).norm())
            smooth = {"squared_exponential": math.exp(-0.5 * r * r), "matern12": math.exp(-r)}
            smooth["matern32"] = (1 + math.sqrt(3) * r) * math.exp(-math.sqrt(3) * r)
            K[i, j] = 1.5**2 * smooth[shape] + 0.4**2
    assert torch.allclose(k(x, x), K, atol=1e-5)
    noise = (0.2**2 + gaussian.JITTER * 1.5**2) * torch.eye(6, dtype=_FLOAT)
    want = MultivariateNormal(torch.full((6,), 0.7, dtype=_FLOAT), k(x, x) + noise).log_prob(y[:, 0])
    assert float(log_marginal(k, x[None], y[None])) == pytest.approx(float(want), abs=1e-8)


def drawn(true: Kernel, tasks: int, n: int) -> list[tuple[Tensor, Tensor]]:
    g, found = torch.Generator().manual_seed(1), []
    for _ in range(tasks):
        x = torch.rand(n, 2, generator=g, dtype=_FLOAT) * 3
        R = torch.linalg.cholesky(true(x, x) + true.noise**2 * torch.eye(n, dtype=_FLOAT))
        found.append((x, true.level + R @ torch.randn(n, 1, generator=g, dtype=_FLOAT)))
    return found


def test_learning_finds_the_numbers_of_a_known_process_and_adapting_stays_near_them() -> None:
    true = kernel("matern32")
    found = learn(drawn(true, 40, 30), "matern32")
    for name in ("amplitude", "noise"):
        assert float(getattr(found, name)) == pytest.approx(float(getattr(true, name)), rel=0.2)
    assert found.lengths.tolist() == pytest.approx([0.5, 1.1], rel=0.25)
    other = kernel("matern32", amplitude=0.5, noise=0.6)
    (x, y) = drawn(other, 1, 25)[0]
    alone, adapted = learn([(x, y)], "matern32", own_level=False), learn([(x, y)], "matern32", False, towards=true)
    value = lambda k: float(log_marginal(k, x[None], y[None]))  # noqa: E731
    assert value(adapted) > value(true)
    for changes in ({"amplitude": 1.1 * alone.amplitude}, {"lengths": 0.9 * alone.lengths}, {"level": alone.level + 0.05}):
        assert value(alone) > value(replace(alone, **changes))
    logs = [(k.amplitude.log() - true.amplitude.log()).square() + (k.noise.log() - true.noise.log()).square() for k in (alone, adapted)]
    assert float(logs[1]) < float(logs[0]) and float(adapted.level) == float(true.level)
    few = learn([(x[:3], torch.zeros(3, 1, dtype=_FLOAT))], "matern32", own_level=False, floor=0.3)
    assert float(few.noise) >= 0.3  # nothing to explain must not mean no noise


def test_a_fitted_process_is_the_one_of_its_own_context() -> None:
    (x, y) = drawn(kernel("matern32"), 1, 20)[0]
    shift = lambda at: 5 * at[..., :1]  # noqa: E731
    around = FittedGP("matern32", shift, 20).condition(x[None], (y + shift(x))[None]).predict(x[None] + 0.1)
    plain = FittedGP("matern32", None, 20).condition(x[None], y[None]).predict(x[None] + 0.1)
    assert torch.allclose(around.mean, plain.mean + shift(x[None] + 0.1), atol=1e-4)
    with pytest.raises(ValueError, match="one whole task"):
        FittedGP("matern32").condition(x.expand(2, -1, -1), y.expand(2, -1, -1))


def test_a_normal_over_places_is_the_dense_conditional_and_with_all_shrinkage_knows_only_places() -> None:
    g = torch.Generator().manual_seed(0)
    places, values = torch.rand(7, 2, generator=g, dtype=_FLOAT), torch.randn(30, 7, generator=g, dtype=_FLOAT).cumsum(1)
    gp, y, seen = PlacesNormal.of(places, values, 0.1), torch.randn(7, 1, generator=g, dtype=_FLOAT), [0, 2, 5]
    rest = [i for i in range(7) if i not in seen]
    S = torch.cov(values.mT)
    C = 0.9 * S + 0.1 * torch.diag(S.diagonal()) + gp.noise_std**2 * torch.eye(7, dtype=_FLOAT)
    gain = C[rest][:, seen] @ torch.linalg.inv(C[seen][:, seen])
    mean = values.mean(0)[rest] + gain @ (y[seen, 0] - values.mean(0)[seen])
    want = MultivariateNormal(mean, C[rest][:, rest] - gain @ C[seen][:, rest]).log_prob(y[rest, 0])
    found = gp.condition(places[None, seen], y[None, seen]).predict(places[None, rest])
    assert float(found.log_prob(y[None, rest], joint=True)) == pytest.approx(float(want), abs=1e-8)
    blind = PlacesNormal.of(places, values, 1.0).condition(places[None, seen], y[None, seen]).predict(places[None, rest])
    assert torch.allclose(blind.mean[0, :, 0], values.mean(0)[rest])
    assert torch.allclose(blind.std[0, :, 0], values.std(0)[rest], rtol=1e-4)


def test_the_mean_field_divergence_and_densities_are_those_of_torch() -> None:
    recipe = meanfield.Recipe((4,), "tanh", input_scale=2.0, steps=3, batch=5)
    x, y = points(12)
    net = meanfield.train(recipe, x.expand(2, -1, -1), y.expand(2, -1, -1))
    want = torch.zeros(2)
    for m, s, prior in zip(net.mean, net.log_std, [2 / math.sqrt(3), 1 / math.sqrt(5)], strict=True):
        want += kl_divergence(Normal(m, s.exp()), Normal(torch.zeros_like(m), prior)).sum((1, 2))
    assert torch.allclose(net.kl(), want, rtol=1e-4)
    found = net.condition(x[None], y[None], num_samples=6).predict(x.expand(2, -1, -1))
    given = Normal(found.f, found.noise).log_prob(y).squeeze(-1)
    assert torch.allclose(found.log_prob(y.expand(2, -1, -1)), given.logsumexp(0) - math.log(6))
    mask = torch.arange(12) < 7
    each = found.log_prob(y.expand(2, -1, -1), joint=True, mask=mask.expand(2, -1))
    assert torch.allclose(each, given[..., :7].sum(-1).logsumexp(0) - math.log(6))
    assert torch.equal(found.mean, net.condition(x[None, :1], y[None, :1], num_samples=6).predict(x.expand(2, -1, -1)).mean)


def test_local_draws_have_the_moments_of_whole_ones_with_one_layer() -> None:
    net = meanfield.Network(meanfield.Recipe((), "tanh"), 2, 1, [torch.zeros(2), torch.ones(2), torch.zeros(1), torch.ones(1)], seed=0)
    net.log_std[0].fill_(math.log(0.3))
    x, g = points(3)[0].float()[None], torch.Generator().manual_seed(0)
    local = torch.stack([net.locally(x, g) for _ in range(4000)])
    whole = net.functions(x, 4000, g)
    assert torch.allclose(local.mean(0), whole.mean(0), atol=0.08) and torch.allclose(local.std(0), whole.std(0), rtol=0.1)


def test_a_mean_field_network_on_one_task_learns_it_and_blind_to_tasks_their_mean() -> None:
    x = torch.linspace(-1, 1, 60).reshape(1, -1, 1)
    recipe = meanfield.Recipe((16,), "tanh", steps=400, batch=60)
    own = meanfield.train(recipe, x, 2 + x).condition(x, x).predict(x)
    assert float((own.mean - 2 - x).square().mean().sqrt()) < 0.1 and float(own.std.mean()) < 0.2
    two = torch.cat([x, x], 1)
    blind = meanfield.train(recipe, two, torch.cat([3 + x, 1 + x], 1)).condition(x, x).predict(x)
    assert float((blind.mean - 2 - x).square().mean().sqrt()) < 0.2 and float(blind.std.mean()) == pytest.approx(1.0, abs=0.2)


def test_blocks_and_leads_in_a_summary_are_those_by_hand() -> None:
    values = [1.0, 2.0, 4.0, 5.0]
    found = study._statistics(values, ["a", "a", "b", "b"])
    assert found["mean"] == 3.0 and found["se"] == pytest.approx(np.std(values, ddof=1) / 2)
    assert found["block_se"] == pytest.approx(np.std([1.5, 4.5], ddof=1) / math.sqrt(2))


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write four days of small maps in the format of ERA5."""
    xarray = pytest.importorskip("xarray")
    folder, rng = tmp_path_factory.mktemp("maps"), np.random.default_rng(0)
    time, latitude, longitude = (
        np.arange("2021-06-01", "2021-06-05", dtype="datetime64[h]"),
        np.arange(41.0, 40.0, -0.25),
        np.arange(5) * 0.5,
    )
    fields = 280 + rng.normal(size=(len(time), 1, 1)) + latitude[:, None] + 0.1 * rng.normal(size=(len(time), 4, 5))
    coordinates = {"time": time.astype("datetime64[ns]"), "latitude": latitude, "longitude": longitude}
    (folder / "era5").mkdir()
    source = xarray.Dataset({"t2m": (("time", "latitude", "longitude"), fields.astype(np.float32))}, coordinates)
    source.to_netcdf(folder / era5.settings()["data"]["file"])
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three short records in the WFDB format, of different rates and leads."""
    with warnings.catch_warnings(action="ignore"):  # wfdb uses what pandas deprecates
        wfdb = pytest.importorskip("wfdb")
    folder, rng = tmp_path_factory.mktemp("records"), np.random.default_rng(0)
    (folder / "ecg").mkdir()
    for name, rate, lead, seconds, level in (("100", 120, "MLII", 20, 3.0), ("a103l", 80, "II", 9, -1.0), ("s0010_re", 40, "ii", 5, 0.0)):
        t = np.arange(seconds * rate) / rate
        beats = level + np.exp(-(((t % 0.8) - 0.4) ** 2) / 0.002) + 0.02 * rng.normal(size=len(t))
        with warnings.catch_warnings(action="ignore"):
            wfdb.wrsamp(name, fs=rate, units=["mV"], sig_name=[lead], p_signal=beats[:, None], fmt=["16"], write_dir=str(folder / "ecg"))
    return folder


def test_maps_are_cut_by_day_and_places_keep_their_values(maps: Path) -> None:
    import xarray

    config = era5.settings(quick=True)
    done, fields = era5.study(maps, maps, config)
    hours = fields.hours
    assert (len(hours["train"]), len(hours["validation"]), len(hours["test"])) == (48, 24, 24)
    assert [len(done.train), len(done.validation)] == [48, 4] and fields.shape == (4, 5)
    with xarray.open_dataset(maps / config["data"]["file"]) as source:
        for i in (0, 7, 19):
            longitude, latitude = fields.x[i].tolist()
            want = source["t2m"].sel(longitude=longitude, latitude=latitude).values
            assert np.allclose(fields.y[:, i], want)
        last = source["t2m"].values[-24]
    part = done.parts["test"]
    assert part.names[0] == "2021-06-04T00" and set(part.blocks) == {"2021-06-04"}
    xc, yc, xt, yt = part.splits["25 % seen"][0]
    assert len(xc) == 5 and len({tuple(x) for x in torch.cat([xc, xt]).tolist()}) == 20
    assert sorted(torch.cat([yc, yt])[:, 0].tolist()) == sorted(last.ravel().tolist())


def test_windows_are_cut_in_time_and_other_patients_are_resampled(records: Path) -> None:
    done, windows = ecg.study(records, records, ecg.settings(quick=True))
    assert {name: len(y) for name, y in windows.y.items()} == {"train": 13, "validation": 3, "test": 4, "a103l": 9, "s0010_re": 5}
    assert windows.starts["train"][-1] + 1 <= windows.starts["validation"][0] and windows.starts["test"] == [16.0, 17.0, 18.0, 19.0]
    assert len(windows.x) == 40 and all(y.shape[1] == 40 for y in windows.y.values())
    assert all(abs(float(y.median())) < 0.05 for y in windows.y.values())  # levels of 3, -1 and 0 mV are gone
    xc, _, xt, _ = done.parts["test"].splits["first 50 % seen"][0]
    assert float(xc.max()) < float(xt.min()) and len(xc) == 20


@pytest.mark.parametrize("name", ["era5", "ecg"])
def test_a_run_in_miniature_is_resumed_and_reported(name: str, maps: Path, records: Path, tmp_path: Path) -> None:
    module, data = {"era5": (era5, maps), "ecg": (ecg, records)}[name]
    arguments = ["--data", str(data), "--out", str(tmp_path / "out"), "--quick"]
    module.main([*arguments, "--rivals"])
    assert not (tmp_path / "out" / "model").exists()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "scores").iterdir()}
    module.main([*arguments, "--minutes", "5"])
    out = tmp_path / "out"
    assert before.items() <= {file: file.stat().st_mtime_ns for file in (out / "scores").iterdir()}.items()
    results: dict[str, Any] = json.loads((out / "results.json").read_text())
    part = results["summary"]["test"]["25 % seen"]
    assert set(part) == {study.OURS, *results["seconds"]} and len(part) == (10 if name == "era5" else 8)
    assert part[study.OURS]["joint less ours"]["mean"] == 0 and results["training"]["steps"] == 4
    assert sum(results["trust"]["test"]["25 % seen"]["sentences"].values()) == len(results["parts"]["test"]["tasks"])
    each = json.loads((out / "scores" / "this_model.json").read_text())["scores"]["test"]["25 % seen"]["rmse"]
    assert part[study.OURS]["rmse"]["mean"] == pytest.approx(np.mean(each))
    assert "**test, joint**" in (out / "tables.md").read_text() and (out / "prior.png").stat().st_size > 5000
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["what"] for line in log].count("training") == 1
    kept = (out / "results.json").read_bytes()
    again, held = module.study(out, data, module.settings(quick=True))
    again.run(module.rivals(held, again.config))
    assert (out / "results.json").read_bytes() == kept
    with pytest.raises(SystemExit, match="Got others"):
        study.Study(out, {**again.config, "seed": 5}, again.train, again.validation, again.parts).trained()


@pytest.mark.parametrize("module", [era5, ecg])
def test_without_data_a_run_says_where_it_looked(module: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"Got no such file.*--data"):
        module.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")])
