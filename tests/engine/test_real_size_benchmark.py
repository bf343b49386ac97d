# SPDX-License-Identifier: Apache-2.0
"""`benchmarks.real_size` with a model that is not: the checkpoint that it writes is loaded and asked as it would be."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import real_size

SMALL = {
    "text_config": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8},
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "depth": 3,
        "deepstack_visual_indexes": [0, 1],
        "out_hidden_size": 64,
    },
}


def test_what_is_written_loads_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = copy.deepcopy(real_size.MODELS["qwen3-vl-2b"])
    for part, sizes in SMALL.items():
        config[part].update(sizes)
    monkeypatch.setattr(real_size, "SHARD", 2_000_000)  # the table of words alone is larger
    size = real_size.write_checkpoint(folder, config, tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and files[-1].name.endswith(f"-of-{len(files):05d}.safetensors")
    assert size < sum(file.stat().st_size for file in files) < 1.01 * size + 100_000  # and their headers
    found = real_size.child(str(tmp_path), "cpu", torch.get_num_threads())
    assert found["status"] in ("OK", "TRUNCATED"), found["status_message"]
    assert 2 * found["parameters"] == size and (found["views"], found["spatial_tokens"]) == (2, 600)
    assert 0 < found["retained_tokens"] < 600 and found["peak_rss_gb"] > 0.2
    assert found["libraries_gb"] <= found["load_peak_gb"] <= found["peak_rss_gb"]
    assert found["load_within_bound"] == (found["load_peak_gb"] <= found["load_bound_gb"])
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(real_size.report({"model": "small", **found}))
    assert f"{found['parameters']:,} numbers" in console.export_text()


def test_figures_that_are_kept_are_of_the_whole_model() -> None:
    kept = json.loads((Path(real_size.__file__).parent / "results" / "real_size_cpu.json").read_text())
    assert kept["model"] == "qwen3-vl-2b" and kept["status"] in ("OK", "TRUNCATED")
    assert 2 * kept["parameters"] == pytest.approx(1e9 * kept["weights_gb"], rel=1e-2)
    assert kept["weights_gb"] < kept["peak_rss_gb"]
    large = json.loads((Path(real_size.__file__).parent / "results" / "real_size_llava3d_cpu.json").read_text())
    for one in large["real_size"].values():
        assert one["weights_gb"] < one["load_peak_gb"] <= one["load_bound_gb"] and one["load_within_bound"]
        assert one["status"] in ("OK", "TRUNCATED") and one["unpruned"]["status"] in ("OK", "TRUNCATED")


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_the_command_says_of_the_real_size_is_kept(kind: str) -> None:
    """Of `adatoken3d benchmark` on the same checkpoint: it fits, every stage has a time, a question was answered."""
    kept = json.loads((Path(real_size.__file__).parent / "results" / f"machine_llava3d_{kind}_cpu.json").read_text())
    assert kept["quantization"] == kind and kept["views"] == 2 and kept["sentence"].startswith("On this machine")
    assert kept["weights_gb"] < kept["peak_gb"]["process"] < 24
    assert [round(row["saved"], 2) for row in kept["prefill"]] == [0, 0.63, 0.8]
    ours, unpruned = kept["asked"]
    assert ours["retained_tokens"] < unpruned["retained_tokens"] == kept["spatial_tokens"]
    assert all(row["status"] in ("OK", "TRUNCATED") for row in kept["asked"])
    assert kept["load_s"] > 0 and kept["products"] == {"int8": "int8", "int4": "bfloat16"}[kind]


def test_a_checkpoint_can_be_written_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    monkeypatch.setattr(real_size, "write_checkpoint", lambda *given: written.append(given) or 14_000_000_000)
    monkeypatch.setattr("sys.argv", ["real_size", "--model", "llava-3d-7b", "--write", str(tmp_path / "new")])
    real_size.main()
    assert written == [(*real_size.MODELS["llava-3d-7b"], tmp_path / "new")] and (tmp_path / "new").is_dir()
    with pytest.raises(SystemExit):
        real_size.main()  # it is there now
    for words in ([], ["--json", "f", "--write", "d"]):
        with pytest.raises(SystemExit):
            real_size.parse(words)


@pytest.mark.parametrize(("words", "named"), [("--threads 0", "--threads 0"), ("--scratch /no/such", "/no/such")])
def test_bad_flags_are_refused(words: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        real_size.parse(["--json", "f", *words.split()])
    assert named in capsys.readouterr().err
