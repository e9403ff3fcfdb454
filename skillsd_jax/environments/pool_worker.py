"""A worker process of a stage: python -m skillsd_jax.environments.pool_worker FD

FD is a socket that was handed down. On it go lines of JSON; nothing else does,
whatever an engine prints, and nothing that comes back can run code:

  in    {"make": …, "max_observation": n}, then calls: ["step", [[slot, text], …]]
  out   ["ready", ""] or [name of an exception, its message], then an answer for each
        slot of a call, in order and as soon as it is there

The worker never loads jax. It leaves SIGINT to its parent and ends when the socket is
closed, which is also how it learns that its parent has died.
"""

import dataclasses
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence

from skillsd_jax.environments.base import TimeStep
from skillsd_jax.environments.stage import FAULTS, Maker, Outcome, Seat, failed
from skillsd_jax.trajectory import Task

GRACE_S = 1.0  # for closing engines when the parent is gone


def main(descriptor: int) -> None:
    # Both may be sent to every process of a run, which ends its workers itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    line = socket.socket(fileno=descriptor)
    line.set_inheritable(False)  # a program that an engine starts must not hold it
    threading.Thread(target=_end_with_parent, args=[line], daemon=True).start()
    seats: dict[int, Seat] = {}
    try:
        _serve(line, seats)
    except OSError:
        pass  # the parent is gone, and with it the other end
    finally:
        for seat in seats.values():
            seat.close()


def _serve(line: socket.socket, seats: dict[int, Seat]) -> None:
    """Makes one environment, to see that it can be made, and plays what is asked."""
    messages = (json.loads(text) for text in line.makefile(encoding="ascii"))
    setup = next(messages, None)
    if setup is None:
        return
    make, limit = maker(setup["make"]), setup["max_observation"]
    try:
        spare = make()
    except (ImportError, *FAULTS) as fault:
        kind = "ImportError" if isinstance(fault, ImportError) else type(fault).__name__
        _say(line, [kind, str(fault)])
        return
    _say(line, ["ready", ""])
    for kind, asked in messages:
        for slot, value in asked:
            if slot not in seats:
                # Beyond the process nothing is at stake, so any exception is a fault.
                seats[slot] = Seat(make, limit, (Exception,), spare)
                spare = None
            outcome = seats[slot].call(kind, value)
            try:
                _say(line, packed(outcome))
            except (TypeError, ValueError, AttributeError) as fault:
                _say(line, packed(failed("error", f"no TimeStep: {fault!r}")))


def _say(line: socket.socket, message: list) -> None:
    # numpy's numbers are no JSON; `item` makes Python's of them.
    text = json.dumps(message, default=lambda value: value.item())
    line.sendall(text.encode("ascii") + b"\n")


def _end_with_parent(line: socket.socket) -> None:
    """Ends a worker that hangs, and all it has started, once its parent is gone."""
    hangup = select.poll()
    hangup.register(line, 0)  # 0: only that the other end is closed
    hangup.poll()
    time.sleep(GRACE_S)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def described(make: Maker) -> dict:
    return dataclasses.asdict(make)


def maker(values: dict) -> Maker:
    options = tuple((name, value) for name, value in values["options"])
    return Maker(values["name"], values["split"], options)


def packed(outcome: Outcome) -> list:
    """Lists of plain values, in the order of the fields."""
    step, task = outcome.step, outcome.task
    return [
        step and _values(step),
        task and _values(task),
        *(outcome.fault, outcome.message, outcome.bounded),
    ]


def unpacked(values: Sequence) -> Outcome:
    """The outcome that `packed` wrote."""
    step, task, fault, message, cut = values
    if step is not None:
        step = TimeStep(*step)
        step = dataclasses.replace(step, admissible=tuple(step.admissible))
    return Outcome(step, task and Task(*task), fault, message, cut)


def _values(value) -> list:
    return [getattr(value, field.name) for field in dataclasses.fields(value)]


if __name__ == "__main__":
    main(int(sys.argv[1]))
