"""Start the ranks of a run on this machine, or on the hosts of a hostfile.

On one machine the processes are started here rather than by the deepspeed launcher, which kills the
other ranks as soon as one ends and reports success when a rank dies of a signal.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

GRACE_SECONDS = 15


def run_ranks(command: Sequence[str], num_ranks: int, *, grace_seconds: int = GRACE_SECONDS) -> int:
    """Run `command` once per rank and wait for all of them.

    SIGTERM, SIGUSR1 and SIGINT are passed on. When a rank fails, the others get `grace_seconds` to
    find out by themselves, then they are killed.

    Returns:
        0 if all ranks ended with 0; 2 or 85 if one said so; else 1.
    """
    port = str(_free_port())
    environment = dict(os.environ) | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(num_ranks),
    }
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    previous = {
        number: signal.signal(number, forward)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    try:
        for rank in range(num_ranks):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A session of its own: a Ctrl-C reaches each rank once, through `forward`.
            processes.append(
                subprocess.Popen(command, env=environment | ranks, start_new_session=True)
            )
        return _wait(processes, grace_seconds)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen[bytes]], grace_seconds: int) -> int:
    deadline = None
    while any(process.poll() is None for process in processes):
        failed = [p.returncode for p in processes if p.returncode not in (None, 0, 85)]
        if failed and deadline is None:
            deadline = time.monotonic() + grace_seconds
        if deadline is not None and time.monotonic() > deadline:
            for process in processes:
                if process.poll() is None:
                    process.kill()
        time.sleep(0.05)
    codes = [process.returncode for process in processes]
    for rank, code in enumerate(codes):
        if code < 0 and -code != signal.SIGKILL:
            print(f"rank {rank} died of {signal.Signals(-code).name}", file=sys.stderr)
    if all(code == 0 for code in codes):
        return 0
    return next((code for code in (2, 85) if code in codes and _agree(codes, code)), 1)


def _agree(codes: list[int], code: int) -> bool:
    """85 counts only if every rank saved; 2 if any rank named bad input."""
    return code == 2 or all(each == code for each in codes)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
