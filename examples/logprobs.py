"""How sure the model is: its choices for each next token, and the perplexity of a text.

python examples/logprobs.py [MODEL]
"""

import math
import sys

from setpoint import LLM, SamplingParams

TEXT = "The quick brown fox jumps over the lazy dog."


def main(model: str) -> None:
    with LLM(model) as llm:
        tokenizer = llm.get_tokenizer()
        [output] = llm.generate("The capital of France is", SamplingParams(temperature=0.0, max_tokens=4, logprobs=3))
        for entry in output.outputs[0].logprobs or []:
            choices = zip(entry.top_ids, entry.top_logprobs, strict=True)
            shown = ", ".join(f"{tokenizer.decode([token])!r} {math.exp(logprob):.1%}" for token, logprob in choices)
            print(f"{tokenizer.decode([entry.token_id])!r:>12}: {shown}")

        [scored] = llm.generate(TEXT, SamplingParams(max_tokens=1, prompt_logprobs=0))
        logprobs = [entry.logprob for entry in scored.prompt_logprobs or [] if entry is not None]
        perplexity = math.exp(-sum(logprobs) / len(logprobs))
        print(f"perplexity of {TEXT!r}: {perplexity:.1f} over {len(logprobs)} tokens")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m")
