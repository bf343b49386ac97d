# SPDX-License-Identifier: Apache-2.0
"""What a robot makes of a link that is slow, silent, or gone: neither is a healthy engine taken for a broken one, nor
does a broken one cost the budget."""

from __future__ import annotations

import http.client
import itertools
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.fleet import remote_engine
from adatoken3d_ros.fleet.link import PATIENCE, Address, Link, LinkError, Stopped, Unreachable
from adatoken3d_ros.fleet.remote_engine import _Asking, patience_of
from adatoken3d_ros.fleet.way import Way
from adatoken3d_ros.fleet.wire import RULES, Manifest, heartbeat
from adatoken3d_ros.settings import DEFAULTS
from tests.architectures import NAMES
from tests.fleet.shared import LIMIT, free_port, held_up, listening
from tests.fleet.test_link import robot, show

SCENE = {"scene": Manifest().plain(), "rules": {name: DEFAULTS[name] for name in RULES}}


@given(st.floats(50.0, 60_000.0) | st.just(None), st.floats(0.0, 1.0), st.booleans())
def test_an_engine_that_lives_is_heard_before_its_connection_counts_as_broken(
    budget_ms: float | None, share: float, fallback: bool
) -> None:
    """Whatever is left of the budget, of a short one, too; one that is silent leaves the fallback more than half of a
    budget of a quarter of a second and above."""
    left = share * (budget_ms or 1e6) / 1e3
    patience = patience_of(budget_ms, left, fallback)
    assert 2 * heartbeat(budget_ms) < patience <= PATIENCE
    if budget_ms is not None and budget_ms >= 250.0 and fallback and share == 1.0:
        assert patience < left / 2


@settings(max_examples=50, deadline=None)
@given(st.floats(250.0, 20_000.0), st.booleans(), st.lists(st.floats(0.0, 1.0), min_size=1))
def test_attempts_end_within_the_budget_however_they_fail(
    budget_ms: float, fallback: bool, shares: list[float]
) -> None:
    """Each takes some of its patience; a fallback has more than half of the budget then."""
    now, left, wanting = 100.0, itertools.cycle(shares), Question("What is there?", latency_budget_ms=budget_ms)

    def fails(scene: Any, question: Any, elapsed_ms: float, asking: Any, patience: float, first: bool) -> Any:
        nonlocal now
        now += next(left) * patience
        raise Unreachable("gone")

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    engine: Any = SimpleNamespace(
        clock=lambda: now, attempt=fails, fallback=object() if fallback else None,
        link=SimpleNamespace(way=Way()),
    )  # fmt: skip
    asking = _Asking(engine, SimpleNamespace(), wanting, now, None, None, None)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Unreachable):
        patch.setattr(remote_engine, "time", SimpleNamespace(sleep=sleep))
        asking._reached(wanting)
    assert now - 100.0 <= budget_ms / 1e3 * (0.4 if fallback else 0.9) + 1e-9


def test_lines_come_as_often_as_the_budget_asks_for(
    url_of: Any, tiny_of: Any, replica_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, scene, _ = robot(url_of(NAMES[0]), tiny_of(NAMES[0]))
    show(scene, 0)
    asked: list[float | None] = []
    monkeypatch.setattr("adatoken3d_ros.fleet.wire.heartbeat", lambda budget: (asked.append(budget), 0.001)[1])
    _, heard = held_up(replica_of(NAMES[0]), monkeypatch)
    waits, told = itertools.count(), _Asking.told

    def hear(asking: Any, event: Any) -> None:
        if event["event"] == "wait" and next(waits) > 5:
            heard.set()
        told(asking, event)

    monkeypatch.setattr(_Asking, "told", hear)
    answer = engine.ask(scene, Question("What is there?", latency_budget_ms=50_000.0))
    assert answer.status.answered and heard.is_set() and set(asked) == {50_000.0}


@pytest.mark.parametrize("patience", [PATIENCE, 0.5])
def test_a_slow_link_has_to_move_and_no_more_where_no_budget_ends(
    patience: float, url_of: Any, tiny_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket's timeout counts for all of what it is given at once: megabytes over a slow radio would never be there.
    With less patience all has to be there in time, or the fallback would come late."""
    engine, _, _ = robot(url_of(NAMES[0]), tiny_of(NAMES[0]))
    given: list[int] = []
    send = http.client.HTTPConnection.send
    monkeypatch.setattr(
        http.client.HTTPConnection, "send", lambda self, data: (given.append(len(data)), send(self, data))[1]
    )
    with pytest.raises(LinkError, match="no body"):
        engine.link.put("slow", {"model": engine.model.identity, **SCENE}, [bytes(2**21)], patience)
    assert sum(given) > 2**21 and (max(given) <= 2**16) is (patience == PATIENCE)


@pytest.mark.parametrize("patience", [PATIENCE, 4.0])
def test_an_engine_is_waited_for_in_what_sending_has_left_of_a_budget(
    patience: float, url_of: Any, tiny_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link that takes a request slowly and is gone then would else cost nearly twice as much."""
    engine, _, _ = robot(url_of(NAMES[0]), tiny_of(NAMES[0]))
    now, waits = 0.0, list[float]()
    request, respond = http.client.HTTPConnection.request, http.client.HTTPConnection.getresponse

    def slowly(*of: Any, **more: Any) -> None:
        nonlocal now
        request(*of, **more)
        now += 0.5

    def responds(connection: Any) -> Any:
        waits.append(connection.sock.gettimeout())
        return respond(connection)

    monkeypatch.setattr("adatoken3d_ros.fleet.link.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(http.client.HTTPConnection, "request", slowly)
    monkeypatch.setattr(http.client.HTTPConnection, "getresponse", responds)
    engine.link.put("slow", {"model": engine.model.identity, **SCENE}, [], patience)
    assert waits == [PATIENCE if patience == PATIENCE else 3.5]


def test_bodies_that_take_many_requests_come_within_a_questions_patience_and_end_with_it(
    url_of: Any, tiny_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, scene, _ = robot(url_of(NAMES[0]), tiny_of(NAMES[0]))
    show(scene, 0, 1, 2)
    engine._most = 1  # bytes of a request: a body each
    given: list[float] = []
    put = engine.link.put
    monkeypatch.setattr(engine.link, "put", lambda *of: (given.append(of[3]), put(*of))[1])
    gone = engine.ask(scene, Question("What is there?"), should_stop=lambda: len(given) == 2)
    assert gone.status == Status.CANCELLED and given == [PATIENCE] * 2
    answer = engine.ask(scene, Question("What is there?", latency_budget_ms=4000.0))
    # The one that was broken off may have come.
    assert answer.status.answered and 3 <= len(given) <= 4 and 0 < given[-1] <= 0.6 * 4.0, answer.status_message


def test_one_slow_exchange_is_no_slow_link_and_a_slow_link_is_soon_known() -> None:
    way = Way()
    assert way.seconds == 0.0
    way.met(0.5)
    for _ in range(9):
        way.exchanged(0.01)
    way.exchanged(5.0)
    assert way.seconds == 0.01
    way.answered(0.06)  # 0.01 s of it are an exchange's
    assert way.seconds == pytest.approx(0.06)
    for _ in range(4):
        way.exchanged(5.0)
    assert way.seconds == pytest.approx(5.05)
    way.met(0.5)
    assert way.seconds == 0.5


def test_the_networks_share_of_a_budget_follows_the_link(
    url_of: Any, tiny_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By every exchange, and by how much longer than the engine needed a question took until all of it was here."""
    engine, scene, _ = robot(url_of(NAMES[0]), tiny_of(NAMES[0]))
    show(scene, 0)
    sent: list[float] = []
    ask, read, late = engine.link.ask, remote_engine.read_done, 0.0

    def asked(name: str, content: Any, *of: Any, **more: Any) -> Any:
        sent.append(content["elapsed_ms"])
        return ask(name, content, *of, **more)

    def slowly(*of: Any) -> Any:
        nonlocal late
        late += 300.0
        return read(*of)

    monkeypatch.setattr(engine.link, "ask", asked)
    assert engine.ask(scene, Question("What is there?")).status.answered
    monkeypatch.setattr(engine.link, "_clock", itertools.count(0.0, 100.0).__next__)  # each takes 100 s from now on
    for _ in range(9):
        assert engine.ask(scene, Question("What is there?")).status.answered
    assert max(sent[:3]) < 100e3 < min(sent[-2:]) < 200e3
    monkeypatch.setattr(engine, "clock", lambda: time.monotonic() + late)
    monkeypatch.setattr(remote_engine, "read_done", slowly)
    for _ in range(9):
        assert engine.ask(scene, Question("What is there?")).status.answered
    assert 300e3 < sent[-1] < 400e3  # 100 s there, 200 s more for the rest of the answer


def test_a_link_that_was_slow_is_tried_again_where_its_way_takes_all_of_a_budget(url_of: Any, tiny_of: Any) -> None:
    """What is refused measures no answer's way: it would be refused for ever."""
    engine, scene, _ = robot(url_of(NAMES[0]), tiny_of(NAMES[0]))
    show(scene, 0)
    for _ in range(9):
        engine.link.way.answered(100.0)
    found = [engine.ask(scene, Question("What is there?", latency_budget_ms=60e3)) for _ in range(10)]
    assert [one.status for one in found[:9]] == [Status.BUDGET_INFEASIBLE] * 9
    assert found[9].status.answered and engine.link.way.seconds < 60.0


def test_a_name_that_nobody_looks_up_any_more_costs_no_budget(
    tiny_of: Any, replica_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without a network, where a resolver waits for many seconds: the engine is asked where it was, else the
    fallback answers in time."""
    name, silent, port = NAMES[0], threading.Event(), free_port()
    look = socket.getaddrinfo

    def lookup(host: Any, *of: Any, **more: Any) -> Any:
        return silent.wait(LIMIT) if host == "gpu.test" and silenced else look("127.0.0.1", *of, **more)

    silenced = False
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    question = Question("What is there?", latency_budget_ms=4000.0)
    with listening(replica_of(name), port):
        engine, scene, settings = robot(
            f"http://gpu.test:{port}", tiny_of(name), **{"engine.fallback": str(tiny_of(NAMES[1]))}
        )
        show(scene, 0)
        assert engine.ask(scene, question).model_id.startswith(f"tiny-{name}")
        silenced = True
        assert engine.ask(scene, question).model_id.startswith(f"tiny-{name}")
    engine.link._names._known = []  # as of a robot that starts there
    answer = engine.ask(scene, question)
    silent.set()
    assert answer.status.answered and answer.model_id.startswith(f"tiny-{NAMES[1]}"), answer.status_message
    assert "the name 'gpu.test' was not found within" in answer.status_message


@pytest.mark.parametrize("first", ["of no family that is here", "silent"])
def test_an_address_that_does_not_do_leaves_the_next_one_its_time(first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a name that has one of IPv6, too, where only IPv4 works."""
    connect, waits = socket.socket.connect, list[float | None]()

    class Socket(socket.socket):
        def connect(self, where: Any) -> None:
            waits.append(self.gettimeout())
            if len(waits) == 1 and first == "silent":
                raise TimeoutError("timed out")
            connect(self, where)

    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        there.listen()
        found = (socket.AF_INET, socket.SOCK_STREAM, 0, "", there.getsockname())
        family = socket.AF_INET if first == "silent" else 2**15
        monkeypatch.setattr(socket, "getaddrinfo", lambda *of, **more: [(family, *found[1:]), found])
        monkeypatch.setattr(socket, "socket", Socket)
        watch: Any = SimpleNamespace(over=lambda one: None, look=lambda: None)
        Link(Address("http://gpu.test:8000"))._names.connected(LIMIT, watch).close()
    assert waits[-1] is not None and waits[-1] > LIMIT / 2
    if first == "silent":
        assert waits[0] is not None and waits[0] <= LIMIT / 2


@pytest.fixture(params=["looking the name up", "connecting", "the handshake", "waiting for a response"])
def nowhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address at which nothing gets further than this."""
    scheme = "https" if request.param == "the handshake" else "http"
    with socket.socket() as one, ExitStack() as stack:
        one.bind(("127.0.0.1", 0))
        one.listen(0)
        address = one.getsockname()
        if request.param == "looking the name up":
            over, look = threading.Event(), socket.getaddrinfo
            stack.callback(over.set)
            monkeypatch.setattr(
                socket,
                "getaddrinfo",
                lambda host, *of, **more: over.wait(LIMIT) and look("127.0.0.1", *of, **more),
            )
        elif request.param == "connecting":  # it takes no more of them
            for _ in range(4):
                waits = stack.enter_context(socket.socket())
                waits.setblocking(False)
                waits.connect_ex(address)
        yield f"{scheme}://127.0.0.1:{address[1]}"


@pytest.mark.parametrize("request_of", ["hello", "put", "ask"])
def test_a_cancel_is_seen_wherever_a_connection_hangs(
    request_of: str, nowhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything of it would count as broken."""
    monkeypatch.setattr("adatoken3d_ros.fleet.link.CONNECT", LIMIT)
    link, looks = Link(Address(nowhere)), itertools.count()
    more: dict[str, Any] = {"patience": LIMIT, "should_stop": lambda: next(looks) > 9}
    with pytest.raises(Stopped):
        if request_of == "hello":
            link.hello(**more)
        elif request_of == "put":
            link.put("scene", SCENE, (), **more)
        else:
            list(link.ask("scene", SCENE, [b""], **more))


def test_a_cancel_is_seen_between_two_attempts(tiny_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, scene, _ = robot(f"http://127.0.0.1:{free_port()}", tiny_of(NAMES[0]))
    show(scene, 0)
    attempt, attempts, rests = engine.attempt, itertools.count(), threading.Event()
    monkeypatch.setattr(engine, "attempt", lambda *of: (next(attempts), attempt(*of))[1])
    monkeypatch.setattr(remote_engine, "time", SimpleNamespace(sleep=lambda seconds: rests.set()))
    answer = engine.ask(scene, Question("What is there?", latency_budget_ms=100e3), should_stop=rests.is_set)
    assert answer.status == Status.CANCELLED and next(attempts) == 1
