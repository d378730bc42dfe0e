"""Start ranks on the CPU."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RunRanks = Callable[..., list[int]]

LAUNCH = """
import sys
from launcher.local import run_ranks
sys.exit(run_ranks(sys.argv[2:], int(sys.argv[1])))
"""


def launch(num_ranks: int, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LAUNCH, str(num_ranks), sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        cwd=Path(__file__).parents[2],
    )


@pytest.fixture(scope="session")
def run_ranks(tiny_config: Path) -> RunRanks:
    """Train the tiny configuration with each of several sets of overrides, on `num_ranks` ranks."""

    def run(num_ranks: int, *runs: str) -> list[int]:
        worker = str(Path(__file__).parent / "worker.py")
        result = launch(num_ranks, worker, str(tiny_config), *runs)
        assert result.returncode == 0, result.stderr[-5000:]
        return json.loads(result.stdout.strip().splitlines()[-1])

    return run
