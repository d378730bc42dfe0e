"""Bad luck: signals, kills, dead and hung ranks, full disks, damaged files, numbers gone wrong.

The long form (marker `slow`) repeats the kills 50 times; docs/reliability.md holds its table.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bert_cpt.config import load_config
from tests.distributed.conftest import RunRanks
from tests.distributed.test_training import losses, weights

pytestmark = pytest.mark.distributed

SETTINGS = ["logging.interval=1", "train.steps=40", "checkpoint.interval=3"]


class Training:
    """`bert-cpt train` as a user starts it, in a process group of its own."""

    def __init__(self, config: Path, run_dir: Path, *overrides: str, nproc: int = 2) -> None:
        command = [
            sys.executable,
            "-m",
            "launcher.cli",
            "train",
            str(config),
            "--nproc",
            str(nproc),
        ]
        self.run_dir = run_dir
        self.process = subprocess.Popen(
            [*command, f"run.output_dir={run_dir}", *SETTINGS, *overrides],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            cwd=Path(__file__).parents[2], start_new_session=True,
        )  # fmt: skip

    def wait(self, timeout: float = 240) -> tuple[int, str]:
        """Exit code and everything it said."""
        output, _ = self.process.communicate(timeout=timeout)
        return self.process.returncode, output

    def wait_for_step(self, step: int, timeout: float = 240) -> None:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(self.wait()[1])
            if (self.run_dir / "metrics.jsonl").exists() and max(
                losses(self.run_dir), default=0
            ) >= step:
                return
            time.sleep(0.01)
        raise AssertionError(f"step {step} was not reached in {timeout} s")

    def ranks(self) -> list[int]:
        """Process numbers of the ranks, in order."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != self.process.pid:
                try:
                    parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
                    environment = (entry / "environ").read_bytes().split(b"\0")
                except (OSError, IndexError):
                    continue
                if parent == self.process.pid:
                    (rank,) = (e[5:] for e in environment if e.startswith(b"RANK="))
                    found[int(rank)] = int(entry.name)
        return [found[rank] for rank in sorted(found)]

    def kill_all(self) -> None:
        """As a lost node or the out-of-memory killer would."""
        for pid in [*self.ranks(), self.process.pid]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def uninterrupted(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    code, output = Training(tiny_config, run_dir).wait()
    assert code == 0, output
    return run_dir


def assert_same(run_dir: Path, reference: Path) -> None:
    assert losses(run_dir) == losses(reference)
    ours, theirs = weights(run_dir), weights(reference)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_the_same_command_goes_on(
    tiny_config: Path, uninterrupted: Path, tmp_path: Path, number: signal.Signals
) -> None:
    training = Training(tiny_config, tmp_path / "run")
    training.wait_for_step(5)
    training.process.send_signal(number)
    code, output = training.wait()
    assert code == 85, output
    assert f"by {number.name} after" in output
    code, output = Training(tiny_config, tmp_path / "run").wait()
    assert code == 0, output
    assert_same(tmp_path / "run", uninterrupted)


def test_a_killed_rank_ends_the_others_within_a_minute(tiny_config: Path, tmp_path: Path) -> None:
    training = Training(tiny_config, tmp_path / "run", "train.steps=100000")
    training.wait_for_step(4)
    os.kill(training.ranks()[1], signal.SIGKILL)
    start = time.monotonic()
    code, output = training.wait(timeout=120)
    assert code == 1
    assert time.monotonic() - start < 60
    assert "stopped: " in output


def test_a_hung_rank_ends_all_with_their_stacks(tiny_config: Path, tmp_path: Path) -> None:
    training = Training(tiny_config, tmp_path / "run", "train.steps=100000")
    training.wait_for_step(4)
    hung = training.ranks()[1]
    os.kill(hung, signal.SIGSTOP)
    start = time.monotonic()
    try:
        code, output = training.wait(timeout=180)
    finally:
        if Path(f"/proc/{hung}").exists():
            os.kill(hung, signal.SIGKILL)
    assert code == 1
    assert time.monotonic() - start < 120, "30 s to notice, 15 s of grace for the hung one"
    assert "rank 1 gave no sign of life" in output
    assert "train_step" in (tmp_path / "run" / "logs" / "stacks_0000.txt").read_text()


def kill_and_resume(
    config: Path, run_dir: Path, num_kills: int, seed: int, **options: int
) -> tuple[int, int]:
    """Kill all ranks at random moments, then let the run finish; (kills, checkpoints lost)."""
    generator = random.Random(seed)
    lost = 0
    for _ in range(num_kills):
        training = Training(config, run_dir, **options)
        newest = max((int(p.name[5:]) for p in (run_dir / "checkpoints").glob("step_*")), default=0)
        training.wait_for_step(min(newest + 1 + generator.randrange(6), 39))
        time.sleep(generator.random() * 0.1)
        if training.process.poll() is None:
            before = {p.name for p in (run_dir / "checkpoints").glob("step_*")}
            training.kill_all()
            after = {p.name for p in (run_dir / "checkpoints").glob("step_*")}
            lost += max(before, default="") > max(after, default="")
    code, output = Training(config, run_dir, **options).wait()
    assert code == 0, output
    return num_kills, lost


def test_kills_at_random_moments_lose_nothing(
    tiny_config: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    _, lost = kill_and_resume(tiny_config, tmp_path / "run", 2, seed=1)
    assert lost == 0
    assert_same(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_fifty_kills_lose_nothing(tiny_config: Path, uninterrupted: Path, tmp_path: Path) -> None:
    kills = 0
    for seed in range(10):
        run_dir = tmp_path / str(seed)
        number, lost = kill_and_resume(tiny_config, run_dir, 5, seed=seed)
        kills += number
        assert lost == 0
        assert_same(run_dir, uninterrupted)
    print(f"{kills} kills, nothing lost")


def test_the_time_limit_is_kept(tiny_config: Path, tmp_path: Path) -> None:
    limit = "train.max_seconds=32"
    code, output = Training(tiny_config, tmp_path / "run", "train.steps=100000", limit).wait()
    assert code == 85, output
    (seconds,) = re.findall(r"by the time limit after (\d+) s; saved", output)
    assert int(seconds) < 32


def test_a_second_run_in_the_same_directory_is_refused(tiny_config: Path, tmp_path: Path) -> None:
    first = Training(tiny_config, tmp_path / "run", "train.steps=100000")
    first.wait_for_step(2)
    code, output = Training(tiny_config, tmp_path / "run", nproc=1).wait()
    first.kill_all()
    assert code == 2
    assert "another run is using it" in output


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of 8 MiB."""
    target = tmp_path / "small"
    target.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(target)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield target
    subprocess.run(["umount", "-l", str(target)], check=False)


def test_a_full_disk_is_named_and_costs_nothing_once_there_is_room(
    tiny_config: Path, uninterrupted: Path, small_disk: Path
) -> None:
    run_dir = small_disk / "run"
    code, output = Training(tiny_config, run_dir).wait()
    assert code == 1, output
    assert "are free" in output
    assert not (run_dir / "final").exists()
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    code, output = Training(tiny_config, run_dir).wait()
    assert code == 0, output
    assert_same(run_dir, uninterrupted)


def test_a_directory_that_cannot_be_written_is_an_error(tiny_config: Path) -> None:
    code, output = Training(tiny_config, Path("/proc/1/run"), nproc=1).wait()
    assert code == 2
    assert "error: run.output_dir=/proc/1/run" in output


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_samples(
    run_ranks: RunRanks, tmp_path: Path
) -> None:
    run = f"run.output_dir={tmp_path / 'run'} logging.interval=1 checkpoint.interval=2 fail_at=5"
    assert run_ranks(2, run) == [1]
    log = (tmp_path / "run" / "train.log").read_text()
    assert "the loss of step 5 is not finite" in log
    assert "samples [" in log
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step_00000002", "step_00000004",
    ]  # fmt: skip
    assert run_ranks(2, run.replace(" fail_at=5", "")) == [0]


def test_a_checkpoint_that_fails_in_the_background_is_missed(
    run_ranks: RunRanks, tmp_path: Path
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    settings = "train.steps=6 checkpoint.interval=2 logging.interval=1"
    failed = f"run.output_dir={one} {settings} unwritable=6"  # the last, saved by the interval
    again = f"run.output_dir={one} {settings}"
    survived = f"run.output_dir={other} {settings} unwritable=2"  # costs that one alone
    assert run_ranks(2, failed, again, survived) == [1, 0, 0]
    assert "the last checkpoint could not be written" in (one / "train.log").read_text()
    steps = ["step_00000004", "step_00000006"]
    assert sorted(path.name for path in (other / "checkpoints").iterdir()) == steps
    assert_same(one, other)


def ds_file(tmp_path: Path, **fp16: float) -> str:
    content = {"zero_optimization": {"stage": 1}, "fp16": {"enabled": True} | fp16}
    (tmp_path / "ds.json").write_text(json.dumps(content))
    return f"train.deepspeed_config={tmp_path / 'ds.json'}"


def test_repeated_overflow_stops_with_an_explanation(run_ranks: RunRanks, tmp_path: Path) -> None:
    setting = ds_file(tmp_path, initial_scale_power=32, min_loss_scale=2.0**31, hysteresis=1)
    assert run_ranks(1, f"run.output_dir={tmp_path / 'run'} train.steps=200 {setting}") == [1]
    log = (tmp_path / "run" / "train.log").read_text()
    assert "fp16 gradients overflowed" in log
    assert "lower optimizer.learning_rate" in log


def test_the_wall_clock_may_jump(run_ranks: RunRanks, tmp_path: Path, uninterrupted: Path) -> None:
    run = f"run.output_dir={tmp_path / 'run'} {' '.join(SETTINGS)} clock=jumps"
    assert run_ranks(2, run) == [0]
    assert_same(tmp_path / "run", uninterrupted)


def test_a_damaged_index_is_found_at_the_start(
    tiny_config: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_shards, tmp_path / "shards")
    path = copy / "shard_00000.idx"
    data = bytearray(path.read_bytes())
    data[34 + 4 * 10] ^= 1  # the length of the eleventh sentence
    path.write_bytes(data)
    corpora = f"data.corpora=[{{path='{copy}'}}]"
    code, output = Training(tiny_config, tmp_path / "run", corpora, nproc=1).wait()
    assert code == 2, output
    assert "shard_00000.idx" in output
    assert load_config(tiny_config, [corpora]).data.corpora[0].path == copy
