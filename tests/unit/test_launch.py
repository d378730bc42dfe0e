"""Hostfiles and what hosts are told, Slurm's variables, sbatch's words, ranks on one machine."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bert_cpt import world
from bert_cpt.config import load_config
from bert_cpt.stopping import StopSignal
from bert_cpt.world import first_host, read_environment, slurm_ranks
from data_tools.errors import UserError
from launcher.cli import app
from launcher.hosts import (
    forwarded,
    launcher_command,
    read_deepspeed_env,
    read_hostfile,
    run_on_hosts,
)
from launcher.local import run_ranks
from launcher.slurm import SCRIPT

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def bert_cpt(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# --- several hosts --------------------------------------------------------------------------------


def test_a_hostfile_may_hold_comments_and_blank_lines(tmp_path: Path) -> None:
    lines = [
        "# ours",
        "node1 slots=8",
        "",
        "  gpu-2.site.org  slots=4  # half",
        "10.0.0.3 slots=1",
    ]
    hosts = read_hostfile(write(tmp_path / "hosts", "\n".join(lines)))
    assert hosts == {"node1": 8, "gpu-2.site.org": 4, "10.0.0.3": 1}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("node2", "expected NAME slots=N"),
        ("node2 slots=0", "expected NAME slots=N"),
        ("node2 slots=8 slots=8", "expected NAME slots=N"),
        ("node1 slots=2", "stands there twice"),
        ("-oProxyCommand=x slots=1", "expected NAME slots=N"),
        ("node2;reboot slots=1", "expected NAME slots=N"),
    ],
)
def test_a_bad_line_of_a_hostfile_is_named(tmp_path: Path, line: str, reason: str) -> None:
    path = write(tmp_path / "hosts", f"node1 slots=8\n{line}\n")
    with pytest.raises(UserError, match="line 2: ") as caught:
        read_hostfile(path)
    assert line in str(caught.value)
    assert reason in str(caught.value)


def test_an_empty_or_missing_hostfile_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no host"):
        read_hostfile(write(tmp_path / "hosts", "# nothing\n"))
    with pytest.raises(UserError, match="No such file"):
        read_hostfile(tmp_path / "none")


def test_what_matters_to_a_run_is_forwarded_and_secrets_are_not() -> None:
    environment = {
        "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "4",
        "LD_LIBRARY_PATH": "/a:/b", "HOME": "/root", "LS_COLORS": "x",
        "HF_TOKEN": "hf_secret", "WANDB_API_KEY": "secret", "HTTPS_PROXY": "http://me:pw@proxy:1",
        "HF_HOME": "/models",
    }  # fmt: skip
    values, left_out = forwarded(environment)
    assert values.keys() == {
        "NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "LD_LIBRARY_PATH", "HF_HOME",
    }  # fmt: skip
    assert [text.split()[0] for text in left_out] == ["HF_TOKEN", "HTTPS_PROXY", "WANDB_API_KEY"]
    assert not any("secret" in text.partition(" (")[2].replace("a secret", "") for text in left_out)


@pytest.mark.parametrize("value", ["$(reboot)", "`reboot`", 'a"b', "a\\b", "a\nb", "%h"])
def test_a_value_that_a_shell_would_interpret_is_left_out(value: str) -> None:
    values, left_out = forwarded({"NCCL_X": value, "MINE": value, "OTHER": "fine"}, ["MINE"])
    assert values == {}
    assert [text.split()[0] for text in left_out] == ["MINE", "NCCL_X"]


def test_deepspeed_env_is_read_with_blank_lines_and_comments(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write(tmp_path / "a" / ".deepspeed_env", "ONE=1\n\n# TWO=2\nTHREE = x=y \nnonsense\n")
    assert read_deepspeed_env([tmp_path, tmp_path / "a"]) == {"ONE": "1", "THREE": "x=y"}


def test_the_launcher_is_told_one_path_and_a_port_of_its_own(tmp_path: Path) -> None:
    ports = set()
    for _ in range(5):
        command = launcher_command(tmp_path / "hosts", tmp_path / "c.toml", "10.0.0.1")
        assert command[-4:] == ["--module", "bert_cpt.train", "--config", str(tmp_path / "c.toml")]
        assert command[command.index("--master_addr") + 1] == "10.0.0.1"
        ports.add(command[command.index("--master_port") + 1])
    assert len(ports) > 1
    assert "--master_addr" not in launcher_command(tmp_path, tmp_path, None)


def test_what_hosts_cannot_do_is_said_at_once(
    tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = write(tmp_path / "hosts", "node1 slots=2\nnode2 slots=2\n")
    config = load_config(tiny_config, [f"run.output_dir={tmp_path / 'run'}"])
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="needs pdsh"):
        run_on_hosts(config, hosts)
    blank = load_config(tiny_config, [f"run.output_dir={tmp_path / 'a run'}"])
    with pytest.raises(UserError, match="cannot carry this path"):
        run_on_hosts(blank, hosts)
    with pytest.raises(UserError, match="on 3 ranks"):
        run_on_hosts(config, write(tmp_path / "three", "node1 slots=3\n"))
    assert not (tmp_path / "run").exists()


# --- Slurm ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"), ("n[1-2]", "n1"), ("n[03-07,9],m1", "n03"), ("gpu-a[12,15-16]", "gpu-a12"),
        ("a1,b[1-3]", "a1"), ("rack[1-2]node[5-9]", "rack1node5"),
        ("host.site.org", "host.site.org"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def slurm_environment(**given: str) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "n[4-5]",
    } | given  # fmt: skip


def test_slurm_says_who_a_task_is_and_jobs_get_ports_apart() -> None:
    ranks = slurm_ranks(slurm_environment())
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    assert [ranks[name] for name in names] == ["3", "8", "1", "n4"]
    ports = {
        int(
            slurm_ranks(slurm_environment(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step)))[
                "MASTER_PORT"
            ]
        )
        for job in range(1000, 1100)
        for step in range(3)
    }
    assert len(ports) == 300
    assert min(ports) >= 20_000
    assert max(ports) < 32_768, "below what systems hand out"


def test_an_allocation_without_srun_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8"}
    monkeypatch.setattr(world.os, "environ", environment)
    with pytest.raises(UserError, match="start with srun"):
        read_environment()
    environment.clear()
    assert read_environment() == [0, 1, 0]
    assert environment["MASTER_ADDR"] == "127.0.0.1"


@pytest.fixture
def fake_bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of programs that come before all others."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


def program(directory: Path, name: str, text: str) -> None:
    path = write(directory / name, f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def test_submit_checks_writes_and_hands_over(
    tiny_config: Path, tmp_path: Path, fake_bin: Path
) -> None:
    program(fake_bin, "sbatch", f'printf "%s\\n" "$@" > {tmp_path}/given; echo "4711;cluster"')
    setup, run_dir = write(tmp_path / "setup.sh", "true\n"), tmp_path / "run"
    result = bert_cpt(
        "submit", tiny_config, f"run.output_dir={run_dir}", "train.steps=7", "--nodes", 2,
        "--gpus-per-node", "a100:2", "--time=1:00:00", "--partition=gpu", "--comment=a b",
        "--module", "cuda/12", "--setup", setup, "--container", "apptainer exec x.sif",
        "--srun=--cpu-bind=cores",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "job 4711: 4 rank(s) on 2 node(s)" in result.stdout
    given = (tmp_path / "given").read_text().splitlines()
    script = given.index(str(SCRIPT))
    assert given[:script] == [
        "--parsable", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=a100:2",
        f"--output={run_dir}/slurm-%j.log", "--time=1:00:00", "--partition=gpu", "--comment=a b",
    ]  # fmt: skip
    assert given[script + 1 :] == [
        "--module", "cuda/12", "--setup", str(setup), "--container", "apptainer exec x.sif",
        "--srun", "--cpu-bind=cores", str(run_dir / "submitted.toml"),
    ]  # fmt: skip
    assert load_config(run_dir / "submitted.toml").train.steps == 7


def test_submit_dry_run_shows_everything_asks_sbatch_and_writes_nothing(
    tiny_config: Path, tmp_path: Path, fake_bin: Path
) -> None:
    program(fake_bin, "sbatch", '[[ $1 == --test-only ]] && echo "would start tomorrow" >&2')
    run_dir = tmp_path / "run"
    result = bert_cpt("submit", tiny_config, f"run.output_dir={run_dir}", "--nodes", 2, "--dry-run")
    assert result.exit_code == 0, result.output
    for part in ("recommended   ZeRO", f'"{run_dir}"', "--signal=B:USR1", "would start tomorrow"):
        assert part in result.stdout
    command = next(line for line in result.stdout.splitlines() if line.startswith("sbatch "))
    assert f"--python {sys.executable} {run_dir}/submitted.toml" in command
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpus-per-node", "many"], "expected a number, or TYPE:NUMBER"),
        (["--gpus-per-node", "2", "--tasks-per-node", "3"], "one task a GPU"),
        (["--setup", "/none"], "no such file"),
        (["--container", "apptainer exec 'a b'"], "quotes have no meaning"),
        (["--partition", "gpu"], "'gpu': expected section.key=value, or --option=value"),
        (["--nodes", "3"], "train_batch_size=16"),
        (["--gpu-memory-gib", "1"], "needs about"),
        (["train.stepz=1"], "did you mean 'train.steps'"),
    ],
)
def test_submit_refuses_on_the_login_node(
    tiny_config: Path, fake_bin: Path, arguments: list[str], expected: str
) -> None:
    program(fake_bin, "sbatch", "echo should not be called >&2; exit 3")
    result = bert_cpt("submit", tiny_config, *arguments)
    assert result.exit_code == 2, result.output
    assert expected in result.stderr
    assert "should not be called" not in result.stderr


def test_what_sbatch_says_is_passed_on(tiny_config: Path, tmp_path: Path, fake_bin: Path) -> None:
    program(fake_bin, "sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    result = bert_cpt("submit", tiny_config, f"run.output_dir={tmp_path / 'run'}")
    assert result.exit_code == 2
    assert "error: sbatch refused: sbatch: error: invalid partition" in result.stderr


def run_script(
    script: Path, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    names = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": "0"}
    return subprocess.run(
        ["bash", str(script), *arguments],
        env=dict(os.environ) | names | environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_batch_script_starts_what_it_is_told_to(tmp_path: Path, fake_bin: Path) -> None:
    program(fake_bin, "srun", 'printf "%s\\n" "$@" "FROM_SETUP=$FROM_SETUP"')
    setup = write(tmp_path / "setup.sh", "export FROM_SETUP=yes; module() { echo module $*; }\n")
    words = ("--setup", str(setup), "--module", "cuda/12", "--container", "apptainer exec x.sif",
             "--srun", "--cpu-bind=cores", "--python", "python3.12")  # fmt: skip
    result = run_script(SCRIPT, *words, "config.toml", "train.steps=5")
    assert result.returncode == 0, result.stderr
    assert "module load cuda/12" in result.stdout
    lines = result.stdout.splitlines()
    start = lines.index("--cpu-bind=cores")
    assert lines[start + 1 : start + 4] == ["apptainer", "exec", "x.sif"]
    assert lines[-8:] == [
        "sh", "python3.12", "-m", "bert_cpt.train", "--config", "config.toml", "train.steps=5",
        "FROM_SETUP=yes",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("code", "state", "expected", "is_requeued"),
    [
        (85, "RUNNING", 0, True),
        (85, "COMPLETING", 85, False),
        (1, "RUNNING", 1, False),
        (2, "RUNNING", 2, False),
        (0, "RUNNING", 0, False),
    ],
)
def test_only_a_run_that_saved_and_was_not_cancelled_goes_back_into_the_queue(
    tmp_path: Path, fake_bin: Path, code: int, state: str, expected: int, is_requeued: bool
) -> None:
    program(fake_bin, "srun", f"exit {code}")
    program(fake_bin, "squeue", f"echo {state}")
    program(fake_bin, "scontrol", f"echo $* > {tmp_path}/requeued")
    assert run_script(SCRIPT, "config.toml").returncode == expected
    assert (tmp_path / "requeued").exists() == is_requeued
    if is_requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 5\n"


@pytest.mark.parametrize(
    ("code", "restarts", "expected", "is_requeued"),
    [(137, 0, 0, True), (1, 2, 0, True), (1, 3, 1, False), (2, 0, 2, False), (0, 0, 0, False)],
)
def test_a_failed_array_task_is_tried_three_times_more_but_not_with_bad_input(
    tmp_path: Path, fake_bin: Path, code: int, restarts: int, expected: int, is_requeued: bool
) -> None:
    program(fake_bin, "bert-cpt", f"exit {code}")
    program(fake_bin, "scontrol", f"echo $* > {tmp_path}/requeued")
    script = SCRIPT.with_name("shard.sbatch")
    result = run_script(script, "in", "--output", "out", SLURM_RESTART_COUNT=str(restarts))
    assert result.returncode == expected
    assert (tmp_path / "requeued").exists() == is_requeued


def test_the_end_of_a_slurm_job_is_known_to_its_first_task(
    fake_bin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    end = datetime.now() + timedelta(seconds=3600)
    try:
        monkeypatch.setenv("SLURM_JOB_ID", "5")
        for answer, expected in [(end.isoformat("T", "seconds"), 3600), ("N/A", math.inf)]:
            program(fake_bin, "squeue", f'[[ "$*" == "-h -j 5 -o %e" ]] && echo {answer}')
            left = StopSignal(None).deadline - time.monotonic()
            assert left == pytest.approx(expected, abs=10)
        monkeypatch.setenv("SLURM_PROCID", "1")
        program(fake_bin, "squeue", "echo asked >&2; exit 1")
        assert StopSignal(100).deadline - time.monotonic() == pytest.approx(100, abs=10)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# --- one machine ----------------------------------------------------------------------------------


def ranks_that(behave: str, num_ranks: int = 2) -> int:
    code = f"import os, signal, sys, time; rank = int(os.environ['RANK']); {behave}"
    return run_ranks([sys.executable, "-c", code], num_ranks, grace_seconds=1)


@pytest.mark.parametrize(
    ("behave", "expected"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(85)", 85),
        ("sys.exit(85 if rank else 0)", 1),
        ("sys.exit(2 if rank else 1)", 2),
        ("rank and os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)", 1),
        ("rank and sys.exit(1); time.sleep(60)", 1),
        ("sys.exit(0 if os.environ['WORLD_SIZE'] == '2' else 1)", 0),
    ],
)
def test_the_exit_code_of_ranks_on_one_machine(behave: str, expected: int) -> None:
    assert ranks_that(behave) == expected
