"""The training run, read from top to bottom.

    deepspeed --module bert_cpt.train --config CONFIG.toml [section.key=value ...]

Exit codes: 0 done, 1 failed, 2 wrong use or bad input, 85 stopped by a signal or the time limit
after saving: run the same command again to go on.
"""

import argparse
import json
import logging
import math
import os
import statistics
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bert_cpt.batches import BatchShape, Loader, PackedBatch, SampleStream
from bert_cpt.checkpoint import (
    Checkpointer,
    CheckpointState,
    TrainState,
    check_resumable,
    collect_tokenizer,
    corpus_fingerprints,
    find_checkpoint,
    restore,
)
from bert_cpt.config import Config, Phase, load_config
from bert_cpt.ds_config import DeepSpeedConfig
from bert_cpt.engine import Engine, StepTotals
from bert_cpt.evaluate import eval_mode, evaluate
from bert_cpt.health import check_health, compare_ranks
from bert_cpt.masking import mask_rule
from bert_cpt.metrics import Metrics, set_up_logging, start_wandb
from bert_cpt.model import PretrainingModel, freeze, load_model
from bert_cpt.rundir import check_shared, lock_run_dir, release_run_dirs, write_environment
from bert_cpt.setup import Setup, check_setup, check_structure
from bert_cpt.stopping import StopSignal, Watchdog
from bert_cpt.timing import Interval, matmul_ceiling
from bert_cpt.world import World, start_world
from data_tools.errors import UserError
from data_tools.files import write_text
from data_tools.hashing import derive_key
from data_tools.samples import SampleOptions
from data_tools.shards import ShardSet

logger = logging.getLogger("bert_cpt")

EXIT_REQUEUE = 85
MAX_SKIPPED_IN_A_ROW = 50
FIRST_MARGIN_SECONDS = 20.0  # kept free before the time limit until a save was measured, and
SLOW_BYTES_PER_SECOND = 50e6  # what writing a checkpoint takes at this rate
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PHASES = 11  # stream of the run's seed
UNTOUCHED = "the weights were not touched and the last checkpoint is intact"


class TrainingError(Exception):
    """The run cannot go on; the message says why and what to do. Exit code 1."""


@dataclass
class Run:
    """What a run consists of; all that changes while it trains is in `engine` and `state`."""

    setup: Setup
    ds_config: DeepSpeedConfig
    world: World
    engine: Engine
    state: TrainState
    checkpointer: Checkpointer
    metrics: Metrics
    stop: StopSignal
    watchdog: Watchdog
    interval: Interval
    recent_losses: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    skipped_in_a_row: int = 0
    saved_step: int = -1
    save_seconds: float = 0.0

    @property
    def config(self) -> Config:
        return self.setup.config

    @property
    def directory(self) -> Path:
        return self.config.run.output_dir


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and train; returns the exit code."""
    parser = argparse.ArgumentParser(prog="bert_cpt.train")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args(arguments)
    # DeepSpeed calls what torch 2.13 renames; nothing a user could do about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    code = 1
    try:
        world = start_world()
        config = world.agree(lambda: load_config(options.config, options.overrides))
        code = train(config, world)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or not torch.distributed.is_initialized():
            print(f"error: {error}", file=sys.stderr)
        code = 2
    except (TrainingError, ConnectionError) as error:
        logger.error("stopped: %s", error)
    except RuntimeError as error:
        if "peer" not in str(error) and "onnection" not in str(error):
            raise
        logger.error("stopped: another rank is gone (%s)", str(error).splitlines()[0])
    finally:
        release_run_dirs(code)
    return code


def train(config: Config, world: World) -> int:
    """Train as configured, or go on where the run directory left off; returns the exit code."""
    run_dir = config.run.output_dir
    stop = StopSignal(config.train.max_seconds, run_dir / "stop" if world.is_main else None)
    setup = world.agree(lambda: check_setup(config))
    config.check_world_size(world.world_size)
    ds_config = world.agree(lambda: setup.settle_precision(world.device.type))
    compare_ranks(world, config, ds_config, corpus_fingerprints(setup.corpora))
    mark = world.on_main(lambda: lock_run_dir(run_dir))
    world.agree(lambda: check_shared(run_dir, mark))
    set_up_logging(run_dir, world.rank)
    ranks = check_health(world, config)
    world.on_main(lambda: check_structure(setup))
    found = world.on_main(lambda: prepare_run_dir(setup, ds_config, ranks))
    if found == "complete":
        logger.info("%s: the run is complete already", run_dir)
        return 0
    watchdog = Watchdog(run_dir, world.rank, world.world_size)
    watchdog.start()
    run = build(setup, ds_config, world, stop, watchdog, found and Path(found))
    try:
        code = loop(run)
    finally:
        watchdog.close()
        run.metrics.close()
    world.barrier()  # nobody leaves while others still listen for its beats
    return code


# --- before the first step ------------------------------------------------------------------------


def prepare_run_dir(
    setup: Setup, ds_config: DeepSpeedConfig, ranks: list[dict[str, Any]]
) -> str | None:
    """Write the resolved files; returns the checkpoint to resume, "complete", or None."""
    config, run_dir = setup.config, setup.config.run.output_dir
    found = find_checkpoint(run_dir)
    if found is not None:
        path, state = found
        check_resumable(state, config, corpus_fingerprints(setup.corpora))
        if state.precision != ds_config.precision and setup.is_auto_precision:
            raise UserError(
                f'{path}: trained in {state.precision}, here "auto" means {ds_config.precision}; '
                f"choose one, as in train.deepspeed_config=ds_configs/zero1_{state.precision}.json"
            )
        if state.train.global_step >= config.total_steps and (run_dir / "final").exists():
            return "complete"
    write_text(run_dir / "config.toml", config.as_toml())
    write_text(run_dir / "ds_config.json", json.dumps(ds_config.content, indent=1) + "\n")
    collect_tokenizer(config.model.init_checkpoint, setup.corpora[0], run_dir / "tokenizer")
    write_environment(run_dir, ranks)
    return str(found[0]) if found else None


def build(
    setup: Setup,
    ds_config: DeepSpeedConfig,
    world: World,
    stop: StopSignal,
    watchdog: Watchdog,
    checkpoint: Path | None,
) -> Run:
    """Model, engine and everything around them, as new or as a checkpoint left them."""
    config, run_dir = setup.config, setup.config.run.output_dir
    model, report = load_model(
        str(checkpoint or config.model.init_checkpoint),
        init="checkpoint" if checkpoint else config.model.init,
        nsp=config.objective.nsp,
        seed=config.run.seed,
        hidden_dropout=config.model.hidden_dropout,
        attention_dropout=config.model.attention_dropout,
    )
    new = report.new
    if checkpoint is not None:
        new = json.loads((run_dir / "load_report.json").read_text())["new"]
    elif world.is_main:
        write_text(run_dir / "load_report.json", report.as_json())
        logger.info("%s", report.as_text())
    settings = config.model
    frozen = freeze(model, embeddings=settings.freeze_embeddings, num_layers=settings.frozen_layers)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if settings.compile:
        model.bert.encoder.compile(dynamic=True)
    engine = Engine(PretrainingModel(model, settings.attention), config, ds_config, world, new)
    state = restore(engine, checkpoint) if checkpoint else TrainState()
    ceiling = matmul_ceiling(world.device, DTYPES[ds_config.precision])
    logger.info(
        "%d rank(s) on %s, %s, ZeRO %d, %s attention (attention dropout %g), %.1f M parameters "
        "frozen, %.1f TFLOP/s of matrix product",
        world.world_size, world.device.type, ds_config.precision, ds_config.stage,
        settings.attention, settings.attention_dropout, frozen / 1e6, ceiling / 1e12,
    )  # fmt: skip
    if checkpoint is not None:
        logger.info("resumed from %s at step %d", checkpoint, state.global_step)
    checkpointer = Checkpointer(run_dir, config.checkpoint, setup.bert_config)
    stop.needs(FIRST_MARGIN_SECONDS + 12 * report.num_parameters / SLOW_BYTES_PER_SECOND)
    wandb_run = None
    if world.is_main:
        checkpointer.prepare()
        wandb_run = start_wandb(run_dir, config.logging, config.model_dump(mode="json"))
    return Run(
        setup, ds_config, world, engine, state, checkpointer,
        Metrics(run_dir, config.total_steps, state.global_step, wandb_run, world.is_main),
        stop, watchdog, Interval(world, ceiling), saved_step=state.global_step,
    )  # fmt: skip


# --- the loop -------------------------------------------------------------------------------------


def loop(run: Run) -> int:
    """Train all phases; returns the exit code."""
    config, state = run.config, run.state
    if state.global_step == 0:
        evaluate_heldout(run, "before")
    for phase in config.phases:
        if state.global_step >= phase.last_step:
            continue
        run.engine.start_phase(phase)
        for batches in steps_of(run, phase):
            is_stopping = train_step(run, phase, batches)
            step, is_done = state.global_step, state.global_step == config.total_steps
            if step % config.logging.interval == 0:
                log_interval(run)
            every = config.logging.evaluation_interval
            if every and step % every == 0 and not is_done:
                evaluate_heldout(run, "during")
            if step % config.checkpoint.interval == 0 or is_stopping:
                save(run, is_last=is_stopping)
            if is_stopping and not is_done:
                seconds = time.monotonic() - run.stop.started
                reason = run.stop.reason
                logger.info("stopped at step %d by %s after %.0f s; saved", step, reason, seconds)
                run.world.barrier()
                return EXIT_REQUEUE
    finish(run)
    return 0


def steps_of(run: Run, phase: Phase) -> Iterator[list[PackedBatch]]:
    """The micro-batches of this rank for every step of a phase that is left."""
    world = run.world
    loader = phase_loader(
        run.config, phase, run.setup.corpora, is_builder=world.is_main,
        directory=run.directory / "index" / f"phase_{phase.number}",
    )  # fmt: skip
    shape = BatchShape(phase.train_batch_size, phase.micro_batch_size, world.world_size, world.rank)
    first = run.state.consumed_samples - phase.first_sample
    steps = loader.steps(first, phase.steps * phase.train_batch_size, shape)
    return run.interval.timed(steps)


def phase_loader(config: Config, phase: Phase, corpora: list[ShardSet], **building: Any) -> Loader:
    """The samples of a phase; see `EpochIndexes` for the keyword arguments."""
    stream = SampleStream(
        corpora,
        [corpus.weight for corpus in config.data.corpora],
        SampleOptions(phase.sequence_length, config.data.short_seq_prob, config.objective.nsp),
        int(derive_key(config.run.seed, PHASES, phase.number) >> 1),
        num_threads=os.cpu_count() or 1,
        **building,
    )
    rule = mask_rule(
        corpora[0].tokenizer, config.objective.masking, config.objective.mlm_probability
    )
    return Loader(stream, rule)


def train_step(run: Run, phase: Phase, batches: list[PackedBatch]) -> bool:
    """One optimizer step; returns whether all ranks are to stop after it."""
    state, engine, lap = run.state, run.engine, run.interval.watch.lap
    with run.interval.step():
        totals = engine.forward_backward(batches, state.global_step, run.stop.is_wanted, lap)
        if not (math.isfinite(totals.mlm_loss) and math.isfinite(totals.nsp_loss)):
            raise TrainingError(describe_bad_loss(run, totals))
        try:
            rate, norm, is_applied = engine.update(state.global_step, lap)
        except OverflowError as error:
            raise TrainingError(describe_overflow(run, str(error))) from error
    run.interval.add(phase, totals, rate, norm)
    run.skipped_in_a_row = 0 if is_applied else run.skipped_in_a_row + 1
    if not is_applied:
        note_skipped(run, norm)
    state.global_step += 1
    state.consumed_samples += phase.train_batch_size
    state.num_tokens += int(totals.num_tokens)
    state.seconds += run.interval.step_seconds
    report_spike(run, totals.mean_mlm_loss)
    run.metrics.advance(totals.mean_mlm_loss)
    run.watchdog.progress()
    saving = run.save_seconds + run.checkpointer.write_seconds
    run.stop.needs(3 * run.interval.step_seconds + 2 * saving)
    return totals.stop_votes > 0


def report_spike(run: Run, loss: float) -> None:
    """Warn when the loss stands out from the last hundred steps."""
    recent = run.recent_losses
    if len(recent) == recent.maxlen:
        mean, spread = statistics.fmean(recent), statistics.pstdev(recent)
        if loss > mean + max(6 * spread, 0.1 * mean):
            step = run.state.global_step
            logger.warning("loss spike at step %d: mlm %.4f, mean before %.4f", step, loss, mean)
    recent.append(loss)


def note_skipped(run: Run, norm: float) -> None:
    """Count a step without update; raises TrainingError where that is an error."""
    state = run.state
    if run.ds_config.precision != "fp16":
        raise TrainingError(
            f"the gradient of step {state.global_step} is not finite (norm {norm}), samples from "
            f"{state.consumed_samples} on; {UNTOUCHED}. A lower learning rate or a longer warm-up "
            f"may help"
        )
    state.skipped_steps += 1
    if run.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise TrainingError(describe_overflow(run, f"loss scale {run.engine.loss_scale:g}"))


def describe_overflow(run: Run, scale: str) -> str:
    """Explains a run of skipped fp16 steps."""
    return (
        f"{run.skipped_in_a_row} steps in a row were skipped because fp16 gradients overflowed "
        f"({scale}). The loss is diverging or the model does not fit fp16: lower "
        f"optimizer.learning_rate, lengthen schedule.warmup_steps, or use bf16"
    )


def describe_bad_loss(run: Run, totals: StepTotals) -> str:
    """Names the samples of a loss that is not finite."""
    mine = run.engine.samples_with_bad_loss()
    where = f"samples {mine[:8]} of rank {run.world.rank}" if mine else "samples of another rank"
    return (
        f"the loss of step {run.state.global_step} is not finite (mlm {totals.mean_mlm_loss}, nsp "
        f"{totals.mean_nsp_loss}): {where}; {UNTOUCHED}. Lower the learning rate, or look at them"
    )


# --- now and then ---------------------------------------------------------------------------------


def log_interval(run: Run) -> None:
    """Report the steps since the last report."""
    values, seconds_per_step = run.interval.read(run.setup.bert_config)
    values |= run.state.model_dump(exclude={"seconds"}) | {"loss_scale": run.engine.loss_scale}
    left = (run.config.total_steps - run.state.global_step) * seconds_per_step
    run.metrics.log_step(run.state.global_step, values, left)


def evaluate_heldout(run: Run, when: str) -> None:
    """Evaluate on every held-out set, into the log, metrics.jsonl and evaluation.json."""
    config, results = run.config, {}
    length = max(phase.sequence_length for phase in config.phases)
    with eval_mode(run.engine.engine):
        for name, corpus in run.setup.heldout.items():
            result = evaluate(
                run.engine.engine, corpus, sequence_length=length, is_paired=config.objective.nsp,
                num_samples=config.data.heldout_samples, world=run.world,
                batch_size=config.train.micro_batch_size,
            )  # fmt: skip
            results[name] = result.model_dump()
            run.watchdog.progress()
            run.metrics.record("heldout", run.state.global_step, {name: results[name]})
            logger.info("held-out %s, step %d: %s", name, run.state.global_step, result.as_text())
    if run.world.is_main and results and when != "during":
        path = run.directory / "evaluation.json"
        content = json.loads(path.read_text()) if path.exists() else {}
        write_text(path, json.dumps(content | {when: results}, indent=1) + "\n")


def save(run: Run, *, is_last: bool) -> None:
    """Write a checkpoint of the state after this step; the log says how long training waited.

    Args:
        is_last: the run is about to end, so wait until it is written.

    Raises:
        TrainingError: the last one could not be written. Otherwise a failure is reported and the
            next one tried.
    """
    start = time.perf_counter()
    is_new = run.saved_step != run.state.global_step
    tensors = run.engine.gather(keep=run.world.is_main) if is_new else {}
    problem = ""
    if run.world.is_main:
        try:
            if is_new:
                run.checkpointer.save(tensors, checkpoint_state(run))
            if is_last:
                run.checkpointer.finish()
        except OSError as error:
            problem = str(error)
            logger.error("no checkpoint at step %d: %s", run.state.global_step, error)
    problem = run.world.broadcast(problem)
    if problem and is_last:
        raise TrainingError(f"the last checkpoint could not be written: {problem}")
    if is_new and not problem:
        run.saved_step = run.state.global_step
        seconds = time.perf_counter() - start
        run.save_seconds = max(run.save_seconds, seconds)
        logger.info("saving step %d: training waited %.2f s", run.saved_step, seconds)
    run.watchdog.progress()


def checkpoint_state(run: Run) -> CheckpointState:
    return CheckpointState(
        train=run.state.model_copy(),
        optimizer_step=run.engine.optimizer_step,
        scaler=run.engine.scaler_state(),
        precision=run.ds_config.precision,
        zero_stage=run.ds_config.stage,
        world_size=run.world.world_size,
        config=run.config.model_dump(mode="json"),
        corpora=corpus_fingerprints(run.setup.corpora),
        hashes={},
    )


def finish(run: Run) -> None:
    """Save, evaluate, and write the final Hugging Face model."""
    save(run, is_last=True)
    evaluate_heldout(run, "after")
    final = run.world.on_main(lambda: str(run.checkpointer.write_final(run.saved_step)))
    logger.info(
        "done: %d steps, %.1f M tokens, %s of training; model: %s",
        run.state.global_step, run.state.num_tokens / 1e6,
        tqdm.format_interval(run.state.seconds), final,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
