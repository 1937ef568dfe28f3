"""Several clients share the batch, and each gets what it would have got alone, byte for byte.

setpoint serve smollm2-135m &
python examples/many_clients.py [BASE_URL [NUM_CLIENTS]]
"""

import asyncio
import sys
import time

from openai import AsyncOpenAI


async def ask(client: AsyncOpenAI, model: str, number: int) -> str:
    """One streamed completion; the seed makes it repeatable."""
    stream = await client.completions.create(
        model=model, prompt=f"Story number {number}:", max_tokens=32, temperature=0.8, seed=number, stream=True
    )
    return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])


async def main(base_url: str, num_clients: int) -> None:
    client = AsyncOpenAI(base_url=base_url, api_key="none")
    model = (await client.models.list()).data[0].id

    began = time.monotonic()
    alone = [await ask(client, model, number) for number in range(num_clients)]
    one_by_one_s = time.monotonic() - began

    began = time.monotonic()
    together = await asyncio.gather(*(ask(client, model, number) for number in range(num_clients)))
    together_s = time.monotonic() - began

    print(f"{num_clients} clients: {one_by_one_s:.2f} s one by one, {together_s:.2f} s together")
    print("every output is the same" if together == alone else "OUTPUTS DIFFER")
    sys.exit(together != alone)


if __name__ == "__main__":
    given = sys.argv[1:]
    asyncio.run(main(given[0] if given else "http://127.0.0.1:8000/v1", int(given[1]) if len(given) > 1 else 8))
