"""Chat with a running server through the official client, streaming.

setpoint serve smollm2-135m &
python examples/chat_stream.py [BASE_URL [QUESTION]]
"""

import sys

from openai import OpenAI


def main(base_url: str, question: str) -> None:
    client = OpenAI(base_url=base_url, api_key="none")
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": question}],
        max_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        if chunk.usage is not None:
            print(f"\n[{model}: {chunk.usage.prompt_tokens} + {chunk.usage.completion_tokens} tokens]")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(
        given[0] if given else "http://127.0.0.1:8000/v1",
        given[1] if len(given) > 1 else "Why is the sky blue?",
    )
