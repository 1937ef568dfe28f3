"""The Hugging Face hub through huggingface-hub: which files make a model, where they are, and clear errors.

Only data is ever fetched: safetensors, GGUF, JSON and templates; never .bin, .pt or .py, which can hold code.
"""

from __future__ import annotations

import glob
import re
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from setpoint.errors import ModelDownloadError, ModelNotFoundError
from setpoint.loaders.download import Progress, silent, tls
from setpoint.loaders.hub_progress import byte_bars
from setpoint.loaders.names import HubName

PROBE_TIMEOUT_S = 5.0
LIST_TIMEOUT_S = 30.0
MAX_FILES = 10_000  # of a repository we look at
_PART_NUMBER = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")

T = TypeVar("T")


class HubClient:
    """The hub that the environment names, or another `endpoint` and `cache` (tests).

    Whether the hub answers is asked once per client: its library would retry a dead network for half a minute.
    """

    def __init__(self, endpoint: str | None = None, cache: Path | None = None, token: str | None = None) -> None:
        self._endpoint, self._cache, self._token = endpoint, cache, token

    @cached_property
    def is_reachable(self) -> bool:
        import httpx
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return False
        try:
            httpx.head(self._endpoint or constants.ENDPOINT, timeout=PROBE_TIMEOUT_S, verify=tls())
        except (httpx.HTTPError, httpx.InvalidURL):
            return False
        return True

    def pull(self, asked: HubName, progress: Progress = silent) -> Path:
        """The model's file (of several parts: the first) or directory; only what is missing is downloaded.

        Raises ModelNotFoundError, ModelDownloadError.
        """
        if not self.is_reachable:
            return self.find(asked)
        return self._fetch(asked, choose_files(asked, self._list(asked)), progress)

    def find(self, asked: HubName) -> Path:
        """The same from the local cache alone; ModelDownloadError when it is not all there."""
        snapshot = self._snapshot(asked, [], None)
        names = [str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.is_file()]
        try:
            return self._fetch(asked, choose_files(asked, names), None)
        except ModelNotFoundError as error:
            raise ModelDownloadError(f"{asked} is not in the local cache; {_why_offline()}") from error

    def cached(self) -> list[tuple[str, Path, int]]:
        """(name, path, bytes) of each model of the local cache that is whole; a broken cache is an empty one."""
        from huggingface_hub import scan_cache_dir
        from huggingface_hub.errors import CacheNotFound

        try:
            repositories: Sequence[Any] = sorted(scan_cache_dir(self._cache).repos, key=lambda repo: str(repo.repo_id))
        except (CacheNotFound, OSError, ValueError):
            return []
        return [(repo.repo_id, repo.repo_path, repo.size_on_disk) for repo in repositories if repo.repo_type == "model"]

    def remove(self, repository: str) -> int | None:
        """Delete a repository from the local cache, whatever state it is in: the bytes freed, None if not there."""
        from huggingface_hub import constants

        directory = (self._cache or Path(constants.HF_HUB_CACHE)) / f"models--{repository.replace('/', '--')}"
        if not directory.is_dir() or directory.is_symlink():
            return None
        files = [path for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
        freed = sum(path.stat().st_size for path in files)
        shutil.rmtree(directory)
        return freed

    def _list(self, asked: HubName) -> list[str]:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._endpoint, token=self._token)
        call = partial(api.model_info, asked.repository, revision=asked.revision, timeout=LIST_TIMEOUT_S)
        files = _translated(asked, call).siblings or []
        return [str(file.rfilename) for file in files[:MAX_FILES]]

    def _fetch(self, asked: HubName, names: Sequence[str], progress: Progress | None) -> Path:
        snapshot = self._snapshot(asked, names, progress)
        missing = [name for name in names if not (snapshot / name).is_file()]
        if missing:
            raise ModelDownloadError(f"{asked} is incomplete: {_some(missing)} is missing; {_why_offline()}")
        return snapshot / names[0] if names[0].endswith(".gguf") else snapshot

    def _snapshot(self, asked: HubName, names: Sequence[str], progress: Progress | None) -> Path:
        """The directory with these files of the repository; `progress` None: from the local cache alone."""
        from huggingface_hub import snapshot_download

        call = partial(
            snapshot_download,
            asked.repository,
            revision=asked.revision,
            allow_patterns=[glob.escape(name) for name in names],
            local_files_only=progress is None,
            tqdm_class=None if progress is None else byte_bars(str(asked), progress),
            cache_dir=self._cache,
            endpoint=self._endpoint,
            token=self._token,
        )
        return Path(str(_translated(asked, call)))


def choose_files(asked: HubName, names: Sequence[str]) -> list[str]:
    """Which of a repository's files make the model that was asked for: GGUF parts in order, or a whole directory.

    Raises ModelNotFoundError, with what there is.
    """
    names = [name for name in names if ".." not in name and not name.startswith("/")]
    ggufs = sorted(name for name in names if name.endswith(".gguf") and not _is_projector(name))
    if asked.file is not None:
        return _one_model(asked, _named(asked.file, ggufs, names), ggufs)
    top = [name for name in names if "/" not in name]
    weights = [name for name in top if re.fullmatch(r"model.*\.safetensors", name)]
    weights = weights or [name for name in top if name.endswith(".safetensors")]
    if weights and "config.json" in top:
        return ["config.json", *weights, *(name for name in top if name.endswith((".json", ".jinja")))]
    if ggufs:
        return _one_model(asked, ggufs, ggufs)
    raise ModelNotFoundError(f"{asked} has neither safetensors nor GGUF files; it has: {_some(sorted(names))}")


def _is_projector(name: str) -> bool:
    return Path(name).name.startswith("mmproj")  # the vision part of a model whose text part we run


def _named(file: str, ggufs: Sequence[str], names: Sequence[str]) -> list[str]:
    """The files that `file` means: a path, all parts of it, or a quantization."""
    if file in names and file.endswith(".gguf"):
        stem = _PART_NUMBER.sub("", file)
        return [name for name in names if _PART_NUMBER.sub("", name) == stem] if stem != file else [file]
    whole_word = re.compile(rf"(?<![a-z0-9]){re.escape(file.lower())}(?![a-z0-9_])")
    exact = [name for name in ggufs if whole_word.search(name.lower())]
    return exact or [name for name in ggufs if file.lower() in name.lower()]


def _one_model(asked: HubName, matching: Sequence[str], ggufs: Sequence[str]) -> list[str]:
    if not matching:
        raise ModelNotFoundError(f"{asked.repository} has no GGUF file {asked.file!r}; it has: {_some(ggufs)}")
    if len({_PART_NUMBER.sub("", name) for name in matching}) > 1:
        raise ModelNotFoundError(
            f"{asked} has several GGUF files; name one as {asked.repository}:FILE; it has: {_some(matching)}"
        )
    return sorted(matching)  # a split model is opened by its first part


def _some(names: Sequence[str]) -> str:
    return (", ".join(names[:12]) + (", ..." if len(names) > 12 else ""))[:600] if names else "none"


def _why_offline() -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set: unset it to download"
    return "the hub cannot be reached: check the network"


def _translated(asked: HubName, call: Callable[[], T]) -> T:
    """Run a call of huggingface-hub and turn its failures into ours."""
    from huggingface_hub import errors

    try:
        return call()
    except errors.GatedRepoError as error:
        raise ModelDownloadError(
            f"{asked.repository} needs its owner's consent: ask for it on the hub, then set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{asked.repository} has no revision {asked.revision!r}") from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelDownloadError(_download_failure(asked, error)) from error
    except (errors.RepositoryNotFoundError, errors.EntryNotFoundError) as error:
        raise ModelNotFoundError(
            f"no model '{asked}': no such path here, and the hub has none of that name "
            "(a private one needs a token: set HF_TOKEN)"
        ) from error
    except Exception as error:  # the client's transport errors differ from version to version
        raise ModelDownloadError(_download_failure(asked, error)) from error


def _download_failure(asked: HubName, error: Exception) -> str:
    from huggingface_hub import errors

    status = _http_status(error)
    if status is not None:
        remedy = "check HF_TOKEN" if status in (401, 403) else "try again later"
        return f"the hub could not deliver {asked} (HTTP status {status}); {remedy}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"{asked} is not in the local cache; {_why_offline()}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot store {asked}: {error.strerror}; set HF_HOME to another place or make room"
    return f"downloading {asked} from the hub failed ({type(error).__name__}); run it again"


def _http_status(error: BaseException | None) -> int | None:
    """The status of the HTTP response behind an error, if there was one."""
    for _ in range(8):
        if error is None:
            return None
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None
