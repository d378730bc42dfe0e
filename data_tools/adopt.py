"""Adopt indexed data sets that Megatron-LM wrote: the files stay as they are, a manifest is added.

Its preprocessing writes PREFIX.bin and PREFIX.idx in our layout (see `shards`), but says nowhere
which tokenizer the ids are of, and with a Hugging Face tokenizer it leaves [CLS] and [SEP] round
every sentence.
"""

import logging
from pathlib import Path

import numpy as np

from data_tools.errors import UserError
from data_tools.shards import MANIFEST, Manifest, Shard, SourceRecord, describe_shard, write_corpus
from data_tools.tokenizer import BulkTokenizer

logger = logging.getLogger(__name__)

READ_TOKENS = 1 << 24


def adopt(
    prefixes: list[Path], output: Path | None, tokenizer: BulkTokenizer, tokenizer_name: str
) -> tuple[Path, Manifest]:
    """Write a manifest for data sets with the given path prefixes.

    Args:
        output: a directory that gets links to their files; None for the one they lie in.

    Returns:
        The directory with the manifest, and the manifest.

    Raises:
        UserError: files are missing or damaged, or the ids cannot be of this tokenizer.
    """
    paths = [_without_suffix(prefix.absolute()) for prefix in prefixes]
    directory = output or paths[0].parent
    if (directory / MANIFEST).exists():
        raise UserError(f"{directory}: holds a {MANIFEST} already; give another --output")
    if output is None and any(path.parent != directory for path in paths):
        raise UserError("--adopt: the data sets lie in several directories; give --output")
    if len({path.name for path in paths}) < len(paths):
        raise UserError("--adopt: two data sets have one name; rename one, or adopt them apart")
    records = [describe_shard(path) for path in paths]
    shards = [Shard(path) for path in paths]
    if len({shard.dtype for shard in shards}) > 1:
        raise UserError("--adopt: the data sets differ in their width of ids; adopt them apart")
    specials = [_holds_special(shard, tokenizer) for shard in shards]  # all are checked
    if any(specials):
        logger.warning(
            "%s: its sentences hold [CLS] or [SEP], which will stand inside the samples too; they "
            "are never masked. Shard the text with `bert-cpt shard` to be rid of them",
            directory,
        )
    directory.mkdir(parents=True, exist_ok=True)
    for path in paths:
        for name in (path.name + ".bin", path.name + ".idx"):
            if not (directory / name).exists():
                (directory / name).symlink_to(path.with_name(name))
    sources = [
        SourceRecord(path=str(p), num_bytes=r.bin_bytes, num_documents=r.num_documents)
        for p, r in zip(paths, records, strict=True)
    ]
    number = sum(record.num_documents for record in records)
    manifest = write_corpus(
        directory, tokenizer, tokenizer_name, records, sources,
        counts={"documents_read": number, "documents_written": number},
        options={"adopted": True}, has_special_tokens=any(specials),
    )  # fmt: skip
    return directory, manifest


def _without_suffix(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in (".bin", ".idx") else path


def _holds_special(shard: Shard, tokenizer: BulkTokenizer) -> bool:
    """Whether a data set holds [CLS] or [SEP]; raises UserError for ids that cannot be right."""
    shard.check_structure()
    shard.check_ids(tokenizer.vocab_size)
    special = (tokenizer.cls_id, tokenizer.sep_id)
    starts = range(0, len(shard.tokens), READ_TOKENS)
    return any(np.isin(shard.tokens[at : at + READ_TOKENS], special).any() for at in starts)
