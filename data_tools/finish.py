"""The end of a build: the parts' documents are sorted into shards, and the manifest is written."""

import shutil
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
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


def lost_documents(counts: Counter[str]) -> dict[str, int]:
    """The counts of documents that were read but not written."""
    others = ("documents_read", "documents_written", "documents_cut")
    return {k: n for k, n in counts.items() if k.startswith("documents_") and k not in others and n}


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
    losses = lost_documents(counts)
    lost = sum(losses.values())
    assert counts["documents_read"] == counts["documents_written"] + lost, (
        f"documents in ({counts['documents_read']}) are not documents out "
        f"({counts['documents_written']}) + counted losses ({lost})"
    )
    if not counts["documents_written"]:
        inputs = ", ".join(source.path for source in plan.sources[:5])
        found = ", ".join(f"{name} {count}" for name, count in losses.items())
        raise UserError(
            f"{inputs}: no document with any text ({found or 'none was read'}); is --text-field "
            f"or --format wrong?"
        )


def _merge(
    plan: Plan, output: Path, dtype: np.dtype, parts: list[tuple[int, int]], totals: list[int],
    workers: int,
) -> list[ShardRecord]:  # fmt: skip
    """Write the shards: each takes its range of keys (unshuffled, of tokens) out of every part."""
    work, seed = output / BUILD, plan.options.shuffle_seed
    num_shards = max(1, round(totals[-1] / plan.options.shard_tokens))

    def documents(shard: int) -> Iterator[Run]:
        for (index, block), start in zip(parts, totals, strict=False):  # mapped one at a time
            part = Shard(part_prefix(work, index, block))
            if seed is None:
                begins = part.sentence_offsets[part.document_index[:-1]] // dtype.itemsize + start
                bounds = [totals[-1] * number // num_shards for number in (shard, shard + 1)]
            else:
                begins = np.sort(keys_of(seed, index, block, part.num_documents))
                bounds = [(number << 64) // num_shards for number in (shard, shard + 1)]
            first, last = (bisect_left(begins, bound) for bound in bounds)
            if last > first:
                yield part.documents(first, last)

    def merge(shard: int) -> ShardRecord:
        done = work / f"shard_{shard:05d}.json"
        if done.exists():
            return ShardRecord.model_validate_json(done.read_text())
        record = write_shard(output / f"shard_{shard:05d}", documents(shard), dtype)
        write_text(done, record.model_dump_json())
        return record

    with ThreadPoolExecutor(workers) as pool:  # writing and hashing release the lock
        return list(pool.map(merge, range(num_shards)))
