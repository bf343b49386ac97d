# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adatoken3d_ros.decoder.adapter import Decoder, size_of
from adatoken3d_ros.decoder.decode import generate
from adatoken3d_ros.decoder.prefill import Layout, Prefill, prefill
from adatoken3d_ros.engine.budget.plans import calibrated_loss
from adatoken3d_ros.engine.loading import fitted_strategies
from adatoken3d_ros.lab.cost import FlopsCost
from adatoken3d_ros.lab.probe import Sample
from adatoken3d_ros.lab.rivals import make_rival
from adatoken3d_ros.lab.training.train import Trainer
from adatoken3d_ros.pruning.flops import layer_flops
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule
from adatoken3d_ros.pruning.strategy import Strategy
from adatoken3d_ros.pruning.view import GateSize, SceneTokens
from benchmarks import frontier
from benchmarks._budgets import CONTESTANTS, RIVALS, SHIPPED, Fitted, Operations, Tokens, candidates, solve
from benchmarks._frontier_answers import Ask, answer, unfit
from benchmarks._frontier_report import goals, verdict
from benchmarks._paired import COLUMNS, EXACT, Tally, scene_interval
from benchmarks._reuse import decode_along, remembering
from benchmarks._scenes import Reader, balanced_rooms, find_rooms
from benchmarks.accuracy import answers, score

N, START, LAYERS = 60, 5, 8
CONFIG = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
SIZE = size_of(CONFIG)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    torch.manual_seed(3)
    return Decoder(LlamaForCausalLM._from_config(CONFIG, attn_implementation="sdpa").eval().requires_grad_(False))


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Five questions about one scene, then one about another."""
    torch.manual_seed(4)
    found = []
    for questions in (5, 1):
        prefix, scene = torch.randn(1, START + N, 32), SceneTokens(torch.rand(N, 3))
        for k in range(questions):
            embeds = torch.cat([prefix, torch.randn(1, 4 + k % 3, 32)], dim=1)
            found.append(Sample(embeds, Layout(START, N, embeds.shape[1]), scene))
    return found


def read(decoder: Decoder, sample: Sample, schedule: Schedule, policy: str) -> Prefill:
    layout = Layout(START, N, sample.n_tokens)
    return prefill(decoder, sample.embeds, layout, schedule, make_policy(policy), scene=sample.scene)


# --- what makes it fast ---


@pytest.mark.parametrize(
    ("policy", "schedule"),
    [
        ("none", Schedule()),
        ("none", Schedule(withdraw_layer=3)),
        ("random", Schedule.of([2, 5], [0.5, 0.2])),
        ("coarse_voxel", Schedule.of([0], [0.4])),
        ("divprune", Schedule.of([0], [0.4])),
        ("fastv", Schedule.of([2], [0.3])),
        ("pyramiddrop", Schedule.of([2, 4, 6], [0.5, 0.25, 0.1])),
        ("ours", Schedule.of([0, 3], [0.6, 0.3], withdraw_layer=6)),
    ],
)
def test_remembering_changes_nothing(decoder: Decoder, samples: list[Sample], policy: str, schedule: Schedule) -> None:
    alone = [read(decoder, s, schedule, policy) for s in samples]
    with remembering(decoder):
        together = [read(decoder, s, schedule, policy) for s in samples]
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(b.logits, a.logits, atol=1e-5, rtol=1e-4)
            assert b.trace.spatial_per_layer == a.trace.spatial_per_layer and b.cache.lengths == a.cache.lengths
            answers = [list(generate(decoder, f, max_new_tokens=6, eos_ids=())) for f in (a, b)]
            assert answers[0] == answers[1]
    assert all("forward" not in vars(layer.module) for layer in decoder.layers)


def test_remembering_computes_only_what_is_new(decoder: Decoder, samples: list[Sample]) -> None:
    rows: list[int] = []
    hooks = [
        layer.module.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
        for layer in decoder.layers
    ]
    with remembering(decoder):
        for sample in samples[:2]:
            read(decoder, sample, Schedule.of([3], [0.5]), "fastv")
    for hook in hooks:
        hook.remove()
    first, second = rows[:LAYERS], rows[LAYERS:]
    assert first == [START + N + 4] * 3 + [START + N // 2 + 4] * 5
    assert second[:3] == [5] * 3  # the question, until the tokens that stay differ
    assert all(n > 5 for n in second[3:])


@pytest.mark.parametrize("wrong", [(), (0,), (2, 3), (7,)])
def test_a_guess_gives_the_same_answer_sooner(decoder: Decoder, samples: list[Sample], wrong: tuple[int, ...]) -> None:
    schedule = Schedule.of([2], [0.3])
    answer = list(generate(decoder, read(decoder, samples[0], schedule, "ours"), max_new_tokens=8, eos_ids=()))
    eos = next(token for token in range(50) if token not in answer)
    guess = [(token + 1) % 50 if k in wrong else token for k, token in enumerate(answer)]
    for tokens in (guess, guess[:4], [], [*guess, 1, 2]):
        filled = read(decoder, samples[0], schedule, "ours")
        before = filled.cache.lengths
        assert decode_along(decoder, filled, tokens, max_new_tokens=8, eos=eos) == answer
        assert filled.cache.lengths == tuple(n + 8 for n in before)  # what was wrong is forgotten, nothing else
    filled = read(decoder, samples[0], schedule, "ours")
    until = answer.index(answer[5])  # the first time that this token comes up
    assert decode_along(decoder, filled, guess, max_new_tokens=8, eos=answer[5]) == answer[:until]
    filled = read(decoder, samples[0], schedule, "ours")
    found = decode_along(decoder, filled, guess, max_new_tokens=8, eos=eos, worth=lambda ids: ids == guess[: len(ids)])
    assert found == (answer[: wrong[0] + 1] if wrong else answer)  # no further than it is as guessed


# --- paired figures ---


def test_paired_figures_by_hand() -> None:
    """Two families in two rooms; the second way has one answer less, in room 1."""
    rooms, families = [0, 0, 1, 1, 1], ["colour", "class", "colour", "class", "box"]
    scores = np.array([[1, 1, 0, 1, 0.3], [1, 1, 0, 0, 0.6]])
    tally = Tally(rooms, families, scores)
    assert tally.macro.tolist() == [0.75, 0.5]
    assert tally.difference(1, 0) == -0.25
    low, high = tally.difference_interval(1, 0)
    assert (low, high) == (-0.5, 0.0)  # room 1 alone, room 0 alone
    found = tally.families(1, 0)
    assert found["class"] == {"accuracy": 0.5, "ratio": 0.5, "interval": [0.0, 1.0]} and found["colour"]["ratio"] == 1.0
    assert found["box@0.25"] == {"accuracy": 1.0, "ratio": 1.0, "interval": [1.0, 1.0]}
    assert found["box@0.50"] == {"accuracy": 1.0, "ratio": None, "interval": None}  # none right without pruning
    assert tally.ratio_interval(1, 0) == [0.0, 1.0]  # room 1 alone has half, and of that nothing is left
    assert set(found) == {"class", "colour", "box@0.25", "box@0.50"} <= set(COLUMNS)
    with pytest.raises(ValueError, match="2 rooms"):
        Tally([0, 1], ["colour"], np.zeros((1, 2)))


def test_pairing_narrows_the_interval() -> None:
    """Rooms differ a lot, the two ways hardly: each is uncertain, their difference is not."""
    rng = np.random.default_rng(0)
    rooms = np.repeat(np.arange(40), len(EXACT))
    right = np.repeat(rng.random(40) < 0.5, len(EXACT)).astype(float)
    tally = Tally(rooms.tolist(), list(EXACT) * 40, np.stack([right, right]))
    low, high = tally.interval(0)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 40**0.5, abs=0.05)
    assert tally.difference_interval(1, 0) == [0.0, 0.0]


def test_one_room_decides_no_comparison() -> None:
    """All draws of one room are that room: its differences looked as sure as can be, and were counted as losses."""
    tally = Tally([3, 3], ["colour", "class"], np.array([[1.0, 1], [1, 0]]))
    assert tally.difference(1, 0) == -0.5 and tally.difference_interval(1, 0) == [-1.0, 1.0]
    assert tally.ratio_interval(1, 0) is None


def test_scene_interval_weighs_rooms_alike() -> None:
    mean, low, high = scene_interval([0, 0, 0, 1], np.array([[1.0, 0], [1, 0], [1, 0], [0, 0]]))
    assert mean.tolist() == [0.5, 0.0] and low.tolist() == [0.0, 0.0] and high.tolist() == [1.0, 0.0]


# --- budgets ---


@pytest.fixture(scope="module")
def fitted(samples: list[Sample]) -> Fitted:
    ratios = (0.75, 0.5, 0.25, 0.1)
    gaps = np.array([[(1 - r) / (1 + g) for r in ratios] for g in range(LAYERS)])
    withdrawal = np.array([*np.linspace(1.0, 0.0, LAYERS), 0.0])
    return Fitted(0.5, {"coverage": 0.0}, tuple(range(LAYERS)), ratios, gaps, withdrawal, FlopsCost(SIZE, samples))


@pytest.mark.parametrize("name", [name for name in CONTESTANTS if name != "random"])
def test_candidates_just_keep_the_budget(name: str, fitted: Fitted) -> None:
    work = Operations(SIZE, [(600, 30, 15), (500, 30, 15)])
    for target in (0.75, 0.37):
        found = candidates(name, target, work, LAYERS, fitted)
        assert found, target
        shares = [work.share(make_rival(s.policy, **s.options), s.schedule) for s in found]
        assert all(share <= target for share in shares)
        assert max(shares) == pytest.approx(target, abs=0.004)
        for strategy in found:
            strategy.schedule.check(LAYERS)
    assert candidates(name, 0.01, work, LAYERS, fitted) == []


def test_operations_count_the_choosing() -> None:
    """One prompt, one gate that keeps half: what the layers see, and what PyramidDrop computes to choose."""
    policy, gate = make_policy("pyramiddrop"), GateSize(4, 630, 600, 300, 15)
    layers = 4 * layer_flops(SIZE, 630) + 4 * layer_flops(SIZE, 330)
    head = 2 * 32 * 50
    expected = (layers + head + policy.flops(SIZE, gate)) / (8 * layer_flops(SIZE, 630) + head)
    assert policy.flops(SIZE, gate) > 0.01 * layers
    assert Operations(SIZE, [(600, 30, 15)]).share(policy, Schedule.of([4], [0.5])) == pytest.approx(expected)


def test_ours_has_planned_candidates_and_the_control_none(fitted: Fitted) -> None:
    work = Operations(SIZE, [(600, 30, 15)])
    found = {s.info["setting"]: s for s in candidates("ours", 0.37, work, LAYERS, fitted)}
    assert set(found) == {
        "its own schedule",
        "before the first layer",
        "before the first layer, then by attention",
        "planned",
        "planned, with a withdrawal",
    }
    assert all(dict(s.options) == {"coverage": 0.0} for s in found.values())
    late = found["planned, with a withdrawal"].schedule
    assert late.withdraw_layer is not None and found["planned"].schedule.withdraw_layer is None
    with pytest.raises(ValueError, match="random"):
        candidates("random", 0.5, work, LAYERS, fitted)


def test_solve_finds_the_largest_knob() -> None:
    def make(ratio: float) -> Schedule:
        return Schedule.of([0], [ratio])

    def share(schedule: Schedule) -> float:
        return schedule.stages[0].ratio

    found = solve(make, share, 0.3, 0.1, 1.0)
    assert found is not None and found.stages[0].ratio == pytest.approx(0.3, abs=1e-6)
    assert solve(make, share, 0.05, 0.1, 1.0) is None


def point(target: float, ratio: float | None, low: float, family: float | None, family_low: float) -> dict[str, object]:
    spread = None if family is None else [family_low, 1.1]
    return {
        "target": target,
        "flops": target,
        "difference": -0.01,
        "difference_interval": [-0.02, 0.0],
        "ratio": ratio,
        "ratio_interval": [low, 1.1],
        "families": {
            "colour": {"accuracy": 0.5, "ratio": family, "interval": spread},
            "class": {"accuracy": 0.5, "ratio": None, "interval": None},
        },
    }


@pytest.mark.parametrize(
    ("ratio", "low", "family", "family_low", "met"),
    [
        (0.995, 0.98, 0.97, 0.93, True),
        (0.994, 0.98, 0.97, 0.93, False),
        (0.995, 0.97, 0.97, 0.93, False),
        (0.995, 0.98, 0.96, 0.93, False),
        (0.995, 0.98, 0.97, 0.92, False),
        (None, 0.98, None, 0.0, False),
    ],
)
def test_goals_of_a_budget(ratio: float | None, low: float, family: float | None, family_low: float, met: bool) -> None:
    points = {"ours": [point(budget, ratio, low, family, family_low) for budget in (0.37, 0.2)]}
    found = goals(points, [], {128: points["ours"][0], 64: points["ours"][1]})
    assert [found[name]["met"] for name in ("saves_63", "saves_80")] == [met, met]
    assert [found[name]["met"] for name in ("tokens_128", "tokens_64")] == [ratio is not None] * 2
    assert not found["ahead"]["met"] and "ahead_at_20" not in found
    assert verdict(found).row_count == 5
    assert "speed_80" not in found, "no time was measured"
    points["ours"][1]["time"] = 0.41
    timed = goals(points, [], {})["speed_80"]
    assert not timed["met"] and timed["speed"] == pytest.approx(2.44, abs=0.01)
    points["ours"][1]["time"] = 0.4
    assert goals(points, [], {})["speed_80"]["met"]


def test_comparisons_that_are_lost_by_hand() -> None:
    """One behind within its interval at half, one clearly behind at 128 tokens, one ahead at 15 %."""
    against = [
        {"target": 0.5, "rival": "fastv", "difference": -0.01, "interval": [-0.1, 0.1]},
        {"tokens": 128, "rival": "fastv", "difference": -0.2, "interval": [-0.3, -0.1]},
        {"target": 0.15, "rival": "random", "difference": 0.3, "interval": [0.2, 0.4]},
    ]
    found = goals({"ours": []}, against, {})
    assert not found["ahead"]["met"] and found["ahead_at_20"]["met"]
    assert found["ahead"]["clearly_behind"] == against[1:2] and found["ahead"]["not_ahead"] == against[:2]
    assert goals({"ours": []}, [against[0], against[2]], {})["ahead"]["met"], "what is not clear is not lost"


def test_tokens_by_hand() -> None:
    """100 tokens in 4 layers, of which 2 see all, 1 half and 1 a fifth: 67.5 on average; 54 with 80 % of those."""
    schedule = Schedule.of([2, 3], [0.5, 0.2])
    policy = make_policy("ours")
    assert Tokens(100, 4).share(policy, schedule) == pytest.approx(0.675)
    early = Strategy("early", "ours", Schedule.of([0, 2], [0.6, 0.3]))  # 45 on average
    assert [one.ratio for one in Tokens(100, 4).fitted(early, 30).schedule.stages] == pytest.approx(
        [0.4, 0.2], abs=0.01
    )
    for n in (100, 317):
        for count in (64, 32, 7):
            found = Tokens(n, 4).fitted(early, count).schedule.counts(n, 4)
            assert count - 1 <= sum(found) / 4 <= count
    assert Tokens(50, 4).fitted(early, 64).schedule == Schedule(), "there are no more"


# --- all of it ---


def test_the_whole_benchmark(
    make_trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainer().save(tmp_path / "model")
    arguments = ["--model", "model", "--json", "f.json", "--picture", "f.png", "--scenes", "rooms"]
    arguments += ["--strategies", "model/strategies"]
    sizes = ["--quick", "--first", "1", "--questions", "24", "--targets", "0.6", "0.02", "--tokens", "9999", "20"]
    sizes += ["--workers", "1", "--resume", "kept.jsonl"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["frontier", *arguments, *sizes, "--threads", "1"])
    threads = torch.get_num_threads()
    frontier.main()
    result = json.loads((tmp_path / "f.json").read_text())
    monkeypatch.setattr(frontier, "time_all", lambda *args: pytest.fail("--timed 0"))
    some = ["--policies", "fastv", "divprune", "--timed", "0"]
    monkeypatch.setattr(sys, "argv", ["frontier", *arguments[:-2], *sizes, "--threads", "1", *some])
    frontier.main()
    torch.set_num_threads(threads)
    again = json.loads((tmp_path / "f.json").read_text())
    assert set(result["policies"]) == {*CONTESTANTS, SHIPPED} - set(result["skipped"])
    assert set(result["skipped"]) == {"visionzip", "holov", "evs", "framefusion"}
    assert "class token" in result["skipped"]["holov"]
    for name, points in result["policies"].items():
        assert [p["target"] for p in points] == [0.6], name
        (found,) = points
        assert found["flops"] == pytest.approx(0.6, abs=0.03)
        assert found["time"] > 0 and found["prefill_time"] > 0
        low, high = found["difference_interval"]
        assert low <= found["difference"] <= high
        assert result["not_reached"][name] == [0.02]
    assert result["policies"]["random"][0]["stages"] == result["policies"]["ours"][0]["stages"]
    rivals = set(RIVALS) - set(result["skipped"])
    at_20 = set(result["tokens"]["20"])  # not those that need all tokens for a layer or two
    assert at_20 >= {"ours", "random", "divprune", "cdpruner"} and at_20 <= set(result["policies"])
    assert result["goals"]["ahead"]["comparisons"] == len(rivals) + len(rivals & at_20), "at a share, and at 20 tokens"
    assert result["losses"] == len(result["goals"]["ahead"]["clearly_behind"])
    assert set(result["tokens"]) == {"9999", "20"} and not result["tokens"]["9999"]
    assert result["tokens_20"]["retained"] == result["tokens"]["20"]["ours"]["ratio"]
    assert (result["setting"]["rooms"], result["setting"]["rooms_laid_out"]) == (1, 2)
    assert result["setting"]["questions"] <= 12 and result["setting"]["families"]["existence"] == 1
    # Some of them once more, without asking the model again: the same, but for the time.
    assert again["setting"]["results_reused"] > result["setting"]["results_reused"]
    assert set(again["policies"]) == {"fastv", "divprune", "ours", SHIPPED} and again["unpruned"]["ms"] is None
    assert all(result["tokens"]["20"][name] == one for name, one in again["tokens"]["20"].items())
    assert again["tokens"]["20"].keys() >= {"divprune", "ours"}
    whole = ("time", "prefill_time", "ms")
    for name, points in again["policies"].items():
        before = [{key: value for key, value in p.items() if key not in whole} for p in result["policies"][name]]
        assert points == before
    assert result["fitted"]["split"] == "train" and result["fitted"]["rooms"][0] >= 7_000_000
    assert (tmp_path / "f.png").stat().st_size > 10_000
    strategy = Strategy.load(tmp_path / "model" / "strategies" / "ours-0.6.yaml")
    assert strategy.model_hash == result["model"]["hash"] and calibrated_loss(strategy) is not None
    assert (strategy.info["target"], strategy.info["rooms"]) == (0.6, result["fitted"]["rooms"])
    assert {"ours", "ours-0.6"} <= fitted_strategies(tmp_path / "model", strategy.model_hash).keys()


def test_a_model_of_views_is_judged_as_it_answers(tmp_path: Path) -> None:
    """Its answers begin with a space, and newlines stand between its tokens."""
    reader = Reader(Path(frontier.__file__).parent / "data" / "video3d_small")
    (room,) = find_rooms(reader, tmp_path, "test", 1, per_family=1)
    right = [score(qa, text) for qa, text in zip(room.questions, answers(reader, room), strict=True)]
    scores, _ = answer(reader, Ask(room, frontier.UNPRUNED))
    assert scores == pytest.approx(right) and sum(right) >= 2
    assert unfit(reader, room, ["evs", "framefusion", "holov", "ours"]).keys() == {"holov"}, (
        "its tokens are those of views"
    )
    ((n_spatial, n_text, n_question),) = set(frontier._sizes(reader, [room], most=1))
    (sample,) = reader.samples(room.scene(), room.questions[:1])
    assert (n_spatial, n_spatial + n_text, n_question) == (room.n_spatial, sample.n_tokens, sample.layout.n_question)
    assert n_text - n_question > sample.spatial_start

    # The same room, asked for the same number of each family: the rare ones, as often as it has them.
    (balanced,) = balanced_rooms(reader, tmp_path, "test", rooms=1, per_family=3)
    asked = Counter(qa.family for qa in balanced.questions)
    assert max(asked.values()) == 3 and asked["existence"] == 3 and balanced.seed == room.seed
