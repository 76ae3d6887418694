"""A process of the local engine: `python -m vaecirc_fast.sweeps.worker MODULE:FUNCTION` works on the runs it is sent.

It ends when nobody can send it more: at the end of the sweep, and when the process that started it was killed.
"""

from __future__ import annotations

import importlib
import os
import queue
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import torch

from .. import errors
from .messages import received, sent
from .store import RunDirectory


def main(name: str) -> int:
    """Work until the input ends; the exit code."""
    module, _, function = name.partition(":")
    work = getattr(importlib.import_module(module), function)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with it ignored
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is not for the engine

    def say(message: dict[str, Any]) -> None:
        out.write(sent(message))
        out.flush()

    inbox: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_listen, args=(inbox,), daemon=True).start()
    try:
        first = inbox.get()
        if first is None:
            return 0
        torch.set_num_threads(first["threads"])
        while (message := inbox.get()) is not None:
            run = RunDirectory(message["config"], message["id"], Path(message["path"]))
            run.finish(work(run, first["given"], lambda step, steps: say({"step": step, "steps": steps})))
            say({"done": run.id})
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        ours = type(error).__module__ == errors.__name__
        say({"error": type(error).__name__ if ours else "", "text": str(error) if ours else traceback.format_exc()})
        return 1
    return 0


def _listen(inbox: queue.Queue[dict[str, Any] | None]) -> None:
    for line in sys.stdin:
        message = received(line)
        if message is not None:
            inbox.put(message)
    inbox.put(None)
    os.kill(os.getpid(), signal.SIGINT)  # nobody waits for what is being worked on: keep its last step and end


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
