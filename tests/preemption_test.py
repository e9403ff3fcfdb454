import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from skillsd_jax import preemption
from skillsd_jax.validation import Stopped


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)  # a handler of Python runs between two of its steps


def test_a_signal_is_remembered_and_the_handler_before_comes_back():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("before"))
    try:
        with preemption.Notice() as notice:
            assert not notice.given
            terminate()
            assert notice.given and heard == []
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        terminate()
        assert heard == ["before"]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_signal_ends_the_process_at_once():
    program = (
        "import os, signal, time\n"
        "from skillsd_jax import preemption\n"
        "with preemption.Notice():\n"
        "    for _ in range(2):\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(0.1)\n"
        "        print('alive', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.stdout == "alive\n"


def test_outside_the_main_thread_the_signal_is_left_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def heard():
        with preemption.Notice() as notice:
            seen.append((notice.given, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=heard)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


def test_stopping_says_where_and_ends_as_a_terminated_program():
    said = []
    with pytest.raises(Stopped) as stop:
        preemption.Notice().stop(7, said.append)
    assert stop.value.code == 143
    assert said == ["stopped after iteration 7; rerun the same command to go on"]
