"""The run directory: one run at a time in it, a record of what it ran on, and how it ended."""

import fcntl
import json
import logging
import os
import platform
import re
import secrets
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch

from data_tools.errors import UserError
from data_tools.files import write_text

logger = logging.getLogger("bert_cpt")

PACKAGES = ("bert-cpt", "torch", "deepspeed", "transformers", "tokenizers", "numba", "wandb")
LOCK = ".lock"
OUTCOME = "outcome.json"
LAUNCH_ID = "BERT_CPT_LAUNCH"  # set by a launcher that wants to know its run again
SHARED_WAIT_SECONDS = 60  # network file systems show a new file late

_locks: list[tuple[Path, IO[str]]] = []  # open while the run lasts


def lock_run_dir(run_dir: Path) -> str:
    """Create the run directory and keep others out of it; the kernel drops the lock with us.

    Returns:
        What now stands in the lock file, for other ranks to see that it is the same directory.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = open(run_dir / LOCK, "a", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"run.output_dir={run_dir}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(
            f"run.output_dir={run_dir}: another run is using it; wait for it, or choose another one"
        ) from error
    except OSError as error:  # a file system without locks
        logger.warning("run.output_dir=%s cannot be locked (%s)", run_dir, error.strerror)
    mark = secrets.token_hex(8)
    file.truncate(0)
    file.write(mark)
    file.flush()
    _locks.append((run_dir, file))
    for leftover in (OUTCOME, "stop"):
        (run_dir / leftover).unlink(missing_ok=True)
    return mark


def check_shared(run_dir: Path, mark: str) -> None:
    """Raise UserError if this node sees another directory than the one that was locked."""
    deadline = time.monotonic() + SHARED_WAIT_SECONDS
    while not (run_dir / LOCK).is_file() or (run_dir / LOCK).read_text() != mark:
        if time.monotonic() > deadline:
            raise UserError(
                f"run.output_dir={run_dir}: not the directory that the first rank writes to; it "
                f"must be on a file system that all nodes share"
            )
        time.sleep(0.2)


def release_run_dirs(exit_code: int) -> None:
    """Say how the run ended and let others in again."""
    while _locks:
        run_dir, file = _locks.pop()
        content = {"exit_code": exit_code, "launch": os.environ.get(LAUNCH_ID)}
        try:
            write_text(run_dir / OUTCOME, json.dumps(content) + "\n")
        except OSError as error:
            logger.error("%s cannot be written: %s", run_dir / OUTCOME, error)
        file.close()


def read_outcome(run_dir: Path, launch: str) -> int | None:
    """The exit code that the first rank of a launch left; None if it could not."""
    try:
        content = json.loads((run_dir / OUTCOME).read_text())
        return int(content["exit_code"]) if content["launch"] == launch else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_environment(run_dir: Path, ranks: list[Any]) -> None:
    """Record versions, hardware, commit, command line; no environment variables, so no secrets."""
    content = {
        "command": without_secrets(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "cuda": torch.version.cuda,
        "packages": package_versions(),
        "git_commit": _git_commit(),
        "ranks": ranks,
    }
    write_text(run_dir / "environment.json", json.dumps(content, indent=1) + "\n")


def without_secrets(arguments: list[str]) -> list[str]:
    """A command line with everything that looks like a key or a password replaced by ***."""
    named = re.compile(r"(?i)((?:key|token|secret|passw(?:or)?d|credentials?)\"?\s*[=:]\s*).+")
    shaped = re.compile(
        r"\b(?:hf_|sk-|ghp_|github_pat_|wandb_v1_)\w{8,}|\b[0-9a-f]{40}\b|//[^/@\s]+@"
    )
    return [shaped.sub("***", named.sub(r"\1***", argument)) for argument in arguments]


def package_versions() -> dict[str, str | None]:
    """Versions of the packages that matter; None where one is not installed."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _git_commit() -> str | None:
    """The commit of this source, "-dirty" if it was changed; None outside its own repository."""
    answer = ""
    for command in (f"ls-files --error-unmatch {Path(__file__).name}", "describe --always --dirty"):
        words = ["git", "-C", str(Path(__file__).parent), *command.split()]
        try:
            answer = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return None
    return answer.strip()
