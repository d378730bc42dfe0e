"""What `bert-cpt plan` says about memory, against what two ranks hold."""

import json
import sys
from pathlib import Path

import pytest

from bert_cpt.config import load_config
from data_tools import write_shards
from launcher.plan import Plan
from tests.conftest import generated_documents, write_tiny_checkpoint
from tests.distributed.conftest import launch

pytestmark = pytest.mark.distributed

KINDS = [(stage, "fp32") for stage in range(4)] + [(stage, "bf16") for stage in (1, 2, 3)]
NUM_RANKS = 2
TOLERANCE = 0.03


@pytest.fixture(scope="module")
def config(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 3.4 million parameters, and so little data that all else is small beside it."""
    root = tmp_path_factory.mktemp("memory")
    checkpoint = write_tiny_checkpoint(
        root / "checkpoint", hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=1024,
    )  # fmt: skip
    write_shards(generated_documents(30), root / "shards", tokenizer=checkpoint)
    given = [
        f"data.corpora=[{{path='{root / 'shards'}'}}]", f"model.init_checkpoint={checkpoint}",
        f"run.output_dir={root / 'run'}", "data.sequence_length=16", "train.train_batch_size=8",
        "train.micro_batch_size=2", "train.steps=2", "checkpoint.interval=100",
    ]  # fmt: skip
    path = root / "config.toml"
    path.write_text(load_config(tiny_config, given).as_toml())
    return path


def ds_file(directory: Path, stage: int, precision: str) -> Path:
    path = directory / f"zero{stage}_{precision}.json"
    # Buckets are planned as such; here they shall not matter.
    zero = {"stage": stage, "reduce_bucket_size": 10_000, "stage3_prefetch_bucket_size": 10_000}
    path.write_text(
        json.dumps({"zero_optimization": zero, "bf16": {"enabled": precision == "bf16"}})
    )
    return path


def test_weights_gradients_and_optimizer_take_the_memory_that_was_planned(
    config: Path, tmp_path: Path
) -> None:
    choices = Plan(load_config(config), num_gpus=NUM_RANKS).choices
    planned = {c[:2]: c.weights_bytes + c.gradients_bytes + c.optimizer_bytes for c in choices}
    runs = [
        f"train.deepspeed_config={ds_file(tmp_path, *kind)} run.output_dir={tmp_path / str(number)}"
        for number, kind in enumerate(KINDS)
    ]
    worker = str(Path(__file__).parent / "memory_worker.py")
    result = launch(NUM_RANKS, worker, str(config), *runs)
    assert result.returncode == 0, result.stderr[-5000:]
    measured = json.loads(result.stdout.strip().splitlines()[-1])
    rows = [(*kind, bytes_, planned[kind]) for kind, bytes_ in zip(KINDS, measured, strict=True)]
    for row in rows:
        print("ZeRO {} {}: {} bytes measured, {} planned".format(*row), file=sys.stderr)
    assert all(abs(bytes_ / plan - 1) < TOLERANCE for _, _, bytes_, plan in rows), rows
