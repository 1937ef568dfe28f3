"""Measuring, and later choosing: probe, simulate, replay, search, certify."""
