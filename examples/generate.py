"""Complete several prompts in this process; the first one streams.

python examples/generate.py [MODEL]
"""

import sys

from setpoint import LLM, SamplingParams

PROMPTS = ["The capital of France is", "Once upon a time", "def fibonacci(n):"]


def stream_first(index: int, piece: str) -> None:
    if index == 0:
        print(piece, end="", flush=True)


def main(model: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24, stop=["\n\n"])
    with LLM(model) as llm:
        print(PROMPTS[0], end="", flush=True)
        outputs = llm.generate(PROMPTS, params, on_text=stream_first)  # one batch
        print()
        for output in outputs[1:]:
            print(f"{output.prompt}{output.outputs[0].text}")
        [answer] = llm.chat([{"role": "user", "content": "Say hello in French."}], params)
        print(f"chat: {answer.outputs[0].text!r} ({answer.outputs[0].finish_reason})")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
