"""From a config to a model: the one table of families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from setpoint.errors import UnsupportedModelError
from setpoint.models import gemma3, llama, qwen2, qwen3
from setpoint.models.spec import Family, Model

FAMILIES: tuple[Family, ...] = (llama.FAMILY, qwen2.FAMILY, qwen3.FAMILY, gemma3.FAMILY)


def find_family(model_type: str) -> Family:
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise UnsupportedModelError(f"model family '{model_type[:64]}' is not supported; supported: {supported}")


def build_model(config: Mapping[str, Any]) -> Model:
    """The layer tree of a Hugging Face config; raises UnsupportedModelError or ModelFileError naming the field."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedModelError("config has no 'model_type'")
    return find_family(model_type).build(config)
