"""setpoint inspect model NAME | machine | knobs"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from setpoint.cli.arguments import Json, Model
from setpoint.cli.console import DownloadBar, command_app, print_json, printable, say

app = command_app("Show a model, this machine, or every knob.")


@app.command()
def model(model: Model, json: Json = False) -> None:
    """The layer tree of a model, its weights by format, and what a token costs in the KV cache."""
    from setpoint.assemble import load_model, model_facts

    with DownloadBar() as bar:
        loaded = load_model(model, progress=bar)
    checkpoint, tree = loaded.checkpoint, loaded.model
    formats: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    parameters = 0
    for tensor_name in checkpoint.tensor_names():
        tensor = checkpoint.tensor(tensor_name)
        formats[tensor.format] += 1
        num_bytes[tensor.format] += tensor.raw.nbytes
        count = 1
        for length in tensor.shape:
            count *= length
        parameters += count
    facts: dict[str, Any] = {
        "name": checkpoint.name,
        "family": checkpoint.config["model_type"],
        "parameters": parameters,
        "weights": {kind: {"tensors": formats[kind], "bytes": num_bytes[kind]} for kind in formats},
        "context": tree.max_position,
        "vocabulary": tree.vocab_size,
        "kv_bytes_per_token": model_facts(tree).kv_bytes_per_token("s16"),
        "chat_template": loaded.chat_template is not None,
        "path": str(loaded.path),
    }
    if json:
        print_json({**facts, "tree": asdict(tree)})
        return
    weights = ", ".join(f"{kind} {num_bytes[kind] / 1e6:.1f} MB in {formats[kind]} tensors" for kind in formats)
    print(
        printable(
            f"{facts['name']}: {facts['family']}, {parameters / 1e6:.1f} M parameters, context {tree.max_position}"
        )
    )
    print(f"weights: {weights}")
    print(f"KV cache: {facts['kv_bytes_per_token'] / 1024:.1f} KiB a token")
    print(f"chat template: {'yes' if facts['chat_template'] else 'no'}")
    print(f"file: {loaded.path}\n")
    for line in tree_lines(tree):
        print(printable(line))


def tree_lines(tree: Any) -> list[str]:
    """The spec tree, equal neighbouring layers shown once."""
    lines = [f"{tree.embedding}  [{tree.vocab_size} x {tree.hidden}]", f"Repeat {tree.layers.name}"]
    layers = tree.layers.layers
    start = 0
    for index in range(1, len(layers) + 1):
        if index == len(layers) or layers[index] != layers[start]:
            span = f"{start}" if index == start + 1 else f"{start}..{index - 1}"
            block = layers[start]
            lines.append(f"  {span}: {type(block).__name__}")
            lines += [f"    {getattr(block, slot)}" for slot in type(block).__dataclass_fields__]
            start = index
    return [*lines, str(tree.norm), str(tree.head)]


@app.command()
def machine(json: Json = False) -> None:
    """What this machine can run, and what `setpoint probe` measured that it can do at most."""
    from setpoint import _native
    from setpoint.cli.probe import identity_line, record_lines
    from setpoint.config import this_machine
    from setpoint.tune.probe.machine import load, this_identity

    facts, identity = this_machine(), this_identity()
    record = load(lambda problem: say(f"setpoint: {problem}; measure again with `setpoint probe`"))
    if json:
        print_json(
            {
                "architecture": identity.architecture,
                "cpu": identity.cpu_model,
                "cpus": facts.num_cpus,
                "available_memory_bytes": facts.available_memory_bytes,
                "kernels": list(_native.available_isas()),
                "identity": asdict(identity),
                "measured": None if record is None else asdict(record),
            }
        )
        return
    print(printable(f"{identity.cpu_model} ({identity.architecture}), {facts.num_cpus} CPUs for this process"))
    print(identity_line(identity))
    print(f"free memory: {facts.available_memory_bytes / (1 << 30):.1f} GiB")
    print(f"kernels: {', '.join(_native.available_isas())} (the last is used)")
    for line in ["Ceilings: not measured yet; `setpoint probe` does it"] if record is None else record_lines(record):
        print(line)


@app.command()
def knobs(json: Json = False) -> None:
    """Every knob: flag, default, bounds and meaning."""
    from setpoint.cli.knobs import knob_fields
    from setpoint.config import EngineConfig, ServerConfig, knob_of

    rows = [
        {
            "flag": "--" + declared.name.replace("_", "-"),
            "default": declared.default,
            "unit": knob_of(declared).unit,
            "low": knob_of(declared).low,
            "high": knob_of(declared).high,
            "choices": list(knob_of(declared).choices),
            "lossy": knob_of(declared).lossy,
            "help": knob_of(declared).help,
        }
        for config_class in (EngineConfig, ServerConfig)
        for declared in knob_fields(config_class)
    ]
    if json:
        print_json(rows)
        return
    width = max(len(str(row["flag"])) for row in rows)
    for row in rows:
        default = "derived" if row["default"] is None else row["default"]
        print(f"{row['flag']:<{width}}  {default!s:>10}  {row['help']}")
