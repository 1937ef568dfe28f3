"""Setpoint's engine as a worker of vs_llamacpp.py, without HTTP: prefix reuse stands for a filled KV cache."""

from __future__ import annotations

import argparse
import itertools
import queue
from typing import Any

from protocol import Answer, serve
from setpoint.assemble import build_engine
from setpoint.config import EngineConfig
from setpoint.engine.events import Event
from setpoint.engine.request import Request
from setpoint.engine.sampling import SamplingParams

PATIENCE_S = 600.0


class Engine:
    def __init__(self, model: str, context: int, batch: int, threads: int) -> None:
        self.events: list[Event] = []
        self.ended: queue.SimpleQueue[int] = queue.SimpleQueue()  # how many requests, each time some do
        config = EngineConfig(
            model=model, max_model_len=context, max_num_seqs=batch, num_threads=threads, speculative_config="off"
        )
        self.assembly = build_engine(config, self._deliver)
        self.assembly.engine.start()
        self.names = (f"bench-{i}" for i in itertools.count())
        self.filled: list[list[int]] = []

    def _deliver(self, events: list[Event]) -> None:
        """Nobody reads the tokens one by one: waking a thread for each would take a CPU from the step."""
        self.events += events
        if ended := sum(event.finish_reason is not None for event in events):
            self.ended.put(ended)

    def prefill(self, prompt: list[int], settings: dict[str, Any]) -> Answer:
        # A salt of its own: nothing may be reused, and what it leaves behind is never found again.
        run = self._run([prompt], 1, salt=next(self.names))
        return {"seconds": run.first - run.arrival, "tokens": len(prompt), "output": run.outputs}

    def decode(self, prompts: list[list[int]], steps: int, copies: bool, settings: dict[str, Any]) -> Answer:
        run = self._decoded(prompts, steps)
        if run is None:  # other prompts, or a prefill since then needed the room
            self._run(prompts, 1, salt="filled")
            run = self._decoded(prompts, steps)
        if run is None:
            raise RuntimeError("the prompts do not stay in the KV cache")
        return {"seconds": run.full_batch_s, "tokens": run.full_batch_tokens, "output": run.outputs}

    def _decoded(self, prompts: list[list[int]], steps: int) -> Run | None:
        """None when the cache did not hold the prompts."""
        if prompts != self.filled:
            self.filled = prompts
            return None
        run = self._run(prompts, steps + 1, salt="filled")
        wanted = sum(len(prompt) - 1 for prompt in prompts) - 16 * len(prompts)
        return run if run.cached >= wanted else None

    def _run(self, prompts: list[list[int]], output_tokens: int, salt: str) -> Run:
        params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
        requests = [Request(next(self.names), prompt, params, cache_salt=salt) for prompt in prompts]
        for request in requests:
            self.assembly.engine.submit(request)
        left = len(requests)
        while left > 0:
            left -= self.ended.get(timeout=PATIENCE_S)
        events, self.events = self.events, []
        return Run([request.request_id for request in requests], events)


class Run:
    """The events of one batch."""

    def __init__(self, names: list[str], events: list[Event]) -> None:
        self.events: dict[str, list[Event]] = {name: [] for name in names}
        for event in events:
            if event.error is not None:
                raise event.error
            self.events[event.request_id].append(event)

    @property
    def arrival(self) -> float:
        return min(events[0].arrival_time for events in self.events.values())

    @property
    def first(self) -> float:
        """When the last sequence got its first token."""
        return max(events[0].time for events in self.events.values())

    @property
    def full_batch_s(self) -> float:
        """From there until the first sequence ends: every step in between served the whole batch."""
        return min(events[-1].time for events in self.events.values()) - self.first

    @property
    def full_batch_tokens(self) -> int:
        end = self.first + self.full_batch_s
        every = itertools.chain.from_iterable(self.events.values())
        return sum(len(event.token_ids) for event in every if self.first < event.time <= end)

    @property
    def cached(self) -> int:
        return sum(events[0].num_cached_tokens for events in self.events.values())

    @property
    def outputs(self) -> list[list[int]]:
        return [[token for event in events for token in event.token_ids] for events in self.events.values()]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    engine = Engine(given.model, given.context, given.batch, given.threads)
    about = {"isa": engine.assembly.isa, "weight_bytes": engine.assembly.weight_bytes}
    serve(about, {"prefill": engine.prefill, "decode": engine.decode})
    engine.assembly.engine.shutdown()


if __name__ == "__main__":
    main()
