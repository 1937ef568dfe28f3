"""The canary oracle: a well-behaved client that runs beside every attack."""

from __future__ import annotations

import re
import threading

from house import House, chat, completion, events, until

_CANARY = [
    ("/v1/chat/completions", chat("sing", temperature=0, max_tokens=24)),
    ("/v1/completions", completion("the bird", temperature=0, max_tokens=24)),
    ("/v1/chat/completions", chat("stream", temperature=0, max_tokens=24, stream=True)),
]
_LEAKS = (re.compile(r"0x[0-9a-f]{8,}"), re.compile(r"/(?:work|usr|home|root|tmp|opt)/\w"), re.compile(r"Traceback"))


def _sing(house: House) -> list[str]:
    """The canary's outputs: what the client would read, without ids and times."""
    songs = []
    for path, body in _CANARY:
        response = house.post(path, body)
        assert response.status_code == 200, response.text
        if body.get("stream"):
            chunks = [event for event in events(response.text) if event != "[DONE]"]
            songs.append("".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks))
        else:
            choice = response.json()["choices"][0]
            songs.append(choice["text"] if "text" in choice else choice["message"]["content"])
    return songs


def assert_clean(text: str) -> None:
    """No addresses, paths or tracebacks."""
    for leak in _LEAKS:
        assert leak.search(text) is None, leak.pattern


class Canary:
    """A well-behaved client. Its greedy outputs must be the same before, during and after an attack."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._quiet = _sing(house)
        self._stop = threading.Event()
        self._failures: list[object] = []
        self._thread = threading.Thread(target=self._keep_singing)
        self._thread.start()

    def _keep_singing(self) -> None:
        while not self._stop.is_set():
            try:
                song = _sing(self._house)
            except Exception as error:
                self._failures.append(error)
                return
            if song != self._quiet:
                self._failures.append(song)
            self._stop.wait(0.05)

    def finish(self) -> None:
        self._stop.set()
        self._thread.join()
        assert not self._failures, self._failures[:1]
        assert _sing(self._house) == self._quiet
        until(lambda: self._house.is_quiet, 5)
        assert_clean(self._house.log.getvalue())
        assert "\x1b" not in self._house.log.getvalue()
