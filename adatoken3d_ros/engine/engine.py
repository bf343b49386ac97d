# SPDX-License-Identifier: Apache-2.0
"""The engine: one loaded model that answers questions about any number of scenes."""

from __future__ import annotations

from collections.abc import Callable

from adatoken3d_ros.engine.answer import Answer, Question
from adatoken3d_ros.engine.answering import answer
from adatoken3d_ros.engine.config import SessionConfig
from adatoken3d_ros.engine.runtime import Runtime
from adatoken3d_ros.engine.scene import Scene
from adatoken3d_ros.pruning.strategy import Strategy


class Engine(Runtime):
    """See `Runtime` for what it is made of. It is not thread safe: `engine.worker` gives it a thread of its own."""

    def open(self, config: SessionConfig | None = None, strategy: Strategy | None = None) -> Scene:
        """A new, empty scene, which shares nothing with others but this engine; raises as `Scene` does."""
        return Scene(self, config, strategy=strategy)

    def ask(
        self,
        scene: Scene,
        question: Question,
        *,
        arrived: float | None = None,
        on_text: Callable[[str, int], None] | None = None,
        on_stage: Callable[[str], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> Answer:
        """Answers a question about everything that a scene of this engine has observed.

        Args:
            scene: what the question is about.
            question: what is asked.
            arrived: when it arrived, on the engine's clock; now if None. Time before this call counts as `queue`.
            on_text: called with (whole words so far, tokens so far) after every decode step; the answer's text begins
                with them.
            on_stage: called with the name of each stage as it begins.
            should_stop: polled between layers, of the vision tower too, and decode steps; True ends the answer as
                CANCELLED, and views that were being encoded wait on.

        Returns:
            An answer with a status. Where memory runs out the question is begun anew, smaller, once; then it is an
            ERROR that says where. What still raises is a defect of the model, the program or the machine.

        Raises:
            ValueError: for a scene of another engine.
        """
        if scene.runtime is not self:
            raise ValueError("the scene belongs to another engine")
        return answer(
            scene,
            question,
            arrived=self.clock() if arrived is None else arrived,
            on_text=on_text,
            on_stage=on_stage or (lambda _: None),
            should_stop=should_stop or (lambda: False),
        )
