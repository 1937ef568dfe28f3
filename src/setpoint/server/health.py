"""Probes that tell the truth: the engine loop advanced within the limit, or it did not. No engine work, no secrets."""

from __future__ import annotations

from dataclasses import dataclass

from setpoint.server.context import ServerContext


@dataclass(frozen=True, slots=True)
class Health:
    """The answer of a probe; `reasons` is empty when it is good."""

    reasons: tuple[str, ...] = ()

    @property
    def status(self) -> int:
        return 503 if self.reasons else 200

    def body(self) -> dict[str, object]:
        return {"status": "fail" if self.reasons else "ok", "reasons": list(self.reasons)}


def startup(context: ServerContext) -> Health:
    return Health() if context.started else Health(("loading",))


def live(context: ServerContext) -> Health:
    """The engine thread exists and its heartbeat is young. A long prefill or an idle hour is alive."""
    if not context.started:
        return Health()  # loading is not being stuck; `startupz` has its own deadline
    if not context.engine.is_alive:
        return Health(("engine_dead",))
    if context.engine.heartbeat_age_s() > context.settings.max_heartbeat_age_s:
        return Health(("engine_stuck",))
    return Health()


def ready(context: ServerContext) -> Health:
    reasons = startup(context).reasons + live(context).reasons
    return Health(reasons + (("draining",) if context.draining else ()))
