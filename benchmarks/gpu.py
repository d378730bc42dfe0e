"""The training step on one GPU: packed against padded and against padded to the longest sample.

    python benchmarks/gpu.py [--json FILE] [--seconds 1] [--rounds 3]

Needs this repository, torch and transformers; with DeepSpeed installed, ZeRO 0 to 3 are measured
too. All variants train on the same samples, made of random tokens with the lengths of real ones
(`LENGTHS`), and update the same weights by AdamW with clipping:

- ours: packed forward, MLM head at masked positions, half-precision weights with fp32 masters,
  fused AdamW;
- dynamic: Hugging Face under autocast, padded to the longest sample of the micro-batch, full head;
- naive: the same, padded to the sequence length.

Rounds of the three alternate. `tokens/s` are real tokens; `mfu` is their arithmetic (forward and
backward, heads at masked positions) as a share of a matrix product measured here. About 7 minutes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # also where the package is not installed

import torch
from torch import Tensor
from transformers import BertConfig, BertForPreTraining

from bert_cpt.model import DeviceBatch, PretrainingModel, pad
from bert_cpt.timing import flops_per_token, matmul_ceiling

SHAPES = {
    "base": (12, 768, 12, 30522),
    "large": (24, 1024, 16, 30522),
    "tiny": (2, 64, 2, 1000),  # to try the script
}
# Quantiles of the lengths of samples of biomedical text, made by this project.
LENGTHS = {
    ("articles", 128): (11, 66, 100, 125, *[126] * 2, *[127] * 8, *[128] * 6),
    ("abstracts", 512): (
        12, 51, 67, 82, 99, 118, 139, 165, 189, 213, 235, 260, 281, 298, 316, 334, 348, 364, 378,
        391, 406, 420, 435, 449, 467, 483, 505, 511, *[512] * 12,
    ),
    ("articles", 512): (13, 99, 179, 261, 356, 453, 509, *[511] * 4, *[512] * 19),
}  # fmt: skip
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
LOSS_SCALE = 4096.0
Step = Callable[[DeviceBatch], None]


def new_model(shape: str, length: int, device: torch.device) -> BertForPreTraining:
    layers, hidden, heads, vocabulary = SHAPES[shape]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary, num_hidden_layers=layers, hidden_size=hidden,
        num_attention_heads=heads, intermediate_size=4 * hidden,
        max_position_embeddings=max(length, 512), attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForPreTraining(config).to(device).train()


def new_batch(
    lengths: tuple[int, ...], size: int, vocabulary: int, limit: int, device: torch.device
) -> DeviceBatch:
    """A micro-batch of random tokens, 15 % of them masked."""
    sizes = torch.tensor(lengths)[torch.randint(len(lengths), (size,))]
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    total = int(ends[-1])
    positions = torch.arange(total) - ends[:-1].repeat_interleave(sizes)
    masked = torch.rand(total).argsort()[: round(0.15 * total)].sort().values
    tensors = (
        torch.randint(5, vocabulary, (total,), dtype=torch.int32),
        (positions >= sizes.repeat_interleave(sizes) // 2).int(),
        positions.int(), ends.int(), masked.int(),
        torch.randint(5, vocabulary, (len(masked),)), torch.randint(2, (size,)),
    )  # fmt: skip
    return DeviceBatch._make(
        [*(tensor.to(device) for tensor in tensors), tuple(sizes.tolist()), limit]
    )


def mean_loss(model: Any, batch: DeviceBatch) -> Tensor:
    sums = model(batch)
    return sums.mlm_loss / len(batch.masked_labels) + sums.nsp_loss / len(batch.lengths)


def ours(bert: BertForPreTraining, dtype: torch.dtype, length: int) -> Step:
    masters = [p.detach().clone().requires_grad_() for p in bert.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=1e-4, fused=True)
    model = PretrainingModel(bert.to(dtype))
    weights = list(model.parameters())
    scale = LOSS_SCALE if dtype == torch.float16 else 1.0

    def step(batch: DeviceBatch) -> None:
        (mean_loss(model, batch) * scale).backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad = weight.grad.float()
            weight.grad = None
        torch._foreach_div_([m.grad for m in masters], scale)
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(weights, masters)

    return step


def hugging_face(bert: BertForPreTraining, dtype: torch.dtype, length: int) -> Step:
    """Padded to `length`, or for 0 to the longest sample."""
    optimizer = torch.optim.AdamW(bert.parameters(), lr=1e-4)
    device = next(bert.parameters()).device
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def step(batch: DeviceBatch) -> None:
        labels, inputs = pad(batch)
        missing = max(0, length - labels.shape[1])
        labels = torch.nn.functional.pad(labels, (0, missing), value=-100)
        inputs = {k: torch.nn.functional.pad(v, (0, missing)) for k, v in inputs.items()}
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = bert(**inputs, labels=labels, next_sentence_label=batch.next_sentence_label).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(bert.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    return step


@contextmanager
def deepspeed_step(
    bert: BertForPreTraining, precision: str, stage: int, size: int
) -> Iterator[Step]:
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # would compile for a minute
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(alone | {"MASTER_PORT": os.environ.get("MASTER_PORT", "29531")})
    optimizer = torch.optim.AdamW(bert.parameters(), lr=1e-4, fused=True)
    config = {
        "train_micro_batch_size_per_gpu": size,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "fp16": {"enabled": precision == "fp16"},
        "bf16": {"enabled": precision == "bf16"},
    }
    engine, *_ = deepspeed.initialize(
        model=PretrainingModel(bert), optimizer=optimizer, config=config
    )

    def step(batch: DeviceBatch) -> None:
        engine.backward(mean_loss(engine, batch))
        engine.step()

    yield step
    engine.destroy()


def measure(
    steps: dict[str, Step], batches: list[DeviceBatch], seconds: float, rounds: int
) -> dict[str, dict[str, Any]]:
    """tokens/s (median and spread of the rounds) and peak GiB of each, in alternating rounds."""
    is_cuda = batches[0].input_ids.is_cuda
    rates: dict[str, list[float]] = {name: [] for name in steps}
    peaks = dict.fromkeys(steps, 0.0)
    for number in range(rounds + 1):  # the first warms up
        for name, step in steps.items():
            if is_cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
            start, tokens = time.perf_counter(), 0
            while time.perf_counter() - start < seconds:
                for batch in batches:
                    step(batch)
                    tokens += int(batch.input_ids.numel())
                if is_cuda:
                    torch.cuda.synchronize()
            if number:
                rates[name].append(tokens / (time.perf_counter() - start))
            if is_cuda:
                peaks[name] = (torch.cuda.max_memory_allocated() - held) / 2**30
    return {
        name: {
            "tokens_per_second": statistics.median(values),
            "spread": (max(values) - min(values)) / statistics.median(values),
            "step_gib": peaks[name],
        }
        for name, values in rates.items()
    }


def compare(
    shape: str, text: str, length: int, precision: str, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One block of the table."""
    device, dtype = torch.device(options.device), DTYPES[precision]
    size = max(1, options.tokens // length)
    torch.manual_seed(1)
    batches = [
        new_batch(LENGTHS[text, length], size, SHAPES[shape][3], length, device) for _ in range(4)
    ]
    steps = {
        "ours": ours(new_model(shape, length, device), dtype, length),
        "dynamic": hugging_face(new_model(shape, length, device), dtype, 0),
        "naive": hugging_face(new_model(shape, length, device), dtype, length),
    }
    results = measure(steps, batches, options.seconds, options.rounds)
    steps.clear()
    for stage in options.stages:
        name = f"ours, ZeRO {stage}"
        if precision == "fp16" and stage == 0:
            continue  # trains wrongly in DeepSpeed
        with deepspeed_step(new_model(shape, length, device), precision, stage, size) as step:
            results |= measure({name: step}, batches, options.seconds, options.rounds)
    tokens = sum(batch.input_ids.numel() for batch in batches)
    squares = sum(n * n for batch in batches for n in batch.lengths)
    flops = flops_per_token(
        new_model(shape, length, torch.device("meta")).config,
        mean_square_length=squares / tokens, masked_share=0.15,
        mean_length=tokens / (4 * size),
    )  # fmt: skip
    ceiling = matmul_ceiling(device, dtype)
    rows = []
    for name, result in results.items():
        row = {
            "model": shape, "text": text, "sequence_length": length, "precision": precision,
            "micro_batch_size": size, "fill": tokens / (4 * size * length), "variant": name,
            "mfu": result["tokens_per_second"] * flops / ceiling,
            "speedup": result["tokens_per_second"] / results["naive"]["tokens_per_second"],
            "matmul_tflops": ceiling / 1e12,
        }  # fmt: skip
        rows.append(row | result)
        print(
            f"{shape:<6}{text:<10}{length:>4} {precision}  {name:<14}"
            f"{result['tokens_per_second']:>10,.0f} tok/s +-{result['spread'] / 2:4.0%}"
            f"  mfu {row['mfu']:5.1%}  {row['speedup']:5.2f}x  {result['step_gib']:6.1f} GiB",
            flush=True,
        )
    return rows


def has_deepspeed() -> bool:
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        return False
    return True


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", default=["base", "large"], choices=SHAPES)
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp16"], choices=DTYPES)
    parser.add_argument("--tokens", type=int, default=32768, help="positions of a micro-batch")
    parser.add_argument("--seconds", type=float, default=1.0, help="a round of one variant")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", nargs="*", type=int, help="ZeRO stages; default: all there are")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    if options.stages is None:
        options.stages = [0, 1, 2, 3] if has_deepspeed() else []
    is_cuda = options.device.startswith("cuda")
    hardware = torch.cuda.get_device_name() if is_cuda else f"{torch.get_num_threads()} threads"
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    print(f"{hardware}, torch {torch.__version__}, commit {commit or 'unknown'}", flush=True)
    rows = [
        row
        for shape in options.shapes
        for text, length in LENGTHS
        for precision in options.precisions
        for row in compare(shape, text, length, precision, options)
    ]
    if options.json:
        content = {"hardware": hardware, "torch": torch.__version__, "commit": commit, "rows": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
