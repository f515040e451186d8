import os
import signal
import subprocess
import sys
import time

import pytest

PARENT = """
import subprocess, sys
from raymill.inference.orphans import Guard
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], stdout=subprocess.DEVNULL)
guard = Guard([child.pid])
if sys.argv[1] == "closed":
    guard.close()
print(child.pid, flush=True)
sys.stdin.read()
"""


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 - a path would be no clearer
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
@pytest.mark.parametrize("guard", ["open", "closed"])
def test_what_is_guarded_ends_with_a_process_that_is_killed(guard):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, guard], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    time.sleep(0.3)  # the guard is a process too, and has to start
    assert is_running(child)
    parent.kill()
    parent.communicate()
    until = time.monotonic() + (5 if guard == "open" else 0.5)
    while is_running(child) and time.monotonic() < until:
        time.sleep(0.02)
    try:
        assert is_running(child) == (guard == "closed")
    finally:
        if is_running(child):
            os.kill(child, signal.SIGKILL)
