"""One block of text becomes one part: documents, sentences, ids, counts."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
from numba import njit

from data_tools import readers
from data_tools.files import write_text
from data_tools.hashing import derive_key, draws
from data_tools.plan import Plan, part_prefix, stream
from data_tools.readers import Block
from data_tools.sentences import make_splitter
from data_tools.shards import Run, write_shard
from data_tools.sources import Policy, Source
from data_tools.tokenizer import BulkTokenizer

CHECKED_LINES = 32  # of each block, compared with `tokenizers`


def keys_of(seed: int, source_index: int, block: int, num_documents: int) -> np.ndarray:
    """uint64[n]: what decides the place of a block's documents when they are shuffled."""
    return draws(derive_key(seed, source_index, block), np.arange(num_documents))


class BlockWorker:
    """Turns blocks into parts; one in each process."""

    def __init__(self, plan: Plan, work: Path, tokenizer: BulkTokenizer) -> None:
        self.plan = plan
        self.work = work
        self.tokenizer = tokenizer
        self.split = make_splitter(plan.options.splitter, plan.options.language)

    def run(self, task: Block | int) -> tuple[int, Counter[str]]:
        """Write the part of a block, or those of a whole source; returns (raw bytes, counts)."""
        if isinstance(task, Block):
            return task.num_bytes, self._run_block(task)
        num_bytes, counts = 0, Counter[str]()
        for block in stream(self.plan, task):
            if not part_prefix(self.work, task, block.index).with_suffix(".json").exists():
                num_bytes += block.num_bytes
                counts += self._run_block(block)
        return num_bytes, counts

    def _run_block(self, block: Block) -> Counter[str]:
        options = self.plan.options
        source = self.plan.sources[block.source_index]
        policy = Policy(options.on_error, Counter())
        if block.payload is None:
            blocks = readers.line_blocks(
                source, block.source_index, options.block_bytes, policy, block.index
            )
            block = replace(next(blocks), is_last=block.is_last)
        policy.counts += block.counts
        run = self._documents(block, source, policy)
        if options.shuffle_seed is not None:
            run = _ordered(
                run, keys_of(options.shuffle_seed, block.source_index, block.index, len(run[2]))
            )
        prefix = part_prefix(self.work, block.source_index, block.index)
        write_shard(prefix, [run], self.tokenizer.dtype)
        content = {"counts": +policy.counts, "is_last": block.is_last}  # counts without zeros
        write_text(prefix.with_suffix(".json"), json.dumps(content, sort_keys=True))
        return policy.counts

    def _documents(self, block: Block, source: Source, policy: Policy) -> Run:
        counts = policy.counts
        counts["documents_cut"] += bool(block.is_cut and block.payload)
        text, num_documents = self._text_of(block, source, policy)
        tokens, lengths = self.tokenizer.encode_lines(text)
        lines = text.split(b"\n")
        if not self.tokenizer.slow_reason:
            self.tokenizer.check(lines, tokens, lengths, CHECKED_LINES)
        is_blank = lengths == 0
        for n in np.flatnonzero(is_blank):
            is_blank[n] = readers.is_blank(lines[n])
        is_first = ~is_blank & np.append(True, is_blank[:-1])[: len(lengths)]
        owner = np.cumsum(is_first)[~is_blank] - 1
        lengths = lengths[~is_blank]
        sentences = np.bincount(owner, lengths > 0, is_first.sum()).astype(np.int64)
        if num_documents is None:
            num_documents = len(sentences)
            counts["documents_read"] += num_documents
        sentences = sentences[sentences > 0]
        counts["sentences_without_tokens"] += int((lengths == 0).sum())
        counts["documents_without_tokens"] += num_documents - len(sentences)
        lengths, sentences, counts["sentences_cut"] = _cut_long(
            tokens, lengths[lengths > 0], sentences,
            self.tokenizer.is_continuation, self.plan.options.max_sentence_tokens,
        )  # fmt: skip
        counts["documents_written"] += len(sentences)
        counts["sentences"] += len(lengths)
        counts["tokens"] += len(tokens)
        counts["text_bytes"] += len(text)
        return tokens, lengths, sentences

    def _text_of(self, block: Block, source: Source, policy: Policy) -> tuple[bytes, int | None]:
        """One sentence a line and blank lines between documents; their number, if not so told."""
        if source.format in ("text", "sentences"):
            text = readers.clean_lines(block, source, policy)
            if source.format == "text":
                lines = text.split(b"\n")
                text = b"\n".join(self._sentences(line.decode(), policy).encode() for line in lines)
            return text, None
        texts = []
        for document in readers.documents_of(block, source, self.plan.options.text_field, policy):
            if isinstance(document, list):
                parts = [s.replace("\r", " ").replace("\n", " ") for s in document]
            else:
                paragraphs = document.replace("\r", "\n").split("\n")
                parts = [self._sentences(paragraph, policy) for paragraph in paragraphs]
            # Encoded one by one: a rare character makes the text it stands in four times as large.
            texts.append("\n".join([*(part for part in parts if part.strip()), "", ""]).encode())
        return b"".join(texts), len(texts)

    def _sentences(self, paragraph: str, policy: Policy) -> str:
        """Its sentences, one a line."""
        if not paragraph or paragraph.isspace():
            return ""
        found = self.split(paragraph, policy.counts)
        return "\n".join([s for s in found if s and not s.isspace()])


@njit(cache=True, nogil=True)
def _cut_long(tokens, lengths, documents, is_continuation, limit):
    """Lengths and sentences of each document without sentences over `limit`, and how many were.

    A cut falls between words if that is possible.
    """
    pieces = np.empty(len(tokens), np.int32)
    sentences = documents.copy()
    count = num_cut = position = sentence = 0
    for document in range(len(documents)):
        for _ in range(documents[document]):
            end = position + lengths[sentence]
            sentence += 1
            num_cut += end - position > limit
            while end - position > limit:
                stop = position + limit
                while stop > position and is_continuation[tokens[stop]]:
                    stop -= 1
                if stop == position:
                    stop = position + limit
                pieces[count] = stop - position
                count += 1
                sentences[document] += 1
                position = stop
            pieces[count] = end - position
            count += 1
            position = end
    return pieces[:count].copy(), sentences, num_cut


def _ordered(run: Run, keys: np.ndarray) -> Run:
    """The documents in the order of their keys."""
    tokens, lengths, sentences = run
    order = np.argsort(keys, kind="stable")
    sentence_ends = np.cumsum(sentences, dtype=np.int64)
    token_ends = np.append(0, np.cumsum(lengths, dtype=np.int64))[sentence_ends]
    return (
        _gather_runs(tokens, token_ends, order),
        _gather_runs(lengths, sentence_ends, order),
        sentences[order],
    )


@njit(cache=True, nogil=True)
def _gather_runs(values, ends, order):
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
