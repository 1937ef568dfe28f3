"""Qwen3: Llama with a norm on every query and key head, and no biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from setpoint.models import fields, llama
from setpoint.models.spec import Family, Model, Repeat, RMSNorm


def build(config: Mapping[str, Any]) -> Model:
    plain = llama.build({**config, "head_dim": fields.integer(config, "head_dim", 2, fields.MAX_HEAD_DIM, default=128)})
    norms = (RMSNorm("self_attn.q_norm", plain.norm.eps), RMSNorm("self_attn.k_norm", plain.norm.eps))
    layers = tuple(replace(block, attention=replace(block.attention, qk_norm=norms)) for block in plain.layers.layers)
    return replace(plain, layers=Repeat(plain.layers.name, layers))


FAMILY = Family("qwen3", ("qwen3",), build)
