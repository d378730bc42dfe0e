"""`bert-cpt`: one command for the whole path.

Heavy packages are imported by the commands that use them.

Exit codes: 0 done, 1 failed, 2 wrong use or bad input, 85 stopped after saving (run it again).
"""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer import Argument, Option
from typer.core import TyperGroup

from bert_cpt.config import describe_fields, load_config
from data_tools.errors import UserError

NUM_CPUS = len(os.sched_getaffinity(0))


class Commands(TyperGroup):
    """What a command returns is its exit code; a UserError becomes one line and exit code 2."""

    def invoke(self, ctx: Any) -> None:
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
        for name in ("httpx", "datasets", "fsspec", "numba"):
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            code = super().invoke(ctx)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            code = 2
        except (OSError, MemoryError) as error:  # a full disk, a vanished file system
            print(f"error: {error}; mend that and run the same command again", file=sys.stderr)
            code = 1
        raise typer.Exit(code or 0)


app = typer.Typer(
    name="bert-cpt",
    help="Continue the pre-training of BERT (MLM + NSP) on your own corpus.",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Strings = list[str] | None
ConfigFile = Annotated[Path, Argument(help="TOML configuration")]
Overrides = Annotated[Strings, Argument(metavar="[section.key=value]...", help="override fields")]
AsJson = Annotated[bool, Option("--json", help="one JSON document on stdout")]
DryRun = Annotated[bool, Option("--dry-run", help="show and check, start nothing")]
GpuMemory = Annotated[float | None, Option(min=0.1, help="of one GPU; must suffice")]


# --- data -----------------------------------------------------------------------------------------


@app.command()
def shard(
    tokenizer: Annotated[str, Option(help="hub name, or directory of the checkpoint")],
    inputs: Annotated[Strings, Argument(help="files, directories, globs, URLs, hub names")] = None,
    output: Annotated[Path | None, Option(help="directory for the shards")] = None,
    format: Annotated[
        Literal["auto", "text", "sentences", "jsonl", "parquet", "csv", "arrow", "hub"],
        Option(help="of the inputs"),
    ] = "auto",
    text_field: Annotated[str, Option(help="field or column with the text")] = "text",
    splitter: Annotated[
        Literal["sentencex", "none"], Option(help="none: a line is a sentence")
    ] = "sentencex",
    language: Annotated[str, Option(help="of the text, for the splitter")] = "en",
    workers: Annotated[int, Option(min=1, help="processes on this machine")] = NUM_CPUS,
    rank: Annotated[int | None, Option(min=0, help="of this job; none: as Slurm says")] = None,
    world_size: Annotated[int | None, Option(min=1, help="jobs; none: as Slurm says")] = None,
    finish: Annotated[bool, Option("--finish", help="after all ranks: manifest")] = False,
    on_error: Annotated[
        Literal["fail", "skip"], Option(help="bad input: stop, or count it")
    ] = "fail",
    shuffle: Annotated[bool, Option(help="deal documents to shards by a hash")] = True,
    max_sentence_tokens: Annotated[
        int, Option(min=16, max=65535, help="longer sentences are cut between words")
    ] = 512,
    shard_tokens: Annotated[int, Option(min=1000, help="tokens a shard, about")] = 1 << 27,
    adopt: Annotated[
        list[Path] | None,
        Option(metavar="PREFIX", help="instead of inputs: PREFIX.bin/.idx by Megatron-LM"),
    ] = None,
) -> None:
    """Turn text into tokenized shards with sentence and document indices."""
    from data_tools.adopt import adopt as write_manifest_for
    from data_tools.build import BuildOptions, build
    from data_tools.inspect import summarize
    from data_tools.tokenizer import load_tokenizer

    if adopt:
        if inputs:
            raise UserError(f"--adopt takes the place of inputs; leave out {', '.join(inputs)}")
        directory, found = write_manifest_for(adopt, output, load_tokenizer(tokenizer), tokenizer)
        print(summarize(directory, found))
        return
    if not inputs or output is None:
        raise UserError("expected INPUT... and --output DIR (or --adopt PREFIX)")
    rank, world_size = _rank_and_world_size(rank, world_size)
    options = BuildOptions(
        format=format, text_field=text_field, splitter=splitter, language=language,
        max_sentence_tokens=max_sentence_tokens, on_error=on_error,
        shuffle_seed=0 if shuffle else None, shard_tokens=shard_tokens,
    )  # fmt: skip
    manifest = build(
        inputs, output, load_tokenizer(tokenizer), tokenizer, options,
        workers=workers, rank=rank, world_size=world_size, finish_only=finish,
    )  # fmt: skip
    if manifest is None:
        print(f"rank {rank} of {world_size} is done; after all ranks run the command with --finish")
    else:
        print(summarize(output, manifest))


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


@app.command()
def inspect(
    directory: Annotated[Path, Argument(help="shards")],
    samples: Annotated[int, Option(min=0, help="example pairs to show")] = 3,
    as_json: AsJson = False,
) -> None:
    """Statistics of a corpus, and example pairs with their masks."""
    from bert_cpt.examples import example_pairs
    from data_tools.inspect import render, statistics
    from data_tools.shards import open_shards

    corpus = open_shards(directory)
    content = statistics(corpus) | {"examples": example_pairs(corpus, samples)}
    print(json.dumps(content, ensure_ascii=False, indent=1) if as_json else render(content))


@app.command()
def verify(directory: Annotated[Path, Argument(help="shards")]) -> int:
    """Check hashes, structure and token ids of shards; exit code 1 if anything is damaged."""
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


@app.command(epilog=_help_on_fields())
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Annotated[int, Option(min=0, help="ranks here; 0: one a GPU, or one")] = 0,
    hostfile: Annotated[Path | None, Option(help="train on hosts: NAME slots=RANKS")] = None,
    master_addr: Annotated[str | None, Option(help="of the first host, for the others")] = None,
    dry_run: DryRun = False,
) -> int:
    """Train as configured, or go on where the run directory left off."""
    loaded = load_config(config, overrides or [])  # fails here, at once, not in every rank
    if hostfile is not None:
        from launcher.hosts import read_hostfile, run_on_hosts

        if not dry_run:
            return run_on_hosts(loaded, hostfile, master_addr)
        nproc = sum(read_hostfile(hostfile).values())
    if not nproc:
        import torch

        nproc = torch.cuda.device_count() or 1
    if dry_run:
        from launcher.dry_run import dry_run as describe

        print(describe(loaded, nproc))
        return 0
    arguments = ["--config", str(config), *(overrides or [])]
    if nproc == 1:
        from bert_cpt.train import main as train_here

        return train_here(arguments)
    from launcher.local import run_ranks

    return run_ranks([sys.executable, "-m", "bert_cpt.train", *arguments], nproc)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[int, Option(min=1, help="in all")] = 1,
    gpu_memory_gib: GpuMemory = None,
    tflops: Annotated[float | None, Option(min=1e-6, help="that one GPU achieves")] = None,
    measured: Annotated[Path | None, Option(help="run directory to take the rate from")] = None,
    as_json: AsJson = False,
) -> None:
    """Memory, time, disk and traffic of a run, and the ZeRO stage to choose; needs no GPU."""
    from launcher.plan import Plan

    result = Plan(
        load_config(config, overrides or []), num_gpus=gpus, gpu_memory_gib=gpu_memory_gib,
        tflops=tflops, measured_in=measured,
    )  # fmt: skip
    print(json.dumps(result.as_dict(), indent=1) if as_json else result.as_text())


@app.command(context_settings={"ignore_unknown_options": True})
def submit(
    config: ConfigFile,
    overrides: Annotated[
        Strings,
        Argument(
            metavar="[section.key=value]... [--OPTION=VALUE of sbatch]...",
            help="override fields; ask sbatch for --time=24:00:00, --partition=gpu and the like",
        ),
    ] = None,
    nodes: Annotated[int, Option(min=1, help="number of nodes")] = 1,
    gpus_per_node: Annotated[str, Option(help="or TYPE:NUMBER; 0: ranks on CPUs")] = "1",
    tasks_per_node: Annotated[int, Option(min=0, help="0: one a GPU, or one")] = 0,
    module: Annotated[Strings, Option(help="environment module to load")] = None,
    setup: Annotated[Path | None, Option(help="shell script to source")] = None,
    container: Annotated[str | None, Option(help="as in apptainer exec --nv x.sif")] = None,
    srun: Annotated[Strings, Option(help="option of srun: --srun=--x=y")] = None,
    python: Annotated[str | None, Option(help="none: this, or python in a container")] = None,
    gpu_memory_gib: GpuMemory = None,
    dry_run: DryRun = False,
) -> None:
    """Check a run on the login node and submit it to Slurm; it saves and requeues itself."""
    from launcher.slurm import Job
    from launcher.slurm import submit as submit_job

    given = overrides or []
    for word in given:
        if not word.startswith("-") and "=" not in word:
            raise UserError(f"{word!r}: expected section.key=value, or --option=value of sbatch")
    job = Job(
        nodes, gpus_per_node, tasks_per_node, [word for word in given if word.startswith("-")],
        module or [], setup, container, srun or [], python,
    )  # fmt: skip
    loaded = load_config(config, [word for word in given if not word.startswith("-")])
    submit_job(loaded, job, gpu_memory_gib=gpu_memory_gib, dry_run=dry_run)


# --- models ---------------------------------------------------------------------------------------


@app.command()
def evaluate(
    checkpoint: Annotated[str, Argument(help="model or run directory, or hub name")],
    data: Annotated[list[str], Option(help="NAME=SHARDS, once for each set")],
    sequence_length: Annotated[int, Option(min=16, max=512, help="tokens a sample")] = 128,
    samples: Annotated[int, Option(min=1, help="of each set")] = 512,
    batch_size: Annotated[int, Option(min=1, help="samples a forward pass")] = 32,
    json_file: Annotated[Path | None, Option("--json", help="write the figures here")] = None,
) -> None:
    """Held-out MLM loss, perplexity and accuracy, and NSP accuracy."""
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


@app.command()
def export(
    checkpoint: Annotated[str, Argument(help="model or run directory")],
    output: Annotated[Path, Argument(help="new directory")],
    kind: Annotated[
        Literal["pretraining", "masked-lm", "encoder", "sentence-transformers"],
        Option("--as", help="which heads to keep"),
    ] = "pretraining",
) -> None:
    """Write a plain Hugging Face model, checked by loading it."""
    from bert_cpt.export import export as write

    print(f"{output}: loads with {', '.join(write(checkpoint, output, kind))}")


@app.command()
def demo(
    output: Annotated[Path, Option(help="directory for everything it makes")] = Path(
        "bert-cpt-demo"
    ),
) -> int:
    """The whole path in five minutes on a CPU: shard, train, evaluate, export."""
    from launcher.demo import run_demo

    return run_demo(output)


if __name__ == "__main__":
    app()
