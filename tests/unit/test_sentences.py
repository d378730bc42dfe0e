"""The sentence splitter and its guards against the library's bugs."""

import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.errors import UserError
from data_tools.sentences import WINDOW_CHARS, make_splitter

SENTENCE = "Dr. Smith saw 3.5 ml of it in Fig. 2. "
WHITE_SPACE = [chr(c) for c in range(0x3001) if chr(c).isspace() and chr(c) not in "\r\n"]


def split(paragraph: str, language: str = "en") -> tuple[list[str], Counter[str]]:
    counts: Counter[str] = Counter()
    return make_splitter("sentencex", language)(paragraph, counts), counts


def test_sentences_end_where_they_should() -> None:
    found, counts = split('Dr. Smith came. "Who is it?" she asked. It was 3.5 km away!')
    assert [s.strip() for s in found] == [
        "Dr. Smith came.",
        '"Who is it?" she asked.',
        "It was 3.5 km away!",
    ]
    assert not counts


@pytest.mark.parametrize("space", WHITE_SPACE)
def test_multi_byte_white_space_does_not_crash_the_splitter(space: str) -> None:
    found, counts = split(f"Take vitamin C{space}. Then rest. Done.")
    assert "".join(found) == f"Take vitamin C{space}. Then rest. Done."
    assert len(found) >= 2
    assert not counts


@settings(max_examples=300, deadline=None)
@given(
    text=st.lists(
        st.sampled_from([*WHITE_SPACE, "A", "b", ". ", "? ", "。", "é", "Mr.", '"', "(", "1"])
        | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), max_size=4),
        max_size=30,
    ).map("".join),
    repeat=st.sampled_from([1, 1, 1, 700]),
)
def test_no_character_is_lost_or_changed(text: str, repeat: int) -> None:
    paragraph = text * repeat
    found, counts = split(paragraph)
    assert "".join(found) == paragraph
    assert set(counts) <= {"sentences_split_again"}


@pytest.mark.parametrize("sentence", [SENTENCE, "这是一个很长的中文句子。", "Ça alors, dit-il! "])
def test_long_paragraphs_are_split_like_short_ones_in_linear_time(sentence: str) -> None:
    short, _ = split(sentence * 20)
    start = time.process_time()
    long, counts = split(sentence * (2_000_000 // len(sentence)))
    assert time.process_time() - start < 20  # 3 hours for Chinese, if quadratic
    assert set(long) <= set(short) | {short[-1].strip()}
    assert not counts


def test_an_over_long_sentence_is_cut_at_white_space_and_counted() -> None:
    words = "word " * 5_000 + "End. New one here. "
    found, counts = split(words * 2)
    assert "".join(found) == words * 2
    assert max(map(len, found)) <= WINDOW_CHARS
    assert all(s.endswith((" ", ".")) for s in found)
    assert counts["sentences_split_again"] > 0


def test_a_word_is_never_cut() -> None:
    word = "x" * 5_000_000
    found, _ = split(f"First here. Then {word} and more. Last one.")
    assert any(word in s for s in found)


def test_a_panic_of_the_library_is_survived_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    panic = type("PanicException", (BaseException,), {})

    def fail(*_: object) -> None:
        raise panic

    monkeypatch.setattr("sentencex.segment", fail)
    assert split("One. Two.") == (["One. Two."], Counter(paragraphs_not_split=1))


def test_an_interrupt_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sentencex.segment", interrupt)
    with pytest.raises(KeyboardInterrupt):
        split("One. Two.")


def test_splitter_none_keeps_a_line_whole() -> None:
    assert make_splitter("none", "en")("One. Two.", Counter()) == ["One. Two."]


@pytest.mark.parametrize(("name", "language"), [("punkt", "en"), ("sentencex", "English")])
def test_an_unknown_splitter_or_language_is_a_clear_error(name: str, language: str) -> None:
    with pytest.raises(UserError, match="expected"):
        make_splitter(name, language)
