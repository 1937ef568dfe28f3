"""llama.cpp decoding one prompt with prompt lookup or without, as llama-cpp-python offers it (protocol.py).

    {"do": "decode", "prompt": [ids], "steps": n, "temperature": t, "drafts": k}  -> {"seconds", "tokens", "output"}

`seconds` are those between the first token and the last; `drafts` 0 is without lookup.
"""

from __future__ import annotations

import sys
import time

from llama_cpp import Llama
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from protocol import Answer, serve


def main() -> None:
    model = Llama(
        sys.argv[1],
        n_ctx=2048,
        n_threads=int(sys.argv[2]),
        n_threads_batch=int(sys.argv[2]),
        flash_attn=True,
        draft_model=LlamaPromptLookupDecoding(),
        logits_all=True,  # what verifying drafts needs
        verbose=False,
    )
    lookups = {k: LlamaPromptLookupDecoding(num_pred_tokens=k) for k in range(1, 17)}

    def decode(prompt: list[int], steps: int, temperature: float, drafts: int) -> Answer:
        model.draft_model = lookups.get(drafts)
        model.reset()
        times, output = [], []
        for token in model.generate(prompt, temp=temperature, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0):
            times.append(time.perf_counter())
            output.append(int(token))
            if len(output) >= steps or token == model.token_eos():
                break
        return {"seconds": times[-1] - times[0], "tokens": len(output) - 1, "output": output}

    serve({"engine": "llama.cpp"}, {"decode": decode})


if __name__ == "__main__":
    main()
