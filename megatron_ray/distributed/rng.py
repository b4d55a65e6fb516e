"""Makes random numbers as pure functions of their purpose.

Owns: deriving a generator from a name, and the streams of each axis. Must not know:
layers, distributions.

A stream is identified by a module path and by this rank's coordinates along the axes
that split the activations. So ranks with the same activations draw the same numbers,
and ranks with different parts draw different ones; pipeline stages differ by path,
data-parallel replicas by sample. Generators have no state between draws: a resumed run,
a recomputed layer and a microbatch on another rank get the same numbers, no state is
saved, and no other generator is affected.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch


def generator(name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a new generator on a device, seeded by the name.

    `meta` gets a generator of the CPU. The CPU uses 32 bits of the seed, CUDA 63.
    """
    digest = hashlib.sha256(name.encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1
    if torch.device(device).type == "meta":
        device = "cpu"
    return torch.Generator(device).manual_seed(seed)


@dataclass(frozen=True)
class Stream:
    """The random numbers of one module, by sample."""

    name: str

    def at(self, first_sample: int, device: torch.device) -> torch.Generator:
        """Returns the generator of the microbatch that starts with this sample."""
        return generator(f"{self.name}/{first_sample}", device)


@dataclass(frozen=True)
class Streams:
    """The streams of one rank."""

    seed: int
    coordinates: Mapping[str, int]
    """This rank's index along each axis that may split an activation."""

    def stream(self, place: str, cut_by: tuple[str, ...]) -> Stream:
        """Returns the stream of a module with activations split along these axes.

        Ranks that differ only along other axes draw the same numbers.
        """
        coordinates = ",".join(f"{axis}={self.coordinates[axis]}" for axis in cut_by)
        return Stream(f"{self.seed}/{place}/{coordinates}")
