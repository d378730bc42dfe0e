"""Shared by all tests: a tiny BERT, generated text, and shards of it. Nothing is downloaded."""

import json
import os
import random
import string
from itertools import product
from pathlib import Path

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # threads that spin slow each other down a hundredfold
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SYLLABLES = ["".join(pair) for pair in product("bdfgklmnprstvz", "aeiou")]
WORDS = [a + b for a, b in zip(SYLLABLES, reversed(SYLLABLES), strict=True)]


def tiny_vocabulary() -> list[str]:
    """About 400 entries: special, [unused], letters and digits, words, and ## pieces."""
    letters = list(string.ascii_lowercase + string.digits)
    pieces = ["##" + piece for piece in [*letters, *SYLLABLES]]
    unused = [f"[unused{n}]" for n in range(20)]
    return [*SPECIAL, *unused, *letters, *".,;:!?'\"()-", *SYLLABLES, *WORDS, *pieces]


def generated_documents(count: int, seed: int = 0) -> list[list[str]]:
    """Documents as lists of sentences; a document is about few words, so there is much to learn."""
    generator = random.Random(seed)
    documents = []
    for _ in range(count):
        topic = generator.sample(WORDS, 12)
        sentences = []
        for _ in range(generator.randint(2, 14)):
            words = generator.choices(topic, k=generator.randint(4, 14))
            words[0] += generator.choice(SYLLABLES)  # a word of several pieces
            sentences.append(" ".join(words).capitalize() + ".")
        documents.append(sentences)
    return documents


def write_tiny_checkpoint(directory: Path, **options: int) -> Path:
    """A BertForPreTraining of 2 layers x 64 with random weights, and its tokenizer."""
    import torch
    from transformers import BertConfig, BertForPreTraining

    from data_tools.tokenizer import load_tokenizer

    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = tiny_vocabulary()
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True})
    )
    (directory / "tokenizer.json").write_text(load_tokenizer(directory).definition)
    shape = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 128, "max_position_embeddings": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), **(shape | options))
    BertForPreTraining(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with a vocab.txt."""
    directory = tmp_path_factory.mktemp("tiny") / "tokenizer"
    directory.mkdir()
    (directory / "vocab.txt").write_text("\n".join(tiny_vocabulary()) + "\n")
    return directory


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with config.json, model.safetensors, tokenizer.json and vocab.txt."""
    return write_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_shards(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 200 generated documents."""
    from data_tools import write_shards

    directory = tmp_path_factory.mktemp("tiny") / "shards"
    write_shards(generated_documents(200), directory, tokenizer=tiny_checkpoint)
    return directory


@pytest.fixture(scope="session")
def tiny_config(
    tiny_checkpoint: Path, tiny_shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A configuration for them; a test overrides `run.output_dir` and what else it needs."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.toml"
    path.write_text(
        f"""
[run]
output_dir = "{path.parent / "run"}"

[data]
corpora = [{{ path = "{tiny_shards}" }}]
sequence_length = 64

[model]
init_checkpoint = "{tiny_checkpoint}"

[optimizer]
learning_rate = 1e-3

[train]
steps = 10
train_batch_size = 16
micro_batch_size = 4
deepspeed_config = "ds_configs/zero1_fp32.json"

[checkpoint]
interval = 5

[logging]
interval = 5
wandb = "disabled"
"""
    )
    return path
