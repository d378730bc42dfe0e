"""Exact WordPiece ids in bulk: the ids of `tokenizers`, an order of magnitude faster.

`tokenizers` is the truth. The fast route rests on three observations about a BERT tokenizer
(BertNormalizer, BertPreTokenizer, WordPiece):

1. every character acts by itself: it belongs to a word (perhaps as other characters: lower-cased,
   without its accent), is a word of its own, ends a word, or vanishes. What it does is asked of the
   tokenizer when it is first seen, and kept in a table;
2. the ids of a word depend on nothing else, so they can be kept in a cache of word -> ids, filled
   by a greedy WordPiece on a miss;
3. pieces of text between white space ("chunks") are tokenized independently, so a chunk with a
   character that acts otherwise (a rare combining mark, one that may begin an added token) can be
   handed to `tokenizers` itself.

A tokenizer of another structure is served by `tokenizers` alone, and `slow_reason` says why.

The five special tokens ([CLS], [SEP], [MASK], [PAD], [UNK]) are plain text in a corpus: a literal
"[MASK]" becomes "[", "mask", "]". Other added tokens keep the meaning `tokenizers` gives them.
"""

import hashlib
import itertools
import json
import re
import sys
import unicodedata
from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numba import njit
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer

from data_tools.errors import UserError

# What a character does; a table starts with nothing known.
UNKNOWN, WORD, PUNCTUATION, SPACE, REMOVED, HANDED_OVER = range(6)
CACHE_ENTRIES = 1 << 18  # of one cache line each: 16 bytes of a word, size and count, 10 ids
CACHED_BYTES = 16
CACHED_IDS = 10
LINES_AT_ONCE = 1024
REMEMBERED_CHUNKS = 1 << 16
REMEMBERED_CHUNK_BYTES = 64
MAX_WORD_CHARS = 10_000
MAX_CHECKED_BYTES = 100_000
MAX_BECOMES_BYTES = 14  # of what a character becomes; a Hangul syllable becomes 9
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class BulkTokenizer:
    """A BERT tokenizer for whole corpora.

    Attributes:
        reference: the `tokenizers.Tokenizer` that defines the ids (no truncation, no padding, the
            five special tokens not recognised in text).
        slow_reason: why every line is served by `reference`; empty when the fast route is used.
    """

    def __init__(self, definition: str) -> None:
        """Build from the text of a tokenizer.json; raises UserError if it is no BERT tokenizer."""
        try:
            full = json.loads(definition)
            full["truncation"] = full["padding"] = None
            plain = dict(full, post_processor=None)
            plain["added_tokens"] = [
                t for t in full.get("added_tokens", []) if t["content"] not in SPECIAL_TOKENS
            ]
            self.definition = json.dumps(full, ensure_ascii=False)
            self.reference = Tokenizer.from_str(json.dumps(plain))
            self._full = Tokenizer.from_str(self.definition)
        except Exception as error:  # `tokenizers` raises bare Exception
            raise UserError(f"`tokenizers` cannot read this tokenizer.json: {error}") from error
        vocabulary = self._full.get_vocab(with_added_tokens=True)
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise UserError(
                f"the tokenizer has no {', '.join(missing)}; a BERT vocabulary with all of "
                f"{', '.join(SPECIAL_TOKENS)} is expected"
            )
        self.vocabulary: dict[str, int] = vocabulary
        self.vocab_size = max(vocabulary.values()) + 1
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            vocabulary[token] for token in SPECIAL_TOKENS
        )
        self.dtype = np.dtype(np.uint16 if self.vocab_size < 65_500 else np.int32)
        self.slow_reason = _why_slow(plain)
        if not self.slow_reason:
            self._prepare(plain)

    def _prepare(self, plain: dict) -> None:
        model = plain["model"]
        self._max_chars = model["max_input_chars_per_word"]
        self._trie = _make_trie(model["vocab"], model["continuing_subword_prefix"])
        self._cache = np.zeros((CACHE_ENTRIES, 16), np.uint32)
        firsts = "".join(token["content"][:1] for token in plain["added_tokens"])
        self._begins_added = {*firsts, *firsts.lower(), *firsts.upper()}
        # What every character does and becomes: bytes, characters, and the bytes in UTF-8. Nearly
        # all of it is never touched and takes no memory.
        self._classes = np.zeros(sys.maxunicode + 1, np.uint8)
        self._becomes = np.zeros((sys.maxunicode + 1, 2 + MAX_BECOMES_BYTES), np.uint8)
        self._learn(map(chr, range(128)))
        self._letters = np.zeros(256, np.uint8)
        is_word = self._classes[:128] == WORD
        self._letters[:128] = np.where(is_word, self._becomes[:128, 2], 0)  # a short cut
        self._remembered_ids = lru_cache(REMEMBERED_CHUNKS)(self._chunk_ids)

    @cached_property
    def identity(self) -> str:
        """SHA-256 over vocabulary and normalisation: equal if and only if the ids are."""
        parts = json.loads(self.definition)
        kept = {key: parts[key] for key in ("normalizer", "pre_tokenizer", "model")}
        normalizer = dict(kept["normalizer"] or {})
        if normalizer.get("strip_accents", 0) is None:  # then it follows the case
            normalizer["strip_accents"] = normalizer.get("lowercase")
        kept["normalizer"] = normalizer
        added = [t for t in parts["added_tokens"] if t["content"] not in SPECIAL_TOKENS]
        kept["added_tokens"] = sorted(added, key=lambda token: token["id"])
        text = json.dumps(kept, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def is_continuation(self) -> np.ndarray:
        """bool[vocab_size]: True for pieces that continue a word ("##ing")."""
        table = np.zeros(self.vocab_size, np.bool_)
        prefix = json.loads(self.definition)["model"].get("continuing_subword_prefix") or "##"
        for token, index in self.vocabulary.items():
            table[index] = token.startswith(prefix) and len(token) > len(prefix)
        return table

    @cached_property
    def replacement_ids(self) -> np.ndarray:
        """int32[n]: ids a masked token may be replaced with at random: no special, no [unused]."""
        unused = [t for t in self.vocabulary if t in SPECIAL_TOKENS or t.startswith("[unused")]
        kept = set(self.vocabulary.values()) - {self.vocabulary[token] for token in unused}
        return np.array(sorted(kept), np.int32)

    @property
    def special_ids(self) -> tuple[int, ...]:
        return (self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id)

    def decode(self, ids: np.ndarray) -> str:
        """Readable text of token ids, special tokens shown."""
        return self._full.decode([int(i) for i in ids], skip_special_tokens=False)

    def encode_lines(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        r"""Token ids of every line of `text`.

        Args:
            text: valid UTF-8, lines separated by "\n"; a last line without "\n" counts.

        Returns:
            ids (`self.dtype`, all lines back to back) and the tokens of each line (int32).
        """
        if self.slow_reason:
            return self._encode_by_reference(text)
        data = np.frombuffer(text, np.uint8)
        ids = np.empty(2 * len(data), self.dtype)
        lengths = np.zeros(text.count(b"\n") + 1, np.int32)
        position = line = count = 0
        while True:
            position, line, count, is_done = _encode(
                data, position, line, count, ids, lengths,
                self._classes, self._becomes, self._letters, self._max_chars, self.unk_id,
                self._cache, self._cache.view(np.uint64), *self._trie,
            )  # fmt: skip
            if is_done:
                return ids[:count].copy(), lengths[: len(lengths) - (text[-1:] in b"\n")]
            match = _CHUNK.match(text, position)
            assert match
            chunk = match[0]
            unknown = {c for c in set(chunk.decode()) if self._classes[ord(c)] == UNKNOWN}
            if unknown:
                self._learn(unknown)
                continue
            is_short = len(chunk) <= REMEMBERED_CHUNK_BYTES
            found = self._remembered_ids(chunk) if is_short else self._chunk_ids(chunk)
            ids[count : count + len(found)] = found
            position, count = match.end(), count + len(found)
            lengths[line] += len(found)

    def _chunk_ids(self, chunk: bytes) -> list[int]:
        return self._reference_ids([chunk.decode()])[0]

    def _learn(self, characters: Iterable[str]) -> None:
        """From now on, what these characters do need not be asked again."""
        for character in characters:
            kind, becomes = _class_of(self.reference, character)
            if self._begins_added.intersection(character + becomes):
                kind = HANDED_OVER
            data = becomes.encode()
            row = self._becomes[ord(character)]
            row[: 2 + len(data)] = (len(data), len(becomes), *data)
            self._classes[ord(character)] = kind

    def _encode_by_reference(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        lines = text.decode().split("\n")
        lines = lines[: len(lines) - (not lines[-1])]
        ids = [np.zeros(0, self.dtype)]
        lengths: list[int] = []
        for start in range(0, len(lines), LINES_AT_ONCE):  # its answers are large
            answers = self._reference_ids(lines[start : start + LINES_AT_ONCE])
            lengths += map(len, answers)
            ids.append(np.fromiter(itertools.chain.from_iterable(answers), self.dtype))
        return np.concatenate(ids), np.array(lengths, np.int32)

    def _reference_ids(self, texts: list[str]) -> list[list[int]]:
        encodings = self.reference.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def check(
        self, lines: list[bytes], ids: np.ndarray, lengths: np.ndarray, num_lines: int
    ) -> None:
        """Compare about `num_lines` of the lines that `encode_lines` was given with `tokenizers`.

        Raises:
            AssertionError: they differ; the message holds the line. A bug of ours, never hidden.
        """
        ends = np.cumsum(lengths, dtype=np.int64)
        step = max(1, len(lengths) // max(1, num_lines))
        # A line of megabytes would cost more than the block it stands in.
        middles = range(step // 2, len(lengths), step)
        rows = [row for row in middles if len(lines[row]) < MAX_CHECKED_BYTES]
        expected = self._reference_ids([lines[row].decode() for row in rows])
        for row, theirs in zip(rows, expected, strict=True):
            ours = ids[ends[row] - lengths[row] : ends[row]].tolist()
            line = lines[row].decode()
            assert ours == theirs, f"ids differ from `tokenizers` on {line!r}: {ours} {theirs}"


def load_tokenizer(name: str | Path) -> BulkTokenizer:
    """Load a BERT tokenizer.

    Args:
        name: a directory with tokenizer.json or vocab.txt, one of these files, or a hub name.

    Raises:
        UserError: nothing usable is there.
    """
    path = Path(name)
    if path.is_dir():
        found = [path / file for file in ("tokenizer.json", "vocab.txt") if (path / file).is_file()]
        if not found:
            raise UserError(
                f"--tokenizer {path}: the directory holds no tokenizer.json and no vocab.txt"
            )
        path = found[0]
    if path.is_file():
        read = _definition_from_vocab if path.suffix == ".txt" else Path.read_text
        try:
            return BulkTokenizer(read(path, encoding="utf-8"))
        except (UserError, ValueError, TypeError) as error:
            raise UserError(f"{path}: it or its tokenizer_config.json is bad: {error}") from error
    if path.is_absolute() or str(name).startswith(".") or str(name).count("/") > 1:
        raise UserError(f"--tokenizer {name}: no such file or directory")
    try:
        definition = Tokenizer.from_pretrained(str(name)).to_str()
    except Exception as error:
        raise UserError(
            f"--tokenizer {name}: no such directory here, and the hub gave no tokenizer of that "
            f"name ({type(error).__name__}); give a directory with tokenizer.json or vocab.txt"
        ) from error
    return BulkTokenizer(definition)


def _definition_from_vocab(path: Path, encoding: str) -> str:
    """A tokenizer.json for an old checkpoint that carries only vocab.txt (and perhaps a config)."""
    config_path = path.parent / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding=encoding)) if config_path.is_file() else {}
    tokens = path.read_text(encoding=encoding).removesuffix("\n").split("\n")
    return BertWordPieceTokenizer(  # TypeError if [CLS] or [SEP] is missing
        {token: index for index, token in enumerate(tokens)},
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    ).to_str()


def _why_slow(definition: dict) -> str:
    """The reason the fast route does not apply to a tokenizer definition, or an empty string."""
    for key, expected in (
        ("model", "WordPiece"),
        ("normalizer", "BertNormalizer"),
        ("pre_tokenizer", "BertPreTokenizer"),
    ):
        found = (definition.get(key) or {}).get("type")
        if found != expected:
            return f"its {key} is {found}, not {expected}"
    if definition["model"]["max_input_chars_per_word"] > MAX_WORD_CHARS:
        return f"it takes words of more than {MAX_WORD_CHARS} characters"
    for token in definition["added_tokens"]:
        if not token["content"].isascii() or any(c <= " " or c == "\x7f" for c in token["content"]):
            return f"its added token {token['content']!r} may span white space"
    return ""


_CHUNK = re.compile(rb"[^ \t\r\n]+")


def _class_of(reference: Tokenizer, character: str) -> tuple[int, str]:
    """Ask the tokenizer what a character does between two letters: (class, what it becomes).

    A BertNormalizer treats every character by itself, but for the canonical order of combining
    marks, which matters only where they are kept.
    """
    for part in unicodedata.normalize("NFD", character):
        if unicodedata.category(part) == "Cn" or (
            unicodedata.combining(part) and unicodedata.category(part) != "Mn"
        ):
            return HANDED_OVER, ""
    normalized = reference.normalizer.normalize_str(f"a{character}b")
    words = [word for word, _ in reference.pre_tokenizer.pre_tokenize_str(normalized)]
    if words == ["a", "b"]:
        return SPACE, ""
    becomes = "".join(words)[1:-1]
    if not becomes:
        return REMOVED, ""
    if len(becomes.encode()) <= MAX_BECOMES_BYTES and len(becomes) <= len(character.encode()):
        if len(words) == 1:
            return WORD, becomes
        if words == ["a", becomes, "b"] and len(becomes) == 1:
            return PUNCTUATION, becomes
    return HANDED_OVER, ""


# --- WordPiece ------------------------------------------------------------------------------------

MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def _make_trie(vocab: dict[str, int], prefix: str) -> tuple[np.ndarray, ...]:
    """The pieces as a trie over their UTF-8 bytes: node 0 begins a word, node 1 continues it.

    Returns:
        edges int64[2^k], an open-addressing table of 256 * node + byte + 1 (0 = empty); the node
        each leads to, int32[2^k]; the id of the piece that ends at a node, int32[nodes], or -1.
    """
    pieces = [(token.encode(), 0, index) for token, index in vocab.items()]
    pieces += [
        (token.removeprefix(prefix).encode(), 1, index)
        for token, index in vocab.items()
        if token.startswith(prefix) and token != prefix
    ]
    text = np.frombuffer(b"".join(piece for piece, _, _ in pieces), np.uint8)
    sizes, roots, ids = np.array([(len(p), root, index) for p, root, index in pieces], np.int64).T
    return _fill_trie(text, np.cumsum(sizes), roots, ids)


@njit(cache=True, inline="always")
def _edge_slot(edges, node, byte):
    """Where the edge of a byte out of a node is, or would be."""
    edge = 256 * np.int64(node) + byte + 1
    slot = np.int64((np.uint64(edge) * MULTIPLIER) >> np.uint64(32)) & (len(edges) - 1)
    while edges[slot] != 0 and edges[slot] != edge:
        slot = (slot + 1) & (len(edges) - 1)
    return slot


@njit(cache=True)
def _fill_trie(text, ends, roots, ids):
    size = 16
    while size < 2 * len(text):
        size *= 2
    edges = np.zeros(size, np.int64)
    children = np.zeros(size, np.int32)
    node_ids = np.full(len(text) + 2, -1, np.int32)
    num_nodes = 2
    start = 0
    for piece in range(len(ends)):
        node = roots[piece]
        for at in range(start, ends[piece]):
            slot = _edge_slot(edges, node, text[at])
            if edges[slot] == 0:
                edges[slot] = 256 * node + text[at] + 1
                children[slot] = num_nodes
                num_nodes += 1
            node = np.int64(children[slot])
        node_ids[node] = ids[piece]
        start = ends[piece]
    return edges, children, node_ids[:num_nodes].copy()


@njit(cache=True)
def _word_pieces(word, size, out, count, unk_id, edges, children, node_ids):
    """Greedy longest-match-first WordPiece of one word into out[count:]; the number of ids."""
    num = 0
    start = 0
    while start < size:
        node = np.int64(start > 0)
        stop = start
        for at in range(start, size):
            slot = _edge_slot(edges, node, word[at])
            if edges[slot] == 0:
                break
            node = np.int64(children[slot])
            if node_ids[node] >= 0:
                out[count + num] = node_ids[node]
                stop = at + 1
        if stop == start:
            out[count] = unk_id
            return 1
        num += 1
        start = stop
    return num


@njit(cache=True, inline="always")
def _entry_of(keys, low, high):
    """The one entry of the cache where a word may be."""
    mixed = (low ^ (high * MULTIPLIER)) * np.uint64(0xFF51AFD7ED558CCD)
    return np.int64((mixed ^ (mixed >> np.uint64(32))) & np.uint64(len(keys) - 1))


@njit(cache=True, inline="always")
def _decode(data, position):
    """(code point, bytes) of the UTF-8 character at a position."""
    byte = np.int64(data[position])
    if byte < 0x80:
        return byte, 1
    code = np.int64(data[position + 1] & 63)
    if byte < 0xE0:
        return (byte & 31) << 6 | code, 2
    code = code << 6 | np.int64(data[position + 2] & 63)
    if byte < 0xF0:
        return (byte & 15) << 12 | code, 3
    return (byte & 7) << 18 | code << 6 | np.int64(data[position + 3] & 63), 4


@njit(cache=True, nogil=True)
def _encode(
    data, position, line, count, out, lengths, classes, becomes, letters, max_chars, unk_id,
    cache, keys, edges, children, node_ids,
):  # fmt: skip
    """Ids of `data` from `position` into out[count:], and of each line into `lengths`.

    Stops at the end, or at the start of a chunk with a character to be learned or handed over.

    Returns:
        position, line, count, and whether that is the end.
    """
    words = np.zeros(max_chars // 2 + 4, np.uint64)  # a word in UTF-8, zeros behind it
    word = words.view(np.uint8)
    chunk_start, chunk_count = position, count
    size = num_chars = 0
    while True:
        while position < len(data) and letters[data[position]] and num_chars < max_chars:
            word[size] = letters[data[position]]
            size += 1
            num_chars += 1
            position += 1
        kind = SPACE  # at the end of the text
        code, width = 0, 0
        if position < len(data):
            code, width = _decode(data, position)
            kind = classes[code]
        if kind == WORD or (kind == PUNCTUATION and num_chars == 0):
            num_chars += becomes[code, 1]
            for k in range(becomes[code, 0] if num_chars <= max_chars else 0):
                word[size] = becomes[code, 2 + k]
                size += 1
            position += width
            if kind == WORD:
                continue
        elif kind == REMOVED:
            position += width
            continue
        if num_chars > max_chars:
            out[count] = unk_id
            count += 1
        elif num_chars > 0:
            low, high = words[0], words[1]
            entry = _entry_of(keys, low, high)
            is_same = keys[entry, 0] == low and keys[entry, 1] == high
            is_cached = is_same and keys[entry, 2] >> np.uint64(8) == size
            if is_cached:
                num = np.int64(keys[entry, 2] & np.uint64(255))
                for k in range(num):
                    out[count + k] = cache[entry, 6 + k]
            else:
                num = _word_pieces(word, size, out, count, unk_id, edges, children, node_ids)
                if size <= CACHED_BYTES and num <= CACHED_IDS:
                    keys[entry, 0], keys[entry, 1], keys[entry, 2] = low, high, size << 8 | num
                    for k in range(num):
                        cache[entry, 6 + k] = out[count + k]
            count += num
        size = num_chars = 0
        words[0] = words[1] = 0
        if kind == SPACE:
            lengths[line] += count - chunk_count
            if position == len(data):
                return position, line, count, True
            line += code == 10
            position += width
            chunk_start, chunk_count = position, count
        elif kind != PUNCTUATION:
            return chunk_start, line, chunk_count, False
