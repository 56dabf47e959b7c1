"""Files: a model or a training state is a folder with a JSON header and one safetensors file.

The header names its tensor file, which carries a digest in its name: tensors are written first, then the header is replaced in one
step, so a reader sees the old state or the new one and never half of either. Loading executes nothing.
"""

from __future__ import annotations

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

from bnnp.networks import BNNP

__all__ = ["FORMAT_VERSION", "load", "read_bundle", "save", "write_atomically", "write_bundle"]

FORMAT_VERSION = 1


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file through a temporary one beside it and a rename; on failure the old file stays and no other is left.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    # As a plain file, so that the user's umask decides who may read it.
    descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        name.unlink(missing_ok=True)
        raise


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


# The core knows no files, so the method that users expect is added where files are known.
BNNP.save = save
