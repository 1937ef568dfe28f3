"""A web server on the loopback interface for the tests of downloads: scripted answers, every request written down."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "c0ffee" + "0" * 34


@dataclass(frozen=True)
class Asked:
    """A request: `path` without its query, percent-decoded."""

    method: str
    path: str
    headers: dict[str, str]

    @property
    def start(self) -> int:
        """The first byte that is wanted."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("range", ""))
        return int(match[1]) if match else 0


@dataclass(frozen=True)
class Answer:
    """`cut_after`: the connection breaks after so many bytes of the body. `length` None: none is announced."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    announced: bool = True


@dataclass
class Loopback:
    url: str
    answer: Callable[[Asked], Answer]
    asked: list[Asked] = field(default_factory=list)

    def ranges(self, path: str) -> list[int]:
        return [request.start for request in self.asked if request.path == path and request.method == "GET"]


@contextmanager
def serving(answer: Callable[[Asked], Answer]) -> Iterator[Loopback]:
    """A server that answers with `answer` (which the test may replace) until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = Asked(
                self.command,
                unquote(self.path.partition("?")[0]),
                {name.lower(): value for name, value in self.headers.items()},
            )
            loopback.asked.append(asked)
            given = loopback.answer(asked)
            self.send_response(given.status)
            if given.announced:
                self.send_header("Content-Length", str(len(given.body)))
            for name, value in given.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(given.body if given.cut_after is None else given.body[: given.cut_after])

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    loopback = Loopback(f"http://127.0.0.1:{server.server_port}", answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield loopback
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def closed_port_url() -> str:
    """Where nobody listens."""
    with serving(lambda asked: Answer()) as gone:
        return gone.url


def file_answer(asked: Asked, content: bytes, *, cut_after: int | None = None, ranges: bool = True) -> Answer:
    """`content` as a web server sends it, from the byte that was asked for."""
    start = asked.start if ranges else 0
    if not start:
        return Answer(body=content, cut_after=cut_after)
    if start >= len(content):
        return Answer(416)
    headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
    return Answer(206, content[start:], headers, cut_after)


@dataclass
class Hub:
    """Repositories by name, each {file: content}, answered as the Hugging Face hub does.

    Files whose name is in `stored_elsewhere` are redirected to `elsewhere`, another host, by a signed address.
    """

    repositories: dict[str, dict[str, bytes]]
    private: dict[str, str] = field(default_factory=dict)  # repository -> token
    stored_elsewhere: str | None = None
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})

    def __call__(self, asked: Asked) -> Answer:
        if asked.path == "/":
            return Answer(body=b"the hub")
        match = re.fullmatch(
            r"/api/models/(?P<api>[^/]+/[^/]+)(?:/(?:revision|tree)/(?P<api_revision>[^/]+))?"
            r"|/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)",
            asked.path,
        )
        if match is None:
            return self._error(404, "EntryNotFound", asked)
        name = match["api"] or match["name"]
        if name not in self.repositories or not self._may_read(name, asked):
            return self._error(401, "RepoNotFound", asked)
        revision = match["api_revision"] or match["revision"] or "main"
        commit = revision if revision in self.revisions.values() else self.revisions.get(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound", asked)
        if match["file"] is not None:
            return self._file(asked, name, match["file"], commit)
        return self._listing(name, commit, tree="/tree/" in asked.path)

    def _may_read(self, name: str, asked: Asked) -> bool:
        return name not in self.private or asked.headers.get("authorization") == f"Bearer {self.private[name]}"

    def _error(self, status: int, code: str, asked: Asked) -> Answer:
        return Answer(status, headers={"X-Error-Code": code, "X-Error-Message": code})

    def _listing(self, name: str, commit: str, *, tree: bool) -> Answer:
        files = self.repositories[name]
        document: Any = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
        if tree:
            document = [
                {"type": "file", "path": file, "size": len(content), "oid": sha256(content).hexdigest()[:40]}
                for file, content in files.items()
            ]
        return Answer(body=json.dumps(document).encode(), headers={"Content-Type": "application/json"})

    def _file(self, asked: Asked, name: str, file: str, commit: str) -> Answer:
        content = self.repositories[name].get(file)
        if content is None:
            return self._error(404, "EntryNotFound", asked)
        etag = f'"{sha256(content).hexdigest()}"'
        headers = {"ETag": etag, "X-Repo-Commit": commit}
        if self.stored_elsewhere is not None:
            headers |= {
                "Location": f"{self.stored_elsewhere}/{name}/{file}",
                "X-Linked-Etag": etag,
                "X-Linked-Size": str(len(content)),
            }
            return Answer(302, headers=headers)
        given = file_answer(asked, content)
        return Answer(given.status, given.body, given.headers | headers)
