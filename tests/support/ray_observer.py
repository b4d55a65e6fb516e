"""Looks into a stack's Ray from a process of its own, so that a test survives Ray's
death: a word on stdin, a line of JSON on stdout.

`look`: actors, placement groups and objects that are not gone. `hold`: takes one CPU
that only Ray knows of, `release` gives it back.
"""

import json
import logging
import os
import sys
from typing import Any

import ray
from ray.util.state import list_actors, list_objects, list_placement_groups

MOST = 10_000


def look() -> dict[str, Any]:
    """What Ray holds; a listing that misses an answer (a worker died meanwhile) is no
    listing.
    """
    actors = list_actors(filters=[("state", "!=", "DEAD")], limit=MOST)
    groups = list_placement_groups(filters=[("state", "!=", "REMOVED")], limit=MOST)
    return {
        "actors": [
            {"name": row.name, "class": row.class_name, "state": row.state, "pid": row.pid}
            for row in actors
        ],
        "groups": [{"name": row.name, "state": row.state} for row in groups],
        "objects": [
            {
                "id": row.object_id,
                "kind": row.reference_type,
                "of": row.type,
                "pid": row.pid,
            }
            for row in list_objects(limit=MOST)
        ],
    }


def main(address: str) -> None:
    # Ray writes to standard output too, such as when a node has died.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    group: Any = None
    for line in sys.stdin:
        word = line.strip()
        if word == "hold":
            group = ray.util.placement_group([{"CPU": 1}])
            answer: dict[str, Any] = {"held": group.wait(30)}
        elif word == "release":
            ray.util.remove_placement_group(group)
            answer = {}
        else:
            try:
                answer = look()
            except Exception as error:  # noqa: BLE001 - the asker decides whether to ask again
                answer = {"failed": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
