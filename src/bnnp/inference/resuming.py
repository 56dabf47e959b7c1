"""States of engines in files, so that a long run goes on where it was stopped, bit for bit.

A state is a frozen dataclass of tensors, numbers, generators and the like; it becomes a tree of plain values in JSON beside its tensors.
Nothing that is read back is executed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnnp.checkpoint import read_bundle, write_bundle
from bnnp.inference.target import Target

__all__ = ["Stored", "fingerprint", "pack", "unpack"]


def pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a value as plain JSON, its tensors and generators taken out into `tensors`.

    Raises:
        TypeError: a part of it is neither tensor, number, text, None, generator, nor a tuple, list or dataclass of these.
    """
    if isinstance(value, Tensor | torch.Generator):
        key = str(len(tensors))
        if isinstance(value, torch.Generator):
            tensors[key] = value.get_state()
            return {"generator": key}
        tensors[key] = value
        return {"tensor": key} if value.device.type == "cpu" else {"tensor": key, "device": value.device.type}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        fields = {field.name: pack(getattr(value, field.name), tensors) for field in dataclasses.fields(value)}
        return {"is": f"{kind.__module__}:{kind.__qualname__}", "fields": fields}
    if isinstance(value, tuple | list):
        return {"tuple" if isinstance(value, tuple) else "list": [pack(part, tensors) for part in value]}
    if isinstance(value, dict):
        return {"dict": [[pack(k, tensors), pack(v, tensors)] for k, v in value.items()]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"Expected a state of tensors, numbers, generators and dataclasses of these. Got a part of type {type(value).__name__}."
    )


def unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the value that `pack` took apart."""
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        # Files know of no device: what was on an accelerator goes back there.
        return tensors[tree["tensor"]].to(tree.get("device", "cpu"))
    if "generator" in tree:
        generator = torch.Generator()
        generator.set_state(tensors[tree["generator"]])
        return generator
    if "is" in tree:
        module, _, name = tree["is"].partition(":")
        kind = getattr(sys.modules.get(module), name, None)
        if not dataclasses.is_dataclass(kind) or not isinstance(kind, type):
            raise ValueError(f"Expected the state of a known engine. Got {tree['is']!r}. Run it with the version that wrote the files.")
        return kind(**{key: unpack(part, tensors) for key, part in tree["fields"].items()})
    if "dict" in tree:
        return {unpack(k, tensors): unpack(v, tensors) for k, v in tree["dict"]}
    parts = [unpack(part, tensors) for part in tree["tuple" if "tuple" in tree else "list"]]
    return tuple(parts) if "tuple" in tree else parts


def fingerprint(target: Target, engine: Any, seed: int, settings: dict[str, Any]) -> str:
    """Return what tells one run from another: its engine, its settings, its seed, and the density it works on, at two places."""
    tensors: dict[str, Tensor] = {}
    plain = {key: value for key, value in settings.items() if key != "start"}
    while isinstance(engine, partial):
        engine, plain = engine.func, {**engine.keywords, **plain}
    name = f"{engine.__module__}.{engine.__qualname__}"
    digest = hashlib.sha256(json.dumps([name, seed, {k: _described(v) for k, v in sorted(plain.items())}]).encode())
    pack(settings.get("start"), tensors)
    at = torch.linspace(-1, 1, 2 * target.dim, dtype=target.dtype).reshape(2, 1, target.dim).to(target.device)
    at = at.expand(2, target.num_tasks, target.dim)
    tensors["density"] = target.log_joint(at).detach()
    # A proposal is told from another as the target is.
    tensors |= {f"density of {key}": v.log_density(at).detach() for key, v in plain.items() if hasattr(v, "log_density")}
    for key in sorted(tensors):
        digest.update(tensors[key].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _described(value: Any) -> str:
    """Return a setting in words that are the same in every process."""
    if isinstance(value, Tensor):
        return hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, torch.nn.Module):
        return hashlib.sha256(b"".join(p.detach().cpu().contiguous().numpy().tobytes() for p in value.state_dict().values())).hexdigest()
    return repr(value) if isinstance(value, bool | int | float | str | tuple | list | dict | type(None)) else type(value).__qualname__


class Stored:
    """Keep the state of one run in a folder, written at most every so many seconds, beside a log of JSON lines.

    Arguments:
        folder: where; None keeps nothing.
        digest: of the run, see `fingerprint`.
        every: seconds between writes.

    Raises:
        ValueError: the folder holds another run.
    """

    def __init__(self, folder: Path | None, digest: str, every: float = 30.0) -> None:
        self.folder, self.digest, self.every, self.last = folder, digest, every, time.monotonic()

    def load(self) -> tuple[int, float, Any] | None:
        """Return the number of updates done, the seconds they took and the state; None where nothing is stored."""
        if self.folder is None or not (self.folder / "state.json").exists():
            return None
        header, tensors = read_bundle(self.folder, "state")
        if header.get("run") != self.digest:
            raise ValueError(
                f"Expected the run {self.digest} in {self.folder}. Got {header.get('run')}: another engine, seed, setting or data. "
                "Choose another folder."
            )
        return int(header["updates"]), float(header["seconds"]), unpack(header["state"], tensors)

    def store(self, updates: int, of: int, seconds: float, state: Any) -> None:
        """Write the state if it is the last one, or if it is time."""
        if self.folder is None or (updates < of and time.monotonic() - self.last < self.every):
            return
        tensors: dict[str, Tensor] = {}
        tree = pack(state, tensors)
        write_bundle(self.folder, "state", {"run": self.digest, "updates": updates, "seconds": seconds, "state": tree}, tensors)
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({"updates": updates, "of": of, "seconds": round(seconds, 3)}) + "\n")
        self.last = time.monotonic()
