"""Assigns processes to the ranks of the next attempt.

Owns: which processes continue, which spares are promoted, which are started anew, and
where spares run. Pure. Must not know: Ray, torch.

A slot number identifies one process of the job. A rank needs a `Slot`: a bundle and, on
GPUs, one GPU of that bundle. Ray assigns GPUs to the first processes of a bundle. From
then on the last rank map lists the bundle's GPUs. A replacement of a dead process
requests no GPU from Ray: the start order names the one to use. That is safe because the
bundle is reserved for the job, so Ray assigns its GPUs to no other process.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_ray.parallel_dims import ParallelDims
from workers.decisions.placement import PlacementPlan, RankPlace, SlotFacts
from workers.decisions.topology.bundles import Bundle


@dataclass(frozen=True)
class Slot:
    """Bundle and GPU assigned to a reused or spare process."""

    bundle: int
    gpu: int | None


@dataclass(frozen=True)
class WorkerToStart:
    """A process to be started."""

    slot: int
    bundle: int
    resources: Mapping[str, float]
    """Resources that Ray's scheduler counts for it in its bundle."""
    is_spare: bool = False


@dataclass(frozen=True)
class SlotAssignment:
    """The processes of the next attempt."""

    slots: Mapping[int, Slot | None]
    """Slot by number; None: the process keeps the bundle and GPU that it reports."""
    workers_to_start: tuple[WorkerToStart, ...] = ()
    promoted: tuple[int, ...] = ()
    """Slot numbers of spares that become ranks."""
    released: tuple[int, ...] = ()
    """Slot numbers of living processes that no rank can use."""

    def apply(self, reported: Iterable[SlotFacts]) -> list[SlotFacts]:
        """Returns the facts with the bundles and GPUs that are assigned here."""
        assigned = []
        for facts in reported:
            slot = self.slots[facts.slot]
            if slot is not None:
                facts = facts.model_copy(update={"bundle": slot.bundle, "gpu": slot.gpu})
            assigned.append(facts)
        return assigned


def num_slots(dims: ParallelDims, bundle_size: int | None = None) -> int:
    """Returns the maximum number of slots: all ranks and one spare per bundle.

    `bundle_size` is a bundle's number of ranks, by default that of a tensor-parallel
    group.
    """
    # As many for larger bundles: a number that was in use must stay within the range.
    smallest = min(dims.tp, bundle_size or dims.tp)
    return dims.world_size + dims.world_size // smallest


def assign_slots(
    plan: PlacementPlan,
    places: Sequence[RankPlace],
    living: Collection[int],
    unmapped: Sequence[SlotFacts],
    nodes: Mapping[int, str],
) -> SlotAssignment:
    """Returns the next attempt's processes.

    `places` is the last rank map, `living` the slots whose process can be used again,
    `unmapped` the facts of those of them that are not in the map, `nodes` the node that
    each bundle lies on now.
    """
    return _SlotAssigner(plan, places, living, unmapped, nodes).assign()


def spares_to_start(
    plan: PlacementPlan,
    places: Sequence[RankPlace],
    living: Collection[int],
    spare_nodes: Collection[str],
) -> list[WorkerToStart]:
    """Returns one spare for each of the job's nodes that has none.

    `spare_nodes` are the nodes that have one.
    """
    # Numbers of dead processes are reused, so a job needs at most `num_slots`.
    free_slots = _free_slots(plan, living)
    first_bundle: dict[str, int] = {}
    # Any bundle of the node works: it only determines where Ray starts the process.
    for place in places:
        first_bundle.setdefault(place.node_id, place.bundle)
    spares = []
    for node_id, bundle in first_bundle.items():
        if node_id not in spare_nodes:
            # A spare requests no resources from Ray, so it never delays a rank.
            spares.append(WorkerToStart(next(free_slots), bundle, {}, is_spare=True))
    return spares


def _free_slots(plan: PlacementPlan, living: Collection[int]) -> Iterator[int]:
    # Of the whole placement group, as numbers that were in use may be larger.
    dims = plan.full_dims or plan.dims
    slots = range(num_slots(dims, plan.bundle_size))
    return (slot for slot in slots if slot not in living)


class _SlotAssigner:
    """Fills the bundles of a plan one by one."""

    def __init__(
        self,
        plan: PlacementPlan,
        places: Sequence[RankPlace],
        living: Collection[int],
        unmapped: Sequence[SlotFacts],
        nodes: Mapping[int, str],
    ) -> None:
        self._plan = plan
        self._places = places
        self._living = set(living)
        self._nodes = nodes
        self._unmapped = {facts.slot: facts for facts in unmapped}
        self._free_slots = _free_slots(plan, self._living)
        self._slots: dict[int, Slot | None] = {}
        self._workers_to_start: list[WorkerToStart] = []
        self._promoted: list[int] = []

    def assign(self) -> SlotAssignment:
        # A bundle that did not move keeps its processes, which saves their start. One
        # that moved has no processes on its new node.
        for bundle in self._plan.bundles:
            places = self._places_in(bundle)
            if len(places) == len(bundle.slots):
                self._refill(bundle, places)
            else:
                self._fill_anew(bundle)
        return SlotAssignment(
            self._slots,
            tuple(self._workers_to_start),
            tuple(self._promoted),
            self._released(),
        )

    def _places_in(self, bundle: Bundle) -> list[RankPlace]:
        """Returns the bundle's rows of the last rank map, unless Ray has moved it since."""
        node_id = self._nodes.get(bundle.index)
        places = []
        # After the loss of a node Ray moves the bundle; its old GPU indices are not
        # valid there.
        for place in self._places:
            if place.bundle == bundle.index and place.node_id == node_id:
                places.append(place)
        return places

    def _refill(self, bundle: Bundle, places: Sequence[RankPlace]) -> None:
        """Keeps the living slots of an unmoved bundle and replaces the dead ones."""
        # Ray may count a dead process's GPU as free although another replacement
        # already uses it. So a new process gets its GPU from the rank map, not from
        # Ray.
        resources = dict(self._plan.worker_resources)
        resources.pop("GPU", None)
        for place in places:
            number: int | None = place.slot
            if number not in self._living:
                number = self._take_idle(place.node_id)
            # A spare or half-started process is already running; a new one needs
            # seconds to start.
            if number is None:
                number = self._start_worker(bundle, resources)
            self._slots[number] = Slot(bundle.index, place.gpu)

    def _fill_anew(self, bundle: Bundle) -> None:
        """Fills a bundle that is new or has moved; its processes get GPUs from Ray."""
        reusable = []
        for facts in self._unmapped.values():
            if self._holds_resources_in(facts, bundle):
                reusable.append(facts.slot)
        for _ in bundle.slots:
            if reusable:
                number = reusable.pop()
            else:
                number = self._start_worker(bundle, self._plan.worker_resources)
            self._slots[number] = None

    def _holds_resources_in(self, facts: SlotFacts, bundle: Bundle) -> bool:
        """Returns whether an unfinished start created this process for the bundle."""
        if facts.is_spare or facts.bundle != bundle.index:
            return False
        # The bundle has moved since the process started.
        if facts.node_id != self._nodes.get(bundle.index):
            return False
        # A process without a GPU was started by `_refill`, for a GPU of the rank map.
        return facts.gpu is not None or self._plan.accelerator == "cpu"

    def _take_idle(self, node_id: str) -> int | None:
        """Takes an unassigned process on the node to which Ray assigned no GPU."""
        for number in sorted(self._unmapped):
            facts = self._unmapped[number]
            holds_gpu = facts.gpu is not None
            # A process to which Ray assigned a GPU cannot use another one.
            if facts.node_id != node_id or holds_gpu or number in self._slots:
                continue
            # The driver reports promotions, and starts a new spare for the node later.
            if facts.is_spare:
                self._promoted.append(number)
            return number
        return None

    def _start_worker(self, bundle: Bundle, resources: Mapping[str, float]) -> int:
        number = next(self._free_slots)
        self._workers_to_start.append(WorkerToStart(number, bundle.index, resources))
        return number

    def _released(self) -> tuple[int, ...]:
        """Returns the unassigned processes, except spares that keep waiting."""
        # Unneeded spares are kept. A process that was a rank, or that does not answer,
        # cannot become a spare.
        waiting = set(self._unmapped)
        for place in self._places:
            waiting.discard(place.slot)
        released = []
        for number in sorted(self._living - self._slots.keys()):
            if number not in waiting or not self._unmapped[number].is_spare:
                released.append(number)
        return tuple(released)
