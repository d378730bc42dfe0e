"""The parallel, resumable build: text in, shards out, the same bytes however it is run.

Work is split into blocks that depend on the input alone (`readers`). Every block becomes one part
(`worker`, `parts`); any number of processes on any number of machines write parts, and a part that
is there is complete. `finish` then sorts the parts' documents into shards, checks that documents
in = documents out + counted losses, and writes the manifest last. So the same command, run again
after a kill at any moment, does only what is missing.
"""

import logging
import multiprocessing
import os
import shutil
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from pathlib import Path

from tqdm import tqdm

from data_tools.errors import UserError
from data_tools.finish import finish
from data_tools.plan import (
    BUILD,
    MIN_BLOCK_BYTES,
    PLAN,
    BuildOptions,
    Plan,
    make_plan,
    prepare_output,
    share_of,
)
from data_tools.readers import Block, Document, row_blocks
from data_tools.shards import MANIFEST, TOKENIZER, Manifest, read_manifest
from data_tools.sources import Source
from data_tools.tokenizer import BulkTokenizer, load_tokenizer
from data_tools.worker import BlockWorker

__all__ = ["BuildOptions", "build", "write_shards"]

logger = logging.getLogger(__name__)

LOG_SECONDS = 30


def build(
    inputs: list[str],
    output: Path,
    tokenizer: BulkTokenizer,
    tokenizer_name: str,
    options: BuildOptions,
    *,
    workers: int = 1,
    rank: int = 0,
    world_size: int = 1,
    finish_only: bool = False,
) -> Manifest | None:
    """Shard a corpus, or this rank's share of it.

    Returns:
        The manifest, or None when other ranks have a share: run `finish_only` after all of them.

    Raises:
        UserError: bad input, wrong options, or a build of something else lies in `output`.
        OSError: the disk is full, a worker process died, and the like; run it again.
    """
    plan = make_plan(inputs, options, tokenizer)
    if prepare_output(output, plan, tokenizer):
        return read_manifest(output)
    tasks, num_bytes = share_of(plan, output / BUILD, rank, world_size, workers)
    if not finish_only:
        _run(plan, output, tokenizer, tasks, workers, num_bytes)
        if world_size > 1:
            return None
    return finish(plan, output, tokenizer, tokenizer_name, workers)


def write_shards(
    documents: Iterable[Document],
    output: Path | str,
    *,
    tokenizer: BulkTokenizer | str | Path,
    language: str = "en",
    splitter: str = "sentencex",
    workers: int = 1,
    shuffle_seed: int | None = 0,
) -> Manifest:
    """Shard documents from Python.

    Args:
        documents: texts (a paragraph a line) or lists of sentences; consumed once, lazily.
        output: directory for the shards; must not hold a corpus yet.
        tokenizer: a name, a directory, or one already loaded.

    Raises:
        UserError: a document is neither text nor a list of texts, or there is none.
    """
    if isinstance(documents, str):
        raise UserError("documents: one text was given; expected a list of texts")
    output = Path(output)
    loaded = tokenizer if isinstance(tokenizer, BulkTokenizer) else load_tokenizer(tokenizer)
    name = "given from Python" if loaded is tokenizer else str(tokenizer)
    options = BuildOptions(
        language=language, splitter=splitter, shuffle_seed=shuffle_seed, block_bytes=MIN_BLOCK_BYTES
    )
    plan = Plan([Source("documents from Python", "hub")], options, loaded.identity, {})
    if (output / MANIFEST).exists():
        raise UserError(f"{output}: holds a corpus already; choose another directory")
    work = output / BUILD
    if (work / PLAN).exists() and plan.agrees_with((work / PLAN).read_text()):
        shutil.rmtree(work)  # it cannot be continued: the documents may be others
    prepare_output(output, plan, loaded)
    rows = ((document, 0) for document in documents)
    blocks = row_blocks(rows, 0, options.block_bytes)
    _run(plan, output, loaded, blocks, workers, 0)
    return finish(plan, output, loaded, name, workers)


# --- running --------------------------------------------------------------------------------------

_worker: BlockWorker | None = None


def _start_worker(plan: Plan, work: Path) -> None:
    global _worker  # a process of the pool serves one build
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker = BlockWorker(plan, work, load_tokenizer(work / TOKENIZER))


def _die_with_parent() -> None:
    """A killed parent cannot stop its workers, which would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)


def _run_in_worker(task: Block | int) -> tuple[int, Counter[str]]:
    assert _worker is not None
    return _worker.run(task)


def _run(
    plan: Plan, output: Path, tokenizer: BulkTokenizer, tasks: Iterable[Block | int],
    workers: int, num_bytes: int,
) -> None:  # fmt: skip
    """Do all tasks, in this process or in `workers` of them."""
    work, tokens = output / BUILD, 0
    seconds = 0.1 if sys.stderr.isatty() else LOG_SECONDS
    bar = tqdm(
        total=num_bytes or None, unit="B", unit_scale=True, mininterval=seconds, desc="sharding"
    )

    def add(num_bytes: int, counts: Counter[str]) -> None:
        nonlocal tokens
        tokens += counts["tokens"]
        rate = tokens / 1e6 / max(bar.format_dict["elapsed"], 1e-3)
        bar.set_postfix_str(f"{rate:.2f} M tokens/s", refresh=False)
        bar.update(num_bytes)

    def collect(running: set[Future[tuple[int, Counter[str]]]], most: int) -> None:
        """Wait until at most `most` are left."""
        while len(running) > most:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                add(*future.result())
            running -= done

    with bar:
        if workers == 1:
            worker = BlockWorker(plan, work, tokenizer)
            for task in tasks:
                add(*worker.run(task))
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, context, _start_worker, (plan, work)) as pool:
            running: set[Future[tuple[int, Counter[str]]]] = set()
            try:
                for task in tasks:
                    running.add(pool.submit(_run_in_worker, task))
                    collect(running, 2 * workers)
                collect(running, 0)
            except BrokenProcessPool as error:
                raise ChildProcessError(
                    "a worker process died (killed, or out of memory); nothing finished is lost, "
                    "and fewer --workers need less memory"
                ) from error
            finally:
                pool.shutdown(cancel_futures=True)
