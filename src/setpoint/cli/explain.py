"""setpoint explain REQUEST_ID | RECIPE.toml"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from setpoint.cli.arguments import Json
from setpoint.cli.console import command_app, print_json, printable
from setpoint.config import api_key_from_environment
from setpoint.errors import ConfigError, SetpointError

if TYPE_CHECKING:
    import httpx

PATIENCE_S = 10.0
MAX_BYTES = 1 << 20
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

app = command_app("Show where the time of a request went, or why a recipe is what it is.")


class ExplainError(SetpointError):
    exit_code = 1


@app.command()
def explain(
    subject: Annotated[str, typer.Argument(metavar="REQUEST_ID|RECIPE", help="The `id` of an answer, or a recipe.")],
    url: Annotated[str, typer.Option(help="The server that gave it.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(help="The key that sent it. Default: SETPOINT_API_KEY.")] = None,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help="What a recipe was tuned on.")] = None,
    json: Json = False,
) -> None:
    """Draw the path of one request in time, with the causes of what it waited for.

    Of a recipe (a .toml file): what each knob does, what binds, what more of a resource would be worth.
    """
    if subject.endswith(".toml"):
        _recipe(Path(subject), trace, json)
        return
    if not _ID.fullmatch(subject):
        raise ConfigError("REQUEST_ID must be the `id` of an answer, as in chatcmpl-1f0c, or a recipe.toml")
    document = fetch(subject, url, api_key or api_key_from_environment())
    if json:
        print_json(document)
        return
    for line in draw(document, min(shutil.get_terminal_size().columns, 120)):
        print(printable(line))


def _recipe(path: Path, trace: Path | None, json: bool) -> None:
    from setpoint.cli import explain_recipe as recipes

    found = recipes.explain_recipe(path, trace)
    if json:
        print_json(recipes.document(found))
        return
    for line in recipes.draw(found):
        print(printable(line))


def fetch(request_id: str, url: str, api_key: str | None) -> dict[str, Any]:
    """Raises ExplainError in one line: nobody there, no such request, another key's, not our server."""
    import httpx

    base = url.rstrip("/").removesuffix("/v1")
    if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", base):
        raise ConfigError(f"--url is {url[:100]!r}; give it as in http://127.0.0.1:8000")
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    try:
        response = httpx.get(f"{base}/v1/requests/{request_id}/explain", headers=headers, timeout=PATIENCE_S)
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise ExplainError(f"no server answers at {base} ({reason}); start it or correct --url") from None
    return _checked(response, request_id, base)


def _checked(response: httpx.Response, request_id: str, base: str) -> dict[str, Any]:
    if response.status_code == 401:
        raise ExplainError(f"the server at {base} wants a key; give --api-key or set SETPOINT_API_KEY")
    if response.status_code == 404:
        raise ExplainError(f"the server knows no request {request_id}: never seen, forgotten, or another key's")
    try:
        document = response.json() if response.status_code == 200 and len(response.content) <= MAX_BYTES else None
    except ValueError:
        document = None
    if not isinstance(document, dict) or document.get("object") != "request.explanation":
        raise ExplainError(f"{base} does not explain requests ({response.status_code}); is it a Setpoint server?")
    return document


def draw(document: dict[str, Any], width: int) -> list[str]:
    """The path as bars on one time axis, what each was made of, and the advice."""
    end_s = max(document["e2e_s"], 1e-9)
    ttft = "" if document["ttft_s"] is None else f", first token after {_ms(document['ttft_s'])}"
    ending = document["finish_reason"] or document["state"]
    lines = [f"{document['id']}: {_ms(document['e2e_s'])}{ttft} ({ending})", ""]
    room = max(width - 26, 20)
    for span in document["path"]:
        first = min(int(span["start_s"] / end_s * room), room - 1)
        last = max(first + 1, min(round(span["end_s"] / end_s * room), room))
        bar = " " * first + "█" * (last - first)
        lines.append(f"{span['kind']:<10}{_ms(span['end_s'] - span['start_s']):>12}  {bar}")
        lines += [f"  {row}" for row in _parts(span)]
    tokens = document["tokens"]
    cached = tokens["cached"] + tokens["from_memory"] + tokens["from_disk"]
    lines += ["", f"{tokens['prompt']} prompt tokens ({cached} from the cache), {tokens['output']} generated"]
    lines += [f"- {sentence}" for sentence in document["advice"]]
    return lines


def _parts(span: dict[str, Any]) -> list[str]:
    rows = [f"{cause} {_ms(seconds)}" for cause, seconds in span["parts"].items()]
    counts = [f"{span[name]} {name.replace('_', ' ')}" for name in ("steps", "tokens", "others_tokens") if name in span]
    told = rows if len(rows) > 1 or (rows and not rows[0].startswith(span["kind"])) else []
    return [", ".join(told + counts)] if told or counts else []


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
