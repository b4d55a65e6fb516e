"""`make bench [BENCH=name]`: one JSON object a line on stdout and nothing else; what is being done goes to stderr."""

import argparse
import json
import sys

from tests.bench import first_step, gpu, overhead, peers, plan, recovery, save

BENCHES = {
    "first_step": first_step.run,
    "gpu": gpu.run,
    "overhead": overhead.run,
    "peers": peers.run,
    "plan": plan.run,
    "recovery": recovery.run,
    "save": save.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("bench", nargs="?", choices=sorted(BENCHES), help="which one; all of them when not given")
    chosen = parser.parse_args().bench
    for name in [chosen] if chosen else sorted(BENCHES):
        print(f"bench {name} ...", file=sys.stderr)
        for line in BENCHES[name]():
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
