"""Process namespaces: everything in one ends with it, and it ends with this process."""

import subprocess
import time
from pathlib import Path


def start_namespace(*arguments: str) -> subprocess.Popen[bytes]:
    """`unshare --pid ARGUMENTS`, killed by the kernel when this process dies."""
    tied = ["setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child"]
    return subprocess.Popen([*tied, *arguments])


def init_of(namespace: subprocess.Popen[bytes]) -> int:
    """The number, seen from outside, of the process that is number 1 inside."""
    children = Path(f"/proc/{namespace.pid}/task/{namespace.pid}/children")
    deadline = time.monotonic() + 10
    while not (numbers := children.read_text().split()):
        assert time.monotonic() < deadline, "the namespace did not start"
        time.sleep(0.02)
    return int(numbers[0])
