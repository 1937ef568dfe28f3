"""A model file mapped read-only, and how its faults are told."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from setpoint.errors import ModelFileError, ModelNotFoundError


class MappedFile:
    """`map` and `bytes` are the same memory. Raises ModelNotFoundError or ModelFileError.

    The file must not be truncated while it is served: touching a mapped page past its end kills the process.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        try:
            if not path.is_file():
                raise ModelNotFoundError(f"{path.name}: no such file")
            with path.open("rb") as stream:
                self.modified_ns = os.fstat(stream.fileno()).st_mtime_ns
                self.map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            self.fail("the file is empty")
        except OSError as error:
            self.fail(f"cannot be read: {error.strerror}")
        self.bytes: NDArray[np.uint8] = np.frombuffer(self.map, np.uint8)
        self.size = len(self.map)

    def fail(self, message: str) -> NoReturn:
        raise ModelFileError(f"{self.name}: {message}")

    def read_ahead(self) -> None:
        """Ask the system to bring the file into memory; returns when it has been asked."""
        with contextlib.suppress(OSError), self.path.open("rb") as file:  # only advice
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        self.bytes = np.empty(0, np.uint8)
        with contextlib.suppress(BufferError):  # tensors are still in use: the map goes with the last of them
            self.map.close()


def quote(name: str) -> str:
    """A name from a file for a message: short, control characters escaped."""
    return repr(name if len(name) <= 80 else name[:77] + "...")
