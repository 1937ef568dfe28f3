"""llama.cpp (through llama-cpp-python) as a worker of reuse.py: time to the first token, with what it can reuse.

Its own slot is always on: a prompt keeps the part of the last one that it shares. `ram` adds LlamaRAMCache, the prompt
cache of its server (`--cache`), in this process. `save` and `load` are its state files, which survive a restart.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from typing import Any

import llama_cpp

from protocol import Answer, serve


class Reuse:
    def __init__(self, path: str, context: int, threads: int, ram_bytes: int) -> None:
        self.model = llama_cpp.Llama(
            path,
            n_ctx=context,
            n_batch=2048,
            n_ubatch=512,
            n_threads=threads,
            n_threads_batch=threads,
            flash_attn=True,
            verbose=False,
        )
        if ram_bytes:
            self.model.set_cache(llama_cpp.LlamaRAMCache(ram_bytes))
        self.num_computed = 0
        evaluate = self.model.eval

        def counted(tokens: Any) -> None:
            self.num_computed += len(tokens)
            evaluate(tokens)

        self.model.eval = counted  # type: ignore[method-assign]

    def first_token(self, prompt: list[int], settings: dict[str, Any]) -> Answer:
        if settings.get("cold"):
            self.model.reset()
        self.num_computed = 0
        began = time.perf_counter()
        seconds = None
        for _ in self.model.create_completion(prompt, max_tokens=2, temperature=0.0, stream=True):
            seconds = seconds or time.perf_counter() - began
        whole = time.perf_counter() - began
        return {"seconds": seconds, "cached": max(len(prompt) - self.num_computed, 0), "whole": whole}

    def save(self, path: str) -> Answer:
        tokens = self.model.input_ids[: self.model.n_tokens].tolist()
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        began = time.perf_counter()
        saved = llama_cpp.llama_state_save_file(self.model.ctx, path.encode(), array, len(tokens))
        return {"saved": bool(saved), "seconds": time.perf_counter() - began}

    def load(self, path: str) -> Answer:
        capacity = self.model.n_ctx()
        array, count = (llama_cpp.llama_token * capacity)(), ctypes.c_size_t(0)
        began = time.perf_counter()
        loaded = llama_cpp.llama_state_load_file(self.model.ctx, path.encode(), array, capacity, ctypes.byref(count))
        seconds = time.perf_counter() - began
        self.model.n_tokens = count.value
        self.model.input_ids[: count.value] = list(array[: count.value])
        return {"loaded": bool(loaded), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--ram-bytes", type=int, default=0)
    options = parser.parse_args()
    reuse = Reuse(options.model, options.context, options.threads, options.ram_bytes)
    serve(
        {"version": f"llama-cpp-python {llama_cpp.__version__}"},
        {"first_token": reuse.first_token, "save": reuse.save, "load": reuse.load},
    )


if __name__ == "__main__":
    main()
