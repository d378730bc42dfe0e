"""What a run reports: log lines, metrics.jsonl, W&B, a progress bar; all on the first rank.

Console and train.log get one line a log interval, metrics.jsonl everything. W&B receives the same
records; trouble with it is reported once and never stops a run.
"""

import logging
import netrc
import os
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic_core import to_json
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from bert_cpt.config import LoggingConfig

logger = logging.getLogger("bert_cpt")


LINE = (
    "step {step}/{total}  mlm {mlm_loss:.4f}  nsp {nsp}  lr {learning_rate:.2e}  "
    "grad {grad_norm:.2f}  scale {loss_scale:g}  {tokens_per_second} tok/s  wait {wait}  ETA {eta}"
)


def set_up_logging(run_dir: Path, rank: int) -> None:
    """Rank 0 logs to the console and RUN/train.log, every other rank to RUN/logs/rank_N.log."""
    path = run_dir / (f"logs/rank_{rank:04d}.log" if rank else "train.log")
    path.parent.mkdir(exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(path)]
    if not rank:
        handlers.append(logging.StreamHandler(sys.stderr))
    form = "%(asctime)s %(levelname)s %(message)s"
    logging.basicConfig(
        level=logging.INFO, format=form, datefmt="%Y-%m-%d %H:%M:%S", handlers=handlers, force=True
    )
    for name in ("DeepSpeed", "numba", "torch", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)


class Metrics:
    """The reporter of the first rank; on the others every method does nothing."""

    def __init__(
        self, run_dir: Path, total_steps: int, first_step: int, wandb_run: Any, is_main: bool
    ) -> None:
        self.is_main = is_main
        self.total_steps = total_steps
        self.wandb_run = wandb_run
        if not is_main:
            return
        self.file = open(run_dir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.bar = tqdm(
            total=total_steps, initial=first_step, unit="step", desc="training", disable=None
        )
        self._redirect = logging_redirect_tqdm()
        self._redirect.__enter__()

    def record(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Append one record to metrics.jsonl and W&B; values that are not finite are kept."""
        if not self.is_main:
            return
        record = {"kind": kind, "step": step, "time": round(time.time(), 3)} | values
        self.file.write(to_json(record, inf_nan_mode="strings").decode() + "\n")
        self.file.flush()
        if self.wandb_run is not None:
            numbers = {
                f"{kind}/{k}": v for k, v in flat(values, "/") if isinstance(v, (int, float))
            }
            try:
                self.wandb_run.log(numbers, step=step)
            except Exception as error:  # a tracker never stops a run
                logger.warning("W&B stopped taking records: %s", error)
                self.wandb_run = None

    def log_step(self, step: int, values: dict[str, Any], seconds_left: float) -> None:
        """One line for the console and the log, and the record."""
        if not self.is_main:
            return
        self.record("train", step, values | {"seconds_left": round(seconds_left, 1)})
        nsp = "-" if values["nsp_loss"] is None else f"{values['nsp_loss']:.4f}"
        line = values | {
            "step": step,
            "total": self.total_steps,
            "nsp": nsp,
            "tokens_per_second": tqdm.format_sizeof(values["tokens_per_second"]),
            "wait": f"{100 * values['data_wait_share']:.0f}%",
            "eta": tqdm.format_interval(seconds_left),
        }
        logger.info(LINE.format(**line))

    def advance(self, mlm_loss: float) -> None:
        """Move the progress bar by one step."""
        if self.is_main:
            self.bar.set_postfix(mlm=f"{mlm_loss:.3f}", refresh=False)
            self.bar.update()

    def close(self) -> None:
        if not self.is_main:
            return
        self.bar.close()
        self._redirect.__exit__(None, None, None)
        self.file.close()
        if self.wandb_run is not None:
            try:
                self.wandb_run.finish()
            except Exception as error:
                logger.warning("W&B did not finish cleanly: %s", error)


def start_wandb(run_dir: Path, settings: LoggingConfig, config: dict[str, Any]) -> Any:
    """A W&B run that continues with the run directory, or None."""
    mode = settings.wandb
    if mode == "disabled" or os.environ.get("WANDB_MODE") == "disabled":
        return None
    if mode == "auto":
        is_online = os.environ.get("WANDB_MODE") != "offline" and _is_logged_in()
        mode = "online" if is_online else "offline"
    record = run_dir / "wandb_run_id"
    try:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        run_id = record.read_text().strip() if record.exists() else secrets.token_hex(4)
        record.write_text(run_id)
        run = wandb.init(
            project=settings.wandb_project, name=settings.wandb_name or run_dir.name, id=run_id,
            dir=str(run_dir), mode=mode, resume="allow" if mode == "online" else None,
            config=config,
        )  # fmt: skip
        logger.info("W&B: %s, %s", mode, run.url or run_dir / "wandb")
        return run
    except Exception as error:  # a tracker never stops a run
        logger.warning("W&B is not used (%s: %s)", type(error).__name__, error)
        return None


def _is_logged_in() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def flat(value: Any, separator: str = ".", prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested tables and lists."""
    if isinstance(value, dict | list) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(item, separator, f"{prefix}{separator if prefix else ''}{key}")
    else:
        yield prefix, value
