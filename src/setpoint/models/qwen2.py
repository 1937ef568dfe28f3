"""Qwen2 and Qwen2.5: Llama with a bias on q, k and v."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from setpoint.models import llama
from setpoint.models.spec import Family, Model, Repeat


def build(config: Mapping[str, Any]) -> Model:
    plain = llama.build({**config, "attention_bias": False})
    layers = tuple(
        replace(block, attention=replace(block.attention, bias=("q_proj", "k_proj", "v_proj")))
        for block in plain.layers.layers
    )
    return replace(plain, layers=Repeat(plain.layers.name, layers))


FAMILY = Family("qwen2", ("qwen2",), build)
