"""llama.cpp's server under an SLA, and the search for its best flags: greedy, one flag at a time, restarts counted."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from peers import servers

Flags = tuple[str, ...]
CONTEXT = 16384  # tokens, of all its slots together
# What its own documentation names for serving many at once. The first of each is its default.
CHOICES: Mapping[str, Sequence[Flags]] = {
    "slots": ((), ("--parallel", "8"), ("--parallel", "16"), ("--parallel", "32"), ("--parallel", "2")),
    "tokens a step": ((), ("--ubatch-size", "128"), ("--ubatch-size", "256"), ("--ubatch-size", "1024")),
    "queue of a step": ((), ("--batch-size", "256"), ("--batch-size", "512")),
    "cache": ((), ("--cache-reuse", "64"), ("--cache-ram", "0"), ("--slot-prompt-similarity", "0.5")),
    "attention": ((), ("--flash-attn", "off")),
}
NUM_TRIALS = 1 + sum(len(values) - 1 for values in CHOICES.values())
Score = Callable[[servers.Server], float]  # of a few seconds of traffic; higher is better


def start(program: Path, model: Path, folder: Path, flags: Flags = ()) -> servers.Server:
    """With one cache for all slots, so that more of them do not make each prompt's limit smaller."""
    common = ("--ctx-size", CONTEXT, "--kv-unified", "--metrics")
    return servers.llama_server(program, model, folder / "llama-server.log", *common, *flags)


def best_flags(
    program: Path, model: Path, folder: Path, score: Score, budget_s: float, say: Callable[[str], None]
) -> tuple[Flags, list[dict[str, object]]]:
    """The flags with the highest score until the time is up, and every trial. Those that do not start score -inf."""
    until = time.monotonic() + budget_s
    trials: list[dict[str, object]] = []

    def tried(flags: Flags) -> float:
        try:
            with start(program, model, folder, flags) as server:
                found = score(server)
        except servers.ServerFailed as error:
            say(f"llama-server {' '.join(flags)}: {str(error)[:120]}")
            found = float("-inf")
        trials.append({"flags": list(flags), "score": found if found > float("-inf") else None})
        say(f"llama-server {' '.join(flags) or '(defaults)'}: score {found:.3f}, {until - time.monotonic():.0f} s left")
        return found

    chosen: dict[str, Flags] = {}
    best = tried(())
    for name, values in CHOICES.items():
        for value in values[1:]:
            if time.monotonic() > until:
                break
            flags = tuple(word for part in {**chosen, name: value}.values() for word in part)
            if (found := tried(flags)) > best:
                best, chosen[name] = found, value
    return tuple(word for part in chosen.values() for word in part), trials
