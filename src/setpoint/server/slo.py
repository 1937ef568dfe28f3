"""The targets of one request: its `slo` field, or the header `X-Setpoint-SLO` of a gateway before us."""

from __future__ import annotations

from typing import Final

from setpoint.engine.slo import HeldSla, Slo
from setpoint.errors import ConfigError, RequestError
from setpoint.server.openai import MAX_SLO_CHARS, SloFields

HEADER: Final = "X-Setpoint-SLO"


def requested_slo(field: SloFields | str | None, headers: list[str]) -> Slo | None:
    """Raises RequestError naming the field or the header."""
    if field is None and not headers:
        return None
    if len(headers) + (field is not None) > 1:
        message = f"'slo' and {HEADER} name the same thing; send one, once."
        raise RequestError(message, param="slo" if field is not None else HEADER, reason="conflict")
    param = HEADER if field is None else "slo"
    given = headers[0] if field is None else field
    try:
        if isinstance(given, SloFields):
            return Slo(*(None if value is None else value / 1e3 for value in (given.ttft_ms, given.tpot_ms)))
        if len(given) > MAX_SLO_CHARS:
            raise ConfigError(f"an SLO has at most {MAX_SLO_CHARS} characters")
        return HeldSla.parse(given).slo
    except ConfigError as error:
        raise RequestError(f"'{param}': {error}", param=param) from None
