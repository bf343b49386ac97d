# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d benchmark` at its smallest: every figure is there, the page has no other file, nonsense is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adatoken3d_ros.cli.main import main
from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.engine.budget import warmup
from adatoken3d_ros.engine.engine import Engine
from adatoken3d_ros.lab import machine, speed


@pytest.fixture(scope="module")
def figures(tiny_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return measured(tiny_of("llava3d"), tmp_path_factory.mktemp("benchmark"), "--decoding", "eager")


def measured(model: Path, folder: Path, *more: str) -> dict[str, Any]:
    """What the command writes, its page as `page`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warmup, "SIZES", (1 / 64, 1 / 48, 1 / 32))
        patch.setattr(machine, "peaks", lambda _: {"float32_tflops": 0.1, "int8_tflops": 0.4, "bandwidth_gb_s": 10.0})
        patch.setattr(speed, "ANSWER", 3)
        given = ["--views", "2", "--repeats", "1", "--device", "cpu", "--dtype", "float32", *more]
        written = ["--json", str(folder / "f.json"), "--html", str(folder / "f.html")]
        assert main(["benchmark", "--model", str(model), *given, *written]) == 0
    found: dict[str, Any] = json.loads((folder / "f.json").read_text())
    return {**found, "page": (folder / "f.html").read_text()}


def test_every_stage_has_its_figure(figures: dict[str, Any]) -> None:
    assert figures["views"] == 2 and figures["spatial_tokens"] > 0
    assert [round(row["saved"], 1) for row in figures["prefill"]][0] == 0
    kept = [row["kept_token_layers"] for row in figures["prefill"]]
    assert kept == sorted(kept, reverse=True) and kept[0] == 1.0
    for row in figures["prefill"]:
        assert row["mfu"] == pytest.approx(row["flops"] / (row["ms"] / 1e3) / 1e11)
        assert row["answer_ms"] == pytest.approx(row["ms"] + 2 * figures["decode"]["ms"])
    decode = figures["decode"]
    assert decode["share_of_bandwidth"] == pytest.approx(decode["bytes_a_step"] / (decode["ms"] / 1e3) / 1e10)
    assert len(figures["budgets"]) == 10 and all(row["took_ms"] > 0 for row in figures["budgets"])
    for name in ("load_s", "encode_ms_a_view", "follow_up_ms", "weights_gb"):
        assert math.isfinite(figures[name]) and figures[name] > 0
    assert figures["decoding"] == "eager" and figures["eager_because"] == "model.decoding is eager"


def test_a_quick_look_has_all_but_budgets_and_compiles_nothing(
    tiny_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: dict[str, Any]
) -> None:
    """For a machine on which an answer takes minutes: each time is that of one run, none is run to be thrown away."""
    reads = []
    monkeypatch.setattr(speed, "prefill", lambda *a, **k: reads.append(1) or prefill(*a, **k))
    monkeypatch.setattr(Engine, "warm_up", lambda *_: pytest.fail("a quick look measures no fit"))
    found = measured(tiny_of("llava3d"), tmp_path, "--quick", "--quantization", "int8")
    assert found.keys() == figures.keys() and found["budgets"] == [] and figures["budgets"]
    assert found["decoding"] == "eager" and "quick look" in found["eager_because"]
    assert len(reads) == 1 + len(speed.SAVED)  # before the decode steps, and one of each share
    ours, unpruned = found["asked"]
    assert (ours["strategy"], unpruned["strategy"]) == ("ours-default", "none-default")
    assert ours["retained_tokens"] < unpruned["retained_tokens"] == found["spatial_tokens"]
    for row in found["asked"]:
        assert row["took_ms"] > row["prefill_ms"] > 0 and row["status"] in ("OK", "TRUNCATED")
    # Products of eight bits are held against the peak of eight bits.
    row = found["prefill"][0]
    assert found["products"] == "int8" and figures["products"] == "float32"
    assert row["mfu"] == pytest.approx(row["flops"] / (row["ms"] / 1e3) / 4e11)
    assert found["sentence"] in found["page"] and "<svg" in found["page"] and "Latency budgets" not in found["page"]


def test_long_times_are_told_in_seconds() -> None:
    assert [speed.told(ms) for ms in (71.4, 9999.0, 106_587.0)] == ["71 ms", "9999 ms", "107 s"]


def test_it_ends_with_a_sentence_and_a_page_of_its_own(figures: dict[str, Any]) -> None:
    assert figures["sentence"].startswith("On this machine this model answers a question about 2 views in ")
    page = figures["page"]
    assert figures["sentence"] in page and "<svg" in page
    assert "src=" not in page and "<script" not in page and "<link" not in page


def test_a_step_reads_weights_keys_and_values(figures: dict[str, Any], tiny_of: Callable[[str], Path]) -> None:
    from safetensors import safe_open

    stored = 0
    for file in tiny_of("llava3d").glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            names = [name for name in list(weights.keys()) if ".layers." in name and "vision" not in name]
            stored += sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    assert figures["decode"]["bytes_a_step"] > 4 * stored > 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--views", "0"], "--views must be between 1 and 200, got 0"),
        (["--repeats", "-1"], "--repeats"),
        (["--html", "/nowhere/at/all.html"], "--html: /nowhere/at/all.html cannot be written to"),
        (["--model", "/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_is_named(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", *words]) == 2
    assert told in capsys.readouterr().err


def test_what_the_system_tells_and_what_it_does_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A board that has nvpmodel tells its mode; a program that is missing or fails leaves nothing behind."""
    program = tmp_path / "nvpmodel"
    program.write_text("#!/bin/sh\necho 'NV Power Mode: MAXN'\necho 0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert machine.state(torch.device("cpu"))["power mode"] == "NV Power Mode: MAXN 0"
    program.write_text("#!/bin/sh\nexit 1\n")
    assert "power mode" not in machine.state(torch.device("cpu"))


def test_peaks_are_found_of_every_number_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_SECONDS", 0.0)
    found = {name: machine.peak_flops(torch.device("cpu"), dtype) for name, dtype in machine._DTYPES.items()}
    assert all(value > 1e6 for value in found.values()), found


def test_a_schedule_saves_what_it_is_scaled_to() -> None:
    from adatoken3d_ros.pruning.schedule import Schedule

    def share(schedule: Schedule) -> float:
        return sum(schedule.counts(1000, 10)) / 10_000

    for saved in (0.63, 0.8):
        assert share(speed._that_saves(saved, Schedule.of([1, 3], [0.5, 0.2]), share)) == pytest.approx(
            1 - saved, abs=0.01
        )
    assert speed._that_saves(0.0, Schedule.of([1], [0.5]), share) == Schedule()
