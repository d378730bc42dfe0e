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
        sbatch, srun: options passed on as they are.
        modules, setup, container, python: what the nodes need to start Python.
    """

    nodes: int = 1
    gpus_per_node: str = "1"
    tasks_per_node: int = 0
    sbatch: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)
    setup: Path | None = None
    container: str | None = None
    srun: list[str] = field(default_factory=list)
    python: str | None = None

    def ranks_per_node(self) -> int:
        """Raises UserError for what sbatch or the script could not use."""
        match = re.fullmatch(r"(?:[\w.-]+:)?(\d+)", self.gpus_per_node)
        if not match:
            raise UserError(
                f"--gpus-per-node {self.gpus_per_node}: expected a number, or TYPE:NUMBER"
            )
        gpus = int(match[1])
        ranks = self.tasks_per_node or max(1, gpus)
        if gpus and ranks != gpus:
            raise UserError(f"--tasks-per-node {ranks} with {gpus} GPUs a node: one task a GPU")
        if self.setup is not None and not self.setup.is_file():
            raise UserError(f"--setup {self.setup}: no such file; expected a script to source")
        if self.container and re.search(r"['\"\\]", self.container):
            raise UserError(
                f"--container {self.container}: is split at blanks, quotes have no meaning there"
            )
        return ranks

    def sbatch_command(self, config: Path, log: Path) -> list[str]:
        """The command line of sbatch."""
        gpus = [f"--gpus-per-node={self.gpus_per_node}"] * (self.gpus_per_node != "0")
        python = self.python or (None if self.container else sys.executable)
        script = [
            *(("--module", name) for name in self.modules),
            ("--setup", self.setup and str(self.setup.absolute())),
            ("--container", self.container),
            *(("--srun", option) for option in self.srun),
            ("--python", python),
        ]
        return [
            "sbatch", "--parsable", f"--nodes={self.nodes}",
            f"--ntasks-per-node={self.ranks_per_node()}", *gpus, f"--output={log}", *self.sbatch,
            str(SCRIPT), *(word for key, value in script if value for word in (key, value)),
            str(config),
        ]  # fmt: skip


def submit(config: Config, job: Job, *, gpu_memory_gib: float | None, dry_run: bool) -> None:
    """Check the run for this job and submit it, or show what would be submitted.

    The job reads a copy of the resolved configuration in the run directory, so that an edit while
    it waits, or between two of its starts, changes nothing.

    Raises:
        UserError: anything that the job would stumble over.
    """
    num_ranks = job.nodes * job.ranks_per_node()
    plan = Plan(config, num_gpus=num_ranks, gpu_memory_gib=gpu_memory_gib)
    plan.check_fits()
    run_dir = config.run.output_dir
    resolved = run_dir / "submitted.toml"
    # Slurm's names for name and number of the job; a % of the path's own must be doubled.
    log = Path(str(run_dir.absolute()).replace("%", "%%")) / "slurm-%j.log"
    command = job.sbatch_command(resolved, log)
    has_slurm = shutil.which("sbatch") is not None
    if dry_run:
        print(plan.as_text(), f"# {resolved}\n{config.as_toml()}", sep="\n\n")
        print(f"# {SCRIPT}\n{SCRIPT.read_text()}\n{shlex.join(command)}")
        if has_slurm:  # which says what it thinks of its own options
            print(_sbatch([*command[:1], "--test-only", *command[1:]]).stderr.strip())
        return
    if not has_slurm:
        raise UserError("no sbatch on this machine; submit from a login node, or use --dry-run")
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(resolved, config.as_toml())
    number = _sbatch(command).stdout.strip().partition(";")[0]
    print(f"job {number}: {num_ranks} rank(s) on {job.nodes} node(s)")
    print(f"watch   squeue --job {number}; tail -F {run_dir}/train.log")
    print(f"stop    scancel {number} (saves first; submit again to go on)")


def _sbatch(command: list[str]) -> subprocess.CompletedProcess[str]:
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise UserError(f"sbatch refused: {answer.stderr.strip()}")
    return answer
