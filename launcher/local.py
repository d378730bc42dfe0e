"""Start the ranks of a run on this machine.

They are started here rather than by the deepspeed launcher, which kills the other ranks as soon as
one ends and reports success when a rank dies of a signal.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

GRACE_SECONDS = 15


def run_ranks(command: Sequence[str], num_ranks: int, *, grace_seconds: int = GRACE_SECONDS) -> int:
    """Run `command` once per rank and wait for all of them.

    SIGTERM, SIGUSR1 and SIGINT are passed on. When a rank fails, the others get `grace_seconds` to
    find out by themselves, then they are killed.

    Returns:
        0 if all ranks ended with 0; 2 or 85 if one said so; else 1.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    threads = str(max(1, (os.cpu_count() or 1) // num_ranks))
    environment = {"OMP_NUM_THREADS": threads, **os.environ, "WORLD_SIZE": str(num_ranks)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    with signals_to(forward):
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


@contextmanager
def signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle SIGTERM, SIGUSR1 and SIGINT, and afterwards as before."""
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def _wait(processes: list[subprocess.Popen[bytes]], grace_seconds: int) -> int:
    deadline = math.inf
    while None in [process.poll() for process in processes]:  # polls every one
        if any(process.returncode not in (None, 0, 85) for process in processes):
            deadline = min(deadline, time.monotonic() + grace_seconds)
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(0.05)
    codes = [process.returncode for process in processes]
    for rank, code in enumerate(codes):
        if code < 0 and -code != signal.SIGKILL:
            print(f"rank {rank} died of {signal.Signals(-code).name}", file=sys.stderr)
    if 2 in codes:  # a rank named bad input
        return 2
    return codes[0] if codes[0] in (0, 85) and len(set(codes)) == 1 else 1
