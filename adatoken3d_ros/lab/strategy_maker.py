# SPDX-License-Identifier: Apache-2.0
"""How a pruning strategy is made: prompts of scenes, what is mined of them, the choice of gates, what these save."""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from adatoken3d_ros.decoder.adapter import Decoder
from adatoken3d_ros.decoder.prefill import prefill
from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.lab.calibration import Calibration, calibrate
from adatoken3d_ros.lab.cost import FlopsCost, LatencyCost, time_layer
from adatoken3d_ros.lab.expected_loss import expected_loss
from adatoken3d_ros.lab.gates import MAX_GATES
from adatoken3d_ros.lab.information import FloatArray, InformationSet
from adatoken3d_ros.lab.mining import mine
from adatoken3d_ros.lab.probe import HORIZON_KL, RATIOS, Probe, Reference, Sample, massive_dims
from adatoken3d_ros.pruning import flops
from adatoken3d_ros.pruning.decay import Decay, adatoken_schedule
from adatoken3d_ros.pruning.policies import make_policy
from adatoken3d_ros.pruning.schedule import Schedule, ScheduleError, Stage
from adatoken3d_ros.pruning.view import Policy, PolicyError
from adatoken3d_ros.scene.frames import PosedFrame

_TIMED_RUNS = 3
_NEW_TOKENS = 16  # length of the answer whose operations are told
# Shares of the first gate's slots for tokens that are named, and the gate at which they are compared.
NAMED = (0.0, 0.25, 0.5, 0.75)
BY_NAME = Schedule((Stage(0, 0.25),))
# What is foreseen costs nothing, and where rows always stay a gate has to take more of the others.
_FORESEEN_RATIOS = (*RATIOS, 0.03, 0.02)

# (step, done, total), total None where nobody knows it.
Report = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Wanted:
    """How gates are to be chosen, as the options of `adatoken3d calibrate` say; None: the default.

    Attributes:
        given: the schedule, where no gate is to be chosen.
        sink_dims: where huge activations mark tokens that are ranked last; empty: where they are found.
    """

    kind: str
    given: Schedule | None = None
    debias: int | None = None
    sink_dims: list[int] | None = None
    answer_tokens: int = 4
    max_gates: int | None = None
    end_share: float | None = None
    flops_reduction: float | None = None
    latency_reduction: float | None = None
    max_kl: float | None = None
    withdraw: bool = False
    horizon_kl: float | None = None


@dataclass
class Prompts:
    """Calibration prompts, the scene and question that each comes from, and the views of its scene."""

    samples: list[Sample] = field(default_factory=list)
    scenes: list[str] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    views: list[int] = field(default_factory=list)

    def extend(self, more: Prompts) -> None:
        """Takes others in behind these."""
        for name, own in vars(self).items():
            own.extend(getattr(more, name))


def collect(
    scene: Scene,
    scenes: Iterable[tuple[str, Path, Iterable[PosedFrame]]],
    questions: Sequence[str] | Callable[[Scene, int], Sequence[str]],
    report: Report,
    first: int = 0,
) -> Prompts:
    """Shows the frames of each scene (name, path, frames) to the scene, which makes its prompts of every question.

    `questions` may depend on the scene and its number, which for these begins with `first`.

    Raises:
        ValueError: for a scene without valid depth; names its path.
    """
    prompts = Prompts()
    n_frames = 0
    for index, (name, path, frames) in enumerate(scenes, first):
        scene.clear()
        for frame in frames:
            scene.observe(frame)
            scene.encode_pending()
            n_frames += 1
            report("frames", n_frames, None)
        if scene.tokens() is None:
            raise ValueError(f"{path} has no frame with valid depth")
        for question in questions(scene, index) if callable(questions) else questions:
            spliced, block = scene.spliced(Question(question))
            prompts.samples.append(Sample(spliced.embeds, spliced.layout, block.scene))
            prompts.scenes.append(name)
            prompts.questions.append(question)
            prompts.views.append(len(scene.poses))
    report("frames", n_frames, n_frames)
    return prompts


def mine_all(scene: Scene, prompts: Prompts, report: Report) -> InformationSet:
    """Mines every prompt."""
    found = []
    total = len(prompts.samples) * scene.runtime.n_layers
    for index, sample in enumerate(prompts.samples):
        before = index * scene.runtime.n_layers
        found.append(
            mine(
                scene.runtime.model.decoder,
                sample.embeds,
                spatial_start=sample.spatial_start,
                n_spatial=sample.n_spatial,
                layout=sample.layout,
                progress=lambda done, _, before=before: report("information", before + done, total),  # type: ignore[misc]
            )
        )
    return InformationSet(tuple(found), tuple(prompts.scenes), tuple(prompts.questions), scene.runtime.model.identity)


@dataclass
class Extra:
    """What a kind of strategy leaves behind besides its schedule."""

    probe: Probe
    decay: Decay | None = None
    calibration: Calibration | None = None

    def divergence_figures(self, schedule: Schedule) -> dict[str, Any]:
        """Measured divergence of the schedule; of a calibrated one also what was planned and asked for."""
        if self.calibration is None:
            return {"kl": self.probe.divergence(schedule)}
        found = self.calibration
        return {
            "kl": found.divergence,
            "kl_sum_of_single_gates": found.planned.divergence,
            "cost_share": found.cost,
            "cost_share_asked": found.limit,
            "cost_within_limit": found.within_limit,
        }

    def save(self, path: Path) -> None:
        """Writes the fit, or the sensitivity and the withdrawal scan, as JSON."""
        content: dict[str, Any] = {}
        if self.decay is not None:
            content["decay"] = {name: getattr(self.decay, name) for name in ("A", "B", "C", "D", "end_share", "error")}
            content["curve"] = self.decay.curve().tolist()
        if (found := self.calibration) is not None:
            content["layers"], content["ratios"] = found.layers, found.ratios
            content["sensitivity"] = found.sensitivity.tolist()
            content["withdrawal"] = None if found.withdrawal is None else found.withdrawal.tolist()
            content["factor"] = found.factor
            content["planned_kl"] = found.planned_divergence
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def make_probe(
    scene: Scene,
    wanted: Wanted,
    prompts: Prompts,
    report: Report,
    references: Sequence[Reference] | None = None,
    kind: type[Probe] = Probe,
) -> Probe:
    """The unpruned answers, which a policy and its schedule are judged by; `references`: those, if they are known."""
    end_of_answer = scene.runtime.tokenizer.eos_token_id
    return kind(
        scene.runtime.model.decoder,
        prompts.samples,
        make_policy("none"),
        n_tokens=wanted.answer_tokens,
        eos_ids=() if end_of_answer is None else (end_of_answer,),
        references=references,
        progress=lambda done, total: report("answers", done, total),
    )


def policy_options(
    scene: Scene, name: str, wanted: Wanted, prompts: Prompts, information: InformationSet, probe: Probe
) -> dict[str, float | list[float] | list[int]]:
    """What the policy is told of the model beside the schedule: attention by position, dimensions of sinks, and of
    `ours` how far its tokens can be compared with words."""
    options: dict[str, float | list[float] | list[int]] = {}
    if wanted.debias is not None:
        options["debias"] = information.position_curve(wanted.debias)
    if wanted.sink_dims is not None:
        options["sink_dims"] = wanted.sink_dims or list(massive_dims(scene.runtime.model.decoder, prompts.samples))
    decoder, sample = scene.runtime.model.decoder, prompts.samples[0]
    if name == "ours" and gates_before_all(decoder, make_policy(name, **options), sample):
        tried = [make_policy(name, named=share, **options) for share in NAMED]
        share = NAMED[int(np.argmin([probe.with_policy(one).divergence(BY_NAME) for one in tried]))]
        options |= {"named": share} if share else {}
    return options


def choose(
    scene: Scene,
    wanted: Wanted,
    policy: Policy,
    prompts: Prompts,
    information: InformationSet,
    probe: Probe,
    report: Report,
) -> tuple[Schedule, dict[str, Any], Extra]:
    """The schedule of the kind that was asked for, the settings behind it, and what else came of it.

    `probe`: of these prompts (`make_probe`), with any policy.
    """
    decoder, samples = scene.runtime.model.decoder, prompts.samples
    probe = probe.with_policy(policy)
    if wanted.given is not None:
        return wanted.given, {}, Extra(probe)
    if wanted.kind == "adatoken":
        end_share, max_gates = wanted.end_share or 0.10, wanted.max_gates or 3
        schedule, decay = adatoken_schedule(information.contribution, end_share, max_gates)
        schedule = schedule.not_before(decoder.first_gate)
        settings = {"end_share": end_share, "max_gates": max_gates}
        fit = {"fit_rate": decay.B, "fit_error": decay.error, "fit_correlation": decay.correlation}
        return schedule, settings | {name: round(value, 6) for name, value in fit.items()}, Extra(probe, decay=decay)
    by_latency = wanted.latency_reduction is not None
    cost = (
        LatencyCost(partial(time_layer, decoder, progress=partial(report, "latency")), samples)
        if by_latency
        else FlopsCost(decoder.size, samples)
    )
    saved = wanted.latency_reduction or wanted.flops_reduction or 0.63
    eta = wanted.horizon_kl or HORIZON_KL
    found = calibrate(
        probe,
        cost,
        1.0 - saved,
        max_gates=wanted.max_gates or MAX_GATES,
        first=max(decoder.first_gate, 0 if gates_before_all(decoder, policy, samples[0]) else 1),
        ratios=_FORESEEN_RATIOS if wanted.kind == "mined" else RATIOS,
        foresee=partial(foreseen, prompts, information) if wanted.kind == "mined" else None,
        withdraw=wanted.withdraw,
        eta=eta,
        max_divergence=wanted.max_kl,
        progress=report,
    )
    settings = {
        "latency_reduction" if by_latency else "flops_reduction": saved,
        "max_gates": wanted.max_gates or MAX_GATES,
    }
    settings |= {"horizon_kl": eta} if wanted.withdraw else {}
    settings |= {"max_kl": wanted.max_kl} if wanted.max_kl else {}
    return found.schedule, settings, Extra(probe, calibration=found)


def gates_before_all(decoder: Decoder, policy: Policy, sample: Sample) -> bool:
    """Whether a policy can choose before the first layer, where nothing has been asked yet."""
    half = Schedule((Stage(0, 0.5),))
    try:
        prefill(decoder, sample.embeds, sample.layout, half, policy, scene=sample.scene)
    except (PolicyError, ScheduleError):
        return False
    return True


def foreseen(
    prompts: Prompts, information: InformationSet, layers: Sequence[int], ratios: Sequence[float]
) -> FloatArray:
    """(len(layers), len(ratios)) mean over the prompts of what `expected_loss` says of single gates."""
    orders = [None if sample.scene is None else sample.scene.order.cpu().numpy() for sample in prompts.samples]
    found = [expected_loss(one, layers, ratios, o) for one, o in zip(information.prompts, orders, strict=True)]
    mean: FloatArray = np.mean(found, axis=0)
    return mean


def measure(scene: Scene, policy: Policy, schedule: Schedule, prompts: Prompts, report: Report) -> dict[str, Any]:
    """FLOPs saved in three conventions (mean over the prompts) and measured prefill times of one prompt."""
    decoder = scene.runtime.model.decoder
    saved = defaultdict[str, list[float]](list)
    for sample, views in zip(prompts.samples, prompts.views, strict=True):
        encoder = views * scene.runtime.model.vision.flops_per_view
        n_question = sample.layout.n_question
        pruned, whole = (
            flops.three_conventions(
                decoder.size,
                counts := one.counts(sample.n_spatial, scene.runtime.n_layers, policy.kept),
                sample.n_text,
                n_new=_NEW_TOKENS,
                encoder=encoder,
                scoring=flops.scoring_flops(policy, decoder.size, sample.n_spatial, counts, sample.n_text, n_question),
            )
            for one in (schedule, Schedule())
        )
        for convention, operations in pruned.items():
            saved[convention].append(flops.reduction(operations, whole[convention]))
    sample = prompts.samples[0]
    times: dict[str, list[float]] = {"unpruned": [], "pruned": []}
    for index in range(_TIMED_RUNS + 1):
        for name, one in (("unpruned", Schedule()), ("pruned", schedule)):
            start = time.perf_counter()
            filled = prefill(decoder, sample.embeds, sample.layout, one, policy, scene=sample.scene)
            filled.logits.cpu()  # waits for the device
            times[name].append((time.perf_counter() - start) * 1e3)
        report("timing", index + 1, _TIMED_RUNS + 1)
    return {
        "flops_reduction": {name: round(statistics.fmean(values), 4) for name, values in saved.items()},
        # The first run of each warms up.
        "prefill_ms": {name: round(statistics.median(values[1:]), 3) for name, values in times.items()},
        "spatial_tokens": sample.n_spatial,
        "spatial_tokens_by_layer": list(schedule.counts(sample.n_spatial, scene.runtime.n_layers, policy.kept)),
    }
