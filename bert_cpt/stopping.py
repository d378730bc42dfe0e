"""When a run must end: a signal, its time limit, a rank that died or hangs."""

import faulthandler
import logging
import math
import os
import signal
import subprocess
import threading
import time
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

logger = logging.getLogger("bert_cpt")

BEAT_SECONDS = 2.0
DEAD_SECONDS = 30.0  # without a beat, a rank is taken for dead
HANG_SECONDS = 1800.0  # without progress, a run is taken for hung
LOOK_SECONDS = 2.0  # between looks for the stop file


class StopSignal:
    """Whether this process was asked to stop: SIGTERM, SIGUSR1, SIGINT, or its time is nearly up.

    A second SIGINT ends the process at once. Where signals do not reach, a `stop_file` asks.

    Attributes:
        reason: what asked.
        margin_seconds: how long before the time limit to stop; what a step and a save take.
    """

    def __init__(self, max_seconds: int | None, stop_file: Path | None = None) -> None:
        self.stop_file = stop_file
        self.started = self._next_look = time.monotonic()
        self.deadline = self.started + min(max_seconds or math.inf, _slurm_seconds_left())
        self.margin_seconds = 0.0
        self.reason = "another rank"
        self._is_signalled = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._handle)

    def needs(self, seconds: float) -> None:
        """Stop at least this long before the time limit."""
        self.margin_seconds = max(self.margin_seconds, seconds)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._is_signalled = True
        self.reason = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @property
    def is_wanted(self) -> bool:
        """Asked by every rank before every step; one vote is enough to stop all."""
        if time.monotonic() > self.deadline - self.margin_seconds:
            self.reason = "the time limit"
            return True
        if self.stop_file is not None and time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + LOOK_SECONDS
            if self.stop_file.exists():
                self.reason = str(self.stop_file)
                self._is_signalled = True
        return self._is_signalled


def _slurm_seconds_left() -> float:
    """Seconds until Slurm ends this job, or no end.

    One rank asks, and its vote stops all: a thousand squeues at once would be no kindness.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job or os.environ.get("SLURM_PROCID", "0") != "0":
        return math.inf
    command = ["squeue", "-h", "-j", job, "-o", "%e"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return datetime.fromisoformat(answer.stdout.strip()).timestamp() - time.time()
    except (OSError, ValueError, subprocess.SubprocessError):  # N/A: no limit
        return math.inf


class Watchdog(threading.Thread):
    """Ends this process when another rank is dead or no rank makes progress.

    Every rank beats in the key-value store of the process group; the first rank watches all, the
    others watch the first one and its verdict. At a verdict every rank writes the stacks of its
    threads to its log and exits with 1, so that nobody waits in a collective for ever.
    """

    def __init__(self, run_dir: Path, rank: int, world_size: int) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.stacks = run_dir / "logs" / f"stacks_{rank:04d}.txt"
        self.rank, self.world_size = rank, world_size
        self._progress = time.monotonic()
        self._is_over = threading.Event()
        self._seen = dict.fromkeys(range(world_size), ("", time.monotonic()))

    def progress(self) -> None:
        """Called by the training loop whenever it gets something done."""
        self._progress = time.monotonic()

    def close(self) -> None:
        """The run has ended: nobody is missed any more."""
        self._is_over.set()
        # A thread that comes back from C++ while the interpreter ends would abort the process.
        self.join(2 * BEAT_SECONDS)

    def run(self) -> None:
        # A connection of its own: a get that waits must not block the training's.
        store: Any = dist.distributed_c10d._get_default_store()
        store = store.clone()
        beat = 0
        while not self._is_over.wait(BEAT_SECONDS):
            beat += 1
            try:
                store.set(f"beat/{self.rank}", str(beat))
                verdict = self._verdict(store)
            except (RuntimeError, ValueError):
                verdict = "the first rank cannot be reached"
            if verdict and not self._is_over.is_set():
                self._end(verdict)

    def _verdict(self, store: Any) -> str:
        if store.check(["verdict"]):
            return store.get("verdict").decode()
        idle = time.monotonic() - self._progress
        problem = ""
        if idle > HANG_SECONDS:
            problem = f"rank {self.rank} got nothing done for {idle:.0f} s"
        for rank in range(self.world_size) if self.rank == 0 else (0,):
            key, now = f"beat/{rank}", time.monotonic()
            value = store.get(key).decode() if store.check([key]) else ""
            if value != self._seen[rank][0]:
                self._seen[rank] = (value, now)
            elif now - self._seen[rank][1] > DEAD_SECONDS:
                problem = f"rank {rank} gave no sign of life for {DEAD_SECONDS:.0f} s"
        if problem:
            store.set("verdict", problem)
        return problem

    def _end(self, verdict: str) -> None:
        self.stacks.parent.mkdir(exist_ok=True)
        with open(self.stacks, "w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        logger.error("stopped: %s; the stacks of this rank are in %s", verdict, self.stacks)
        logging.shutdown()
        time.sleep(2 * BEAT_SECONDS if self.rank == 0 else 0)  # the store lives in the first rank
        os._exit(1)
