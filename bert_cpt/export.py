"""A plain Hugging Face model out of a checkpoint, checked by loading it."""

from pathlib import Path
from typing import Literal

import torch
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoTokenizer,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    PreTrainedModel,
)

from bert_cpt.checkpoint import copy_files, new_directory
from bert_cpt.model import from_pretrained, load_bert_config
from data_tools.errors import UserError

ExportKind = Literal["pretraining", "masked-lm", "encoder", "sentence-transformers"]
CLASSES: dict[ExportKind, type[PreTrainedModel]] = {
    "pretraining": BertForPreTraining,
    "masked-lm": BertForMaskedLM,
    "encoder": BertModel,
    "sentence-transformers": BertModel,
}
LOADERS = {
    "pretraining": (AutoModelForPreTraining, AutoModelForMaskedLM, AutoModel),
    "masked-lm": (AutoModelForMaskedLM, AutoModel),
    "encoder": (AutoModel,),
    "sentence-transformers": (AutoModel,),
}


def resolve_checkpoint(path: str) -> str:
    """A model directory: the one given, or a run's final model, or its newest checkpoint."""
    directory = Path(path)
    if not (directory / "config.toml").is_file():
        return path
    if (directory / "final").is_dir():
        return str(directory / "final")
    latest = directory / "latest"
    if latest.is_file():
        return str(directory / "checkpoints" / Path(latest.read_text().strip()).name)
    raise UserError(f"{path}: a run directory without a checkpoint yet")


def export(checkpoint: str, output: Path, kind: ExportKind = "pretraining") -> list[str]:
    """Write a checkpoint as a Hugging Face model.

    Args:
        checkpoint: a model directory or a run directory.
        output: must not exist, or be empty.

    Returns:
        The automatic classes of transformers that loaded the result, all weights found.

    Raises:
        UserError: no BERT checkpoint, heads missing in it, or `output` is in use.
    """
    checkpoint = resolve_checkpoint(checkpoint)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: exists and is not empty; choose another directory")
    load_bert_config(checkpoint)
    model, info = from_pretrained(CLASSES[kind], checkpoint)
    if missing := sorted(info["missing_keys"]):
        names = ", ".join(missing[:4])
        raise UserError(f"{checkpoint}: lacks {names}; try --as masked-lm or --as encoder")
    with new_directory(output) as aside:
        model.save_pretrained(aside)
        copy_files(Path(checkpoint), aside)
        if kind == "sentence-transformers":
            _add_pooling(aside)
        loaded = [_check(loader, aside, model) for loader in LOADERS[kind]]
        AutoTokenizer.from_pretrained(aside, trust_remote_code=False)
    return loaded


def _check(loader: type, directory: Path, model: PreTrainedModel) -> str:
    """Load with one of transformers' automatic classes and compare the encoder's weights."""
    found, info = from_pretrained(loader, str(directory))
    # A masked-lm model has no pooler, which AutoModel would add.
    missing = [name for name in info["missing_keys"] if "pooler" not in name]
    assert not missing, f"{loader.__name__}: {missing}"
    encoder = getattr(model, "bert", model)
    reloaded = getattr(found, "bert", found).state_dict()
    for name, value in encoder.state_dict().items():
        same = name not in reloaded or torch.equal(value, reloaded[name])
        assert same, f"{loader.__name__}: {name} differs after reloading"
    return loader.__name__


def _add_pooling(directory: Path) -> None:
    """Mean pooling over tokens, which the sentence-transformers package adds to a plain encoder."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError(
            "--as sentence-transformers needs that package: pip install sentence-transformers"
        ) from error
    SentenceTransformer(str(directory), device="cpu").save(str(directory))
