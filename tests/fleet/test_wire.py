# SPDX-License-Identifier: Apache-2.0
"""What travels between a robot and the engine: the same after it as before, counted, or refused by name."""

from __future__ import annotations

import json
import zlib
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from adatoken3d_ros.engine.answer import Answer, Box, Question, Status, TokenReport
from adatoken3d_ros.engine.budget.plans import Plan
from adatoken3d_ros.engine.knowing import Recalled
from adatoken3d_ros.engine.stages import StageTimes
from adatoken3d_ros.fleet import answers, wire
from adatoken3d_ros.fleet.bodies import (
    BodyError,
    Whose,
    body_of,
    built,
    check_picture,
    digest,
    jpeg,
    left,
    packed,
    picture_of,
    unpacked,
)
from adatoken3d_ros.fleet.halves import HALVES, coded, decoded
from adatoken3d_ros.fleet.wire import Asked, Manifest, ViewEntry, WireError
from adatoken3d_ros.lab.synthetic.furnished import make_room
from adatoken3d_ros.lab.synthetic.views import render_views
from adatoken3d_ros.lmm.interface import ModelSizes
from adatoken3d_ros.pruning.schedule import Schedule, Stage
from adatoken3d_ros.pruning.strategy import Strategy
from adatoken3d_ros.scene.contributions import reduced
from adatoken3d_ros.scene.geometry import PatchGeometry
from adatoken3d_ros.scene.patches import PatchConfig, patch_points
from adatoken3d_ros.scene.window import level_patches
from adatoken3d_ros.settings import DEFAULTS
from tests.engine.scenes import room_frame
from tests.fleet.shared import unlike

SIZES = ModelSizes(PatchGeometry.square(336, 24), 1024, 0.2, 20, 3096, 4096)
WHOSE = Whose("shape-weights", SIZES)
ORIGIN = torch.zeros(3, dtype=torch.float64)
CPU = torch.device("cpu")


def view(frame: Any = None) -> Any:
    """A key frame of a room at the shape of LLaVA-3D: 24 x 24 patches."""
    points = patch_points(frame or room_frame(), PatchConfig(SIZES.patches))
    features = torch.randn(576, 1024, generator=torch.Generator().manual_seed(0))
    level = level_patches(points.xyz, 24)
    return reduced(
        features, torch.from_numpy(points.xyz), torch.from_numpy(points.rgb), points.valid, level, ORIGIN, 0.2
    )


def test_a_key_frame_in_16_bits_is_what_was_sent_and_at_most_half_a_megabyte() -> None:
    sent = view()
    data = packed(body_of(sent), WHOSE)
    rows, patches = len(sent.keys), len(sent.points)
    # Of features, as random as can be, 2 x 1024 bytes less three tenths of half of them; and of each patch its place,
    # colour and whether it is level; the rest describes them.
    assert 0.84 * rows * 2048 < len(data) - patches * (12 + 3 + 1) < 0.86 * rows * 2048 + 1024
    assert len(data) <= 500_000, (rows, len(data))
    got, block = built(unpacked(data, WHOSE), ORIGIN, WHOSE, CPU)
    assert block is None and digest(data) == digest(packed(body_of(sent), WHOSE))
    for name in ("keys", "count", "xyz", "rgb", "points", "level", "colours"):
        assert torch.equal(getattr(got, name), getattr(sent, name)), name
    assert float((got.features - sent.features).abs().max()) < 2e-3 * float(sent.features.abs().max())


def test_a_usual_key_frame_of_a_room_takes_half_a_megabyte_and_none_more_than_one() -> None:
    """Views of furnished rooms at the model's own voxel size; what takes most is a patch a voxel, 576 of them."""
    sizes = []
    for number in range(3):
        for one in render_views(make_room(number, "test"), seed=number, count=6):
            sizes.append(len(packed(body_of(view(one.frame)), WHOSE)))
    assert np.median(sizes) <= 500_000, sorted(sizes)
    patches = torch.arange(576)
    points = torch.stack([patches % 24, patches // 24, patches * 0], dim=1).float()
    colours = torch.zeros(576, 3, dtype=torch.uint8)
    features = torch.randn(576, 1024, generator=torch.Generator().manual_seed(0))
    worst = packed(body_of(reduced(features, points, colours, None, None, ORIGIN, 0.2)), WHOSE)
    assert max(sizes) <= len(worst) <= 1_020_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(bits=st.lists(st.integers(-(2**15), 2**15 - 1), max_size=40), columns=st.integers(1, 3))
@hypothesis_settings(max_examples=50, deadline=None)
def test_sixteen_bits_are_the_same_bits_after_the_way(dtype: torch.dtype, bits: list[int], columns: int) -> None:
    rows = len(bits) // columns
    numbers = torch.tensor(bits[: rows * columns], dtype=torch.int16).view(dtype).reshape(rows, columns)
    got = decoded(**coded(numbers), kind=HALVES[dtype], shape=(rows, columns))
    assert got.dtype == dtype and torch.equal(got.view(torch.int16), numbers.contiguous().view(torch.int16))


def test_no_more_is_unpacked_than_was_said() -> None:
    """Neither of what would become a gigabyte nor of what is cut, followed by something, or none."""
    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(2**24))), dtype=torch.uint8)
    good = coded(torch.ones(2, 3, dtype=torch.float16))
    for high, says in (
        (bomb, "high holds another number of bytes than 6"),
        (good["high"][:-1], "high holds another number of bytes than 6"),
        (torch.cat([good["high"], good["high"]]), "high holds another number of bytes than 6"),
        (torch.ones(9, dtype=torch.uint8), "high cannot be unpacked"),
    ):
        with pytest.raises(BodyError, match=says):
            decoded(high, good["low"], "F16", (2, 3))


def test_the_numbers_of_a_body_by_hand() -> None:
    """Two patches in one voxel and one in another: means of 1 and 3, and of 5, in halves."""
    points = torch.tensor([[0.0, 0, 0], [0.05, 0, 0], [0.4, 0, 0]])
    colours = torch.tensor([[1, 2, 3], [3, 4, 5], [7, 8, 9]], dtype=torch.uint8)
    small = Whose("m", replace(SIZES, feature_width=2))
    sent = reduced(torch.tensor([[1.0, 0], [3, 0], [5, -1]]), points, colours, None, None, ORIGIN, 0.2)
    body = unpacked(packed(body_of(sent), small), small)
    assert body.features is not None and body.features.dtype == torch.float16
    assert body.features.tolist() == [[2.0, 0.0], [5.0, -1.0]]
    got, _ = built(body, ORIGIN, small, CPU)
    assert got.features.tolist() == [[4.0, 0.0], [5.0, -1.0]] and got.count.tolist() == [2, 1]
    assert left(got, (0,)).features.tolist() == [[5.0, -1.0]] and len(left(got, (0, 1)).keys) == 0
    with pytest.raises(BodyError, match="row 2 of a view that has 2"):
        left(got, (2,))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_body_is_built_by_any_number_of_threads(threads: int) -> None:
    """Its patches have no features of their own there; an engine has as many threads as its machine processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got, _ = built(unpacked(packed(body_of(view()), WHOSE), WHOSE), ORIGIN, WHOSE, CPU)
    finally:
        torch.set_num_threads(before)
    assert got.features.shape == (len(got.keys), 1024) and got.patches.shape == (len(got.points), 0)


def test_large_numbers_keep_their_range() -> None:
    small = Whose("m", replace(SIZES, feature_width=1))
    sent = reduced(
        torch.tensor([[1e6]]), torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.uint8), None, None, ORIGIN, 0.2
    )
    body = unpacked(packed(body_of(sent), small), small)
    assert body.features is not None and body.features.dtype == torch.bfloat16
    assert float(body.features[0, 0]) == pytest.approx(1e6, rel=4e-3)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda data: data.replace(b"shape-weights", b"other-weights"), "model 'other-weights', here it is 'shape-"),
        (lambda data: data.replace(b'\\"format\\": 2', b'\\"format\\": 3'), "format 3, here it is 2"),
        (lambda data: data[:-1], "no body"),
        (lambda data: data + b"x", "no body"),
        (lambda data: b"\xff" * 8 + data[8:], "a header of 18446744073709551615 bytes"),
        (lambda data: data.replace(b'"level"', b'"lever"'), "a body that holds"),
        (lambda data: data.replace(b'\\"rows\\": 2', b'\\"rows\\": 9'), "rows of 'F16', at most 576"),
        (lambda data: b"\x80\x04K\x01." * 8, "no body"),  # a pickle
    ],
)  # fmt: skip
def test_what_is_no_body_of_this_model_is_refused_by_name(spoil: Any, says: str) -> None:
    with pytest.raises(BodyError) as caught:
        unpacked(spoil(packed(body_of(view()), WHOSE)), WHOSE)
    assert says in str(caught.value)


def test_numbers_that_are_none_are_refused() -> None:
    body = body_of(view())
    assert body.features is not None
    body.features[0, 0] = float("inf")
    with pytest.raises(BodyError, match="features holds a number that is not finite"):
        unpacked(packed(body, WHOSE), WHOSE)


def test_a_picture_is_bounded_before_it_is_decoded() -> None:
    rgb = room_frame().rgb
    data = jpeg(rgb)
    assert np.abs(picture_of(data).astype(int) - rgb).mean() < 12  # of noise
    for wrong in (b"GIF89a" + data, data[:20], b""):
        with pytest.raises(BodyError, match="a picture that cannot be used"):
            check_picture(wrong)
    wide = data.replace(data[data.index(b"\xff\xc0") + 5 :][:4], b"\xff\xff\xff\xff", 1)
    with pytest.raises(BodyError, match="4294836225 pixels"):
        check_picture(wide)


POSE = tuple(np.eye(4).reshape(-1).tolist())
NAME = "0123456789abcdef" * 2


def asked(**changes: Any) -> Asked:
    question = Question(
        "What is at [1, 2, 3]?", np.ones((1, 3)), 500.0, 8, without=np.zeros((2, 3)), candidates=("a", "b")
    )
    scene = Manifest((ViewEntry(5, NAME, POSE, (1, 4)),), (0.5, 0.0, 1e-9), (0, -1, 2), NAME[::-1])
    rules = {name: DEFAULTS[name] for name in wire.RULES}
    return replace(Asked(scene, question, "strategy", 12.5, rules, "m"), **changes)


def test_a_question_arrives_as_it_was_asked() -> None:
    content, places = asked().content()
    said, bodies = wire.unframed(wire.framed(content, [places, b"body"]))
    got = Asked.read(said, bodies[0])
    assert bodies[1:] == [b"body"] and got.scene == asked().scene
    assert got.scene.bodies == (NAME, NAME[::-1])
    before, after = asked().question, got.question
    assert (after.text, after.latency_budget_ms, after.max_new_tokens, after.candidates) == (
        before.text, 500.0, 8, ("a", "b"))  # fmt: skip
    for name in ("clicks", "without", "only"):
        assert np.array_equal(getattr(after, name), getattr(before, name)), name
    assert (got.strategy, got.elapsed_ms, got.rules, got.model) == ("strategy", 12.5, asked().rules, "m")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scene": {"views": [[5, "../etc", list(POSE), []]]}}, "in the body '../etc'"),
        ({"scene": {"views": [[5, NAME, [2.0, *POSE[1:]], []]]}}, "not a rigid transform"),
        ({"scene": {"views": [[5, NAME, list(POSE), [4, 1]]]}}, "rows [4, 1]"),
        ({"scene": {"views": [[5, NAME, list(POSE), []]] * 2}}, "2 views, 1 stamps"),
        ({"scene": {"shift": [0, 0, 2**40]}}, "shift"),
        ({"question": {"clicks": [[1, 2]]}}, "no question"),
        ({"question": {"text": 3}}, "3 is no text"),
        ({"elapsed_ms": -1.0}, "elapsed_ms -1.0"),
        ({"rules": {}}, "rules {}"),
    ],
)  # fmt: skip
def test_a_question_that_cannot_be_is_refused_by_name(change: dict[str, Any], says: str) -> None:
    content, places = asked().content()
    content = json.loads(json.dumps(content))
    for name, value in change.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) and value else value
    with pytest.raises(WireError) as caught:
        Asked.read(content, places)
    assert says in str(caught.value)


def test_another_version_and_broken_frames_are_refused() -> None:
    good = wire.framed({"a": 1}, [b"x"])
    for data, says in (
        (good.replace(b'"version":2', b'"version":9'), "version 9, this program speaks 2"),
        (good[:-1], "a part of 1 bytes, 0 are left"),
        (b"GET /" + good, "no request"),
        (good[:4] + b"\x02\x00\x00\x00[]", "a list, not an object"),
    ):
        with pytest.raises(WireError) as caught:
            wire.unframed(data)
        assert says in str(caught.value)


def test_every_field_of_an_answer_arrives_as_it_was_given() -> None:
    """One that is added to `Answer` has to be given a value here, and travels or is its robot's own."""
    n = 3
    report = TokenReport(
        np.ones((n, 3), np.float32), np.zeros((n, 3), np.uint8), np.full(n, 1 / n, np.float32), np.arange(n),
        np.array([True, False, True]), (3, 2), (1.5, 2.5), float("nan"),
    )  # fmt: skip
    strategy = Strategy("fitted", "ours", Schedule((Stage(2, 0.5),), 9), "shape-weights", {}, {"figures": {"kl": 0.1}})
    times = StageTimes(*map(float, range(1, 7)))
    given = Answer(
        Question("q"), Status.TRUNCATED, "a table", "cut", (Box((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)),), 7, times,
        budget_met=False, spatial_tokens=3, retained_tokens=2, prefill_flops=1e9, prefill_flops_unpruned=2e9,
        strategy="ours", model_id="m", seed=4, report=report, plan="as planned", predicted=replace(times, total=8.0),
        decision=Plan(strategy, 2, 100, True, 16, 3, 0.5, 0.25, 0.125, times, 9.5, 64), confidence=0.75,
        confirmed_ns=9, as_of_ns=8, probability=0.5, candidate_probabilities=(0.1, 0.9),
    )  # fmt: skip
    plain = Answer(Question("q"), Status.OK)
    for field in fields(Answer):
        if field.name not in answers.ROBOTS_OWN:
            assert unlike(getattr(given, field.name), getattr(plain, field.name)), f"give {field.name} a value here"
    recalled = Recalled(np.zeros((4, 3), np.float32), np.ones(4, np.float32), np.array([-1, -1, 0, 0]))
    first, _, tail = answers.done(given, recalled).partition(b"\n")
    event = wire.read_json(first)
    assert event["bytes"] == len(tail)
    question = given.question
    got, again = answers.read_done(event, tail, question)
    assert unlike(replace(got, question=given.question), given) == [] and again is not None
    assert unlike(again, recalled) == []
    bare, none = answers.read_done(*_last(answers.done(plain, None)), question)
    assert unlike(replace(bare, question=plain.question), plain) == [] and none is None
    spoilt = {"answer": {**event["answer"], "decision": {"strategy": "x"}}}
    for wrong in ({"answer": {}}, {"answer": []}, {}, spoilt):
        with pytest.raises(WireError, match="no answer: "):
            answers.read_done(wrong, tail, Question("mine"))
    with pytest.raises(WireError, match="no answer: "):
        answers.read_done(_last(answers.done(plain, None))[0], b"x", Question("mine"))


def _last(data: bytes) -> tuple[dict[str, Any], bytes]:
    first, _, tail = data.partition(b"\n")
    return wire.read_json(first), tail
