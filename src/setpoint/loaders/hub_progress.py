"""The hub library's progress bars as calls of our `Progress`."""

from __future__ import annotations

from typing import Any

from setpoint.loaders.download import Progress


def byte_bars(label: str, progress: Progress) -> type[Any]:
    """A class of silent bars for huggingface-hub's `tqdm_class`, which tell `progress` of the bytes of all files.

    The library counts bytes in two bars (received, and put together from deduplicated chunks): the higher one counts.
    """
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    bars: list[Any] = []

    class ByteBar(tqdm):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **(settings | {"disable": True}))  # type: ignore[no-untyped-call]
            if settings.get("unit") == "B":
                bars.append(self)

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self in bars:
                done, total = (max(int(getattr(bar, name) or 0) for bar in bars) for name in ("n", "total"))
                progress(label, min(done, total), total)

    return ByteBar
