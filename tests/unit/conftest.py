"""`pytest tests/unit --hypothesis-profile=nightly` searches a hundred times as long."""

from hypothesis import settings

settings.register_profile("nightly", max_examples=10_000, deadline=None)
