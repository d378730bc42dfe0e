"""Checkpoints: whole or not there, checked when read, pruned; what may change between two runs."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForPreTraining, BertConfig

from bert_cpt.checkpoint import (
    Checkpointer,
    CheckpointState,
    TrainState,
    check_resumable,
    find_checkpoint,
    read_state,
)
from bert_cpt.config import CheckpointConfig, Config, load_config
from bert_cpt.model import load_model
from data_tools import UserError


@pytest.fixture(scope="module")
def tensors(tiny_checkpoint: Path) -> dict[str, dict[str, torch.Tensor]]:
    model, _ = load_model(str(tiny_checkpoint))
    weights = {name: p.detach() for name, p in model.named_parameters()}
    moments = {name: torch.zeros_like(p) for name, p in weights.items()}
    return {"model": weights, "exp_avg": moments, "exp_avg_sq": moments}


def state_at(step: int, config: Config | None = None) -> CheckpointState:
    return CheckpointState(
        train=TrainState(global_step=step, consumed_samples=8 * step), optimizer_step=step,
        scaler={"cur_scale": 256.0}, precision="fp16", zero_stage=1, world_size=2,
        config=config.model_dump(mode="json") if config else {}, corpora=["x"], hashes={},
    )  # fmt: skip


def checkpointer(run_dir: Path, checkpoint: Path, **options: int) -> Checkpointer:
    (run_dir / "tokenizer").mkdir(parents=True, exist_ok=True)
    shutil.copy(checkpoint / "tokenizer.json", run_dir / "tokenizer")
    bert_config = BertConfig.from_pretrained(checkpoint)
    result = Checkpointer(run_dir, CheckpointConfig(**options), bert_config)
    result.prepare()
    return result


@pytest.fixture(scope="module")
def saved(tensors: dict, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("saved")
    writer = checkpointer(run_dir, tiny_checkpoint)
    for step in (1, 2):
        writer.save(tensors, state_at(step))
    writer.finish()
    return run_dir


FILES = [
    "model.safetensors", "optimizer-exp_avg.safetensors", "optimizer-exp_avg_sq.safetensors",
    "trainer_state.json", "config.json", "tokenizer.json",
]  # fmt: skip


def test_a_checkpoint_is_read_as_it_was_written(saved: Path) -> None:
    path, state = find_checkpoint(saved) or pytest.fail("nothing was found")
    assert path.name == "step_00000002" == (saved / "latest").read_text().strip()
    assert state.train == TrainState(global_step=2, consumed_samples=16)
    assert state.scaler == {"cur_scale": 256.0}
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)
    AutoModelForPreTraining.from_pretrained(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_any_damage_is_named_and_the_one_before_is_taken(
    saved: Path, tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = shutil.copytree(saved, tmp_path / "run")
    path = run_dir / "checkpoints" / "step_00000002" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    if damage == "flipped":
        path.write_bytes(data)
    elif damage == "truncated":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with pytest.raises(UserError, match=name):
        read_state(path.parent)
    found = find_checkpoint(run_dir)
    assert found is not None
    assert found[0].name == "step_00000001"
    assert name in caplog.text


def test_when_all_are_damaged_the_run_does_not_begin_afresh(saved: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(saved, tmp_path / "run")
    for path in run_dir.glob("checkpoints/*/model.safetensors"):
        path.unlink()
    with pytest.raises(UserError, match="none of its 2 checkpoints is valid"):
        find_checkpoint(run_dir)


def test_what_a_kill_left_is_never_found_and_removed(saved: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(saved, tmp_path / "run")
    half = run_dir / "checkpoints" / ".step_00000003.tmp"
    shutil.copytree(run_dir / "checkpoints" / "step_00000002", half)
    found = find_checkpoint(run_dir)
    assert found is not None
    assert found[0].name == "step_00000002"
    Checkpointer(run_dir, CheckpointConfig(), BertConfig()).prepare()
    assert not half.exists()


def test_old_checkpoints_go_and_every_nth_stays(
    tensors: dict, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    writer = checkpointer(tmp_path, tiny_checkpoint, keep_last=2, keep_every=4)
    for step in range(1, 8):
        writer.save(tensors, state_at(step))
    writer.finish()
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000006", "step_00000007"]


def test_no_room_is_said_before_anything_is_written(
    tensors: dict, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = checkpointer(tmp_path, tiny_checkpoint)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1 << 20, 0, 1 << 20))
    with pytest.raises(OSError, match="GiB are free"):
        writer.save(tensors, state_at(1))
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_failed_write_is_raised_and_leaves_nothing_behind(
    tensors: dict, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = checkpointer(tmp_path, tiny_checkpoint)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bert_cpt.checkpoint.sync", full)
    writer.save(tensors, state_at(1))
    with pytest.raises(OSError, match="No space left"):
        writer.finish()
    assert find_checkpoint(tmp_path) is None
    assert writer.write_seconds == 0
    assert not (tmp_path / "latest").exists()
    assert list((tmp_path / "checkpoints").iterdir()) == []
    monkeypatch.undo()
    writer.save(tensors, state_at(2))
    writer.finish()
    assert find_checkpoint(tmp_path) is not None
    assert 0 < writer.write_seconds < 60


CHANGES = {
    "run.seed=7": False,
    "run.output_dir=elsewhere": True,
    "data.short_seq_prob=0.5": False,
    "data.sequence_length=64": False,
    "data.heldout_samples=9": True,
    "data.heldout.more=somewhere": True,
    "objective.masking=span": False,
    "objective.nsp=false": False,
    "model.hidden_dropout=0.3": False,
    "model.attention=padded": True,
    "model.frozen_layers=1": False,
    "optimizer.learning_rate=0.5": False,
    "schedule.decay=cosine": False,
    "train.steps=50": True,
    "train.micro_batch_size=8": True,
    "train.train_batch_size=64": False,
    "train.deepspeed_config=ds_configs/zero2_fp32.json": True,
    "train.max_seconds=60": True,
    "checkpoint.interval=3": True,
    "checkpoint.keep_last=5": True,
    "logging.interval=2": True,
    "logging.wandb=offline": True,
}


@pytest.mark.parametrize(("change", "is_allowed"), CHANGES.items())
def test_what_would_continue_something_else_is_refused_by_name(
    tiny_config: Path, change: str, is_allowed: bool
) -> None:
    base = ["data.sequence_length=128"]
    state = state_at(5, load_config(tiny_config, base))
    state = CheckpointState.model_validate_json(state.model_dump_json())
    changed = load_config(tiny_config, [*base, change])
    assert json.loads(changed.model_dump_json()) != state.config, "the change changes something"
    if is_allowed:
        check_resumable(state, changed, ["x"])
    else:
        with pytest.raises(UserError, match=change.split("=", maxsplit=1)[0]):
            check_resumable(state, changed, ["x"])


def test_other_shards_are_refused(tiny_config: Path) -> None:
    config = load_config(tiny_config)
    with pytest.raises(UserError, match="another manifest"):
        check_resumable(state_at(5, config), config, ["y"])
