# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from adatoken3d_ros.lab.synthetic.questions import FAMILIES, generate
from adatoken3d_ros.lab.training.data import Scene
from adatoken3d_ros.lab.training.packing import IGNORE, Shape, embed, exact, pack, run, spatial_tokens
from adatoken3d_ros.lab.training.train import Trainer
from adatoken3d_ros.lmm.llava3d.prompt import build_prompt
from adatoken3d_ros.lmm.text_places import parse_clicks


def test_packed_questions_equal_questions_asked_alone(
    make_trainer: Callable[..., Trainer], scenes: list[Scene]
) -> None:
    """The logits of every answer, against transformers' own forward of each whole prompt: scenes of different length
    side by side, questions of different length, padding everywhere."""
    trainer = make_trainer()
    model, scenes = trainer.model.eval(), scenes[:3]
    qas = [generate(s.room, np.random.default_rng(0), s.sights, per_family=2) for s in scenes]
    asked = [[trainer.encoder.encode(qa, s) for qa in own] for own, s in zip(qas, scenes, strict=True)]
    with torch.no_grad():
        spatial = spatial_tokens(model, scenes)
        prefixes, _ = trainer.objective.prefixes(scenes, spatial)
        packed = pack(asked, [len(p) for p in prefixes], Shape(3, 216, ((9, 16), (6, 24), (9, 48))))
        assert len({len(p) for p in prefixes}) > 1 and len({q.family for q in packed.questions}) > 6
        assert len(packed.questions) > 40
        hidden = run(model.language, prefixes, embed(model, packed), packed)
        logits = model.language.lm_head(hidden[3 * 216 :])
        by_text = [{trainer.encoder.encode(qa, s): qa for qa in own} for own, s in zip(qas, scenes, strict=True)]
        for number, question in enumerate(packed.questions):
            scene = int(packed.scene[number])
            text, points = parse_clicks(by_text[scene][question].question)
            prompt = build_prompt(trainer.tokenizer, text, n_clicks=len(points))
            clicks = model.embed_clicks(torch.tensor(points).reshape(-1, 3).float())
            alone = model.splice(prompt, spatial[scene], clicks).embeds
            answer = torch.tensor(question.ids[question.n_prompt :])
            whole = torch.cat([alone, model.language.model.embed_tokens(answer)[None]], dim=1)
            expected = model.language(inputs_embeds=whole).logits[0, len(prefixes[scene]) :]
            start = int(packed.start[number])
            got = logits[start : start + len(question.ids)]
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_left_out_and_a_long_prefix_refused(
    make_trainer: Callable[..., Trainer], scenes: list[Scene]
) -> None:
    trainer = make_trainer()
    qas = generate(scenes[0].room, np.random.default_rng(0), scenes[0].sights, per_family=2)
    asked = [[trainer.encoder.encode(qa, scenes[0]) for qa in qas]]
    packed = pack(asked, [40], Shape(1, 64, ((3, 16), (2, 48))))
    longest = sorted((len(q.ids) for q in asked[0]), reverse=True)
    assert len(packed.questions) == 5 and sorted(len(q.ids) for q in packed.questions)[-2:] == longest[:2][::-1]
    assert set(packed.question.tolist()) == {-1, 0, 1, 2, 3, 4}
    with pytest.raises(ValueError, match="prefix of 65 rows does not fit into 64"):
        pack(asked, [65], Shape(1, 64, ((3, 16),)))


def test_labels_are_the_answer_and_its_end(make_trainer: Callable[..., Trainer], scenes: list[Scene]) -> None:
    trainer = make_trainer()
    qas = generate(scenes[0].room, np.random.default_rng(1), scenes[0].sights, per_family=1)
    encoded = [trainer.encoder.encode(qa, scenes[0]) for qa in qas]
    packed = pack([encoded], [40])
    answers = {q: qa.answer for q, qa in zip(encoded, qas, strict=True)}
    for number, question in enumerate(packed.questions):
        own = packed.question == number
        labels = [int(v) for v in packed.label[own] if v != IGNORE]
        assert labels[-1] == trainer.tokenizer.eos_token_id
        assert trainer.tokenizer.decode(labels[:-1]).strip() == answers[question]
        first = int(packed.start[number]) + question.n_prompt - 1
        assert int(packed.label[first]) == labels[0] and int(packed.label[first - 1]) == IGNORE


def test_exact_needs_every_token_of_an_answer(make_trainer: Callable[..., Trainer], scenes: list[Scene]) -> None:
    trainer = make_trainer()
    qas = generate(scenes[0].room, np.random.default_rng(1), scenes[0].sights, per_family=1)
    packed = pack([[trainer.encoder.encode(qa, scenes[0]) for qa in qas]], [40])
    labelled = torch.nonzero(packed.label != IGNORE)[:, 0]
    logits = torch.nn.functional.one_hot(packed.label[labelled], len(trainer.tokenizer)).float()
    assert exact(logits, packed, labelled).all()
    last = torch.nonzero(packed.question[labelled] == 2)[-1]
    logits[last] = logits[last].roll(1, dims=1)
    assert np.flatnonzero(~exact(logits, packed, labelled)).tolist() == [2]


def test_every_word_of_questions_and_answers_is_one_token(
    make_trainer: Callable[..., Trainer], scenes: list[Scene]
) -> None:
    """No word falls apart into letters, and a decimal takes its sign, its whole part and one token a digit."""
    trainer = make_trainer()
    families = set()
    for seed in range(6):
        for scene in scenes:
            for qa in generate(scene.room, np.random.default_rng(seed), scene.sights, per_family=2):
                families.add(qa.family)
                text, points = parse_clicks(qa.question)
                for piece in build_prompt(trainer.tokenizer, text, n_clicks=len(points)).pieces:
                    if isinstance(piece, tuple):
                        names = trainer.tokenizer.convert_ids_to_tokens(list(piece))
                        letters = [n for n in names if len(n) == 1 and n.isalpha() or n.startswith("<0x")]
                        assert letters == [], (qa.question, names)
    assert families == set(FAMILIES)
    encode = trainer.encoder.text
    assert trainer.tokenizer.convert_ids_to_tokens(list(encode("[-1.25, 0.50]"))) == [
        *("▁[-1.", "2", "5", ",", "▁0.", "5", "0", "]")
    ]


def test_mentions_are_where_things_are_named(make_trainer: Callable[..., Trainer], scenes: list[Scene]) -> None:
    trainer = make_trainer()
    found = 0
    for scene in scenes:
        for qa in generate(scene.room, np.random.default_rng(3), scene.sights, per_family=2):
            encoded = trainer.encoder.encode(qa, scene)
            for row, instances in encoded.mentions:
                assert set(instances) <= set(qa.about)
                token = trainer.tokenizer.convert_ids_to_tokens([encoded.ids[row]])[0].lstrip("▁")
                kinds = {scene.room.item(i).kind for i in instances}
                click = row in {r for r, _ in encoded.clicks}
                assert click or any(token in (k.split()[-1], trainer_plural(k).split()[-1]) for k in kinds)
                found += 1
    assert found > 40


def trainer_plural(kind: str) -> str:
    from adatoken3d_ros.lab.synthetic.wordings import plural

    return plural(kind)
