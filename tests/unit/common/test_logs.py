import json
import subprocess
import sys
from pathlib import Path


def test_logs_leave_stdout_alone_where_nothing_was_set_up():
    program = "from penstock.common.logs import logger; logger().info('said'); print('told')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "told\n"
    assert "said" in done.stderr


def test_every_line_of_json_tells_its_service_and_process_also_from_threads_and_of_libraries():
    program = """
import logging, threading, warnings
from penstock.common import logs
logs.configure("executor", "info", "json", "decode-1")
threading.Thread(target=lambda: logs.logger().info("said", step=1)).start()
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("library").exception("a library's %s", "trouble")
warnings.warn("old", DeprecationWarning, stacklevel=1)
"""
    done = subprocess.run([sys.executable, "-W", "default", "-c", program], capture_output=True, text=True, check=True)
    said, library, warned = sorted(map(json.loads, done.stderr.splitlines()), key=lambda line: line.get("logger", ""))
    assert (said["event"], said["step"], said["level"]) == ("said", 1, "info")
    assert (library["event"], library["logger"], library["level"]) == ("a library's trouble", "library", "error")
    assert "ZeroDivisionError" in library["exception"]
    assert "DeprecationWarning: old" in warned["event"]
    for line in (said, library, warned):
        assert (line["service"], line["process"]) == ("executor", "decode-1")
        assert line["timestamp"].endswith("Z")


def test_a_log_that_can_not_be_written_stops_nobody():
    program = """
from penstock.common import logs
logs.configure("gateway", "info", "json")
logs.logger().info("said")
print("went on")
"""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, text=True, check=False)
    assert done.stdout == "went on\n"
