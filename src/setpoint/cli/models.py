"""setpoint models list | pull | path | rm | cache"""

from __future__ import annotations

import time
from typing import Annotated

import typer

from setpoint.cli.arguments import Json, Model
from setpoint.cli.console import DownloadBar, command_app, print_json, printable

app = command_app("List, pull, locate and remove models.")


@app.command("list")
def list_(json: Json = False) -> None:
    """Models on this machine, and the aliases that can be pulled."""
    from setpoint.assemble import models_directory
    from setpoint.loaders.hub import ALIASES, list_models

    found = list_models(models_directory())
    local = {model.name for model in found}
    rows = [
        {"name": model.name, "bytes": model.num_bytes, "source": model.source, "path": str(model.path)}
        for model in found
    ]
    rows += [
        {"name": alias.name, "bytes": alias.size, "source": "not pulled", "path": None}
        for alias in ALIASES.values()
        if alias.name not in local
    ]
    if json:
        print_json(rows)
        return
    width = max(len(str(row["name"])) for row in rows)
    for row in rows:
        size = f"{float(str(row['bytes'])) / 1e6:>9.1f} MB"
        print(printable(f"{row['name']:<{width}}  {size}  {row['source']:<10}  {row['path'] or ''}".rstrip()))


@app.command()
def pull(model: Model) -> None:
    """Download a model unless it is here; prints its path."""
    from setpoint.assemble import models_directory
    from setpoint.loaders.hub import resolve_model

    with DownloadBar() as bar:
        print(resolve_model(model, models_directory(), progress=bar))


@app.command()
def path(model: Model) -> None:
    """Print where a model is; fails when it is not on this machine."""
    from setpoint.assemble import models_directory
    from setpoint.errors import ModelNotFoundError
    from setpoint.loaders.hub import find_model

    found = find_model(model, models_directory())
    if found is None:
        raise ModelNotFoundError(f"{model[:200]!r} is not on this machine; try `setpoint models pull`")
    print(found)


@app.command()
def rm(model: Model) -> None:
    """Remove a model's files from this machine."""
    from setpoint.assemble import models_directory
    from setpoint.loaders.hub import remove_model

    print(f"freed {remove_model(model, models_directory()) / 1e6:.1f} MB")


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove them all; the next start packs again.")] = False,
    json: Json = False,
) -> None:
    """Repacked weights on this machine, which let a model start faster (see --weight-cache-bytes)."""
    from setpoint.assemble import weight_cache

    kept = weight_cache()
    if clear:
        print(f"freed {kept.clear() / 1e6:.1f} MB")
        return
    files = kept.files()
    if json:
        print_json([{"path": str(file.path), "bytes": file.num_bytes, "used": round(file.used)} for file in files])
        return
    for file in files:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(file.used))
        print(printable(f"{file.num_bytes / 1e6:>9.1f} MB  {used}  {file.path}"))
    print(f"{sum(file.num_bytes for file in files) / 1e6:>9.1f} MB in {len(files)} files")
