"""A Hugging Face directory as a `Checkpoint`: JSON, safetensors and a template; nothing in it is ever executed.

`auto_map`, `.py` files and custom code are not looked at: a model that needs them has a `model_type` we do not know.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from setpoint.errors import ModelFileError, UnsupportedModelError
from setpoint.loaders.checkpoint import PICKLE_ADVICE, PICKLE_SUFFIXES, GenerationDefaults, Tensor
from setpoint.loaders.mapped import quote
from setpoint.loaders.safetensors_file import SafetensorsFile, parse_json
from setpoint.text.source import TokenizerFile

MIB = 1 << 20
MAX_CONFIG_BYTES = 4 * MIB
MAX_SETTINGS_BYTES = 16 * MIB  # tokenizer_config.json lists every added token
MAX_INDEX_BYTES = 32 * MIB
MAX_TOKENIZER_BYTES = 256 * MIB
MAX_TEMPLATE_BYTES = MIB
MAX_SHARDS = 4096
MAX_TOKEN_ID = (1 << 31) - 1

# Where the text model lies inside checkpoints that also see: such prefixes become ours, the seeing parts stay unused.
TEXT_MODEL_TYPES = {"gemma3": "gemma3_text"}
TEXT_PREFIXES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
OTHER_PARTS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


class SafetensorsCheckpoint:
    """See `Checkpoint`. Every shard is opened and checked; weights are read when asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        self._shards: list[SafetensorsFile] = []
        self._weight_map: Mapping[str, Any] = {}
        stated = self._json("config.json", MAX_CONFIG_BYTES)
        if stated is None:
            self._refuse_other_contents()
        self.config = _text_config(stated, self._path.name)
        self._unused = OTHER_PARTS if self.config is not stated else ()
        try:
            for name in self._shard_names():
                self._shards.append(SafetensorsFile(self._path / name))
            self._stored = self._translate_names()
        except BaseException:
            self.close()
            raise
        self.name = _display_name(self._path)

    @cached_property
    def generation(self) -> GenerationDefaults:
        return _generation(self._json("generation_config.json", MAX_CONFIG_BYTES) or {}, self.config, self._path.name)

    @cached_property
    def tokenizer(self) -> TokenizerFile:
        path = self._path / "tokenizer.json"
        if not path.is_file():
            self._fail("there is no tokenizer.json; convert the tokenizer to the fast format and put it there")
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            self._fail(f"tokenizer.json is larger than {MAX_TOKENIZER_BYTES // MIB} MiB")
        return TokenizerFile(path, self._settings)

    @cached_property
    def chat_template(self) -> str | None:
        """`chat_template.jinja`, else the one in tokenizer_config.json (the one named "default" of several)."""
        content = self._read("chat_template.jinja", MAX_TEMPLATE_BYTES)
        if content is not None:
            try:
                return content.decode()
            except UnicodeDecodeError:
                self._fail("chat_template.jinja is not valid UTF-8")
        template = self._settings.get("chat_template")
        if isinstance(template, list):
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default")
        if template is not None and (not isinstance(template, str) or len(template) > MAX_TEMPLATE_BYTES):
            self._fail(f"'chat_template' of tokenizer_config.json must be a string of at most {MAX_TEMPLATE_BYTES}")
        return template

    @property
    def num_bytes(self) -> int:
        return sum(shard.size for shard in self._shards)

    def tensor_names(self) -> Sequence[str]:
        return [name for name in self._stored if not name.startswith(self._unused)]

    def has_tensor(self, name: str) -> bool:
        return name in self._stored

    def tensor(self, name: str) -> Tensor:
        if name not in self._stored:
            self._fail(f"the tensor {quote(name)} is missing")
        shard, stored = self._stored[name]
        entry = shard.entries[stored]
        return Tensor(name, entry.shape, entry.dtype, shard.raw(stored))

    def digest(self) -> str:
        parts = [json.dumps(self.config, sort_keys=True), *(shard.digest() for shard in self._shards)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def read_ahead(self) -> None:
        for shard in self._shards:
            shard.read_ahead()

    def close(self) -> None:
        for shard in self._shards:
            shard.close()

    # ------------------------------------------------------------------------------------------------- the files

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return self._json("tokenizer_config.json", MAX_SETTINGS_BYTES) or {}

    def _fail(self, message: str) -> NoReturn:
        raise ModelFileError(f"{self._path.name}: {message}")

    def _read(self, name: str, max_bytes: int) -> bytes | None:
        """The whole file, or None when there is none."""
        path = self._path / name
        try:
            if not path.is_file():
                return None
            with path.open("rb") as stream:
                content = stream.read(max_bytes + 1)
        except OSError as error:
            self._fail(f"{name} cannot be read: {error.strerror}")
        if len(content) > max_bytes:
            self._fail(f"{name} is larger than {max_bytes // MIB} MiB")
        return content

    def _json(self, name: str, max_bytes: int) -> dict[str, Any] | None:
        content = self._read(name, max_bytes)
        return None if content is None else parse_json(content, self._path.name, name)

    def _refuse_other_contents(self) -> NoReturn:
        gguf = sorted(path.name for path in self._path.glob("*.gguf"))
        if gguf:
            self._fail(f"there is no config.json, but GGUF files; name one of them: {', '.join(gguf[:8])}")
        self._fail("there is no config.json; expected a Hugging Face model directory or a .gguf file")

    def _shard_names(self) -> list[str]:
        if (self._path / "model.safetensors").is_file():
            return ["model.safetensors"]
        index = self._json("model.safetensors.index.json", MAX_INDEX_BYTES)
        if index is None:
            pickles = sorted(path.name for path in self._path.iterdir() if path.suffix in PICKLE_SUFFIXES)
            if pickles:
                raise UnsupportedModelError(f"{self._path.name}: {pickles[0][:80]} is a pickle file: {PICKLE_ADVICE}")
            self._fail("there is no model.safetensors and no model.safetensors.index.json")
        weights = index.get("weight_map")
        if not isinstance(weights, dict) or not weights:
            self._fail("model.safetensors.index.json has no 'weight_map'")
        self._weight_map = weights
        for shard in weights.values():
            self._check_shard_name(shard)
        names = sorted(set(weights.values()))
        if len(names) > MAX_SHARDS:
            self._fail(f"model.safetensors.index.json names {len(names)} files; at most {MAX_SHARDS}")
        for name in names:
            if not (self._path / name).is_file():
                self._fail(f"the shard {name} is missing; download it again")
        return names

    def _check_shard_name(self, name: Any) -> None:
        """A plain file name: an index must not lead out of its directory."""
        plain = isinstance(name, str) and name.endswith(".safetensors") and name.isprintable() and len(name) <= 255
        if not plain or "/" in name or "\\" in name or ":" in name or name.startswith("."):
            self._fail(f"model.safetensors.index.json points to {quote(str(name))}, not a file of this directory")

    def _translate_names(self) -> dict[str, tuple[SafetensorsFile, str]]:
        """Our name -> (shard, name in the shard). The index and the shards must agree."""
        stored: dict[str, tuple[SafetensorsFile, str]] = {}
        for shard in self._shards:
            for name in shard.entries:
                ours = _our_name(name)
                if ours in stored:
                    self._fail(f"tensor {quote(name)} occurs twice (duplicate name)")
                stored[ours] = (shard, name)
        for name, shard_name in self._weight_map.items():
            holder = stored.get(_our_name(name))
            if holder is None or holder[0].name != shard_name:
                self._fail(f"tensor {quote(name)} is not in {shard_name}, where the index points")
        return stored


def _display_name(path: Path) -> str:
    """The directory's name, or org/name when it is a snapshot in the hub's cache."""
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return path.name


def _our_name(name: str) -> str:
    for prefix, ours in TEXT_PREFIXES.items():
        if name.startswith(prefix):
            return ours + name.removeprefix(prefix)
    return name


def _text_config(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The configuration of the text model; refuses weights in a quantization scheme that we would misread."""
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UnsupportedModelError(
            f"{name}: quantized weights ({quote(str(method))}) are not supported in safetensors;"
            " use the original model or a GGUF file"
        )
    inner, model_type = config.get("text_config"), config.get("model_type")
    if isinstance(inner, dict) and isinstance(model_type, str) and model_type in TEXT_MODEL_TYPES:
        return {**inner, "model_type": TEXT_MODEL_TYPES[model_type]}
    return config


def _generation(stated: Mapping[str, Any], config: Mapping[str, Any], name: str) -> GenerationDefaults:
    """generation_config.json, with the ids of config.json where it is silent."""

    def number(key: str, high: float) -> float | None:
        value = stated.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= high:
            raise ModelFileError(f"{name}: '{key}' of generation_config.json must be a number in 0..{high:g}")
        return float(value)

    def ids(key: str) -> tuple[int, ...]:
        value = stated.get(key) if stated.get(key) is not None else config.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        for token in values:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= MAX_TOKEN_ID:
                raise ModelFileError(f"{name}: '{key}' must be a token id or a list of them")
        return tuple(dict.fromkeys(values))

    begin, top_k = ids("bos_token_id"), number("top_k", MAX_TOKEN_ID)
    return GenerationDefaults(
        bos_token_id=begin[0] if begin else None,
        eos_token_ids=ids("eos_token_id"),
        temperature=number("temperature", 1e3),
        top_k=None if top_k is None else math.floor(top_k),
        top_p=number("top_p", 1.0),
        min_p=number("min_p", 1.0),
        repetition_penalty=number("repetition_penalty", 1e3),
    )
