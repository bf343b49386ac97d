# SPDX-License-Identifier: Apache-2.0
"""`adatoken3d convert`: what is written answers as what is converted at every load; PyTorch files; what is refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adatoken3d_ros.cli.main import main
from adatoken3d_ros.engine.self_test import answer, check, read_known
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.identity import original_identity
from adatoken3d_ros.lmm.safetensors_files import CheckpointError
from tests.architectures import NAMES, write_tiny


@pytest.fixture(scope="module", params=NAMES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(request.param, tmp_path_factory.mktemp(request.param), layers=3)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_converted_checkpoint_is_the_one_that_is_converted_at_load(
    checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    assert main(["convert", str(checkpoint), str(out), "--quantization", kind]) == 0
    model, tokenizer, _ = registry.load(out, dtype=torch.float32)
    other, _, _ = registry.load(checkpoint, dtype=torch.float32, quantization=kind)
    assert model.identity == other.identity and model.quantization == kind
    for mine, theirs in zip(answer(model, tokenizer)[1], answer(other, tokenizer)[1], strict=True):
        assert torch.equal(mine, theirs)
    known, plain = read_known(out), registry.load(checkpoint)[0]
    assert known is not None and known.model == plain.identity == original_identity(model.identity)
    assert "as known" in check(model, tokenizer, known)
    stored = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert stored < sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match=f"quantised to {kind} already and cannot become fp8"):
        registry.load(out, quantization="fp8")
    assert main(["convert", str(out), str(tmp_path / "again"), "--quantization", kind]) == 2


def test_shards_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from adatoken3d_ros.lmm.quantized import writing

    path = write_tiny(NAMES[0], tmp_path / "model", layers=2)
    monkeypatch.setattr(writing, "SHARD", 60_000)
    assert main(["convert", str(path), str(tmp_path / "out")]) == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[-1].name.endswith(f"-of-{len(files):05d}.safetensors")
    assert registry.load(tmp_path / "out")[0].identity == registry.load(path)[0].identity


def as_pickles(path: Path) -> Path:
    weights = load_file(path / "model.safetensors")
    torch.save(weights, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    return path


def test_pytorch_files_are_opened_for_weights_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny(NAMES[0], tmp_path / "model", layers=2)
    identity = registry.load(path)[0].identity
    as_pickles(path)
    (path / "training_args.bin").write_bytes(pickle.dumps("not looked at"))
    with pytest.raises(CheckpointError, match="adatoken3d convert .* OUT"):
        registry.load(path)
    assert main(["convert", str(path), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert f"opening {path / 'pytorch_model.bin'}" in said and "training_args" not in said
    assert registry.load(tmp_path / "out")[0].identity == identity
    assert not list((tmp_path / "out").glob("*.bin"))


class Runs:
    """Makes a folder where it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.where,)

    where = ""


def test_a_file_that_would_run_something_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = as_pickles(write_tiny(NAMES[0], tmp_path / "model", layers=2))
    bad = Runs()
    bad.where = str(tmp_path / "harm")
    torch.save({"model.norm.weight": bad}, path / "pytorch_model.bin")
    assert main(["convert", str(path), str(tmp_path / "out")]) == 2
    assert "pytorch_model.bin holds more than weights and was not run" in capsys.readouterr().err
    assert not (tmp_path / "harm").exists() and not (tmp_path / "out").exists()
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_a_vision_tower_is_copied_from_inside_the_checkpoint_alone(tmp_path: Path) -> None:
    path = write_tiny(NAMES[0], tmp_path / "models" / "model", layers=1)
    content = json.loads((path / "config.json").read_text())
    for folder in (path / "strategies", path / "tower", tmp_path / "other"):
        folder.mkdir()
        (folder / "note.txt").write_text("")
    (tmp_path / "made").mkdir()
    for tower in ("strategies/../../../other", "tower"):
        (path / "config.json").write_text(json.dumps({**content, "mm_vision_tower": tower}))
        assert main(["convert", str(path), str(tmp_path / "made" / tower[:5])]) == 0
    assert sorted(one.name for one in (tmp_path / "made").iterdir()) == ["strat", "tower"]
    assert (tmp_path / "made" / "tower" / "tower" / "note.txt").exists()


def test_weights_of_32_bits_that_do_not_fit_are_written_without_their_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from adatoken3d_ros.engine.preflight import need
    from adatoken3d_ros.lmm import safetensors_files

    path = write_tiny(NAMES[0], tmp_path / "model", layers=1)
    free = need(registry.outline(path), torch.bfloat16, max_views=1).total
    monkeypatch.setattr(safetensors_files, "free_bytes", lambda _: free)
    assert main(["convert", str(path), str(tmp_path / "out"), "--quantization", "int8"]) == 0
    assert "no self_test.json: its weights need" in capsys.readouterr().out.replace("\n", " ")
    assert list((tmp_path / "out").glob("*.safetensors")) and read_known(tmp_path / "out") is None


def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tiny(NAMES[0], tmp_path / "model", layers=1)
    for words, named in (
        ([str(tmp_path / "no"), str(tmp_path / "out")], "MODEL:"),
        ([str(path), str(path)], "is there already"),
        ([str(path), str(tmp_path / "a" / "b")], "is no directory"),
    ):
        assert main(["convert", *words]) == 2
        assert named in capsys.readouterr().err
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**content, "quantization_config": {"quant_method": "gptq"}}))
    assert main(["convert", str(path), str(tmp_path / "out")]) == 2
    assert "'gptq'" in capsys.readouterr().err
