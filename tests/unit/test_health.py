"""What ranks tell each other at the start: who disagrees, and about what."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from bert_cpt.config import Config, load_config
from bert_cpt.ds_config import DeepSpeedConfig
from bert_cpt.health import check_health, compare_ranks, find_warnings, shared_device
from bert_cpt.world import World
from data_tools.errors import UserError

ZERO_1 = DeepSpeedConfig({"zero_optimization": {"stage": 1}}, "fp32")
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


@dataclass(frozen=True)
class Spoken(World):
    """One rank of several; what the others say is given, call by call."""

    others: list[Callable[[Any], list[Any]]] = field(default_factory=list)

    def gather(self, value: Any) -> list[Any]:
        everyone = self.others.pop(0)(value)
        return json.loads(json.dumps(everyone))


def second_rank_of_two(first_says: Any) -> Spoken:
    """Rank 1, after rank 0 said what it is about to do; then both report their problems."""
    return Spoken(1, 2, CPU, [lambda mine: [first_says, mine], lambda mine: [["node1", ""], mine]])


def what_rank_0_says(
    monkeypatch: pytest.MonkeyPatch, config: Config, ds: DeepSpeedConfig, corpora: list[str]
) -> Any:
    said: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(World, "broadcast", lambda self, value: said.append(value) or value)
        compare_ranks(ALONE, config, ds, corpora)
    return json.loads(json.dumps(said[0]))


@pytest.mark.parametrize(
    ("overrides", "stage", "corpora", "expected"),
    [
        (["optimizer.learning_rate=0.5"], 1, ["a"],
         "optimizer.learning_rate is 0.5, on the first rank 0.001"),
        ([], 2, ["a"], "DeepSpeed.zero_optimization.stage is 2, on the first rank 1"),
        ([], 1, ["b"], "content of data.corpora.0 is b, on the first rank a"),
        (["data.heldout.x=/tmp"], 1, ["a"], "data.heldout.x is /tmp, on the first rank None"),
    ],
)  # fmt: skip
def test_a_rank_that_is_to_do_something_else_is_named(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch,
    overrides: list[str], stage: int, corpora: list[str], expected: str,
) -> None:  # fmt: skip
    first = what_rank_0_says(monkeypatch, load_config(tiny_config), ZERO_1, ["a"])
    other = DeepSpeedConfig({"zero_optimization": {"stage": stage}}, "fp32")
    monkeypatch.setattr("socket.gethostname", lambda: "node2")
    with pytest.raises(UserError) as caught:
        compare_ranks(
            second_rank_of_two(first), load_config(tiny_config, overrides), other, corpora
        )
    assert str(caught.value).startswith("on node2 (rank 1): ")
    assert expected in str(caught.value)


def test_other_versions_and_other_weights_are_named(
    tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_config)
    first = what_rank_0_says(monkeypatch, config, ZERO_1, ["a"])
    first["versions"]["torch"] = "1.0"
    first["bytes of model.init_checkpoint"] = 7
    with pytest.raises(UserError, match=r"bytes of model.init_checkpoint is \d+") as caught:
        compare_ranks(second_rank_of_two(first), config, ZERO_1, ["a"])
    assert f"versions.torch is {torch.__version__}, on the first rank 1.0" in str(caught.value)


def test_ranks_that_agree_go_on(tiny_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(tiny_config)
    first = what_rank_0_says(monkeypatch, config, ZERO_1, ["a"])
    compare_ranks(second_rank_of_two(first), config, ZERO_1, ["a"])


def raised_by(*problems: tuple[str, str]) -> str:
    everyone = [list(each) for each in problems]
    with pytest.raises(UserError) as caught:
        Spoken(0, len(everyone), CPU, [lambda mine: everyone]).raise_any("")
    return str(caught.value)


def test_a_problem_of_some_names_them_and_a_problem_of_all_does_not() -> None:
    some = raised_by(("a", ""), ("b", "no disk"), ("b", "no disk"))
    assert some == "on b (rank 1), b (rank 2): no disk"
    assert raised_by(("a", "no disk"), ("b", "no disk")) == "no disk"
    many = raised_by(("a", ""), *[(f"n{number}", "no disk") for number in range(1, 30)])
    assert many == "on n1 (rank 1), n2 (rank 2), n3 (rank 3), n4 (rank 4) and 25 more: no disk"
    two = raised_by(("a", "x"), ("b", "y"))
    assert two == "on a (rank 0): x; on b (rank 1): y"


def test_each_gpu_belongs_to_one_rank() -> None:
    devices = [("a", "H200 1"), ("a", "H200 2"), ("b", "H200 1"), ("a", "H200 1")]
    ranks = [{"host": host, "device": device} for host, device in devices]
    assert [shared_device(ranks, rank) for rank in range(3)] == ["", "", ""]
    assert shared_device(ranks, 3) == "shares H200 1 with rank 0; start one task a GPU"
    assert not shared_device([{"host": "a", "device": "cpu"}] * 2, 1)


def test_clocks_apart_and_full_disks_are_reported_once_a_host(
    tiny_config: Path, tmp_path: Path
) -> None:
    config = load_config(tiny_config, [f"run.output_dir={tmp_path}"])
    good = {"host": "a", "clock": 1000.0, "free_temporary_bytes": 1 << 40}
    late = {"host": "b", "clock": 1100.0, "free_temporary_bytes": 1 << 40}
    full = {"host": "c", "clock": 1001.0, "free_temporary_bytes": 5 << 20}
    clock, disk = find_warnings([good, late, late, full], config)
    assert clock.startswith("the clock of b differs by 100 s from that of a")
    assert disk == "c: only 5 MiB free for temporary files"
    many = load_config(
        tiny_config, [f"run.output_dir={tmp_path}", "checkpoint.keep_last=100000000"]
    )
    (room,) = find_warnings([good], many)
    assert "100000001 checkpoints take about" in room


def test_health_of_one_rank_names_its_host(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node1")
    config = load_config(tiny_config, [f"run.output_dir={tmp_path}"])
    (rank,) = check_health(ALONE, config)
    assert rank.keys() == {"host", "pid", "device"}
    assert (rank["host"], rank["device"]) == ("node1", "cpu")
