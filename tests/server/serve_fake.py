"""Serve a fake model from a process of its own: `python serve_fake.py PORT STEP_S SHUTDOWN_S [stuck]`."""

from __future__ import annotations

import sys
import threading

from house import MAX_MODEL_LEN, MODEL, TEMPLATE, TOKENIZER, VOCAB_SIZE

from setpoint.engine.engine import Engine
from setpoint.engine.plan import StepPlan, StepResult
from setpoint.engine.scheduler import Scheduler
from setpoint.errors import SetpointError
from setpoint.runtime.fake import FakeRunner, fake_info
from setpoint.server.context import ServerContext, ServerSettings
from setpoint.server.events import EventRouter
from setpoint.server.run import serve
from setpoint.text.chat_template import ChatTemplate


class StuckRunner(FakeRunner):
    def execute(self, plan: StepPlan) -> StepResult:
        threading.Event().wait()
        raise AssertionError


def main(port: int, step_s: float, shutdown_s: float, stuck: bool) -> int:
    info = fake_info(vocab_size=VOCAB_SIZE, max_model_len=MAX_MODEL_LEN)
    router = EventRouter()
    runner = (StuckRunner if stuck else FakeRunner)(info, step_s=step_s)
    engine = Engine(Scheduler(info), runner, router.deliver)
    engine.start()
    context = ServerContext(
        engine=engine,
        router=router,
        tokenizer=TOKENIZER,
        chat_template=ChatTemplate(TEMPLATE, bos_token="<s>", eos_token="</s>"),
        model_names=(MODEL,),
        max_model_len=MAX_MODEL_LEN,
        settings=ServerSettings(shutdown_timeout_s=shutdown_s),
    )

    def on_ready(url: str, command: str) -> None:
        print(url, flush=True)
        print(command, flush=True)

    try:
        return serve(context, port=port, on_ready=on_ready)
    except SetpointError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), "stuck" in sys.argv))
