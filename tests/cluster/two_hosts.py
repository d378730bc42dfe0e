"""Two hosts on this machine: namespaces for network, names, mounts and processes, an sshd each."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

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
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

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
            self.processes[name] = subprocess.Popen(
                ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child",
                 "--propagation", "private", "bash", "-c", boot]
            )  # fmt: skip
        ends = {name: f"t{os.getpid() % 100_000}{name[-1]}" for name in ADDRESSES}
        first, second = ends.values()
        _run("ip", "link", "add", first, "type", "veth", "peer", "name", second)
        for name, end in ends.items():
            _run("ip", "link", "set", end, "netns", str(self.init_of(name)), "name", "eth0")
        deadline = time.monotonic() + 30
        while not all((root / f"{name}.up").exists() for name in ADDRESSES):
            assert time.monotonic() < deadline, "the hosts did not come up"
            time.sleep(0.05)

    def init_of(self, name: str) -> int:
        """The process that is number 1 inside."""
        children = Path(
            f"/proc/{self.processes[name].pid}/task/{self.processes[name].pid}/children"
        )
        deadline = time.monotonic() + 10
        while not (numbers := children.read_text().split()):
            assert time.monotonic() < deadline, f"{name} did not start"
            time.sleep(0.02)
        return int(numbers[0])

    def popen(
        self, name: str, *command: str | Path, extra: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command on a host, as somebody logged in there would."""
        environment = dict(os.environ) | {"GLOO_SOCKET_IFNAME": "eth0"} | dict(extra or {})
        for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(variable, None)
        enter = [
            "nsenter",
            "-t",
            str(self.init_of(name)),
            "-n",
            "-u",
            "-m",
            "-p",
            f"--wd={os.getcwd()}",
        ]
        return subprocess.Popen(
            [*enter, *(str(word) for word in command)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def signal(self, name: str, pattern: str, number: signal.Signals) -> None:
        """Send a signal to a process on a host whose command line contains `pattern`."""
        enter = ["nsenter", "-t", str(self.init_of(name)), "-n", "-u", "-m", "-p"]
        _run(*enter, "pkill", f"-{number.value}", "-f", "--oldest", pattern)

    def ranks_on(self, name: str) -> int:
        """Training processes that live on a host."""
        enter = ["nsenter", "-t", str(self.init_of(name)), "-m", "-p"]
        answer = subprocess.run(
            [*enter, "pgrep", "-fc", "bert_cpt.train"], capture_output=True, text=True, check=False
        )
        return int(answer.stdout or 0)

    def cut_power(self, name: str) -> None:
        """No packet leaves the host any more, then everything in it is gone."""
        enter = ["nsenter", "-t", str(self.init_of(name)), "-n"]
        _run(*enter, "ip", "link", "set", "eth0", "down")
        self.processes.pop(name).kill()

    def stop(self) -> None:
        for process in self.processes.values():  # number 1 of a namespace takes all with it
            process.kill()
            process.wait()


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if not shutil.which(program)]


def _run(*command: str | Path) -> None:
    subprocess.run([str(word) for word in command], check=True, capture_output=True)
