"""Fixtures of these tests, and how many examples a property is tried with."""

from hypothesis import HealthCheck, settings

from tests.processes import one_thread  # noqa: F401


def pytest_configure(config):
    settings.register_profile(
        "fastsd",
        max_examples=400 if config.getoption("full") else 25,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("fastsd")
