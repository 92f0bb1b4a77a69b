import pytest
from collector import Collector


@pytest.fixture(scope="module")
def collector():
    """An OpenTelemetry collector that listens."""
    running = Collector()
    yield running
    running.close()
