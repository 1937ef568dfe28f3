"""`pytest tests/unit --hypothesis-profile=nightly` searches a hundred times as long."""

from hypothesis import HealthCheck, settings

# A machine that others use may be ten times as slow for a minute: that is no fault of the code under test.
_PATIENT = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

settings.register_profile("patient", **_PATIENT)
settings.register_profile("nightly", max_examples=10_000, **_PATIENT)
settings.load_profile("patient")
