"""Drives llama.cpp (through llama-cpp-python's C API) for against_llama_cpp.py; same protocol as setpoint_worker.py."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time

import llama_cpp
import numpy as np


class Rival:
    def __init__(self, path: str, context: int, batch: int, threads: int, flash_attention: bool) -> None:
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context * batch
        params.n_seq_max = batch
        params.n_batch = 2048
        params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = False
        params.flash_attn_type = 1 if flash_attention else 0
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(vocab)
        self.batch = llama_cpp.llama_batch_init(2048, 0, 1)
        self.random = random.Random(0)

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """One call for (token, position, sequence, logits wanted)."""
        self.batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            self.batch.token[i] = token
            self.batch.pos[i] = position
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = sequence
            self.batch.logits[i] = wanted
        if llama_cpp.llama_decode(self.context, self.batch) != 0:
            raise RuntimeError("llama_decode failed")

    def greedy(self, index: int) -> int:
        pointer = llama_cpp.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(pointer, shape=(self.vocabulary,)).argmax())

    def run(self, batch: int, prompt_tokens: int, output_tokens: int) -> dict[str, float]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        prompts = [[self.random.randrange(self.vocabulary) for _ in range(prompt_tokens)] for _ in range(batch)]
        began = time.perf_counter()
        following = []
        for sequence, prompt in enumerate(prompts):
            for start in range(0, prompt_tokens, 512):
                chunk = prompt[start : start + 512]
                last = start + len(chunk) == prompt_tokens
                self.decode([(t, start + i, sequence, last and i == len(chunk) - 1) for i, t in enumerate(chunk)])
            following.append(self.greedy(len(chunk) - 1))
        first = time.perf_counter()
        for step in range(output_tokens - 1):
            self.decode([(following[s], prompt_tokens + step, s, True) for s in range(batch)])
            following = [self.greedy(s) for s in range(batch)]
        end = time.perf_counter()
        return {
            "prefill_tok_s": batch * prompt_tokens / (first - began),
            "decode_tok_s": batch * (output_tokens - 1) / (end - first),
        }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--flash-attention", action="store_true")
    parser.add_argument("--quantize-from", help="first write MODEL as Q4_0 from this file")
    arguments = parser.parse_args()
    if arguments.quantize_from:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
        params.allow_requantize = True
        if llama_cpp.llama_model_quantize(arguments.quantize_from.encode(), arguments.model.encode(), params) != 0:
            raise SystemExit("quantizing failed")
        return
    rival = Rival(arguments.model, arguments.context, arguments.batch, arguments.threads, arguments.flash_attention)
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(rival.run(asked["batch"], asked["prompt_tokens"], asked["output_tokens"])), flush=True)


if __name__ == "__main__":
    main()
