"""The bulk tokenizer against `tokenizers`, which defines the ids."""

import json
import random
import string
import sys
import unicodedata
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import NFC, BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, Whitespace

from data_tools import tokenizer as module
from data_tools.errors import UserError
from data_tools.tokenizer import SPECIAL_TOKENS, BulkTokenizer, load_tokenizer

NORMALIZERS = {
    "uncased": {},
    "cased": {"lowercase": False},
    "accents_kept": {"strip_accents": False},
    "cased_accents_stripped": {"lowercase": False, "strip_accents": True},
    "not_cleaned": {"clean_text": False},
    "chinese_joined": {"handle_chinese_chars": False},
}
ADDED_TOKENS = {
    "none": [],
    "raw": [AddedToken("Foo", normalized=False), AddedToken("<x>", normalized=False)],
    "normalized": [AddedToken("Foo", normalized=True), AddedToken("qu", normalized=True)],
    "single_word": [
        AddedToken("bar", single_word=True, normalized=True),
        AddedToken("12", single_word=True, normalized=False),
    ],
    "stripping": [
        AddedToken("@", lstrip=True, normalized=False),
        AddedToken("zz", rstrip=True, normalized=True),
    ],
    "special": [AddedToken("[DOM]", special=True, normalized=False)],
}
ALL_VARIANTS = [(name, "none") for name in NORMALIZERS] + [
    (name, added) for name in ("uncased", "cased") for added in ADDED_TOKENS if added != "none"
]
MAX_CHARS = 30


def thinned_characters(step: int) -> list[str]:
    """Every character but "\n"; of ideographs, Hangul and what is not assigned one in `step`."""
    characters = map(chr, (c for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000))
    return [
        c
        for c in characters
        if c != "\n"
        and (
            ord(c) % step == 0
            or (
                (not "\u3400" <= c < "\ud7a4" and not "\U00017000" <= c < "\U00033480")
                and unicodedata.category(c) not in ("Cn", "Co")
            )
        )
    ]


@cache
def every_character_vocabulary(step: int) -> dict[str, int]:
    """Every assigned character as a word and as a ## piece, so that [UNK] hides no difference."""
    generator = random.Random(0)
    letters = string.ascii_letters + string.digits
    words = {"".join(generator.choices(letters, k=generator.randint(2, 5))) for _ in range(4000)}
    characters = [
        character
        for character in thinned_characters(step)
        if unicodedata.category(character) not in ("Cn", "Co")
    ]
    singles = [*characters, *sorted(words), "foo", "bar", "qu", "é", "##"]
    tokens = [*SPECIAL_TOKENS, *singles, *("##" + single for single in singles)]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


@cache
def variant(normalizer: str, added: str, step: int = 64) -> tuple[BulkTokenizer, Tokenizer]:
    """Ours, and `tokenizers` as a corpus wants it: special tokens are not recognised in text."""
    theirs = Tokenizer(
        WordPiece(
            every_character_vocabulary(step), unk_token="[UNK]", max_input_chars_per_word=MAX_CHARS
        )
    )
    theirs.normalizer = BertNormalizer(**NORMALIZERS[normalizer])
    theirs.pre_tokenizer = BertPreTokenizer()
    theirs.add_tokens(ADDED_TOKENS[added])
    definition = json.loads(theirs.to_str())
    for number, token in enumerate(SPECIAL_TOKENS):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        definition["added_tokens"].append({"id": number, "content": token, "special": True} | flags)
    ours = BulkTokenizer(json.dumps(definition))
    assert not ours.slow_reason
    return ours, theirs


def split_ids(ours: BulkTokenizer, lines: list[str]) -> list[list[int]]:
    ids, lengths = ours.encode_lines("\n".join(lines).encode())
    assert ids.dtype == ours.dtype
    assert lengths.dtype == np.int32
    ends = np.cumsum(lengths)
    assert len(ids) == (ends[-1] if len(ends) else 0)
    return [ids[end - length : end].tolist() for end, length in zip(ends, lengths, strict=True)]


def assert_same_ids(variant_: tuple[BulkTokenizer, Tokenizer], lines: list[str]) -> None:
    ours, theirs = variant_
    lines = [line.replace("\n", " ") for line in [*lines, "x"]]
    expected = [e.ids for e in theirs.encode_batch_fast(lines, add_special_tokens=False)]
    for _ in range(2):  # characters and words are new to it, and then known
        for line, a, b in zip(lines, split_ids(ours, lines), expected, strict=True):
            assert a == b, repr(line)


PIECES = [
    *"aAbBfFqQzZéÉßİıΣςǅﬁÅ中文一あ한글각한", *" \t\r\x0b\x0c\x1c\x1f\x7f\0\x85\xa0\xad",
    *"\u0301\u0338\u200b\u200d\u2028\u3000\ufeff\ufffd\U0001f600\U000e0041", *".,;!?[]()#@<>$^`~_-",
    "[MASK]", "[SEP]", "##", "##ing", "Foo", "fOO", "foo", "bar", "12", "qu", "zz", "<x>", "[DOM]",
    "word", "Word2", "naïve", "x" * (MAX_CHARS - 1), "x" * MAX_CHARS, "x" * (MAX_CHARS + 1),
    "é" * MAX_CHARS, "中" * 40, "-" * 40,
]  # fmt: skip
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\n")
LINES = st.lists(
    st.lists(st.sampled_from(PIECES) | st.text(CHARACTERS, max_size=6), max_size=12).map("".join),
    max_size=8,
)


@pytest.mark.parametrize(("normalizer", "added"), ALL_VARIANTS)
@settings(max_examples=60, deadline=None)
@given(lines=LINES)
def test_ids_equal_tokenizers_for_any_unicode(
    normalizer: str, added: str, lines: list[str]
) -> None:
    assert_same_ids(variant(normalizer, added), lines)


def random_lines(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)

    def character() -> str:
        kind = generator.random()
        if kind < 0.5:
            return generator.choice(string.printable)
        if kind < 0.8:
            return generator.choice(PIECES)
        while True:
            code = generator.randrange(0x3000 if kind < 0.9 else sys.maxunicode + 1)
            if not 0xD800 <= code < 0xE000:
                return chr(code)

    return ["".join(character() for _ in range(generator.randint(0, 24))) for _ in range(count)]


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_ids_equal_tokenizers_on_many_random_lines(normalizer: str) -> None:
    assert_same_ids(variant(normalizer, "none"), random_lines(8_000, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize(("normalizer", "added"), ALL_VARIANTS)
def test_ids_equal_tokenizers_on_a_million_random_lines(normalizer: str, added: str) -> None:
    for seed in range(10):
        assert_same_ids(variant(normalizer, added), random_lines(10_000, seed))


@pytest.mark.parametrize(
    ("normalizer", "step"),
    [
        ("uncased", 64),
        ("cased", 64),
        pytest.param("uncased", 1, marks=pytest.mark.slow),
        pytest.param("accents_kept", 1, marks=pytest.mark.slow),
    ],
)
def test_every_code_point_gives_the_ids_of_tokenizers(normalizer: str, step: int) -> None:
    characters = thinned_characters(step)
    lines = [
        ",".join(f"a{c}B" for c in characters[n : n + 8]) for n in range(0, len(characters), 8)
    ]
    assert_same_ids(variant(normalizer, "none", step), lines)


def test_a_character_that_may_begin_an_added_token_is_left_to_tokenizers() -> None:
    lines = ["\u1e1foo x\u1e1foo", "FOO f\xadoo \xf6 q\u0307u"]
    for added in ADDED_TOKENS:
        assert_same_ids(variant("uncased", added), lines)


def test_ids_do_not_depend_on_what_was_seen_before() -> None:
    lines = [line.replace("\n", " ") + "." for line in random_lines(3_000, seed=5)]
    ours, _ = variant("uncased", "none")
    fresh = BulkTokenizer(ours.definition)
    first = split_ids(fresh, lines)
    assert split_ids(fresh, lines) == first
    assert split_ids(fresh, lines[::-1]) == first[::-1]


def test_a_crowded_cache_changes_no_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE_ENTRIES", 8)
    monkeypatch.setattr(module, "REMEMBERED_CHUNKS", 10)
    ours, theirs = variant("uncased", "none")
    crowded = BulkTokenizer(ours.definition)
    for seed in range(3):
        assert_same_ids((crowded, theirs), random_lines(500, seed))


@pytest.mark.parametrize(
    "line",
    [
        "word " * 1_000_000,
        "x" * 5_000_000,
        "é" * 2_500_000,
        "," * 1_000_000,
        "中文 " * 700_000,
    ],
    ids=["words", "one_ascii_word", "one_other_word", "punctuation", "chinese"],
)
def test_lines_and_words_of_5_mb(line: str) -> None:
    assert_same_ids(variant("uncased", "none"), ["before", line, "after"])


def test_empty_text_and_blank_lines() -> None:
    ours, _ = variant("uncased", "none")
    assert split_ids(ours, []) == []
    ids, lengths = ours.encode_lines(b"\n\n \t\n\x01\nab")
    assert lengths.tolist()[:4] == [0, 0, 0, 0]
    assert len(lengths) == 5
    assert len(ids) == lengths[4]


def test_a_literal_mask_in_the_text_stays_text() -> None:
    ours, theirs = variant("uncased", "none")
    (found,) = split_ids(ours, ["the [MASK] and [SEP][CLS] [PAD] [UNK]"])
    assert not set(found) & set(ours.special_ids)
    assert found == theirs.encode("the [ mask ] and [ sep ] [ cls ] [ pad ] [ unk ]").ids


def test_an_added_token_keeps_its_meaning() -> None:
    ours, _ = variant("uncased", "special")
    (found,) = split_ids(ours, ["a [DOM] b"])
    assert found[1] == ours.vocabulary["[DOM]"]


# --- falling back ---------------------------------------------------------------------------------


def other_tokenizer(kind: str) -> BulkTokenizer:
    definition = json.loads(variant("uncased", "none")[0].definition)
    if kind == "normalizer":
        definition["normalizer"] = json.loads(NFC().__getstate__())
    elif kind == "pre_tokenizer":
        definition["pre_tokenizer"] = json.loads(Whitespace().__getstate__())
    elif kind == "added":
        token = dict(definition["added_tokens"][0], id=10**6, content="two words", special=False)
        definition["added_tokens"].append(token)
    elif kind == "long_words":
        definition["model"]["max_input_chars_per_word"] = 10**7
    return BulkTokenizer(json.dumps(definition))


@pytest.mark.parametrize("kind", ["normalizer", "pre_tokenizer", "added", "long_words"])
def test_a_tokenizer_of_unknown_structure_is_served_by_tokenizers(kind: str) -> None:
    tokenizer = other_tokenizer(kind)
    assert tokenizer.slow_reason
    lines = ["Some two words here.", "", "Naïve, x" + "y" * 200] * 1000
    expected = [tokenizer.reference.encode(line, add_special_tokens=False).ids for line in lines]
    assert split_ids(tokenizer, lines) == expected
    assert split_ids(tokenizer, [""]) == []


# --- the check every build makes ------------------------------------------------------------------


def test_check_finds_a_wrong_id() -> None:
    ours, _ = variant("uncased", "none")
    text = "\n".join(random_lines(64, seed=3)).replace("\0", "").encode()
    ids, lengths = ours.encode_lines(text)
    ours.check(text.split(b"\n"), ids, lengths, 64)
    ids = ids.copy()
    ids[len(ids) // 2] += 1
    with pytest.raises(AssertionError, match="ids differ from `tokenizers`"):
        ours.check(text.split(b"\n"), ids, lengths, 64)


# --- loading --------------------------------------------------------------------------------------


def write_vocabulary(directory: Path, tokens: list[str], **config: object) -> Path:
    (directory / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    if config:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_vocab_txt_and_tokenizer_json_give_one_identity(tmp_path: Path) -> None:
    tokens = [*SPECIAL_TOKENS, "a", "##b", "é", "\u2028"]
    from_vocab = load_tokenizer(write_vocabulary(tmp_path, tokens))
    assert [from_vocab.vocabulary[token] for token in tokens] == list(range(len(tokens)))
    (tmp_path / "tokenizer.json").write_text(from_vocab.definition, encoding="utf-8")
    assert load_tokenizer(tmp_path).identity == from_vocab.identity
    assert load_tokenizer(tmp_path / "vocab.txt").identity == from_vocab.identity
    cased = load_tokenizer(write_vocabulary(tmp_path, tokens, do_lower_case=False) / "vocab.txt")
    assert cased.identity != from_vocab.identity
    assert split_ids(cased, ["A a"]) == [[cased.unk_id, cased.vocabulary["a"]]]


def test_flags_of_tokens() -> None:
    vocabulary = [*SPECIAL_TOKENS, "[unused7]", "a", "##b", "##"]
    tokenizer = BulkTokenizer(
        json.dumps(
            json.loads(variant("uncased", "none")[0].definition)
            | {"added_tokens": []}
            | {
                "model": {
                    "type": "WordPiece",
                    "unk_token": "[UNK]",
                    "continuing_subword_prefix": "##",
                    "max_input_chars_per_word": 100,
                    "vocab": {token: index for index, token in enumerate(vocabulary)},
                }
            }
        )
    )
    assert [vocabulary[i] for i in np.flatnonzero(tokenizer.is_continuation)] == ["##b"]
    assert [vocabulary[i] for i in tokenizer.replacement_ids] == ["a", "##b", "##"]
    assert tokenizer.dtype == np.uint16


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json and no vocab.txt"),
        ({"vocab.txt": b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n"}, r"no \[MASK\]"),
        ({"vocab.txt": b"a\nb\n"}, "or its tokenizer_config.json is bad"),
        ({"vocab.txt": b"a\xff\n"}, "or its tokenizer_config.json is bad"),
        (
            {"vocab.txt": b"a\n", "tokenizer_config.json": b"{"},
            "or its tokenizer_config.json is bad",
        ),
        ({"tokenizer.json": b"{}"}, "tokenizer.json"),
        ({"tokenizer.json": b"[]"}, "tokenizer.json"),
        ({"tokenizer.json": b"\xff"}, "tokenizer.json"),
        ({"tokenizer.json": b'{"model": {"type": "Nonsense"}}'}, "tokenizer.json"),
    ],
)
def test_an_unusable_tokenizer_is_a_clear_error(
    files: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/place", "a/b/c"])
def test_a_missing_tokenizer_is_a_clear_error(name: str) -> None:
    with pytest.raises(UserError, match="no such file or directory"):
        load_tokenizer(name)


def test_an_unknown_hub_name_is_a_clear_error() -> None:
    with pytest.raises(UserError, match="the hub gave no tokenizer"):
        load_tokenizer("no-such-organisation/no-such-model")
