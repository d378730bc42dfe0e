"""What a corpus holds, for people; and whether its files are still what they were."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from tqdm import tqdm

from data_tools.errors import UserError
from data_tools.files import sha256_of
from data_tools.finish import lost_documents
from data_tools.hashing import GOLDEN, derive_key, mix64
from data_tools.samples import SampleOptions, build_index, corpus_of, problem_of_pairs, resolve
from data_tools.shards import MANIFEST, TOKENIZER, Manifest, Shard, ShardSet, read_manifest
from data_tools.tokenizer import load_tokenizer

COUNTED_TOKENS = 5_000_000  # words are counted over at most this many
INDEXED_TOKENS = 1 << 28  # samples are counted over whole shards with about this many, and scaled
RESOLVED_SAMPLES = 1_000_000  # the fill is measured on at most this many
SHOWN_WORDS = 20
BAR_WIDTH = 50
SHOWN_FIELDS = {"num_documents", "num_sentences", "num_tokens", "has_special_tokens", "counts"}
SENTENCE_BINS = (1, 5, 10, 20, 40, 80, 160, 320, 640)
DOCUMENT_BINS = (1, 32, 64, 128, 256, 512, 1024, 4096, 16384, 65536)


def statistics(corpus: ShardSet) -> dict[str, Any]:
    """Everything `bert-cpt inspect` shows but the example pairs, ready for JSON."""
    manifest = corpus.manifest
    sentence_lengths = [shard.sentence_lengths for shard in corpus.shards]
    document_lengths = [_document_lengths(shard) for shard in corpus.shards]
    return {
        "directory": str(corpus.directory),
        "tokenizer": manifest.tokenizer.name,
        **manifest.model_dump(include=SHOWN_FIELDS),
        "num_shards": len(manifest.shards),
        "one_sentence_documents": sum(
            int((np.diff(shard.document_index) == 1).sum()) for shard in corpus.shards
        ),
        **_word_statistics(corpus),
        "sentence_tokens": _histogram(sentence_lengths, SENTENCE_BINS),
        "document_tokens": _histogram(document_lengths, DOCUMENT_BINS),
        "samples": {str(length): _sample_statistics(corpus, length) for length in (128, 512)},
    }


def _document_lengths(shard: Shard) -> np.ndarray:
    ends = np.concatenate([[0], np.cumsum(shard.sentence_lengths, dtype=np.int64)])
    return np.diff(ends[shard.document_index])


def _histogram(parts: Sequence[np.ndarray], edges: Sequence[int]) -> dict[str, Any]:
    counts = np.sum([np.histogram(part, [*edges, 1 << 62])[0] for part in parts], axis=0)
    total = sum(len(part) for part in parts)
    longest = max((int(part.max(initial=0)) for part in parts), default=0)
    mean = sum(int(part.sum(dtype=np.int64)) for part in parts) / max(total, 1)
    labels = [f"{a}-{b - 1}" for a, b in pairwise(edges)] + [f"{edges[-1]}+"]
    bins = dict(zip(labels, (int(count) for count in counts), strict=True))
    return {"mean": round(mean, 2), "max": longest, "bins": bins}


def _word_statistics(corpus: ShardSet) -> dict[str, Any]:
    tokenizer = corpus.tokenizer
    share = -(-COUNTED_TOKENS // len(corpus.shards))
    tokens = np.concatenate([shard.tokens[:share] for shard in corpus.shards])
    keys, starts = _words(tokens, tokenizer.is_continuation)
    stops = np.append(starts[1:], len(tokens))
    _, first, number = np.unique(keys, return_index=True, return_counts=True)
    most = np.argsort(-number, kind="stable")[:SHOWN_WORDS]
    return {
        "counted_tokens": len(tokens),
        "unknown_share": float((tokens == tokenizer.unk_id).sum() / max(len(tokens), 1)),
        "pieces_per_word": len(tokens) / max(len(starts), 1),
        "frequent_words": [
            [tokenizer.decode(tokens[starts[first[k]] : stops[first[k]]]), int(number[k])]
            for k in most
        ],
    }


@njit(cache=True)
def _words(tokens, is_continuation):
    """A hash of each word's pieces and the position where it starts."""
    keys = np.empty(len(tokens), np.uint64)
    starts = np.empty(len(tokens), np.int64)
    count = 0
    for position in range(len(tokens)):
        token = np.uint64(tokens[position])
        if count == 0 or not is_continuation[tokens[position]]:
            keys[count] = mix64(token)
            starts[count] = position
            count += 1
        else:
            keys[count - 1] = mix64(keys[count - 1] * GOLDEN + token)
    return keys[:count], starts[:count]


def _sample_statistics(corpus: ShardSet, sequence_length: int) -> dict[str, Any]:
    before = np.cumsum([0, *(len(shard.tokens) for shard in corpus.shards[:-1])])
    shards = corpus.shards[: max(1, int((before < INDEXED_TOKENS).sum()))]
    options = SampleOptions(sequence_length, is_paired=not problem_of_pairs(shards))
    table = corpus.tokenizer.is_continuation
    index = build_index(shards, table, options, seed=0, epoch=0)
    chosen = np.linspace(0, len(index) - 1, min(len(index), RESOLVED_SAMPLES)).astype(np.int64)
    segments = resolve(corpus_of(shards, table), index, chosen, derive_key(0, 0, 0))
    pairs = segments.label <= 1
    scale = corpus.manifest.num_tokens / max(1, sum(len(shard.tokens) for shard in shards))
    return {
        "samples_per_epoch": round(len(index) * scale),
        "fill": float(segments.sample_lengths.mean() / sequence_length),
        "random_share": float((segments.label[pairs] == 1).mean()) if pairs.any() else None,
        "without_pair_share": float(1 - pairs.mean()),
    }


# --- for people -----------------------------------------------------------------------------------


def summarize(directory: Path, manifest: Manifest) -> str:
    """One line on what was built, and a table of what was lost or changed, if anything was."""
    line = (
        f"{directory}: {manifest.num_documents:,} documents, {manifest.num_sentences:,} sentences, "
        f"{manifest.num_tokens:,} tokens in {len(manifest.shards)} shard(s)"
    )
    plain = {"documents_read", "documents_written", "sentences", "tokens", "text_bytes"}
    lost = lost_documents(Counter(manifest.counts))
    changed = {k: n for k, n in manifest.counts.items() if n and k not in plain | set(lost)}
    rows = [f"  {k.replace('_', ' '):<36}{n:>12,}" for k, n in (lost | changed).items()]
    return "\n".join([line, *(["lost or changed on the way:"] if rows else []), *rows])


def render(content: dict[str, Any]) -> str:
    """The statistics as text with bars."""
    lines = [
        f"{content['directory']}: {content['num_documents']:,} documents, "
        f"{content['num_sentences']:,} sentences, {content['num_tokens']:,} tokens, "
        f"{content['num_shards']} shard(s), tokenizer {content['tokenizer']}",
        f"one-sentence documents {content['one_sentence_documents']:,}; pieces per word "
        f"{content['pieces_per_word']:.3f}; [UNK] {100 * content['unknown_share']:.3f} % (over "
        f"{content['counted_tokens']:,} tokens)",
        "",
    ]
    if content["has_special_tokens"]:
        lines.insert(2, "WARNING: the sentences hold [CLS] or [SEP]; they are never masked")
    for name in ("sentence_tokens", "document_tokens"):
        table = content[name]
        lines.append(f"{name.replace('_', ' in ')}: mean {table['mean']}, longest {table['max']}")
        scale = BAR_WIDTH / max(1, *table["bins"].values())
        lines += [f"  {k:>14} {n:>12,} {'#' * round(scale * n)}" for k, n in table["bins"].items()]
    words = ", ".join(f"{word} {n:,}" for word, n in content["frequent_words"])
    lines += ["", f"most frequent words: {words}", ""]
    for length, s in content["samples"].items():
        share = "-" if s["random_share"] is None else f"{100 * s['random_share']:.2f} %"
        lines.append(
            f"at length {length}: {s['samples_per_epoch']:,} samples an epoch, fill "
            f"{100 * s['fill']:.1f} %, random pairs {share}, without a pair "
            f"{100 * s['without_pair_share']:.2f} %"
        )
    for example in content.get("examples", []):
        lines += ["", f"[{example['label']}, {example['num_tokens']} tokens] {example['text']}"]
        lines.append(f"  masked: {example['masked']}")
    return "\n".join(lines)


# --- verification ---------------------------------------------------------------------------------


def verify(directory: Path) -> list[str]:
    """What is damaged, a line each: hashes, structure, token ids, tokenizer; empty if nothing is.

    Raises:
        UserError: there is no manifest to compare with.
    """
    damage: list[str] = []

    @contextmanager
    def noted() -> Iterator[None]:
        try:
            yield
        except UserError as error:
            damage.append(str(error))

    if not (directory / MANIFEST).is_file():
        raise UserError(f"{directory}: holds no {MANIFEST}, so there is nothing to compare with")
    with noted():
        manifest = read_manifest(directory)
        for record in tqdm(manifest.shards, desc="verifying", unit="shard", disable=None):
            prefix = str(directory / record.name)
            with noted():
                _check_file(Path(f"{prefix}.bin"), record.bin_bytes, record.bin_sha256)
            with noted():
                _check_file(Path(f"{prefix}.idx"), record.idx_bytes, record.idx_sha256)
            with noted():
                shard = Shard(Path(prefix))
                shard.check_structure()
                shard.check_ids(manifest.tokenizer.vocab_size)
        with noted():
            path = directory / TOKENIZER
            if not path.is_file():
                raise UserError(f"{path}: missing")
            if load_tokenizer(path).identity != manifest.tokenizer.identity:
                raise UserError(f"{path}: not the tokenizer the manifest names")
    return damage


def _check_file(path: Path, size: int, digest: str) -> None:
    if not path.is_file():
        raise UserError(f"{path}: missing")
    if path.stat().st_size != size:
        raise UserError(f"{path}: {path.stat().st_size} bytes, the manifest says {size}")
    if sha256_of(path) != digest:
        raise UserError(f"{path}: its SHA-256 is not the manifest's")
