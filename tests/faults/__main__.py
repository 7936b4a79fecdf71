"""Injects faults into real runs and counts what is lost: `python -m tests.faults --tier ci`

Ranks are killed, stopped and signalled, files are cut, flipped and swapped, disks fill, settings are mistyped, data and
configuration turn hostile. A fault survives when the run goes on as if nothing had happened, to the last bit, or when
it is refused in one clear line. Prints a row for each id, then `injections N, failures M`; exit code 1 if M > 0.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from moe_engine.host.console import run_program


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tier", choices=["ci", "nightly"], default="ci", help="minutes, or an hour or two")
    parser.add_argument("--only", metavar="A1,C1", help="these ids alone")
    parser.add_argument("--count", type=int, help="injections of each, instead of the tier's number")
    parser.add_argument("--seed", type=int, default=0, help="of every random moment and place")
    parser.add_argument("--keep", action="store_true", help="keep the folders of injections that failed")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args(arguments)

    os.environ.update(DS_ACCELERATOR="cpu", TORCHDYNAMO_DISABLE="1")  # forked ranks on gloo, with GPUs too
    from tests.faults.arena import Arena
    from tests.faults.battery import BATTERY

    wanted = options.only.split(",") if options.only else list(BATTERY)
    if unknown := [name for name in wanted if name not in BATTERY]:
        parser.error(f"found id {unknown[0]!r}, expected some of {', '.join(BATTERY)}")
    rows, arena = [], Arena(Path(tempfile.mkdtemp(prefix="faults-")), options.seed)
    print(f"{'id':8}{'fault':60}{'injections':>11}{'failures':>9}{'seconds':>9}", flush=True)
    for name in wanted:
        fault = BATTERY[name]
        count = options.count or (fault.ci if options.tier == "ci" else fault.nightly)
        if not count:
            continue
        arena.begin(name)
        began = time.monotonic()
        outcomes = list(fault.inject(arena, count))
        failed = [outcome for outcome in outcomes if outcome]
        seconds = time.monotonic() - began
        print(f"{name:8}{fault.title:60}{len(outcomes):11}{len(failed):9}{seconds:9.1f}", flush=True)
        for text in failed[:5]:
            print(f"    {text[:600]}", flush=True)
        rows.append({"id": name, "injections": len(outcomes), "failures": failed, "seconds": round(seconds, 1)})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    failures = sum(len(row["failures"]) for row in rows)
    if failures and options.keep:
        print(f"the folders of what failed are under {arena.root}")
    else:
        arena.close()
    print(f"injections {sum(row['injections'] for row in rows)}, failures {failures}")
    return 1 if failures else 0


if __name__ == "__main__":
    run_program(main)
