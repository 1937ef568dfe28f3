"""What a model name of the hub may look like: `org/name[:file or quantization][@revision]`.

Everything else is refused here, before any path is built or any request is sent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_SEGMENT = r"[A-Za-z0-9_][\w.+=, -]{0,127}"  # of a file's path inside the repository: no hidden files, no '..'
_PATTERN = re.compile(
    rf"(?P<repository>{_PART}/{_PART})"
    rf"(?::(?P<file>{_SEGMENT}(?:/{_SEGMENT}){{0,7}}))?"
    rf"(?:@(?P<revision>[A-Za-z0-9][\w./-]{{0,127}}))?",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class HubName:
    """A model of the hub. `file` is a file's path in the repository or a quantization such as Q4_K_M."""

    repository: str
    file: str | None = None
    revision: str | None = None  # branch, tag or commit; None is the main branch

    def __str__(self) -> str:
        file = "" if self.file is None else f":{self.file}"
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repository}{file}{revision}"


def parse_hub_name(text: str) -> HubName | None:
    """The parts of a hub name; None when `text` is not one.

    `org/name.gguf` is not one either: it is far likelier a path with a typing error.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        return None
    repository, file, revision = match["repository"], match["file"], match["revision"]
    if "--" in repository or ".." in repository or repository.endswith((".", "-", ".git")):
        return None  # the hub allows none of these
    if file is None and repository.lower().endswith(".gguf"):
        return None
    if revision is not None and (".." in revision or "//" in revision or revision.endswith(("/", "."))):
        return None
    return HubName(repository, file, revision)
