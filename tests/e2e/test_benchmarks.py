"""The worker that stands for Setpoint in `make bench-peers`, on a random model, as the driver talks to it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from peers.worker import Worker, WorkerDied
from random_models import Shape, write_random_model

TINY = Shape(8, 96, 256, 3, 1, 32, 600, 512)
LIMITS = ["--context", "128", "--batch", "3", "--threads", "2"]
PROMPTS = [[(7 * i + 13 * s) % 600 for i in range(40)] for s in range(3)]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    directory = tmp_path_factory.mktemp("random")
    write_random_model(directory / "tiny.gguf", TINY, "tiny")
    started = Worker(
        Path(sys.executable), "setpoint_worker.py", [str(directory / "tiny.gguf"), *LIMITS], directory / "log"
    )
    yield started
    started.close()


def test_worker_computes_what_it_is_asked(worker: Worker) -> None:
    assert worker.about["weight_bytes"] > 0
    alone = [worker.ask("prefill", prompt=prompt, settings={})["output"][0][0] for prompt in PROMPTS]
    run = worker.ask("decode", prompts=PROMPTS, steps=60, copies=False, settings={})
    assert [output[0] for output in run["output"]] == alone
    assert [len(output) for output in run["output"]] == [61, 61, 61]
    # Sequences may enter some steps apart: what counts is what the whole batch generated together.
    assert 0 < run["tokens"] <= 3 * 60
    assert run["seconds"] > 0
    again = worker.ask("decode", prompts=PROMPTS, steps=60, copies=False, settings={})
    assert again["output"] == run["output"]


def test_random_weights_do_not_collapse(worker: Worker) -> None:
    """A model whose activations left the range would say the same token after everything."""
    prompts = [[(31 * i * i + 17 * s) % 600 for i in range(1, 20)] for s in range(12)]
    tokens = {worker.ask("prefill", prompt=prompt, settings={})["output"][0][0] for prompt in prompts}
    assert len(tokens) >= 3


def test_a_dead_worker_says_why(tmp_path: Path) -> None:
    with pytest.raises(WorkerDied, match="no-such-model"):
        Worker(Path(sys.executable), "setpoint_worker.py", ["/no-such-model.gguf", *LIMITS], tmp_path / "log")
