# SPDX-License-Identifier: Apache-2.0
"""Should the rows that end the lines of a view's grid stay at every gate, or go with the last token of their line?

Such rows have no place and no policy chooses among them. They stay (`kept`), or go (`dropped`): runs of full length in
which what was dropped is hidden, so both hold the same spatial tokens, chosen by `ours`. Once more with `dropped` given
as many more tokens as it may have for the operations of `kept` (`refilled`):

    kl            divergence from the unpruned answer, nats, mean over the right answer's tokens
    macro         accuracy, mean over families, boxes apart; differences are paired, intervals 95 % over rooms
    flops         exact prefill operations over those of the unpruned prompt, scoring apart

    python -m benchmarks.newlines --json F [--model DIR] [--questions 300] [--scenes DIR]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.lab.probe import Sample
from adatoken3d_ros.lab.training.data import grid_lines
from adatoken3d_ros.lmm.untrained import trainable_of
from adatoken3d_ros.pruning.flops import prefill_flops
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule, scaled
from benchmarks._paired import Tally
from benchmarks._scenes import Advance, Reader, bar, find_rooms, machine, write_json
from benchmarks.missing_depth import MODEL, accuracy, points

SCHEDULES = {"60 %, then 30 %": (0.6, 0.3), "25 %, then 10 %": (0.25, 0.1), "30 %, then 5 %": (0.3, 0.05)}
WAYS = ("kept", "dropped", "refilled")
_FACTORS = np.linspace(1.0, 3.0, 41)
_TRIED = 12  # prompts on which `refilled` is given its tokens


def measure(reader: Reader, folder: Path, questions: int, seed: int, progress: Advance) -> dict[str, Any]:
    """Divergence, accuracy and operations of the ways to treat them, by schedule."""
    rooms = find_rooms(reader, folder, "test", questions, seed=seed)
    lead = trainable_of(json.loads((reader.path / "config.json").read_text(encoding="utf-8"))).ANSWER_LEAD
    prompts: list[tuple[Sample, Tensor, list[int]]] = []
    asked: list[tuple[int, str]] = []
    for room in rooms:
        scene = room.scene()
        about = [qa for qa in room.questions if qa.box is None]
        assert scene.where is not None, "the model's tokens are those of voxels"
        line = torch.unique_consecutive(torch.from_numpy(grid_lines(scene.where)), return_inverse=True)[1]
        for sample, qa in zip(reader.samples(scene, about), about, strict=True):
            answer = reader.tokenizer.encode(lead + qa.answer, add_special_tokens=False)
            prompts.append((sample, line, [*answer, reader.eos]))
            asked.append((room.seed, qa.family))
    schedules = {name: _schedule(reader.n_layers, ratios) for name, ratios in SCHEDULES.items()}
    ways = [(name, way) for name in SCHEDULES for way in WAYS]
    few = prompts[:: max(1, len(prompts) // _TRIED)]
    factors = {name: _refill(reader.decoder, few, one) for name, one in schedules.items()}
    right, kl, spent = (np.zeros((1 + len(ways), len(prompts))) for _ in range(3))
    for k, (sample, line, answer) in enumerate(prompts):
        full = torch.full((sample.n_tokens,), reader.n_layers)
        reference = hidden_run(reader.decoder, sample, answer, full)
        spent[0, k] = operations(reader.decoder, sample, full)
        right[0, k] = _right(reference, answer)
        for row, (name, way) in enumerate(ways, 1):
            schedule = scaled(schedules[name], factors[name]) if way == "refilled" else schedules[name]
            last = last_layers(reader.decoder, sample, line, schedule, newlines_go=way != "kept")
            found = hidden_run(reader.decoder, sample, answer, last)
            kl[row, k] = float((reference.exp() * (reference - found)).sum(-1).mean())
            right[row, k], spent[row, k] = _right(found, answer), operations(reader.decoder, sample, last)
        progress(k + 1, len(prompts))
    tally = Tally([room for room, _ in asked], [family for _, family in asked], right, seed=seed)
    result: dict[str, Any] = {"questions": len(asked), "rooms": tally.rooms, "unpruned": accuracy(tally, 0, 0)}
    for row, (name, way) in enumerate(ways, 1):
        gap = kl[row] - kl[row - WAYS.index(way)]  # to `kept`
        low, high = (float(v) for v in np.quantile(_means(gap, asked, seed), (0.025, 0.975)))
        result.setdefault(name, {})[way] = {
            "kl": float(kl[row].mean()),
            **({} if way == "kept" else {"kl_less_kept": float(gap.mean()), "kl_interval": [low, high]}),
            "flops": float(spent[row].sum() / spent[0].sum()),
            **accuracy(tally, row, 0),
            **({"more_tokens": factors[name]} if way == "refilled" else {}),
        }
    return result


def _means(values: NDArray[np.float64], asked: Sequence[tuple[int, str]], seed: int) -> NDArray[np.float64]:
    """Bootstrap means of rooms."""
    rooms = np.array([room for room, _ in asked])
    means = np.array([values[rooms == room].mean() for room in np.unique(rooms)])
    drawn = np.random.default_rng(seed).integers(len(means), size=(2000, len(means)))
    found: NDArray[np.float64] = means[drawn].mean(axis=1)
    return found


def _schedule(n_layers: int, ratios: tuple[float, float]) -> Schedule:
    """Gates at a quarter and at half of the depth."""
    return Schedule.of([n_layers // 4, n_layers // 2], list(ratios))


def _right(log_probs: Tensor, answer: Sequence[int]) -> bool:
    return log_probs.argmax(-1).tolist() == list(answer)


def last_layers(decoder: Decoder, sample: Sample, line: Tensor, schedule: Schedule, *, newlines_go: bool) -> Tensor:
    """(S,) the last layer that sees each row of a prompt.

    Args:
        line: (N,) int64 rising, the line of each spatial token.
        newlines_go: the row behind the last token of a line goes with the last of its tokens, as in the gate.
    """
    rows = sample.layout.rows
    assert rows is not None
    policy, layout = make_policy("ours"), sample.layout if newlines_go else replace(sample.layout, closing=None)
    trace = prefill(decoder, sample.embeds, layout, schedule, policy, scene=sample.scene).trace
    last = torch.full((sample.n_tokens,), len(decoder) - 1)
    last[rows] = trace.last_layer
    if newlines_go:
        lines = int(line[-1]) + 1
        end = torch.zeros(lines, dtype=torch.int64).scatter_reduce(0, line, rows, "amax") + 1
        # The last one is read with the question.
        last[end[:-1]] = torch.full((lines,), -1).scatter_reduce(0, line, trace.last_layer, "amax")[:-1]
    return last


@torch.inference_mode()
def hidden_run(decoder: Decoder, sample: Sample, answer: Sequence[int], last: Tensor) -> Tensor:
    """Log-probabilities (T, V) of an answer's T tokens, each after those before it; layer last[i] is row i's last."""
    model = decoder.language.model
    embeds = torch.cat([sample.embeds, decoder.embed(torch.tensor(answer[:-1]))[None]], dim=1)
    n = embeds.shape[1]
    seen = torch.cat([last, torch.full((n - len(last),), len(decoder))])
    hidden, causal, own = embeds, torch.ones(n, n, dtype=torch.bool).tril(), torch.eye(n, dtype=torch.bool)
    turned = model.rotary_emb(hidden, torch.arange(n)[None])
    for i, layer in enumerate(model.layers):
        mask = (causal & ((seen >= i) | own))[None, None]
        hidden = layer(hidden, attention_mask=mask, position_embeddings=turned)
    logits: Tensor = decoder.language.lm_head(model.norm(hidden[0, -len(answer) :]))
    return logits.log_softmax(-1)


def operations(decoder: Decoder, sample: Sample, last: Tensor) -> float:
    """Exact prefill operations of the rows that each layer sees."""
    counts = [int((last >= i).sum()) for i in range(len(decoder))]
    return prefill_flops(decoder.size, counts, 0)


def _refill(decoder: Decoder, prompts: Sequence[tuple[Sample, Tensor, list[int]]], schedule: Schedule) -> float:
    """By how much the ratios may grow where newlines go, at the operations of a run where they stay."""

    def spent(factor: float, newlines_go: bool) -> float:
        one = scaled(schedule, factor)
        lasts = [last_layers(decoder, s, line, one, newlines_go=newlines_go) for s, line, _ in prompts]
        return sum(operations(decoder, prompt[0], last) for prompt, last in zip(prompts, lasts, strict=True))

    limit, best = spent(1.0, False), 1.0
    for factor in _FACTORS:
        if factor * max(stage.ratio for stage in schedule.stages) > 1 or spent(float(factor), True) > limit:
            break
        best = float(factor)
    return best


def report(result: Mapping[str, Any]) -> Table:
    """Schedules and ways down."""
    title = f"{result['questions']} questions, unpruned {result['unpruned']['macro']:.3f}"
    table = Table("schedule", "newlines", "KL", "operations", "macro", "to unpruned, points", title=title)
    for name in SCHEDULES:
        for way, one in result[name].items():
            table.add_row(name, way, f"{one['kl']:.3f}", f"{one['flops']:.1%}", f"{one['macro']:.3f}", points(one))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.newlines", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--json", type=Path, required=True, help="file to write the figures to")
    parser.add_argument("--model", type=Path, default=MODEL, help="checkpoint (%(default)s)")
    parser.add_argument("--questions", type=int, default=300, help="at least so many, boxes included (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and the bootstrap")
    parser.add_argument("--scenes", type=Path, metavar="DIR", help="rooms, encoded once and kept (none are kept)")
    args = parser.parse_args()
    if args.questions < 1:
        parser.error(f"--questions {args.questions} must be at least 1")
    console, reader = Console(), Reader(args.model)
    with TemporaryDirectory() as temporary, bar(console, "prompts") as progress:
        result = measure(reader, args.scenes or Path(temporary), args.questions, args.seed, progress)
    console.print(report(result))
    result |= {"model": reader.about(), "machine": machine()}
    write_json(args.json, result)


if __name__ == "__main__":
    main()
