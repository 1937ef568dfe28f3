"""Rotary frequencies from a rope spec; rounded to float32 where Hugging Face rounds, so that angles agree."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from setpoint.models.spec import LinearScaling, Llama3Scaling, Rope, YarnScaling

Frequencies = NDArray[np.float32]


def rope_frequencies(rope: Rope, head_dim: int) -> tuple[Frequencies, float]:
    """Angles per position of the dim/2 coordinate pairs, and the factor that cos and sin are multiplied with."""
    dim = rope.dim or head_dim
    exponents = (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)).astype(np.float64)
    periods = (rope.theta**exponents).astype(np.float32)
    frequencies = np.float32(1) / periods
    match rope.scaling:
        case None:
            return frequencies, 1.0
        case LinearScaling(factor):
            return frequencies / np.float32(factor), 1.0
        case Llama3Scaling() as scaling:
            return _llama3(frequencies, scaling), 1.0
        case YarnScaling() as scaling:
            return _yarn(periods, rope.theta, dim, scaling)


def _llama3(frequencies: Frequencies, scaling: Llama3Scaling) -> Frequencies:
    """Long wavelengths are stretched by `factor`, short ones kept, the middle blended."""
    wavelengths = 2 * math.pi / frequencies.astype(np.float64)
    low = scaling.original_max_position / scaling.low_freq_factor
    high = scaling.original_max_position / scaling.high_freq_factor
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth = (scaling.original_max_position / wavelengths - scaling.low_freq_factor) / (span or 1.0)
    blended = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    stretched = np.where(wavelengths > low, frequencies / scaling.factor, frequencies)
    return np.where((wavelengths >= high) & (wavelengths <= low), blended, stretched).astype(np.float32)


def _yarn(periods: Frequencies, theta: float, dim: int, scaling: YarnScaling) -> tuple[Frequencies, float]:
    """arXiv 2309.00071: fast rotations kept, slow ones interpolated, a ramp over the coordinates between."""

    def coordinate(rotations: float) -> float:  # that turns so often over the original context
        return dim * math.log(scaling.original_max_position / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(coordinate(scaling.beta_fast)), 0)
    high = min(math.ceil(coordinate(scaling.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0, 1)
    frequencies = (ramp / (scaling.factor * periods) + (1 - ramp) / periods).astype(np.float32)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return frequencies, factor
