"""Checkpoints without topology: safetensors by name, loadable at any world size and ZeRO stage.

    checkpoints/step_00001000/
        model.safetensors              fp32 weights under Hugging Face names
        config.json, tokenizer files   with them the directory is a Hugging Face model
        optimizer-exp_avg.safetensors, optimizer-exp_avg_sq.safetensors
        trainer_state.json             counters, loss scaler, configuration, hashes of the others
    latest                             name of the newest one

A checkpoint is written in a directory aside, synced and renamed: if it is there, it is complete.
Nothing is pickled. There is no RNG state to keep: samples, masks and dropout are functions of
(seed, step, rank).
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, BertConfig

from bert_cpt.config import CheckpointConfig, Config
from bert_cpt.engine import MOMENTS, Engine
from bert_cpt.metrics import flat
from data_tools.errors import UserError
from data_tools.files import sha256_of, sync, write_text
from data_tools.shards import TOKENIZER, ShardSet

logger = logging.getLogger("bert_cpt")

VERSION = 1
STATE_FILE = "trainer_state.json"
MODEL_FILE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
MAX_STATE_BYTES = 16 << 20


class TrainState(BaseModel):
    """The counters of a run."""

    global_step: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    num_tokens: int = 0
    seconds: float = 0.0


class CheckpointState(BaseModel):
    """What trainer_state.json holds."""

    model_config = ConfigDict(extra="forbid")

    version: int = VERSION
    train: TrainState
    optimizer_step: int
    scaler: dict[str, float] | None
    precision: str
    zero_stage: int
    world_size: int
    config: dict[str, Any]
    corpora: list[str]
    hashes: dict[str, str]
    digest: str = ""  # of all the other fields

    def own_digest(self) -> str:
        """SHA-256 of everything but `digest`."""
        content = self.model_dump_json(exclude={"digest"})
        return hashlib.sha256(content.encode()).hexdigest()


class Checkpointer:
    """Writes the checkpoints of a run, the slow part in the background; on rank 0 only."""

    def __init__(self, run_dir: Path, config: CheckpointConfig, bert_config: BertConfig) -> None:
        self.directory = run_dir / "checkpoints"
        self.tokenizer_source = run_dir / "tokenizer"
        self.config = config
        self.bert_config = bert_config
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self.write_seconds = 0.0  # the longest so far

    def prepare(self) -> None:
        """Create the directory and remove what a kill left unfinished."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(".*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def save(self, tensors: dict[str, dict[str, Tensor]], state: CheckpointState) -> None:
        """Begin to write a checkpoint; the one before it is finished first.

        Raises:
            OSError: there is no room for it.
        """
        try:
            self.finish()
        except OSError as error:  # for this one there may be room again
            logger.error("%s", error)
        needed = sum(t.nbytes for group in tensors.values() for t in group.values())
        free = shutil.disk_usage(self.directory).free
        if free < needed + (64 << 20):
            sizes = f"{needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free"
            raise OSError(f"{self.directory}: a checkpoint needs {sizes}")
        self._writing = self._thread.submit(self._write, tensors, state)

    def finish(self) -> None:
        """Wait for the checkpoint being written; raises OSError if it could not be."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except Exception as error:  # safetensors has errors of its own for a full disk
            raise OSError(f"the checkpoint could not be written: {error}") from error

    def _write(self, tensors: dict[str, dict[str, Tensor]], state: CheckpointState) -> None:
        start = time.perf_counter()
        name = f"step_{state.train.global_step:08d}"
        with new_directory(self.directory / name) as aside:
            save_file(tensors["model"], aside / MODEL_FILE, metadata={"format": "pt"})
            (aside / "config.json").write_text(self.bert_config.to_json_string(use_diff=False))
            copy_files(self.tokenizer_source, aside)
            for key in MOMENTS:
                save_file(tensors[key], aside / f"optimizer-{key}.safetensors")
            state.hashes = {path.name: sha256_of(path) for path in sorted(aside.iterdir())}
            state.digest = state.own_digest()
            (aside / STATE_FILE).write_text(state.model_dump_json(indent=1))
        write_text(self.directory.parent / "latest", name + "\n")
        self._prune(state.train.global_step)
        size = sum(path.stat().st_size for path in (self.directory / name).iterdir())
        seconds = time.perf_counter() - start
        self.write_seconds = max(self.write_seconds, seconds)
        logger.info("checkpoint %s: %.2f GiB written in %.1f s", name, size / 2**30, seconds)

    def write_final(self, step: int) -> Path:
        """The model of a checkpoint as the one that the run ends in; returns its directory."""
        final = self.directory.parent / "final"
        with new_directory(final) as aside:
            names = (MODEL_FILE, "config.json", *TOKENIZER_FILES)
            copy_files(self.directory / f"step_{step:08d}", aside, names)
        return final

    def _prune(self, newest: int) -> None:
        steps = [int(path.name[5:]) for path in self.directory.glob("step_*")]
        kept = sorted(step for step in steps if step <= newest)[-self.config.keep_last :]
        every = self.config.keep_every
        for step in steps:
            if step not in kept and step <= newest and not (every and step % every == 0):
                doomed = self.directory / f".step_{step:08d}.tmp"
                os.replace(self.directory / f"step_{step:08d}", doomed)  # never half a checkpoint
                shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory aside to fill; on success it is synced and renamed to `target`, else removed.

    An older `target` gives way.
    """
    aside, old = (target.with_name(f".{target.name}{suffix}") for suffix in (".tmp", ".old.tmp"))
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in [*aside.iterdir(), aside]:
            sync(path)
        if target.exists():
            os.replace(target, old)
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    sync(target.parent)


def copy_files(source: Path, target: Path, names: Iterable[str] = TOKENIZER_FILES) -> None:
    """Copy those files that are there; as a rule, those of a tokenizer."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def collect_tokenizer(checkpoint: str, corpus: ShardSet, target: Path) -> None:
    """Gather the tokenizer files that go with every model of a run."""
    target.mkdir(exist_ok=True)
    source = Path(checkpoint)
    if not source.is_dir():
        AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False).save_pretrained(target)
        return
    copy_files(source, target)
    if not (target / "tokenizer.json").exists():
        shutil.copyfile(corpus.directory / TOKENIZER, target / "tokenizer.json")


# --- loading --------------------------------------------------------------------------------------


def find_checkpoint(run_dir: Path) -> tuple[Path, CheckpointState] | None:
    """The newest valid checkpoint of a run; damaged ones are reported and passed over.

    Raises:
        UserError: there are checkpoints, but none is valid.
    """
    found = sorted((run_dir / "checkpoints").glob("step_*"), reverse=True)
    for path in found:
        try:
            return path, read_state(path)
        except UserError as error:
            logger.error("%s; trying the one before it", error)
    if found:
        reason = f"none of its {len(found)} checkpoints is valid"
        raise UserError(f"{run_dir}: {reason}; choose another run.output_dir to start afresh")
    return None


def read_state(directory: Path) -> CheckpointState:
    """Read trainer_state.json and check every file's hash; raises UserError naming the damage."""
    path = directory / STATE_FILE
    try:
        if path.stat().st_size > MAX_STATE_BYTES:
            raise UserError(f"{path}: larger than {MAX_STATE_BYTES >> 20} MiB: damaged")
        state = CheckpointState.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError) as error:
        raise UserError(f"{path}: missing or damaged ({str(error).splitlines()[0]})") from error
    if state.version != VERSION:
        raise UserError(f"{path}: version {state.version}, expected {VERSION}")
    if state.digest != state.own_digest():
        raise UserError(f"{path}: damaged (its content does not match its digest)")
    for name, expected in state.hashes.items():
        file = directory / Path(name).name
        if not file.is_file():
            raise UserError(f"{file}: missing")
        if sha256_of(file) != expected:
            raise UserError(f"{file}: damaged (its SHA-256 is not the one in {STATE_FILE})")
    return state


def restore(engine: Engine, directory: Path) -> TrainState:
    """Bring moments, step count and loss scaler of a checkpoint into an engine."""
    state = read_state(directory)
    opened = {key: safe_open(directory / f"optimizer-{key}.safetensors", "pt") for key in MOMENTS}
    engine.restore(opened, state.optimizer_step, state.scaler)
    return state.train


# Keys that may differ between a checkpoint and the run that resumes it: they do not change what is
# computed, or (steps, heldout) only from here on.
MAY_CHANGE = (
    r"run\.output_dir|data\.heldout(_samples|\..*)?|data\.corpora\.\d+\.path"  # compared by content
    r"|model\.(attention|gradient_checkpointing|compile)|(checkpoint|logging)\..*"
    r"|train\.(steps|phases.*|micro_batch_size|deepspeed_config|max_seconds)"
)


def check_resumable(state: CheckpointState, config: Config, corpora: list[str]) -> None:
    """Raise UserError if the run that resumes would continue something else."""
    saved, current = dict(flat(state.config)), dict(flat(config.model_dump(mode="json")))
    for key in sorted(saved.keys() | current.keys()):
        if re.fullmatch(MAY_CHANGE, key):
            continue
        if saved.get(key) != current.get(key):
            raise UserError(
                f"{key}={current.get(key)!r}, but the checkpoint in {config.run.output_dir} was "
                f"trained with {saved.get(key)!r}; restore it, or choose another run.output_dir"
            )
    if state.corpora != corpora:
        raise UserError(
            "data.corpora: the shards are not those the checkpoint was trained on (another "
            "manifest); restore them, or choose another run.output_dir"
        )


def corpus_fingerprints(corpora: list[ShardSet]) -> list[str]:
    """What identifies the training data: a hash over the hashes of all shards."""
    return [
        hashlib.sha256(
            json.dumps([(s.bin_sha256, s.idx_sha256) for s in corpus.manifest.shards]).encode()
        ).hexdigest()
        for corpus in corpora
    ]
