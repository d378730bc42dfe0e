"""Files that appear whole or not at all: written aside, synced, renamed."""

import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def write_aside(path: Path) -> Iterator[BinaryIO]:
    """Open a file beside `path`; on success it is synced and renamed to `path`, else removed."""
    # Not the process id: two hosts may write to one directory.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def remove_leftovers(directory: Path) -> None:
    """Remove what killed writers left in `directory`; nobody may be writing there."""
    for path in directory.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole or not at all."""
    with write_aside(path) as file:
        file.write(text.encode())


def sync(path: Path) -> None:
    """Make a file's content, or the renames in a directory, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
