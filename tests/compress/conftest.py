"""Fixtures of these tests, and how many examples a property is tried with."""

from hypothesis import HealthCheck, Phase, settings

from tests.fixtures import no_gradients, one_thread  # noqa: F401


def pytest_configure(config):
    is_full = config.getoption("full")
    settings.register_profile(
        "fastsd",
        max_examples=200 if is_full else 20,
        phases=[Phase.explicit, Phase.generate, *[Phase.shrink] * is_full],  # to shrink takes minutes
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
    settings.load_profile("fastsd")
