import os
import signal
from pathlib import Path

import pytest

from penstock.cli.grpc_threads import with_fewer_threads
from penstock.common.logs import logger

# As in the services' own processes; gRPC reads it when the first test imports it.
os.environ.update(with_fewer_threads(os.environ))

# Where there is no device, Triton's kernels run on the processor. Triton reads this once, when the first library imports it.
if not (Path("/dev/kfd").exists() or any(Path("/dev").glob("nvidia[0-9]*"))):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Who is started in the background by a shell without job control ignores Ctrl-C, and hands that on to what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before the first test that captures what is logged: what that restores is otherwise structlog's own default, which is stdout.
logger()


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory):
    """What starts keep between them, and the doors of clusters, stay apart from the user's own, and from other runs'. Processes that
    tests start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
        yield
