"""Exact WordPiece ids in bulk: the ids of `tokenizers`, an order of magnitude faster.

`tokenizers` is the truth. The fast route rests on three observations about a BERT tokenizer
(BertNormalizer, BertPreTokenizer, WordPiece):

1. pieces of text between ASCII white space ("chunks") are tokenized independently;
2. a chunk of plain ASCII letters, digits and punctuation splits at each punctuation mark into words
   whose ids depend on the lower-cased word alone, so they can be looked up in a cache of
   word -> ids, filled by a greedy WordPiece on a miss;
3. every other chunk (a non-ASCII character, a control character, the first character of an added
   token) is rare or repeats, so it is handed to `tokenizers` itself and remembered.

Nothing about ASCII is assumed: what each of the 128 characters does (word, punctuation, white
space, neither) is asked of the tokenizer at start-up. A tokenizer of another structure is served by
`tokenizers` alone, and `slow_reason` says why.

The five special tokens ([CLS], [SEP], [MASK], [PAD], [UNK]) are plain text in a corpus: a literal
"[MASK]" becomes "[", "mask", "]". Other added tokens keep the meaning `tokenizers` gives them.
"""

import hashlib
import json
import unicodedata
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit
from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer

from data_tools.errors import UserError

# What a character does; WIDE: a byte that begins one of two or three bytes.
WORD, PUNCTUATION, SPACE, REMOVED, HANDED_OVER, WIDE = range(6)
CACHE_ENTRIES = 1 << 18  # of one cache line each: 16 key bytes, size and count, 11 ids
CACHE_WAYS = 4
CACHED_BYTES = 16
CACHED_IDS = 11
SLICE_BYTES = 2 << 20  # of text encoded at once, which bounds the memory
REMEMBERED_CHUNKS = 1 << 16
REMEMBERED_CHUNK_BYTES = 64
MAX_WORD_CHARS = 10_000
MAX_CHECKED_BYTES = 100_000
MAX_WIDE_BYTES = 12  # a character becomes at most; a Hangul syllable becomes 9
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
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"not a tokenizer.json: {error}") from error
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
        self._remembered: dict[bytes, list[int]] = {}
        self.slow_reason = _why_slow(plain)
        if not self.slow_reason:
            self._prepare(plain)

    def _prepare(self, plain: dict) -> None:
        model = plain["model"]
        self._prefix = model["continuing_subword_prefix"]
        self._max_chars = model["max_input_chars_per_word"]
        self._classes, self._lowered = _ascii_tables(self.reference, plain["added_tokens"])
        self._pieces = _piece_table(model["vocab"], self._prefix)
        self._cache = np.zeros((CACHE_ENTRIES, 16), np.uint32)
        # Of the characters of two or three bytes: class; bytes, bytes not first, and the bytes.
        self._wide_classes = np.full(1 << 16, HANDED_OVER, np.uint8)
        self._wide_bytes = np.zeros((1 << 16, 2 + MAX_WIDE_BYTES), np.uint8)
        self._known_characters: set[str] = set()

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
        return np.array(
            sorted(
                index
                for token, index in self.vocabulary.items()
                if token not in SPECIAL_TOKENS and not token.startswith("[unused")
            ),
            np.int32,
        )

    @property
    def special_ids(self) -> tuple[int, ...]:
        return (self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id)

    def decode(self, ids: np.ndarray) -> str:
        """Readable text of token ids, special tokens shown."""
        return self._full.decode([int(i) for i in ids], skip_special_tokens=False)

    def encode_lines(self, text: bytes | bytearray) -> tuple[np.ndarray, np.ndarray]:
        r"""Token ids of every line of `text`.

        Args:
            text: valid UTF-8, lines separated by "\n"; a last line without "\n" counts.

        Returns:
            ids (`self.dtype`, all lines back to back) and the tokens of each line (int32).
        """
        slices = list(_slices(text))
        if not slices:
            return np.zeros(0, self.dtype), np.zeros(0, np.int32)
        encode = self._encode_by_reference if self.slow_reason else self._encode_slice
        ids, lengths = zip(*map(encode, slices), strict=True)
        return np.concatenate(ids), np.concatenate(lengths)

    def _encode_slice(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        data = np.frombuffer(text, np.uint8)
        num_lines = text.count(b"\n") + (len(text) > 0 and text[-1] != 10)
        ids = np.empty(len(data) + 1, self.dtype)
        lengths = np.zeros(num_lines, np.int32)
        handed_over = np.empty((64 + len(data) // 64, 4), np.int64)
        position, line, count, num_handed = 0, 0, 0, 0
        while True:  # more than once only when `handed_over` was too small
            position, line, count, num_handed, is_done = _encode(
                data, position, line, count, num_handed, ids, lengths, handed_over,
                self._classes, self._lowered, self._wide_classes, self._wide_bytes,
                self._max_chars, self.unk_id, self._cache, *self._pieces,
            )  # fmt: skip
            if is_done:
                break
            handed_over = np.concatenate([handed_over, np.empty_like(handed_over)])
        if not num_handed:
            return ids[:count].copy(), lengths
        return self._insert_handed_over(data, ids[:count], lengths, handed_over[:num_handed])

    def _insert_handed_over(
        self, data: np.ndarray, ids: np.ndarray, lengths: np.ndarray, handed_over: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode the chunks of `handed_over` (out position, start, stop, line); splice them in."""
        view = data.data
        chunks = [bytes(view[start:stop]) for _, start, stop, _ in handed_over.tolist()]
        answers = self._encode_chunks(chunks)
        counts = np.fromiter(map(len, answers), np.int64, len(answers))
        flat = np.fromiter((i for answer in answers for i in answer), self.dtype, counts.sum())
        np.add.at(lengths, handed_over[:, 3], counts)
        return _splice(ids, handed_over[:, 0].copy(), counts, flat), lengths

    def _encode_chunks(self, chunks: list[bytes]) -> list[list[int]]:
        remembered = self._remembered
        unseen = [chunk for chunk in dict.fromkeys(chunks) if chunk not in remembered]
        texts = [chunk.decode() for chunk in unseen]
        answers = dict(zip(unseen, self._reference_ids(texts), strict=True))
        result = [answers[c] if c in answers else remembered[c] for c in chunks]
        if len(remembered) + len(answers) > REMEMBERED_CHUNKS:
            remembered.clear()
        remembered.update((c, a) for c, a in answers.items() if len(c) <= REMEMBERED_CHUNK_BYTES)
        self._learn(set().union(*texts) - self._known_characters)
        return result

    def _learn(self, characters: set[str]) -> None:
        """From the next slice on, what these characters do need not be asked again."""
        self._known_characters |= characters
        for character in characters:
            if 0x80 <= ord(character) < 1 << 16:
                kind, becomes = _class_of(self.reference, character)
                row = self._wide_bytes[ord(character)]
                row[2 : 2 + len(becomes)] = list(becomes)
                row[:2] = len(becomes), len(becomes) - len(becomes.decode())
                self._wide_classes[ord(character)] = kind

    def _encode_by_reference(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        lines = text.removesuffix(b"\n").decode().split("\n")
        answers = self._reference_ids(lines)
        lengths = np.fromiter(map(len, answers), np.int32, len(answers))
        flat = np.fromiter((i for a in answers for i in a), self.dtype, int(lengths.sum()))
        return flat, lengths

    def _reference_ids(self, texts: list[str]) -> list[list[int]]:
        encodings = self.reference.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def check(self, text: bytes, ids: np.ndarray, lengths: np.ndarray, num_lines: int) -> None:
        """Compare about `num_lines` lines of one `encode_lines` result with `tokenizers`.

        Raises:
            AssertionError: they differ; the message holds the line. A bug of ours, never hidden.
        """
        line_ends = np.append(np.flatnonzero(np.frombuffer(text, np.uint8) == 10), len(text))
        line_starts = np.append(0, line_ends[:-1] + 1)
        ends = np.cumsum(lengths, dtype=np.int64)
        step = max(1, len(lengths) // max(1, num_lines))
        # A line of megabytes would cost more than the block it stands in.
        rows = [
            row
            for row in range(step // 2, len(lengths), step)
            if line_ends[row] - line_starts[row] < MAX_CHECKED_BYTES
        ]
        lines = [text[line_starts[row] : line_ends[row]].decode() for row in rows]
        for row, line, theirs in zip(rows, lines, self._reference_ids(lines), strict=True):
            ours = ids[ends[row] - lengths[row] : ends[row]].tolist()
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
        if (path / "tokenizer.json").is_file():
            return _named(path / "tokenizer.json")
        if (path / "vocab.txt").is_file():
            return BulkTokenizer(_definition_from_vocab(path / "vocab.txt"))
        raise UserError(
            f"--tokenizer {path}: the directory holds no tokenizer.json and no vocab.txt"
        )
    if path.is_file():
        if path.suffix == ".txt":
            return BulkTokenizer(_definition_from_vocab(path))
        return _named(path)
    if path.is_absolute() or str(name).startswith(".") or str(name).count("/") > 1:
        raise UserError(f"--tokenizer {name}: no such file or directory")
    try:
        return BulkTokenizer(Tokenizer.from_pretrained(str(name)).to_str())
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"--tokenizer {name}: no such directory here, and the hub gave no tokenizer of that "
            f"name ({type(error).__name__}); give a directory with tokenizer.json or vocab.txt"
        ) from error


def _named(path: Path) -> BulkTokenizer:
    try:
        return BulkTokenizer(path.read_text(encoding="utf-8"))
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from error


def _definition_from_vocab(path: Path) -> str:
    """A tokenizer.json for an old checkpoint that carries only vocab.txt (and perhaps a config)."""
    config_path = path.parent / "tokenizer_config.json"
    try:
        tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        config = (
            json.loads(config_path.read_text(encoding="utf-8")) if config_path.is_file() else {}
        )
        tokenizer = BertWordPieceTokenizer(
            {token: index for index, token in enumerate(tokens)},
            handle_chinese_chars=config.get("tokenize_chinese_chars", True),
            strip_accents=config.get("strip_accents"),
            lowercase=config.get("do_lower_case", True),
        )
    except (ValueError, TypeError) as error:  # TypeError: [CLS] or [SEP] is missing
        raise UserError(f"{path}: it or its tokenizer_config.json is malformed: {error}") from error
    return tokenizer.to_str()


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


def _slices(text: bytes | bytearray) -> Iterator[bytes]:
    """Whole lines of about SLICE_BYTES."""
    start = 0
    while start < len(text):
        stop = text.find(b"\n", start + SLICE_BYTES - 1) + 1 or len(text)
        yield bytes(text[start:stop])
        start = stop


def _ascii_tables(reference: Tokenizer, added_tokens: list[dict]) -> tuple[np.ndarray, np.ndarray]:
    """What each byte does, and the byte it becomes."""
    classes = np.full(256, HANDED_OVER, np.uint8)
    classes[0xC2:0xF0] = WIDE
    lowered = np.zeros(256, np.uint8)
    for code in range(128):
        classes[code], becomes = _class_of(reference, chr(code))
        lowered[code] = becomes[0] if becomes else 0
    classes[10] = SPACE  # the line separator of `encode_lines`
    for token in added_tokens:
        for first in token["content"][:1]:
            classes[[ord(first), ord(first.lower()), ord(first.upper())]] = HANDED_OVER
    return classes, lowered


def _class_of(reference: Tokenizer, character: str) -> tuple[int, bytes]:
    """Ask the tokenizer what a character does between two letters: (class, what it becomes).

    A BertNormalizer treats every character by itself, but for the canonical order of combining
    marks, which matters only where they are kept.
    """
    for part in unicodedata.normalize("NFD", character):
        if unicodedata.category(part) == "Cn" or (
            unicodedata.combining(part) and unicodedata.category(part) != "Mn"
        ):
            return HANDED_OVER, b""
    normalized = reference.normalizer.normalize_str(f"a{character}b")
    words = [word for word, _ in reference.pre_tokenizer.pre_tokenize_str(normalized)]
    if words == ["a", "b"]:
        return SPACE, b""
    if words == ["ab"]:
        return REMOVED, b""
    becomes = "".join(words)[1:-1]
    size = len(becomes.encode())
    if size <= MAX_WIDE_BYTES and len(becomes) <= len(character.encode()):
        if len(words) == 1:
            return WORD, becomes.encode()
        if words == ["a", becomes, "b"] and len(becomes) == 1:
            return PUNCTUATION, becomes.encode()
    return HANDED_OVER, b""


def _piece_table(vocab: dict[str, int], prefix: str) -> tuple[Any, ...]:
    """An open-addressing table of the pieces in UTF-8, for `_find_piece`.

    Returns:
        slots int32[2^k] (entry + 1, 0 = empty), hashes uint64[n], offsets int64[n + 1] into text
        uint8[...], ids int32[n], is_first bool[n], and the longest piece in bytes.
    """
    entries = []
    for token, index in vocab.items():
        entries.append((token.encode(), index, True))
        if token.startswith(prefix) and token != prefix:
            entries.append((token[len(prefix) :].encode(), index, False))
    text = np.frombuffer(b"".join(piece for piece, _, _ in entries) or b"\0", np.uint8)
    sizes = np.array([len(piece) for piece, _, _ in entries] or [0], np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    ids = np.array([index for _, index, _ in entries] or [0], np.int32)
    is_word_start = np.array([first for _, _, first in entries] or [True], np.bool_)
    num_slots = 1 << max(4, (3 * len(entries)).bit_length())
    slots = np.zeros(num_slots, np.int32)
    hashes = np.zeros(len(ids), np.uint64)
    if entries:
        _fill_pieces(slots, hashes, offsets, text, is_word_start)
    return slots, hashes, offsets, text, ids, is_word_start, int(sizes.max())


FIRST_SEED = np.uint64(0xCBF29CE484222325)
NEXT_SEED = np.uint64(0x9E3779B97F4A7C15)
FNV_PRIME = np.uint64(0x100000001B3)


@njit(cache=True, inline="always")
def _slot_of(hash_value, num_slots):
    mixed = hash_value ^ (hash_value >> np.uint64(29))
    return np.int64(mixed & np.uint64(num_slots - 1))


@njit(cache=True)
def _fill_pieces(slots, hashes, offsets, text, is_first):
    for entry in range(len(hashes)):
        value = FIRST_SEED if is_first[entry] else NEXT_SEED
        for at in range(offsets[entry], offsets[entry + 1]):
            value = (value ^ np.uint64(text[at])) * FNV_PRIME
        hashes[entry] = value
        slot = _slot_of(value, len(slots))
        while slots[slot]:
            slot = (slot + 1) & (len(slots) - 1)
        slots[slot] = entry + 1


@njit(cache=True)
def _find_piece(word, start, stop, value, first, slots, hashes, offsets, text, ids, is_first):
    """Id of the piece word[start:stop] whose FNV hash is `value`, or -1."""
    slot = _slot_of(value, len(slots))
    while slots[slot]:
        entry = slots[slot] - 1
        size = offsets[entry + 1] - offsets[entry]
        if hashes[entry] == value and size == stop - start and is_first[entry] == first:
            same = True
            for at in range(size):
                if text[offsets[entry] + at] != word[start + at]:
                    same = False
                    break
            if same:
                return ids[entry]
        slot = (slot + 1) & (len(slots) - 1)
    return np.int32(-1)


@njit(cache=True)
def _word_pieces(
    word, size, out, unk_id, scratch, slots, hashes, offsets, text, ids, is_first, longest
):
    """Greedy longest-match-first WordPiece of one word into `out`; returns the number of ids."""
    count = 0
    start = 0
    while start < size:
        limit = min(size, start + longest)
        value = FIRST_SEED if start == 0 else NEXT_SEED
        for at in range(start, limit):
            value = (value ^ np.uint64(word[at])) * FNV_PRIME
            scratch[at - start] = value
        found = np.int32(-1)
        stop = limit
        while stop > start:
            found = _find_piece(
                word, start, stop, scratch[stop - start - 1], start == 0,
                slots, hashes, offsets, text, ids, is_first,
            )  # fmt: skip
            if found >= 0:
                break
            stop -= 1
        if found < 0:
            out[0] = unk_id
            return 1
        out[count] = found
        count += 1
        start = stop
    return count


@njit(cache=True, inline="always")
def _find_entry(cache, low, high, size):
    """(entry of a key or the one to overwrite, whether it is found); a key is 16 bytes and size."""
    mixed = (low ^ (high * NEXT_SEED)) * np.uint64(0xFF51AFD7ED558CCD)
    mixed ^= mixed >> np.uint64(32)
    first = np.int64(mixed & np.uint64(len(cache) - 1)) & ~(CACHE_WAYS - 1)
    for entry in range(first, first + CACHE_WAYS):
        if cache[entry, 4] == 0:
            return entry, False
        if (
            cache[entry, 0] == np.uint32(low & np.uint64(0xFFFFFFFF))
            and cache[entry, 1] == np.uint32(low >> np.uint64(32))
            and cache[entry, 2] == np.uint32(high & np.uint64(0xFFFFFFFF))
            and cache[entry, 3] == np.uint32(high >> np.uint64(32))
            and cache[entry, 4] >> np.uint32(8) == size
        ):
            return entry, True
    return first + np.int64((mixed >> np.uint64(40)) & np.uint64(CACHE_WAYS - 1)), False


@njit(cache=True, nogil=True)
def _encode(
    data, position, line, count, num_handed, out, lengths, handed_over,
    classes, lowered, wide_classes, wide_bytes, max_chars, unk_id, cache,
    slots, hashes, offsets, text, ids, is_first, longest,
):  # fmt: skip
    """One pass over `data` from `position`; chunks for `tokenizers` go to `handed_over`.

    Returns where it stopped and whether that is the end; it stops early, at the start of a chunk,
    only when `handed_over` is full.
    """
    total = len(data)
    word = np.empty(4 * max_chars + 16, np.uint8)
    pieces = np.empty(len(word), np.int32)
    scratch = np.empty(len(word), np.uint64)
    while position < total:
        byte = data[position]
        if classes[byte] == SPACE:
            line += byte == 10
            position += 1
            continue
        chunk_start, chunk_count = position, count
        kind = WORD
        while kind != SPACE and kind != HANDED_OVER:
            # Collect one word, or one punctuation mark, which is a word of one character.
            low = np.uint64(0)
            high = np.uint64(0)
            size = 0
            not_first = 0  # bytes that are not the first of their character
            kind = SPACE  # at the end of the text
            while position < total:
                byte = data[position]
                kind = classes[byte]
                if kind == WORD or (kind == PUNCTUATION and size == 0):
                    letter = np.uint64(lowered[byte])
                    if size < 8:
                        low |= letter << np.uint64(8 * size)
                    elif size < CACHED_BYTES:
                        high |= letter << np.uint64(8 * (size - 8))
                    if size < len(word):
                        word[size] = lowered[byte]
                    size += 1
                    position += 1
                    if kind == WORD:
                        continue
                elif kind == WIDE:
                    code = np.int64(byte & 31) << 6 | np.int64(data[position + 1] & 63)
                    width = 2
                    if byte >= 0xE0:
                        code = (code & 1023) << 6 | np.int64(data[position + 2] & 63)
                        width = 3
                    kind = wide_classes[code]
                    if kind == WORD or (kind == PUNCTUATION and size == 0):
                        for k in range(wide_bytes[code, 0]):
                            letter = np.uint64(wide_bytes[code, 2 + k])
                            if size < 8:
                                low |= letter << np.uint64(8 * size)
                            elif size < CACHED_BYTES:
                                high |= letter << np.uint64(8 * (size - 8))
                            if size < len(word):
                                word[size] = wide_bytes[code, 2 + k]
                            size += 1
                        not_first += wide_bytes[code, 1]
                        position += width
                        if kind == WORD:
                            continue
                    elif kind == REMOVED or (kind == SPACE and size == 0):
                        position += width
                        kind = SPACE  # should the text end here
                        continue
                    elif kind == SPACE:
                        kind = WORD  # of the chunk there may be more
                elif kind == REMOVED:
                    position += 1
                    kind = SPACE
                    continue
                break
            else:
                kind = SPACE
            if size == 0:
                continue
            if size - not_first > max_chars:
                out[count] = unk_id
                count += 1
                continue
            entry, is_cached = np.int64(0), False
            if size <= CACHED_BYTES:
                entry, is_cached = _find_entry(cache, low, high, size)
            if is_cached:
                num = np.int64(cache[entry, 4] & np.uint32(255))
                for k in range(num):
                    out[count + k] = cache[entry, 5 + k]
            else:
                num = _word_pieces(
                    word, size, pieces, unk_id, scratch,
                    slots, hashes, offsets, text, ids, is_first, longest,
                )  # fmt: skip
                for k in range(num):
                    out[count + k] = pieces[k]
                if size <= CACHED_BYTES and num <= CACHED_IDS:
                    cache[entry, 0] = np.uint32(low & np.uint64(0xFFFFFFFF))
                    cache[entry, 1] = np.uint32(low >> np.uint64(32))
                    cache[entry, 2] = np.uint32(high & np.uint64(0xFFFFFFFF))
                    cache[entry, 3] = np.uint32(high >> np.uint64(32))
                    cache[entry, 4] = np.uint32(size << 8 | num)
                    for k in range(num):
                        cache[entry, 5 + k] = pieces[k]
            count += num
        if kind == HANDED_OVER:  # somewhere in the chunk
            count = chunk_count
            if num_handed == len(handed_over):
                return chunk_start, line, count, num_handed, False
            while position < total and classes[data[position]] != SPACE:
                position += 1
            handed_over[num_handed, 0] = count
            handed_over[num_handed, 1] = chunk_start
            handed_over[num_handed, 2] = position
            handed_over[num_handed, 3] = line
            num_handed += 1
        lengths[line] += count - chunk_count
    return position, line, count, num_handed, True


@njit(cache=True, nogil=True)
def _splice(ids, positions, counts, flat):
    """Insert `counts[k]` ids of `flat` before ids[positions[k]], for ascending positions."""
    result = np.empty(len(ids) + len(flat), ids.dtype)
    source, target, taken = 0, 0, 0
    for k in range(len(positions)):
        while source < positions[k]:
            result[target] = ids[source]
            source += 1
            target += 1
        for _ in range(counts[k]):
            result[target] = flat[taken]
            taken += 1
            target += 1
    while source < len(ids):
        result[target] = ids[source]
        source += 1
        target += 1
    return result
