"""The table: what is measured, on which file, and what we promised."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Row:
    """`goal` is the least ratio to llama.cpp, `goal_share` the least share of what the machine can do."""

    model: str
    phase: Phase
    batch: int
    prompt_tokens: int
    steps: int = 0  # decode: greedy tokens of each sequence that are timed
    goal: float | None = None
    goal_share: float | None = None
    other_rivals: bool = False  # also OpenVINO and vLLM, which read this model only
    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.model} {self.label or (self.phase if self.phase == 'prefill' else f'decode b{self.batch}')}"

    @property
    def resources(self) -> tuple[str, ...]:
        """Which probes must hold still around a sample: what the row is limited by."""
        if self.phase == "prefill":
            return ("vnni_gops",)
        return ("dram_gb_s",) if self.batch == 1 else ("vnni_gops", "dram_gb_s")


Q4_0, Q4_1, GEMMA = "smollm2-135m-q4_0", "smollm2-135m-q4_1", "gemma3-270m-q4_k_m"
HALF, ONE_AND_A_HALF = "random-0.5b", "random-1.5b"

TABLE = (
    Row(Q4_0, "prefill", 1, 512, goal=2.0, goal_share=0.65, other_rivals=True),
    Row(Q4_0, "decode", 1, 512, 64, goal=1.15, goal_share=0.85, other_rivals=True),
    Row(Q4_0, "decode", 8, 256, 48, goal=2.0, other_rivals=True),
    Row(Q4_0, "decode", 32, 256, 24, goal=2.5, other_rivals=True),
    Row(Q4_0, "decode", 1, 7900, 64, goal=1.5, label="decode b1 at 8k"),
    Row(Q4_1, "prefill", 1, 512, goal=5.0),
    Row(Q4_1, "decode", 1, 512, 64, goal=1.6),
    Row(Q4_1, "decode", 32, 256, 24, goal=4.0),
    Row(GEMMA, "prefill", 1, 512, goal=1.8),
    Row(GEMMA, "decode", 1, 512, 64, goal=1.3),
    Row(HALF, "prefill", 1, 512, goal=1.5),
    Row(HALF, "decode", 1, 512, 48, goal=1.1),
    Row(HALF, "decode", 16, 256, 24, goal=2.0),
    Row(ONE_AND_A_HALF, "prefill", 1, 512, goal=1.5),
    Row(ONE_AND_A_HALF, "decode", 1, 512, 24, goal=1.1),
    Row(ONE_AND_A_HALF, "decode", 16, 256, 12, goal=2.0),
)
SWEEP = (
    *(Row(Q4_0, "decode", batch, 256, 32, other_rivals=True) for batch in (1, 2, 4, 8, 16, 32)),
    *(
        Row(Q4_0, "decode", 1, context, 48, label=f"decode b1 at {context}")
        for context in (512, 1024, 2048, 4096, 7900)
    ),
)


class Named(Protocol):
    @property
    def name(self) -> str: ...


R = TypeVar("R", bound=Named)


def select(rows: Iterable[R], pattern: str | None) -> list[R]:
    """Rows whose name contains the pattern, or matches it as a shell pattern; several are separated by commas."""
    if pattern is None:
        return list(rows)
    patterns = [part.strip() for part in pattern.split(",")]
    return [row for row in rows if any(fnmatch.fnmatch(row.name, f"*{part}*") for part in patterns)]
