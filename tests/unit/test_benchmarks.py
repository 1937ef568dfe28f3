"""The benchmark against the rivals: its arithmetic, its table, and the random models it measures."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isolation import kolmogorov_smirnov
from peers import scripts
from peers.markdown import BEGIN, END, performance, with_performance
from peers.rows import SWEEP, TABLE, Row, select
from peers.samples import Pair, Probe, Sample, chosen, compare, passes
from peers.work import ModelWork, Window, model_work
from random_models import SHAPES, Shape, fitting, head_format, uses_more_bits, write_random_model
from setpoint.assemble import load_model
from setpoint.loaders.checkpoint import open_checkpoint
from setpoint.quant.formats import dequantize

STEADY = Probe(800.0, 20.0)
TINY = Shape(8, 96, 256, 3, 1, 32, 600, 512)


def sample(rate: float, after: Probe = STEADY, steal: float = 0.0, others: float = 0.0) -> Sample:
    return Sample(seconds=100 / rate, tokens=100, before=STEADY, after=after, steal=steal, others=others)


def test_a_sample_is_doubted_for_what_its_row_depends_on() -> None:
    slower_memory = sample(10, after=Probe(800.0, 17.0))
    assert slower_memory.doubts(("vnni_gops",)) == []
    assert slower_memory.doubts(("dram_gb_s",)) == ["probes differ"]
    assert slower_memory.doubts(("vnni_gops", "dram_gb_s")) == ["probes differ"]
    assert slower_memory.drift(("vnni_gops", "dram_gb_s")) == pytest.approx(0.15)
    assert sample(10, after=Probe(880.0, 20.0)).doubts(("vnni_gops",)) == []  # 9.1 % of the larger
    assert sample(10, steal=0.02, others=0.06).doubts(("vnni_gops",)) == ["steal", "other processes"]


def test_share_is_the_time_needed_by_the_time_taken() -> None:
    probes = Probe(600.0, 10.0), Probe(1000.0, 30.0)  # 800 GOP/s and 20 GB/s between them
    one = Sample(seconds=2.0, tokens=1, before=probes[0], after=probes[1], steal=0.0, others=0.0)
    assert one.share(800e9, 0) == pytest.approx(0.5)
    assert one.share(0, 20e9) == pytest.approx(0.5)
    assert one.share(800e9, 30e9) == pytest.approx(0.75)  # limited by the slower of both


def test_clean_pairs_alone_count_when_they_are_enough() -> None:
    drifted = Probe(400.0, 20.0)
    pairs = [Pair(sample(20), sample(10)) for _ in range(3)] + [Pair(sample(90, after=drifted), sample(10))]
    result = compare(pairs, ("vnni_gops",), wanted=3)
    assert (result.ratio, result.low, result.high) == (2.0, 2.0, 2.0)
    assert (result.pairs, result.clean, result.attempts) == (3, 3, 4)
    assert result.ours == pytest.approx(20)
    assert result.theirs == pytest.approx(10)


def test_too_few_clean_pairs_are_filled_up_with_the_least_doubtful() -> None:
    clean = Pair(sample(20), sample(10))
    little = Pair(sample(30), sample(10, after=Probe(700.0, 20.0)))
    much = Pair(sample(50, after=Probe(100.0, 20.0)), sample(10))
    assert chosen([much, little, clean], ("vnni_gops",), wanted=2) == [clean, little]
    result = compare([much, little, clean], ("vnni_gops",), wanted=2)
    assert (result.ratio, result.low, result.high, result.clean) == (2.5, 2.0, 3.0, 1)


def test_the_ratio_is_the_median_of_pairs_not_the_ratio_of_medians() -> None:
    pairs = [Pair(sample(ours), sample(theirs)) for ours, theirs in ((10, 5), (40, 10), (30, 30))]
    result = compare(pairs, ("vnni_gops",), wanted=3)
    assert result.ratio == 2.0
    assert result.ours / result.theirs == 3.0


def test_goals() -> None:
    assert passes(2.0, 2.0) is True
    assert passes(2.0, 1.999) is False
    assert passes(None, 0.1) is None
    assert len({row.name for row in TABLE}) == len(TABLE) == 16
    assert len({row.name for row in SWEEP}) == len(SWEEP)
    assert [row.batch for row in select(TABLE, "q4_0 decode b1,q4_1*b32")] == [1, 1, 32]
    assert all(row.prompt_tokens + row.steps + 1 <= 8192 for row in (*TABLE, *SWEEP))  # SmolLM2's context


def test_work_of_a_row() -> None:
    work = ModelWork(body_weights=100, head_weights=10, file_bytes=50, layers=(Window(4, None), Window(4, 16)))
    assert work.operations(Row("m", "prefill", 1, 20)) == 2 * (20 * 100 + 10)
    assert work.num_bytes(Row("m", "prefill", 1, 20)) == 50
    row = Row("m", "decode", batch=3, prompt_tokens=20, steps=5)  # contexts 21 .. 25, 23 on average
    assert work.operations(row) == 2 * 3 * 5 * 110
    kv = 2 * 4 * 23 + 2 * 4 * 16
    assert work.num_bytes(row) == 5 * (50 + 3 * kv)
    assert work.num_bytes(row, weight_bytes=70) == 5 * (70 + 3 * kv)


def test_formats_are_those_of_q4_k_m() -> None:
    # blk.N.attn_v of Q4_K_M files of 24 and 28 layers
    assert [n for n in range(24) if uses_more_bits(n, 24)] == [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]
    assert [n for n in range(28) if uses_more_bits(n, 28)] == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
    assert (fitting("Q4_K", 896), fitting("Q6_K", 896), fitting("Q6_K", 4864)) == ("Q5_0", "Q8_0", "Q6_K")
    assert (head_format(SHAPES["random-0.5b"].hidden), head_format(SHAPES["random-1.5b"].hidden)) == ("Q8_0", "Q6_K")


def test_random_model_is_the_same_every_time_and_opens(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        write_random_model(tmp_path / name, TINY, "tiny")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    loaded = load_model(str(tmp_path / "a.gguf"))
    try:
        assert loaded.model.vocab_size == TINY.vocabulary == len(loaded.tokenizer)
        assert loaded.tokenizer.decode(loaded.tokenizer.encode("any text, 100 %")) == "any text, 100 %"
    finally:
        loaded.checkpoint.close()
    work = model_work(tmp_path / "a.gguf")
    block = 2 * 96 * 96 + 2 * 32 * 96 + 3 * 256 * 96
    assert (work.body_weights, work.head_weights) == (8 * block, 600 * 96)
    assert work.layers == (Window(2 * 32, None),) * 8


def test_random_weights_are_centred_and_spread_as_asked(tmp_path: Path) -> None:
    write_random_model(tmp_path / "tiny.gguf", TINY, "tiny")
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    formats = set()
    try:
        for name in checkpoint.tensor_names():
            tensor = checkpoint.tensor(name)
            values = dequantize(tensor.format, tensor.raw)
            assert np.isfinite(values).all()
            if len(tensor.shape) != 2:
                continue
            formats.add(tensor.format)
            wanted = 0.02 if "embed" in name else tensor.shape[1] ** -0.5
            assert values.std() == pytest.approx(wanted, rel=0.1), name
            assert abs(values.mean()) < 0.1 * wanted, name
    finally:
        checkpoint.close()
    assert formats == {"Q4_K", "Q5_0", "Q6_K", "Q8_0"}


ROW_OF_READING = "unseen 1 GB GGUF to ready, on disk"


def result(ratio: float) -> dict[str, Any]:
    row = {"name": "m prefill", "row": {"goal": 2.0}, "setpoint": 1700.4, "ratio": ratio, "passes": ratio >= 2.0}
    rivals = {"llama.cpp": {"theirs": 800.0}, "openvino": {"ratio": 1.5}, "vllm": {"failed": "why"}}
    return {
        "threads": 2,
        "engines": {"llama.cpp": {"m": {"version": "llama-cpp-python 1"}}},
        "unavailable": {"other": "many\nlines"},
        "rows": [row | {"share": 0.655, "rivals": rivals}],
        "scripts": {"rows": [script_rows()["start to first token"]]},
    }


def script_rows() -> dict[str, dict[str, Any]]:
    starts = {"generate cached": 0.61234, "llama.cpp cached": 0.9, "serve unread, ready": 1.5, "read unread": 0.5}
    documents = {"startup": {"models": [{"median_s": starts}, {"median_s": starts}]}}
    rows = [row for row in scripts.SCRIPT_ROWS if row.name in ("start to first token", ROW_OF_READING)]
    return {row.name: scripts.row_document(row, documents[row.script]) for row in rows}


def test_lines_of_scripts_have_a_most() -> None:
    rows = script_rows()
    assert rows["start to first token"] | {"name": ""} == {
        "name": "", "unit": "s", "value": 0.612, "theirs": 0.9, "goal": 0.7, "passes": True,
    }  # fmt: skip
    assert (rows[ROW_OF_READING]["value"], rows[ROW_OF_READING]["passes"]) == (3.0, False)
    assert scripts.table(list(rows.values())).count("MISS") == 1
    assert [row.name for row in select(scripts.SCRIPT_ROWS, "engine")] == ["overhead of runner and engine"]


def test_readme_numbers_come_from_the_newest_result(tmp_path: Path) -> None:
    readme = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    assert with_performance(readme, tmp_path) == readme
    for day, ratio in (("02", 2.126), ("01", 9.0)):
        (tmp_path / f"2026-12-{day}-peers.json").write_text(json.dumps(result(ratio)))
    (tmp_path / "2026-12-03-peers-sweep.json").write_text("{}")
    text = with_performance(readme, tmp_path)
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "| m prefill | 1700 | 800 | 2.13 | 2 | 66% |" in text
    assert "m prefill: openvino 1.50." in text
    assert "- start to first token: 0.612 s, goal 0.7; llama.cpp 0.9 s" in text
    assert "other is missing: lines." in text
    assert "results/2026-12-02-peers.json" in text
    assert with_performance(text, tmp_path) == text
    assert "| 2 (missed) |" in performance(result(1.9), "f")
    with pytest.raises(ValueError, match="marks"):
        with_performance("no marks", tmp_path)


def test_two_distributions_are_told_apart_and_one_is_not() -> None:
    source = random.Random(1)
    same = [[source.gauss(25, 2) for _ in range(300)] for _ in range(2)]
    draws = [[[source.random() for _ in range(60)] for _ in range(2)] for _ in range(300)]
    assert sum(kolmogorov_smirnov(*pair)[1] < 0.05 for pair in draws) == pytest.approx(15, abs=9)  # one in twenty
    assert kolmogorov_smirnov(same[0], same[0]) == (0.0, 1.0)
    distance, probability = kolmogorov_smirnov(same[0], [value + 1 for value in same[1]])
    assert 0.1 < distance < 0.4
    assert probability < 1e-3
    assert kolmogorov_smirnov([1.0] * 50, [2.0] * 50)[0] == pytest.approx(1)
    assert kolmogorov_smirnov([1.0] * 50, [2.0] * 50)[1] < 1e-20
    # Its critical distance at 5 % for large samples is 1.358 / sqrt(n m / (n + m))
    assert kolmogorov_smirnov(list(range(1000)), [i + 60.73 for i in range(1000)])[1] == pytest.approx(0.05, abs=0.005)
