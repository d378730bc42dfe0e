"""Text to shards: speed against what people use, and the memory of a worker.

    python benchmarks/sharding.py CORPUS_DIR TOKENIZER_DIR [--rounds 5] [--copies 20] [--json FILE]

CORPUS_DIR holds raw paragraphs (`pubmed_ccby_raw`, `medquad`, `novels`, `wikipedia`, each
`NAME_train.jsonl.gz`) and the same or like text with one sentence a line (`pubmed_ccby`,
`pubmed_abstracts`, each `NAME_train.txt.gz`). All figures are CPU seconds of one process with one
thread, of all its work: reading, splitting, ids, writing, hashing, merging. The documents are dealt
to the rounds at random, in every round both sides get text that was not seen before, and the rounds
alternate. Tokenizers are loaded, and compiled functions compiled, before.

- paragraphs: against the Megatron way, emulated in this process: NLTK's punkt splits a document,
  a Hugging Face tokenizer is called once a sentence, the ids are appended to a file. (Its
  `preprocess_data.py` does the same in worker processes.) The pretrained punkt is a download;
  this one is trained on a part of the text that no round uses, which does not change its speed.
- sentences: against `tokenizers.encode_batch_fast` alone, which writes nothing.
- memory: the peak of a process that shards the articles once, and COPIES times under changed words
  (the letters of each copy are exchanged, so that its words were never seen); the latter also with
  the blocks of 32 MiB that a build takes above 128 GiB of input.
"""

import argparse
import gzip
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTrainer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from data_tools.build import BuildOptions, build
from data_tools.tokenizer import BulkTokenizer, load_tokenizer

RAW = ("pubmed_ccby_raw", "medquad", "novels", "wikipedia")
SPLIT = ("pubmed_ccby", "pubmed_abstracts")
BASELINE_BYTES = 2_000_000  # of each round go to the other side, the rest to us
PUNKT_BYTES = 1_000_000
VOWELS, CONSONANTS = b"aeiou", b"bcdfghjklmnpqrstvwxyz"
SHARD_ALONE = r"""
import re, sys, time
from pathlib import Path
from data_tools.build import BuildOptions, build
from data_tools.tokenizer import load_tokenizer
tokenizer = load_tokenizer(sys.argv[2])
tokenizer.encode_lines(b"compile first")

def peak():  # ru_maxrss would count the parent's memory before exec
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

before, start = peak(), time.process_time()
options = BuildOptions(format="text", block_bytes=int(sys.argv[4]))
build([sys.argv[1]], Path(sys.argv[3]), tokenizer, "benchmark", options)
seconds = time.process_time() - start
print(seconds, peak(), before)
"""


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def deal(texts: list[str], rounds: int) -> list[tuple[list[str], list[str]]]:
    """For each round the documents of the other side, about BASELINE_BYTES, and ours."""
    random.Random(0).shuffle(texts)
    dealt = []
    for number in range(rounds):
        part = texts[number::rounds]
        sizes = np.cumsum([len(text.encode()) for text in part])
        count = int(np.searchsorted(sizes, BASELINE_BYTES)) + 1
        dealt.append((part[:count], part[count:]))
    return dealt


def compare(
    what: str,
    rounds: list[tuple[list[str], list[str]]],
    slow: Callable[[list[str]], object],
    fast: Callable[[list[str], int], Callable[[], object]],
) -> dict:
    """CPU seconds of `slow(texts)` and of what `fast(texts, round)` returns, round by round."""
    rows = []
    for number, (theirs, ours) in enumerate(rounds):
        run = fast(ours, number)
        rates = [
            sum(len(text.encode()) for text in texts) / 1e6 / cpu_seconds(function)
            for texts, function in ((theirs, partial(slow, theirs)), (ours, run))
        ]
        rows.append(rates)
        print(
            f"  {rates[0]:8.3f} MB/s  {rates[1]:8.2f} MB/s  {rates[1] / rates[0]:6.1f}x", flush=True
        )
    ratios = [ours / theirs for theirs, ours in rows]
    spread = f"{min(ratios):.1f}-{max(ratios):.1f}"
    print(
        f"{what}: {statistics.median(ratios):.1f}x (median of {len(ratios)}; {spread})", flush=True
    )
    return {"what": what, "mb_per_cpu_second": rows}


def paragraphs(
    corpus: Path, folder: Path, tokenizer: BulkTokenizer, rounds: int, work: Path
) -> dict:
    texts = []
    for name in RAW:
        with gzip.open(corpus / f"{name}_train.jsonl.gz", "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"] for line in file]
    random.Random(1).shuffle(texts)
    trainer = PunktTrainer()
    size = 0
    while size < PUNKT_BYTES:
        text = texts.pop()
        size += len(text)
        trainer.train(text, finalize=False)
    trainer.finalize_training()
    punkt = PunktSentenceTokenizer(trainer.get_params())
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))

    def megatron_way(texts: list[str]) -> None:
        with open(work / "megatron", "wb") as file:
            for text in texts:
                for sentence in punkt.tokenize(text):
                    ids = theirs(sentence).input_ids
                    file.write(np.array(ids, np.uint16).tobytes())

    def ours(texts: list[str], number: int) -> Callable[[], object]:
        path = work / f"raw{number}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        return partial(build, [str(path)], work / f"raw{number}", tokenizer, "x", BuildOptions())

    what = "raw paragraphs to shards / the Megatron way"
    return compare(what, deal(texts, rounds), megatron_way, ours)


def sentences(
    corpus: Path, folder: Path, tokenizer: BulkTokenizer, rounds: int, work: Path
) -> dict:
    texts = []
    for name in SPLIT:
        with gzip.open(corpus / f"{name}_train.txt.gz", "rt", encoding="utf-8") as file:
            texts += file.read().split("\n\n")
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()

    def encode(texts: list[str]) -> None:
        lines = [line for text in texts for line in text.split("\n")]
        theirs.encode_batch_fast(lines, add_special_tokens=False)

    def ours(texts: list[str], number: int) -> Callable[[], object]:
        path = work / f"split{number}.txt"
        path.write_text("\n\n".join(texts), encoding="utf-8")
        options = BuildOptions(format="sentences")
        return partial(build, [str(path)], work / f"split{number}", tokenizer, "x", options)

    what = "sentences to shards / encode_batch_fast"
    return compare(what, deal(texts, rounds), encode, ours)


# --- memory ---------------------------------------------------------------------------------------


def exchanged(text: bytes, copy: int) -> bytes:
    """The text with its vowels and its consonants exchanged among themselves."""
    table = bytearray(range(256))
    generator = np.random.default_rng(copy)
    for letters in (VOWELS, CONSONANTS):
        for a, b in zip(letters, generator.permutation(list(letters)), strict=True):
            table[a], table[a - 32] = b, b - 32
    return text.translate(bytes(table)) if copy else text


def memory(corpus: Path, folder: Path, copies: int, work: Path) -> list[dict]:
    with gzip.open(corpus / "pubmed_ccby_raw_train.jsonl.gz") as file:
        texts = [json.loads(line)["text"].encode() for line in file]
    rows = []
    for count, block_bytes in ((1, 8 << 20), (copies, 8 << 20), (copies, 32 << 20)):
        path = work / "large.txt"
        with open(path, "wb") as out:
            for copy in range(count):
                out.writelines(exchanged(text, copy) + b"\n\n" for text in texts)
        output = work / f"large{count}_{block_bytes}"
        command = [sys.executable, "-c", SHARD_ALONE, str(path), str(folder), str(output)]
        command.append(str(block_bytes))
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds, peak, before = map(float, answer.split())
        size = path.stat().st_size / 1e6
        print(
            f"{count:3d}x the articles, {size:6.0f} MB, blocks of {block_bytes >> 20} MiB: peak "
            f"{peak:.0f} MiB (of them {before:.0f} MiB before the first byte), "
            f"{size / seconds:.1f} MB per CPU second",
            flush=True,
        )
        rows.append(
            {
                "copies": count,
                "block_bytes": block_bytes,
                "mb": size,
                "peak_mib": peak,
                "cpu_seconds": seconds,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path, help="directory with tokenizer.json")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.tokenizer)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        (work / "compile.txt").write_text("One. Two.\n\nThree.")
        build([str(work / "compile.txt")], work / "compile", tokenizer, "x", BuildOptions())
        common = (given.corpus, given.tokenizer, tokenizer, given.rounds, work)
        results = {
            "paragraphs": paragraphs(*common),
            "sentences": sentences(*common),
            "memory": memory(given.corpus, given.tokenizer, given.copies, work),
        }
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
