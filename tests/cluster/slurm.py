"""A real Slurm on this machine: a controller and two nodes on loopback, without systemd."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.namespaces import init_of, start_namespace

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
PACKAGES = ("slurm-wlm", "munge")
NODES = ("n1", "n2")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/controller
SlurmctldPidFile={root}/controller/pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdSpoolDir={root}/%n
SlurmdPidFile={root}/%n/pid
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
KillWait=20
MinJobAge=3600
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,requeue_delay=1
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs=4 \
RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"after {seconds} s still waiting for: {what}"
        time.sleep(0.2)


class Slurm:
    """Two nodes n1 and n2 with four CPUs each.

    They live in a process namespace of their own, which ends, with everything in it, at `stop` or
    when this process dies in whatever way.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = dict(os.environ) | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_CONF": str(root / "slurm.conf"),
            "MASTER_ADDR": "127.0.0.1",  # the names of the nodes mean nothing to a resolver
            "GLOO_SOCKET_IFNAME": "lo",
        }
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
            self.environment.pop(name, None)

    def start(self) -> None:
        for name in ("munge", "controller", *NODES):
            (self.root / name).mkdir(parents=True)
        (self.root / "munge").chmod(0o711)
        key = self.root / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        first = 17_000 + os.getpid() % 1000 * 3
        (self.root / "slurm.conf").write_text(
            CONFIG.format(
                root=self.root, host=socket.gethostname().split(".")[0],
                port=first + 2, first=first, second=first + 1,
            )
        )  # fmt: skip
        self.namespace = start_namespace("--mount-proc", "bash", "-c", "sleep infinity & wait")
        munge = self.root / "munge"
        self.start_daemon(
            "munged", "--force", f"--key-file={key}", f"--socket={munge}/socket",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        self.start_daemon("slurmctld", "-c")
        self.start_nodes(*NODES)

    def start_daemon(self, *command: str) -> None:
        self.run("nsenter", "-t", str(init_of(self.namespace)), "-p", "-m", *command)

    def start_nodes(self, *nodes: str) -> None:
        for node in nodes:
            self.start_daemon("slurmd", "-N", node, "-b")
        wait_until(lambda: self.run("sinfo", "-h", "-o", "%D %t") == "2 idle", 60, "idle nodes")

    def stop(self) -> None:
        self.namespace.kill()
        self.namespace.wait()

    def processes(self) -> list[dict[str, Any]]:
        """Number, parent, command line and environment of everything on the two nodes."""
        found = []
        for process in psutil.Process(self.namespace.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                found.append(process.as_dict(["pid", "ppid", "name", "cmdline", "environ"]))
        return found

    def kill_node(self, node: str) -> None:
        """What a power cut does: daemon, step daemons and tasks are gone at once."""
        everything = self.processes()
        tasks = [p for p in everything if (p["environ"] or {}).get("SLURMD_NODENAME") == node]
        parents = {p["ppid"] for p in tasks}
        daemons = [p for p in everything if p["name"] == "slurmstepd" and p["pid"] in parents]
        daemons += [p for p in everything if (p["cmdline"] or [])[:3] == ["slurmd", "-N", node]]
        for process in (*daemons, *tasks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process["pid"], signal.SIGKILL)

    def run(
        self, *command: str | Path, is_checked: bool = True, extra: Mapping[str, str] | None = None
    ) -> str:
        """Standard output of a command; the test fails if it does."""
        answer = subprocess.run(
            [str(word) for word in command],
            env=self.environment | dict(extra or {}), capture_output=True, text=True, check=False,
            timeout=120,
        )  # fmt: skip
        assert answer.returncode == 0 or not is_checked, f"{command}: {answer.stderr}"
        return answer.stdout.strip()

    def job(self, number: str, field: str) -> str:
        """A field of `scontrol show job`."""
        text = self.run("scontrol", "show", "job", number)
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)[field]

    def wait_for(self, number: str, *states: str, seconds: float = 180) -> str:
        """Wait for a job to be in one of `states`; returns which."""
        wait_until(
            lambda: self.job(number, "JobState") in states,
            seconds,
            f"job {number} to be {' or '.join(states)}",
        )
        return self.job(number, "JobState")

    def hurry(self, number: str, *, seconds: int = 0) -> None:
        """A job that was put back may start in so many seconds, not after two minutes."""
        wait_until(
            lambda: self.job(number, "JobState") == "PENDING", 60, f"{number} to be put back"
        )
        self.run("scontrol", "update", f"jobid={number}", f"StartTime=now+{seconds}")


def missing_programs() -> list[str]:
    return [program for program in PROGRAMS if not shutil.which(program)]
