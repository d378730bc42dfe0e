"""A resumed run equals the uninterrupted one: bit for bit in the same world, to 1e-5 in another."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForPreTraining

from tests.distributed.conftest import RunRanks
from tests.distributed.test_training import assert_close, losses, weights

pytestmark = pytest.mark.distributed

EVERY_STEP = "logging.interval=1 train.steps=8 checkpoint.interval=100"
SAME_WORLD = [
    ("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3),
    ("fp16", 1), ("fp16", 2), ("fp16", 3),
]  # fmt: skip


@pytest.fixture(scope="module")
def ds_configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSpeed files for every stage and precision; fp16 starts with a scale that overflows."""
    directory = tmp_path_factory.mktemp("ds_configs")
    for precision, stage in SAME_WORLD:
        content: dict[str, object] = {"zero_optimization": {"stage": stage}}
        if precision == "fp16":
            content["fp16"] = {
                "enabled": True, "initial_scale_power": 20, "loss_scale_window": 2, "hysteresis": 1,
            }  # fmt: skip
        elif precision == "bf16":
            content["bf16"] = {"enabled": True}
        (directory / f"{precision}_{stage}.json").write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="module")
def same_world(
    run_ranks: RunRanks, ds_configs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """For each case a whole run and one stopped after step 3 and after step 6, with dropout on."""
    root = tmp_path_factory.mktemp("same")
    given, expected = [], []
    for precision, stage in SAME_WORLD:
        name = f"{precision}_{stage}"
        settings = f"{EVERY_STEP} train.deepspeed_config={ds_configs / name}.json"
        whole = f"{settings} run.output_dir={root / name}_whole"
        parts = f"{settings} run.output_dir={root / name}_parts"
        given += [whole, f"{parts} stop_at=3", f"{parts} stop_at=6", parts]
        expected += [0, 85, 85, 0]
    assert run_ranks(2, *given) == expected
    return root


@pytest.mark.parametrize(("precision", "stage"), SAME_WORLD)
def test_losses_and_weights_are_bit_equal_in_the_same_world(
    same_world: Path, precision: str, stage: int
) -> None:
    whole = same_world / f"{precision}_{stage}_whole"
    parts = same_world / f"{precision}_{stage}_parts"
    assert losses(whole) == losses(parts)
    ours, theirs = weights(parts), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    moments = [
        load_file(run / "checkpoints/step_00000008/optimizer-exp_avg_sq.safetensors")
        for run in (whole, parts)
    ]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])


def test_fp16_skipped_steps_and_loss_scale_survive(same_world: Path) -> None:
    def last(run: Path) -> dict:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return [r for r in map(json.loads, lines) if r["kind"] == "train"][-1]

    whole, parts = (last(same_world / f"fp16_1_{kind}") for kind in ("whole", "parts"))
    assert whole["skipped_steps"] > 0, "the first scale was meant to overflow"
    for key in ("skipped_steps", "loss_scale", "consumed_samples", "num_tokens"):
        assert whole[key] == parts[key]


# (ranks, ZeRO stage) of three consecutive parts of a run
JOURNEYS = [
    [(1, 1), (2, 2), (4, 1)],
    [(4, 3), (2, 1), (1, 0)],
]


@pytest.fixture(scope="module")
def journeys(
    run_ranks: RunRanks, ds_configs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    root = tmp_path_factory.mktemp("journeys")
    settings = f"{EVERY_STEP} model.hidden_dropout=0.0 optimizer.epsilon=1e-6"
    whole = f"{settings} run.output_dir={root / 'whole'}"
    assert run_ranks(1, whole) == [0]
    for leg in range(3):
        ending = ["stop_at=3", "stop_at=6", ""][leg]
        for ranks in (1, 2, 4):
            given = [
                f"{settings} run.output_dir={root / str(number)} {ending} "
                f"train.deepspeed_config={ds_configs}/fp32_{journey[leg][1]}.json"
                for number, journey in enumerate(JOURNEYS)
                if journey[leg][0] == ranks
            ]
            if given:
                assert set(run_ranks(ranks, *given)) == {85 if ending else 0}
    return root


@pytest.mark.parametrize("number", range(len(JOURNEYS)))
def test_any_world_size_and_stage_continues_the_same_run(journeys: Path, number: int) -> None:
    whole, parts = losses(journeys / "whole"), losses(journeys / str(number))
    assert parts.keys() == whole.keys()
    for step in whole:
        assert parts[step] == pytest.approx(whole[step], rel=1e-5)
    assert_close(weights(journeys / str(number)), weights(journeys / "whole"), 1e-5)


def test_a_checkpoint_is_a_model_and_holds_no_pickle(journeys: Path) -> None:
    directory = journeys / "whole" / "checkpoints" / "step_00000008"
    model, info = BertForPreTraining.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    stored = load_file(directory / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert all(torch.equal(p, stored[name]) for name, p in model.named_parameters())
    suffixes = {path.suffix for path in (journeys / "whole").rglob("*") if path.is_file()}
    assert not suffixes & {".bin", ".pt", ".pkl", ".pth"}


@pytest.fixture(scope="module")
def precisions(
    run_ranks: RunRanks, ds_configs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[int]]:
    """bf16, fp16 and fp32, each chosen explicitly; then `auto`, which would switch silently."""
    root = tmp_path_factory.mktemp("precisions")
    names = ["bf16_1", "fp16_2", "fp32_1"]
    settings = f"{EVERY_STEP} run.output_dir={root / 'run'}"
    given = [
        f"{settings} train.deepspeed_config={ds_configs / name}.json stop_at={stop}"
        for name, stop in zip(names, (2, 4, 6), strict=True)
    ]
    switched = f"{settings} train.deepspeed_config={ds_configs / 'bf16_1'}.json stop_at=7"
    auto = f"{settings} train.deepspeed_config=ds_configs/zero1_auto.json"
    return root / "run", run_ranks(2, *given, switched, auto)


def test_precision_changes_only_by_explicit_choice(precisions: tuple[Path, list[int]]) -> None:
    run_dir, codes = precisions
    assert codes == [85, 85, 85, 85, 2]
    curve = losses(run_dir)
    assert curve.keys() == set(range(1, 8))
    assert all(abs(a[0] - b[0]) < 0.5 for a, b in pairwise(curve.values()))


@pytest.fixture(scope="module")
def interrupted(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with a checkpoint every 2, stopped after step 5."""
    root = tmp_path_factory.mktemp("interrupted")
    settings = (
        f"logging.interval=1 train.steps=8 checkpoint.interval=2 checkpoint.keep_last=3 "
        f"run.output_dir={root / 'run'}"
    )
    assert run_ranks(1, f"{settings} stop_at=5") == [85]
    return root / "run"


def test_old_checkpoints_are_removed_and_the_newest_is_named(interrupted: Path) -> None:
    kept = sorted(path.name for path in (interrupted / "checkpoints").iterdir())
    assert kept == ["step_00000002", "step_00000004", "step_00000005"]
    assert (interrupted / "latest").read_text().strip() == "step_00000005"


DAMAGED = [
    "model.safetensors",
    "optimizer-exp_avg.safetensors",
    "config.json",
    "trainer_state.json",
]
REFUSED = {
    "optimizer.learning_rate": "0.5", "run.seed": "7", "train.train_batch_size": "32",
    "data.sequence_length": "32", "objective.masking": "span",
}  # fmt: skip
ALLOWED = "logging.interval=4 train.micro_batch_size=8 checkpoint.keep_last=1"


@pytest.fixture(scope="module")
def resumed(run_ranks: RunRanks, interrupted: Path) -> dict[str, int]:
    """Exit codes of going on with copies of the run: damaged, changed, and twice as it was."""
    settings = "logging.interval=1 train.steps=8 checkpoint.interval=2 checkpoint.keep_last=3"
    given: dict[str, str] = {}
    for file in DAMAGED:
        copy = shutil.copytree(interrupted, interrupted.parent / file)
        path = copy / "checkpoints" / "step_00000005" / file
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        given[file] = f"run.output_dir={copy}"
    for key, value in REFUSED.items():
        given[key] = f"run.output_dir={interrupted} {key}={value}"
    for name in ("allowed", "finished"):
        copy = shutil.copytree(interrupted, interrupted.parent / name)
        given[name] = f"run.output_dir={copy}" + (f" {ALLOWED}" if name == "allowed" else "")
    given["finished again"] = given["finished"]
    codes = run_ranks(1, *(f"{settings} {text}" for text in given.values()))
    return dict(zip(given, codes, strict=True))


@pytest.mark.parametrize("file", DAMAGED)
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_taken(
    interrupted: Path, resumed: dict[str, int], file: str
) -> None:
    log = (interrupted.parent / file / "train.log").read_text()
    assert resumed[file] == 0
    assert f"step_00000005/{file}" in log
    assert "resumed from" in log
    assert "at step 4" in log


@pytest.mark.parametrize("key", REFUSED)
def test_a_change_that_would_break_the_run_is_refused(
    interrupted: Path, resumed: dict[str, int], key: str
) -> None:
    assert resumed[key] == 2
    assert not (interrupted / "final").exists()


def test_allowed_changes_are_allowed(interrupted: Path, resumed: dict[str, int]) -> None:
    assert resumed["allowed"] == 0
    assert (interrupted.parent / "allowed" / "final" / "model.safetensors").exists()


def test_a_finished_run_does_nothing_when_started_again(
    interrupted: Path, resumed: dict[str, int]
) -> None:
    assert resumed["finished"] == resumed["finished again"] == 0
    log = (interrupted.parent / "finished" / "train.log").read_text()
    assert log.count("done: 8 steps") == 1
    assert "complete already" in log
