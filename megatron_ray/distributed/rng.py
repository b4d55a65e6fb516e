"""Makes random numbers as pure functions of what they are for.

Owns: how a name becomes a generator, and the streams of each axis. Must not know: layers,
what is drawn.

A stream belongs to a place in the model and to this rank's coordinates along the axes
that cut what is drawn for. So ranks that have the same activations draw the same, and
ranks that have different parts draw apart; pipeline stages differ by place,
data-parallel replicas by sample. Nothing is kept from draw to draw: a resumed run, a
recomputed layer and a microbatch that ran elsewhere get the numbers they always would,
no state is saved, and no other generator is touched.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch


def generator(name: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns a fresh generator, seeded by the name, on the device that draws.

    `meta` draws nothing and gets the CPU's. A CPU takes 32 bits of the seed, CUDA 63.
    """
    digest = hashlib.sha256(name.encode()).digest()
    seed = int.from_bytes(digest[:8], "little") >> 1
    if torch.device(device).type == "meta":
        device = "cpu"
    return torch.Generator(device).manual_seed(seed)


@dataclass(frozen=True)
class Stream:
    """The random numbers of one place in the model, by sample."""

    name: str

    def at(self, first_sample: int, device: torch.device) -> torch.Generator:
        """Returns the generator of the microbatch that begins with this sample of the run."""
        return generator(f"{self.name}/{first_sample}", device)


@dataclass(frozen=True)
class Streams:
    """The streams of one rank."""

    seed: int
    coordinates: Mapping[str, int]
    """This rank's index along each axis that may cut an activation."""

    def stream(self, place: str, cut_by: tuple[str, ...]) -> Stream:
        """Returns the stream of a place whose activations are cut along these axes.

        Along all others they are the same, and so are the numbers.
        """
        coordinates = ",".join(f"{axis}={self.coordinates[axis]}" for axis in cut_by)
        return Stream(f"{self.seed}/{place}/{coordinates}")
