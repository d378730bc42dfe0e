"""Text in, shards out: tokenized, memory-mapped corpora with sentence and document indices."""

from importlib import import_module

from data_tools.errors import UserError

__all__ = ["UserError", "open_shards", "write_shards"]


def __getattr__(name: str) -> object:  # numba and datasets are imported only when they are used
    homes = {"write_shards": "data_tools.build", "open_shards": "data_tools.shards"}
    if name not in homes:
        raise AttributeError(name)
    return getattr(import_module(homes[name]), name)
