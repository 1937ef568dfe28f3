"""A step's plan as the arrays of `_native.Program.step`. Record layouts are those of csrc/program (batch.h, head.h)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from setpoint import _native
from setpoint.engine.plan import LogitsRow, PlanEntry, RowSampling

LOGPROBS = 20
ROW_RECORD = np.dtype(
    [("seed", "u8"), ("position", "i8")]
    + [(name, "f4") for name in ("temperature", "top_p", "min_p", "repetition", "frequency", "presence")]
    + [(name, "i4") for name in ("token", "top_k", "target", "num_logprobs")]
    + [(f"{name}_{end}", "i4") for name in ("penalty", "bias", "banned", "allowed", "mask") for end in ("begin", "end")]
)
ROW_OUTPUT = np.dtype(
    [
        ("token", "i4"),
        ("logprob", "f4"),
        ("rank", "i4"),
        ("finite", "i4"),
        ("num_top", "i4"),
        ("top_ids", "i4", (LOGPROBS,)),
        ("top_logprobs", "f4", (LOGPROBS,)),
    ]
)
if (ROW_RECORD.itemsize, ROW_OUTPUT.itemsize) != (_native.ROW_RECORD_BYTES, _native.ROW_OUTPUT_BYTES):
    raise ImportError("setpoint._native was built from other sources; rebuild it")

GREEDY = RowSampling(temperature=0.0)
_PACK_ROW = struct.Struct("=Qq6f14i").pack  # ROW_RECORD, several times as fast as numpy makes one from a tuple
_NO_MASKS = np.empty(0, np.uint32)
_NO_RECORDS, _NO_IDS, _NO_VALUES = np.empty(0, np.uint8), np.empty(0, np.int32), np.empty(0, np.float32)


class StepArrays:
    """Buffers that live as long as the runner. `load` raises ValueError, TypeError or OverflowError on odd values."""

    def __init__(
        self, num_groups: int, max_entries: int, max_model_len: int, block_size: int, mask_bytes: int = 0
    ) -> None:
        self._block_size = block_size
        self._mask_bytes = mask_bytes
        width = -(-max_model_len // block_size)
        self._tables = [np.zeros((max_entries, width), np.int32) for _ in range(num_groups)]
        self.num_rows = 0
        self.arguments: tuple[Any, ...] = ()  # of Program.step
        self.mask_places: list[
            tuple[int, RowSampling]
        ] = []  # bytes of `mask_buffer` where late masks belong, and whose
        self.mask_buffer = memoryview(b"")

    def load(self, entries: Sequence[PlanEntry], logits: NDArray[np.float32] | None = None) -> None:
        """`logits` [rows, vocab] receives the raw logits."""
        tokens: list[int] = []
        starts = [0]
        rows = _Rows(self._mask_bytes)
        if len(entries) > len(self._tables[0]):
            raise ValueError("more entries than max_num_seqs")
        for index, entry in enumerate(entries):
            is_late = entry.late_masks is not None and not entry.late_masks.is_done
            for row in entry.rows:
                if not 0 <= row.offset < len(entry.token_ids):
                    raise ValueError(f"entry {index}: row offset {row.offset} outside its tokens")
                rows.append(starts[-1] + row.offset, row, is_late)
            tokens += entry.token_ids
            starts.append(len(tokens))
            self._load_tables(index, entry)
        self.num_rows = len(rows.records)
        masks = rows.mask_bytes()
        self.mask_places, self.mask_buffer = rows.late_masks, memoryview(masks)
        self.arguments = (
            np.array(tokens, np.int32),
            np.array(starts, np.int32),
            np.array([entry.start for entry in entries], np.int32),
            self._tables,
            *rows.arrays(),
            np.frombuffer(masks, np.uint32) if masks else _NO_MASKS,
            logits,
        )

    def _load_tables(self, index: int, entry: PlanEntry) -> None:
        needed = -(-(entry.start + len(entry.token_ids)) // self._block_size)
        for table, blocks in zip(self._tables, entry.block_tables, strict=True):
            if len(blocks) < needed:
                raise ValueError(f"entry {index}: its block table is too short")
            table[index, :needed] = blocks if len(blocks) == needed else blocks[:needed]


class _Rows:
    """Row records and the flat lists that they index."""

    def __init__(self, mask_bytes: int) -> None:
        self._all_allowed = b"\xff" * mask_bytes
        self.records: list[bytes] = []
        self.penalty_ids: list[int] = []
        self.penalty_counts: list[int] = []
        self.bias_ids: list[int] = []
        self.bias_values: list[float] = []
        self.banned: list[int] = []
        self.allowed: list[int] = []
        self.masks: list[bytes] = []
        self.mask_words = 0
        self.late_masks: list[tuple[int, RowSampling]] = []

    def append(self, token: int, row: LogitsRow, is_late: bool) -> None:
        sampling = row.sampling or GREEDY
        begins = len(self.penalty_ids), len(self.bias_ids), len(self.banned), len(self.allowed)
        self.penalty_ids += sampling.penalty_ids
        self.penalty_counts += sampling.penalty_counts
        self.bias_ids += sampling.bias_ids
        self.bias_values += sampling.bias_values
        self.banned += sampling.banned_ids
        if sampling.allowed_ids is not None:
            self.allowed += sampling.allowed_ids
        mask_begin = self.mask_words
        mask = sampling.mask
        if is_late and row.sampling is not None:
            mask = self._all_allowed
            self.late_masks.append((4 * mask_begin, row.sampling))
        if mask is not None:
            self.masks.append(mask)
            self.mask_words += len(mask) // 4
        try:
            record = _PACK_ROW(
                sampling.seed,
                sampling.position,
                sampling.temperature,
                sampling.top_p,
                sampling.min_p,
                sampling.repetition_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
                token,
                sampling.top_k,
                -1 if row.target is None else row.target,
                -1 if row.num_logprobs is None else row.num_logprobs,
                begins[0],
                len(self.penalty_ids),
                begins[1],
                len(self.bias_ids),
                begins[2],
                len(self.banned),
                begins[3],
                -1 if sampling.allowed_ids is None else len(self.allowed),
                mask_begin,
                -1 if mask is None else self.mask_words,
            )
        except struct.error as error:
            raise ValueError(f"a number of a row is out of range: {error}") from None
        self.records.append(record)

    def arrays(self) -> tuple[NDArray[Any], ...]:
        records = np.frombuffer(b"".join(self.records), np.uint8) if self.records else _NO_RECORDS
        return (
            records.reshape(len(self.records), ROW_RECORD.itemsize),
            _ids(self.penalty_ids),
            _ids(self.penalty_counts),
            _ids(self.bias_ids),
            np.array(self.bias_values, np.float32) if self.bias_values else _NO_VALUES,
            _ids(self.banned),
            _ids(self.allowed),
        )

    def mask_bytes(self) -> bytes | bytearray:
        """Not to be changed but where masks come late."""
        joined = b"".join(self.masks)
        return bytearray(joined) if self.late_masks else joined


def _ids(values: list[int]) -> NDArray[np.int32]:
    return np.array(values, np.int32) if values else _NO_IDS
