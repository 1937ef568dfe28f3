"""llama.cpp (through the C API of llama-cpp-python) as a worker of vs_llamacpp.py.

A setting is {"flash_attention", "threads", "ubatch", "kv"}; each combination with a number of sequences is a context
of its own over the one model, and the last few stay open. Weights are repacked where llama.cpp can (its default, and
stated here). Logits are read in place and the greedy token taken by numpy, which is faster than its sampler chain.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import llama_cpp
import numpy as np

from protocol import Answer, serve

KV_TYPES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0}
MAX_BATCH = 2048
OPEN_CONTEXTS = 8


class Context:
    """One llama_context for `sequences` prompts of `length` tokens at most, outputs included."""

    def __init__(self, model: Any, sequences: int, length: int, settings: dict[str, Any]) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = sequences * (-(-length // 256) * 256)
        params.n_seq_max = sequences
        params.n_batch = MAX_BATCH
        params.n_ubatch = settings["ubatch"]
        params.n_threads = params.n_threads_batch = settings["threads"]
        params.kv_unified = False  # sequences that share no prefix: attention sees only its own
        params.flash_attn_type = int(settings["flash_attention"])
        params.type_k = params.type_v = KV_TYPES[settings["kv"]]
        params.no_perf = True
        self.native = llama_cpp.llama_init_from_model(model, params)
        if not self.native:
            raise RuntimeError(f"llama.cpp refuses {settings}")
        self.memory = llama_cpp.llama_get_memory(self.native)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(MAX_BATCH, 0, 1)
        self.tokens = np.ctypeslib.as_array(self.batch.token, (MAX_BATCH,))
        self.positions = np.ctypeslib.as_array(self.batch.pos, (MAX_BATCH,))
        self.wanted = np.ctypeslib.as_array(self.batch.logits, (MAX_BATCH,))
        for i in range(MAX_BATCH):
            self.batch.n_seq_id[i] = 1
        self.filled: list[list[int]] = []
        self.following: list[int] = []

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.native)

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(self.memory, False)
        self.filled = []

    def compute(self, tokens: list[int], start: int, sequence: int) -> int:
        """A prompt from position `start` on; returns the greedy token after it."""
        count = 0
        for begin in range(0, len(tokens), MAX_BATCH):
            piece = tokens[begin : begin + MAX_BATCH]
            count = len(piece)
            self.tokens[:count] = piece
            self.positions[:count] = np.arange(start + begin, start + begin + count)
            self.wanted[:count] = 0
            self.wanted[count - 1] = begin + count == len(tokens)
            for i in range(count):
                self.batch.seq_id[i][0] = sequence
            self._decode(count)
        return self._greedy(count - 1)

    def step(self, tokens: list[int], positions: list[int]) -> list[int]:
        """One token of each sequence 0, 1, ...; returns the greedy ones after them."""
        count = len(tokens)
        self.tokens[:count] = tokens
        self.positions[:count] = positions
        self.wanted[:count] = 1
        self._decode(count)
        return [self._greedy(i) for i in range(count)]

    def _decode(self, count: int) -> None:
        self.batch.n_tokens = count
        if llama_cpp.llama_decode(self.native, self.batch) != 0:
            raise RuntimeError("llama_decode failed")

    def _greedy(self, index: int) -> int:
        pointer = llama_cpp.llama_get_logits_ith(self.native, index)
        return int(np.ctypeslib.as_array(pointer, shape=(self.vocabulary,)).argmax())

    def fill(self, prompts: list[list[int]], copies: bool) -> None:
        """The KV cache of all prompts, without their outputs, and the first greedy token of each."""
        if prompts == self.filled:
            for sequence, prompt in enumerate(prompts):
                if not llama_cpp.llama_memory_seq_rm(self.memory, sequence, len(prompt), -1):
                    raise RuntimeError("the KV cache cannot be rewound")
            return
        self.clear()
        self.following = []
        for sequence, prompt in enumerate(prompts):
            if copies and sequence:
                llama_cpp.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)
                self.following.append(self.following[0])
            else:
                self.following.append(self.compute(prompt, 0, sequence))
        self.filled = prompts


class Rival:
    def __init__(self, path: str) -> None:
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = True  # repacked weights
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.contexts: dict[str, Context] = {}

    def prefill(self, prompt: list[int], settings: dict[str, Any]) -> Answer:
        context = self._context(1, len(prompt) + 1, settings)
        context.clear()
        began = time.perf_counter()
        token = context.compute(prompt, 0, 0)
        return {"seconds": time.perf_counter() - began, "tokens": len(prompt), "output": [[token]]}

    def decode(self, prompts: list[list[int]], steps: int, copies: bool, settings: dict[str, Any]) -> Answer:
        context = self._context(len(prompts), max(map(len, prompts)) + steps + 1, settings)
        context.fill(prompts, copies)
        for sequence in range(len(prompts)):
            context.batch.seq_id[sequence][0] = sequence
        following = context.following
        outputs = [[token] for token in following]
        began = time.perf_counter()
        for step in range(steps):
            following = context.step(following, [len(prompt) + step for prompt in prompts])
            for output, token in zip(outputs, following, strict=True):
                output.append(token)
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": steps * len(prompts), "output": outputs}

    def forget(self) -> Answer:
        for context in self.contexts.values():
            context.close()
        self.contexts.clear()
        return {}

    def _context(self, sequences: int, length: int, settings: dict[str, Any]) -> Context:
        length = -(-length // 256) * 256
        threads = settings["threads"]
        key = json.dumps([sequences, length, settings | {"threads": None}], sort_keys=True)
        if key not in self.contexts:
            if len(self.contexts) == OPEN_CONTEXTS:
                self.contexts.pop(next(iter(self.contexts))).close()
            self.contexts[key] = Context(self.model, sequences, length, settings)
        self.contexts[key] = self.contexts.pop(key)  # the last used is the last to close
        llama_cpp.llama_set_n_threads(self.contexts[key].native, threads, threads)
        return self.contexts[key]


def quantize(source: str, target: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    params.allow_requantize = True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), params) != 0:
        raise SystemExit("quantizing failed")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--quantize-from", help="write MODEL as Q4_0 from this file, and nothing else")
    given = parser.parse_args()
    if given.quantize_from:
        quantize(given.quantize_from, given.model)
        return
    rival = Rival(given.model)
    system = llama_cpp.llama_print_system_info().decode()
    about = {"version": f"llama-cpp-python {llama_cpp.__version__}", "system": system}
    serve(about, {"prefill": rival.prefill, "decode": rival.decode, "forget": rival.forget})


if __name__ == "__main__":
    main()
