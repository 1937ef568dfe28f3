"""OpenVINO GenAI as a worker of vs_llamacpp.py: its continuous-batching pipeline, reading the GGUF file directly.

Settings: "group", the size of the groups of its dynamic quantization (0: its default). The KV cache keeps its default
precision, u8.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai

from protocol import Answer, serve

CACHE_GB = 1


class Rival:
    def __init__(self, path: str, batch: int, threads: int) -> None:
        self.path = path
        self.batch = batch
        self.threads = threads
        self.pipelines: dict[str, Any] = {}
        self.numbers = itertools.count()
        self.filled: list[list[int]] = []
        self._pipeline({"group": 0}, reuse=True)  # whether it can read the file shows here

    def prefill(self, prompt: list[int], settings: dict[str, Any]) -> Answer:
        began = time.perf_counter()
        times, outputs = self._run(self._pipeline(settings, reuse=False), [prompt], 1)
        return {"seconds": times[0][0] - began, "tokens": len(prompt), "output": outputs}

    def decode(self, prompts: list[list[int]], steps: int, copies: bool, settings: dict[str, Any]) -> Answer:
        pipeline = self._pipeline(settings, reuse=True)
        wanted = [settings, prompts]
        if wanted != self.filled:
            self._run(pipeline, prompts, 1)
            self.filled = wanted
        times, outputs = self._run(pipeline, prompts, steps + 1)
        first, end = max(of_one[0] for of_one in times), min(of_one[-1] for of_one in times)
        tokens = sum(first < moment <= end for of_one in times for moment in of_one)
        return {"seconds": end - first, "tokens": tokens, "output": outputs}

    def _run(self, pipeline: Any, prompts: list[list[int]], count: int) -> tuple[list[list[float]], list[list[int]]]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = count
        config.do_sample, config.ignore_eos = False, True
        handles = [
            pipeline.add_request(next(self.numbers), openvino.Tensor(np.array([prompt], np.int64)), config)
            for prompt in prompts
        ]
        times: list[list[float]] = [[] for _ in prompts]
        outputs: list[list[int]] = [[] for _ in prompts]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = time.perf_counter()
            for index, handle in enumerate(handles):
                if handle.can_read():
                    new = [token for output in handle.read().values() for token in output.generated_ids]
                    outputs[index] += new
                    times[index] += [now] * len(new)
        return times, outputs

    def _pipeline(self, settings: dict[str, Any], *, reuse: bool) -> Any:
        key = json.dumps([settings, reuse])
        if key not in self.pipelines:
            scheduler = openvino_genai.SchedulerConfig()
            scheduler.cache_size = CACHE_GB
            scheduler.max_num_batched_tokens = 512
            scheduler.max_num_seqs = self.batch
            scheduler.enable_prefix_caching = reuse
            properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": self.threads, "PERFORMANCE_HINT": "LATENCY"}
            if settings["group"]:
                properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = settings["group"]
            self.pipelines[key] = openvino_genai.ContinuousBatchingPipeline(self.path, scheduler, "CPU", properties)
        return self.pipelines[key]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--context", type=int)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    rival = Rival(given.model, given.batch, given.threads)
    about = {"version": f"openvino-genai {openvino_genai.__version__}", "weights": "the GGUF file, read directly"}
    serve(about, {"prefill": rival.prefill, "decode": rival.decode})


if __name__ == "__main__":
    main()
