"""Work for the processes of a sweep, and a sweep to kill: `python sweep_work.py DIRECTORY`."""

import os
import sys
import time
from pathlib import Path

import torch

from vaecirc_fast import errors
from vaecirc_fast.sweeps import RunStore, run_all


def work(run, given, tell):
    seed = run.config["seed"]
    if given.get("print"):
        print("\x1e not for you", flush=True)
    if "fail" in given and seed == 1:
        if given["fail"] == "exit":
            os._exit(7)
        raise getattr(errors, given["fail"], ZeroDivisionError)(f"seed {seed} is wrong")
    if tell is not None:
        tell(1, 2)
    return {"answer": given.get("base", 0) + 10 * seed, "process": os.getpid(), "threads": torch.get_num_threads()}


def forever(run, given, tell):
    tell(os.getpid(), 0)
    try:
        time.sleep(600)
    except KeyboardInterrupt:
        Path(given["out"], f"{run.config['seed']}.interrupted").touch()
        raise


def main(out):
    store = RunStore(out)
    runs = [store.run(f"run-s{seed}", {"seed": seed}) for seed in range(2)]
    pids = []

    def advance(run, step, steps):
        pids.append(str(step))
        if len(pids) == 2:
            print(*pids, flush=True)

    # by its name as a worker can import it, not as __main__
    import sweep_work

    run_all(store, runs, sweep_work.forever, lambda *a: None, given={"out": out}, workers=2, advance=advance)


if __name__ == "__main__":
    main(sys.argv[1])
