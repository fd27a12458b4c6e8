"""What pytest must know of these drills."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: takes time that `make test` does not have")
