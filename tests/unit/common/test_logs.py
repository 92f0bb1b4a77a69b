import subprocess
import sys


def test_logs_leave_stdout_alone_where_nothing_was_set_up():
    program = "from penstock.common.logs import logger; logger().info('said'); print('told')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "told\n"
    assert "said" in done.stderr
