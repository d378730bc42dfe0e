"""Jobs on a real Slurm: they run, save, come back, and leave when they are told to."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bert_cpt.config import load_config
from data_tools.build import BuildOptions, build
from data_tools.tokenizer import load_tokenizer
from launcher.slurm import SCRIPT
from tests.cluster.slurm import Slurm, wait_until
from tests.conftest import generated_documents

pytestmark = pytest.mark.cluster

START_SECONDS = 180  # for a job to begin to train on a busy machine
INTERVAL = 20  # steps between checkpoints
SHARD_SCRIPT = SCRIPT.with_name("shard.sbatch")


def last_step(run_dir: Path) -> int:
    latest = run_dir / "latest"
    return int(latest.read_text().strip().removeprefix("step_")) if latest.exists() else 0


def wait_for_training(run_dir: Path, log: Path) -> None:
    """Until there is a newer checkpoint than there is now."""
    before = last_step(run_dir)
    try:
        wait_until(lambda: last_step(run_dir) > before, START_SECONDS, "a checkpoint")
    except AssertionError as error:
        raise AssertionError(log.read_text() if log.exists() else "no start") from error


def assert_as_uninterrupted(model: Path, reference: Path) -> None:
    one, two = (load_file(path / "model.safetensors") for path in (model, reference))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def config_in(endless: Path, run_dir: Path) -> Path:
    """A configuration of its own for a job, so that its number of steps can be changed."""
    path = run_dir.with_suffix(".toml")
    path.write_text(load_config(endless, [f"run.output_dir={run_dir}"]).as_toml())
    return path


def end_soon(config: Path, run_dir: Path) -> int:
    """Let the run end at the checkpoint after the next; returns its step."""
    steps = (last_step(run_dir) // INTERVAL + 2) * INTERVAL
    config.write_text(load_config(config, [f"train.steps={steps}"]).as_toml())
    return steps


def sbatch(slurm: Slurm, *arguments: str | Path) -> str:
    return slurm.run("sbatch", "--parsable", *arguments)


def start(slurm: Slurm, config: Path, log: Path, *options: str) -> str:
    """Train on both nodes, one rank on each."""
    common = ("--nodes=2", "--ntasks-per-node=1", f"--output={log}")
    return sbatch(slurm, *common, *options, SCRIPT, config)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def limited(slurm: Slurm, endless_config: Path, root: Path) -> tuple[Path, int, str]:
    """(run directory, steps, log) of a job that met its time limit, came back and finished."""
    run_dir, log = root / "limited", root / "limited.log"
    config = config_in(endless_config, run_dir)
    # The limit is a minute; Slurm signals up to a minute before the 20 s stated here, when the
    # ranks may still be starting.
    job = start(slurm, config, log, "--time=1", "--signal=B:USR1@20")
    wait_until(lambda: slurm.job(job, "Restarts") == "1", START_SECONDS, "the job to be put back")
    steps = end_soon(config, run_dir)
    slurm.hurry(job)
    assert slurm.wait_for(job, "COMPLETED", "FAILED", "TIMEOUT") == "COMPLETED", log.read_text()
    return run_dir, steps, log.read_text()


@pytest.fixture(scope="module")
def stricken(slurm: Slurm, endless_config: Path, root: Path) -> dict[str, Any]:
    """What became of a run whose node died, that was then cancelled, and submitted again."""
    run_dir, log = root / "stricken", root / "stricken.log"
    config = config_in(endless_config, run_dir)
    job = start(slurm, config, log, "--time=10")
    wait_for_training(run_dir, log)
    slurm.kill_node("n2")
    wait_until(lambda: slurm.job(job, "Restarts") == "1", START_SECONDS, "the job to be put back")
    after_death = (run_dir / "train.log").read_text()
    slurm.start_nodes("n2")
    # At once, this Slurm would take n2 from the new start when the old one is cleaned up on n1.
    slurm.hurry(job, seconds=8)
    wait_for_training(run_dir, log)
    slurm.run("scancel", job)
    wait_until(lambda: slurm.run("squeue", "-h", "-j", job) == "", 60, "the job to be gone")
    cancelled = {name: slurm.job(job, name) for name in ("JobState", "Restarts")}
    cancelled_at = last_step(run_dir)
    steps = end_soon(config, run_dir)
    again = start(slurm, config, log, "--time=10")
    assert slurm.wait_for(again, "COMPLETED", "FAILED") == "COMPLETED", log.read_text()
    return {
        "run_dir": run_dir, "steps": steps, "log": log.read_text(), "after_death": after_death,
        "cancelled": cancelled, "cancelled_at": cancelled_at,
    }  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(
    slurm: Slurm, endless_config: Path, root: Path, limited: tuple[Path, int, str],
    stricken: dict[str, Any],
) -> Path:  # fmt: skip
    """The run directory of a job that `bert-cpt submit` sent off and nothing disturbed."""
    run_dir, steps = root / "uninterrupted", max(limited[1], stricken["steps"])
    answer = slurm.run(
        "bert-cpt", "submit", endless_config, f"run.output_dir={run_dir}", f"train.steps={steps}",
        f"checkpoint.keep_every={INTERVAL}", "--nodes=2", "--gpus-per-node=0", "--time=10",
        "--comment=a b",
    )  # fmt: skip
    job = answer.split()[1].rstrip(":")
    state = slurm.wait_for(job, "COMPLETED", "FAILED")
    assert state == "COMPLETED", (run_dir / f"slurm-{job}.log").read_text()
    assert "Comment=a b" in slurm.run("scontrol", "show", "job", job)
    return run_dir


def test_a_node_that_dies_brings_the_job_back(stricken: dict[str, Any]) -> None:
    assert "stopped: " in stricken["after_death"], "the other rank says why it ends"
    first, second = stricken["log"].split("start 2,")[:2]
    assert "saved" not in first.splitlines()[-1]
    assert "resumed from" in second


def test_scancel_saves_and_the_job_stays_away(stricken: dict[str, Any]) -> None:
    assert stricken["cancelled"] == {"JobState": "CANCELLED", "Restarts": "1"}
    stopped = [line for line in stricken["log"].splitlines() if "stopped at step" in line]
    assert len(stopped) == 1
    assert f"stopped at step {stricken['cancelled_at']} " in stopped[0]


def test_a_job_saves_before_its_time_limit_comes_back_and_ends_as_if_nothing_had_been(
    limited: tuple[Path, int, str], uninterrupted: Path
) -> None:
    run_dir, steps, log = limited
    assert log.count("saved and put back in the queue") == 1
    assert log.index("start 1,") < log.index("; saved") < log.index("start 2,"), "appended"
    assert "resumed from" in log
    assert_as_uninterrupted(run_dir / "final", uninterrupted / "checkpoints" / f"step_{steps:08}")


def test_a_run_survives_a_dead_node_and_scancel_without_a_trace(
    stricken: dict[str, Any], uninterrupted: Path
) -> None:
    checkpoint = uninterrupted / "checkpoints" / f"step_{stricken['steps']:08}"
    assert_as_uninterrupted(stricken["run_dir"] / "final", checkpoint)


def test_two_nodes_train_and_tell_who_they_are(uninterrupted: Path) -> None:
    assert json.loads((uninterrupted / "outcome.json").read_text())["exit_code"] == 0
    environment = json.loads((uninterrupted / "environment.json").read_text())
    assert len(environment["ranks"]) == 2
    assert "health: 2 rank(s)" in (uninterrupted / "logs" / "rank_0001.log").read_text()


def test_two_jobs_on_one_node_do_not_collide(
    slurm: Slurm, endless_config: Path, root: Path
) -> None:
    jobs = {}
    for name in ("left", "right"):
        config = config_in(endless_config, root / name)
        config.write_text(load_config(config, [f"train.steps={INTERVAL}"]).as_toml())
        options = ("--nodes=1", "--ntasks=2", "--nodelist=n1", f"--output={root / name}.log")
        jobs[name] = sbatch(slurm, *options, "--time=10", SCRIPT, config)
    for name, job in jobs.items():
        state = slurm.wait_for(job, "COMPLETED", "FAILED")
        assert state == "COMPLETED", (root / f"{name}.log").read_text()
    starts, ends = ({slurm.job(job, f"{k}Time") for job in jobs.values()} for k in ("Start", "End"))
    assert max(starts) < min(ends), "at the same time"
    assert_as_uninterrupted(root / "left" / "final", root / "right" / "final")


# --- sharding -------------------------------------------------------------------------------------


def write_corpus(path: Path) -> Path:
    """About 30 MB: four blocks."""
    texts = [" ".join(document) for document in generated_documents(2_000)]
    lines = (json.dumps({"text": f"{n} {texts[n % 2_000]}"}) + "\n" for n in range(70_000))
    path.write_text("".join(lines))
    return path


def kill_task(slurm: Slurm, number: int) -> None:
    """Kill the program of an array's task, as the out-of-memory killer would."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        for process in slurm.processes():
            environment = process["environ"] or {}
            is_task = environment.get("SLURM_ARRAY_TASK_ID") == str(number)
            if is_task and process["name"] == "bert-cpt":
                os.kill(process["pid"], signal.SIGKILL)
                return
        time.sleep(0.02)
    raise AssertionError(f"task {number} did not start")


def test_an_array_shards_a_corpus_though_a_task_is_killed(
    slurm: Slurm, tiny_checkpoint: Path, root: Path
) -> None:
    corpus, output = write_corpus(root / "corpus.jsonl"), root / "by_the_array"
    command = (SHARD_SCRIPT, corpus, "--output", output, "--tokenizer", tiny_checkpoint)
    small = ("--cpus-per-task=1", "--mem-per-cpu=500", f"--output={root}/shard-%a.log")
    array = sbatch(slurm, *small, "--array=0-2", *command)
    finish = sbatch(slurm, *small, f"--dependency=afterok:{array}", *command, "--finish")
    kill_task(slurm, 2)  # whose number as a job is that of the array
    tasks = [f"{array}_{number}" for number in range(3)]
    wait_until(lambda: slurm.job(tasks[2], "Restarts") == "1", START_SECONDS, "task 2 to come back")
    slurm.hurry(tasks[2])
    for task in tasks:
        slurm.wait_for(task, "COMPLETED", "FAILED")
    state = slurm.wait_for(finish, "COMPLETED", "FAILED")
    logs = "".join(path.read_text() for path in sorted(root.glob("shard-*.log")))
    assert state == "COMPLETED", logs
    assert [slurm.job(task, "Restarts") for task in tasks] == ["0", "0", "1"]
    assert "exit code 137; back into the queue" in logs

    alone = root / "alone"
    tokenizer = load_tokenizer(tiny_checkpoint)
    build([str(corpus)], alone, tokenizer, str(tiny_checkpoint), BuildOptions())
    names = sorted(path.name for path in alone.iterdir())
    assert sorted(path.name for path in output.iterdir()) == names
    assert all((output / name).read_bytes() == (alone / name).read_bytes() for name in names)
