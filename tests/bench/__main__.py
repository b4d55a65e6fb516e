"""`make bench [BENCH=name]`: one JSON object a line on stdout and nothing else; what is
being done goes to stderr.
"""

import argparse
import importlib
import json
import signal
import sys
from types import FrameType

# Each is a module beside this one, imported when it is its turn: `gpu` runs where there
# is neither Ray nor a web framework.
BENCHES = ("first_step", "gpu", "overhead", "peers", "plan", "recovery", "save")


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument(
        "bench", nargs="?", choices=BENCHES, help="which one; all of them when not given"
    )
    chosen = parser.parse_args().bench
    # A limit of the caller's ends the bench as an error would: what it started ends too.
    signal.signal(signal.SIGTERM, end)
    for name in [chosen] if chosen else BENCHES:
        print(f"bench {name} ...", file=sys.stderr)
        for line in importlib.import_module(f"tests.bench.{name}").run():
            print(json.dumps(line), flush=True)


def end(number: int, _frame: FrameType | None) -> None:
    """Raises SystemExit with the status that a shell reports for a signal."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
