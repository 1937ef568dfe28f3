"""Rotary frequencies against Hugging Face transformers 5.23 (`ROPE_INIT_FUNCTIONS`), printed to eight digits."""

from __future__ import annotations

import numpy as np
import pytest

from setpoint.models.spec import LinearScaling, Llama3Scaling, Rope, YarnScaling
from setpoint.runtime.cpu.rope import rope_frequencies

LINEAR = "0.25 0.079056941 0.025 0.0079056947 0.0024999999 0.00079056947 0.00025000001 7.9056947e-05"
LLAMA3 = """1.0 0.66360128 0.44036663 0.29222783 0.19392276 0.12868738 0.085397102 0.056669619 0.037606031 0.024955409
    0.016560441 0.010989529 0.0072926651 0.0048394212 0.0032114461 0.0013718937 0.00052484602 0.00017850779
    7.7846555e-05 5.165907e-05 3.4281024e-05 2.2748929e-05 1.5096218e-05 1.0017869e-05 6.6478697e-06 4.4115345e-06
    2.9274997e-06 1.9426925e-06 1.2891732e-06 8.5549692e-07 5.6770881e-07 3.7673226e-07"""
YARN = """1.0 0.56234133 0.31622776 0.17782794 0.1 0.050209042 0.02484647 0.012066896 0.0057142857 0.0026108704
    0.001129385 0.00044456986 0.00025000001 0.00014058533 7.9056947e-05 4.4456985e-05"""
YARN_FULL = "1.0 0.17782794 0.031622779 0.0056234132 0.00062500004 4.4456985e-05 7.9056936e-06 1.4058534e-06"


@pytest.mark.parametrize(
    ("rope", "head_dim", "expected", "factor"),
    [
        (Rope(10000.0, scaling=LinearScaling(4.0)), 16, LINEAR, 1.0),
        (Rope(500000.0, scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192)), 64, LLAMA3, 1.0),
        (Rope(10000.0, scaling=YarnScaling(4.0, 2048)), 32, YARN, 1.138629436111989),
        (Rope(1e6, scaling=YarnScaling(4.0, 32768, 16.0, 2.0, 1.25)), 16, YARN_FULL, 1.25),
    ],
    ids=["linear", "llama3", "yarn", "yarn with every field"],
)
def test_scaled_frequencies(rope: Rope, head_dim: int, expected: str, factor: float) -> None:
    frequencies, found = rope_frequencies(rope, head_dim)
    assert frequencies.dtype == np.float32
    assert frequencies.tolist() == pytest.approx([float(number) for number in expected.split()], rel=3e-7)
    assert found == pytest.approx(factor, rel=1e-12)


def test_only_the_leading_coordinates_turn() -> None:
    frequencies, factor = rope_frequencies(Rope(10000.0, dim=8), 64)
    assert frequencies.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001])
    assert factor == 1.0
