"""Whether a tenant can tell by time what another tenant has sent (AT-4 of the reliability checks), over HTTP.

    python benchmarks/isolation.py
    python benchmarks/isolation.py --pairs 100

Two API keys. The victim sends a prompt; then the attacker sends that prompt and one that nobody has sent, in random
order. The two distributions of the attacker's times to the first token are compared (Kolmogorov-Smirnov): the check
passes with p > 0.05. The negative control is the same with the victim's own key, alternating with it: the cache must
be seen there, or the test could see nothing. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import servers
from peers.servers import Answer, Server
from setpoint.assemble import models_directory
from setpoint.loaders.hub import resolve_model

VICTIM, ATTACKER = "key-of-the-victim-1", "key-of-the-attacker-2"
VOCABULARY = 40_000


@dataclass(slots=True)
class Seen:
    """What the attacker saw of prompts that the victim has sent, and of others."""

    known: list[Answer] = field(default_factory=list)
    unknown: list[Answer] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        known, unknown = ([answer.seconds for answer in answers] for answers in (self.known, self.unknown))
        distance, probability = kolmogorov_smirnov(known, unknown)
        return {
            "known_ms": round(statistics.median(known) * 1e3, 3),
            "unknown_ms": round(statistics.median(unknown) * 1e3, 3),
            "known_cached_tokens": max(answer.num_cached for answer in self.known),
            "unknown_cached_tokens": max(answer.num_cached for answer in self.unknown),
            "ks_distance": round(distance, 4),
            "ks_p": float(f"{probability:.3g}"),
        }


def attack(
    server: Server, pairs: int, *, seed: int = 5, length: int = 48, vocabulary: int = VOCABULARY
) -> dict[str, Seen]:
    """Both arms, pair by pair in turn."""
    source = random.Random(seed)
    arms = {"separate tenants": ATTACKER, "negative control: one tenant": VICTIM}
    seen = {name: Seen() for name in arms}
    for _ in range(pairs):
        for name, key in arms.items():
            secret, other = ([source.randrange(5, vocabulary) for _ in range(length)] for _ in range(2))
            server.first_token(secret, VICTIM)
            order = [(seen[name].known, secret), (seen[name].unknown, other)]
            source.shuffle(order)
            for answers, prompt in order:
                answers.append(server.first_token(prompt, key))
    return seen


def kolmogorov_smirnov(left: Sequence[float], right: Sequence[float]) -> tuple[float, float]:
    """Largest distance of two empirical distributions, and the probability of it in samples of one distribution."""
    merged = sorted([(value, 1 / len(left)) for value in left] + [(value, -1 / len(right)) for value in right])
    height = distance = 0.0
    for index, (value, step) in enumerate(merged):
        height += step
        if index + 1 == len(merged) or merged[index + 1][0] != value:
            distance = max(distance, abs(height))
    root = math.sqrt(len(left) * len(right) / (len(left) + len(right)))
    argument = (root + 0.12 + 0.11 / root) * distance
    if argument < 0.2:
        return distance, 1.0
    terms = (2 * (-1) ** (k - 1) * math.exp(-2 * (k * argument) ** 2) for k in range(1, 101))
    return distance, min(max(sum(terms), 0.0), 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--pairs", type=int, default=1000)
    options = parser.parse_args()
    path = resolve_model(options.model, models_directory())
    keys = ("--api-key", VICTIM, "--api-key", ATTACKER)
    with (
        tempfile.TemporaryDirectory() as folder,
        servers.setpoint(path, Path(folder) / "log", "--max-model-len", 2048, *keys) as server,
    ):
        attack(server, 5, seed=4)  # other prompts: what a first step costs
        seen = attack(server, options.pairs)
    rows = {name: found.row() for name, found in seen.items()}
    separate, shared = rows.values()
    passes = separate["ks_p"] > 0.05 and separate["known_cached_tokens"] == 0 and shared["ks_p"] < 1e-6
    for name, row in rows.items():
        print(f"{name:32} {row}")
    document = {"question": "isolation of prefix caches over HTTP", "date": time.strftime("%Y-%m-%d")}
    print(json.dumps({**document, "model": options.model, "pairs": options.pairs, "rows": rows, "passes": passes}))


if __name__ == "__main__":
    main()
