"""Files: what is loaded is what was saved, and what is damaged is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import bnnp
from bnnp import checkpoint

VARIANTS = {
    "default": {},
    "linear": {"hidden": ()},
    "bounded noise": {"likelihood": bnnp.Gaussian(0.1, max_noise_std=0.5)},
    "Bernoulli": {"likelihood": bnnp.Bernoulli()},
    "diagonal, amortised": {"prior": bnnp.Prior("diagonal", learn_mean=False), "last_layer": "amortised", "activation": "sine"},
    "shared": {"prior": "shared", "shared_noise": True, "net_hidden": (5,), "residual": True, "factor_dtype": "float32"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load_give_the_same_model(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = bnnp.BNNP(2, 2, **{"hidden": (4, 4), **VARIANTS[variant]}).to(dtype)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=g, dtype=dtype)
    y = torch.rand(20, 2, generator=g)
    if variant != "Bernoulli":
        y = 100 * y
    model.fit_scaling([bnnp.Task(3 * torch.randn(20, 2, generator=g), y)])
    model.save(tmp_path / "m")
    again = bnnp.load(tmp_path / "m")
    x = torch.randn(5, 2, generator=g)
    first, second = (m.condition(x, y[:5], num_samples=3).predict(x).sample(2) for m in (model, again))
    assert first.dtype == dtype and torch.equal(first, second)
    assert again.config == model.config
    flags = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in again.parameters()] == flags


def test_a_prior_frozen_afterwards_is_loaded_frozen(tmp_path: Path) -> None:
    model = bnnp.BNNP(1, 1, hidden=(3,))
    model.prior.learn(mean=True, scale=False)
    model.save(tmp_path)
    again = bnnp.load(tmp_path)
    assert all(p.requires_grad for p in again.prior.means()) and not any(p.requires_grad for p in again.prior.scales())


def test_saving_twice_leaves_two_files(tmp_path: Path) -> None:
    bnnp.BNNP(1, 1, hidden=(3,), seed=0).save(tmp_path)
    bnnp.BNNP(1, 1, hidden=(4,), seed=1).save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert bnnp.load(tmp_path).config["hidden"] == [4]


def test_saving_leaves_other_files_alone(tmp_path: Path) -> None:
    other = tmp_path / "model-00001-of-00002.safetensors"
    other.write_bytes(b"mine")
    bnnp.BNNP(1, 1, hidden=(3,)).save(tmp_path)
    bnnp.BNNP(1, 1, hidden=(4,)).save(tmp_path)
    assert other.read_bytes() == b"mine"


def test_a_failed_write_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bnnp.BNNP(1, 1, hidden=(3,)).save(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        bnnp.BNNP(1, 1, hidden=(4,)).save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert bnnp.load(tmp_path).config["hidden"] == [3]


def damaged(tmp_path: Path, what: str) -> Path:
    bnnp.BNNP(1, 1, hidden=(3,)).save(tmp_path)
    header, tensors = tmp_path / "model.json", next(tmp_path.glob("*.safetensors"))
    content = json.loads(header.read_text())
    if what == "truncated tensors":
        tensors.write_bytes(tensors.read_bytes()[:-10])
    elif what == "very short tensors":
        tensors.write_bytes(b"abc")
    elif what == "changed tensors":
        data = bytearray(tensors.read_bytes())
        data[-1] ^= 1
        tensors.write_bytes(bytes(data))
    elif what == "no tensors":
        tensors.unlink()
    elif what == "truncated header":
        header.write_text(header.read_text()[:40])
    elif what == "other JSON":
        header.write_text('{"hello": 1}')
    elif what == "binary header":
        header.write_bytes(bytes(range(256)))
    elif what == "newer":
        header.write_text(json.dumps({**content, "version": 99}))
    elif what == "other shapes":
        content["config"]["hidden"] = [7]
        header.write_text(json.dumps(content))
    elif what == "unknown setting":
        content["config"]["colour"] = "blue"
        header.write_text(json.dumps(content))
    return tmp_path


DAMAGE = {
    "truncated tensors": "cut short or damaged",
    "very short tensors": "cut short or damaged",
    "changed tensors": "digest",
    "no tensors": "Copy the whole folder",
    "truncated header": "Expected JSON",
    "other JSON": "format 'bnnp-model'",
    "binary header": "Expected JSON",
    "newer": "version 1 or older.*Got 99",
    "other shapes": "matching tensors",
    "unknown setting": "colour",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_files_get_one_clear_error(what: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=DAMAGE[what]):
        bnnp.load(damaged(tmp_path, what))


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    bnnp.BNNP(1, 1, hidden=(3,)).save(tmp_path / "m")
    assert {p.stat().st_mode for p in (tmp_path / "m").iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.json"):
        bnnp.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder"):
        bnnp.load(tmp_path / "nowhere")
    (tmp_path / "file").write_text("no model")
    with pytest.raises(FileNotFoundError):
        bnnp.load(tmp_path / "file")


def test_a_model_from_before_the_reference_was_kept_loads(tmp_path: Path) -> None:
    model = bnnp.BNNP(1, 1, hidden=(3,))
    tensors = {name: value for name, value in model.state_dict().items() if not name.startswith("reference")}
    checkpoint.write_bundle(tmp_path, "model", checkpoint.model_header(model), tensors)
    assert not bnnp.load(tmp_path).reference.known


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    model = bnnp.BNNP(1, 1, hidden=(3,))
    left = tmp_path / (".model.json." + "0123456789abcdef")
    left.write_text("{")
    other = tmp_path / ".model.notes"
    other.write_text("mine")
    model.save(tmp_path)
    assert not left.exists() and other.exists()


FIRST = {
    "x_dim": 1,
    "y_dim": 1,
    "hidden": [3],
    "prior": {"kind": "shared", "scaled": True, "learn_mean": True, "learn_scale": True, "spread": 0.0, "input_scale": 1.0},
    "likelihood": {"kind": "gaussian", "noise_std": 0.1, "learn_noise": True, "max_noise_std": None},
    "activation": "relu",
    "residual": False,
    "last_layer": "exact",
    "shared_noise": False,
    "net_hidden": [3],
    "factor_dtype": "float64",
}
"""What files said of a model before there were settings that came later."""


def test_settings_that_came_later_do_not_part_older_files_from_their_model(tmp_path: Path) -> None:
    model = bnnp.BNNP.from_config(FIRST)
    assert checkpoint.comparable(model.config) == FIRST
    for other in (bnnp.Prior("shared", fraction=0.5), bnnp.Prior("mixture", components=4), bnnp.Prior("diagonal", tied=True)):
        config = bnnp.BNNP(1, 1, hidden=(3,), prior=other).config
        restored = bnnp.BNNP.from_config(checkpoint.comparable(config))  # nothing is lost
        assert restored.config == config
    assert checkpoint.comparable(bnnp.BNNP(1, 1, hidden=(3,), prior="shared", trunk=True).config) != FIRST
    g = torch.Generator().manual_seed(0)
    tasks = [(torch.rand(5, 1, generator=g), torch.rand(5, 1, generator=g)) for _ in range(3)]
    settings: dict[str, Any] = {"steps": 4, "num_samples": 2, "checkpoint_every": 2, "progress": False, "folder": tmp_path}
    bnnp.meta_train(model, tasks, **settings)
    path = tmp_path / "state" / "training.json"
    header = json.loads(path.read_text())
    header["settings"]["model"] = FIRST
    path.write_text(json.dumps(header))
    assert bnnp.meta_train(bnnp.BNNP.from_config(FIRST), tasks, resume=True, **settings).best_step == 4
