"""The TCPStore's own tiny actor. Owns: one store per job, used by all attempts under a prefix each. Must not know: ranks, training.

Neither in the driver nor in rank 0: both may die without taking the rendezvous away. The kernel picks the port.
"""

from workers.cluster import own_address
from workers.rank_env import prepare_process, run_before_others


class StoreServer:
    """Serves a torch TCPStore as long as the actor lives."""

    def __init__(self) -> None:
        run_before_others()  # the ranks wait for this start
        prepare_process(1)
        from workers.stores import TCPStore  # imports torch: only this process and the ranks pay for it

        self._address = own_address()
        self._store = TCPStore(self._address, 0, is_master=True, wait_for_workers=False)

    def address(self) -> tuple[str, int]:
        """Host and port that ranks connect to."""
        return self._address, self._store.port
