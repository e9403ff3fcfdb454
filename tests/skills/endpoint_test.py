"""Claims about a server as the writer of skills: bounded, counted, and no key anywhere."""

import dataclasses
import errno
import json
import os
import resource
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc

import pytest

from skillsd_jax.skills import endpoint, exchange, recording, replies, written
from skillsd_jax.skills.asking import Endpoint
from skillsd_jax.skills.endpoint import Writer
from skillsd_jax.skills.recording import Exchange, Recording
from skillsd_jax.skills.replies import FAILURES
from skillsd_jax.skills.summarizer import Group
from skillsd_jax.skills.written import Room, Unreadable
from skillsd_jax.trajectory import Task, Trajectory, Turn
from tests.skills.server import INJECTED, KEY, serving, skill

PATIENCE_S = 10.0  # of a busy machine, and far below what a hang takes here
QUICK = {"timeout_s": PATIENCE_S, "backoff_s": 0.001, "retries": 0, "max_wait_s": 0.05}
WORDS = Room(100, lambda text: len(text.split()))


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def settings(server_or_url, **options):
    url = getattr(server_or_url, "url", server_or_url)
    return Endpoint(url, "m", **QUICK | options)


def episode(seed):
    task = Task("household", seed, "train", "pick", "take the apple")
    turns = (Turn("a shelf", "", "take apple 1", True, True, 1.0),)
    return Trajectory(task, turns, (), 1.0, True, "success")


def ask(server_or_url, requests=("write",), **options):
    """The answers and the counts."""
    with Writer(settings(server_or_url, **options)) as writer:
        return writer.write(list(requests)), writer.counts


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_request_is_one_user_message_with_the_key_in_its_header():
    with serving("good") as server:
        answers, counts = ask(server, seed=3, temperature=0.5, max_tokens=77)
    assert answers == [skill()]
    assert counts == {"asked": 1, "answered": 1}
    assert server.asked == [
        {
            "path": "/v1/chat/completions",
            "model": "m",
            "messages": [{"role": "user", "content": "write"}],
            "temperature": 0.5,
            "max_tokens": 77,
            "seed": 3,
        }
    ]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert server.headers[0]["Host"] == f"127.0.0.1:{server.server_port}"


def test_a_local_server_needs_no_key(monkeypatch):
    monkeypatch.setenv("OTHER", "another-key")
    with serving("good") as server:
        ask(server, key_variable="")
        ask(server, key_variable="OTHER")
        monkeypatch.delenv("OPENAI_API_KEY")
        ask(f"{server.url}/")
    keys = [headers.get("Authorization") for headers in server.headers]
    assert keys == [None, "Bearer another-key", None]
    assert "seed" not in server.asked[0]
    assert server.asked[2]["path"] == "/v1/chat/completions"


def test_answers_come_in_the_order_asked_and_so_few_at_once():
    requests = [f"request {n}" for n in range(12)]
    with (
        serving("gated") as server,
        Writer(settings(server, concurrency=3)) as writer,
    ):
        handle = writer.submit(requests)
        while server.at_once < 3:
            time.sleep(0.005)
        time.sleep(0.05)  # for a fourth, if there were one
        assert len(server.asked) == 3
        server.gate.set()
        assert handle.result(PATIENCE_S) == [f"re: {request}" for request in requests]
        assert writer.counts == {"asked": 12, "answered": 12}
    assert server.most_at_once == 3


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("slow", "timeout"),
        ("drips", "timeout"),
        ("drips_headers", "timeout"),
        ("continues", "timeout"),
        ("hangs_up", "network"),
        ("breaks_off", "network"),
        ("no_http", "network"),
        ("not_json", "not_json"),
        ("html", "not_json"),
        ("bytes_of_no_text", "not_json"),
        ("deep", "not_json"),
        ("empty", "not_json"),
        ("ten_megabytes", "too_large"),
        ("endless", "too_large"),
        ("no_choices", "no_choice"),
        ("no_content", "no_choice"),
        ("a_list", "no_choice"),
        ("odd_choices", "no_choice"),
        ("digits", "no_choice"),
        ("redirects", "redirect"),
        ("denies", "denied"),
        ("bad_request", "status"),
    ],
)
def test_a_server_that_misbehaves_is_a_counted_failure(behaviour, reason):
    limit = 0.3 if reason == "timeout" else PATIENCE_S
    begun = time.monotonic()
    with serving(behaviour) as server:
        answers, counts = ask(server, timeout_s=limit)
        spent = time.monotonic() - begun
    assert answers == [None]
    assert counts == {"asked": 1, reason: 1} and reason in FAILURES
    assert len(server.asked) == 1
    assert spent < PATIENCE_S


def test_a_server_that_is_not_there_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        answers, counts = ask(f"http://127.0.0.1:{taken.getsockname()[1]}/v1")
    assert (answers, counts) == ([None], {"asked": 1, "refused": 1})


def test_https_is_not_spoken_in_the_clear():
    with serving("good") as server:
        answers, counts = ask(server.url.replace("http:", "https:"))
    assert (answers, counts) == ([None], {"asked": 1, "network": 1})
    assert server.asked == []


def test_a_handshake_that_never_ends_has_the_deadline_too():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}/v1"
        begun = time.monotonic()
        answers, counts = ask(url, timeout_s=0.2)
    assert (answers, counts) == ([None], {"asked": 1, "timeout": 1})
    assert time.monotonic() - begun < PATIENCE_S


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate")
def test_https_asks_whom_it_trusts_and_has_the_deadline_too(tmp_path, monkeypatch):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-nodes", "-days", "1", "-newkey", "ec"]
        + ["-pkeyopt", "ec_paramgen_curve:prime256v1"]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        + ["-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )
    trusting = ssl.create_default_context(cafile=str(certificate))

    def asked(behaviour, host, context, timeout_s=PATIENCE_S):
        monkeypatch.setattr(exchange, "_context", lambda: context)
        served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        served.load_cert_chain(certificate, key)
        with serving(behaviour) as server:
            server.socket = served.wrap_socket(server.socket, server_side=True)
            url = f"https://{host}:{server.server_port}/v1"
            answers, counts = ask(url, timeout_s=timeout_s)
            return answers, counts

    good = ([skill()], {"asked": 1, "answered": 1})
    refused = ([None], {"asked": 1, "network": 1})
    assert asked("good", "localhost", trusting) == good
    assert asked("good", "127.0.0.1", trusting) == refused  # another name
    assert asked("good", "localhost", ssl.create_default_context()) == refused
    begun = time.monotonic()
    dripped = ([None], {"asked": 1, "timeout": 1})
    assert asked("drips", "localhost", trusting, 0.5) == dripped
    assert time.monotonic() - begun < PATIENCE_S


@pytest.mark.parametrize("behaviour", ["fails_then_works", "limits_then_works"])
def test_what_may_go_better_is_tried_again(behaviour):
    with serving(behaviour, times=2) as server:
        answers, counts = ask(server, retries=2)
        assert answers == [skill()]
        assert counts == {"asked": 1, "answered": 1, "retried": 2}
    with serving(behaviour, times=3) as server:
        answers, counts = ask(server, retries=2)
        assert answers == [None]
        assert counts == {"asked": 1, "status": 1, "retried": 2}


@pytest.mark.parametrize(
    ("behaviour", "tries"),
    [("hangs_up", 3), ("denies", 1), ("bad_request", 1), ("html", 1), ("redirects", 1)],
)
def test_what_will_not_go_better_is_not_tried_again(behaviour, tries):
    with serving(behaviour) as server:
        ask(server, retries=2)
    assert len(server.asked) == tries


@pytest.mark.parametrize(
    ("status", "again"),
    [(408, True), (409, True), (429, True), (500, True), (503, True), (599, True)]
    + [(status, False) for status in (204, 302, 400, 401, 403, 404, 422)],
)
def test_which_statuses_are_tried_again(status, again):
    with pytest.raises(exchange.Failed) as caught:
        replies.content(exchange.Reply(status))
    assert isinstance(caught.value, replies.Again) == again


def test_pauses_double_are_bounded_and_the_same_in_every_run():
    patient = settings("http://h/v1", backoff_s=1.0, max_wait_s=20.0)
    again = replies.Again("status")

    def pauses(hash):
        return [replies.pause_s(patient, hash, n, again) for n in (0, 1, 2, 3, 9, 5000)]

    for n, pause in enumerate(pauses("a")[:4]):
        assert 2**n / 2 <= pause <= 2**n
    assert pauses("a")[4:] == [20.0, 20.0]
    assert pauses("a") == pauses("a") != pauses("b")


@pytest.mark.parametrize(
    ("header", "expected"),
    [("7", 7.0), (" 0 ", 0.0), ("999999999999", 20.0), ("-1", 0.0), ("nan", 0.0)]
    + [("", 0.0), ("٣", 0.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)],
)
def test_a_server_may_ask_for_a_longer_pause(header, expected):
    patient = settings("http://h/v1", backoff_s=0.0, max_wait_s=20.0)
    again = replies.Again("status", exchange.seconds(header))
    assert replies.pause_s(patient, "a", 0, again) == expected


def test_a_redirect_gets_nothing():
    with (
        serving("good") as elsewhere,
        serving("redirects", times=elsewhere.server_port) as server,
    ):
        answers, counts = ask(server, retries=1)
    assert (answers, counts) == ([None], {"asked": 1, "redirect": 1})
    assert elsewhere.asked == []


def test_injected_text_comes_back_as_text_and_harmless():
    with serving("injects") as server:
        (answer,), _ = ask(server)
    assert json.loads(answer)["success_analysis"] == INJECTED
    fields = written.parse(answer, WORDS)
    assert "</skill>" not in fields.success_analysis
    assert "<|im_start|>" not in "".join(fields.golden_workflow)


BEHAVIOURS = ("good", "denies", "tells_the_key", "redirects", "breaks_off", "no_http")


def test_the_key_is_in_no_file_text_or_error(tmp_path, capfd, caplog):
    texts = []
    for behaviour in BEHAVIOURS:
        record = tmp_path / behaviour / "recording.jsonl"
        with serving(behaviour) as server:
            chosen = settings(server, record=str(record), retries=1)
            with Writer(chosen) as writer:
                handle = writer.submit(["write"])
                texts += [str(handle.result(PATIENCE_S)), writer.counts, vars(writer)]
                texts += [repr(writer), repr(handle), repr(chosen)]
            texts += [dataclasses.asdict(chosen), vars(handle)]
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"  # it was sent
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == len(BEHAVIOURS) and all(f.stat().st_size for f in files)
    assert not any(KEY.encode() in file.read_bytes() for file in files)
    said = capfd.readouterr()
    assert KEY not in f"{texts} {said.out} {said.err} {caplog.text}"
    assert (
        "the key is (key)" in (tmp_path / "tells_the_key/recording.jsonl").read_text()
    )


def test_a_failure_quotes_nothing_of_the_exchange():
    headers = {"Authorization": f"Bearer {KEY}"}
    with serving("no_http") as server, exchange.Deadline(PATIENCE_S) as deadline:
        target = exchange.Target.of(server.url)
        with pytest.raises(exchange.Failed) as caught:
            exchange.post(target, b"{}", headers, 10, deadline)
    assert caught.value.__suppress_context__ and caught.value.__cause__ is None
    assert str(caught.value) == "network"


@pytest.mark.parametrize(
    "spelled",
    [
        KEY,
        KEY.replace("s", "\\u0073"),
        KEY.replace("k", "\\u006B").replace("v", "\\u0076"),
        "".join(f"\\u{ord(c):04x}" for c in KEY),
        json.dumps(json.dumps("".join(f"\\u{ord(c):04x}" for c in KEY)))[1:-1],
        f"\\{KEY}",
    ],
)
def test_the_key_does_not_come_back_however_json_spells_it(spelled):
    scrub = settings("http://h/v1").scrub
    assert (
        scrub(f"[{spelled}] and {spelled}.").replace('\\"', "") == "[(key)] and (key)."
    )


def test_a_short_key_is_none_and_nothing_else_is_touched(monkeypatch):
    scrub = settings("http://h/v1").scrub
    assert scrub(text := skill() + KEY[:-1] + "\\u0073\\\\") == text
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    assert scrub("EMPTY") == "EMPTY"


@pytest.mark.parametrize("noise", ["\\", "\\u005c", "\\u005", "s\\", "a"])
@pytest.mark.parametrize("secret", [KEY, "\\" * 40])
def test_hostile_text_is_scrubbed_in_linear_time(noise, secret, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    begun = time.process_time()
    settings("http://h/v1").scrub(noise * (1_000_000 // len(noise)))
    assert time.process_time() - begun < 15


def test_a_field_that_becomes_the_key_is_scrubbed():
    hidden = "\\u200b".join(KEY)
    answer = skill(success_analysis="§", mistake_analysis="§", golden_workflow=["- §"])
    answer = answer.replace("\\u00a7", hidden)
    fields = written.parse(answer, WORDS, settings("http://h/v1").scrub)
    assert fields == written.Fields("(key)", "(key)", ("(key)",))
    assert written.parse(answer, WORDS).success_analysis == KEY


@pytest.mark.parametrize("value", ["two words", "line\nend", "schlüssel", "a\x7f"])
def test_a_key_that_cannot_be_sent_is_refused_and_not_repeated(value, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", value)
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds spaces") as caught:
        Writer(settings("http://h/v1"))
    assert value not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "ftp://h/v1"}, "url must be http://HOST"),
        ({"url": "file:///etc/passwd"}, "must be http://HOST"),
        ({"url": "localhost:8000"}, "must be http://HOST"),
        ({"url": "http://"}, "must be http://HOST"),
        ({"url": ""}, "must be http://HOST"),
        ({"url": "http://h/a b"}, "must be http://HOST"),
        ({"url": "http://h:port"}, "url is no address"),
        ({"url": "http://h:99999"}, "url is no address"),
        ({"url": f"http://{'h' * 70}"}, "url is no address"),
        ({"url": f"http://me:{KEY}@h/v1"}, "url holds a user name"),
        ({"url": f"me:{KEY}@h/v1"}, "url holds a user name"),
        ({"url": f"http:/me:{KEY}@h/v1"}, "url holds a user name"),
        ({"url": f"http://me:{KEY}%40h/v1"}, "url is no address"),
        ({"url": f"http://h/v1?key={KEY}"}, "url holds .* a query"),
        ({"url": f"h/v1?token={KEY}"}, "url holds .* a query"),
        ({"url": KEY}, "url must be http://HOST"),
        ({"model": ""}, "model is not set"),
        ({"timeout_s": 0.0}, "timeout_s=0.0 must be more than 0"),
        ({"timeout_s": float("nan")}, "timeout_s=nan must be"),
        ({"timeout_s": float("inf")}, "timeout_s=inf must be at most"),
        ({"max_bytes": 0}, "max_bytes=0 must be more than 0"),
        ({"concurrency": 0}, "concurrency=0 must be more than 0"),
        ({"retries": -1}, "retries=-1 must be 0 or more"),
        ({"temperature": float("inf")}, "temperature=inf must be finite"),
        ({"key_variable": KEY}, "key_variable is no name"),
        ({"record": "a", "replay": "b"}, "record and replay are both set"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        Endpoint(**{"url": "http://h/v1", "model": "m"} | options)
    assert KEY not in str(caught.value)


def test_a_recording_is_replayed_without_a_network(tmp_path):
    path = tmp_path / "new" / "recording.jsonl"
    with serving("counts") as server:
        first = ask(server, "ab", concurrency=1, record=str(path))
    assert first[0] == ["answer 1", "answer 2"]
    assert [line["request"] for line in lines(path)] == ["a", "b"]
    before = path.read_bytes()
    answers, counts = ask("http://127.0.0.1:1/v1", "abaac", replay=str(path))
    assert answers == ["answer 1", "answer 2", "answer 1", "answer 1", None]
    assert counts == {"asked": 5, "answered": 4, "not_recorded": 1}
    assert path.read_bytes() == before


def test_what_a_recording_answers_is_not_sent_again(tmp_path):
    path = tmp_path / "recording.jsonl"
    with serving("counts") as server:
        ask(server, "ab", concurrency=1, record=str(path))
        path.write_bytes(path.read_bytes()[:-30])  # killed within the line of b
        answers, counts = ask(server, "abc", concurrency=1, record=str(path))
    assert answers == ["answer 1", "answer 3", "answer 4"]
    assert counts == {"asked": 3, "answered": 3}
    assert [line["request"] for line in lines(path)] == ["a", "b", "c"]


def test_twins_are_sent_once_and_have_one_answer():
    with (
        serving("gated") as server,
        Writer(settings(server, concurrency=3)) as writer,
    ):
        handles = [writer.submit(["a", "b", "a"]), writer.submit(["b"])]
        while server.at_once < 2:
            time.sleep(0.005)
        handles.append(writer.submit("ba"))
        server.gate.set()
        answers = [handle.result(PATIENCE_S) for handle in handles]
        later = writer.write("ab")
        assert writer.counts == {"asked": 8, "answered": 8}
    a, b = "re: a", "re: b"
    assert answers == [[a, b, a], [b], [b, a]] and later == [a, b]
    assert len(server.asked) == 2


def test_twins_of_a_failure_all_have_it_and_it_is_tried_when_asked_again(tmp_path):
    path = tmp_path / "recording.jsonl"
    with (
        serving("fails_then_works", times=1) as server,
        Writer(settings(server, record=str(path))) as writer,
    ):
        assert writer.write("aaa") == [None] * 3
        assert writer.counts == {"asked": 3, "status": 3}
        assert writer.write("a") == [skill()]
        server.times = 3
        assert writer.write("b") == [None]
        writer.close()
        assert ask(server, "b", record=str(path))[0] == [skill()]
    assert len(server.asked) == 4
    assert [line["failure"] for line in lines(path)] == ["status", "", "status", ""]
    assert ask("http://h/v1", "aa", replay=str(path))[0] == [skill()] * 2


def test_an_answer_is_recorded_before_it_is_handed_out(tmp_path, monkeypatch):
    path, held = tmp_path / "recording.jsonl", threading.Event()
    append = Recording.append

    def slowly(self, done):
        held.wait(PATIENCE_S)
        append(self, done)

    monkeypatch.setattr(Recording, "append", slowly)
    with (
        serving("good") as server,
        Writer(settings(server, record=str(path))) as writer,
    ):
        handle = writer.submit(["a"])
        while not server.asked:
            time.sleep(0.005)
        with pytest.raises(TimeoutError):
            handle.result(0.05)
        held.set()
        handle.result(PATIENCE_S)
        assert len(lines(path)) == 1


def test_what_an_answer_depends_on_is_part_of_what_is_recorded(tmp_path):
    path = str(tmp_path / "recording.jsonl")
    with serving("good") as server:
        ask(server, record=path, seed=1)
    assert ask("http://elsewhere/v1", replay=path, seed=1)[0] == [skill()]
    for other in ({"seed": 2}, {"seed": 1, "temperature": 0.1}, {"max_tokens": 9}):
        _, counts = ask("http://elsewhere/v1", replay=path, **other)
        assert counts == {"asked": 1, "not_recorded": 1}


def test_failures_are_recorded_and_replayed(tmp_path):
    path = tmp_path / "recording.jsonl"
    with serving("html") as server:
        ask(server, record=str(path))
    assert (lines(path)[0]["answer"], lines(path)[0]["failure"]) == (None, "not_json")
    answers, counts = ask("http://h/v1", replay=str(path))
    assert (answers, counts) == ([None], {"asked": 1, "not_json": 1})


def test_a_request_has_its_first_answer_and_a_failure_only_for_want_of_one(tmp_path):
    path = tmp_path / "recording.jsonl"
    file = Recording(path)
    for hash, answer in [("a", "1"), ("a", None), ("a", "2"), ("b", None), ("c", None)]:
        file.append(Exchange(hash, "r", answer, "" if answer else f"f{hash}"))
    file.append(Exchange("c", "r", None, "later"))
    file.append(Exchange("b", "r", "3"))
    found = recording.read(path)
    assert {hash: done.answer for hash, done in found.items()} == {
        "a": "1",
        "b": "3",
        "c": None,
    }
    assert found["c"].failure == "fc"


def exchanges(path, count=3):
    file = Recording(path)
    for n in range(count):
        file.append(Exchange(f"h{n}", "é\u2028\ud800", f"answer {n}"))
    file.close()


def test_a_second_run_at_a_time_does_not_record_to_the_same_file(tmp_path):
    path = tmp_path / "recording.jsonl"
    chosen = settings("http://127.0.0.1:1/v1", record=str(path))
    code = (
        "import sys\n"
        "from skillsd_jax.skills.recording import Recording\n"
        "held = Recording(sys.argv[1])\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"^record: {path} is being recorded to"):
            endpoint.check(chosen)
        with pytest.raises(ValueError, match=f"^{path} is being recorded to by anoth"):
            Writer(chosen)
        recording.read(path)  # may be read meanwhile
        other.communicate()
    with Writer(chosen), pytest.raises(ValueError, match="or name another file"):
        Writer(chosen)
    endpoint.check(chosen)
    exchanges(path)
    path.write_bytes(b"{}\n" + path.read_bytes())
    with pytest.raises(ValueError, match="line 1 is damaged"):
        Writer(chosen)
    Recording(path).close()  # a writer that came to nothing holds nothing


@pytest.mark.parametrize("fault", [None, errno.ENOLCK, errno.EOPNOTSUPP])
def test_where_there_are_no_locks_it_is_recorded_without(fault, tmp_path, monkeypatch):
    class Locks:
        LOCK_EX = LOCK_NB = 0

        def flock(self, *_):
            raise OSError(fault, "no locks")

    monkeypatch.setattr(recording, "fcntl", fault and Locks())
    exchanges(path := tmp_path / "recording.jsonl")
    recording.check(path)
    assert len(lines(path)) == 3


def test_a_failed_append_leaves_the_file_as_it_was(tmp_path):
    exchanges(path := tmp_path / "recording.jsonl")
    before = path.read_bytes()
    file = Recording(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 40, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            file.append(Exchange("long", "r" * 100, "a"))
        left = path.read_bytes()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left == before
    file.append(Exchange("h9", "r", "a"))
    assert list(recording.read(path)) == ["h0", "h1", "h2", "h9"]


def test_what_could_not_be_recorded_is_asked_again(tmp_path, monkeypatch):
    path, append = tmp_path / "recording.jsonl", Recording.append

    def full(*_):
        raise OSError(errno.ENOSPC, "no space")

    with (
        serving("counts") as server,
        Writer(settings(server, record=str(path))) as writer,
    ):
        monkeypatch.setattr(Recording, "append", full)
        with pytest.raises(OSError, match="no space"):
            writer.write("a")
        monkeypatch.setattr(Recording, "append", append)
        assert writer.write("a") == ["answer 2"]
    assert [line["answer"] for line in lines(path)] == ["answer 2"]


def test_a_writer_keeps_no_text_of_what_is_done(tmp_path):
    path, long = tmp_path / "recording.jsonl", "request " * 100
    with (
        serving("good") as server,
        Writer(settings(server, record=str(path))) as writer,
    ):
        writer.write([long])
        assert list(writer._known.values()) == [(skill(), "")]
    with Writer(settings("http://h/v1", replay=str(path))) as writer:
        assert list(writer._known.values()) == [(skill(), "")]


def test_a_recording_is_read_without_being_held_whole(tmp_path):
    file = Recording(path := tmp_path / "recording.jsonl")
    for n in range(20):
        file.append(Exchange(f"h{n}", "r" * 1_000_000, "a"))
    file.close()
    tracemalloc.start()
    assert len(recording.read(path)) == 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000  # of 20


def test_the_rest_of_a_crash_is_passed_over_and_written_over(tmp_path):
    path = tmp_path / "recording.jsonl"
    exchanges(path)
    whole = path.read_bytes()
    for cut in (1, 20, len(whole) // 3 - 1):
        path.write_bytes(whole[:-cut])
        found = recording.read(path)
        assert found["h1"].answer == "answer 1"
        assert ("h2" not in found) == (cut > 1)
    Recording(path).append(Exchange("h9", "r", None, "timeout"))
    assert [line["hash"] for line in lines(path)] == ["h0", "h1", "h9"]
    path.write_bytes(whole[:-1] + b"\x00garbage\n")
    assert "h2" not in recording.read(path)


def test_a_long_rest_of_a_crash_is_found_and_cut(tmp_path):
    path = tmp_path / "recording.jsonl"
    exchanges(path, 1)
    whole = path.read_bytes()
    path.write_bytes(whole + b"x" * 200_000)
    Recording(path)
    assert path.read_bytes() == whole
    path.write_bytes(b"x" * 200_000)
    Recording(path)
    assert path.read_bytes() == b""


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b"[1]", b"null", b'{"hash": "h"}', b"\xff", b"[" * 100_000]
    + [
        json.dumps(dataclasses.asdict(Exchange("h", "r", answer, failure))).encode()
        for answer, failure in [(None, ""), ("a", "timeout"), (1, ""), (1, "timeout")]
    ],
)
@pytest.mark.parametrize("where", [0, 1])
def test_a_damaged_line_is_named(line, where, tmp_path):
    path = tmp_path / "recording.jsonl"
    exchanges(path, 2)
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*whole[:where], line + b"\n", *whole[where:]]))
    with pytest.raises(ValueError, match=f"jsonl line {where + 1} is damaged"):
        Writer(settings("http://h/v1", replay=str(path)))


def test_what_a_writer_needs_is_checked_without_a_trace(tmp_path, monkeypatch):
    def fault(**options):
        with pytest.raises(ValueError) as caught:
            endpoint.check(settings("http://h/v1", **options))
        assert KEY not in str(caught.value)
        return str(caught.value)

    exchanges(good := tmp_path / "good.jsonl")
    (bad := tmp_path / "bad.jsonl").write_text("{}\n{}\n")
    before, running = sorted(tmp_path.iterdir()), threading.active_count()
    for options in (
        {},
        {"replay": str(good)},
        {"record": str(good)},
        {"record": str(tmp_path / "new" / "deep" / "file")},
    ):
        endpoint.check(settings("http://h/v1", **options))
    assert "replay: there is no recording" in fault(replay=str(tmp_path / "none"))
    assert fault(replay=str(bad)).startswith(f"replay: {bad} line 1 is damaged")
    assert fault(record=str(bad)).startswith(f"record: {bad} line 1 is damaged")
    assert "cannot be written: Not a directory" in fault(record=str(good / "file"))
    assert fault(record=str(tmp_path)).startswith(f"record: {tmp_path} is no file")
    assert "record: /proc/none cannot be written" in fault(record="/proc/none")
    os.mkfifo(pipe := tmp_path / "pipe")
    assert "is no file" in fault(record=str(pipe))
    pipe.unlink()
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY} x")
    assert fault().startswith("key_variable: OPENAI_API_KEY holds spaces")
    endpoint.check(settings("http://h/v1", replay=str(good)))
    assert sorted(tmp_path.iterdir()) == before
    assert threading.active_count() == running


def test_a_recording_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no recording .*none.jsonl"):
        Writer(settings("http://h/v1", replay=str(tmp_path / "none.jsonl")))


def test_a_recording_that_cannot_be_written_is_told_where_it_is_waited_for(tmp_path):
    path = tmp_path / "recording.jsonl"
    with (
        serving("good") as server,
        Writer(settings(server, record=str(path))) as writer,
    ):
        path.unlink()
        path.mkdir()
        with pytest.raises(OSError, match=r"recording.jsonl"):
            writer.write(["write"])


def test_one_may_go_on_while_it_is_asked():
    with serving("gated") as server, Writer(settings(server)) as writer:
        handles = [writer.submit([str(n)]) for n in range(3)]
        assert not any(handle.ready() for handle in handles)
        with pytest.raises(TimeoutError, match="1 answers are not there yet"):
            handles[0].result(0.001)
        server.gate.set()
        assert [h.result(PATIENCE_S) for h in handles] == [[f"re: {n}"] for n in "012"]
        assert all(handle.ready() for handle in handles)
        assert handles[0].result() == ["re: 0"]
        assert writer.submit([]).ready() and writer.write([]) == []


def test_close_ends_what_is_under_way_and_what_waits(tmp_path):
    path = tmp_path / "recording.jsonl"
    with serving("slow") as server:
        options = {"timeout_s": 60.0, "retries": 3, "concurrency": 2}
        writer = Writer(settings(server, record=str(path), **options))
        handle = writer.submit("abcda")
        while len(server.asked) < 2:
            time.sleep(0.005)
        begun = time.monotonic()
        writer.close()
        assert handle.result(PATIENCE_S) == [None] * 5
        assert time.monotonic() - begun < PATIENCE_S
    assert writer.counts == {"asked": 5, "closed": 5}
    assert not path.read_bytes()  # nothing became of them
    writer.close()
    with pytest.raises(ValueError, match="the writer is closed"):
        writer.submit(["a"])


def test_close_ends_a_pause():
    with serving("fails_then_works", times=9) as server:
        options = {"retries": 3, "backoff_s": 60.0, "max_wait_s": 60.0}
        writer = Writer(settings(server, **options))
        handle = writer.submit(["a"])
        while "retried" not in writer.counts:
            time.sleep(0.005)
        begun = time.monotonic()
        writer.close()
        assert handle.result(PATIENCE_S) == [None]
        assert time.monotonic() - begun < PATIENCE_S
    assert writer.counts == {"asked": 1, "retried": 1, "closed": 1}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_mistake_of_ours_ends_the_wait(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(replies, "content", broken)
    with serving("good") as server, Writer(settings(server)) as writer:
        handle = writer.submit(["a"] * 9 + list("bcdefg"))
        for late in (handle.result, lambda _: writer.write(["a"])):
            with pytest.raises(RuntimeError, match="a mistake of its own") as caught:
                late(PATIENCE_S)
            assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_what_nobody_waits_for_any_more_is_not_sent(tmp_path):
    path = tmp_path / "recording.jsonl"
    with (
        serving("gated") as server,
        Writer(settings(server, record=str(path), concurrency=1)) as writer,
    ):
        first = writer.submit(["sent"])
        while not server.asked:
            time.sleep(0.005)
        dropped = writer.submit(["dropped", "twin"])
        twin, last = writer.submit(["twin"]), writer.submit(["last"])
        for handle in (first, dropped, dropped):
            handle.cancel()
        assert not last.ready()
        server.gate.set()
        assert twin.result(PATIENCE_S) == ["re: twin"]
        assert last.result(PATIENCE_S) == ["re: last"]
        assert dropped.result(PATIENCE_S) == [None, "re: twin"]
        # What was sent is answered and kept.
        assert writer.counts == {"asked": 3, "answered": 3}
        last.cancel()
        assert writer.write(["sent", "last"]) == ["re: sent", "re: last"]
        assert writer.counts == {"asked": 5, "answered": 5}
    sent = [asked["messages"][0]["content"] for asked in server.asked]
    assert sent == ["sent", "twin", "last"]
    assert [line["request"] for line in lines(path)] == sent


@pytest.mark.parametrize("pausing", [False, True])
def test_what_nobody_waits_for_any_more_is_not_tried_again(pausing):
    options = {"concurrency": 1, "retries": 5, "timeout_s": 0.5, "max_wait_s": 0.5}
    options |= {"backoff_s": 0.5 if pausing else 0.0}
    with serving("slow") as server, Writer(settings(server, **options)) as writer:
        handle = writer.submit(["a"])
        while not (writer.counts.get("retried") if pausing else server.asked):
            time.sleep(0.001)
        handle.cancel()
        assert handle.result(PATIENCE_S) == [None]
        assert len(server.asked) == 1
        assert writer.counts["timeout"] == 1


def test_a_writer_that_is_never_closed_lets_the_process_end():
    code = (
        "import sys\n"
        "from skillsd_jax.skills.endpoint import Endpoint, Writer\n"
        "writer = Writer(Endpoint(sys.argv[1], 'm', timeout_s=60.0))\n"
        "handle = writer.submit(['a'] * 9)\n"
    )
    with serving("slow") as server:
        subprocess.run(
            [sys.executable, "-c", code, server.url],
            check=True,
            timeout=50,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )


def test_a_writer_makes_skills():
    writing = written.Writing("endpoint", WORDS)
    groups = [Group([episode(n)], [f"1/{n}"]) for n in range(3)]
    groups.append(Group([episode(3), episode(3)], ["1/3", "1/4"]))
    requests = [written.Request.of(group, writing.limits) for group in groups]
    with (
        serving("fails_then_works", times=1) as server,
        Writer(settings(server, concurrency=2)) as writer,
    ):
        answers = writer.write([request.text for request in requests[3:]])
        answers = writer.write([request.text for request in requests[:3]]) + answers
    made, outcomes = written.read(requests, answers, writing, born=1)
    assert len(made) == 3 and outcomes == {"made": 3, "failed": 1}
    assert {one.maker for one in made} == {"endpoint"}


def test_an_html_page_as_an_answer_is_no_skill():
    with pytest.raises(Unreadable, match="not_json"):
        written.parse("<html><style>a {b: c}</style></html>", WORDS)
