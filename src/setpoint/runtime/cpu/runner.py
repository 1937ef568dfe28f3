"""The CPU backend: plans in, results out, one native call a step."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from setpoint import _native
from setpoint.engine.plan import (
    EntryResult,
    LogitsRow,
    PlanEntry,
    RowResult,
    RunnerInfo,
    StepPlan,
    StepResult,
)
from setpoint.errors import ConfigError, EngineError
from setpoint.loaders.checkpoint import Checkpoint
from setpoint.models.spec import Model
from setpoint.runtime.cpu.arrays import ROW_OUTPUT, StepArrays
from setpoint.runtime.cpu.kv_layout import BLOCK_TOKENS, divide, group_shapes, kv_fingerprint
from setpoint.runtime.cpu.lower import ProgramOptions, lower
from setpoint.runtime.cpu.mask_thread import PATIENCE_S, MaskJob, MaskThread
from setpoint.runtime.cpu.weight_cache import WeightCache
from setpoint.runtime.cpu.weight_loading import WeightLoading

_BAD_INPUT = (ValueError, TypeError, OverflowError)
_NO_ROWS = EntryResult()


def _finish_loading(program: _native.Program, tokens: NDArray[np.int32], is_cached: bool) -> int:
    """Bytes of the head's shortlist: 0 for none."""
    program.commit_kv()
    return program.take_up_shortlist() if is_cached else program.shorten_head(tokens)


def fingerprint(model: Model, checkpoint: Checkpoint, dtype: str, kv_dtype: str) -> str:
    """Of everything that the bytes of a KV block depend on besides its tokens."""
    return kv_fingerprint(model, checkpoint.digest(), dtype, kv_dtype, _native.NUMERIC_VERSION)


class CpuRunner:
    """A model on the CPU; implements `engine.plan.Runner`. The weights come in after construction, in other threads."""

    def __init__(
        self,
        model: Model,
        checkpoint: Checkpoint,
        *,
        dtype: str = "auto",
        kv_dtype: str = "s16",
        num_threads: int = 1,
        isa: str = "auto",
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        kv_cache_memory_bytes: int,
        weight_cache: WeightCache | None = None,
    ) -> None:
        """Raises ConfigError, ModelFileError or UnsupportedModelError."""
        shapes = group_shapes(model, kv_dtype, max_model_len, max_num_batched_tokens)
        groups = divide(shapes, kv_cache_memory_bytes, max_num_seqs)
        options = ProgramOptions(dtype, kv_dtype, num_threads, isa, max_model_len, max_num_seqs, max_num_batched_tokens)
        lowered = lower(model, checkpoint, groups, options)
        self.program = lowered.program
        self.isa: str = lowered.program.isa
        leaves_a_cpu = num_threads < _native.num_cpus()
        self._info = RunnerInfo(model.vocab_size, max_model_len, groups, BLOCK_TOKENS, late_masks=leaves_a_cpu)
        self._mask_bytes = -(-model.vocab_size // 32) * 4
        self._mask_thread = MaskThread()
        self._identity = partial(fingerprint, model, checkpoint, dtype, kv_dtype)
        try:
            self._arrays = StepArrays(len(groups), max_num_seqs, max_model_len, BLOCK_TOKENS, self._mask_bytes)
        except MemoryError as error:
            raise ConfigError(
                "not enough memory for the block tables; lower --max-num-seqs or --max-model-len"
            ) from error
        self._outputs = self.program.outputs.view(ROW_OUTPUT).reshape(-1)
        self._tokens, self._finite = self._outputs["token"], self._outputs["finite"]
        self._weight_bytes, self._head_bytes = lowered.weight_bytes, lowered.head_bytes
        self.loading = WeightLoading(
            lowered.store,
            lowered.sources,
            checkpoint,
            weight_cache if dtype == "auto" else None,
            num_threads,
            partial(_finish_loading, lowered.program, lowered.sample_tokens),
        )
        self._is_loaded = False

    @property
    def weight_bytes(self) -> int:
        """Waits for the weights, as `step_bytes` does."""
        self.loading.wait()
        return self._weight_bytes + self.loading.derived_bytes

    @property
    def step_bytes(self) -> int:
        """What a step reads at the least, when its rows are greedy."""
        return self.weight_bytes - (self._head_bytes if self.loading.derived_bytes else 0)

    @property
    def info(self) -> RunnerInfo:
        return self._info

    def kv_fingerprint(self) -> str:
        """Of everything that the bytes of a KV block depend on besides its tokens."""
        return self._identity()

    def execute(self, plan: StepPlan) -> StepResult:
        """Entries that are malformed fail alone; raises EngineError when the step as a whole cannot run."""
        saved = self._move(plan) if plan.saves or plan.restores else ()
        if not plan.entries:
            return StepResult((), saved)
        try:
            self._run(plan.entries)
        except _BAD_INPUT as error:
            return StepResult(self._execute_sound(plan, error).entries, saved)
        return StepResult(self._results(plan.entries), saved)

    def _move(self, plan: StepPlan) -> list[bytes | None]:
        """Raises EngineError when a block cannot be written; one that cannot be read is not saved."""
        self._ensure_loaded()  # loading computes in the first blocks
        saved: list[bytes | None] = []
        for save in plan.saves:
            try:
                saved.append(self.program.read_kv(save.group, save.block))
            except MemoryError:
                saved.append(None)
        try:
            for restore in plan.restores:
                self.program.write_kv(restore.group, restore.block, restore.payload)
        except ValueError as error:
            raise EngineError(f"a KV block cannot be restored: {error}") from error
        return saved

    def logits(self, plan: StepPlan) -> NDArray[np.float32]:
        """Raw logits [rows, vocab] of the plan's rows. Raises ValueError on a malformed plan."""
        num_rows = sum(len(entry.rows) for entry in plan.entries)
        logits = np.empty((num_rows, self._info.vocab_size), np.float32)
        self._run(plan.entries, logits)
        return logits

    def wait_for_weights(self) -> None:
        """Until they are in memory; the first step waits by itself."""
        self.loading.wait()
        self._is_loaded = True

    def close(self) -> None:
        """Ends the threads and frees weights and cache."""
        self.loading.close()
        self._mask_thread.close()
        del self.program, self._outputs, self._tokens, self._finite

    def _ensure_loaded(self) -> None:
        if not self._is_loaded:
            self.wait_for_weights()

    def _run(self, entries: Sequence[PlanEntry], logits: NDArray[np.float32] | None = None) -> None:
        self._ensure_loaded()
        arrays = self._arrays
        arrays.load(entries, logits)
        if not arrays.mask_places:
            self.program.step(*arrays.arguments)
            return
        late = [entry.late_masks for entry in entries if entry.late_masks is not None]
        gate = _native.Gate(PATIENCE_S)
        self._mask_thread.begin(MaskJob(late, arrays.mask_places, arrays.mask_buffer, self._mask_bytes, gate))
        try:
            self.program.step(*(*arrays.arguments, gate))
        finally:
            self._mask_thread.end()

    def _execute_sound(self, plan: StepPlan, error: Exception) -> StepResult:
        """The slow way around malformed entries: each is checked alone, the sound ones run."""
        errors = [self._check(entry) for entry in plan.entries]
        sound = [entry for entry, found in zip(plan.entries, errors, strict=True) if found is None]
        if len(sound) == len(plan.entries):
            raise EngineError(f"the step cannot run: {error}") from error
        results = iter(self.execute(StepPlan(sound)).entries)
        return StepResult([next(results) if found is None else EntryResult(error=found) for found in errors])

    def _check(self, entry: PlanEntry) -> EngineError | None:
        try:
            self._arrays.load([entry])
            self.program.check(*self._arrays.arguments)
        except _BAD_INPUT as error:
            return EngineError(f"malformed plan entry: {error}")
        return None

    def _results(self, entries: Sequence[PlanEntry]) -> list[EntryResult]:
        num_rows = self._arrays.num_rows
        tokens, finite = self._tokens[:num_rows].tolist(), self._finite[:num_rows].tolist()
        results, begin = [], 0
        for entry in entries:
            end = begin + len(entry.rows)
            if begin == end:
                results.append(_NO_ROWS)
            elif not all(finite[begin:end]):
                results.append(EntryResult(error=EngineError("non-finite logits")))
            else:
                results.append(
                    EntryResult([self._row(begin + i, tokens[begin + i], row) for i, row in enumerate(entry.rows)])
                )
            begin = end
        return results

    def _row(self, index: int, token: int, row: LogitsRow) -> RowResult:
        if row.num_logprobs is None and row.target is None:
            return RowResult(token)
        output = self._outputs[index]
        num_top = min(row.num_logprobs or 0, int(output["num_top"]))
        return RowResult(
            token,
            float(output["logprob"]),
            int(output["rank"]),
            output["top_ids"][:num_top].tolist(),
            output["top_logprobs"][:num_top].tolist(),
        )
