"""What a step costs on more ranks and stages, and what a corpus twenty times as large changes.

    python benchmarks/scaling.py --shards DIR --checkpoint DIR [--ranks 1 2 4] [--json FILE]

Ranks run on this machine's CPUs over gloo, so their times only show what is shared among them; the
bytes are exact: what DeepSpeed hands to its collectives in a step, counted by the engine itself
(`communication_bytes_per_step` in metrics.jsonl). The corpus of 20x is the same shards twenty times
under other names. Anonymous memory is what a process holds beside files it has mapped.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bert_cpt.batches import BatchShape, Loader, SampleStream
from bert_cpt.masking import mask_rule
from data_tools import open_shards
from data_tools.adopt import adopt
from data_tools.samples import SampleOptions

LAUNCH = """
import sys
from launcher.local import run_ranks
sys.exit(run_ranks(sys.argv[2:], int(sys.argv[1])))
"""
CONFIG = """
[run]
output_dir = "{run}"
[data]
corpora = [{{ path = "{shards}" }}]
[model]
init_checkpoint = "{checkpoint}"
[train]
steps = {steps}
train_batch_size = 32
micro_batch_size = 4
deepspeed_config = "{ds_config}"
[checkpoint]
interval = 1000000
[logging]
interval = {steps}
wandb = "disabled"
"""


def step_cost(work: Path, ranks: int, stage: int, options: argparse.Namespace) -> dict[str, Any]:
    """The last log record of a short run."""
    name = f"{ranks}_{stage}"
    ds_config, config, run = work / f"{name}.json", work / f"{name}.toml", work / name
    ds_config.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    text = CONFIG.format(
        run=run, shards=options.shards, checkpoint=options.checkpoint, steps=options.steps,
        ds_config=ds_config,
    )  # fmt: skip
    config.write_text(text)
    train = [sys.executable, "-m", "bert_cpt.train", "--config", str(config)]
    command = [sys.executable, "-c", LAUNCH, str(ranks), *train]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(answer.stderr[-3000:])
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    record = [each for each in records if each["kind"] == "train"][-1]
    wanted = ("communication_bytes_per_step", "communication_share", "peak_memory_gib")
    seconds = record["num_tokens"] / record["tokens_per_second"]
    row = {key: record[key] for key in wanted} | {"seconds_per_step": seconds / options.steps}
    return {"ranks": ranks, "stage": stage} | row


def larger(shards: Path, copies: int, target: Path) -> Path:
    """A corpus of `copies` times the shards, by links."""
    corpus, prefixes = open_shards(shards), []
    target.mkdir()
    for copy in range(copies):
        for shard in corpus.shards:
            prefix = target / f"copy_{copy:03d}_{shard.prefix.name}"
            for suffix in (".bin", ".idx"):
                source = shard.prefix.with_name(shard.prefix.name + suffix)
                prefix.with_name(prefix.name + suffix).symlink_to(source.absolute())
            prefixes.append(prefix)
    adopt(prefixes, None, corpus.tokenizer, "benchmark")
    return target


def corpus_cost(shards: Path, length: int, seconds: float = 5.0) -> dict[str, Any]:
    """Samples a CPU second of index and loader, and anonymous memory, in this process."""
    corpus = open_shards(shards)
    rule = mask_rule(corpus.tokenizer, "token", 0.15)
    with tempfile.TemporaryDirectory() as directory:
        options = SampleOptions(length)
        stream = SampleStream([corpus], [1.0], options, 0, directory=Path(directory))
        start = time.process_time()
        size = len(stream.indexes[0].get(0))
        index_seconds = time.process_time() - start
        loader, shape, done = Loader(stream, rule), BatchShape(256, 32, 1, 0), 0
        loader.step(0, shape)
        start = time.process_time()
        while time.process_time() - start < seconds:
            loader.step(done * 7919 * 256 % (size - 256), shape)  # all over the corpus
            done += 1
        rate = 256 * done / (time.process_time() - start)
    status = Path("/proc/self/status").read_text()
    (anonymous,) = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon")]
    return {
        "length": length, "samples": size, "index_samples_per_second": size / index_seconds,
        "loader_samples_per_second": rate, "anonymous_mib": int(anonymous) / 1024,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--length", type=int, help="only the cost of this corpus, as JSON")
    options = parser.parse_args()
    if options.length:
        corpus_cost(options.shards, options.length, 0.1)  # compiles
        print(json.dumps(corpus_cost(options.shards, options.length)))
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        for copies in (1, 20):
            corpus = larger(options.shards, copies, work / f"{copies}x")
            for length in (128, 512):
                command = [sys.executable, __file__, "--shards", str(corpus)]
                answer = subprocess.check_output([*command, "--length", str(length)], text=True)
                row = {"corpus": f"{copies}x"} | json.loads(answer)
                rows.append(row)
                print(
                    f"{copies:>3}x at {length}: {row['samples']:>10,} samples, index "
                    f"{row['index_samples_per_second'] / 1e6:6.2f} M/s, loader "
                    f"{row['loader_samples_per_second'] / 1e3:6.0f} k/s, "
                    f"{row['anonymous_mib']:.0f} MiB anonymous",
                    flush=True,
                )
        for ranks in options.ranks if options.checkpoint else []:
            for stage in range(4):
                row = step_cost(work, ranks, stage, options)
                rows.append(row)
                megabytes = row["communication_bytes_per_step"] / 1e6
                print(
                    f"{ranks} rank(s), ZeRO {stage}: {megabytes:8.1f} MB in collectives a rank and "
                    f"step, {row['seconds_per_step']:.2f} s each, {row['communication_share']:.0%} "
                    f"of it in them, peak {row['peak_memory_gib']:.2f} GiB a rank",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
