"""What the ranks of a run tell each other before the first step.

What must be the same everywhere is compared with the first rank's, so that a node with another
configuration, another corpus or another version of a package is named instead of spoiling the run.
"""

import logging
import math
import os
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bert_cpt.config import Config
from bert_cpt.ds_config import DeepSpeedConfig
from bert_cpt.metrics import flat
from bert_cpt.rundir import package_versions
from bert_cpt.world import World, shortened

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
    mine = {
        **config.model_dump(mode="json"),
        "DeepSpeed": ds_config.content,
        "content of data.corpora": corpora,
        "bytes of model.init_checkpoint": _weights_bytes(config),
        "versions": package_versions(),
    }
    world.raise_any(shortened(differences(mine, world.broadcast(mine)), MAX_NAMED))


def differences(mine: dict[str, Any], first: dict[str, Any]) -> list[str]:
    """What differs from the first rank, in words."""
    here, there = dict(flat(mine)), dict(flat(first))
    return [
        f"{key} is {here.get(key)}, on the first rank {there.get(key)}"
        for key in sorted(here.keys() | there.keys())
        if here.get(key) != there.get(key)
    ]


def check_health(world: World, config: Config) -> list[dict[str, Any]]:
    """Look at devices, clocks and disks, and time an all-reduce; one log line, and warnings.

    Returns:
        Host, process and device of every rank.

    Raises:
        UserError: two ranks have the same GPU.
    """
    device = "cpu"
    if world.device.type == "cuda":
        properties = torch.cuda.get_device_properties(world.device)
        device = f"{properties.name} {properties.uuid}"
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "device": device}
    free = shutil.disk_usage(tempfile.gettempdir()).free
    world.barrier()  # left by all ranks at nearly the same time
    ranks = world.gather({**mine, "clock": time.time(), "free_temporary_bytes": free})
    world.raise_any(shared_device(ranks, world.rank))
    for warning in find_warnings(ranks, config):
        logger.warning("%s", warning)
    clocks = [each["clock"] for each in ranks]
    hosts = list(dict.fromkeys(each["host"] for each in ranks))
    logger.info(
        "health: %d rank(s) on %s agree%s; clocks within %.2f s",
        world.world_size, shortened(hosts), measure_all_reduce(world), max(clocks) - min(clocks),
    )  # fmt: skip
    return [{key: each[key] for key in mine} for each in ranks]


def shared_device(ranks: list[dict[str, Any]], rank: int) -> str:
    """The problem of a rank that was given the GPU of an earlier one; empty if it was not."""
    places = [(each["host"], each["device"]) for each in ranks]
    owner = places.index(places[rank])
    if places[rank][1] == "cpu" or owner == rank:
        return ""
    return f"shares {places[rank][1]} with rank {owner}; start one task a GPU"


def find_warnings(ranks: list[dict[str, Any]], config: Config) -> list[str]:
    """What may go wrong later, in words."""
    warnings = []
    for host, each in {each["host"]: each for each in ranks}.items():
        seconds, free = each["clock"] - ranks[0]["clock"], each["free_temporary_bytes"]
        if abs(seconds) > MAX_CLOCK_SECONDS:
            warnings.append(
                f"the clock of {host} differs by {seconds:.0f} s from that of {ranks[0]['host']}; "
                f"times in logs will not match"
            )
        if free < MIN_TEMPORARY_BYTES:
            warnings.append(f"{host}: only {free >> 20} MiB free for temporary files")
    free = shutil.disk_usage(config.run.output_dir).free / 2**30
    kept = config.checkpoint.keep_last + 1  # the oldest goes when the newest is there
    needed = kept * NUM_CHECKPOINT_COPIES * (_weights_bytes(config) or 0) / 2**30
    if free < needed:
        warning = f"{free:.1f} GiB free, but {kept} checkpoints take about {needed:.1f} GiB"
        warnings.append(f"{config.run.output_dir}: {warning}")
    return warnings


def _weights_bytes(config: Config) -> int | None:
    weights = Path(config.model.init_checkpoint) / "model.safetensors"
    return weights.stat().st_size if weights.is_file() else None


def measure_all_reduce(world: World) -> str:
    """Time of a small all-reduce and bandwidth of a large one, in words; empty on one rank."""
    if world.world_size == 1:
        return ""
    num_bytes = (64 << 20) if world.device.type == "cuda" else (4 << 20)
    small, seconds = (_all_reduce_seconds(world, size) for size in (8, num_bytes))
    # Every byte is sent and received 2 (N - 1) / N times, whatever the algorithm.
    rate = 2 * (world.world_size - 1) / world.world_size * num_bytes / seconds
    return f"; all-reduce {1000 * small:.2f} ms, {rate / 1e9:.2f} GB/s"


def _all_reduce_seconds(world: World, num_bytes: int) -> float:
    tensor = torch.zeros(num_bytes, dtype=torch.uint8, device=world.device)
    best = math.inf
    for _ in range(5):
        world.barrier()
        start = time.perf_counter()
        torch.distributed.all_reduce(tensor)
        tensor[:1].tolist()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return best
