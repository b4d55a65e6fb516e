"""Which process fills which place.

Owns: who goes on, who steps in for the dead, who is made anew, where one stands by.
Pure.

A slot is the number of one process of the job, nothing more. A post is what a rank
needs: a bundle and, where there are GPUs, one of that bundle's. The first processes in
a bundle get their GPUs from Ray. From then on the bundle's GPUs are known from the last
rank map, and whoever takes over a dead rank's post holds no GPU in Ray's books and is
told which one to use: the bundle is the job's own, so nobody else can be given it. Must
not know: Ray, torch.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_ray.parallel_dims import ParallelDims
from workers.decisions.placement import Bundle, PlacementPlan, RankPlace, SlotFacts


@dataclass(frozen=True)
class Slot:
    """What a told process is told."""

    bundle: int
    gpu: int | None


@dataclass(frozen=True)
class WorkerToStart:
    """A process to be made."""

    slot: int
    bundle: int
    resources: Mapping[str, float]
    """What it takes out of its bundle, in Ray's books."""
    standby: bool = False


@dataclass(frozen=True)
class SlotAssignment:
    """Who serves in the next attempt."""

    posts: Mapping[int, Slot | None]
    """By slot; None: the process has what it reports."""
    recruits: tuple[WorkerToStart, ...] = ()
    promoted: tuple[int, ...] = ()
    """Slots that stood by until now."""
    released: tuple[int, ...] = ()
    """Living processes that fit nowhere."""

    def posted(self, facts: Iterable[SlotFacts]) -> list[SlotFacts]:
        """What the serving processes report, with what they are told."""
        told = [(item, self.posts[item.slot]) for item in facts]
        return [
            item
            if post is None
            else item.model_copy(update={"bundle": post.bundle, "gpu": post.gpu})
            for item, post in told
        ]


def num_slots(dims: ParallelDims) -> int:
    """Slots that a job can ever have: its ranks, and at most one process that stands by
    per bundle.
    """
    return dims.world_size + dims.world_size // dims.tp


def _free_slots(plan: PlacementPlan, living: Collection[int]) -> Iterator[int]:
    return (slot for slot in range(num_slots(plan.dims)) if slot not in living)


def assign_slots(
    plan: PlacementPlan,
    places: Sequence[RankPlace],
    living: Collection[int],
    others: Sequence[SlotFacts],
    nodes: Mapping[int, str],
) -> SlotAssignment:
    """The next attempt's processes.

    `places` is the last rank map, `living` the slots whose process can be used again,
    `others` what those of them report that are not in the map, `nodes` the node of each
    bundle now.
    """
    return _Filling(plan, places, living, others, nodes).staff()


class _Filling:
    def __init__(
        self,
        plan: PlacementPlan,
        places: Sequence[RankPlace],
        living: Collection[int],
        others: Sequence[SlotFacts],
        nodes: Mapping[int, str],
    ) -> None:
        self._plan = plan
        self._places = places
        self._living = set(living)
        self._nodes = nodes
        self._others = {facts.slot: facts for facts in others}
        self._numbers = _free_slots(plan, self._living)
        self._posts: dict[int, Slot | None] = {}
        self._recruits: list[WorkerToStart] = []
        self._stepped_in: list[int] = []

    def staff(self) -> SlotAssignment:
        for bundle in self._plan.bundles:
            at_home = [
                place
                for place in self._places
                if place.bundle == bundle.index
                and place.node_id == self._nodes.get(bundle.index)
            ]
            if len(at_home) == len(bundle.slots):
                self._fill_known(bundle, at_home)
            else:
                self._fill_new(bundle)
        in_map = {place.slot for place in self._places}
        unused = self._living - self._posts.keys()
        released = [
            slot
            for slot in unused
            if slot in in_map or slot not in self._others or not self._others[slot].standby
        ]
        return SlotAssignment(
            self._posts,
            tuple(self._recruits),
            tuple(self._stepped_in),
            tuple(sorted(released)),
        )

    def _fill_known(self, bundle: Bundle, at_home: Sequence[RankPlace]) -> None:
        """A bundle that lies where it lay: its posts are the same, the dead are
        replaced.
        """
        for place in at_home:
            post = Slot(bundle.index, place.gpu)
            if place.slot in self._living:
                self._posts[place.slot] = post
                continue
            idle = self._idle(place.node_id)
            if idle is None:
                told = {
                    name: amount
                    for name, amount in self._plan.worker_resources.items()
                    if name != "GPU"
                }
                idle = self._recruit(bundle, told)
            self._posts[idle] = post

    def _fill_new(self, bundle: Bundle) -> None:
        """A bundle without a history, or moved to another node: its processes get their
        GPUs from Ray.
        """
        holders = [
            facts.slot
            for facts in self._others.values()
            if self._holds_what_it_needs(facts, bundle)
        ]
        for _ in bundle.slots:
            slot = (
                holders.pop()
                if holders
                else self._recruit(bundle, self._plan.worker_resources)
            )
            self._posts[slot] = None

    def _holds_what_it_needs(self, facts: SlotFacts, bundle: Bundle) -> bool:
        at_home = facts.bundle == bundle.index and facts.node_id == self._nodes.get(
            bundle.index
        )
        return (
            at_home
            and not facts.standby
            and (facts.gpu is not None or self._plan.accelerator == "cpu")
        )

    def _idle(self, node_id: str) -> int | None:
        """A process on the node that belongs to nobody and holds no GPU of its own."""
        for facts in sorted(self._others.values(), key=lambda facts: facts.slot):
            if (
                facts.node_id == node_id
                and facts.gpu is None
                and facts.slot not in self._posts
            ):
                if facts.standby:
                    self._stepped_in.append(facts.slot)
                return facts.slot
        return None

    def _recruit(self, bundle: Bundle, resources: Mapping[str, float]) -> int:
        slot = next(self._numbers)
        self._recruits.append(WorkerToStart(slot, bundle.index, resources))
        return slot


def standbys_wanted(
    plan: PlacementPlan,
    places: Sequence[RankPlace],
    living: Collection[int],
    standing: Mapping[int, str],
) -> list[WorkerToStart]:
    """One process for each of the job's nodes where none stands by; `standing` is the
    node of each that does.
    """
    numbers = _free_slots(plan, living)
    bundles: dict[str, int] = {}
    for place in places:
        bundles.setdefault(place.node_id, place.bundle)
    return [
        WorkerToStart(next(numbers), bundle, {}, standby=True)
        for node, bundle in bundles.items()
        if node not in standing.values()
    ]
