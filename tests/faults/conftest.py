import pytest
from suite import Suite


@pytest.fixture(scope="module")
def suite():
    # One sequence at a time, so that a second request waits. What is killed is started again without much ado.
    with Suite("builtin", "--dtype", "f32", "--max-batch-size", "8", "--healthy-seconds", "0") as running:
        yield running
        assert running.stop() == 0
