# SPDX-License-Identifier: Apache-2.0
"""How right the answers to a set are: the published metrics, with intervals over scenes and paired differences.

Metrics are in percent, as tables print them. A text metric of ScanQA's and SQA3D's kind is of cleaned texts; one of
Scan2Cap's kind is of descriptions between "sos" and "eos", and where the box that was asked about overlaps the true one
less than the threshold, nothing is between them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adatoken3d_ros.lab.evaluation.question_sets import Item
from adatoken3d_ros.lab.metrics import java
from adatoken3d_ros.lab.metrics.answers import cleaned, exact, overlap, refined
from adatoken3d_ros.lab.metrics.captions import bleu, bleu_counts, cider, rouge_l, tokens
from adatoken3d_ros.lab.metrics.resampling import Resampled, interval
from adatoken3d_ros.settings import DEFAULTS

FloatArray = NDArray[np.float64]
Record = Mapping[str, Any]
THRESHOLDS = (0.25, 0.5)
ANSWERED = {"OK", "TRUNCATED", "UNSURE"}  # statuses with a text
ORDER = (
    "EM",
    "EM-refined",
    "CIDEr",
    "BLEU-1",
    "BLEU-2",
    "BLEU-3",
    "BLEU-4",
    "METEOR",
    "ROUGE-L",
    "Acc@0.25",
    "Acc@0.5",
)
_LONGEST = 30  # words of a description that Scan2Cap compares


def mark(
    items: Sequence[Item],
    answers: Mapping[str, Sequence[Record]],
    *,
    resamples: int = 2000,
    seed: int = DEFAULTS["seed"],
) -> dict[str, Any]:
    """Everything a table says, as plain values: {strategy: metrics with intervals, kinds of questions, costs}.

    Differences are to the first strategy. A metric is of the questions that it can be told of; METEOR, which a program
    of its own computes, has no interval.
    """
    program = not java.why_not()
    drawn = {}
    first: dict[str, tuple[float, FloatArray]] = {}
    found: dict[str, Any] = {}
    for name, records in answers.items():
        metrics: dict[str, Any] = {}
        for metric, (chosen, values) in _columns(items, records, program).items():
            if isinstance(values, float):
                metrics[metric] = {"value": 100 * values}
                continue
            if (key := tuple(chosen)) not in drawn:
                drawn[key] = Resampled([items[index].scene for index in chosen], resamples, seed)
            value, draws = _value(metric, values, drawn[key])
            of, of_draws = first.setdefault(metric, (value, draws))
            metrics[metric] = {
                "value": value,
                "interval": interval(draws),
                "difference": value - of,
                "difference_interval": interval(draws - of_draws),
                "questions": len(chosen),
            }
        found[name] = {
            "metrics": dict(sorted(metrics.items(), key=_place)),
            "kinds": _kinds(items, records),
            "statuses": dict(Counter(record["status"] for record in records)),
            **_costs(records),
        }
    return {
        "questions": len(items),
        "scenes": len({item.scene for item in items}),
        "tokenizer": "Penn Treebank (Stanford CoreNLP 3.4.1)" if program else java.BUILT_IN,
        "meteor": java.why_not() or "METEOR 1.5",
        "strategies": found,
    }


def _columns(
    items: Sequence[Item], records: Sequence[Record], program: bool
) -> dict[str, tuple[list[int], FloatArray | float]]:
    """{metric: (questions it is of, what it is made of: (Q,) values, (Q, 10) counts of BLEU, or the whole)}."""
    texts = [record["text"] if record["status"] in ANSWERED else "" for record in records]
    found: dict[str, tuple[list[int], FloatArray | float]] = {}
    plain = [index for index, item in enumerate(items) if item.answers and item.given is None]
    if plain:
        pairs = [(texts[index], items[index].answers) for index in plain]
        found["EM"] = plain, np.array([float(exact(*pair)) for pair in pairs])
        found["EM-refined"] = plain, np.array([float(refined(*pair)) for pair in pairs])
        right = [[cleaned(one) for one in several] for _, several in pairs]
        found |= _text_columns(plain, [cleaned(text) for text, _ in pairs], right, program)
    seen = {
        index: overlap(item.given, item.box)
        for index, item in enumerate(items)
        if item.given is not None and item.box is not None
    }
    captions = list(seen)
    for threshold in THRESHOLDS if captions else ():
        said = [f"sos {texts[index]} eos" if share >= threshold else "sos eos" for index, share in seen.items()]
        right = [
            [" ".join(["sos", *tokens(one)[:_LONGEST], "eos"]) for one in items[index].answers] for index in captions
        ]
        several = _text_columns(captions, said, right, program)
        found |= {f"{metric}@{threshold:g}": column for metric, column in several.items()}
    shares = {
        index: overlap(records[index]["boxes"][0], item.box) if records[index]["boxes"] else 0.0
        for index, item in enumerate(items)
        if item.box is not None and item.given is None
    }
    for threshold in THRESHOLDS if shares else ():
        found[f"Acc@{threshold:g}"] = list(shares), (np.array(list(shares.values())) >= threshold).astype(np.float64)
    return found


def _text_columns(
    chosen: list[int], said: Sequence[str], right: Sequence[Sequence[str]], program: bool
) -> dict[str, tuple[list[int], FloatArray | float]]:
    part = java.penn_tokens if program else lambda texts: [tokens(text) for text in texts]
    answers = part(said)
    flat = iter(part([one for several in right for one in several]))
    wanted = [[next(flat) for _ in several] for several in right]
    pairs = list(zip(answers, wanted, strict=True))
    counts = np.array([bleu_counts(*pair) for pair in pairs])
    found: dict[str, tuple[list[int], FloatArray | float]] = {
        **{f"BLEU-{order}": (chosen, counts) for order in range(1, 5)},
        "ROUGE-L": (chosen, np.array([rouge_l(*pair) for pair in pairs])),
        "CIDEr": (chosen, cider(answers, wanted)),
    }
    if program:
        lines = [[" ".join(one) for one in several] for several in wanted]
        found["METEOR"] = chosen, java.meteor([" ".join(one) for one in answers], lines)
    return found


def _value(metric: str, values: FloatArray, drawn: Resampled) -> tuple[float, FloatArray]:
    """A metric of all questions and of each draw, percent."""
    if metric.startswith("BLEU-"):
        order = int(metric[5]) - 1
        return 100 * float(bleu(values.sum(axis=0))[order]), 100 * bleu(drawn.sums(values))[:, order]
    return 100 * float(values.mean()), 100 * drawn.means(values)


def _kinds(items: Sequence[Item], records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Exact match by kind of question, where the set has kinds."""
    found: dict[str, dict[str, float]] = {}
    for kind in sorted({item.kind for item in items if item.kind and item.answers}):
        pairs = [(r["text"], i.answers) for i, r in zip(items, records, strict=True) if i.kind == kind and i.answers]
        em, em_refined = (float(np.mean([match(*pair) for pair in pairs])) for match in (exact, refined))
        found[kind] = {"questions": len(pairs), "EM": 100 * em, "EM-refined": 100 * em_refined}
    return found


def _costs(records: Sequence[Record]) -> dict[str, float]:
    """What an answer took, on average; times are medians."""
    asked = [record for record in records if record["prefill_flops_unpruned"]]
    if not asked:
        return {}
    names = ("spatial_tokens", "retained_tokens", "prefill_flops", "prefill_flops_unpruned")
    means = {name: float(np.mean([record[name] for record in asked])) for name in names}
    times = {f"{stage}_ms": float(np.median([r["times_ms"][stage] for r in asked])) for stage in ("prefill", "total")}
    return {**means, "saved": 1 - means["prefill_flops"] / means["prefill_flops_unpruned"], **times}


def _place(item: tuple[str, Any]) -> tuple[str, int]:
    """By threshold, then in the order in which tables have the metrics."""
    base, _, threshold = item[0].partition("@")
    name = item[0] if item[0] in ORDER else base
    return "" if name == item[0] else threshold, ORDER.index(name)
