"""What a run reports, and that trouble with the reporting never stops it."""

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bert_cpt import train
from bert_cpt.config import LoggingConfig
from bert_cpt.metrics import Metrics, flat, set_up_logging, start_wandb
from bert_cpt.rundir import without_secrets

VALUES = {
    "mlm_loss": 4.5, "nsp_loss": None, "learning_rate": 1e-4, "grad_norm": math.inf,
    "loss_scale": 65536.0, "tokens_per_second": 12345.0, "data_wait_share": 0.02,
    "time_share": {"forward": 0.5},
}  # fmt: skip


class Tracker:
    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.records: list[dict[str, Any]] = []

    def log(self, numbers: dict[str, Any], step: int) -> None:
        if self.error:
            raise self.error
        self.records.append(numbers | {"step": step})

    def finish(self) -> None:
        pass


def test_a_step_is_one_line_and_one_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker()
    metrics = Metrics(tmp_path, 100, 0, tracker, is_main=True)
    with caplog.at_level(logging.INFO):
        metrics.log_step(10, VALUES, seconds_left=3723)
    metrics.close()
    (line,) = caplog.messages
    for part in ("step 10/100", "mlm 4.5000", "nsp -", "grad inf", "scale 65536", "12.3k tok/s"):
        assert part in line
    assert "1:02:03" in line
    (record,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert record["kind"] == "train"
    assert record["time_share"] == {"forward": 0.5}
    assert record["nsp_loss"] is None
    assert float(record["grad_norm"]) == math.inf, "not filtered, and valid JSON"
    assert tracker.records[0]["train/time_share/forward"] == 0.5


def test_other_ranks_report_nothing(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 100, 0, None, is_main=False)
    metrics.log_step(10, VALUES, seconds_left=1)
    metrics.advance(1.0)
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_a_broken_tracker_is_reported_once_and_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics(tmp_path, 100, 0, Tracker(ConnectionError("no network")), is_main=True)
    metrics.record("train", 1, {"a": 1})
    metrics.record("train", 2, {"a": 2})
    metrics.close()
    assert caplog.text.count("W&B stopped taking records") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_wandb_works_without_network_and_continues_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # nobody is logged in
    numbers = []
    for _ in range(2):
        run = start_wandb(tmp_path, LoggingConfig(wandb="auto"), {"a": 1})
        assert run is not None
        assert run.settings.mode == "offline"
        numbers.append(run.id)
        run.log({"a": 1}, step=1)
        run.finish()
    assert numbers[0] == numbers[1]
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))


def test_wandb_can_be_disabled(tmp_path: Path) -> None:
    assert start_wandb(tmp_path, LoggingConfig(wandb="disabled"), {}) is None
    assert list(tmp_path.iterdir()) == []


def test_every_rank_has_a_log(tmp_path: Path) -> None:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    try:
        for rank in (0, 3):
            set_up_logging(tmp_path, rank)
            logging.getLogger("bert_cpt").info("rank %d was here", rank)
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    assert "rank 0 was here" in (tmp_path / "train.log").read_text()
    assert "rank 3 was here" in (tmp_path / "logs" / "rank_0003.log").read_text()


def test_nested_values_get_dotted_keys() -> None:
    nested = {"a": {"b": 1, "c": [{"d": 2}]}, "e": [], "f": None}
    assert dict(flat(nested)) == {"a.b": 1, "a.c.0.d": 2, "e": [], "f": None}


def test_secrets_stay_out_of_the_record() -> None:
    given = [
        "train", "--config", "c.toml", "logging.api_key=abc123", "hf_abcdefghijklmnop",
        "https://user:password@example.org/x", "run.seed=3",
    ]  # fmt: skip
    kept = " ".join(without_secrets(given))
    for secret in ("abc123", "hf_abc", "password"):
        assert secret not in kept
    assert "run.seed=3" in kept


# --- numbers gone wrong ---------------------------------------------------------------------------


def run_with(precision: str = "fp16") -> Any:
    return SimpleNamespace(
        recent_losses=train.deque(maxlen=100), skipped_in_a_row=0,
        state=SimpleNamespace(global_step=7, skipped_steps=0, consumed_samples=56),
        ds_config=SimpleNamespace(precision=precision), engine=SimpleNamespace(loss_scale=1.0),
    )  # fmt: skip


def test_a_loss_spike_is_reported_and_noise_is_not(caplog: pytest.LogCaptureFixture) -> None:
    run = run_with()
    for number in range(150):
        train.report_spike(run, 4.0 + 0.1 * (-1) ** number)
    assert caplog.text == ""
    train.report_spike(run, 6.0)
    assert "loss spike at step 7: mlm 6.0000" in caplog.text


def test_a_gradient_that_is_not_finite_stops_a_run_without_loss_scale() -> None:
    with pytest.raises(train.TrainingError, match="samples from 56 on"):
        train.note_skipped(run_with("bf16"), math.nan)


def test_skipped_fp16_steps_are_counted_and_a_row_of_them_is_explained() -> None:
    run = run_with()
    train.note_skipped(run, math.inf)
    assert run.state.skipped_steps == 1
    run.skipped_in_a_row = train.MAX_SKIPPED_IN_A_ROW
    with pytest.raises(train.TrainingError, match="fp16 gradients overflowed"):
        train.note_skipped(run, math.inf)
