"""DeepSpeed's launcher over pdsh and ssh, on two hosts."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from bert_cpt.config import load_config
from tests.cluster.slurm import wait_until
from tests.cluster.two_hosts import TwoHosts

pytestmark = pytest.mark.cluster

# A switched-off host is noticed in seconds, not after the minute that is good for real networks.
IMPATIENT = {"PDSH_SSH_ARGS_APPEND": "-oServerAliveInterval=2 -oServerAliveCountMax=2"}
FORWARDED = "GLOO_SOCKET_IFNAME=eth0\n\n# a comment, and a blank line above\nOF_MINE=some words\n"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where the user stands: a file for DeepSpeed's launcher beside the configuration."""
    (tmp_path / ".deepspeed_env").write_text(FORWARDED)
    return tmp_path


def config_in(endless: Path, directory: Path, *overrides: str) -> Path:
    path = directory / "config.toml"
    overrides = (f"run.output_dir={directory / 'run'}", *overrides)
    path.write_text(load_config(endless, overrides).as_toml())
    return path


def train(hosts: TwoHosts, config: Path) -> subprocess.Popen[str]:
    """`bert-cpt train CONFIG --hostfile HOSTFILE` on node1."""
    return hosts.popen(
        "node1", sys.executable, "-m", "launcher.cli", "train", config,
        "--hostfile", hosts.root / "hostfile", directory=config.parent, extra=IMPATIENT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], seconds: float = 120) -> tuple[int, str]:
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def wait_for_checkpoint(run_dir: Path) -> None:
    wait_until((run_dir / "latest").exists, 120, "a checkpoint")


def test_a_signal_saves_and_the_same_command_goes_on_to_the_end(
    two_hosts: TwoHosts, endless_config: Path, directory: Path
) -> None:
    run_dir, config = directory / "run", config_in(endless_config, directory)
    process = train(two_hosts, config)
    wait_for_checkpoint(run_dir)
    for name in ("node1", "node2"):
        (rank,) = two_hosts.ranks_on(name)
        assert rank.environ()["OF_MINE"] == "some words", "of .deepspeed_env, on every host"
    psutil.Process(process.pid).children()[0].send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 85, output
    (stopped,) = (line for line in output.splitlines() if "stopped at step" in line)
    step = int((run_dir / "latest").read_text().removeprefix("step_"))
    assert f"stopped at step {step} " in stopped

    config_in(endless_config, directory, f"train.steps={step + 5}")
    code, output = finish(train(two_hosts, config))
    assert code == 0, output
    assert f"resumed from {run_dir}/checkpoints/step_{step:08}" in output
    ranks = json.loads((run_dir / "environment.json").read_text())["ranks"]
    assert [rank["host"] for rank in ranks] == ["node1", "node2"]
    assert "resumed from" in (run_dir / "logs" / "rank_0001.log").read_text()
    assert (run_dir / "final" / "model.safetensors").exists()


def test_a_host_that_dies_ends_the_run_and_costs_no_checkpoint(
    two_hosts: TwoHosts, endless_config: Path, directory: Path
) -> None:
    run_dir, config = directory / "run", config_in(endless_config, directory)
    process = train(two_hosts, config)
    wait_for_checkpoint(run_dir)
    two_hosts.cut_power("node2")
    code, output = finish(process)
    assert code == 1, output
    assert "stopped: rank 1 gave no sign of life" in output
    assert not two_hosts.ranks_on("node1")
    newest = run_dir / "checkpoints" / (run_dir / "latest").read_text().strip()
    assert (newest / "model.safetensors").exists()


def test_a_host_that_reads_another_configuration_is_named_by_plain_deepspeed_too(
    two_hosts: TwoHosts, endless_config: Path, directory: Path
) -> None:
    config = config_in(endless_config, directory)
    other = directory / "other.toml"
    other.write_text(load_config(config, ["optimizer.learning_rate=0.002"]).as_toml())
    two_hosts.replace_file("node2", config, other)
    # By hand, .deepspeed_env must hold no blank line.
    (directory / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\n")
    process = two_hosts.popen(
        "node1", Path(sys.executable).with_name("deepspeed"), "--hostfile",
        two_hosts.root / "hostfile", "--module", "bert_cpt.train", "--config", config,
        directory=directory, extra=IMPATIENT,
    )  # fmt: skip
    code, output = finish(process)
    assert code != 0
    expected = "on node2 (rank 1): optimizer.learning_rate is 0.002, on the first rank 0.001"
    assert expected in output
    assert not (directory / "run" / "latest").exists()


def test_a_host_that_cannot_be_used_is_named(
    two_hosts: TwoHosts, endless_config: Path, directory: Path
) -> None:
    config = config_in(endless_config, directory)
    two_hosts.replace_file("node2", Path(sys.executable).resolve(), Path("/dev/null"))
    code, output = finish(train(two_hosts, config))
    assert code == 2
    assert output.startswith("error: node2: ")
    assert "Every host must" in output
