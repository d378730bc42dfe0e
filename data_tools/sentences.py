r"""Sentence segmentation: one small seam, `Splitter`, filled by `sentencex`.

`sentencex` (Wikimedia, MIT, about 300 languages) is fast and good but has three bugs we guard
against: it panics (a BaseException) when a multi-byte white-space character stands between a
capital and a period ("Vitamin C\u00a0. Then"), it swallows sentences of long inputs, and it takes
time quadratic in the number of non-ASCII full stops (200,000 characters of Chinese: 12 s). So it
sees plain spaces instead of such white space, and never more than `WINDOW_CHARS` at once.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable
from functools import partial

import sentencex

from data_tools.errors import UserError

Splitter = Callable[[str, Counter[str]], list[str]]
"""(paragraph, counts) -> its sentences, which make up the paragraph; some may be blank.

`counts` receives "sentences_split_again" and "paragraphs_not_split".
"""

SPLITTERS = ("sentencex", "none")
WINDOW_CHARS = 4_000
_WIDE = ["\u00a0", "\u1680", *map(chr, range(0x2000, 0x200B)), *"\u2028\u2029\u202f\u205f\u3000"]
_SPACE = re.compile(f"[ \t{''.join(_WIDE)}]")  # where the tokenizer ends a word; it drops U+0085


def make_splitter(name: str, language: str) -> Splitter:
    """The splitter called `name` ("sentencex", or "none": a line is a sentence)."""
    if name == "none":
        return lambda paragraph, counts: [paragraph]
    if name != "sentencex":
        raise UserError(f"--splitter {name}: unknown; expected one of {', '.join(SPLITTERS)}")
    if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)*", language):
        raise UserError(f"--language {language}: expected a code like en, de, zh")
    return partial(_split, language)


def _split(language: str, paragraph: str, counts: Counter[str]) -> list[str]:
    if len(paragraph) <= WINDOW_CHARS:
        return _segment(language, paragraph, counts)
    sentences = []
    start = 0
    while len(paragraph) - start > WINDOW_CHARS:
        pieces = _segment(language, paragraph[start : start + WINDOW_CHARS], counts)
        if len(pieces) > 1:
            pieces.pop()  # the window cut it short: it begins the next one
        else:
            # Behind the next white space: a cut inside a word would change its ids.
            space = _SPACE.search(paragraph, start + WINDOW_CHARS // 2)
            pieces = [paragraph[start : space.end() if space else len(paragraph)]]
            counts["sentences_split_again"] += 1
        sentences += pieces
        start += sum(map(len, pieces))
    return sentences + _segment(language, paragraph[start:], counts)


def _segment(language: str, text: str, counts: Counter[str]) -> list[str]:
    seen = text
    for space in () if text.isascii() else ("\u0085", *_WIDE):
        seen = seen.replace(space, " ")
    try:
        pieces = sentencex.segment(language, seen)
    except BaseException as error:  # a Rust panic; KeyboardInterrupt and the like must pass
        if type(error).__name__ != "PanicException":
            raise
        counts["paragraphs_not_split"] += 1
        return [text]
    if seen == text:
        return pieces
    ends = list(itertools.accumulate(map(len, pieces), initial=0))
    return [text[a:b] for a, b in itertools.pairwise(ends)]
