"""`recipe.toml`: the knobs that `setpoint tune` chose, what they were shown to hold, and where that is true.

Read strictly: unknown or missing fields, wrong types and a changed content are refused by name. The content hash says
that nobody edited the evidence; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from setpoint.config import EngineConfig, knob_of
from setpoint.errors import ConfigError
from setpoint.tune.probe.machine import MachineIdentity

SCHEMA = 1
MAX_BYTES = 1 << 20
_TOP = ("recipe", "verdict", "sla", "knobs", "model", "machine", "evidence", "envelope", "provenance", "content_sha256")
_HEX = set("0123456789abcdef")


class RecipeError(ConfigError):
    """A recipe that cannot be used as it is."""


@dataclass(frozen=True)
class Recipe:
    """`knobs` differ from the default. `envelope` rows: a range of load (requests/s) and what was certified there."""

    verdict: str
    sla: str
    knobs: Mapping[str, Any]
    model: Mapping[str, Any]  # name, sha256
    machine: Mapping[str, Any]  # fingerprint, cpu
    evidence: Mapping[str, Any]
    envelope: tuple[Mapping[str, Any], ...]
    provenance: Mapping[str, Any]

    @property
    def document(self) -> dict[str, Any]:
        body = {"recipe": SCHEMA, **{name: getattr(self, name) for name in _TOP[1:-1]}}
        body["envelope"] = [dict(row) for row in self.envelope]
        body = _plain(body)
        return {**body, "content_sha256": content_hash(body)}


def content_hash(body: Mapping[str, Any]) -> str:
    """Of everything but the hash itself."""
    rest = {name: value for name, value in body.items() if name != "content_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Lists, tables and finite numbers: what TOML holds. What is None is left out."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise RecipeError("a recipe holds finite numbers")
    return value


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Whole or not at all."""
    import tomli_w

    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_text(tomli_w.dumps(recipe.document), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RecipeError(f"{path} cannot be written: {error.strerror}") from None


def read_recipe(path: Path) -> Recipe:
    """Raises RecipeError naming the field."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise RecipeError(f"{path.name} is larger than {MAX_BYTES >> 20} MiB")
    try:
        found = tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{path.name} is not TOML: {str(error)[:120]}") from None
    return parse_recipe(found)


def parse_recipe(found: Mapping[str, Any]) -> Recipe:
    for name in found:
        if name not in _TOP:
            raise RecipeError(f"the recipe's field {name[:64]!r} is unknown")
    for name in _TOP:
        if name not in found and name != "envelope":
            raise RecipeError(f"the recipe has no field {name!r}")
    if type(found["recipe"]) is not int or found["recipe"] != SCHEMA:
        raise RecipeError(f"the recipe's version is {str(found['recipe'])[:20]!r}; this engine reads {SCHEMA}")
    for name in ("verdict", "sla", "content_sha256"):
        if not isinstance(found[name], str) or len(found[name]) > 4096:
            raise RecipeError(f"the recipe's {name} must be a text")
    for name in ("knobs", "model", "machine", "evidence", "provenance"):
        if not isinstance(found[name], dict):
            raise RecipeError(f"the recipe's {name} must be a table")
    envelope = found.get("envelope", [])
    if not isinstance(envelope, list) or len(envelope) > 256 or not all(isinstance(row, dict) for row in envelope):
        raise RecipeError("the recipe's envelope must be at most 256 tables")
    for table, name in (("model", "sha256"), ("machine", "fingerprint")):
        value = found[table].get(name)
        if not isinstance(value, str) or len(value) != 64 or not set(value) <= _HEX:
            raise RecipeError(f"the recipe's {table}.{name} must be 64 hexadecimal digits")
    if found["content_sha256"] != content_hash(found):
        raise RecipeError("the recipe was changed after it was written: content_sha256 does not fit")
    check_knobs(found["knobs"])
    check_envelope(envelope)
    rest = {name: found[name] for name in _TOP[1:-1] if name != "envelope"}
    return Recipe(**rest, envelope=tuple(envelope))


def check_knobs(knobs: Mapping[str, Any]) -> None:
    """Raises RecipeError for a knob that a recipe may not set; bounds are checked by the config itself."""
    hot = {d.name: d for d in fields(EngineConfig) if "knob" in d.metadata and knob_of(d).search}
    for name, value in knobs.items():
        if name not in hot:
            raise RecipeError(f"the recipe's knobs.{name[:64]} cannot be set by a recipe; it may set {', '.join(hot)}")
        if type(value) is not type(hot[name].default):
            raise RecipeError(f"the recipe's knobs.{name} must be of type {type(hot[name].default).__name__}")


def check_envelope(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises RecipeError unless every row has a load up to which its knobs were certified, each more than the last."""
    before: float = 0.0
    for number, row in enumerate(rows):
        up_to, knobs = row.get("up_to_rps"), row.get("set")
        if not isinstance(up_to, int | float) or isinstance(up_to, bool) or not before < up_to < math.inf:
            raise RecipeError(f"the recipe's envelope[{number}].up_to_rps must be a rate above {before:g}")
        if not isinstance(knobs, dict):
            raise RecipeError(f"the recipe's envelope[{number}].set must be a table")
        check_knobs(knobs)
        before = float(up_to)


def machine_fingerprint(identity: MachineIdentity) -> str:
    return hashlib.sha256(json.dumps(asdict(identity), sort_keys=True).encode()).hexdigest()


def model_hash(path: Path) -> str:
    """SHA-256 over the files of a model: the file, or names and contents of all in its directory."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as opened:
            while piece := opened.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def mismatches(recipe: Recipe, *, machine: str, model: str) -> list[str]:
    """Why its evidence does not count here; empty if it does."""
    found = []
    if recipe.machine["fingerprint"] != machine:
        found.append("it was certified on another machine")
    if recipe.model["sha256"] != model:
        found.append("it was certified for another model")
    return found
