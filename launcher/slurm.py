"""`bert-cpt submit`: check everything on the login node, then hand train.sbatch to sbatch.

Nothing here goes through a shell: what the user gives becomes one argument each, of sbatch or of
the script.
"""

import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from bert_cpt.config import Config
from data_tools.errors import UserError
from data_tools.files import write_text
from launcher.plan import Plan

SCRIPT = Path(__file__).with_name("train.sbatch")


@dataclass(frozen=True)
class Job:
    """What to ask of Slurm.

    Attributes:
        gpus_per_node: "8", or with a type "a100:8"; "0" for ranks on CPUs.
        tasks_per_node: ranks on a node; 0: one a GPU, or one.
        signal_seconds: how long before the time limit the run is asked to save.
        modules, setup, container: what the nodes need before Python starts.
        sbatch, srun: options passed on as they are.
    """

    nodes: int
    gpus_per_node: str = "1"
    tasks_per_node: int = 0
    cpus_per_task: int = 0
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    name: str | None = None
    signal_seconds: int = 180
    modules: list[str] = field(default_factory=list)
    setup: Path | None = None
    container: str | None = None
    python: str | None = None
    sbatch: list[str] = field(default_factory=list)
    srun: list[str] = field(default_factory=list)

    @property
    def num_gpus_per_node(self) -> int:
        """Raises UserError if `gpus_per_node` is neither a number nor TYPE:NUMBER."""
        match = re.fullmatch(r"(?:[\w.-]+:)?(\d+)", self.gpus_per_node)
        if not match:
            raise UserError(
                f"--gpus-per-node {self.gpus_per_node}: expected a number, or TYPE:NUMBER"
            )
        return int(match[1])

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.num_gpus_per_node)

    def check(self) -> None:
        """Raise UserError for what sbatch or the script could not use."""
        gpus = self.num_gpus_per_node
        if gpus and self.ranks_per_node != gpus:
            raise UserError(
                f"--tasks-per-node {self.ranks_per_node} with {gpus} GPUs a node: one task a GPU"
            )
        if self.setup is not None and not self.setup.is_file():
            raise UserError(f"--setup {self.setup}: no such file; expected a script to source")
        if self.container and re.search(r"['\"\\]", self.container):
            raise UserError(
                f"--container {self.container}: is split at blanks, quotes have no meaning there"
            )
        for name in ("sbatch", "srun"):
            for option in getattr(self, name):
                if not option.startswith("-"):
                    raise UserError(f"--{name} {option}: expected an option, as in --{name}=--x=y")

    def sbatch_command(self, config: Path, log: Path) -> list[str]:
        """The command line of sbatch."""
        gpus = self.gpus_per_node if self.num_gpus_per_node else None
        options = {
            "job-name": self.name,
            "nodes": self.nodes,
            "ntasks-per-node": self.ranks_per_node,
            "gpus-per-node": gpus,
            "cpus-per-task": self.cpus_per_task or None,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "signal": f"B:USR1@{self.signal_seconds}",
            "output": log,
        }
        given = [f"--{key}={value}" for key, value in options.items() if value is not None]
        return ["sbatch", "--parsable", *given, *self.sbatch, str(SCRIPT), *self._script(config)]

    def _script(self, config: Path) -> list[str]:
        python = self.python or (None if self.container else sys.executable)
        pairs = [
            *(("--module", name) for name in self.modules),
            ("--setup", self.setup and str(self.setup.absolute())),
            ("--container", self.container),
            *(("--srun", option) for option in self.srun),
            ("--python", python),
        ]
        return [word for key, value in pairs if value for word in (key, value)] + [str(config)]


def submit(config: Config, job: Job, *, gpu_memory_gib: float | None, dry_run: bool) -> int:
    """Check the run for this job and submit it, or show what would be submitted.

    The job reads a copy of the resolved configuration in the run directory, so that an edit while
    it waits, or between two of its starts, changes nothing.

    Raises:
        UserError: anything that the job would stumble over.
    """
    job.check()
    num_ranks = job.nodes * job.ranks_per_node
    plan = Plan(config, num_gpus=num_ranks, gpu_memory_gib=gpu_memory_gib)
    plan.check_fits()
    run_dir = config.run.output_dir
    resolved = run_dir / "submitted.toml"
    # Slurm's names for name and number of the job; a % of the path's own must be doubled.
    log = Path(str(run_dir.absolute()).replace("%", "%%")) / "slurm-%j.log"
    command = job.sbatch_command(resolved, log)
    if dry_run:
        print(plan.as_text(), f"\n# {resolved}\n{config.as_toml()}", sep="\n")
        print(f"# {SCRIPT}\n{SCRIPT.read_text()}\n{shlex.join(command)}")
        return 0
    if not shutil.which("sbatch"):
        raise UserError("no sbatch on this machine; submit from a login node, or use --dry-run")
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(resolved, config.as_toml())
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise UserError(f"sbatch refused: {answer.stderr.strip()}")
    number = answer.stdout.strip().partition(";")[0]
    print(f"job {number}: {num_ranks} rank(s) on {job.nodes} node(s)")
    print(f"watch   squeue --job {number}; tail -F {run_dir}/train.log")
    print(f"stop    scancel {number} (saves first; submit again to go on)")
    return 0
