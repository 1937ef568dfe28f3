"""One token through llama-cpp-python, for startup.py: prints it as soon as it is there."""

from __future__ import annotations

import sys

import llama_cpp

model = llama_cpp.Llama(sys.argv[1], n_ctx=2048, verbose=False)
for part in model.create_completion(sys.argv[2], max_tokens=1, temperature=0.0, stream=True):
    print(part["choices"][0]["text"], flush=True)  # type: ignore[index]
