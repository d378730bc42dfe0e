"""Real clusters on this machine: started for the tests, stopped after them, whatever happens."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import slurm as slurm_module
from tests.cluster import two_hosts as hosts_module
from tests.cluster.slurm import Slurm
from tests.cluster.two_hosts import TwoHosts


def require(programs: list[str], packages: tuple[str, ...]) -> None:
    """Install what is missing, or skip with the reason."""
    if os.geteuid() != 0:
        pytest.skip("starts daemons and namespaces, which only root may")
    if not programs:
        return
    if not shutil.which("apt-get"):
        pytest.skip(f"{', '.join(programs)} missing, and no apt-get to install {packages}")
    environment = dict(os.environ) | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-qq"], ["install", "-qq", "--no-install-recommends", *packages]):
        answer = subprocess.run(
            ["apt-get", "-y", *command], env=environment, capture_output=True, text=True,
            check=False, timeout=600,
        )  # fmt: skip
    if answer.returncode:
        pytest.skip(f"{packages} cannot be installed: {answer.stderr.strip().splitlines()[-1:]}")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A Slurm of two nodes, both idle."""
    require(slurm_module.missing_programs(), slurm_module.PACKAGES)
    cluster = Slurm(tmp_path_factory.mktemp("slurm") / "s")
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[TwoHosts]:
    """node1 and node2, which reach each other by ssh."""
    require(hosts_module.missing_programs(), hosts_module.PACKAGES)
    if subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], check=False
    ).returncode:
        pytest.skip("this machine lets nobody make namespaces")
    hosts = TwoHosts(tmp_path / "hosts")
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.stop()


@pytest.fixture(scope="session")
def endless_config(tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny configuration with a learning rate that does not depend on the number of steps."""
    path = tmp_path_factory.mktemp("endless") / "config.toml"
    text = tiny_config.read_text().replace("steps = 10", "steps = 100000")
    text = text.replace("interval = 5", "interval = 20")
    path.write_text(text + '\n[schedule]\ndecay = "constant"\n')
    return path
