"""The processes of a run: who they are, and the few words they exchange.

Ranks come from the environment (the deepspeed launcher, torchrun, `bert-cpt train`) or, under srun,
from Slurm's variables. Everything said between ranks is a tensor; nothing is pickled.
"""

import atexit
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from data_tools.errors import UserError

logger = logging.getLogger("bert_cpt")

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
MEETING_SECONDS = 600  # for all ranks to arrive: nodes of a large job start minutes apart


@dataclass(frozen=True)
class World:
    """One process among `world_size`."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum([0.0])

    def sum(self, values: Iterable[float]) -> list[float]:
        """Sums over all ranks, in float64; waits for the device."""
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def on_main(self, function: Callable[[], Any]) -> Any:
        """Call `function` on rank 0 only; every rank gets its result, or raises its error."""
        value, problem = None, ""
        if self.is_main:
            try:
                value = function()
            except (UserError, OSError) as error:
                problem = str(error)
        value, problem = self.broadcast([value, problem])
        if problem:
            raise UserError(problem)
        return value

    def agree(self, function: Callable[[], Any]) -> Any:
        """Call `function` on every rank; each gets its own result, or all raise a UserError.

        The error names the hosts and ranks that have the problem, unless all have the same.
        """
        value, problem = None, ""
        try:
            value = function()
        except (UserError, OSError) as error:
            problem = str(error)
        self.raise_any(problem)
        return value

    def raise_any(self, problem: str) -> None:
        """Raise UserError on all ranks if any has a problem, saying who has which."""
        owners: dict[str, list[str]] = {}
        for rank, (host, each) in enumerate(self.gather([socket.gethostname(), problem])):
            if each:
                owners.setdefault(each, []).append(f"{host} (rank {rank})")
        lines = [
            each if len(names) == self.world_size else f"on {shortened(names)}: {each}"
            for each, names in owners.items()
        ]
        if lines:
            raise UserError("; ".join(lines))

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, which JSON must be able to hold, on every rank."""
        data = json.dumps(value).encode()
        if self.world_size == 1:
            return [json.loads(data)]
        size = torch.tensor(len(data), device=self.device)
        dist.all_reduce(size, dist.ReduceOp.MAX)
        padded = bytearray(data.ljust(int(size)))  # JSON does not mind blanks at the end
        mine = torch.frombuffer(padded, dtype=torch.uint8).to(self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(everyone, mine)
        return [json.loads(bytes(buffer.cpu().tolist())) for buffer in everyone]

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, which JSON must be able to hold, on every rank."""
        return self.gather(value if self.is_main else None)[0]


def shortened(names: list[str], limit: int = 4) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list such as n[03-07,9],m1, without asking scontrol for it."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", re.split(r",(?![^\[]*\])", node_list)[0])


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that torch expects, from those that srun gives every task."""
    # Jobs on one node get ports apart, below those that systems hand out by themselves.
    port = 20_000 + int(environment["SLURM_JOB_ID"]) * 7 % 12_000
    port += int(environment.get("SLURM_STEP_ID", "0")) % 7
    names = {"RANK": "PROCID", "WORLD_SIZE": "NTASKS", "LOCAL_RANK": "LOCALID"}
    return {name: environment[f"SLURM_{value}"] for name, value in names.items()} | {
        "MASTER_ADDR": first_host(environment["SLURM_JOB_NODELIST"]),
        "MASTER_PORT": str(port),
    }


def read_environment() -> list[int]:
    """Rank, world size, local rank, after naming Slurm's variables as torch expects them."""
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        if "SLURM_PROCID" not in os.environ:
            raise UserError(
                "this is a Slurm allocation of several tasks, but not one of them: start with srun"
            )
        names = slurm_ranks(os.environ)
    for name, value in names.items():
        os.environ.setdefault(name, value)
    return [int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]


def choose_device(local_rank: int) -> torch.device:
    """The GPU of this rank, or the CPU; raises UserError if the node has too few GPUs."""
    num_devices = torch.cuda.device_count()
    if num_devices > 1 and local_rank >= num_devices:
        raise UserError(
            f"{socket.gethostname()}: {num_devices} GPUs, but a rank with the local number "
            f"{local_rank}; start one task a GPU"
        )
    # A single GPU belongs to this task, whatever its number, as under srun --gpus-per-task=1.
    index = local_rank if num_devices > 1 else 0
    return torch.device("cuda", index) if num_devices else torch.device("cpu")


def meet(rank: int, world_size: int) -> dist.TCPStore:
    """A key-value store that all ranks have reached.

    Raises:
        ConnectionError: the port is taken, or ranks did not come; the message names them.
    """
    address = os.environ["MASTER_ADDR"] if world_size > 1 else "127.0.0.1"
    port = int(os.environ.get("MASTER_PORT", "29500")) if world_size > 1 else 0  # 0: any free one
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit = timedelta(seconds=MEETING_SECONDS)
    try:
        store = dist.TCPStore(address, port, None, is_server, limit, False)
        store.set(f"here/{rank}", socket.gethostname())
    except (RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"rank {rank} on {socket.gethostname()} cannot {'listen at' if is_server else 'reach'} "
            f"{address}:{port} ({str(error).splitlines()[0]}); set MASTER_ADDR to an address of "
            f"the first host that the others reach, MASTER_PORT to a free port"
        ) from error
    deadline, missing = time.monotonic() + MEETING_SECONDS, list(range(world_size))
    while rank == 0 and (missing := [n for n in missing if not store.check([f"here/{n}"])]):
        if time.monotonic() > deadline:
            raise ConnectionError(
                f"rank {shortened([str(n) for n in missing])} of {world_size} did not come within "
                f"{MEETING_SECONDS} s; see the messages of those that did not start"
            )
        time.sleep(0.1)
    return store


def start_world() -> World:
    """Join the other processes of this run (torch.distributed through DeepSpeed).

    Raises:
        UserError: a node has fewer GPUs than ranks.
        ConnectionError: the ranks did not find each other.
    """
    rank, world_size, local_rank = read_environment()
    device = choose_device(local_rank)
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if device.type == "cpu":
        # Its first use would compile for a minute, and a killed build leaves a lock for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "nccl"
    if not dist.is_initialized():
        dist.init_process_group(
            backend, store=meet(rank, world_size), rank=rank, world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT, device_id=device if device.type == "cuda" else None,
        )  # fmt: skip
        deepspeed.init_distributed(backend, timeout=COLLECTIVE_TIMEOUT, verbose=False)
        # Threads of gloo that outlive the interpreter abort the process, once in a while.
        atexit.register(dist.destroy_process_group)
    return World(rank, world_size, device)
