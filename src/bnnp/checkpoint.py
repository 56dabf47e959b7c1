"""Files: a model or a training state is a folder with a JSON header and one safetensors file.

The header names its tensor file, which carries a digest in its name: tensors are written first, then the header is replaced in one
step, so a reader sees the old state or the new one and never half of either. Loading executes nothing.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from bnnp.conjugate import Conditional, SiteSum
from bnnp.factors import Given
from bnnp.linalg import compute_device
from bnnp.networks import BNNP
from bnnp.particles import Particles
from bnnp.posterior import Posterior
from bnnp.streaming import Reservoir
from bnnp.tasks import Context

__all__ = ["FORMAT_VERSION", "load", "load_posterior", "read_bundle", "save", "save_posterior", "sweep", "write_atomically", "write_bundle"]

FORMAT_VERSION = 1

LATER = {"missing_outputs": False, "feed_activations": False, "trunk": False, "temperature": False}
"""Settings of a model that files did not name at first, with what they were then; those of its prior are in `LATER_OF_PRIOR`."""
LATER_OF_PRIOR = {"fraction": 1.0, "rank": 4, "of": "shared", "components": 3, "dof": 4.0, "tied": False}


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file through a temporary one beside it and a rename; on failure the old file stays and no other is left.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    # As a plain file, so that the user's umask decides who may read it; Windows would turn line feeds into two bytes.
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise


def sweep(folder: Path, pattern: str) -> None:
    """Remove what a killed process left half-written of the files whose names match a pattern."""
    for old in folder.glob(".*"):
        if re.fullmatch(rf"\.{pattern}\.[0-9a-f]{{16}}", old.name):
            old.unlink(missing_ok=True)


def write_bundle(folder: str | os.PathLike[str], name: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write `name`.json and its tensors into a folder, replacing an older bundle of that name in one step."""
    folder = Path(folder)
    data = save_tensors({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()})
    file = f"{name}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"
    if not (folder / file).exists():
        write_atomically(folder / file, data)
    text = json.dumps({"format": f"bnnp-{name}", "version": FORMAT_VERSION, "tensors": file, **header}, indent=1)
    write_atomically(folder / f"{name}.json", text.encode())
    for old in folder.glob(f"{name}-*.safetensors"):
        # Nothing but what this function wrote: other files may have names that look alike.
        if old.name != file and re.fullmatch(rf"{name}-[0-9a-f]{{16}}\.safetensors", old.name):
            old.unlink(missing_ok=True)
    sweep(folder, rf"{name}(-[0-9a-f]{{16}}\.safetensors|\.json)")


def read_bundle(folder: str | os.PathLike[str], name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a bundle that `write_bundle` wrote.

    Raises:
        FileNotFoundError: there is no such bundle in the folder.
        ValueError: it is something else, damaged, or of a newer format.
    """
    path = Path(folder) / f"{name}.json"
    if not path.is_file():
        inside = sorted(str(p.parent) for p in Path(folder).glob(f"*/{name}.json")) if Path(folder).is_dir() else []
        what = "a folder without it" if Path(folder).is_dir() else "a file" if Path(folder).is_file() else "no folder there"
        advice = f"There is one in {' and in '.join(inside)}." if inside else "Check the path."
        raise FileNotFoundError(f"Expected {path}, as written by this package. Got {what}. {advice}")
    try:
        header = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"Expected JSON in {path}. Got {error}. The file is damaged or not ours; take another copy.") from None
    if not isinstance(header, dict) or header.get("format") != f"bnnp-{name}":
        raise ValueError(f"Expected {path} to have format 'bnnp-{name}'. Got something else: this is no {name} of this package.")
    if not isinstance(header.get("version"), int) or header["version"] > FORMAT_VERSION:
        raise ValueError(
            f"Expected format version {FORMAT_VERSION} or older in {path}. Got {header.get('version')}. Update the package to read it."
        )
    file = path.parent / Path(str(header.get("tensors"))).name
    if not file.is_file():
        raise ValueError(f"Expected the tensors of {path} in {file}. Got no such file. Copy the whole folder.")
    data = file.read_bytes()
    try:
        tensors = load_tensors(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"Expected safetensors in {file} ({len(data)} bytes). {error}. It is cut short or damaged.") from None
    if hashlib.sha256(data).hexdigest()[:16] != file.stem.rsplit("-", 1)[-1]:
        raise ValueError(f"Expected {file} to hold what its name says (a digest). Got other bytes. The file is damaged.")
    return header, tensors


def model_header(model: BNNP) -> dict[str, Any]:
    """Return what is needed beside the tensors to build the model again."""
    return {"model": type(model).__name__, "config": model.config, "dtype": str(model.dtype).removeprefix("torch.")}


def model_from(header: dict[str, Any], tensors: dict[str, Tensor], where: str) -> BNNP:
    """Build a model from its header and tensors.

    Raises:
        ValueError: they do not belong together.
    """
    try:
        model = BNNP.from_config(header["config"]).to(getattr(torch, header["dtype"]))
        model.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"Expected the settings of a BNNP and matching tensors in {where}. Got {error}.") from None
    return model


def save(model: BNNP, folder: str | os.PathLike[str]) -> None:
    """Save a model as `model.json` and one safetensors file; see `load`."""
    write_bundle(folder, "model", model_header(model), model.state_dict())


def load(folder: str | os.PathLike[str]) -> BNNP:
    """Load a model that `save` wrote, on the CPU.

    Raises:
        FileNotFoundError: no model is there.
        ValueError: it is damaged, something else, or of a newer format.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder: save(BNNP(1, 1, hidden=(4,)), folder); model = load(folder)
        >>> model.config["hidden"]
        [4]
    """
    header, tensors = read_bundle(folder, "model")
    return model_from(header, tensors, str(folder))


def comparable(config: dict[str, Any]) -> dict[str, Any]:
    """Return settings of a model in a form in which those of older files are equal to today's: without later ones left as they were."""

    def kept(settings: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in settings.items() if key not in later or value != later[key]}

    return {**kept(config, LATER), "prior": kept(config["prior"], LATER_OF_PRIOR)}


def _digest(model: Any) -> str:
    """Return what tells one model from another: its settings and every number of it."""
    header = model_header(model)
    header["config"] = comparable(header["config"])
    for flag in ("learn_mean", "learn_scale"):  # whether it is still learned does not change what it is
        header["config"]["prior"].pop(flag)
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _fields(part: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: getattr(part, name) for name in names if getattr(part, name) is not None}


_SUMS, _CONDITIONAL = ("gram", "h", "rr", "log_prec", "count"), ("m", "root", "quad", "log_prec", "count", "B", "r")
_PARTICLES = ("drawn_kl", "log_ratio", "log_lik", "share")
_POSTERIOR = ("counts", "gained", "past_evidence", "applied", "ancestors", "volume")


def _pack(posterior: Posterior) -> dict[str, Tensor]:
    """Return all tensors of a posterior but those of its model."""
    particles = posterior.particles
    found = {**_fields(posterior, _POSTERIOR), **{f"particles.{k}": v for k, v in _fields(particles, _PARTICLES).items()}}
    found |= {f"weights.{i}": W for i, W in enumerate(particles.weights)}
    for name, q in (("last", particles.last), ("redraw", None if particles.redraw is None else particles.redraw[0])):
        if q is not None:
            found |= {f"{name}.{k}": v for k, v in _fields(q, _CONDITIONAL).items()}
            found |= {f"{name}.sums.{k}": v for k, v in ({} if q.sums is None else _fields(q.sums, _SUMS)).items()}
    given = particles.given
    found |= {"given.mean": given.mean, **{f"given.factor.{i}": t for i, t in enumerate(given.factor.tensors)}}
    found |= {f"given.{name}": t for name, t in (("mix", given.mix), ("scale", given.scale)) if t is not None}
    if particles.redraw is not None:
        found["noise"] = particles.redraw[1]
    if isinstance(particles.seen, SiteSum):
        found |= {f"seen.{k}": v for k, v in _fields(particles.seen, _SUMS).items()}
    found["key"] = posterior.sample.key
    for i, points in enumerate([posterior.sample.points, *(posterior.kept or ())]):
        found |= {f"points.{i}.{k}": v for k, v in _fields(points, ("x", "y", "mask", "seen")).items()}
    return found


def save_posterior(posterior: Posterior, folder: str | os.PathLike[str]) -> None:
    """Save a posterior as `posterior.json` and one safetensors file, replacing an older one in one step; see `load_posterior`.

    The model is saved on its own, once, with `model.save`. A process killed while it saves leaves the older posterior.

    Raises:
        TypeError: the posterior holds draws of another inference engine, which no model file goes with.
    """
    model: Any = posterior.model
    if not isinstance(model, BNNP):
        raise TypeError(
            "Expected a posterior of model.condition. Got draws of another inference engine. Give its run a folder: the same call then "
            "returns the same posterior without computing it again."
        )
    header = {
        "model": _digest(model),
        "single": posterior.single,
        "seed": posterior.seed,
        "kept": None if posterior.kept is None else len(posterior.kept),
        "points": int(posterior.counts.sum()),
        "layers": len(posterior.particles.weights),
        "joint": posterior.particles.given.joint,
    }
    write_bundle(folder, "posterior", header, _pack(posterior))


def _given(parts: dict[str, Tensor], like: Given, joint: bool) -> Given:
    """Return the last layer's prior given the particles, of the structure that its network has."""
    like = like.together() if joint and not like.joint else like
    if not parts:  # files from before it depended on the particles
        return like
    factors = [parts[f"factor.{i}"] for i in range(len(like.factor.tensors))]
    return Given(parts["mean"], like.factor.rebuild(*factors), parts.get("mix"), parts.get("scale"))


def load_posterior(folder: str | os.PathLike[str], model: BNNP) -> Posterior:
    """Load a posterior that `Posterior.save` wrote; it goes on exactly where it was.

    Arguments:
        folder: where it is.
        model: the model that made it, for instance from `load`; on whatever device it is.

    Raises:
        FileNotFoundError: no posterior is there.
        ValueError: it is damaged, something else, of a newer format, or of another model.

    Example:
        >>> import tempfile
        >>> model = BNNP(1, 1, hidden=(4,))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.condition([[0.0]], [[1.0]], num_samples=2).save(folder)
        ...     posterior = load_posterior(folder, model)
        >>> posterior.num_samples
        2
    """
    header, tensors = read_bundle(folder, "posterior")
    digest = _digest(model)
    if header.get("model") != digest:
        raise ValueError(
            f"Expected a posterior of this model (digest {digest}) in {folder}. Got one of another (digest {header.get('model')}). "
            "Load the model that made it: the same settings, the same parameters, the same precision."
        )
    device = compute_device(model.device)

    def under(prefix: str) -> dict[str, Tensor]:
        return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}

    def conditional(name: str) -> Conditional | None:
        parts = {key: value.to(device) for key, value in under(f"{name}.").items()}
        if not parts:
            return None
        sums = {key[5:]: parts.pop(key) for key in list(parts) if key.startswith("sums.")}
        core = given.computed(own.factor_dtype).core
        return Conditional(core, **{"B": None, "r": None, **parts}, sums=SiteSum(**sums) if sums else None)  # type: ignore[arg-type]

    try:
        own: Any = copy.deepcopy(model).requires_grad_(False)
        kept_given = {key: value.to(model.device) for key, value in under("given.").items()}
        given = _given(kept_given, own.layers[-1].prior.given(), header.get("joint", False))
        redraw, seen = conditional("redraw"), {key: value.to(device) for key, value in under("seen.").items()}
        particles = Particles(
            own.architecture,
            tuple(tensors[f"weights.{i}"].to(model.device) for i in range(header["layers"])),
            given=given,
            likelihood=own.likelihood,
            last=conditional("last"),
            dtype=own.factor_dtype,
            seen=SiteSum(**seen) if seen else None,
            redraw=None if redraw is None else (redraw, tensors["noise"].to(device)),
            **{key: value.to(device) for key, value in under("particles.").items()},  # type: ignore[arg-type]
        )
        count = 1 + (header["kept"] or 0)
        sample, *kept = [Context(**{k: v.to(model.device) for k, v in under(f"points.{i}.").items()}) for i in range(count)]
        state = {key: tensors[key].to(model.device if key == "counts" else device) for key in _POSTERIOR if key in tensors}
        points = None if header["kept"] is None else tuple(kept)
        reservoir = Reservoir(sample, tensors["key"].to(model.device))
        return Posterior(particles, own, single=header["single"], seed=header["seed"], kept=points, sample=reservoir, **state)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"Expected all parts of a posterior in {folder}. Got {type(error).__name__}: {error}. Save it again.") from None


# The core knows no files, so the methods that users expect are added where files are known.
BNNP.save = save
Posterior.save = save_posterior
