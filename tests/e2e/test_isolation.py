"""Over HTTP with a real engine: a tenant finds its own prompts only. `benchmarks/isolation.py` compares the times."""

from __future__ import annotations

from pathlib import Path

from isolation import ATTACKER, VICTIM, attack
from peers import servers
from tiny_models import TINY_MODELS, VOCABULARY, write_gguf

PAIRS = 20


def test_only_a_tenants_own_prompts_are_found(tmp_path: Path) -> None:
    model = write_gguf(TINY_MODELS["llama"], tmp_path / "llama.gguf")
    keys = ("--api-key", VICTIM, "--api-key", ATTACKER)
    tiers = ("--kv-host-bytes", 1 << 20, "--kv-disk-path", tmp_path / "kv")
    limits = ("--max-model-len", 128, "--kv-cache-memory-bytes", 1 << 18)
    with servers.setpoint(model, tmp_path / "log", *limits, *keys, *tiers) as server:
        separate, shared = attack(server, PAIRS, vocabulary=VOCABULARY).values()
    assert [answer.num_cached for answer in separate.known] == [0] * PAIRS
    assert [answer.num_cached for answer in separate.unknown] == [0] * PAIRS
    assert [answer.num_cached for answer in shared.known] == [32] * PAIRS  # whole blocks, never the last token
    assert [answer.num_cached for answer in shared.unknown] == [0] * PAIRS
