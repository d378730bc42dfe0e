"""What the ranks of a run tell each other before the first step.

What must be the same everywhere is compared with the first rank's, so that a node with another
configuration, another corpus or another version of a package is named instead of spoiling the run.
"""

import logging
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bert_cpt.config import Config
from bert_cpt.ds_config import DeepSpeedConfig
from bert_cpt.rundir import package_versions
from bert_cpt.world import World, raise_problems, shortened

logger = logging.getLogger("bert_cpt")

MAX_CLOCK_SECONDS = 10.0
MIN_TEMPORARY_BYTES = 1 << 30
NUM_CHECKPOINT_COPIES = 3  # weights and two moments
MAX_NAMED = 3  # differences of one rank


def compare_ranks(
    world: World, config: Config, ds_config: DeepSpeedConfig, corpora: list[str]
) -> None:
    """Raise UserError, naming hosts and what differs, unless all ranks are to do the same.

    Args:
        corpora: what identifies the training data, as this rank sees it.
    """
    mine = common_ground(config, ds_config, corpora)
    problems = differences(mine, world.broadcast(mine))
    raise_problems(world.gather({"host": socket.gethostname(), "problems": problems}))


def check_health(world: World, config: Config) -> list[dict[str, Any]]:
    """Look at devices, clocks and disks, and time an all-reduce; one log line, and warnings.

    Returns:
        Host, process and device of every rank.

    Raises:
        UserError: two ranks have the same GPU.
    """
    world.barrier()  # left by all ranks at nearly the same time
    clock = time.time()
    ranks = world.gather(
        {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "device": _device_name(world.device),
            "clock": clock,
            "free_temporary_bytes": shutil.disk_usage(tempfile.gettempdir()).free,
        }
    )
    raise_problems(shared_devices(ranks))
    for warning in [*find_warnings(ranks), *(_disk_warnings(config) if world.is_main else [])]:
        logger.warning("%s", warning)
    clocks = [each["clock"] for each in ranks]
    hosts = list(dict.fromkeys(each["host"] for each in ranks))
    logger.info(
        "health: %d rank(s) on %s agree%s; clocks within %.2f s",
        world.world_size, shortened(hosts), measure_all_reduce(world), max(clocks) - min(clocks),
    )  # fmt: skip
    return [{key: each[key] for key in ("host", "pid", "device")} for each in ranks]


def common_ground(
    config: Config, ds_config: DeepSpeedConfig, corpora: list[str]
) -> dict[str, str | None]:
    """Everything that must be the same on all ranks, by name."""
    settings = _flat(config.model_dump(mode="json"), "") | _flat(ds_config.content, "DeepSpeed ")
    versions = {f"version of {name}": value for name, value in package_versions().items()}
    data = {f"content of data.corpora[{n}]": mark for n, mark in enumerate(corpora)}
    weights = Path(config.model.init_checkpoint) / "model.safetensors"
    size = str(weights.stat().st_size) if weights.is_file() else None
    return settings | versions | data | {"bytes of model.init_checkpoint": size}


def _flat(table: dict[str, Any], prefix: str) -> dict[str, str | None]:
    result: dict[str, str | None] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = str(value)
    return result


def differences(mine: dict[str, str | None], first: dict[str, str | None]) -> list[str]:
    """What differs from the first rank, in words."""
    found = [
        f"{key} is {mine.get(key)}, on the first rank {first.get(key)}"
        for key in sorted(mine.keys() | first.keys())
        if mine.get(key) != first.get(key)
    ]
    return [shortened(found, MAX_NAMED)] if found else []


def shared_devices(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The problems of ranks that were given the GPU of another."""
    owners: dict[tuple[str, str], int] = {}
    found = []
    for rank, each in enumerate(ranks):
        owner = owners.setdefault((each["host"], each["device"]), rank)
        is_shared = each["device"] != "cpu" and owner != rank
        problem = f"shares {each['device']} with rank {owner}; start one task a GPU"
        found.append({"host": each["host"], "problems": [problem] if is_shared else []})
    return found


def find_warnings(ranks: list[dict[str, Any]]) -> list[str]:
    """What may go wrong later, in words."""
    warnings = []
    first = ranks[0]["clock"]
    for each in {each["host"]: each for each in ranks}.values():
        if abs(each["clock"] - first) > MAX_CLOCK_SECONDS:
            warnings.append(
                f"the clock of {each['host']} differs by {each['clock'] - first:.0f} s from that "
                f"of {ranks[0]['host']}; times in logs will not match"
            )
        if each["free_temporary_bytes"] < MIN_TEMPORARY_BYTES:
            free = each["free_temporary_bytes"] >> 20
            warnings.append(f"{each['host']}: only {free} MiB free for temporary files")
    return warnings


def _disk_warnings(config: Config) -> list[str]:
    weights = Path(config.model.init_checkpoint) / "model.safetensors"
    if not weights.is_file():
        return []
    free = shutil.disk_usage(config.run.output_dir).free
    kept = config.checkpoint.keep_last + 1  # the oldest goes when the newest is there
    needed = kept * NUM_CHECKPOINT_COPIES * weights.stat().st_size
    if free >= needed:
        return []
    return [
        f"{config.run.output_dir}: {free / 2**30:.1f} GiB free, but {kept} checkpoints take about "
        f"{needed / 2**30:.1f} GiB"
    ]


def measure_all_reduce(world: World) -> str:
    """Time of a small all-reduce and bandwidth of a large one, in words; empty on one rank."""
    if world.world_size == 1:
        return ""
    num_bytes = (64 << 20) if world.device.type == "cuda" else (4 << 20)
    small = min(_all_reduce_seconds(world, 8) for _ in range(5))
    seconds = min(_all_reduce_seconds(world, num_bytes) for _ in range(4))
    # Every byte is sent and received 2 (N - 1) / N times, whatever the algorithm.
    rate = 2 * (world.world_size - 1) / world.world_size * num_bytes / seconds
    return f"; all-reduce {1000 * small:.2f} ms, {rate / 1e9:.2f} GB/s"


def _all_reduce_seconds(world: World, num_bytes: int) -> float:
    tensor = torch.zeros(num_bytes, dtype=torch.uint8, device=world.device)
    world.barrier()
    start = time.perf_counter()
    dist.all_reduce(tensor)
    tensor[:1].tolist()  # waits for the device
    return time.perf_counter() - start


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} {properties.uuid}"
