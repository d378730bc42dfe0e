"""Text to shards: speed against what people use, and the memory of a worker.

    python benchmarks/sharding.py CORPUS_DIR TOKENIZER_DIR [--rounds 5] [--copies 20]

CORPUS_DIR holds `pubmed_ccby_raw_train.jsonl.gz` (raw paragraphs) and `pubmed_ccby_train.txt.gz`
(the same, one sentence a line). All figures are CPU seconds of one process with one thread, of all
its work: reading, splitting, ids, writing, hashing, merging. In every round both sides get text
that was not seen before in the process; the rounds alternate.

- paragraphs: against the Megatron way, emulated in this process: NLTK's punkt splits a document,
  a Hugging Face tokenizer is called once a sentence, the ids are appended to a file. (Its
  `preprocess_data.py` does the same in worker processes.) The pretrained punkt is a download;
  this one is trained on a part of the text that no round uses, which does not change its speed.
- sentences: against `tokenizers.encode_batch_fast` alone, which writes nothing.
- memory: the peak of a process that shards the corpus once, and COPIES times under changed words
  (the letters of each copy are exchanged, so that its words were never seen).
"""

import argparse
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from nltk.tokenize.punkt import PunktSentenceTokenizer, PunktTrainer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from data_tools.build import BuildOptions, build
from data_tools.tokenizer import load_tokenizer

BASELINE_BYTES = 600_000  # of each round go to the Megatron way, the rest to us
VOWELS, CONSONANTS = b"aeiou", b"bcdfghjklmnpqrstvwxyz"


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def megatron_way(
    lines: list[str], punkt: PunktSentenceTokenizer, tokenizer: PreTrainedTokenizerFast, path: Path
) -> None:
    with open(path, "wb") as file:
        for line in lines:
            for sentence in punkt.tokenize(json.loads(line)["text"]):
                ids = tokenizer(sentence).input_ids
                file.write(np.array(ids, np.uint16).tobytes())


def paragraphs(corpus: Path, tokenizer: Path, rounds: int, work: Path) -> None:
    with gzip.open(corpus / "pubmed_ccby_raw_train.jsonl.gz", "rt", encoding="utf-8") as file:
        lines = file.readlines()
    trainer = PunktTrainer()
    trainer.train(" ".join(json.loads(line)["text"] for line in lines[-20:]), finalize=True)
    punkt = PunktSentenceTokenizer(trainer.get_params())
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"))
    loaded = load_tokenizer(tokenizer)
    lines = lines[:-20]
    ratios = []
    for number in range(rounds):
        part = lines[number::rounds]
        size, count = 0, 0
        while size < BASELINE_BYTES:
            size += text_bytes(part[count : count + 1])
            count += 1
        path = work / f"part{number}.jsonl"
        path.write_text("".join(part[count:]), encoding="utf-8")

        def ours(path: Path = path, number: int = number) -> None:
            build([str(path)], work / f"out{number}", loaded, "benchmark", BuildOptions())

        baseline = part[:count]
        slow = cpu_seconds(lambda: megatron_way(baseline, punkt, theirs, work / "megatron"))
        fast = cpu_seconds(ours)
        ratios.append(report(size, slow, text_bytes(part[count:]), fast))
    summarize("raw paragraphs to shards / the Megatron way", ratios)


def text_bytes(lines: list[str]) -> int:
    return sum(len(json.loads(line)["text"].encode()) for line in lines)


def sentences(corpus: Path, tokenizer: Path, rounds: int, work: Path) -> None:
    with gzip.open(corpus / "pubmed_ccby_train.txt.gz", "rt", encoding="utf-8") as file:
        documents = file.read().split("\n\n")
    theirs = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    loaded = load_tokenizer(tokenizer)
    ratios = []
    for number in range(rounds):
        text = "\n\n".join(documents[number::rounds])
        path = work / f"part{number}.txt"
        path.write_text(text, encoding="utf-8")
        lines = text.split("\n")

        def ours(path: Path = path, number: int = number) -> None:
            options = BuildOptions(format="sentences")
            build([str(path)], work / f"split{number}", loaded, "benchmark", options)

        fast = cpu_seconds(ours)
        given = lines[: len(lines) // 4]
        size = sum(len(line.encode()) + 1 for line in given)
        slow = cpu_seconds(lambda: theirs.encode_batch_fast(given, add_special_tokens=False))
        ratios.append(report(size, slow, path.stat().st_size, fast))
    summarize("sentences to shards / encode_batch_fast", ratios)


def report(their_bytes: int, their_seconds: float, our_bytes: int, our_seconds: float) -> float:
    theirs, ours = their_bytes / their_seconds / 1e6, our_bytes / our_seconds / 1e6
    print(f"  {theirs:8.3f} MB/s  {ours:8.2f} MB/s  {ours / theirs:6.1f}x", flush=True)
    return ours / theirs


def summarize(what: str, ratios: list[float]) -> None:
    spread = f"{min(ratios):.1f}-{max(ratios):.1f}"
    print(f"{what}: {statistics.median(ratios):.1f}x (median of {len(ratios)}; {spread})\n")


# --- memory ---------------------------------------------------------------------------------------


def exchanged(text: bytes, copy: int) -> bytes:
    """The text with its vowels and its consonants exchanged among themselves."""
    table = bytearray(range(256))
    generator = np.random.default_rng(copy)
    for letters in (VOWELS, CONSONANTS):
        for a, b in zip(letters, generator.permutation(list(letters)), strict=True):
            table[a], table[a - 32] = b, b - 32
    return text.translate(bytes(table)) if copy else text


def memory(corpus: Path, tokenizer: Path, copies: int, work: Path) -> None:
    with gzip.open(corpus / "pubmed_ccby_raw_train.jsonl.gz") as file:
        texts = [json.loads(line)["text"].encode() for line in file]
    for count in (1, copies):
        path = work / "large.txt"
        with open(path, "wb") as out:
            for copy in range(count):
                out.writelines(exchanged(text, copy) + b"\n\n" for text in texts)
        command = [
            sys.executable, __file__, str(corpus), str(tokenizer),
            "--shard", str(path), "--output", str(work / f"large{count}"),
        ]  # fmt: skip
        answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds, peak, imports = map(float, answer.split())
        size = path.stat().st_size / 1e6
        print(
            f"{count:3d}x the corpus, {size:6.0f} MB: peak {peak:.0f} MB (of them {imports:.0f} MB "
            f"before the first byte), {size / seconds:.1f} MB per CPU second",
            flush=True,
        )


def shard_alone(path: Path, tokenizer: Path, output: Path) -> None:
    """Shard a file in this process; print CPU seconds, peak MB, and MB at the start."""
    loaded = load_tokenizer(tokenizer)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    options = BuildOptions(format="text")
    seconds = cpu_seconds(lambda: build([str(path)], output, loaded, "benchmark", options))
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--shard", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.shard:
        shard_alone(given.shard, given.tokenizer, given.output)
        return
    load_tokenizer(given.tokenizer).encode_lines(b"compile first")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "compile.txt").write_text("One. Two.\n\nThree.")
        loaded = load_tokenizer(given.tokenizer)
        build([str(work / "compile.txt")], work / "compile", loaded, "benchmark", BuildOptions())
        paragraphs(given.corpus, given.tokenizer, given.rounds, work)
        sentences(given.corpus, given.tokenizer, given.rounds, work)
        memory(given.corpus, given.tokenizer, given.copies, work)


if __name__ == "__main__":
    main()
