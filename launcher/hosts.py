"""Start a run on the hosts of a hostfile: DeepSpeed's launcher, pdsh and ssh, without their traps.

- That launcher splices environment values and arguments into a shell line for every host. Here the
  ranks get one argument, the path of the resolved configuration; what is forwarded holds no
  character that a shell or pdsh would interpret, and nothing that looks like a key.
- On SIGINT and SIGTERM it kills every DeepSpeed launcher of the user on all hosts, also those of
  other jobs. Here a signal asks the ranks to save and stop, through a file in the run directory.
- It may exit with 0 when a rank died. Here the run directory says how the run ended.
"""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

from bert_cpt.config import Config
from bert_cpt.rundir import LAUNCH_ID, read_outcome
from data_tools.errors import UserError
from data_tools.files import write_text
from launcher.local import signals_to

FORWARDED = re.compile(
    r"(NCCL|GLOO|TORCH|PYTORCH|OMP|MKL|HF|TRANSFORMERS|TOKENIZERS|WANDB|TRITON|NUMBA|BERT_CPT|FI)_"
    r"|(LD_LIBRARY_PATH|DS_ACCELERATOR|XDG_CACHE_HOME|CUDA_HOME|(HTTPS?|NO|https?|no)_PROXY)$"
)
ADDED_BY_DEEPSPEED = re.compile(r"MLFLOW|PYTHON|MV2|UCX|NCCL")
SECRET = re.compile(r"(?i)(^|_)(api_?key|key|token|secret|passw(or)?d|credentials?|auth)(_|$)")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
SAFE_VALUE = re.compile(r"[^$`\\\"%\x00-\x1f]*")  # between double quotes, and to pdsh
SAFE_PATH = re.compile(r"[\w@+=:,./-]+")
# A host that is switched off is noticed within a minute; ssh by itself would wait for ever.
SSH_OPTIONS = (
    "-oBatchMode=yes", "-oConnectTimeout=15", "-oServerAliveInterval=15", "-oServerAliveCountMax=3",
)  # fmt: skip
OUTCOME_SECONDS = 5  # for a network file system to show the file


def read_hostfile(path: Path) -> dict[str, int]:
    """Hosts and their numbers of ranks; raises UserError naming the bad line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path}: {error}") from error
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        match = re.fullmatch(r"([A-Za-z0-9][\w.-]*)\s+slots=([1-9]\d{0,3})", text)
        if match and match[1] not in hosts:
            hosts[match[1]] = int(match[2])
        elif text:
            reason = "stands there twice" if match else "expected NAME slots=N"
            raise UserError(f"--hostfile {path}, line {number}: {text!r}: {reason}")
    if not hosts:
        raise UserError(f"--hostfile {path}: names no host; expected lines such as node1 slots=8")
    return hosts


def check_hosts(hosts: Iterable[str], config: Path) -> None:
    """Raise UserError unless every host answers to ssh, has this Python and sees `config`."""
    command = f"cd {os.getcwd()} && {sys.executable} -c '' && cat {config}"  # all SAFE_PATHs

    def problem_of(host: str) -> str:
        answer = subprocess.run(
            ["ssh", *SSH_OPTIONS, host, command],
            capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return f"{host}: {answer.stderr.strip()}" if answer.returncode else ""

    with ThreadPoolExecutor(32) as pool:
        problems = list(filter(None, pool.map(problem_of, hosts)))
    if problems:
        raise UserError(
            f"{'; '.join(problems)}. Every host must accept ssh without a password, and see the "
            f"working directory, {sys.executable} and the run directory under the same paths"
        )


def forwarded(
    environment: Mapping[str, str], extra: Iterable[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """What the ranks get of this environment, and the names that were left out with the reason."""
    result, left_out = {}, []
    wanted = set(extra)
    for name, value in sorted(environment.items()):
        if not (name in wanted or FORWARDED.match(name) or ADDED_BY_DEEPSPEED.match(name)):
            continue
        if SECRET.search(name) or re.search(r"//[^/@]+@", value):
            left_out.append(f"{name} (looks like a secret; arguments are visible to all users)")
        elif not NAME.fullmatch(name) or not SAFE_VALUE.fullmatch(value):
            left_out.append(f"{name} (a character that a shell would interpret)")
        else:
            result[name] = value
    return result, left_out


def read_deepspeed_env(directories: Iterable[Path]) -> dict[str, str]:
    """The user's own .deepspeed_env files; blank lines and comments do no harm here."""
    result = {}
    for path in (directory / ".deepspeed_env" for directory in directories):
        for line in path.read_text().splitlines() if path.is_file() else []:
            name, separator, value = line.strip().partition("=")
            if separator and not name.startswith("#"):
                result[name.strip()] = value.strip()
    return result


def run_on_hosts(config: Config, hostfile: Path, master_addr: str | None = None) -> int:
    """Train on the hosts of a hostfile; returns the exit code of the run.

    Args:
        master_addr: address of the first host for the others; None: what it calls its first one.

    Raises:
        UserError: a bad hostfile, a host that cannot be used, pdsh missing.
    """
    hosts = read_hostfile(hostfile)
    config.check_world_size(sum(hosts.values()))
    run_dir = config.run.output_dir.absolute()
    resolved = run_dir / "launch.toml"
    for path in (resolved, Path.cwd(), Path(sys.executable)):
        if not SAFE_PATH.fullmatch(str(path)):
            raise UserError(f"{path}: DeepSpeed's launcher cannot carry this path; rename it")
    if not shutil.which("pdsh"):
        raise UserError("--hostfile needs pdsh on this machine (the package is called pdsh)")
    run_dir.mkdir(parents=True, exist_ok=True)
    write_text(resolved, config.as_toml())
    check_hosts(hosts, resolved)
    launch = secrets.token_hex(8)
    own = read_deepspeed_env([Path.home(), Path.cwd()])
    values, left_out = forwarded({**own, **os.environ, LAUNCH_ID: launch}, own)
    for name in left_out:
        print(f"not forwarded: {name}", file=sys.stderr)
    with tempfile.NamedTemporaryFile("w", prefix="deepspeed_env_") as file:  # mode 0600
        file.write("".join(f"{name}={value}\n" for name, value in values.items()))
        file.flush()
        ssh = [os.environ.get("PDSH_SSH_ARGS_APPEND", ""), *SSH_OPTIONS]
        environment = {
            name: value
            for name, value in os.environ.items()
            if name in values or not ADDED_BY_DEEPSPEED.match(name)
        } | {"DS_ENV_FILE": file.name, "PDSH_SSH_ARGS_APPEND": " ".join(ssh).strip()}
        code = _run(launcher_command(hostfile, resolved, master_addr), environment, run_dir)
    return _judge(run_dir, launch, code)


def launcher_command(hostfile: Path, config: Path, master_addr: str | None) -> list[str]:
    """The command line of DeepSpeed's launcher."""
    port = 20_000 + secrets.randbelow(12_000)  # another job may run on the first host
    address = ["--master_addr", master_addr] if master_addr else []
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile.absolute()),
        "--force_multi", "--no_ssh_check", "--log_level", "warning", "--master_port", str(port),
        *address, "--module", "bert_cpt.train", "--config", str(config),
    ]  # fmt: skip


def _run(command: list[str], environment: Mapping[str, str], run_dir: Path) -> int:
    """Wait for the launcher; a signal stops the run, a second one the waiting."""
    # In a session of its own: a Ctrl-C must not reach it.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    stop_file = run_dir / "stop"

    def stop(number: int, frame: FrameType | None) -> None:
        if stop_file.exists():
            os.killpg(process.pid, signal.SIGKILL)
        stop_file.touch()
        print("the ranks save and stop; once more to wait no longer", file=sys.stderr)

    with signals_to(stop):
        return process.wait()


def _judge(run_dir: Path, launch: str, code: int) -> int:
    """The exit code that the first rank left; without one the run failed."""
    deadline = time.monotonic() + OUTCOME_SECONDS
    while (outcome := read_outcome(run_dir, launch)) is None and time.monotonic() < deadline:
        time.sleep(0.2)
    if outcome is not None:
        return outcome
    print(
        f"the run ended without a word (the launcher's exit code is {code}): a host or a rank may "
        f"be gone; see {run_dir}/train.log and {run_dir}/logs. The same command goes on from the "
        f"newest checkpoint",
        file=sys.stderr,
    )
    return 1
