"""The processes of one job: which this one is, and what they tell each other.

Every process runs the same program on devices of its own (JAX's multi-controller
runtime). Work that ends up on the host is shared out by `share` and put together again
by `merge`; what may be decided once is decided by the first process and `told` to all.
All of them call these functions in the same order. In a job of one process every
function hands back what it is given.
"""

import contextlib
import os
import pickle
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from skillsd_jax.validation import Refused

T = TypeVar("T")
HEARTBEAT_S = 20  # after which a silent process counts as lost
JOIN_S = 300  # in which all processes have to start
PATIENCE_S = 10  # after which one says that it waits
LOST = 75  # exit status: try again
SHORTEST = 1 << 16  # bytes that are sent at least
AGAIN = (
    "If another process was lost, start the job again: it goes on from the last "
    "checkpoint."
)
# What the runtime says of a connection that is gone; other faults are this process's own.
LOST_WORDS = re.compile(
    "gloo|nccl|coordination|heartbeat|barrier|connection (closed|reset|refused)|"
    "socket closed|unavailable",
    re.IGNORECASE,
)


@contextlib.contextmanager
def job(text: str) -> Iterator[None]:
    """Joins a job, before anything of JAX is used.

    When another process is lost, or something goes wrong in this one, it says so and ends
    at once: JAX itself would wait for the others first.

    Args:
      text: HOST:PORT,PROCESSES,INDEX, where HOST:PORT is the first process's, INDEX this
        one's from 0; 'auto': as the cluster says (a TPU pod, Slurm, Kubernetes); "":
        no job, one process.

    Raises:
      Refused: the text says nothing of the kind, or the job cannot be joined.
    """
    if text == "auto":
        _initialize()
    elif text:
        _initialize(*_parsed(text))
    # The first exchange connects all, and waits for nobody long.
    gather(None)
    with contextlib.ExitStack() as stack:
        if text:
            stack.push(_ended)
        yield


def lost(fault: BaseException) -> bool:
    """Whether it is what the runtime says where another process is gone."""
    kinds = jax.errors.JaxRuntimeError | ValueError
    ours = isinstance(fault, Refused) or not isinstance(fault, kinds)
    return not ours and LOST_WORDS.search(str(fault)) is not None


def _ended(kind: type[BaseException] | None, fault: BaseException | None, *_) -> None:
    """Ends this process at once where it alone ends, for the others to notice.

    A Stopped without a cause is raised in all of them, which wait for each other.
    """
    if fault is None or (isinstance(fault, SystemExit) and fault.__cause__ is None):
        return
    status, said = 1, f"{kind.__name__}: {fault}"
    if lost(fault):
        status, said = LOST, "\n".join([str(fault).split("\n")[0], AGAIN])
    elif isinstance(fault, KeyboardInterrupt):
        status, said = 130, "interrupted"
    elif isinstance(fault, SystemExit):
        said = str(fault)
    elif not isinstance(fault, Refused):
        traceback.print_exception(fault)
    print(f"process {index()} of {count()} stops: {said}", file=sys.stderr, flush=True)
    os._exit(status)


def _parsed(text: str) -> tuple[str, int, int]:
    found = re.fullmatch(r"([^,\s]+:\d+),(\d+),(\d+)", text)
    if found is None or int(found[3]) >= int(found[2]):
        raise Refused(
            f"job={text!r} must be HOST:PORT,PROCESSES,INDEX with INDEX < PROCESSES, such "
            "as localhost:1234,2,0, or auto"
        )
    address, total, number = found[1], int(found[2]), int(found[3])
    try:
        _reach(address, here=number == 0)
    except (OSError, OverflowError) as fault:
        raise Refused(f"job={text!r}: {address} cannot be used: {fault}") from fault
    return address, total, number


def _reach(address: str, here: bool) -> None:
    """Raises OSError where there is no such host, or its port, if `here`, is taken."""
    host, port = address.rsplit(":", 1)
    socket.getaddrinfo(host.strip("[]"), int(port))
    if here:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(("", int(port)))


def _initialize(*who) -> None:
    # It would swallow SIGTERM, which skillsd_jax.preemption hears.
    jax.config.update("jax_enable_preemption_service", False)
    name = "process {2} of {1} at {0}".format(*who) if who else "this process"
    # Where it waits in vain the runtime aborts, without a word of what was asked.
    waits = (
        f"{name} still waits for the others of the job; it gives up after {JOIN_S} s"
    )
    timer = threading.Timer(
        PATIENCE_S, print, [waits], {"file": sys.stderr, "flush": True}
    )
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            *who,
            initialization_timeout=JOIN_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=HEARTBEAT_S,
        )
    except (ValueError, RuntimeError) as fault:
        raise Refused(
            f"this process cannot join the job: {fault}; give every process "
            "--job=HOST:PORT,PROCESSES,INDEX with an INDEX of its own"
        ) from fault
    finally:
        timer.cancel()


def index() -> int:
    return jax.process_index()


def count() -> int:
    return jax.process_count()


def first() -> bool:
    """Whether this process is the one that tells and writes."""
    return index() == 0


def share(things: Sequence[T]) -> Sequence[T]:
    """This process's part: neighbours stay together, parts differ by one at most."""
    size, parts, number = len(things), count(), index()
    return things[size * number // parts : size * (number + 1) // parts]


def gather(value: T) -> list[T]:
    """Every process's value, in the order of the processes."""
    if count() == 1:
        return [value]
    return [pickle.loads(each) for each in _exchanged(pickle.dumps(value))]


def merge(found: Mapping[int, T]) -> dict[int, T]:
    """What every process found, in the order of the keys."""
    everything = {}
    for part in gather(dict(found)):
        everything |= part
    return dict(sorted(everything.items()))


def told(make: Callable[[], T]) -> T:
    """What `make` gives in the first process; the others do not call it.

    An OSError or ValueError of it is raised in all.
    """
    if count() == 1:
        return make()
    found, fault = None, None
    if first():
        try:
            found = make()
        except (OSError, ValueError) as raised:
            fault = raised
    found, fault = gather((found, fault))[0]
    if fault is not None:
        raise fault
    return found


def in_turn(make: Callable[[], T]) -> T:
    """What `make` gives here. The others find what it leaves in the first process."""
    found = [make()] if first() else []
    gather(None)
    return found[0] if found else make()


def all_pass(check: Callable[[], None]) -> None:
    """Calls `check` in every process; what one refuses all refuse.

    Raises:
      Refused: what the first that refuses says.
    """
    fault = None
    try:
        check()
    except Refused as refusal:
        fault = refusal
    for each in gather(fault):
        if each is not None:
            raise each


def check_same(facts: Mapping[str, Any]) -> None:
    """Raises Refused unless every process has the same plain values by these names."""
    everywhere = gather(dict(facts))
    for name in facts:
        values = [each.get(name) for each in everywhere]
        if any(value != values[0] for value in values):
            seen = ", ".join(f"process {i}: {each!r}" for i, each in enumerate(values))
            raise Refused(f"{name} differs between the processes of the job: {seen}")


def _exchanged(mine: bytes) -> list[bytes]:
    """Every process's bytes.

    All send as many as the longest message has, up to a power of two: every length is a
    program to compile.
    """
    sizes = multihost_utils.process_allgather(np.array([len(mine)], np.int32))
    sizes = np.reshape(sizes, -1)
    most = max(SHORTEST, 1 << int(sizes.max() - 1).bit_length())
    padded = np.zeros(most, np.uint8)
    padded[: len(mine)] = np.frombuffer(mine, np.uint8)
    everything = multihost_utils.process_allgather(padded)
    rows = np.reshape(everything, (count(), -1))
    return [row[:size].tobytes() for row, size in zip(rows, sizes)]
