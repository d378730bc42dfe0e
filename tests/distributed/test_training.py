"""Two and more gloo ranks: the result does not depend on how a step is split."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.conftest import RunRanks

pytestmark = pytest.mark.distributed

EXACT = "model.hidden_dropout=0.0 logging.interval=1"


def losses(run_dir: Path) -> dict[int, tuple[float, float]]:
    """Step -> (MLM loss, NSP loss); the last word on a step counts."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return {r["step"]: (r["mlm_loss"], r["nsp_loss"]) for r in records if r["kind"] == "train"}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "final" / "model.safetensors")


def assert_close(ours: dict, theirs: dict, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if "key.bias" in name:  # no effect on the loss: its gradient is rounding noise
            continue
        difference = (value - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-3)
        assert difference < tolerance, (name, difference)


@pytest.fixture(scope="module")
def split_runs(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """20 steps of 16 samples on 1, 2 and 4 ranks in micro-batches of 4, and every ZeRO stage."""
    root = tmp_path_factory.mktemp("split")
    settings = f"{EXACT} train.steps=20 optimizer.epsilon=1e-6"
    runs: dict[int, dict[str, str]] = {
        1: {"1 x 4": "", "1 x 4 again": "", "1 x 1": "train.micro_batch_size=16"},
        2: {
            "2 x 2": "", "stage 0": "train.deepspeed_config=ds_configs/zero0_fp32.json",
            "stage 2": "train.deepspeed_config=ds_configs/zero2_fp32.json",
            "stage 3": "train.deepspeed_config=ds_configs/zero3_fp32.json",
            "padded": "model.attention=padded",
        },
        4: {"4 x 1": ""},
    }  # fmt: skip
    paths = {name: root / name.replace(" ", "_") for group in runs.values() for name in group}
    for num_ranks, group in runs.items():
        given = [f"{settings} {text} run.output_dir={paths[name]}" for name, text in group.items()]
        assert run_ranks(num_ranks, *given) == [0] * len(group)
    return paths


@pytest.mark.parametrize(
    "split", ["2 x 2", "4 x 1", "1 x 1", "stage 0", "stage 2", "stage 3", "padded"]
)
def test_the_split_into_ranks_micro_batches_and_stages_changes_nothing(
    split_runs: dict[str, Path], split: str
) -> None:
    reference, other = losses(split_runs["1 x 4"]), losses(split_runs[split])
    assert reference.keys() == other.keys() == set(range(1, 21))
    for step in reference:
        assert other[step] == pytest.approx(reference[step], rel=2e-6, abs=1e-6)
    # Another forward, equal in its gradients to 1e-5; Adam carries that into the weights.
    tolerance = 1e-5 if split == "padded" else 1e-6
    assert_close(weights(split_runs[split]), weights(split_runs["1 x 4"]), tolerance)


def test_a_run_repeats_bit_for_bit(split_runs: dict[str, Path]) -> None:
    ours, again = weights(split_runs["1 x 4"]), weights(split_runs["1 x 4 again"])
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    assert losses(split_runs["1 x 4"]) == losses(split_runs["1 x 4 again"])


def test_the_loss_falls(split_runs: dict[str, Path]) -> None:
    curve = losses(split_runs["2 x 2"])
    assert curve[20][0] < curve[1][0] - 0.1
