"""Parts: what one block of a build becomes, kept until the build is finished.

A part is a safetensors file, memory-mapped: tokens and sentence lengths of the block's documents in
the order of their keys, running totals that let any range of documents be cut out without a scan,
and the block's counts as metadata. Keys are a keyed hash of the document's place in the input when
documents are shuffled into shards; otherwise there is no order but the input's.
"""

import json
import mmap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numba import njit
from safetensors.numpy import save

from data_tools.files import write_aside
from data_tools.hashing import hash_keys

ARRAYS = {
    "tokens": None,  # uint16 or int32 [T]
    "sentence_lengths": np.int32,  # [S]
    "keys": np.uint64,  # [D], ascending when shuffled
    "sentence_ends": np.int64,  # [D] sentences up to and including document d
    "token_ends": np.int64,  # [D] tokens up to and including document d
}
_NUMPY_NAMES = {"U16": "<u2", "I32": "<i4", "U64": "<u8", "I64": "<i8"}


@dataclass
class Part:
    """The documents of one block."""

    tokens: np.ndarray
    sentence_lengths: np.ndarray
    keys: np.ndarray
    sentence_ends: np.ndarray
    token_ends: np.ndarray
    counts: Counter[str]

    @property
    def num_documents(self) -> int:
        return len(self.keys)

    @property
    def num_tokens(self) -> int:
        return int(self.token_ends[-1]) if len(self.token_ends) else 0

    def documents(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, sentence lengths, and sentences of each document, of documents [first, last)."""

        def run_of(ends: np.ndarray) -> slice:
            return slice(int(ends[first - 1]) if first else 0, int(ends[last - 1]) if last else 0)

        sentences = np.diff(
            self.sentence_ends[first:last], prepend=run_of(self.sentence_ends).start
        )
        return (
            self.tokens[run_of(self.token_ends)],
            self.sentence_lengths[run_of(self.sentence_ends)],
            sentences,
        )


def make_part(
    tokens: np.ndarray,
    sentence_lengths: np.ndarray,
    document_sentences: np.ndarray,
    counts: Counter[str],
    shuffle_key: int | None,
) -> Part:
    """Bring the documents of a block into the order of their keys.

    Args:
        tokens: uint16 or int32 [T].
        sentence_lengths: int32[S], all positive.
        document_sentences: int64[D], all positive.
        shuffle_key: a number of its own for this block and seed; None keeps the input's order.
    """
    sentence_ends = np.cumsum(document_sentences, dtype=np.int64)
    token_totals = np.concatenate(
        [np.zeros(1, np.int64), np.cumsum(sentence_lengths, dtype=np.int64)]
    )
    token_ends = token_totals[sentence_ends]
    if shuffle_key is None:
        keys = np.arange(len(document_sentences), dtype=np.uint64)
        return Part(tokens, sentence_lengths, keys, sentence_ends, token_ends, counts)
    keys = hash_keys(np.uint64(shuffle_key), len(document_sentences))
    order = np.argsort(keys, kind="stable")
    tokens = gather_runs(tokens, token_ends, order)
    sentence_lengths = gather_runs(sentence_lengths, sentence_ends, order)
    document_tokens = np.diff(token_ends, prepend=0)[order]
    return Part(
        tokens,
        sentence_lengths,
        keys[order],
        np.cumsum(document_sentences[order], dtype=np.int64),
        np.cumsum(document_tokens, dtype=np.int64),
        counts,
    )


def write_part(path: Path, part: Part) -> None:
    """Write a part whole or not at all."""
    arrays = {name: np.ascontiguousarray(getattr(part, name)) for name in ARRAYS}
    with write_aside(path) as file:
        file.write(save(arrays, {"counts": json.dumps(part.counts, sort_keys=True)}))


def open_part(path: Path) -> Part:
    """Map a part; nothing but its header is read."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    arrays = {}
    for name in ARRAYS:
        entry = header[name]
        (size,) = entry["shape"]
        offset = start + entry["data_offsets"][0]
        arrays[name] = np.frombuffer(data, _NUMPY_NAMES[entry["dtype"]], size, offset)
    counts = Counter(json.loads(header["__metadata__"]["counts"]))
    return Part(**arrays, counts=counts)


@njit(cache=True, nogil=True)
def gather_runs(values, ends, order):
    """Runs of `values` (run r ends before ends[r]) in a new order, back to back."""
    result = np.empty_like(values)
    target = 0
    for run in order:
        source = ends[run - 1] if run else 0
        while source < ends[run]:
            result[target] = values[source]
            source += 1
            target += 1
    return result
