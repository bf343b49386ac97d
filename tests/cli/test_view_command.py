# SPDX-License-Identifier: Apache-2.0
"""The line that asks again what was asked in a local view: understood by `adatoken3d ask`, and with the same budget.

And what a running node would never hear of."""

from __future__ import annotations

import shlex

import numpy as np
import pytest

from adatoken3d_ros.cli.main import main, parser
from adatoken3d_ros.cli.view import asked_again
from adatoken3d_ros.engine.answer import Question


@pytest.mark.parametrize(("typed_ms", "asked_ms"), [(0.0, None), (500.0, 500.0), (500.0, None), (0.0, 120.5)])
def test_the_line_that_asks_again(typed_ms: float, asked_ms: float | None) -> None:
    line = f"adatoken3d --debug view --folder f --port=0 --token 0123456789abcdef --budget-ms {typed_ms:g}"
    question = Question("What's red?", np.array([[1.0, -2.0, 0.5]]), asked_ms)
    args = parser()[0].parse_args(shlex.split(asked_again(shlex.split(line), typed_ms, question, "none"))[1:])
    assert (args.question, args.strategy, args.click) == ("What's red?", "none", [[1.0, -2.0, 0.5]])
    assert args.budget_ms == (asked_ms or 0.0)


def test_settings_that_a_node_would_not_hear_of_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in (("--budget-ms", "500"), ("--strategy", "none"), ("--max-views", "7")):
        # A host on which nothing can listen ends the command where the option is let pass.
        assert main(["view", option, value, "--host", "no.such.host.invalid"]) == 2
        assert f"{option} {value}" in (told := capsys.readouterr().err) and "as it is configured" in told
