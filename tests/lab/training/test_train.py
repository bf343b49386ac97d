# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from adatoken3d_ros.engine.answer import Question, Status
from adatoken3d_ros.lab.synthetic.furniture import KINDS, models_of
from adatoken3d_ros.lab.synthetic.questions import FAMILIES, generate
from adatoken3d_ros.lab.synthetic.views import render_views
from adatoken3d_ros.lab.training.data import Scene
from adatoken3d_ros.lab.training.losses import RelationHead, Truth, finding_loss, pointing_loss
from adatoken3d_ros.lab.training.packing import spatial_tokens
from adatoken3d_ros.lab.training.recipe import TrainConfig, TrainingError
from adatoken3d_ros.lab.training.train import Trainer
from adatoken3d_ros.lab.training.variants import model_parts, without_models
from adatoken3d_ros.lmm import registry
from adatoken3d_ros.lmm.llava3d.position import PositionMLP
from adatoken3d_ros.lmm.llava3d.untrained import spread_knots
from adatoken3d_ros.lmm.vision.tower import VisionTower
from tests.engine.scenes import ask, new_scene
from tests.lab.training.conftest import new_trainer

MakeTrainer = Callable[..., Trainer]


def test_the_loss_falls(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(steps=14, decay=0.0, rate=4e-3, early=0, thinnest=(1.0, 1.0), batches=1, sizes=((226, 2),))
    reports = [trainer.train_step() for _ in range(14)]
    assert [r.step for r in reports] == list(range(1, 15))
    for name in ("answer", "kind@1", "kind@2", "rank@1", "click@0", "told kind@2", "related", "pointing"):
        values = [r.losses[name] for r in reports]
        assert np.mean(values[-4:]) < 0.95 * np.mean(values[:4]), (name, values)
    right = trainer.evaluate(trainer.scenes[:1])
    assert set(right) <= {*FAMILIES, "macro"} and all(0 <= share <= 1 for share in right.values())


def test_aligned_first_the_tokens_tell_what_they_show(make_trainer: MakeTrainer) -> None:
    """Steps without questions leave the language model's layers alone, and then it goes on as ever."""
    trainer = make_trainer(steps=14, align=12, decay=0.0, rate=3e-3)
    before = trainer.parameters["language.model.layers.0.mlp.up_proj.weight"].clone()
    reports = [trainer.train_step() for _ in range(12)]
    assert all(set(r.losses) == {"kind@0", "box@0", "colour@0", "click@0"} for r in reports)
    kind = [r.losses["kind@0"] for r in reports]
    assert np.mean(kind[-3:]) < 0.95 * np.mean(kind[:3])
    assert torch.equal(before, trainer.parameters["language.model.layers.0.mlp.up_proj.weight"])
    assert {"answer", "kind@0", "kind@1", "pointing"} <= set(trainer.train_step().losses)
    assert not torch.equal(before, trainer.parameters["language.model.layers.0.mlp.up_proj.weight"])


def test_a_resumed_run_is_the_run_that_was_not_interrupted(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    settings: dict[str, object] = {"steps": 6, "align": 2, "turns": 3, "turn": 2, "told": True, "unseen": 1}
    through = make_trainer(**settings)
    for _ in range(6):
        through.train_step()
    first = make_trainer(**settings)
    for _ in range(3):
        first.train_step()
    first.save(tmp_path)
    second = make_trainer(**settings)
    second.resume(tmp_path)
    assert second.step == 3
    for _ in range(3):
        second.train_step()
    for name, parameter in through.parameters.items():
        assert torch.equal(parameter, second.parameters[name]), name


def test_the_checkpoint_answers_in_a_session(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """The loader's layout, and the same answers as the training code's teacher-forced ones."""
    trainer = make_trainer()
    for _ in range(2):
        trainer.train_step()
    trainer.save(tmp_path)
    model, tokenizer, report = registry.load(tmp_path)
    assert report.ignored == [] and report.vision == "embedded"
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["training"]["step"] == 2 and content["training"]["seed"] == 0
    room = trainer.scenes[0].room
    session = new_scene(model, tokenizer)
    for view in render_views(room, seed=0, count=3):
        session.observe(view.frame)
    qa = generate(room, np.random.default_rng(0), families=("class",))[0]
    answer = ask(session, Question(qa.question, max_new_tokens=4))
    assert answer.status in (Status.OK, Status.TRUNCATED)
    assert model.config.hash() == trainer.model.config.hash()


def test_what_cannot_be_resumed_is_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer()
    with pytest.raises(TrainingError, match="cannot be resumed"):
        trainer.resume(tmp_path)
    trainer.train_step()
    trainer.save(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["training"]["step"] = 7
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(TrainingError, match="of step 1, config.json of 7"):
        trainer.resume(tmp_path)
    content["training"]["step"], content["hidden_size"] = 1, 64
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(TrainingError, match="other sizes"):
        trainer.resume(tmp_path)


def test_a_blind_model_sees_one_empty_token(make_trainer: MakeTrainer, scenes: list[Scene]) -> None:
    trainer = make_trainer(blind=True)
    prefixes, _ = trainer.objective.prefixes(scenes[:2], spatial_tokens(trainer.model, scenes[:2], blind=True))
    assert torch.equal(prefixes[0], prefixes[1]) and len(prefixes[0]) == len(trainer.encoder.system) + 1
    report = trainer.train_step()
    assert "pointing" not in report.losses and not any(name.startswith("kind@") for name in report.losses)


def test_the_rate_rises_stays_and_falls() -> None:
    config = TrainConfig(steps=100, rate=1.0, warmup=10, decay=0.2, align=0)
    assert [config.rate_at(s) for s in (0, 9, 50, 80, 90, 99)] == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.5, 0.05])
    config = TrainConfig(steps=100, rate=1.0, warmup=10, decay=0.2, align=40)
    assert [config.rate_at(s) for s in (0, 39, 40, 49)] == pytest.approx([0.1, 1.0, 0.1, 1.0])
    with pytest.raises(TrainingError, match="steps must be positive, got 0"):
        TrainConfig(steps=0)
    with pytest.raises(TrainingError, match="2 batches a step cannot be shared by 3 processes"):
        TrainConfig(processes=3)


def test_sizes_are_drawn_and_what_scenes_keep() -> None:
    config = TrainConfig(align=10, early=5, thinnest=(0.25, 0.05))
    assert {config.kind(step) for step in range(15)} == {0}
    drawn = [config.kind(step) for step in range(15, 2015)]
    for kind, share in enumerate(config.mix):
        assert drawn.count(kind) / 2000 == pytest.approx(share, abs=0.04)
    assert drawn == [config.kind(step) for step in range(15, 2015)]
    assert {TrainConfig(blind=True).kind(step) for step in range(5000, 5100)} == {0}
    rng = np.random.default_rng(0)
    assert config.kept(0, rng) == (0.25, 0.05) and config.kept(2, rng) == (1.0, 1.0)
    between = np.array([config.kept(1, rng) for _ in range(100)])
    assert (between >= (0.25, 0.05)).all() and (between <= 1).all() and between.std(axis=0).min() > 0.1


def test_parts_of_the_furniture_are_left_out_in_turn(make_trainer: MakeTrainer, scenes: list[Scene]) -> None:
    """Nothing of what is left out is shown or asked about, in no class all that there is, and each comes back."""
    config = TrainConfig(turns=3, turn=2)
    assert [config.left_out(step) for step in range(8)] == [0, 0, 1, 1, 2, 2, 0, 0]
    assert TrainConfig().left_out(5) is None
    with pytest.raises(TrainingError, match="turns must be 0 or 2 and more, got 1"):
        TrainConfig(turns=1)
    parts = model_parts(3)
    trained = {kind: [model.id for model in models_of(kind, held_out=False)] for kind in KINDS}
    for models in trained.values():
        assert len({parts.get(one) for one in models}) == min(len(models), 3)
    assert {part for part in parts.values()} == {0, 1, 2} and parts.keys() <= {
        i for own in trained.values() for i in own
    }
    for scene in scenes:
        for part in range(3):
            less = without_models(scene, part, 3)
            gone = {i.instance for i in scene.room.items if parts.get(i.model.id) == part}
            assert gone.isdisjoint(less.instance.tolist()) and gone.isdisjoint(less.sights)
            stayed = [
                t for t in range(len(scene.features)) if gone.isdisjoint(scene.instance[scene.voxel == t].tolist())
            ]
            assert torch.equal(less.features, scene.features[stayed])
            asked = generate(less.room, np.random.default_rng(part), less.sights)
            assert all(gone.isdisjoint(qa.about) for qa in asked) and len(less.sights) + len(gone) >= len(scene.sights)
    asked_of: list[Scene] = []
    trainer = make_trainer(turns=3, turn=2, sizes=((226, 4),))
    trainer.questions = lambda scene, counts, rng: asked_of.append(scene) or []
    trainer.sample(3, 0)
    shown = {i.model.id for scene in asked_of for i in scene.room.items if i.instance in scene.sights}
    assert len(asked_of) == 4 and shown and all(parts.get(model) != 1 for model in shown)


def test_heads_learn_alone_at_first(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(align=0, heads_first=2)
    before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}

    def changed() -> set[str]:
        return {name for name, parameter in trainer.parameters.items() if not torch.equal(parameter, before[name])}

    trainer.train_step()
    trainer.train_step()
    assert changed() and all(name.startswith("heads.") for name in changed())
    trainer.train_step()
    assert any(".layers." in name for name in changed())
    with pytest.raises(TrainingError, match="heads_first must not be negative, got -1"):
        TrainConfig(heads_first=-1)


def test_truth_of_tokens_by_hand(scenes: list[Scene]) -> None:
    """Shares are counted patch by patch, slowly."""
    scene = scenes[1]
    truth = Truth.of(scene)
    items = scene.room.items
    for token in range(0, len(scene.features), 17):
        rows = [p for p in range(len(scene.voxel)) if int(scene.voxel[p]) == token]
        for column, item in enumerate(items):
            n = sum(int(scene.instance[p]) == item.instance for p in rows)
            assert float(truth.share[token, column]) == pytest.approx(n / len(rows))
        mean = scene.xyz[rows].double().mean(dim=0)
        assert truth.xyz[token].double().tolist() == pytest.approx(mean.tolist(), abs=1e-5)
    assert truth.share.sum(dim=1).tolist() == pytest.approx([1.0] * len(truth.share))
    assert truth.box[2].tolist() == pytest.approx([*items[2].centre, *items[2].size], abs=1e-5)


def test_ranks_count_what_has_been_met_before(scenes: list[Scene]) -> None:
    """Token by token, slowly: an item's rank is how many others of its class have a token before its first."""
    for scene in scenes:
        truth = Truth.of(scene)
        met: dict[int, int] = {}
        for token in range(len(scene.features)):
            for instance in scene.instance[scene.voxel == token].tolist():
                met.setdefault(instance, token)
        for column, item in enumerate(scene.room.items):
            if item.instance in met:
                others = [i for i in scene.room.items if i.kind == item.kind and i.instance in met]
                before = sum(met[i.instance] < met[item.instance] for i in others)
                assert int(truth.rank[column]) == min(before, 7)


def test_finding_loss_by_hand() -> None:
    """Two tokens at right angles: a click along the first has likeness 1 and 0."""
    tokens, clicks = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[3.0, 0.0]])
    assert float(finding_loss(tokens, clicks, torch.tensor([0]))) == pytest.approx(np.log1p(np.exp(-16)), abs=1e-6)
    assert float(finding_loss(tokens, clicks, torch.tensor([1]))) == pytest.approx(16.0, abs=1e-4)


def _share(rank: int, vision: VisionTower, scenes: list[Scene], folder: str) -> None:
    """One of two processes that train together; what they come to is written to a file by each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    trainer = new_trainer(vision, scenes, steps=3, align=1, processes=2)
    losses = [trainer.train_step().losses for _ in range(3)]
    right = trainer.evaluate(scenes[:3])
    save_file({n: p.detach().contiguous() for n, p in trainer.parameters.items()}, f"{folder}/{rank}.safetensors")
    Path(folder, f"{rank}.json").write_text(json.dumps([losses, right]))
    dist.destroy_process_group()


def test_processes_change_nothing(vision: VisionTower, scenes: list[Scene], tmp_path: Path) -> None:
    """Two processes that share a step's batches do what one does, to the bit, and agree on what they have done."""
    torch.multiprocessing.spawn(_share, (vision, scenes, str(tmp_path)), 2)
    alone = new_trainer(vision, scenes, steps=3, align=1)
    losses = [alone.train_step().losses for _ in range(3)]
    expected = json.loads(json.dumps([losses, alone.evaluate(scenes[:3])]))
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected
        found = load_file(tmp_path / f"{rank}.safetensors")
        for name, parameter in alone.parameters.items():
            assert torch.equal(parameter, found[name]), name


@torch.no_grad()
def test_positions_are_told_apart_from_the_start() -> None:
    """Each coordinate can be read off the hidden layer by a linear map, to centimetres, and so can which half of a
    metre that is, which is no linear function of it; without biases neither can, whatever is read off."""
    generator = torch.Generator().manual_seed(0)
    xyz = torch.rand(4000, 3, generator=generator) * torch.tensor([8.0, 8.0, 2.5]) - torch.tensor([4.0, 4.0, 0.0])
    wanted = torch.cat([xyz, torch.cos(2 * torch.pi * xyz)], dim=1).double()

    def unexplained(position: PositionMLP) -> torch.Tensor:
        hidden = torch.cat([position.hidden(xyz), torch.ones(4000, 1)], dim=1).double()
        fit = torch.linalg.lstsq(hidden[:3000], wanted[:3000], driver="gelsd").solution
        return (hidden[3000:] @ fit - wanted[3000:]).std(dim=0) / wanted[3000:].std(dim=0)

    position = PositionMLP(192)
    spread_knots(position, generator)
    assert (unexplained(position)[:3] < 0.04).all() and (unexplained(position)[3:] < 0.5).all()
    position.lift.bias.zero_()
    assert (unexplained(position)[[0, 1, 3, 4, 5]] > 0.15).all()


def test_likeness_is_where_half_of_the_heads_begin(make_trainer: MakeTrainer) -> None:
    """A row finds its own like among rows at random."""
    trainer = make_trainer()
    attention = trainer.model.language.model.layers[1].self_attn
    width = attention.head_dim
    x = torch.nn.functional.normalize(torch.randn(40, 48, generator=torch.Generator().manual_seed(0)), dim=1) * 48**0.5
    q, k = (projection(x)[:, :width] for projection in (attention.q_proj, attention.k_proj))
    assert torch.equal((q @ k.T).argmax(dim=1), torch.arange(40))
    assert not torch.equal(attention.q_proj.weight[width:], attention.k_proj.weight[width:])


def test_pointing_loss_by_hand() -> None:
    """Two tokens with logits 0 and ln 3: the second, which is the item, gets 3/4 of the attention."""
    truth = Truth(
        torch.tensor([[0.0, 1.0], [1.0, 0.0]]),
        torch.tensor([0]),
        torch.tensor([-1]),
        torch.zeros(1, 6),
        torch.zeros(2, 3),
        torch.tensor([0]),
    )
    queries = torch.tensor([[[1.0]], [[0.0]]])
    keys = torch.log(torch.tensor([[[1.0]], [[3.0]]]))
    share = truth.share[:, :-1]
    loss = pointing_loss(queries[:1], keys, 1.0, share, [(0,)])
    assert float(loss) == pytest.approx(-np.log(0.75), abs=1e-6)
    both = pointing_loss(queries, keys, 1.0, share, [(0,), (0,)])
    assert float(both) == pytest.approx(-(np.log(0.75) + np.log(0.5)), abs=1e-6)
    assert float(pointing_loss(queries, keys, 1.0, torch.zeros(2, 1), [(0,), (0,)])) == 0.0


def test_joined_truth_is_each_scenes_own(scenes: list[Scene]) -> None:
    own = [Truth.of(scene) for scene in scenes[:2]]
    joined = Truth.joined(own)
    m, items = len(own[0].share), len(own[0].kind)
    assert joined.scenes == 2 and joined.share.shape == (m + len(own[1].share), items + len(own[1].kind) + 1)
    assert torch.equal(joined.share[:m, :items], own[0].share[:, :-1])
    assert torch.equal(joined.share[m:, items:], own[1].share)
    assert float(joined.share[:m, items:-1].abs().sum()) == 0.0
    assert torch.equal(joined.share[:m, -1], own[0].share[:, -1])
    assert torch.equal(joined.box[items:], own[1].box)


@torch.no_grad()
def test_the_relation_head_tells_boxes_in_the_order_of_names(scenes: list[Scene]) -> None:
    truth, head = Truth.of(scenes[0]), RelationHead(6, things=2)
    head.boxes.weight.zero_()
    head.boxes.bias.copy_(torch.cat([truth.box[2], truth.box[0]]))
    hidden = torch.randn(5, 6)
    assert float(head(hidden, truth, [(4, (2, 0)), (1, (2,)), (0, ())])) == pytest.approx(0.0, abs=1e-6)
    assert float(head(hidden, truth, [(4, (0, 2))])) > 0.01
    assert float(head(hidden, truth, [(0, ())])) == 0.0


def test_what_boxes_are_weighed_by(make_trainer: MakeTrainer) -> None:
    """Whole part and tenths count, hundredths and commas little, of `[-1.` `2` `5` `,` `0.` `5` `0` `]`."""
    encoder = make_trainer().encoder
    ids = encoder.text("[-1.25, 0.50]")
    assert [encoder._weight(a, b) for a, b in zip(ids, ids[1:], strict=False)] == [1, 1, 0.15, 0.15, 1, 1, 0.15]


def test_the_exported_model_is_smaller_and_the_same(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.train_step()
    trainer.save(tmp_path / "whole")
    trainer.export(tmp_path / "half")
    sizes = {kind: (tmp_path / kind / "model.safetensors").stat().st_size for kind in ("whole", "half")}
    assert sizes["half"] < 0.7 * sizes["whole"]
    whole, half = (registry.load(tmp_path / kind, dtype=torch.float32)[0] for kind in ("whole", "half"))
    assert half.config.hash() == whole.config.hash()
    for name, tensor in whole.state_dict().items():
        close = 0.0 if name.startswith("vision.") else 1e-3
        assert torch.allclose(half.state_dict()[name], tensor, rtol=close, atol=close * 1e-3), name
