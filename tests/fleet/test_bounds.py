# SPDX-License-Identifier: Apache-2.0
"""Whatever comes to an engine over HTTP is answered in words that name bound and value; no rule ends as status 500."""

from __future__ import annotations

import http.client
import json
import struct
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.fleet import wire
from adatoken3d_ros.fleet.door import ROBOT, SCENE, DoorConfig, guard
from adatoken3d_ros.fleet.scenes import NoRoom
from adatoken3d_ros.fleet.wire import Asked, Manifest
from adatoken3d_ros.settings import DEFAULTS
from tests.architectures import NAMES
from tests.fleet.shared import LIMIT, TOKEN, listening
from tests.fleet.test_link import robot, show
from tests.fleet.test_wire import NAME, POSE, asked

RULES = {name: DEFAULTS[name] for name in wire.RULES}


def post(url: str, path: str, data: bytes, **headers: str) -> tuple[int, bytes]:
    """Status and what was said, to the end."""
    named = {ROBOT: "fuzzer", SCENE: "fuzzed", "Authorization": f"Bearer {TOKEN}"}
    named |= {{"robot": ROBOT, "scene": SCENE}.get(name, name): value for name, value in headers.items()}
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=LIMIT)
    try:
        connection.request("POST", path, data, named)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def views(count: int, **changes: Any) -> list[Any]:
    return [[stamp, NAME, list(POSE), []] for stamp in range(count)]


@pytest.fixture
def scene_of(replica_of: Any) -> Any:
    """A request's text about a scene, for the model that is there."""
    model = replica_of(NAMES[0])._hello["model"]
    return lambda **scene: {"model": model, "rules": RULES, "scene": {**Manifest().plain(), **scene}}


def test_every_bound_is_named_with_the_value_that_was_too_much(
    url_of: Any, scene_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = url_of(NAMES[0])
    monkeypatch.setattr(wire, "MOST_TEXT", 2 * 2**20)
    monkeypatch.setattr(wire, "MOST_ROWS", 100)
    text = json.dumps({"version": wire.VERSION, "x": "y" * 2**21}).encode()
    cases: list[tuple[bytes, str]] = [
        (b"x" * (16 * 2**20 + 1), "the body has 16777217 bytes, 16777216 are allowed"),
        (b"ad3d" + struct.pack("<I", len(text)) + text, f"a text of {len(text)} bytes, not 1 to {2 * 2**20}"),
        (wire.framed({}, [b""] * 1002), "more than 1001 bodies"),
        (wire.framed(scene_of(views=views(1001))), "a scene of 1001 views, at most 1000 are allowed"),
        (wire.framed(scene_of(views=views(1)[:1] * 2)), "a scene of 2 views, 1 stamps"),
        (
            wire.framed(scene_of(views=[[1, NAME, list(POSE), list(range(101))]])),
            "101 rows have gone of a view, at most 100",
        ),
        (wire.framed(scene_of(views=[[2**62, NAME, list(POSE), []]])), "4611686018427387904 ns"),
        (wire.framed(scene_of(shift=[0, 0, 2**21])), "[0, 0, 2097152], three whole numbers up to 1048576"),
        (wire.framed(scene_of(origin=[0.0, 0.0, 1e9])), "the position (0, 0, 1e+09) m is not within 100000 m"),
        (wire.framed({**scene_of(), "rules": {**RULES, "max_new_tokens": 10**9}}), "max_new_tokens"),
        (wire.framed({**scene_of(), "model": "other"}), "a request for the model other, here is "),
        (wire.framed(scene_of(), [b"x" * 100]), "no body: a header of"),
    ]
    for data, says in cases:
        for path in (wire.VIEWS, wire.ASK):
            status, said = post(url, path, data)
            told = json.loads(said)
            assert status in (413, 422), (says, status)
            if path == wire.VIEWS or says.startswith(("the body", "a text", "more", "a request")):
                assert says in told["message"], (says, told)
    for headers, says in (
        ({"scene": "x" * 129}, "is no scene's id: 1 to 128 of"),
        ({"robot": "x" * 129}, "is no robot's name: 1 to 128 of"),
        ({"robot": ""}, "is no robot's name"),
        ({"scene": ""}, "a request without x-robot or serve_multiplexed_model_id"),
        ({"Authorization": "Bearer " + "x" * 5000}, "bears no token, or not that of 'fuzzer'"),
    ):
        status, said = post(url, wire.VIEWS, wire.framed(scene_of()), **headers)
        assert status in (400, 401, 422) and says in json.loads(said)["message"], (headers, said)


def test_a_scene_may_take_so_much_and_a_replica_hold_so_many(
    replica_of: Any, scene_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the door's bounds and the replica's, which the messages name; the replica's are put down for a moment. A
    question is refused by an answer that says how long what runs may take, and counted."""
    replica, counted = replica_of(NAMES[0]), []
    monkeypatch.setattr(replica, "_record", lambda *of: counted.append(of[:2]))
    monkeypatch.setattr(replica.line, "left", lambda now: 1.5)
    content, places = asked(model=replica._hello["model"], scene=Manifest(), strategy="").content()
    door = DoorConfig(token=TOKEN, scenes=2, robots=1, rate=1.0, burst=5)
    with listening(guard(replica, door)) as port:
        url, data = f"http://127.0.0.1:{port}", wire.framed(scene_of())
        assert [post(url, wire.VIEWS, data, scene=name)[0] for name in ("s1", "s2")] == [200, 200]
        for headers, says in (
            ({"scene": "s3"}, "fuzzer has 2 scenes already, 2 are allowed at a time"),
            ({"robot": "another"}, "1 robots are here already; another has to wait"),
        ):
            status, said = post(url, wire.VIEWS, data, **headers)
            assert status == 429 and says in json.loads(said)["message"]
        told = [post(url, wire.VIEWS, data, scene="s1") for _ in range(4)]
        assert (
            told[-1][0] == 429 and "fuzzer asks more often than 1 times a second" in json.loads(told[-1][1])["message"]
        )
    with listening(guard(replica, DoorConfig())) as port:
        for one in replica.scenes.all():
            one.questions += 1
        try:
            while len(replica.scenes) < replica.scenes.most:
                replica.scenes.of(f"full{len(replica.scenes)}", "fuzzer", RULES).questions += 1
            url = f"http://127.0.0.1:{port}"
            status, said = post(url, wire.VIEWS, wire.framed(scene_of()), scene="more")
            answered, lines = post(url, wire.ASK, wire.framed(content, [places]), scene="more")
        finally:
            for one in replica.scenes.all():
                one.questions = 0
        assert status == 503 and "3 scenes are being asked about, and no more are held" in json.loads(said)["message"]
    answer = json.loads(lines)["answer"]
    assert answered == 200 and answer["status"] == Status.BUSY and counted == [("fuzzer", "BUSY")]
    assert "what it answers now is likely to take 1500 ms more" in answer["status_message"]


def test_a_scene_has_its_room_before_the_first_word_of_an_answer(
    url_of: Any, tiny_of: Any, replica_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that is asked for has come, and nothing is answered yet: another robot that needs room takes it elsewhere."""
    replica, answered = replica_of(NAMES[0]), replica_of(NAMES[0])._answered
    engine, scene, _ = robot(url_of(NAMES[0]), tiny_of(NAMES[0]))
    show(scene, 0)

    async def later(question: Any, name: str) -> AsyncIterator[bytes]:
        with suppress(NoRoom):
            replica.scenes._make_room()
        async for one in answered(question, name):
            yield one

    monkeypatch.setattr(replica.scenes, "most", 1)
    monkeypatch.setattr(replica, "_answered", later)
    answer = engine.ask(scene, Question("What is there?"))
    assert answer.status.answered, answer.status_message
    deadline = time.monotonic() + LIMIT
    while any(one.questions for one in replica.scenes.all()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert time.monotonic() < deadline


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def places_in(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something is in lists and objects."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, one in inner for place in places_in(one, (*at, key)))]


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_request_ends_as_a_defect(data: Any, url_of: Any, replica_of: Any) -> None:
    """One value of a request that would do is another, anywhere; or bytes of it are."""
    url, model = url_of(NAMES[0]), replica_of(NAMES[0])._hello["model"]
    question: Asked = asked(model=model, scene=Manifest(), strategy="")
    content, places = question.content()
    content = json.loads(json.dumps(content))
    place = data.draw(st.sampled_from(places_in(content)[1:]))
    inside = content
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = data.draw(ANYTHING)
    sent = wire.framed(content, [places])
    if data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(sent) - 1))
        sent = sent[:at] + data.draw(st.binary(max_size=4)) + sent[at + data.draw(st.integers(0, 4)) :]
    status, said = post(url, data.draw(st.sampled_from([wire.ASK, wire.VIEWS])), sent)
    assert status in (200, 422, 428, 503), said
    if status == 200 and b"\n" in said:
        last = json.loads(said.split(b"\n")[-2])  # of a scene without views: nothing is behind it
        assert last["event"] == "done" and last["answer"]["status"] in range(9)
    else:
        assert json.loads(said).keys() & {"message", "missing", "bodies"}


def test_a_defect_is_told_too(url_of: Any, replica_of: Any, scene_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(replica_of(NAMES[0]).scenes, "of", broken)
    status, said = post(url_of(NAMES[0]), wire.VIEWS, wire.framed(scene_of()))
    assert status == 500 and "out of order" in json.loads(said)["message"]
