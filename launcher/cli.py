"""`bert-cpt`: one command for the whole path.

Heavy packages are imported by the commands that use them.

Exit codes: 0 done, 1 failed, 2 wrong use or bad input, 85 stopped after saving (run it again).
"""

import json
import logging
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from bert_cpt.config import describe_fields
from data_tools.errors import UserError

app = typer.Typer(
    name="bert-cpt",
    help="Continue the pre-training of BERT (MLM + NSP) on your own corpus.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
P = ParamSpec("P")


class Format(StrEnum):
    AUTO = "auto"
    TEXT = "text"
    SENTENCES = "sentences"
    JSONL = "jsonl"
    PARQUET = "parquet"
    CSV = "csv"
    ARROW = "arrow"
    HUB = "hub"


class OnError(StrEnum):
    FAIL = "fail"
    SKIP = "skip"


class Splitter(StrEnum):
    SENTENCEX = "sentencex"
    NONE = "none"


class Kind(StrEnum):
    PRETRAINING = "pretraining"
    MASKED_LM = "masked-lm"
    ENCODER = "encoder"
    SENTENCE_TRANSFORMERS = "sentence-transformers"


def command(**options: Any) -> Callable[[Callable[P, int | None]], Callable[P, None]]:
    """Register a command: a UserError becomes one line and exit code 2."""

    def register(function: Callable[P, int | None]) -> Callable[P, None]:
        @app.command(**options)
        @wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                code = function(*args, **kwargs)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                code = 2
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                code = 130
            except (OSError, MemoryError) as error:  # a full disk, a vanished file system
                print(f"error: {error}; mend that and run the same command again", file=sys.stderr)
                code = 1
            raise typer.Exit(code or 0)

        return wrapped

    return register


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    for name in ("httpx", "datasets", "fsspec", "numba"):
        logging.getLogger(name).setLevel(logging.WARNING)


# --- data -----------------------------------------------------------------------------------------


@command()
def shard(
    tokenizer: Annotated[str, typer.Option(help="hub name, or directory of the checkpoint")],
    inputs: Annotated[
        list[str] | None, typer.Argument(help="files, directories, globs, URLs, hub names")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="directory for the shards")] = None,
    format: Annotated[Format, typer.Option(help="of the inputs")] = Format.AUTO,
    text_field: Annotated[str, typer.Option(help="field or column with the text")] = "text",
    splitter: Annotated[Splitter, typer.Option(help="none: a line is a sentence")] = (
        Splitter.SENTENCEX
    ),
    language: Annotated[str, typer.Option(help="of the text, for the splitter")] = "en",
    workers: Annotated[int, typer.Option(min=1, help="processes on this machine")] = (
        len(os.sched_getaffinity(0))
    ),
    rank: Annotated[
        int | None, typer.Option(min=0, help="of this machine or job; default: as Slurm says, or 0")
    ] = None,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="machines or jobs; default: as Slurm says, or 1")
    ] = None,
    finish: Annotated[bool, typer.Option("--finish", help="after all ranks: manifest")] = False,
    on_error: Annotated[OnError, typer.Option(help="bad input: stop, or count it")] = OnError.FAIL,
    shuffle: Annotated[bool, typer.Option(help="deal documents to shards by a hash")] = True,
    max_sentence_tokens: Annotated[
        int, typer.Option(min=16, max=65535, help="longer sentences are cut between words")
    ] = 512,
    shard_tokens: Annotated[int, typer.Option(min=1000, help="tokens a shard, about")] = 1 << 27,
    adopt: Annotated[
        list[Path] | None,
        typer.Option(metavar="PREFIX", help="instead of inputs: PREFIX.bin/.idx by Megatron-LM"),
    ] = None,
) -> int:
    """Turn text into tokenized shards with sentence and document indices."""
    _log_to_stderr()
    from data_tools.adopt import adopt as write_manifest_for
    from data_tools.build import BuildOptions, build
    from data_tools.inspect import summarize
    from data_tools.tokenizer import load_tokenizer

    if adopt and inputs:
        raise UserError(f"--adopt takes the place of inputs; leave out {', '.join(inputs)}")
    if adopt:
        directory, found = write_manifest_for(adopt, output, load_tokenizer(tokenizer), tokenizer)
        print(summarize(directory, found))
        return 0
    if not inputs or output is None:
        raise UserError("expected INPUT... and --output DIR (or --adopt PREFIX)")
    rank, world_size = _rank_and_world_size(rank, world_size)
    options = BuildOptions(
        format=format.value,
        text_field=text_field,
        splitter=splitter.value,
        language=language,
        max_sentence_tokens=max_sentence_tokens,
        on_error=on_error.value,
        shuffle_seed=0 if shuffle else None,
        shard_tokens=shard_tokens,
    )
    manifest = build(
        inputs, output, load_tokenizer(tokenizer), tokenizer, options,
        workers=workers, rank=rank, world_size=world_size, finish_only=finish,
    )  # fmt: skip
    if manifest is None:
        print(f"rank {rank} of {world_size} is done; after all ranks run the command with --finish")
    else:
        print(summarize(output, manifest))
    return 0


def _rank_and_world_size(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """As given, or of a Slurm array or of the tasks of one srun, or 0 and 1."""
    if (rank is None) != (world_size is None):
        raise UserError("--rank and --world-size go together; give both or none")
    if rank is None or world_size is None:
        names = ("SLURM_PROCID", "SLURM_NTASKS")
        if "SLURM_ARRAY_TASK_ID" in os.environ:
            names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")
        elif "SLURM_STEP_ID" not in os.environ:  # not started by srun: the only one of its job
            return 0, 1
        rank, world_size = (int(os.environ[name]) for name in names)
        logging.info("rank %d of %d (%s, %s)", rank, world_size, *names)
    if rank >= world_size:
        raise UserError(
            f"rank {rank} of {world_size}: ranks count from 0 (in a Slurm array: --array=0-N)"
        )
    return rank, world_size


@command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="shards")],
    samples: Annotated[int, typer.Option(min=0, help="example pairs to show")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> int:
    """Statistics of a corpus, and example pairs with their masks."""
    _log_to_stderr()
    from bert_cpt.examples import example_pairs
    from data_tools.inspect import render, statistics
    from data_tools.shards import open_shards

    corpus = open_shards(directory)
    content = statistics(corpus) | {"examples": example_pairs(corpus, samples)}
    print(json.dumps(content, ensure_ascii=False, indent=1) if as_json else render(content))
    return 0


@command()
def verify(directory: Annotated[Path, typer.Argument(help="shards")]) -> int:
    """Check hashes, structure and token ids of shards; exit code 1 if anything is damaged."""
    _log_to_stderr()
    from data_tools.inspect import verify as find_damage

    damage = find_damage(directory)
    for line in damage:
        print(f"damaged: {line}", file=sys.stderr)
    if not damage:
        print(f"{directory}: all files are as the manifest says")
    return 1 if damage else 0


# --- training -------------------------------------------------------------------------------------


def _help_on_fields() -> str:
    rows = [f"{name} = {default}: {text}" for name, default, text in describe_fields()]
    return "\n\n".join(["Fields of the configuration, all of them overridable:", *rows])


@command(epilog=_help_on_fields())
def train(
    config: Annotated[Path, typer.Argument(help="TOML configuration")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="override fields")
    ] = None,
    nproc: Annotated[int, typer.Option(min=0, help="ranks here; 0: one a GPU, or one")] = 0,
    hostfile: Annotated[
        Path | None, typer.Option(help="train on these hosts; lines of NAME slots=RANKS")
    ] = None,
    master_addr: Annotated[
        str | None, typer.Option(help="of the first host of --hostfile, for the others")
    ] = None,
    forward: Annotated[
        list[str] | None, typer.Option(help="environment variable for the hosts' ranks")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show and check, do not train")
    ] = False,
) -> int:
    """Train as configured, or go on where the run directory left off."""
    from bert_cpt.config import load_config

    given = list(overrides or [])
    loaded = load_config(config, given)  # fails here within a second, not in every rank after many
    if hostfile is not None and not dry_run:
        from launcher.hosts import run_on_hosts

        return run_on_hosts(loaded, hostfile, master_addr=master_addr, forward=forward or [])
    if hostfile is not None:
        from launcher.hosts import read_hostfile

        nproc = sum(read_hostfile(hostfile).values())
    if not nproc:
        import torch

        nproc = torch.cuda.device_count() or 1
    if dry_run:
        from launcher.dry_run import dry_run as describe

        print(describe(loaded, nproc))
        return 0
    if nproc == 1:
        from bert_cpt.train import main as train_here

        return train_here(["--config", str(config), *given])
    from launcher.local import run_ranks

    arguments = ["--config", str(config), *given]
    return run_ranks([sys.executable, "-m", "bert_cpt.train", *arguments], nproc)


@command()
def plan(
    config: Annotated[Path, typer.Argument(help="TOML configuration")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="override fields")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="in all")] = 1,
    gpu_memory_gib: Annotated[float | None, typer.Option(min=0.1, help="of one GPU")] = None,
    tflops: Annotated[
        float | None, typer.Option(min=1e-6, help="achieved by one GPU, 1e12 operations a second")
    ] = None,
    measured: Annotated[
        Path | None, typer.Option(help="run directory to take tokens a second from")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> int:
    """Memory, time, disk and traffic of a run, and the ZeRO stage to choose; needs no GPU."""
    from bert_cpt.config import load_config
    from launcher.plan import Plan, measured_rate

    if measured is not None and measured_rate(measured) is None:
        raise UserError(f"--measured {measured}: no run directory with measured steps")
    result = Plan(
        load_config(config, list(overrides or [])),
        num_gpus=gpus, gpu_memory_gib=gpu_memory_gib, tflops=tflops, measured_in=measured,
    )  # fmt: skip
    print(json.dumps(result.as_dict(), indent=1) if as_json else result.as_text())
    return 0


@command()
def submit(
    config: Annotated[Path, typer.Argument(help="TOML configuration")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value]...", help="override fields")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="number of nodes")] = 1,
    gpus_per_node: Annotated[str, typer.Option(help="or TYPE:NUMBER; 0: ranks on CPUs")] = "1",
    tasks_per_node: Annotated[int, typer.Option(min=0, help="0: one a GPU, or one")] = 0,
    cpus_per_task: Annotated[int, typer.Option(min=0, help="0: as the site decides")] = 0,
    time: Annotated[str | None, typer.Option(help="limit of one start, as sbatch takes it")] = None,
    partition: Annotated[str | None, typer.Option()] = None,
    account: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    constraint: Annotated[str | None, typer.Option()] = None,
    name: Annotated[str | None, typer.Option(help="of the job; none: bert-cpt")] = None,
    signal_seconds: Annotated[int, typer.Option(min=1, help="save so long before the limit")] = 180,
    module: Annotated[list[str] | None, typer.Option(help="environment module to load")] = None,
    setup: Annotated[Path | None, typer.Option(help="shell script to source")] = None,
    container: Annotated[
        str | None, typer.Option(help="words before the program: apptainer exec --nv image.sif")
    ] = None,
    python: Annotated[str | None, typer.Option(help="none: this one; in a container: python")] = (
        None
    ),
    sbatch: Annotated[list[str] | None, typer.Option(help="further option of sbatch")] = None,
    srun: Annotated[list[str] | None, typer.Option(help="further option of srun")] = None,
    gpu_memory_gib: Annotated[float | None, typer.Option(help="refuse what does not fit")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show, do not submit")] = False,
) -> int:
    """Check a run on the login node and submit it to Slurm; it saves and requeues itself."""
    from bert_cpt.config import load_config
    from launcher.slurm import Job
    from launcher.slurm import submit as submit_job

    job = Job(
        nodes=nodes, gpus_per_node=gpus_per_node, tasks_per_node=tasks_per_node,
        cpus_per_task=cpus_per_task, time=time, partition=partition, account=account, qos=qos,
        constraint=constraint, name=name, signal_seconds=signal_seconds, modules=module or [],
        setup=setup, container=container, python=python, sbatch=sbatch or [], srun=srun or [],
    )  # fmt: skip
    loaded = load_config(config, list(overrides or []))
    return submit_job(loaded, job, gpu_memory_gib=gpu_memory_gib, dry_run=dry_run)


@command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="model or run directory, or hub name")],
    data: Annotated[list[str], typer.Option(help="NAME=SHARDS, once for each set")],
    sequence_length: Annotated[int, typer.Option(min=16, max=512, help="tokens a sample")] = 128,
    samples: Annotated[int, typer.Option(min=1, help="of each set")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="samples a forward pass")] = 32,
    json_file: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
) -> int:
    """Held-out MLM loss, perplexity and accuracy, and NSP accuracy."""
    _log_to_stderr()
    from bert_cpt.evaluate import evaluate_checkpoint, evaluation_table
    from bert_cpt.export import resolve_checkpoint
    from data_tools.files import write_text

    sets = {}
    for entry in data:
        name, separator, path = entry.partition("=")
        if not separator or not name:
            raise UserError(f"--data {entry}: expected NAME=SHARDS, as in --data news=shards/news")
        sets[name] = Path(path)
    results, new = evaluate_checkpoint(
        resolve_checkpoint(checkpoint), sets,
        sequence_length=sequence_length, num_samples=samples, batch_size=batch_size,
    )  # fmt: skip
    print(evaluation_table(results, new))
    if json_file:
        content = {name: result.model_dump() for name, result in results.items()}
        write_text(json_file, json.dumps(content, indent=1) + "\n")
    return 0


@command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="model or run directory")],
    output: Annotated[Path, typer.Argument(help="new directory")],
    kind: Annotated[Kind, typer.Option("--as", help="which heads to keep")] = Kind.PRETRAINING,
) -> int:
    """Write a plain Hugging Face model, checked by loading it."""
    _log_to_stderr()
    from bert_cpt.export import export as write

    loaded = write(checkpoint, output, kind.value)
    print(f"{output}: loads with {', '.join(loaded)}")
    return 0


@command()
def demo(
    output: Annotated[Path, typer.Option(help="directory for everything it makes")] = Path(
        "bert-cpt-demo"
    ),
) -> int:
    """The whole path in five minutes on a CPU: shard, train, evaluate, export."""
    _log_to_stderr()
    from launcher.demo import run_demo

    return run_demo(output)


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
