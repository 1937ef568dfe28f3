"""Which free block to give up: orders of eviction on synthesised traces, beside the ideal infinite cache.

    python benchmarks/eviction.py
    python benchmarks/eviction.py --turns 4000 --kinds chat --seeds 1

A block is 512 tokens. The infinite cache finds every full block that was computed before; a row says which share of
that each order finds in a pool of so many tokens. `engine` is the order of `setpoint.engine.eviction`, `clairvoyant`
Belady's rule, which knows the future. Pure simulation: no timing, same numbers on every machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from eviction_orders import AgesByBranch, AgesByUse, Clairvoyant, Ghosts, Hazard, LeastRecent, LeastUsed, Segmented
from reuse_traces import BLOCK_TOKENS, SESSIONS, blocks_of, synthesise
from setpoint.engine.eviction import EvictionOrder, Rank

CAPACITIES = (256_000, 1_024_000, 2_560_000, 5_120_000, 10_240_000)


class Engine:
    """The order that the engine has, under the names of this simulation."""

    def __init__(self, capacity: int) -> None:
        self._order = EvictionOrder()

    def push(self, block: int, uses: int, is_shared: bool) -> None:
        self._order.push(block, Rank.SHARED if is_shared else Rank.PLAIN)

    def remove(self, block: int) -> None:
        self._order.remove(block)

    def pop(self) -> int:
        return self._order.pop()

    def known_uses(self, block: int) -> int:
        return 0


ORDERS: dict[str, Callable[[int], Any]] = {
    "engine": Engine,
    "lru": LeastRecent,
    "slru 0.5": Segmented,
    "slru 0.8": lambda capacity: Segmented(capacity, 0.8),
    "least used": LeastUsed,
    "ghosts 0.1": Ghosts,
    "ghosts 0.3": lambda capacity: Ghosts(capacity, 0.3),
    "hazard": Hazard,
    "hazard, no ghosts": lambda capacity: Hazard(capacity, ghosts=0.0),
    "ages by use 1 2 4 8": lambda capacity: AgesByUse((1, 2, 4, 8)),
    "ages by use 1 1.5 2 3": lambda capacity: AgesByUse((1, 1.5, 2, 3)),
    "ages by branch 2": lambda capacity: AgesByBranch((1, 2)),
    "ages by branch 4": lambda capacity: AgesByBranch((1, 4)),
    "ages by branch 8": lambda capacity: AgesByBranch((1, 8)),
    "ages by branch 16": lambda capacity: AgesByBranch((1, 16)),
    "clairvoyant": Clairvoyant,
}


def next_uses(requests: list[list[int]]) -> list[list[float]]:
    """For every reference: the number of the request that needs the block again."""
    seen: dict[int, float] = {}
    following: list[list[float]] = []
    for number in range(len(requests) - 1, -1, -1):
        following.append([seen.get(block, float("inf")) for block in requests[number]])
        seen.update(dict.fromkeys(requests[number], float(number)))
    return following[::-1]


def simulate(requests: list[list[int]], following: list[list[float]], capacity: int, order: Any) -> tuple[int, float]:
    """(blocks found, seconds an operation). A request holds its blocks only for the moment of its arrival."""
    uses: dict[int, int] = {}
    child: dict[int, int] = {}  # the first that went on from a block
    shared: set[int] = set()
    num_found = operations = 0
    began = time.perf_counter()
    for number, whole in enumerate(requests):
        blocks = whole[:capacity]
        length = next((index for index, block in enumerate(blocks) if block not in uses), len(blocks))
        num_found += length
        for block in blocks[:length]:
            order.remove(block)
            uses[block] += 1
        added: dict[int, int] = {}
        for block in blocks[length:]:
            if block in uses:  # behind a gap: computed again, kept where it is
                order.remove(block)
                added[block] = uses.pop(block)
                continue
            if len(uses) + len(added) >= capacity:
                lost = order.pop()
                del uses[lost]
                child.pop(lost, None)
                shared.discard(lost)
            added[block] = order.known_uses(block)
        uses.update(added)
        if isinstance(order, Clairvoyant):
            order.next_use.update(zip(blocks, following[number], strict=False))
        for parent, block in itertools.pairwise(blocks):
            if child.setdefault(parent, block) != block and parent not in shared:
                shared.update(blocks[: blocks.index(parent) + 1])
        for block in reversed(blocks):
            order.push(block, uses[block], block in shared)
        operations += 2 * len(blocks)
    return num_found, (time.perf_counter() - began) / operations


def ideal(requests: list[list[int]]) -> int:
    seen: set[int] = set()
    found = 0
    for blocks in requests:
        found += next((index for index, block in enumerate(blocks) if block not in seen), len(blocks))
        seen.update(blocks)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=12000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--kinds", nargs="*", default=[*SESSIONS, "mixed"])
    parser.add_argument("--orders", nargs="*", default=list(ORDERS))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for kind in options.kinds:
        shares: dict[tuple[str, int], list[float]] = {}
        costs: dict[str, list[float]] = {}
        hit_rates, tokens = [], []
        for seed in range(options.seeds):
            names: dict[Any, int] = {}
            turns = synthesise(kind, options.turns, seed)
            requests = [blocks_of(turn, names) for turn in turns]
            following, best = next_uses(requests), ideal(requests)
            total = sum(turn.num_tokens for turn in turns)
            hit_rates.append(best * BLOCK_TOKENS / total)
            tokens.append(len(names) * BLOCK_TOKENS)
            for name in options.orders:
                for capacity in CAPACITIES:
                    num_blocks = capacity // BLOCK_TOKENS
                    found, seconds = simulate(requests, following, num_blocks, ORDERS[name](num_blocks))
                    shares.setdefault((name, capacity), []).append(found / best)
                    costs.setdefault(name, []).append(seconds * 1e6)
        size = statistics.median(tokens) / 1e6
        print(f"\n{kind}: ideal token hit rate {statistics.median(hit_rates):.3f}, {size:.1f} M tokens")
        print(
            f"{'share of the ideal at':22}"
            + "".join(f"{capacity / 1e6:8.2f} M" for capacity in CAPACITIES)
            + "   us/op"
        )
        for name in options.orders:
            medians = [statistics.median(shares[name, capacity]) for capacity in CAPACITIES]
            cost = statistics.median(costs[name])
            print(f"{name:22}" + "".join(f"{value:10.3f}" for value in medians) + f"{cost:8.2f}")
            rows.append({"kind": kind, "order": name, "shares": [round(value, 4) for value in medians]})
        rows.append({"kind": kind, "ideal_token_hit_rate": round(statistics.median(hit_rates), 4)})
    print(json.dumps({"turns": options.turns, "seeds": options.seeds, "capacities": CAPACITIES, "rows": rows}))


if __name__ == "__main__":
    main()
