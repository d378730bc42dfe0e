"""Counter-based random numbers: every draw is a hash of its key, none depends on another."""

import numpy as np
from numba import njit

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@njit(cache=True, inline="always")
def mix64(z):
    """The finalizer of splitmix64 (Steele et al. 2014): uint64 -> uint64, a bijection."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(cache=True, inline="always")
def draw(key, counter):
    """The `counter`-th number of the stream of `key`: uint64."""
    return mix64(key + (np.uint64(counter) + np.uint64(1)) * GOLDEN)


@njit(cache=True, inline="always")
def below(number, bound):
    """An integer in [0, bound) from a random uint64, for bounds below 2^32 (int64)."""
    return np.int64(((number >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))


def derive_key(seed: int, a: int, b: int) -> np.uint64:
    """A key for the stream (a, b) of a seed."""
    key = np.uint64(seed)
    for part in (0x5EED, a, b):
        key = np.uint64(draw(key, part))
    return key


@njit(cache=True)
def draws(key, counters):
    """uint64[n]: numbers of the stream of `key`, by their counters (int64[n])."""
    result = np.empty(len(counters), np.uint64)
    for n in range(len(counters)):
        result[n] = draw(key, counters[n])
    return result
