"""What a build is to do: its plan, kept in the output directory, and how it is dealt to ranks.

OUTPUT/.build/plan.json              what is built, from what: a rerun must agree with it
              part_00000_000003.*    block 3 of source 0: a small shard, and its counts
              shard_00000.json       a shard that is finished
"""

import itertools
import json
import logging
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_tools import readers
from data_tools.errors import UserError
from data_tools.files import write_text
from data_tools.readers import Block
from data_tools.sentences import make_splitter
from data_tools.shards import MANIFEST, TOKENIZER
from data_tools.sources import TEXT_FORMATS, Format, OnError, Policy, Source, find_sources
from data_tools.tokenizer import BulkTokenizer

logger = logging.getLogger(__name__)

BUILD = ".build"
PLAN = "plan.json"
MIN_BLOCK_BYTES = 8 << 20
MAX_BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class BuildOptions:
    """What decides the bytes of a build, apart from the input.

    Attributes:
        format: of the inputs; "auto" goes by file name and, for .txt, by what the file holds.
        text_field: the field or column with the text (JSON lines, tables).
        splitter: "sentencex", or "none" where a line is a sentence.
        language: of the text, for the splitter.
        max_sentence_tokens: a longer sentence is cut at word boundaries, and counted.
        on_error: "fail" stops at bad input, "skip" leaves it out and counts it.
        shuffle_seed: documents are dealt to shards by a hash keyed with it; None keeps their order.
        shard_tokens: about this many tokens a shard.
        block_bytes: unit of work; 0 chooses by the size of the input.
    """

    format: Format = "auto"
    text_field: str = "text"
    splitter: str = "sentencex"
    language: str = "en"
    max_sentence_tokens: int = 512
    on_error: OnError = "fail"
    shuffle_seed: int | None = 0
    shard_tokens: int = 1 << 27
    block_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """Everything a build's bytes are a function of."""

    sources: list[Source]
    options: BuildOptions
    tokenizer_identity: str
    counts: dict[str, int]  # of sources left out

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    def agrees_with(self, found: str) -> bool:
        """Whether a plan found on disk is this one; bad input may be skipped from now on."""
        content = json.loads(found)
        if content["options"]["on_error"] == "fail":  # then nothing was skipped so far
            content["options"]["on_error"] = self.options.on_error
        return content == json.loads(self.as_json())


def make_plan(inputs: list[str], options: BuildOptions, tokenizer: BulkTokenizer) -> Plan:
    """Look at the inputs; raises UserError where they are missing or (see `find_sources`) bad."""
    policy = Policy(options.on_error, Counter())
    make_splitter(options.splitter, options.language)  # says what is wrong with them
    sources = [_settled(s, options) for s in find_sources(inputs, options.format, policy)]
    if not sources:
        raise UserError(f"{', '.join(inputs)}: no input holds any text")
    if not options.block_bytes:
        # So that there are never too many parts: above 32 GiB of input, more than the least.
        size = 1 << (sum(source.num_bytes for source in sources) // 4096).bit_length()
        size = min(MAX_BLOCK_BYTES, max(MIN_BLOCK_BYTES, size))
        options = replace(options, block_bytes=size)
    return Plan(sources, options, tokenizer.identity, dict(policy.counts))


def _settled(source: Source, options: BuildOptions) -> Source:
    """Settle whether a text file holds one sentence a line, or paragraphs."""
    if source.format != "text":
        return source
    is_presplit = options.splitter == "none"
    if options.format == "auto" and not is_presplit:
        split = make_splitter(options.splitter, options.language)
        is_presplit = readers.looks_presplit(source, lambda line: split(line, Counter()))
        kind = "one sentence a line" if is_presplit else "raw text"
        logger.info("%s: read as %s (--format to override)", source.path, kind)
    return replace(source, format="sentences") if is_presplit else source


def prepare_output(output: Path, plan: Plan, tokenizer: BulkTokenizer) -> bool:
    """Create OUTPUT/.build for this plan, or find it there; True if the build is complete."""
    work = output / BUILD
    try:
        is_done = (output / MANIFEST).exists()
        path = (output if is_done else work) / PLAN
        found = path.read_text() if path.exists() else ""
        if (is_done or found) and not (found and plan.agrees_with(found)):
            what = "a corpus" if is_done else "an unfinished build"
            raise UserError(
                f"{output}: holds {what} of other inputs or options; choose another --output or "
                f"remove it first"
            )
        if is_done:
            logger.info("%s is complete already", output)
            shutil.rmtree(work, ignore_errors=True)
            return True
        work.mkdir(parents=True, exist_ok=True)
        if found != plan.as_json():
            write_text(path, plan.as_json())
        if not (work / TOKENIZER).exists():
            write_text(work / TOKENIZER, tokenizer.definition)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"--output {output}: {error.strerror}") from error
    if tokenizer.slow_reason:
        slow = "the tokenizer is served by `tokenizers`, several times slower: %s"
        logger.warning(slow, tokenizer.slow_reason)
    return False


# --- parts ----------------------------------------------------------------------------------------


def part_prefix(work: Path, source_index: int, block: int) -> Path:
    """Where the part of a block lies; it is complete if its .json, written last, is there."""
    return work / f"part_{source_index:05d}_{block:06d}"


def parts_of(plan: Plan, work: Path) -> Iterator[tuple[int, int, Counter[str]]]:
    """(source index, block, counts) of every part, in the order of the input.

    Raises:
        UserError: a part is missing.
    """
    for index, source in enumerate(plan.sources):
        for block in itertools.count():
            path = part_prefix(work, index, block).with_suffix(".json")
            if not path.exists():
                raise UserError(
                    f"{source.path}: block {block} is not done yet; run the shard command of every "
                    f"rank first, then --finish"
                )
            content = json.loads(path.read_text())
            yield index, block, Counter(content["counts"])
            if content["is_last"]:
                break


# --- who does what --------------------------------------------------------------------------------


def share_of(
    plan: Plan, work: Path, rank: int, world_size: int, workers: int
) -> tuple[Iterator[Block | int], int]:
    """What one rank has still to do, a pure function of the plan, less what is done already.

    Returns:
        tasks: blocks to read (payload None), blocks of streams read here, and whole streams (their
            source index); block k of source i belongs to rank (i + k) % world_size.
        num_bytes: of all of it, about, for the progress bar.
    """
    size = plan.options.block_bytes
    done: dict[int, set[int]] = defaultdict(set)
    for path in work.glob("part_*.json"):
        _, source_index, block = path.stem.split("_")
        done[int(source_index)].add(int(block))
    blocks = []
    streamed = []
    for index, source in enumerate(plan.sources):
        if not source.is_seekable:
            streamed.append(index)
            continue
        num_windows = -(-source.num_bytes // size)
        for number in range((rank - index) % world_size, num_windows, world_size):
            if number not in done[index]:
                num_bytes = min(size, source.num_bytes - number * size)
                is_last = number + 1 == num_windows
                blocks.append(Block(index, number, None, num_bytes, is_last=is_last))
    is_dealt_whole = len(streamed) >= 4 * world_size
    if is_dealt_whole:
        streamed = streamed[rank::world_size]
        rank, world_size = 0, 1

    def is_mine(index: int, number: int) -> bool:
        return (index + number) % world_size == rank

    def is_read(index: int) -> bool:
        last = max(done[index], default=0)
        mine = {number for number in range(last) if is_mine(index, number)}
        path = part_prefix(work, index, last).with_suffix(".json")
        return mine <= done[index] and path.exists() and json.loads(path.read_text())["is_last"]

    def divided() -> Iterator[Block]:
        for index in left:
            for block in stream(plan, index):
                if is_mine(index, block.index) and block.index not in done[index]:
                    yield block

    left = [index for index in streamed if not is_read(index)]
    num_bytes = sum(block.num_bytes for block in blocks)
    num_bytes += sum(plan.sources[index].num_bytes for index in left) // world_size
    if is_dealt_whole and len(left) >= workers:
        return itertools.chain(left, blocks), num_bytes
    return itertools.chain(blocks, divided()), num_bytes


def stream(plan: Plan, index: int) -> Iterator[Block]:
    """All blocks of a source that is read from its beginning to its end."""
    source, size = plan.sources[index], plan.options.block_bytes
    policy = Policy(plan.options.on_error, Counter())
    if source.format in TEXT_FORMATS:
        blocks = readers.line_blocks(source, index, size, policy)
    else:
        rows = readers.read_rows(source, plan.options.text_field, policy)
        blocks = readers.row_blocks(rows, index, size, source.num_bytes)
    for block in blocks:
        counts, policy.counts = policy.counts, Counter()
        yield replace(block, counts=counts)
