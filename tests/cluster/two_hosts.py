"""Two hosts on this machine: namespaces for network, names, mounts and processes, an sshd each."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import psutil

from tests.cluster.namespaces import init_of, start_namespace
from tests.cluster.slurm import wait_until

PROGRAMS = ("/usr/sbin/sshd", "pdsh", "ip", "unshare", "nsenter")
PACKAGES = ("openssh-server", "openssh-client", "pdsh", "iproute2")
ADDRESSES = {"node1": "10.77.0.1", "node2": "10.77.0.2"}

BOOT = """
set -e
mount -t proc proc /proc
hostname {name}
mount --bind {root}/hosts /etc/hosts
mkdir -p ~/.ssh
mount --bind {root}/{name} ~/.ssh
ip link set lo up
until ip link show eth0 > /dev/null 2>&1; do sleep .05; done
ip addr add {address}/24 dev eth0
ip link set eth0 up
/usr/sbin/sshd -f {root}/sshd_config -E {root}/{name}.sshd.log
touch {root}/{name}.up
exec sleep infinity
"""
SSH_CONFIG = """
Host *
  IdentityFile {root}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
SSHD_CONFIG = """
HostKey {root}/host_key
AuthorizedKeysFile {root}/key.pub
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
"""


class TwoHosts:
    """node1 and node2 on one Ethernet, with this machine's files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.hosts: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        root = self.root
        root.mkdir(parents=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        for name in ("key", "host_key"):
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", root / name)
        lines = ["127.0.0.1 localhost", *(f"{ip} {name}" for name, ip in ADDRESSES.items())]
        (root / "hosts").write_text("\n".join(lines) + "\n")
        (root / "hostfile").write_text("node1 slots=1\n\n# a comment\nnode2 slots=1\n")
        (root / "sshd_config").write_text(SSHD_CONFIG.format(root=root))
        for name, address in ADDRESSES.items():
            (root / name).mkdir()
            (root / name / "config").write_text(SSH_CONFIG.format(root=root))
            boot = BOOT.format(root=root, name=name, address=address)
            self.hosts[name] = start_namespace(
                "--net", "--uts", "--mount", "--propagation", "private", "bash", "-c", boot
            )
        ends = {name: f"t{os.getpid() % 100_000}{name[-1]}" for name in ADDRESSES}
        first, second = ends.values()
        _run("ip", "link", "add", first, "type", "veth", "peer", "name", second)
        for name, end in ends.items():
            _run("ip", "link", "set", end, "netns", str(init_of(self.hosts[name])), "name", "eth0")
        wait_until(
            lambda: all((root / f"{name}.up").exists() for name in ADDRESSES), 30, "the hosts"
        )

    def enter(self, name: str, *options: str) -> list[str]:
        """The words before a command that is to run on a host."""
        return ["nsenter", "-t", str(init_of(self.hosts[name])), "-n", "-u", "-m", "-p", *options]

    def popen(
        self, name: str, *command: str | Path, directory: Path, extra: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        """Start a command on a host, as somebody logged in there would."""
        environment = dict(os.environ) | dict(extra)
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(variable, None)
        words = [*self.enter(name, f"--wd={directory}"), *(str(word) for word in command)]
        return subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def replace_file(self, name: str, path: Path, other: Path) -> None:
        """On this host, what stands under `path` is from now on `other`."""
        _run(*self.enter(name), "mount", "--bind", other, path)

    def ranks_on(self, name: str) -> list[psutil.Process]:
        """Training processes that live on a host."""
        return [
            process
            for process in psutil.Process(self.hosts[name].pid).children(recursive=True)
            if "bert_cpt.train" in (words := process.cmdline()) and "--config" in words
            and "-m" in words and "deepspeed.launcher.launch" not in words
        ]  # fmt: skip

    def cut_power(self, name: str) -> None:
        """No packet leaves the host any more, then everything in it is gone."""
        _run(*self.enter(name), "ip", "link", "set", "eth0", "down")
        self.hosts.pop(name).kill()

    def stop(self) -> None:
        for host in self.hosts.values():
            host.kill()
            host.wait()


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if not shutil.which(program)]


def _run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
