"""One block of text becomes one part: documents, sentences, ids, counts."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np

from data_tools import readers
from data_tools.hashing import derive_key
from data_tools.parts import Part, make_part, write_part
from data_tools.plan import Plan, part_path, stream
from data_tools.readers import Block
from data_tools.sentences import make_splitter
from data_tools.shards import TOKENIZER
from data_tools.sources import Policy, Source
from data_tools.tokenizer import load_tokenizer

CHECKED_LINES = 32  # of each block, compared with `tokenizers`


class BlockWorker:
    """Turns blocks into parts; one in each process."""

    def __init__(self, plan: Plan, work: Path) -> None:
        self.plan = plan
        self.work = work
        self.tokenizer = load_tokenizer(work / TOKENIZER)
        self.split = make_splitter(plan.options.splitter, plan.options.language)

    def run(self, task: Block | int) -> tuple[int, Counter[str]]:
        """Write the part of a block, or those of a whole source; returns (raw bytes, counts)."""
        if isinstance(task, Block):
            return task.num_bytes, self._run_block(task)
        num_bytes, counts = 0, Counter[str]()
        for block in stream(self.plan, self.work, task):
            if not part_path(self.work, task, block.index).exists():
                num_bytes += block.num_bytes
                counts += self._run_block(block)
        return num_bytes, counts

    def _run_block(self, block: Block) -> Counter[str]:
        options = self.plan.options
        source = self.plan.sources[block.source_index]
        policy = Policy(options.on_error, Counter())
        if block.payload is None:
            block = readers.read_block(
                source, block.source_index, block.index, options.block_bytes, policy
            )
        part = self._make_part(block, source, policy)
        write_part(part_path(self.work, block.source_index, block.index), part)
        return part.counts

    def _make_part(self, block: Block, source: Source, policy: Policy) -> Part:
        options, counts = self.plan.options, policy.counts
        counts["documents_cut"] += bool(block.is_cut and block.payload)
        if source.format == "sentences":
            text = readers.clean_lines(block, source, policy)
            tokens, lengths = self._encode(text)
            is_blank = _blank_lines(text, lengths)
            lengths, document_lines = lengths[~is_blank], _runs_between(is_blank)
            counts["documents_read"] += len(document_lines)
        else:
            text, document_lines = self._sentence_lines(block, source, policy)
            tokens, lengths = self._encode(text)
        counts["sentences_without_tokens"] += int((lengths == 0).sum())
        document_sentences = _filled_lines(lengths, document_lines)
        is_empty = document_sentences == 0
        counts["documents_without_tokens"] += int(is_empty.sum())
        lengths, document_sentences = lengths[lengths > 0], document_sentences[~is_empty]
        lengths, document_sentences = self._cut_long(tokens, lengths, document_sentences, counts)
        counts["documents_written"] += len(document_sentences)
        counts["sentences"] += len(lengths)
        counts["tokens"] += len(tokens)
        counts["text_bytes"] += len(text)
        key = None
        if options.shuffle_seed is not None:
            key = int(derive_key(options.shuffle_seed, block.source_index, block.index))
        counts = +counts  # without zeros
        return make_part(tokens, lengths, document_sentences, counts, key)

    def _encode(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        tokens, lengths = self.tokenizer.encode_lines(text)
        if not self.tokenizer.slow_reason:
            self.tokenizer.check(text, tokens, lengths, CHECKED_LINES)
        return tokens, lengths

    def _sentence_lines(
        self, block: Block, source: Source, policy: Policy
    ) -> tuple[bytes, np.ndarray]:
        """Text with one sentence a line, and the number of lines of each document."""
        texts = []
        document_lines = []
        for document in readers.documents_of(block, source, self.plan.options.text_field, policy):
            if isinstance(document, list):
                lines = [_on_one_line(sentence) for sentence in document]
            else:
                lines = []
                for paragraph in document.replace("\r", "\n").split("\n"):
                    if paragraph and not paragraph.isspace():
                        lines += self.split(paragraph, policy.counts)
            lines = [line for line in lines if line and not line.isspace()]
            document_lines.append(len(lines))
            # Encoded one by one: a rare character makes the text it stands in four times as large.
            texts.append("\n".join([*lines, ""]).encode())
        return b"".join(texts), np.array(document_lines, np.int64)

    def _cut_long(
        self, tokens: np.ndarray, lengths: np.ndarray, documents: np.ndarray, counts: Counter[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cut sentences over the limit at word boundaries."""
        limit = self.plan.options.max_sentence_tokens
        long = np.flatnonzero(lengths > limit)
        if not len(long):
            return lengths, documents
        counts["sentences_cut"] += len(long)
        ends = np.cumsum(lengths, dtype=np.int64)
        pieces = [
            _cut_at_words(self.tokenizer.is_continuation[tokens[end - length : end]], limit)
            for end, length in zip(ends[long].tolist(), lengths[long].tolist(), strict=True)
        ]
        num_pieces = np.ones(len(lengths), np.int64)
        num_pieces[long] = [len(sizes) for sizes in pieces]
        flat = np.repeat(lengths, num_pieces)
        flat[np.repeat(lengths > limit, num_pieces)] = list(itertools.chain.from_iterable(pieces))
        owner = np.searchsorted(np.cumsum(documents), long, "right")
        return flat, documents + np.bincount(owner, num_pieces[long] - 1, len(documents)).astype(
            np.int64
        )


def _on_one_line(sentence: str) -> str:
    return sentence.replace("\r", " ").replace("\n", " ")


def _cut_at_words(is_continuation: np.ndarray, limit: int) -> list[int]:
    """Lengths of pieces of at most `limit` tokens, none beginning inside a word if avoidable."""
    pieces, start = [], 0
    while len(is_continuation) - start > limit:
        stop = start + limit
        while stop > start and is_continuation[stop]:
            stop -= 1
        stop = stop if stop > start else start + limit
        pieces.append(stop - start)
        start = stop
    return [*pieces, len(is_continuation) - start]


def _blank_lines(text: bytes, lengths: np.ndarray) -> np.ndarray:
    """bool[lines]: which lines are blank; those without tokens are looked at."""
    is_blank = lengths == 0
    ends = np.append(np.flatnonzero(np.frombuffer(text, np.uint8) == 10), len(text))[: len(lengths)]
    starts = np.append(0, ends[:-1] + 1)
    for n in np.flatnonzero(is_blank & (ends > starts)).tolist():
        is_blank[n] = readers.is_blank(text[starts[n] : ends[n]])
    return is_blank


def _runs_between(is_blank: np.ndarray) -> np.ndarray:
    """int64: lengths of the runs of lines that are not blank."""
    filled = np.concatenate([[False], ~is_blank, [False]])
    edges = np.flatnonzero(filled[1:] != filled[:-1])
    return (edges[1::2] - edges[::2]).astype(np.int64)


def _filled_lines(lengths: np.ndarray, lines: np.ndarray) -> np.ndarray:
    """int64: for each document of `lines` lines, how many have tokens."""
    totals = np.append(0, np.cumsum(lengths > 0, dtype=np.int64))
    ends = np.cumsum(lines, dtype=np.int64)
    return totals[ends] - totals[ends - lines]
