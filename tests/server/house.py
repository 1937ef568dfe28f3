"""A real server on a loopback port over a fake runner, for the tests of this folder."""

from __future__ import annotations

import io
import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from setpoint.engine.engine import Engine
from setpoint.engine.lower_tiers import LowerTiers
from setpoint.engine.plan import Runner
from setpoint.engine.scheduler import DraftPlanner, Scheduler, SchedulerLimits
from setpoint.engine.slo import HeldSla
from setpoint.grammar.compiler import GrammarCompiler
from setpoint.runtime.fake import FakeRunner, fake_info
from setpoint.server.auth import KeyRing
from setpoint.server.context import ServerContext, ServerSettings
from setpoint.server.events import EventRouter
from setpoint.server.logs import EventLog, forward_logging
from setpoint.server.run import DrainingServer, bind
from setpoint.text.chat_template import ChatTemplate
from setpoint.text.source import TokenizerFile
from setpoint.text.tokenizer import load_tokenizer

MODEL = "tiny"
BOS, EOS = 256, 257
VOCAB_SIZE = 262
MAX_MODEL_LEN = 1024
STORY = "Hello 世界! Once upon a time 👩‍👩‍👧 there was a café — naïve, of course.\n".encode()
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}\n{% endfor %}"
    "{% if enable_thinking %}<think>{% endif %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def story(context: list[int]) -> int:
    """The next byte of the story; the place is the position in the context."""
    return STORY[len(context) % len(STORY)]


def story_text(start: int, num_tokens: int) -> str:
    data = bytes(STORY[position % len(STORY)] for position in range(start, start + num_tokens))
    return data.decode("utf-8", "replace")


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def make_tokenizer() -> Any:
    """Byte-level BPE whose id of a byte is the byte, with two specials and a few merges."""
    characters = _byte_characters()
    vocab = {character: byte for byte, character in characters.items()}
    vocab |= {"<s>": BOS, "</s>": EOS, "he": 258, "ll": 259, "Ġth": 260, "Ġthe": 261}
    bpe = models.BPE(vocab=vocab, merges=[("h", "e"), ("l", "l"), ("Ġt", "he")][:2])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        tokenizer.save(str(path))
        settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
        return load_tokenizer(TokenizerFile(path, settings), eos_token_ids=(EOS,))


TOKENIZER = make_tokenizer()
GRAMMARS = GrammarCompiler(TOKENIZER, VOCAB_SIZE)  # starts its process when the first grammar comes


class House:
    """`with House(...) as house:` serves until the block ends. `log` collects the log lines."""

    def __init__(
        self,
        *,
        next_token: Callable[[list[int]], int] | None = None,
        step_s: float = 0.0,
        num_blocks: int = 512,
        keys: KeyRing | None = None,
        limits: SchedulerLimits | None = None,
        speculator: DraftPlanner | None = None,
        host_bytes: int = 0,
        held: HeldSla | None = None,
        faults: Callable[[str, str], None] | None = None,
        runner: Runner | None = None,
        template: str | None = TEMPLATE,
        tokenizer: Any = TOKENIZER,
        grammars: GrammarCompiler = GRAMMARS,
        **settings: Any,
    ) -> None:
        info = fake_info(vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN, num_blocks=num_blocks)
        self.runner = runner or FakeRunner(info, next_token, step_s=step_s)
        self.router = EventRouter()
        lower = LowerTiers(info, host_bytes=host_bytes) if host_bytes else None
        scheduler = Scheduler(info, limits, seed=1, speculator=speculator, lower=lower, held=held)
        self.engine = Engine(scheduler, self.runner, self.router.deliver, faults=faults)
        self.log = io.StringIO()
        self.context = ServerContext(
            engine=self.engine,
            router=self.router,
            tokenizer=tokenizer,
            chat_template=ChatTemplate(template, bos_token="<s>", eos_token="</s>") if template else None,
            grammars=grammars,
            model_names=(MODEL, "tiny-alias"),
            max_model_len=MAX_MODEL_LEN,
            settings=replace(ServerSettings(), **settings),
            keys=keys or KeyRing(),
            log=EventLog(self.log, "debug"),
            cache_info={"block_size": "16", "num_gpu_blocks": str(num_blocks)},
        )
        self.server = DrainingServer(self.context)
        self.socket = bind("127.0.0.1", 0)
        self.port: int = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)

    def __enter__(self) -> House:
        forward_logging(self.context.log)
        self.engine.start()
        self._thread.start()
        until(lambda: self.server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self._thread.join(10)
        self.engine.shutdown()

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, verify=False, **options)

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url + "/v1", **{"api_key": "unused-key", "max_retries": 0, **options})

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        with self.client() as client:
            return client.get(path, **options)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def metrics(self) -> dict[str, float]:
        lines = (line for line in self.get("/metrics").text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]

    @property
    def is_quiet(self) -> bool:
        """Nothing runs or waits, no KV block is held, nobody listens."""
        stats = self.engine.stats()
        pools = self.engine._scheduler.kv.pools
        return (
            stats.num_running == stats.num_waiting == stats.num_queued_requests == stats.num_queued_tokens == 0
            and stats.kv_blocks_leaked == 0
            and all(pool.num_used == 0 for pool in pools)
            and len(self.router) == 0
            and self.server.admission.num_active == 0
        )


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the condition did not become true in time"
        time.sleep(0.005)


def events(text: str) -> list[Any]:
    """The data of a stream's events: parsed JSON, and the string [DONE]. Comments are left out."""
    found: list[Any] = []
    assert text.endswith("\n\n")
    for block in text.removesuffix("\n\n").split("\n\n"):
        if block.startswith(":"):
            continue
        assert block.startswith("data: ")
        data = block.removeprefix("data: ")
        assert "\n" not in data
        found.append(data if data == "[DONE]" else json.loads(data))
    return found


def chat(content: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **fields}


def completion(prompt: Any = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, **fields}


def raw_request(path: str, body: bytes, headers: str = "", method: str = "POST") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{headers}"
    return head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body


def read_response(sock: socket.socket) -> tuple[int, bytes]:
    """Status and all bytes until the server closes the connection."""
    data = b""
    try:
        while part := sock.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return (int(data.split(b" ", 2)[1]) if data else 0), data


def generations(house: House) -> Iterator[Any]:
    yield from house.server.admission._generations
