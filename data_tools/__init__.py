"""Text in, shards out: tokenized, memory-mapped corpora with sentence and document indices."""

from data_tools.errors import UserError

__all__ = ["UserError", "open_shards", "write_shards"]


def __getattr__(name: str) -> object:  # numba and datasets are imported only when they are used
    if name == "write_shards":
        from data_tools.build import write_shards

        return write_shards
    if name == "open_shards":
        from data_tools.shards import open_shards

        return open_shards
    raise AttributeError(name)
