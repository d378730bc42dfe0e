"""`bert-cpt plan` and `train --dry-run`: figures by hand, and what they refuse."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForPreTraining
from typer.testing import CliRunner, Result

from bert_cpt.batches import PackedBatch
from bert_cpt.config import load_config
from bert_cpt.model import PretrainingModel, to_device
from bert_cpt.setup import check_setup
from bert_cpt.timing import flops_per_token
from bert_cpt.train import phase_loader
from data_tools.errors import UserError
from launcher.cli import app
from launcher.plan import (
    RESERVED_BYTES,
    Parameters,
    Plan,
    activation_bytes,
    count_parameters,
    state_bytes,
)

BASE = BertConfig()
GIB = 2**30


def test_parameters_are_those_of_the_model_and_frozen_ones_are_not_trained(
    tiny_config: Path,
) -> None:
    config = load_config(tiny_config)
    counts = count_parameters(config, BASE)
    assert counts.total == counts.trained == 110_106_428  # BERT-base with both heads
    frozen = load_config(tiny_config, ["model.freeze_embeddings=true", "model.frozen_layers=2"])
    model = BertForPreTraining(BertConfig(num_hidden_layers=3, vocab_size=100))
    kept = [model.bert.embeddings, *model.bert.encoder.layer[:2]]
    gone = sum(p.numel() for part in kept for p in part.parameters())
    counts = count_parameters(frozen, model.config)
    assert counts.total - counts.trained == gone


@pytest.mark.parametrize(
    ("stage", "precision", "expected"),
    [
        # weights, gradients, optimizer; sent: (2, 3, 2m+1, 2m) b T (N-1)/N with m = 5 micro-batches
        (0, "fp32", (4000, 3200, 6400, 2 * 4 * 600)),
        (1, "fp32", (4000, 3200, 2400, 3 * 4 * 600)),
        (1, "bf16", (2000, 1600, 2400, 3 * 2 * 600)),
        (2, "fp16", (2000, 400, 2400, 11 * 2 * 600)),
        (3, "bf16", (2 * (250 + 40), 400, 2400, 10 * 2 * 600)),
    ],
)
def test_bytes_of_a_rank_by_hand(
    stage: int, precision: str, expected: tuple[int, int, int, int]
) -> None:
    parameters = Parameters(total=1000, trained=800, small=40)
    assert expected == state_bytes(
        parameters, stage=stage, precision=precision, num_ranks=4, num_micro_batches=5
    )


def test_one_rank_sends_nothing() -> None:
    parameters = Parameters(total=1000, trained=1000, small=0)
    for stage in range(4):
        *_, sent = state_bytes(
            parameters, stage=stage, precision="fp32", num_ranks=1, num_micro_batches=1
        )
        assert sent == 0


def test_activations_know_what_makes_them_fewer(tiny_config: Path) -> None:
    config = load_config(tiny_config)
    full = activation_bytes(config, BASE, 128, "bf16")
    assert full < activation_bytes(config, BASE, 128, "fp32")
    assert activation_bytes(config, BASE, 256, "bf16") == pytest.approx(2 * full, rel=1e-3)
    for override in ("model.gradient_checkpointing=true", "model.hidden_dropout=0"):
        assert activation_bytes(load_config(tiny_config, [override]), BASE, 128, "bf16") < full
    padded = load_config(tiny_config, ["model.attention=padded"])
    logits = 10 * BASE.vocab_size * 128
    assert activation_bytes(padded, BASE, 128, "bf16") - full > 0.8 * logits


def full_batch(num_samples: int, length: int) -> PackedBatch:
    """Samples of the full length, 15 % of the tokens masked."""
    total = num_samples * length
    ids = np.random.default_rng(0).integers(1000, 30_000, total).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), num_samples)
    masked = np.arange(int(0.15 * total), dtype=np.int32) * 6
    return PackedBatch(
        ids, np.zeros(total, np.int32), positions,
        np.arange(num_samples + 1, dtype=np.int32) * length, masked,
        ids[masked].astype(np.int64), np.zeros(num_samples, np.int64), np.arange(num_samples),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("hidden", "layers", "num_samples", "length", "dropout"),
    [(256, 4, 8, 128, 0.1), (256, 4, 8, 128, 0.0), (384, 6, 8, 128, 0.1), (384, 6, 4, 512, 0.1)],
)
def test_planned_activations_hold_what_autograd_saves_and_not_much_more(
    tiny_config: Path, hidden: int, layers: int, num_samples: int, length: int, dropout: float
) -> None:
    bert = BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = PretrainingModel(BertForPreTraining(bert).train(), "packed")
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        model(to_device(full_batch(num_samples, length), torch.device("cpu"), length))
    measured = sum(saved.values())
    planned = num_samples * activation_bytes(load_config(tiny_config), bert, length, "fp32")
    print(f"{hidden}x{layers}, {num_samples} x {length}: {measured} saved, {planned} planned")
    assert measured < planned < 1.35 * measured


def test_samples_epochs_and_time_are_those_of_the_run(tiny_config: Path) -> None:
    config = load_config(tiny_config, ["train.steps=30"])
    plan = Plan(config, num_gpus=2, tflops=0.5)
    assert plan.samples == 30 * 16
    stream = phase_loader(config, config.phases[0], check_setup(config).corpora).stream
    assert plan.epochs == [pytest.approx(480 / len(stream.indexes[0].get(0)), abs=1e-3)]
    assert plan.tokens < 480 * 64
    assert plan.seconds is not None
    mean = plan.tokens / plan.samples
    least = flops_per_token(plan.bert, mean_square_length=mean, masked_share=0.15, mean_length=mean)
    assert plan.seconds * 2 * 0.5e12 >= plan.tokens * least, "squares average to more"
    assert plan.seconds * 2 * 0.5e12 == pytest.approx(plan.tokens * least, rel=0.05)
    twice = Plan(config, num_gpus=4, tflops=0.5).seconds
    assert twice == pytest.approx(plan.seconds / 2)


def test_corpora_are_passed_over_by_weight(tiny_config: Path, tiny_shards: Path) -> None:
    corpora = f"data.corpora=[{{path='{tiny_shards}',weight=3}},{{path='{tiny_shards}'}}]"
    more, fewer = Plan(load_config(tiny_config, [corpora])).epochs
    assert more == pytest.approx(3 * fewer, abs=2e-3)


def test_the_largest_micro_batch_fits_and_the_next_one_does_not(tiny_config: Path) -> None:
    config = load_config(tiny_config, ["train.train_batch_size=4096"])
    plan = Plan(config, num_gpus=2)
    choice = plan.choices[0]
    sample = choice.activation_bytes // config.train.micro_batch_size
    room = choice.total_bytes - choice.activation_bytes + 300 * sample + 10
    plan = Plan(config, num_gpus=2, gpu_memory_gib=room / GIB)
    assert plan.choices[0].largest_micro_batch == 256, "the largest divisor of 2048 below 300"
    assert "ZeRO 0 with train.micro_batch_size=256" in plan.recommendation()
    with pytest.raises(UserError, match="no ZeRO stage fits"):
        Plan(config, num_gpus=2, gpu_memory_gib=RESERVED_BYTES / GIB).check_fits()


def test_an_offloaded_optimizer_takes_no_memory_of_the_device(tiny_config: Path) -> None:
    setting = "train.deepspeed_config=ds_configs/zero2_offload_fp16.json"
    configured = Plan(load_config(tiny_config, [setting])).configured
    assert configured[:2] == (2, "fp16")
    assert configured.optimizer_bytes == 0


def test_half_precision_with_zero_0_is_refused_before_the_queue(
    tiny_config: Path, tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_text('{"bf16": {"enabled": true}}')
    setting = f"train.deepspeed_config={tmp_path / 'ds.json'}"
    with pytest.raises(UserError, match="ZeRO stage 0 is refused"):
        Plan(load_config(tiny_config, [setting]))


def test_checkpoints_that_are_kept_are_counted(tiny_config: Path) -> None:
    config = load_config(tiny_config, ["train.steps=100", "checkpoint.keep_every=10"])
    plan = Plan(config)  # interval 5: two newest, one being written, ten for good; and the model
    assert plan.disk_bytes() == (13 * 12 + 4) * plan.parameters.total


def write_run(run_dir: Path, *records: dict[str, object]) -> Path:
    run_dir.mkdir()
    (run_dir / "environment.json").write_text('{"ranks": [{}, {}]}')
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (run_dir / "metrics.jsonl").write_text(lines)
    return run_dir


def test_the_rate_may_be_that_of_another_run(tiny_config: Path, tmp_path: Path) -> None:
    run_dir = write_run(
        tmp_path / "run",
        {"kind": "train", "tokens_per_second": 1.0},
        {"kind": "train", "tokens_per_second": 500.0},
        {"kind": "heldout"},
    )
    plan = Plan(load_config(tiny_config), num_gpus=4, measured_in=run_dir)
    assert plan.seconds == pytest.approx(plan.tokens / (4 * 250.0))
    with pytest.raises(UserError, match="no run directory with measured steps"):
        Plan(load_config(tiny_config), measured_in=write_run(tmp_path / "other"))


def bert_cpt(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_plan_is_one_json_document_and_names_the_configured_choice(tiny_config: Path) -> None:
    result = bert_cpt("plan", tiny_config, "--gpus", 2, "--gpu-memory-gib", 8, "--json")
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    configured = content["choices"][content["configured"]]
    assert (configured["stage"], configured["precision"]) == (1, "fp32")
    parts = ("weights", "gradients", "optimizer", "buffer", "activation")
    total = sum(configured[f"{part}_bytes"] for part in parts) + content["reserved_bytes"]
    assert configured["total_bytes"] == total
    assert content["gpu_hours"] is None, "no rate is known"


# --- train --dry-run ------------------------------------------------------------------------------


def test_a_dry_run_shows_everything_and_starts_nothing(tiny_config: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    given = (tiny_config, f"run.output_dir={run_dir}", "--nproc", 2, "--dry-run")
    result = bert_cpt("train", *given)
    assert result.exit_code == 0, result.stderr
    assert f'output_dir = "{run_dir}"' in result.stdout
    assert '"gradient_accumulation_steps": 2' in result.stdout
    assert "recommended   ZeRO" in result.stdout
    assert "samples       4, " in result.stdout
    assert "sample 0      [CLS]" in result.stdout
    assert not run_dir.exists()


def test_a_first_batch_that_does_not_fit_the_model_is_an_error(
    tiny_config: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_shards, tmp_path / "shards")
    (data,) = copy.glob("*.bin")
    data.write_bytes(b"\xf0\xf0" * (data.stat().st_size // 2))
    result = bert_cpt("train", tiny_config, f"data.corpora=[{{path='{copy}'}}]", "--dry-run")
    assert result.exit_code == 2, result.stderr
    assert "token id outside the vocabulary" in result.stderr
