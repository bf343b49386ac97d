# SPDX-License-Identifier: Apache-2.0
"""Each task in each of its levels."""

from __future__ import annotations

import pytest

from adatoken3d_ros.engine.answer import Answer, Question, Status
from adatoken3d_ros.engine.stages import StageTimes
from adatoken3d_ros.ros.engine_owner import Loading
from adatoken3d_ros.ros.inputs.accounting import Arrivals, InputState
from adatoken3d_ros.ros.outputs import diagnostics as d


def state(**changes: object) -> InputState:
    good = {"active": True, "silent": {"rgb/image": 0.1, "depth/image": 0.1}, "since_start": 60.0, "since_pair": 0.1}
    return InputState(**{**good, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "level", "text"),
    [
        ({}, d.OK, "frames arrive"),
        ({"active": False}, d.OK, "not active"),
        ({"silent": {"rgb/image": None}, "since_start": 0.5}, d.OK, "waiting for the first frame"),
        ({"silent": {"rgb/image": None}, "since_start": 3.0}, d.WARN, "nothing on rgb/image yet"),
        ({"silent": {"rgb/image": None}, "since_start": 5.0}, d.ERROR, "nothing on rgb/image yet"),
        (
            {"silent": {"rgb/image": None}, "since_start": 5.0, "names": {"rgb/image": "/cam/image"}},
            d.ERROR,
            "nothing on /cam/image yet",
        ),
        (
            {"silent": {"rgb/image": None}, "since_start": 5.0, "unheard": {"rgb/image"}},
            d.ERROR,
            r"nothing on rgb/image \(nobody publishes it\) yet",
        ),
        ({"mismatches": ["/cam/image: they do not go together"]}, d.ERROR, "/cam/image: they do not go together"),
        ({"silent": {"rgb/image": 2.6}}, d.WARN, "rgb/image has been silent for 2.6 s"),
        ({"silent": {"rgb/image": 9.0}}, d.ERROR, "rgb/image has been silent for 9.0 s"),
        ({"since_pair": 6.0, "apart": 0.25}, d.ERROR, "no synchronised pair for 6.0 s.*250.0 ms apart"),
        ({"since_pair": None, "apart": None}, d.ERROR, "no synchronised pair for 60.0 s.*n/a"),
        ({"waiting": "no transform from 'a' to 'b'"}, d.WARN, "no transform from 'a' to 'b'"),
        ({"problem": "colour encoding 'x'"}, d.ERROR, "colour encoding 'x'"),
        ({"silent": {"a": None, "b": 9.0}, "since_start": 9.0}, d.ERROR, "nothing on a yet; b has been silent"),
        ({"rate": {"rgb/image": None}}, d.OK, "frames arrive"),
        ({"rate": {"rgb/image": 7.9}}, d.WARN, "rgb/image comes 7.90 times a second, less than 8"),
        ({"rate": {"rgb/image": 30.0, "depth/image": 3.9}}, d.ERROR, "depth/image comes 3.90 times a second"),
    ],
)
def test_inputs(changes: dict[str, object], level: bytes, text: str) -> None:
    import re

    report = d.inputs(state(**changes), stale_after=5.0, min_rate=8.0)
    assert report.level == level
    assert re.search(text, report.message)


def test_why_there_is_no_scene() -> None:
    names = {"rgb/image": "/cam/image"}
    silent = {"rgb/image": None, "depth/image": 0.1}
    assert state(silent=silent, names=names).explain() == "nothing has come on /cam/image"
    unheard = state(silent=silent, names=names, unheard={"rgb/image"}, mismatches=["these do not go together"])
    assert unheard.explain() == "these do not go together; nothing has come on /cam/image (nobody publishes it)"
    assert state(silent=silent, problem="bad size").explain() == "nothing has come on rgb/image; bad size"
    assert state(problem="bad size").explain() == "bad size"
    assert state(waiting="no pose yet").explain() == "no pose yet"
    assert "no frame has been matched" in state().explain()
    assert state(active=False).explain() == "the inputs are not active"


def test_inputs_have_no_figures_before_the_first_message() -> None:
    nothing = Arrivals()
    values = d.inputs(state(rate={"a": nothing.rate(1.0)}, gap={"a": nothing.gap(1.0)}), 5.0).values
    assert (values["rate_hz.a"], values["gap_s.a"], values["stamps_apart_ms"]) == ("n/a", "n/a", "n/a")
    values = d.inputs(state(rate={"a": 29.97}, gap={"a": 0.0334}, apart=0.25), 5.0).values
    assert (values["rate_hz.a"], values["gap_s.a"], values["stamps_apart_ms"]) == ("29.97", "0.033", "250.0")


def test_arrivals_by_hand() -> None:
    arrivals = Arrivals()
    assert (arrivals.silent(3.0), arrivals.rate(3.0), arrivals.gap(3.0)) == (None, None, None)
    arrivals.add(1.0)
    assert (arrivals.silent(3.0), arrivals.rate(3.0), arrivals.gap(3.0)) == (2.0, None, 2.0)
    for i in range(1, 11):
        arrivals.add(1.0 + i / 10)
    assert arrivals.rate(2.05) == pytest.approx(10.0) and arrivals.gap(2.05) == pytest.approx(0.1)
    # Silence longer than usual counts: 10 intervals in 1 s and 3.9 s more.
    assert arrivals.rate(6.0) == pytest.approx(10 / 4.9) and arrivals.gap(6.0) == pytest.approx(4.0)
    assert arrivals.rate(20.0) is None and arrivals.silent(20.0) == pytest.approx(18.0)
    arrivals.add(30.0)
    assert arrivals.rate(30.0) is None and arrivals.gap(30.5) == 0.5


def test_what_a_scene_holds_in_memory_is_told_with_its_limit() -> None:
    values = d.scene(True, 3, 100, 1.0, {}, held=(12_345_678, 20e6), gone=2).values
    assert (values["scene_mb"], values["memory_limit_mb"], values["things_gone"]) == ("12.3", "20.0", 2)
    assert d.scene(True, 3, 100, 1.0, {}).values["memory_limit_mb"] == "none"


def test_scene() -> None:
    assert d.scene(False, 0, 0, None, {}).level == d.OK
    empty = d.scene(True, 0, 0, None, {"no_depth": 2})
    assert (empty.level, empty.values["data_age_s"], empty.values["frames.no_depth"]) == (d.WARN, "n/a", 2)
    none = d.scene(True, 0, 0, None, {"no_depth": 4, "error": 6, "superseded": 90, "time_jump": 9})
    assert none.level == d.ERROR and "6 error, 4 no_depth" in none.message
    assert d.scene(True, 0, 0, None, {"no_depth": 3, "error": 6, "superseded": 90, "time_jump": 9}).level == d.WARN
    assert d.scene(False, 0, 0, None, {"error": 60}).level == d.OK
    well = d.scene(True, 3, 100, 12.5, {}, confirmed_age=0.5)
    assert well.message == "3 key frames, 100 spatial tokens"
    assert (well.values["data_age_s"], well.values["confirmed_age_s"]) == ("12.500", "0.500")
    assert empty.values["confirmed_age_s"] == "n/a"


def test_model() -> None:
    assert d.model("unconfigured", "", "ours", None, "", 0).level == d.OK
    assert d.model("unconfigured", "", "ours", None, "", 0).values["load_progress"] == "n/a"
    loading = d.model("unconfigured", "", "ours", Loading(2.0, 0.43, "reading a.safetensors"), "", 0)
    assert (loading.level, loading.values["load_progress"]) == (d.WARN, "0.43")
    assert loading.message == "loading for 2.0 s: 43%, reading a.safetensors"
    assert d.model("unconfigured", "", "ours", Loading(0.5), "", 0).message == "loading for 0.5 s"
    assert d.model("unconfigured", "", "ours", None, "no such file", 0).level == d.ERROR
    ready = d.model("active", "tiny", "ours", None, "", 2)
    assert (ready.message, ready.values["load_progress"]) == ("answering", "1.00")
    failed = d.model("active", "tiny", "ours", None, "out of memory in the stage prefill", 0)
    assert (failed.level, failed.message) == (d.ERROR, "out of memory in the stage prefill")
    twins = d.model("active", "tiny", "ours", None, "", 0, 1)
    assert twins.level == d.WARN and "2 nodes have this node's name" in twins.message


def answered(total: float, budget: float | None = None, met: bool = True, status: Status = Status.OK) -> Answer:
    return Answer(Question("?", latency_budget_ms=budget), status, times=StageTimes(total=total), budget_met=met)


def test_latency_before_and_after_answers() -> None:
    window = d.LatencyWindow()
    assert window.report().values["total_ms.p50"] == "n/a"
    window.add(answered(0.0, status=Status.BUSY))
    assert window.report().values["total_ms.p50"] == "n/a"
    for total in range(1, 102):
        window.add(answered(float(total)))
    report = window.report()
    assert (report.level, report.values["total_ms.p50"], report.values["budgets_missed"]) == (d.OK, "51.500", "n/a")
    # The last hundred are 2 to 101: 95 and 99 hundredths of the way from the first to the last of them.
    assert (report.values["total_ms.p95"], report.values["total_ms.p99"]) == ("96.050", "100.010")
    assert report.values["prefill_ms.p95"] == "0.000" and report.values["last.total_ms"] == "101.000"
    assert report.values["answers.BUSY"] == 1


def test_latency_warns_about_missed_budgets() -> None:
    window = d.LatencyWindow(10)
    for met in [False] + 9 * [True]:
        window.add(answered(1.0, 5.0, met))
    assert window.report().level == d.WARN
    for _ in range(8):
        window.add(answered(1.0, 5.0, False))
    assert window.report().level == d.ERROR
    assert "50% of the latency budgets of the last minute" in window.report().message


def test_budgets_are_forgotten_after_a_minute_and_refused_ones_count() -> None:
    now = [100.0]
    window = d.LatencyWindow(clock=lambda: now[0])
    window.add(answered(0.0, 5.0, True, Status.BUDGET_INFEASIBLE))
    alone = window.report({"prefill": 1.1})
    assert alone.level == d.ERROR and alone.values["total_ms.p50"] == "n/a"
    assert (alone.values["budgets_missed"], alone.values["drift.prefill"]) == ("1.000", "1.100")
    now[0] += 30.0
    for _ in range(30):
        window.add(answered(1.0, 5.0))
    assert window.report().level == d.OK and window.report().values["budgets_missed"] == "0.032"
    now[0] += 31.0
    assert window.report().values["budgets_missed"] == "0.000"
    now[0] += 60.0
    assert window.report().values["budgets_missed"] == "n/a"


def test_drift_warns_either_way() -> None:
    window = d.LatencyWindow()
    window.add(answered(1.0))
    assert window.report({"prefill": 1.5, "decode": 0.7}).level == d.OK
    slow = window.report({"prefill": 2.5, "decode": 0.7})
    assert (slow.level, slow.message) == (d.WARN, "prefill takes 2.5 times as long as when it was measured")
    assert slow.values["drift.prefill"] == "2.500"
    assert window.report({"prefill": 0.1}).level == d.ERROR


@pytest.mark.parametrize(("free", "level"), [(50, d.OK), (9, d.WARN), (2, d.ERROR)])
def test_memory(free: int, level: bytes) -> None:
    assert d.memory(d.Memory(1, free, 100)).level == level
    assert d.memory(d.Memory(1, 50, 100, free, 100)).level == level


def test_memory_of_this_machine() -> None:
    found = d.read_memory(False)
    assert 0 < found.process < found.total and 0 < found.free <= found.total


def test_array_follows_the_convention() -> None:
    message = d.array([d.Report("model", d.WARN, "m", {"a": 1})], "adatoken3d", "tiny", 3_000_000_001)
    (status,) = message.status
    assert (status.name, status.level, status.hardware_id) == ("adatoken3d: model", d.WARN, "tiny")
    assert [(pair.key, pair.value) for pair in status.values] == [("a", "1")]
    assert (message.header.stamp.sec, message.header.stamp.nanosec) == (3, 1)


def test_whatever_is_told_is_one_line_of_bounded_length() -> None:
    report = d.Report("inputs", d.ERROR, "nan, " * 10**6, {"key\n" * 1000: "x" * 10**6, "last": "a\n[FATAL] b"})
    status = d.array([report], "node", "none", 0).status[0]
    assert len(status.message) <= 2000 and "more characters" in status.message
    assert [len(pair.key) <= d.KEY and len(pair.value) <= d.VALUE for pair in status.values] == [True, True]
    assert status.values[1].value == "a\\n[FATAL] b" and status.values[0].key.isprintable()
