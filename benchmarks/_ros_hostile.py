# SPDX-License-Identifier: Apache-2.0
"""Attacks on the real node over DDS, in volleys. After each of them a good frame and a good question have to work.

A volley is drawn from its seed; each thing that it sends is a try. A node that a volley has broken is replaced.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from adatoken3d.action import AskSceneStream
from adatoken3d.msg import Answer
from adatoken3d.srv import AskScene
from geometry_msgs.msg import Point
from rcl_interfaces.msg import Parameter, ParameterType, ParameterValue
from rclpy.parameter import get_parameter_value
from std_msgs.msg import String

from benchmarks._hostile import ACCEPTED, CRASH, LOSS, REFUSED, UNDOCUMENTED, Loss, Outcome
from benchmarks._hostile_files import TEXTS, put, special, spoil_bytes, spoil_tensors
from benchmarks._hostile_messages import DEFAULTS, WORDS, request
from benchmarks._hostile_signals import signals
from benchmarks._ros_hostile_node import ANSWERED, Crash, Target, clean
from benchmarks._ros_hostile_storm import storm

Volley = Callable[[Target, random.Random], Iterator[Outcome]]
STATUS = {
    getattr(Answer, name): name for name in dir(Answer) if name.isupper() and isinstance(getattr(Answer, name), int)
}
PLAIN = ("What is there?", "Where is the door?", "Is there a chair?")


def _answered(answer: Any) -> Outcome:
    """What an answer says of its question."""
    name = STATUS[answer.status]
    try:
        for text in (answer.status_message, answer.plan):
            clean(text)
        assert answer.status in ANSWERED or answer.status_message.strip(), "a refusal without a word"
        assert answer.status not in (Answer.ERROR, Answer.NO_SCENE), answer.status_message
    except AssertionError as error:
        return Outcome(0, UNDOCUMENTED, name, str(error))
    return Outcome(0, ACCEPTED if answer.status in ANSWERED else REFUSED, name, answer.status_message)


def questions(target: Target, rng: random.Random) -> Iterator[Outcome]:
    """A burst over the three ways; each one has its answer, those over the topic on ~/answer."""
    count = rng.choice([1, 5, 30, 200])
    ways = rng.choice([["service"], ["topic"], ["action"], ["service", "topic", "action"]])
    del target.answers[:]
    pending: list[tuple[str, Any]] = []
    cancelled = []
    for number in range(count):
        asked = request(rng, [rng.choice(WORDS) for _ in range(rng.randrange(4))])
        text = rng.choice(PLAIN) if rng.random() < 0.6 else asked.question
        text = f"q{number} " + text.encode("utf-8", "ignore").decode().replace("\0", "")
        fields = {
            "question": text,
            "latency_budget_ms": asked.latency_budget_ms,
            "clicks": [Point(x=click.x, y=click.y, z=click.z) for click in asked.clicks],
            "max_new_tokens": asked.max_new_tokens or DEFAULTS["max_new_tokens"],
        }
        way = rng.choice(ways)
        if way == "topic":
            target.question.publish(String(data=text))
            pending.append((way, f"q{number} "))
        elif way == "service":
            pending.append((way, target.client(AskScene, "ask").call_async(AskScene.Request(**fields))))
        else:
            sent = target.stream.send_goal_async(AskSceneStream.Goal(**fields))
            cancelled += [sent] if rng.random() < 0.2 else []
            pending.append((way, sent))
        if rng.random() < 0.05:
            target.spin(lambda: False, 0.01)
    for sent in cancelled:
        sent.add_done_callback(lambda done: done.result().accepted and done.result().cancel_goal_async())
    deadline = time.monotonic() + target.patience
    for way, handle in pending:
        answer = _result(target, way, handle, deadline)
        yield Outcome(0, LOSS, way, f"{way}: no answer, of {count}") if answer is None else _answered(answer)


def _result(target: Target, way: str, handle: Any, deadline: float) -> Any:
    """The answer, or None if it has not come."""

    def left() -> float:
        return max(0.0, deadline - time.monotonic())

    if way == "topic":

        def found() -> list[Any]:
            return [answer for answer in target.answers if answer.question.startswith(handle)]

        return found()[0] if target.spin(found, left()) else None
    if not target.spin(handle.done, left()):
        return None
    if way == "service":
        return handle.result().answer
    if not handle.result().accepted:
        return None
    result = handle.result().get_result_async()
    return result.result().result.answer if target.spin(result.done, left()) else None


def parameters(target: Target, rng: random.Random) -> Iterator[Outcome]:
    """Values of every type to every name; each is set or refused with a reason, at once. They are put back."""
    names = target.parameter_names()
    kept = [Parameter(name=n, value=v) for n, v in zip(names, target.parameters(names), strict=True)]
    kinds = {parameter.name: parameter.value.type for parameter in kept}
    for _ in range(50):
        name = rng.choice(names) if rng.random() < 0.95 else rng.choice(["", "nope", "strategy\n", "x" * 10_000])
        if name == "strategy" or rng.random() < 0.15:
            value: Any = _path(target, rng)
        else:
            value = get_parameter_value(json.dumps(rng.choice(_SIMPLE))) if rng.random() < 0.3 else _value(rng)
            if rng.random() < 0.6 and name in kinds:
                value.type = kinds[name]
        if not isinstance(value, ParameterValue):
            value = ParameterValue(type=ParameterType.PARAMETER_STRING, string_value=value)
        began = time.monotonic()
        (result,) = target.set_parameters([Parameter(name=name, value=value)])
        found = Outcome(0, ACCEPTED if result.successful else REFUSED, "reason", result.reason)
        found.seconds = time.monotonic() - began
        try:
            clean(result.reason)
            assert result.successful or result.reason.strip(), "refused without a reason"
        except AssertionError as error:
            found.what, found.text = UNDOCUMENTED, f"{name}: {error}"
        yield found
    for parameter in kept:
        target.set_parameters([parameter])  # what is fixed was not changed


_SIMPLE: list[Any] = [0, 1, -1, 7, 0.0, 0.5, -0.5, 1e308, True, False, "", "none", "ours", "random", "replace", "map"]


def _value(rng: random.Random) -> ParameterValue:
    """Any type with any content."""
    kind = rng.randrange(10)
    number = rng.choice([0.0, 0.1, 1.0, 3.5, -1.0, 1e-300, 1e308, float("nan"), float("inf")])
    words = ["", "x" * 100_000, "a\n[FATAL] b", "\x1b[31m", "replace", "reject", "keep", "What?", "none", "divprune"]
    text = rng.choice([*words, *TEXTS]).encode("utf-8", "ignore").decode()
    return ParameterValue(
        type=kind,
        bool_value=rng.random() < 0.5,
        integer_value=rng.choice([0, 1, 2, 100, -1, 2**31, 2**63 - 1, -(2**63)]),
        double_value=number,
        string_value=text.replace("\0", ""),
        byte_array_value=[bytes([rng.randrange(256)])] * rng.choice([0, 3]),
        bool_array_value=[True] * rng.choice([0, 3, 10_000]),
        integer_array_value=[2**63 - 1] * rng.choice([0, 3, 6, 10_000]),
        double_array_value=[number] * rng.choice([0, 3, 6, 7, 10_000]),
        string_array_value=["x"] * rng.choice([0, 3, 6]),
    )


def _path(target: Target, rng: random.Random) -> str:
    """A place that is no file, or a file that holds nothing good."""
    name = rng.choice(["s.yaml", "s.yml", "x.safetensors"])
    path = target.folder / f"{rng.randrange(10**6)}-{name}"
    if not special(path, rng) and not special(path, rng):
        put(path, rng.choice(TEXTS).encode("utf-8", "surrogatepass"))
    return rng.choice([str(path), str(path), "/dev/zero", "/proc/self/mem", "/nope/x.yaml", ".", "../" * 50 + "x.yaml"])


_WAYS = {
    ("unconfigured", 1): "inactive",
    ("inactive", 2): "unconfigured",
    ("inactive", 3): "active",
    ("active", 4): "inactive",
}
_LABELS = {"configure": 1, "cleanup": 2, "activate": 3, "deactivate": 4}
_WRONG = ["xshutdown", "shutdown now", "SHUTDOWN", "\x1b[31m", "a\n[FATAL] b", "x" * 100_000, "create", "destroy", "%s"]


def transitions(target: Target, rng: random.Random) -> Iterator[Outcome]:
    """Right and wrong ids and labels: a transition of the state is made, another is refused and changes nothing."""
    state = target.state()
    for _ in range(15):
        label = rng.choice(["", "", *_LABELS, *_WRONG])
        number = rng.choice([0, 1, 2, 3, 4, 8, 9, 10, 30, 60, 97, 255])
        if rng.random() < 0.3:  # a shutdown that this state does not know; the one that it knows is the end
            number = rng.choice([n for n, of in enumerate(("unconfigured", "inactive", "active"), 5) if of != state])
        wanted = _WAYS.get((state, _LABELS.get(label, 0) if label else number))
        made = target.transition(number, label)
        after = target.state()
        text = f"id {number} label {label[:40]!r}: {state} to {after}, success {made}"
        right = made == (wanted is not None) and after == (wanted or state)
        yield Outcome(0, (ACCEPTED if made else REFUSED) if right else UNDOCUMENTED, "refused", text)
        state = after
        answer = target.call(AskScene, "ask", AskScene.Request(question="What is there?", max_new_tokens=2)).answer
        expected = (*ANSWERED, Answer.NO_SCENE) if state == "active" else (Answer.ERROR,)
        if answer.status not in expected:
            yield Outcome(0, LOSS, "question", f"{text}; then {STATUS[answer.status]}: {answer.status_message}")
    target.activate()


def served_files(target: Target, rng: random.Random) -> Iterator[Outcome]:
    """A spoilt file where the scene is loaded from, and what is no file where it is saved."""
    target.file.unlink(missing_ok=True)
    reply = target.trigger("save_scene")
    if not reply.success:
        raise Loss(f"save_scene: {reply.message}")
    original = target.file.read_bytes()
    for _ in range(10):
        put(target.file, original)
        if not special(target.file, rng) and not special(target.file, rng):
            spoilt = rng.choice([spoil_bytes, spoil_tensors])(original, rng)
            with target.file.open("r+b" if rng.random() < 0.5 else "wb") as file:  # in place: nobody may map it
                file.write(spoilt)
                file.truncate()
        service = "load_scene" if target.file.is_file() or rng.random() < 0.7 else "save_scene"
        reply = target.trigger(service)
        found = Outcome(0, ACCEPTED if reply.success else REFUSED, service, reply.message)
        try:
            clean(reply.message)
            assert reply.success or reply.message.strip(), "refused without a reason"
        except AssertionError as error:
            found.what, found.text = UNDOCUMENTED, f"{service}: {error}"
        yield found
    put(target.file, original)
    reply = target.trigger("load_scene")
    if not reply.success:
        raise Loss(f"the good scene afterwards: {reply.message}")


def _volleys(volley: Volley) -> Callable[..., Iterator[Outcome]]:
    def attack(first: int, count: int, seconds: float, args: argparse.Namespace) -> Iterator[Outcome]:
        target: Target | None = Target(args)
        until = time.monotonic() + seconds
        try:
            for seed in range(first, first + count):
                if time.monotonic() >= until:
                    break
                target = target or Target(args)
                for outcome in _volley(target, volley, seed):
                    yield outcome
                    broken = outcome.what in (LOSS, CRASH)
                    if broken and target is not None:
                        target.close()
                        target = None
                        break
        finally:
            if target is not None:
                target.close()

    return attack


def _volley(target: Target, volley: Volley, seed: int) -> Iterator[Outcome]:
    began = time.monotonic()
    try:
        for outcome in volley(target, random.Random(seed)):
            outcome.seed = seed
            yield outcome
        target.good()
        target.accounted()
    except Crash as error:
        yield Outcome(seed, CRASH, "Crash", str(error), time.monotonic() - began)
    except Loss as error:
        yield Outcome(seed, LOSS, "Loss", str(error), time.monotonic() - began)
    except AssertionError as error:
        yield Outcome(seed, UNDOCUMENTED, "text", str(error), time.monotonic() - began)


LIVE: dict[str, Callable[..., Iterator[Outcome]]] = {
    "node_questions": _volleys(questions),
    "node_parameters": _volleys(parameters),
    "node_transitions": _volleys(transitions),
    "node_storms": _volleys(storm),
    "node_files": _volleys(served_files),
    "signals": signals,
}
