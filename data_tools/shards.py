r"""Shards: the byte layout, its reader and writer, and the manifest that vouches for them.

A shard is a pair of files, byte-compatible with Megatron-LM's indexed dataset.

`.bin`: the token ids of all sentences back to back, little-endian uint16 when the vocabulary has
fewer than 65,500 entries, else int32; no special tokens, no padding.

`.idx`, little-endian, unaligned:

    offset    content
    0         9 bytes "MMIDIDX\0\0"
    9         u64 version 1
    17        u8 dtype code: 4 int32, 8 uint16
    18        u64 S, number of sentences
    26        u64 D, number of documents + 1
    34        int32[S] sentence lengths in tokens
    34+4S     int64[S] byte offset of each sentence in .bin
    34+12S    int64[D] document d = sentences [idx[d], idx[d+1])

`manifest.json` beside them names every file with size and SHA-256, the tokenizer, and a count for
every kind of thing skipped, cut or replaced. A directory without a manifest is no corpus.
"""

import hashlib
import mmap
import os
import struct
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_tools.errors import UserError
from data_tools.files import sha256_of, write_aside, write_text
from data_tools.tokenizer import BulkTokenizer, load_tokenizer

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 8: np.dtype("<u2")}
CODES = {dtype: code for code, dtype in DTYPES.items()}
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
MANIFEST_VERSION = 1
MAX_SENTENCE_TOKENS = 65_535
Run = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Some documents: token ids, sentence lengths in tokens, sentences of each document."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenizerIdentity(_Strict):
    identity: str
    vocab_size: int
    name: str


class SourceRecord(_Strict):
    path: str
    num_bytes: int
    num_documents: int


class ShardRecord(_Strict):
    # A plain file name: a manifest cannot point outside its directory.
    name: str = Field(pattern=r"^[^./\\][^/\\]*$")
    num_documents: int
    num_sentences: int
    num_tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str


class Manifest(_Strict):
    """What a directory of shards holds, and what was lost or changed on the way."""

    format: str = "bert-cpt shards"
    version: int = MANIFEST_VERSION
    tokenizer: TokenizerIdentity
    num_documents: int
    num_sentences: int
    num_tokens: int
    has_special_tokens: bool = False
    options: dict[str, str | int | bool | None]
    counts: dict[str, int]
    sources: list[SourceRecord]
    shards: list[ShardRecord]


class Shard:
    """One `.bin`/`.idx` pair, memory-mapped, read-only.

    Attributes:
        tokens: uint16 or int32 [num_tokens].
        sentence_lengths: int32[S], in tokens.
        sentence_offsets: int64[S], in bytes of `.bin`.
        document_index: int64[D]: document d is sentences [document_index[d], document_index[d+1]).
    """

    def __init__(self, prefix: Path) -> None:
        """Map PREFIX.bin and PREFIX.idx; raises UserError if sizes and header disagree."""
        self.prefix = prefix
        index = _map_file(prefix.with_name(prefix.name + ".idx"))
        if len(index) < HEADER.size:
            raise UserError(f"{prefix}.idx: {len(index)} bytes, shorter than the 34-byte header")
        magic, version, code, num_sentences, num_index = HEADER.unpack_from(index)
        if magic != MAGIC or version != 1 or code not in DTYPES:
            raise UserError(
                f"{prefix}.idx: not a sentence index (magic {magic!r}, version {version}, "
                f"dtype code {code}); expected {MAGIC!r}, 1, and 4 or 8"
            )
        expected = HEADER.size + 12 * num_sentences + 8 * num_index
        if len(index) != expected or num_index == 0:
            raise UserError(
                f"{prefix}.idx: {len(index)} bytes, but its header asks for {expected}; the file "
                f"is truncated or damaged: restore it or shard the corpus again"
            )
        at = HEADER.size
        self.sentence_lengths = np.frombuffer(index, "<i4", num_sentences, at)
        at += 4 * num_sentences
        self.sentence_offsets = np.frombuffer(index, "<i8", num_sentences, at)
        at += 8 * num_sentences
        self.document_index = np.frombuffer(index, "<i8", num_index, at)
        data = _map_file(prefix.with_name(prefix.name + ".bin"))
        self.dtype = DTYPES[code]
        end = 0
        if num_sentences:
            end = int(self.sentence_offsets[-1])
            end += int(self.sentence_lengths[-1]) * self.dtype.itemsize
        if len(data) != end:
            raise UserError(
                f"{prefix}.bin: {len(data)} bytes, but its index ends at byte {end}; the file is "
                f"truncated or damaged: restore it or shard the corpus again"
            )
        self.tokens = np.frombuffer(data, self.dtype, end // self.dtype.itemsize)

    @property
    def num_sentences(self) -> int:
        return len(self.sentence_lengths)

    @property
    def num_documents(self) -> int:
        return len(self.document_index) - 1

    def sentence(self, index: int) -> np.ndarray:
        """Token ids of one sentence."""
        start = self.token_start(index)
        return self.tokens[start : start + int(self.sentence_lengths[index])]

    def documents(self, first: int, last: int) -> Run:
        """Documents [first, last)."""
        start, stop = (int(self.document_index[document]) for document in (first, last))
        tokens = slice(*(self.token_start(sentence) for sentence in (start, stop)))
        lengths = self.sentence_lengths[start:stop]
        return self.tokens[tokens], lengths, np.diff(self.document_index[first : last + 1])

    def token_start(self, sentence: int) -> int:
        """Where a sentence begins in `tokens`; their number for the sentence after the last."""
        if sentence == self.num_sentences:
            return len(self.tokens)
        return int(self.sentence_offsets[sentence]) // self.dtype.itemsize

    def check_structure(self) -> None:
        """Check every length, offset and document bound; raises UserError naming the damage."""
        longest = int(self.sentence_lengths.max(initial=0))
        if longest > MAX_SENTENCE_TOKENS:
            raise UserError(
                f"{self.prefix}: a sentence of {longest} tokens; at most {MAX_SENTENCE_TOKENS} are "
                f"possible: shard the text with `bert-cpt shard`, which cuts them"
            )
        sentence, document = _first_damage(
            self.sentence_lengths, self.sentence_offsets, self.document_index, self.dtype.itemsize
        )
        if sentence >= 0:
            raise UserError(
                f"{self.prefix}.idx: sentence {sentence} has length "
                f"{self.sentence_lengths[sentence]} at byte {self.sentence_offsets[sentence]}, "
                f"which does not follow from the one before: the index is damaged"
            )
        if document >= 0:
            raise UserError(
                f"{self.prefix}.idx: document {document} ends at sentence "
                f"{self.document_index[min(document + 1, self.num_documents)]} of "
                f"{self.num_sentences}: the index is damaged"
            )

    def check_ids(self, vocab_size: int) -> None:
        """Raise UserError if an id is outside a vocabulary."""
        least, most = self.tokens.min(initial=0), self.tokens.max(initial=0)
        if least < 0 or most >= vocab_size:
            raise UserError(
                f"{self.prefix}.bin: holds token ids from {least} to {most}, but the tokenizer has "
                f"{vocab_size} entries: it is damaged, or made with another --tokenizer"
            )


class ShardSet:
    """All shards of a directory with their manifest and tokenizer."""

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self.shards = [Shard(directory / record.name) for record in manifest.shards]
        for shard, record in zip(self.shards, manifest.shards, strict=True):
            found = (shard.num_sentences, shard.num_documents, len(shard.tokens))
            stated = (record.num_sentences, record.num_documents, record.num_tokens)
            if found != stated:
                raise UserError(
                    f"{shard.prefix}: {found} sentences, documents and tokens, but the manifest "
                    f"says {stated}: manifest and shard do not belong together"
                )

    @cached_property
    def tokenizer(self) -> BulkTokenizer:
        return load_tokenizer(self.directory / TOKENIZER)


def open_shards(directory: Path | str) -> ShardSet:
    """Open a directory of shards; sizes and headers are checked, hashes are not (see `verify`).

    Raises:
        UserError: no manifest, or files and manifest disagree.
    """
    directory = Path(directory)
    return ShardSet(directory, read_manifest(directory))


def read_manifest(directory: Path) -> Manifest:
    """Read DIR/manifest.json; raises UserError if it is absent or malformed."""
    path = directory / MANIFEST
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; expected one written by `bert-cpt shard`")
    if not path.is_file():
        hint = "run the same `bert-cpt shard` command again to finish it"
        if not (directory / ".build").is_dir():
            hint = "expected a directory written by `bert-cpt shard`"
        raise UserError(f"{directory}: holds no {MANIFEST}; {hint}")
    try:
        manifest = Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a manifest of shards: {error}") from error
    if manifest.version != MANIFEST_VERSION:
        raise UserError(f"{path}: version {manifest.version}, expected {MANIFEST_VERSION}")
    return manifest


def write_corpus(
    directory: Path,
    tokenizer: BulkTokenizer,
    tokenizer_name: str,
    records: list[ShardRecord],
    sources: list[SourceRecord],
    *,
    counts: dict[str, int],
    options: dict[str, str | int | bool | None],
    has_special_tokens: bool = False,
) -> Manifest:
    """Write DIR/tokenizer.json and DIR/manifest.json, the same bytes for the same content."""
    manifest = Manifest(
        tokenizer=TokenizerIdentity(
            identity=tokenizer.identity, vocab_size=tokenizer.vocab_size, name=tokenizer_name
        ),
        num_documents=sum(record.num_documents for record in records),
        num_sentences=sum(record.num_sentences for record in records),
        num_tokens=sum(record.num_tokens for record in records),
        has_special_tokens=has_special_tokens,
        options=options,
        counts=counts,
        sources=sources,
        shards=records,
    )
    write_text(directory / TOKENIZER, tokenizer.definition)
    write_text(directory / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    return manifest


def write_shard(prefix: Path, runs: Iterable[Run], dtype: np.dtype) -> ShardRecord:
    """Write PREFIX.bin and PREFIX.idx.

    Args:
        runs: all documents, in order.
        dtype: uint16 or int32.
    """
    dtype = np.dtype(dtype).newbyteorder("<")
    digest = hashlib.sha256()
    bin_bytes = 0
    lengths = [np.zeros(0, "<i4")]
    sentences = [np.zeros(1, "<i8")]
    with write_aside(prefix.with_name(prefix.name + ".bin")) as file:
        for tokens, sentence_lengths, document_sentences in runs:
            data = np.ascontiguousarray(tokens, dtype).view(np.uint8).data
            digest.update(data)
            file.write(data)
            bin_bytes += len(data)
            lengths.append(sentence_lengths.astype("<i4"))
            sentences.append(document_sentences.astype("<i8"))
    sizes = np.concatenate(lengths)
    ends = np.cumsum(sizes, dtype="<i8") * dtype.itemsize
    documents = np.cumsum(np.concatenate(sentences), dtype="<i8")
    assert (ends[-1] if len(ends) else 0) == bin_bytes, "sentence lengths are not the tokens'"
    assert documents[-1] == len(sizes), "documents do not add up to the sentences"
    header = HEADER.pack(MAGIC, 1, CODES[dtype], len(sizes), len(documents))
    offsets = ends - sizes * np.int64(dtype.itemsize)
    content = b"".join((header, sizes.tobytes(), offsets.tobytes(), documents.tobytes()))
    with write_aside(prefix.with_name(prefix.name + ".idx")) as file:
        file.write(content)
    idx_sha256 = hashlib.sha256(content).hexdigest()
    return describe_shard(prefix, bin_sha256=digest.hexdigest(), idx_sha256=idx_sha256)


def describe_shard(prefix: Path, *, bin_sha256: str = "", idx_sha256: str = "") -> ShardRecord:
    """The manifest record of a shard that is there; digests not given are computed."""
    shard = Shard(prefix)
    bin_path, idx_path = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx"))
    return ShardRecord(
        name=prefix.name,
        num_documents=shard.num_documents,
        num_sentences=shard.num_sentences,
        num_tokens=len(shard.tokens),
        bin_bytes=bin_path.stat().st_size,
        idx_bytes=idx_path.stat().st_size,
        bin_sha256=bin_sha256 or sha256_of(bin_path),
        idx_sha256=idx_sha256 or sha256_of(idx_path),
    )


def _map_file(path: Path) -> mmap.mmap | bytes:
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                return b""  # an empty file cannot be mapped
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; restore it or shard the corpus again") from error


@njit(cache=True, nogil=True)
def _first_damage(lengths, offsets, documents, itemsize):
    """(sentence, document) of the first contradiction in an index, -1 where there is none."""
    expected = 0
    for sentence in range(len(lengths)):
        if lengths[sentence] <= 0 or offsets[sentence] != expected:
            return sentence, -1
        expected += lengths[sentence] * itemsize
    if documents[0] != 0 or documents[-1] != len(lengths):
        return -1, len(documents) - 1
    for document in range(len(documents) - 1):
        if documents[document + 1] < documents[document]:
            return -1, document
    return -1, -1
