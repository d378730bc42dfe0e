"""Training jobs on a real Slurm: they run, save, come back, and leave when they are told to."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bert_cpt.config import load_config
from launcher.slurm import SCRIPT
from tests.cluster.slurm import Slurm, wait_until

pytestmark = pytest.mark.cluster

START_SECONDS = 120  # for a job to begin to train on a busy machine
MIN_STEPS = 40


def last_step(run_dir: Path) -> int:
    latest = run_dir / "latest"
    return int(latest.read_text().strip().removeprefix("step_")) if latest.exists() else 0


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "final" / "model.safetensors")


def assert_equal_models(one: Path, two: Path) -> None:
    expected = weights(two)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(one).items())


def config_in(endless: Path, run_dir: Path) -> Path:
    """A configuration of its own for a job, so that its number of steps can be changed."""
    path = run_dir.with_suffix(".toml")
    path.write_text(load_config(endless, [f"run.output_dir={run_dir}"]).as_toml())
    return path


def limit_steps(config: Path, steps: int) -> None:
    config.write_text(load_config(config, [f"train.steps={steps}"]).as_toml())


def sbatch(slurm: Slurm, *arguments: str | Path) -> str:
    return slurm.run("sbatch", "--parsable", "--ntasks-per-node=1", *arguments)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def requeued(slurm: Slurm, endless_config: Path, root: Path) -> tuple[Path, int, str]:
    """(run directory, steps, log) of a job that met its time limit, came back and finished."""
    run_dir = root / "requeued"
    config, log = config_in(endless_config, run_dir), root / "requeued.log"
    # The limit is a minute; Slurm signals up to a minute before the 20 s stated here, when the
    # ranks may still be starting.
    job = sbatch(
        slurm, "--nodes=2", "--time=1", "--signal=B:USR1@20", f"--output={log}", SCRIPT, config
    )
    wait_until(lambda: slurm.job(job, "Restarts") == "1", START_SECONDS, "the job to be put back")
    steps = last_step(run_dir) + 20
    limit_steps(config, steps)
    slurm.hurry(job)
    assert slurm.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT") == "COMPLETED", log.read_text()
    return run_dir, steps, log.read_text()


@pytest.fixture(scope="module")
def uninterrupted(
    slurm: Slurm, endless_config: Path, root: Path, requeued: tuple[Path, int, str]
) -> tuple[Path, int]:
    """(run directory, steps) of a job that `bert-cpt submit` sent off and nothing disturbed."""
    run_dir, steps = root / "uninterrupted", max(requeued[1], MIN_STEPS)
    answer = slurm.run(
        "bert-cpt", "submit", endless_config, f"run.output_dir={run_dir}", f"train.steps={steps}",
        "--nodes=2", "--gpus-per-node=0", "--time=10", "--sbatch=--comment=a b",
    )  # fmt: skip
    job = answer.split()[1].rstrip(":")
    state = slurm.wait_for(job, "COMPLETED", "FAILED")
    assert state == "COMPLETED", (run_dir / f"slurm-{job}.log").read_text()
    assert slurm.job(job, "Comment") == "a"
    return run_dir, steps


def test_a_job_saves_before_its_time_limit_comes_back_and_ends_as_if_nothing_had_been(
    requeued: tuple[Path, int, str], uninterrupted: tuple[Path, int]
) -> None:
    run_dir, steps, log = requeued
    assert log.count("saved and put back in the queue") == 1
    assert log.index("start 1,") < log.index("; saved") < log.index("start 2,"), "appended"
    assert "resumed from" in log
    if steps >= MIN_STEPS:
        assert_equal_models(run_dir, uninterrupted[0])


def test_two_nodes_train_and_tell_who_they_are(uninterrupted: tuple[Path, int]) -> None:
    run_dir, steps = uninterrupted
    assert json.loads((run_dir / "outcome.json").read_text())["exit_code"] == 0
    environment = json.loads((run_dir / "environment.json").read_text())
    assert len(environment["ranks"]) == 2
    assert f"step {steps // 20 * 20}/{steps}" in (run_dir / "train.log").read_text()
    assert "health: 2 rank(s)" in (run_dir / "logs" / "rank_0001.log").read_text()


def test_scancel_saves_and_the_job_stays_away(
    slurm: Slurm, endless_config: Path, root: Path
) -> None:
    run_dir = root / "cancelled"
    log = root / "cancelled.log"
    config = config_in(endless_config, run_dir)
    job = sbatch(slurm, "--nodes=2", "--time=10", f"--output={log}", SCRIPT, config)
    wait_until(lambda: last_step(run_dir) > 0, START_SECONDS, "a checkpoint")
    slurm.run("scancel", job)
    wait_until(lambda: slurm.run("squeue", "-h", "-j", job) == "", 60, "the job to be gone")
    assert slurm.job(job, "JobState") == "CANCELLED"
    assert slurm.job(job, "Restarts") == "0"
    stopped = [line for line in log.read_text().splitlines() if "stopped at step" in line]
    assert len(stopped) == 1, log.read_text()
    assert f"stopped at step {last_step(run_dir)} " in stopped[0]


def test_a_node_that_dies_brings_the_job_back(
    slurm: Slurm, endless_config: Path, root: Path, uninterrupted: tuple[Path, int]
) -> None:
    reference, steps = uninterrupted
    run_dir, log = root / "survivor", root / "survivor.log"
    config = config_in(endless_config, run_dir)
    job = sbatch(slurm, "--nodes=2", "--time=10", f"--output={log}", SCRIPT, config)
    wait_until(lambda: last_step(run_dir) > 0, START_SECONDS, "a checkpoint")
    slurm.kill_node("n2")
    wait_until(lambda: slurm.job(job, "Restarts") == "1", START_SECONDS, "the job to be put back")
    assert "another rank is gone" in (run_dir / "train.log").read_text()
    assert last_step(run_dir) < steps, "the reference is too short for this machine"
    limit_steps(config, steps)
    slurm.start_node("n2")
    slurm.hurry(job)
    assert slurm.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", log.read_text()
    assert_equal_models(run_dir, reference)


def test_two_jobs_on_one_node_do_not_collide(
    slurm: Slurm, endless_config: Path, root: Path
) -> None:
    jobs = []
    for name in ("left", "right"):
        config = config_in(endless_config, root / name)
        limit_steps(config, 20)
        arguments = ("--nodes=1", "--ntasks=2", "--nodelist=n1", "--time=10", SCRIPT, config)
        jobs.append(slurm.run("sbatch", "--parsable", f"--chdir={root}", *arguments))
    started = time.monotonic()
    for job in jobs:
        log = root / f"bert-cpt-{job}.log"
        assert slurm.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", log.read_text()
    starts = {slurm.job(job, "StartTime") for job in jobs}
    assert len(starts) <= 2
    assert time.monotonic() - started < START_SECONDS
    for name in ("left", "right"):
        environment = json.loads((root / name / "environment.json").read_text())
        assert len(environment["ranks"]) == 2
    assert_equal_models(root / "left", root / "right")
