"""Model families as data: one file an architecture, one table to find them."""

from setpoint.models.registry import FAMILIES, build_model, find_family

__all__ = ["FAMILIES", "build_model", "find_family"]
