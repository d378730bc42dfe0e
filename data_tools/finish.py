"""The end of a build: the parts' documents are sorted into shards, and the manifest is written."""

import multiprocessing
import shutil
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from data_tools.errors import UserError
from data_tools.files import remove_leftovers, write_text
from data_tools.plan import BUILD, PLAN, Plan, part_prefix, parts_of
from data_tools.shards import (
    Manifest,
    Run,
    Shard,
    ShardRecord,
    SourceRecord,
    write_corpus,
    write_shard,
)
from data_tools.tokenizer import BulkTokenizer
from data_tools.worker import keys_of

LOST_DOCUMENTS = (
    "documents_bad_csv",
    "documents_bad_json",
    "documents_invalid_unicode",
    "documents_invalid_utf8",
    "documents_missing_text",
    "documents_text_not_string",
    "documents_too_long",
    "documents_without_tokens",
    "documents_without_valid_lines",
)


def finish(
    plan: Plan, output: Path, tokenizer: BulkTokenizer, tokenizer_name: str, workers: int
) -> Manifest:
    """Sort the parts into shards, check the counts, write the manifest, remove the parts.

    Raises:
        UserError: parts are missing, or no document holds any text.
    """
    counts = Counter(plan.counts)
    parts: list[tuple[int, int]] = []
    read: Counter[int] = Counter()
    totals = [0]
    for index, block, found in parts_of(plan, output / BUILD):
        parts.append((index, block))
        counts += found
        read[index] += found["documents_read"]
        totals.append(totals[-1] + found["tokens"])
    _check_balance(plan, counts)
    counts["sources_without_documents"] = sum(not read[i] for i in range(len(plan.sources)))
    records = _merge(plan, output, tokenizer.dtype, parts, totals, workers)
    options = {k: v for k, v in asdict(plan.options).items() if k != "on_error"}
    sources = [
        SourceRecord(path=source.path, num_bytes=source.num_bytes, num_documents=read[i])
        for i, source in enumerate(plan.sources)
    ]
    write_text(output / PLAN, plan.as_json())
    remove_leftovers(output)
    manifest = write_corpus(
        output, tokenizer, tokenizer_name, records, sources,
        counts=dict(sorted((+counts).items())), options=options,
    )  # fmt: skip
    shutil.rmtree(output / BUILD, ignore_errors=True)
    return manifest


def _check_balance(plan: Plan, counts: Counter[str]) -> None:
    lost = sum(counts[name] for name in LOST_DOCUMENTS)
    assert counts["documents_read"] == counts["documents_written"] + lost, (
        f"documents in ({counts['documents_read']}) are not documents out "
        f"({counts['documents_written']}) + counted losses ({lost})"
    )
    if not counts["documents_written"]:
        inputs = ", ".join(source.path for source in plan.sources[:5])
        losses = ", ".join(f"{name} {counts[name]}" for name in LOST_DOCUMENTS if counts[name])
        raise UserError(
            f"{inputs}: no document with any text ({losses or 'none was read'}); is --text-field "
            f"or --format wrong?"
        )


def _merge(
    plan: Plan,
    output: Path,
    dtype: np.dtype,
    parts: list[tuple[int, int]],
    totals: list[int],
    workers: int,
) -> list[ShardRecord]:
    num_shards = max(1, round(totals[-1] / plan.options.shard_tokens))
    seed = plan.options.shuffle_seed
    merge = partial(_merge_shard, output, dtype, parts, totals, num_shards, seed)
    if workers == 1 or num_shards == 1:
        return list(map(merge, range(num_shards)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, num_shards), context) as pool:
        return list(pool.map(merge, range(num_shards)))


def _merge_shard(
    output: Path,
    dtype: np.dtype,
    parts: list[tuple[int, int]],
    totals: list[int],
    num_shards: int,
    seed: int | None,
    shard: int,
) -> ShardRecord:
    """Write one shard: its range of keys (or, unshuffled, of tokens) out of every part."""
    done = output / BUILD / f"shard_{shard:05d}.json"
    if done.exists():
        return ShardRecord.model_validate_json(done.read_text())

    def runs() -> Iterator[Run]:
        for (index, block), start in zip(parts, totals, strict=False):  # mapped one at a time
            part = Shard(part_prefix(output / BUILD, index, block))
            if seed is None:
                begins = part.sentence_offsets[part.document_index[:-1]] // dtype.itemsize + start
                bounds = [totals[-1] * number // num_shards for number in (shard, shard + 1)]
            else:
                begins = np.sort(keys_of(seed, index, block, part.num_documents))
                bounds = [(number << 64) // num_shards for number in (shard, shard + 1)]
            first, last = (bisect_left(begins, bound) for bound in bounds)
            if last > first:
                yield part.documents(first, last)

    record = write_shard(output / f"shard_{shard:05d}", runs(), dtype)
    write_text(done, record.model_dump_json())
    return record
