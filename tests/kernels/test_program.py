"""The lowered program against a numpy forward pass, and against itself under every way of running it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from program_oracle import logits as oracle_logits

from setpoint import _native
from setpoint.engine.plan import EntryResult, LogitsRow, PlanEntry, RowSampling, StepPlan
from setpoint.errors import ConfigError, EngineError, ModelFileError
from setpoint.models.spec import (
    Attention,
    Block,
    Embedding,
    GatedMLP,
    Head,
    Model,
    Repeat,
    RMSNorm,
    Rope,
    SandwichBlock,
    UnitOffsetRMSNorm,
)
from setpoint.quant.formats import dequantize, quantize
from setpoint.runtime.cpu.runner import CpuRunner

VOCAB, HIDDEN, INNER = 96, 64, 96
FLOATS = NDArray[np.float32]


@dataclass(frozen=True)
class StoredTensor:
    name: str
    shape: tuple[int, ...]
    format: str
    raw: NDArray[np.uint8]


class MemoryCheckpoint:
    """Random float32 weights, stored in `format` where they are matrices."""

    def __init__(self, model: Model, format: str = "F32", seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.values: dict[str, FLOATS] = {}  # as a program reads them, after rounding to the format
        self.stored: dict[str, StoredTensor] = {}
        for name, shape in shapes_of(model):
            value = rng.standard_normal(shape) * (0.3 if len(shape) == 1 else 1.5 / np.sqrt(shape[-1]))
            self.put(name, value.astype(np.float32) + np.float32(len(shape) == 1), format if len(shape) == 2 else "F32")

    def put(self, name: str, value: FLOATS, format: str = "F32") -> None:
        raw = quantize(format, np.atleast_2d(value))
        self.stored[name] = StoredTensor(name, value.shape, format, raw)
        self.values[name] = dequantize(format, raw).reshape(value.shape)

    def tensor(self, name: str) -> StoredTensor:
        if name not in self.stored:
            raise ModelFileError(f"no tensor '{name}'")
        return self.stored[name]


def shapes_of(model: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{model.embedding.name}.weight", (model.vocab_size, model.hidden)
    yield f"{model.norm.name}.weight", (model.hidden,)
    if model.head.tied is None:
        yield f"{model.head.name}.weight", (model.vocab_size, model.hidden)
    for index, layer in enumerate(model.layers.layers):
        prefix = f"{model.layers.name}.{index}"
        attention, mlp = layer.attention, layer.mlp
        norms = [layer.attention_norm, layer.mlp_norm]
        if isinstance(layer, SandwichBlock):
            norms += [layer.post_attention_norm, layer.post_mlp_norm]
        yield from ((f"{prefix}.{norm.name}.weight", (model.hidden,)) for norm in norms)
        yield from ((f"{prefix}.{norm.name}.weight", (attention.head_dim,)) for norm in attention.qk_norm or ())
        q, kv = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        matrices = {"q_proj": (q, model.hidden), "k_proj": (kv, model.hidden), "v_proj": (kv, model.hidden)}
        matrices["o_proj"] = (model.hidden, q)
        for name, shape in matrices.items():
            yield f"{prefix}.{attention.name}.{name}.weight", shape
            if name in attention.bias:
                yield f"{prefix}.{attention.name}.{name}.bias", shape[:1]
        for name, shape in (
            ("gate_proj", (mlp.intermediate, model.hidden)),
            ("up_proj", (mlp.intermediate, model.hidden)),
            ("down_proj", (model.hidden, mlp.intermediate)),
        ):
            yield f"{prefix}.{mlp.name}.{name}.weight", shape


ATTENTION = Attention("attn", heads=4, kv_heads=2, head_dim=16, rope=Rope(10000.0))


def model_of(*layers: Block, tied: bool = False, scale: float = 1.0) -> Model:
    return Model(
        HIDDEN,
        VOCAB,
        4096,
        Embedding("embed", scale),
        Repeat("layers", layers),
        RMSNorm("norm", 1e-5),
        Head("head", tied="embed" if tied else None),
    )


def block(attention: Attention = ATTENTION, **mlp: Any) -> Block:
    return Block(RMSNorm("n1", 1e-5), attention, RMSNorm("n2", 1e-5), GatedMLP("mlp", INNER, "silu", **mlp))


def gemma_block(window: int | None) -> SandwichBlock:
    norms = [UnitOffsetRMSNorm(f"n{i}", 1e-6) for i in range(4)]
    qk_norm = (UnitOffsetRMSNorm("attn.qn", 1e-6), UnitOffsetRMSNorm("attn.kn", 1e-6))
    rope = Rope(1e6 if window is None else 1e4)
    attention = Attention("attn", 3, 1, 32, rope, window=window, scale=0.2, qk_norm=qk_norm)
    return SandwichBlock(norms[0], attention, norms[1], GatedMLP("mlp", INNER, "gelu_tanh"), norms[2], norms[3])


MODELS = {
    "grouped": model_of(block(), block()),
    "one head each": model_of(block(replace(ATTENTION, kv_heads=4)), tied=True),
    "no rope": model_of(block(), block(replace(ATTENTION, rope=None))),
    "partial rope": model_of(block(replace(ATTENTION, rope=Rope(100.0, dim=8)))),
    "biases": model_of(block(replace(ATTENTION, bias=("q_proj", "k_proj", "v_proj", "o_proj")))),
    "qk norm": model_of(block(replace(ATTENTION, qk_norm=(RMSNorm("attn.qn", 1e-5), RMSNorm("attn.kn", 1e-5))))),
    "window": model_of(block(replace(ATTENTION, window=20)), block()),
    "gemma": model_of(gemma_block(24), gemma_block(24), gemma_block(None), tied=True, scale=8.0),
}


def open_runner(model: Model, checkpoint: MemoryCheckpoint, **options: Any) -> CpuRunner:
    defaults: dict[str, Any] = {
        "dtype": "auto",
        "kv_dtype": "f32",
        "num_threads": 2,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 256,
        "kv_cache_memory_bytes": 8 << 20,
    }
    return CpuRunner(model, checkpoint, **(defaults | options))  # type: ignore[arg-type]


def tokens_of(length: int, seed: int = 1) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCAB, length)]


def tables(runner: CpuRunner, length: int, sequence: int = 0) -> tuple[list[int], ...]:
    """Blocks of a sequence, scattered: no two logical neighbours are neighbours in memory."""
    count = -(-length // runner.info.block_size)
    found = []
    for group in runner.info.kv_groups:
        order = np.random.default_rng(7).permutation(group.num_blocks)
        found.append([int(block) for block in order[sequence * count : (sequence + 1) * count]])
        assert len(found[-1]) == count
    return tuple(found)


def chunks_of(length: int, sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    begin, index = 0, 0
    while begin < length:
        size = min(sizes[min(index, len(sizes) - 1)], length - begin)
        yield begin, begin + size
        begin, index = begin + size, index + 1


def run(runner: CpuRunner, tokens: list[int], sizes: Sequence[int], first_wanted: int = 0) -> FLOATS:
    """Logits from `first_wanted` on, computed in chunks of the given sizes (the last one repeats)."""
    blocks, rows = tables(runner, len(tokens)), []
    for begin, end in chunks_of(len(tokens), sizes):
        wanted = [LogitsRow(i - begin, target=0) for i in range(begin, end) if i >= first_wanted]
        rows.append(runner.logits(StepPlan([PlanEntry(0, tokens[begin:end], begin, blocks, wanted)])))
    return np.concatenate(rows)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sizes", [[64], [1], [30, 1], [7]], ids=str)
def test_agrees_with_numpy(name: str, sizes: list[int]) -> None:
    model = MODELS[name]
    checkpoint = MemoryCheckpoint(model)
    tokens = tokens_of(50)
    reference = oracle_logits(model, checkpoint.values, tokens)
    ours = run(open_runner(model, checkpoint), tokens, sizes)
    assert np.abs(ours - reference).max() <= 2e-5 * np.abs(reference).max()


@pytest.mark.parametrize("format", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_formats(format: str) -> None:
    """Quantized weights meet 8-bit activations in the fast program; in the f32 program nothing is rounded."""
    model = MODELS["grouped"]
    checkpoint = MemoryCheckpoint(model, format)
    tokens = tokens_of(40)
    quantized = {name for name, tensor in checkpoint.stored.items() if tensor.format.startswith("Q")}
    reference = oracle_logits(model, checkpoint.values, tokens, quantized)
    # A float rounded the other way changes a code: an error of 1/127 in one input.
    assert distance(run(open_runner(model, checkpoint), tokens, [40]), reference) <= (3e-3 if quantized else 1e-5)
    reference = oracle_logits(model, checkpoint.values, tokens)
    assert distance(run(open_runner(model, checkpoint, dtype="f32"), tokens, [40]), reference) <= 1e-5


def test_formats_may_be_mixed() -> None:
    """Float and quantized readers of one source: the quantized copy is made for those that want it."""
    model = MODELS["grouped"]
    checkpoint = MemoryCheckpoint(model, "Q8_0")
    for name in ("layers.0.attn.k_proj.weight", "layers.1.mlp.up_proj.weight", "layers.1.mlp.down_proj.weight"):
        checkpoint.put(name, checkpoint.values[name])
    quantized = {name for name, tensor in checkpoint.stored.items() if tensor.format == "Q8_0"}
    tokens = tokens_of(40)
    reference = oracle_logits(model, checkpoint.values, tokens, quantized)
    assert distance(run(open_runner(model, checkpoint), tokens, [40]), reference) <= 3e-3


@pytest.mark.parametrize("kv_dtype", ["f16", "bf16"])
def test_compact_caches(kv_dtype: str) -> None:
    model = MODELS["gemma"]
    checkpoint = MemoryCheckpoint(model)
    tokens = tokens_of(40)
    reference = oracle_logits(model, checkpoint.values, tokens)
    ours = run(open_runner(model, checkpoint, kv_dtype=kv_dtype), tokens, [40])
    assert 0 < distance(ours, reference) <= 0.02


def distance(ours: FLOATS, reference: NDArray[np.float64]) -> float:
    """Root mean square, relative to the reference's: rounding noise in all logits, blind to one unlucky row."""
    return float(np.linalg.norm(ours - reference) / np.linalg.norm(reference))


def same_bits(left: FLOATS, right: FLOATS) -> bool:
    return left.shape == right.shape and np.array_equal(left.view(np.uint32), right.view(np.uint32))


@pytest.mark.parametrize("name", ["grouped", "gemma"])
@pytest.mark.parametrize("format", ["F32", "Q8_0", "Q4_0"])
def test_the_same_bits_however_it_runs(name: str, format: str) -> None:
    model = MODELS[name]
    checkpoint = MemoryCheckpoint(model, format)
    tokens = tokens_of(90)
    plain = run(open_runner(model, checkpoint, isa="ref", num_threads=1, kv_dtype="f16"), tokens, [90])
    for isa in _native.available_isas():
        for threads in (1, 2, 3):
            runner = open_runner(model, checkpoint, isa=isa, num_threads=threads, kv_dtype="f16")
            for sizes in ([90], [1], [17], [50, 1]):
                assert same_bits(run(runner, tokens, sizes), plain), (isa, threads, sizes)


def test_a_ragged_batch_gives_the_bits_of_each_alone() -> None:
    model = MODELS["gemma"]
    checkpoint = MemoryCheckpoint(model, "Q8_0")
    runner = open_runner(model, checkpoint, num_threads=3)
    sequences = [tokens_of(length, seed=length) for length in (1, 60, 17, 33)]
    alone = [run(runner, tokens, [len(tokens)]) for tokens in sequences]
    together = [
        PlanEntry(i, tokens, 0, tables(runner, 64, i), [LogitsRow(row, target=0) for row in range(len(tokens))])
        for i, tokens in enumerate(sequences)
    ]
    assert same_bits(runner.logits(StepPlan(together)), np.concatenate(alone))


def test_a_long_context_split_over_threads() -> None:
    """Past 512 tokens a lonely decode shares its attention splits out; one thread walks them itself."""
    model = model_of(block(), block(replace(ATTENTION, window=700)))
    checkpoint = MemoryCheckpoint(model)
    tokens = tokens_of(1300)
    options: dict[str, Any] = {"max_model_len": 1536, "max_num_batched_tokens": 1536, "kv_cache_memory_bytes": 32 << 20}
    reference = oracle_logits(model, checkpoint.values, tokens)[-6:]
    plain = run(open_runner(model, checkpoint, num_threads=1, **options), tokens, [1300], 1294)
    assert np.abs(plain - reference).max() <= 2e-5 * np.abs(reference).max()
    for threads in (2, 3, 5):
        runner = open_runner(model, checkpoint, num_threads=threads, **options)
        assert same_bits(run(runner, tokens, [1200, 95, 1], 1294), plain)


def test_executing_an_entry_twice_changes_nothing() -> None:
    model = MODELS["window"]
    runner = open_runner(model, MemoryCheckpoint(model))
    tokens, blocks = tokens_of(40), tables(runner, 40)
    first = PlanEntry(0, tokens[:30], 0, blocks, [LogitsRow(29, target=0)])
    last = PlanEntry(0, tokens[30:], 30, blocks, [LogitsRow(9, target=0)])
    once = [runner.logits(StepPlan([entry])) for entry in (first, last)]
    again = [runner.logits(StepPlan([entry])) for entry in (first, last)]
    assert all(map(same_bits, once, again))


def test_blocks_out_of_the_window_may_be_gone() -> None:
    model = model_of(block(replace(ATTENTION, window=20)))
    runner = open_runner(model, MemoryCheckpoint(model))
    tokens = tokens_of(80)
    plain = run(runner, tokens, [80], 79)
    (blocks,) = tables(runner, 80)
    first_visible = (79 - 20 + 1) // 16
    gone = [-1] * first_visible + blocks[first_visible:]
    entry = PlanEntry(0, tokens[79:], 79, (gone,), [LogitsRow(0, target=0)])
    assert same_bits(runner.logits(StepPlan([entry])), plain)


# ------------------------------------------------------------------------------------------------------- results
def greedy(offset: int, **more: Any) -> LogitsRow:
    return LogitsRow(offset, RowSampling(temperature=0.0, **more))


def test_rows_come_back_in_order_with_tokens_and_logprobs() -> None:
    model = MODELS["grouped"]
    checkpoint = MemoryCheckpoint(model)
    runner = open_runner(model, checkpoint)
    tokens = tokens_of(20)
    rows = [LogitsRow(3, target=5, num_logprobs=2), greedy(19), LogitsRow(19, RowSampling(temperature=0.0), None, 4)]
    entries = [
        PlanEntry(0, tokens, 0, tables(runner, 20, 0), rows),
        PlanEntry(1, tokens[:4], 0, tables(runner, 20, 1)),
        PlanEntry(2, tokens[:10], 0, tables(runner, 20, 2), [greedy(9)]),
    ]
    scored, nothing, short = runner.execute(StepPlan(entries)).entries
    reference = oracle_logits(model, checkpoint.values, tokens)
    logprobs = reference - np.log(np.exp(reference).sum(-1, keepdims=True))
    assert scored.error is None
    target, plain, detailed = scored.rows
    assert target.token_id == 5
    assert target.logprob == pytest.approx(logprobs[3, 5], abs=1e-4)
    assert target.rank == 1 + int((reference[3] > reference[3, 5]).sum())
    assert list(target.top_ids) == np.argsort(-reference[3])[:2].tolist()
    best = int(reference[19].argmax())
    assert (plain.token_id, plain.logprob, detailed.token_id, detailed.rank) == (best, None, best, 1)
    assert detailed.top_logprobs == pytest.approx(np.sort(logprobs[19])[::-1][:4].tolist(), abs=1e-4)
    assert nothing == EntryResult()
    assert short.rows[0].token_id == int(reference[9].argmax())


def test_sampling_lists_reach_their_own_row() -> None:
    model = MODELS["grouped"]
    runner = open_runner(model, MemoryCheckpoint(model))
    tokens = tokens_of(8)
    wanted = [
        greedy(7),
        greedy(7, allowed_ids=(11, 12)),
        greedy(7, bias_ids=(40,), bias_values=(1000.0,)),
        greedy(7, bias_ids=(41,), bias_values=(1000.0,), banned_ids=(41,)),
        greedy(7, penalty_ids=(0,), penalty_counts=(3,), frequency_penalty=2.0),
        greedy(7),
    ]
    entry = PlanEntry(0, tokens, 0, tables(runner, 8), wanted)
    found = [row.token_id for row in runner.execute(StepPlan([entry])).entries[0].rows]
    assert found[1] in (11, 12)
    assert found[2] == 40
    assert found[3] == found[0] == found[5] != 41


def test_many_rows_pass_through_the_head_in_chunks() -> None:
    model = MODELS["grouped"]
    checkpoint = MemoryCheckpoint(model, "Q8_0")
    runner = open_runner(model, checkpoint, num_threads=3)
    tokens = tokens_of(200)
    entry = PlanEntry(0, tokens, 0, tables(runner, 200), [greedy(row) for row in range(200)])
    expected = runner.logits(StepPlan([entry])).argmax(-1).tolist()
    assert [row.token_id for row in runner.execute(StepPlan([entry])).entries[0].rows] == expected


def test_non_finite_logits_fail_their_entry_alone() -> None:
    model = MODELS["grouped"]
    checkpoint = MemoryCheckpoint(model)
    embedding = checkpoint.values["embed.weight"].copy()
    embedding[50] = np.nan
    checkpoint.put("embed.weight", embedding)
    runner = open_runner(model, checkpoint)
    entries = [PlanEntry(i, [token], 0, tables(runner, 1, i), [greedy(0)]) for i, token in enumerate((3, 50, 4))]
    before, poisoned, after = runner.execute(StepPlan(entries)).entries
    assert isinstance(poisoned.error, EngineError)
    assert before.error is None
    assert after.error is None
    alone = runner.execute(StepPlan([entries[2]])).entries[0]
    assert alone.rows == after.rows


# ---------------------------------------------------------------------------------------------------- bad inputs
def malformed(good: PlanEntry) -> Mapping[str, PlanEntry]:
    row = good.rows[0]
    assert row.sampling is not None
    return {
        "token": replace(good, token_ids=[1, VOCAB]),
        "negative token": replace(good, token_ids=[-1, 1]),
        "huge token": replace(good, token_ids=[1 << 40, 1]),
        "no token": replace(good, token_ids=[], rows=()),
        "start": replace(good, start=-1),
        "too long": replace(good, start=255),
        "huge start": replace(good, start=1 << 40),
        "block": replace(good, block_tables=([10**6],)),
        "missing block": replace(good, block_tables=([-1],)),
        "short table": replace(good, block_tables=([],)),
        "no table": replace(good, block_tables=()),
        "row": replace(good, rows=[LogitsRow(2, row.sampling)]),
        "negative row": replace(good, rows=[LogitsRow(-1, row.sampling)]),
        "target": replace(good, rows=[LogitsRow(0, target=VOCAB)]),
        "logprobs": replace(good, rows=[LogitsRow(0, target=1, num_logprobs=21)]),
        "bias id": replace(good, rows=[greedy(0, bias_ids=(VOCAB,), bias_values=(1.0,))]),
        "bias values": replace(good, rows=[greedy(0, bias_ids=(1, 2), bias_values=(1.0,))]),
        "allowed id": replace(good, rows=[greedy(0, allowed_ids=(-5,))]),
        "penalty id": replace(good, rows=[greedy(0, penalty_ids=(1 << 33,), penalty_counts=(1,))]),
        "temperature": replace(good, rows=[LogitsRow(0, RowSampling(temperature=float("nan")))]),
        "seed": replace(good, rows=[greedy(0, seed=1 << 70)]),
    }


GOOD = PlanEntry(0, [1, 2], 0, ([0],), [LogitsRow(1, RowSampling(temperature=0.0))])


@pytest.fixture(scope="module")
def small_runner() -> CpuRunner:
    model = MODELS["one head each"]
    return open_runner(model, MemoryCheckpoint(model), max_num_batched_tokens=64)


@pytest.mark.parametrize("case", malformed(GOOD))
def test_a_malformed_entry_fails_alone(small_runner: CpuRunner, case: str) -> None:
    neighbour = replace(GOOD, seq_id=1, block_tables=([1],))
    expected = small_runner.execute(StepPlan([neighbour])).entries[0]
    bad = malformed(GOOD)[case]
    first, second = small_runner.execute(StepPlan([bad, neighbour])).entries
    assert isinstance(first.error, EngineError)
    assert second == expected


def test_too_much_for_one_step_is_an_engine_error(small_runner: CpuRunner) -> None:
    many = replace(GOOD, token_ids=[1] * 40, block_tables=([0, 1, 2],))
    with pytest.raises(EngineError, match="64 tokens"):
        small_runner.execute(StepPlan([many, replace(many, block_tables=([3, 4, 5],))]))
    with pytest.raises(EngineError):
        small_runner.execute(StepPlan([replace(GOOD, block_tables=([i],)) for i in range(9)]))
    assert small_runner.execute(StepPlan([])).entries == ()


def test_a_wrong_tensor_is_named() -> None:
    model = MODELS["biases"]
    checkpoint = MemoryCheckpoint(model)
    checkpoint.put("layers.0.attn.k_proj.bias", np.zeros(3, np.float32))
    with pytest.raises(ModelFileError, match=r"layers\.0\.attn\.k_proj\.bias"):
        open_runner(model, checkpoint)
    del checkpoint.stored["layers.0.attn.k_proj.bias"]
    with pytest.raises(ModelFileError, match=r"layers\.0\.attn\.k_proj\.bias"):
        open_runner(model, checkpoint)
    checkpoint = MemoryCheckpoint(model)
    stored = checkpoint.stored["layers.0.mlp.up_proj.weight"]
    checkpoint.stored["layers.0.mlp.up_proj.weight"] = replace(stored, raw=stored.raw[:, :-4])
    with pytest.raises(ModelFileError, match=r"layers\.0\.mlp\.up_proj\.weight"):
        open_runner(model, checkpoint)


@pytest.mark.parametrize(
    "options",
    [{"isa": "sse9"}, {"num_threads": 0}, {"max_num_batched_tokens": 0}, {"kv_cache_memory_bytes": 1000}],
    ids=str,
)
def test_options_that_cannot_work(options: dict[str, Any]) -> None:
    model = MODELS["grouped"]
    with pytest.raises(ConfigError):
        open_runner(model, MemoryCheckpoint(model), **options)


def test_the_program_holds_its_weights() -> None:
    model = MODELS["grouped"]
    checkpoint = MemoryCheckpoint(model, "Q8_0")
    runner = open_runner(model, checkpoint)
    tokens = tokens_of(10)
    before = run(runner, tokens, [10])
    outputs = runner.program.outputs
    del checkpoint
    for _ in range(20):  # would reuse freed memory
        open_runner(model, MemoryCheckpoint(model, "Q8_0", seed=9)).close()
    assert same_bits(run(runner, tokens, [10]), before)
    runner.close()
    assert outputs.sum() >= 0  # still readable
