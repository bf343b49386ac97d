# SPDX-License-Identifier: Apache-2.0
"""The live page: an ask box, the scene in 3D, tokens that are selected and left out, answers side by side.

All browsers see one page. What they want is done by one thread, one thing after the other, and what is told to them
replaces what was told before: a browser that does not read costs neither memory nor time.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import viser

from adatoken3d_ros.engine.answer import Question
from adatoken3d_ros.engine.pictures import Picture
from adatoken3d_ros.engine.requests import about_point
from adatoken3d_ros.text import shown
from adatoken3d_ros.view import drawing
from adatoken3d_ros.view.dialogue import Asked, Dialogue, Pair
from adatoken3d_ros.view.report import report_page
from adatoken3d_ros.view.source import Source
from adatoken3d_ros.view.world import World

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.3  # between two looks at whether the scene has changed
STEP_SECONDS = 0.4  # of a layer, when an answer is played
MOST_WAITING = 8  # things that browsers want and that are not begun
MOST_BUDGET = 5000  # milliseconds
USUAL = "(as configured)"


class Page:
    """Builds the page on a server; `close` ends its threads, not the server.

    Args:
        server: as `view.server.start` gives it. source: of scene and answers.
    """

    def __init__(self, server: viser.ViserServer, source: Source) -> None:
        self._server, self._source = server, source
        self._dialogue, self._world = Dialogue(source), World(server)
        self._asked: Asked | None = None  # what is asked again
        self._drawn: Asked | None = None
        self._scene = source.scene()
        self._draws = threading.RLock()
        self._jobs = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adatoken3d-view")
        self._waiting = 0
        self._in_sight = False  # whether there has been a scene
        self._closed = threading.Event()
        server.gui.configure_theme(show_logo=False, show_share_button=False, control_width="large", dark_mode=True)
        tabs = server.gui.add_tab_group()
        with tabs.add_tab("Ask"):
            self._build_ask()
        with tabs.add_tab("Tokens"):
            self._build_tokens()
        with tabs.add_tab("Compare"):
            self._build_compare()
        with tabs.add_tab("History"):
            self._history = server.gui.add_html(drawing.history_html(()))
        server.scene.on_click()(self._on_click)
        server.scene.on_rect_select(modifier="shift")(self._on_rectangle)
        self._look = threading.Thread(target=self._watch, name="adatoken3d-look", daemon=True)
        self._redraw(everything=True)
        self._look.start()

    def close(self) -> None:
        self._closed.set()
        self._source.cancel()
        self._jobs.shutdown(wait=False, cancel_futures=True)
        self._look.join(2 * LOOK_SECONDS)

    def answer(self, question: Question) -> Asked:
        """Asks, in this thread, and shows the answer as it comes; one thread at a time. Raises as `Source.ask`."""
        asked = self._dialogue.ask(question, self._chosen_strategy, *self._progress(question.text))
        self._answer.content = drawing.answer_html(asked.answer.record)
        self._show(asked)
        return asked

    # --- what it is made of ---

    def _build_ask(self) -> None:
        gui = self._server.gui
        with gui.add_form(None) as form:
            self._text = gui.add_text("Question", "How many chairs are there?")
        form.on_submit(lambda _: self._ask())
        gui.add_button("Ask", icon=viser.Icon.MESSAGE_QUESTION).on_click(lambda _: self._ask())
        self._answer = gui.add_html(f"<i {drawing.INSET}>Ask about the scene, or click on a point of it.</i>")
        gui.add_button("Stop").on_click(lambda _: self._source.cancel())
        self._usual_budget = budget = round(self._source.budget_ms / 10) * 10  # as the slider has it
        self._budget = gui.add_slider("Budget (ms)", 0, max(MOST_BUDGET, budget), 10, budget,
                                      hint="time to the answer; 0 for none, or for a node's own")  # fmt: skip
        self._strategy = gui.add_dropdown("Strategy", (USUAL, *self._source.strategies))
        self._click = gui.add_text("Click asks", self._source.click_question, hint="{p} is where the point stands")
        gui.add_button("Report of this answer", icon=viser.Icon.FILE_DOWNLOAD).on_click(self._on_report)

    def _build_tokens(self) -> None:
        gui = self._server.gui
        self._mode: Any = gui.add_dropdown("Colour", drawing.MODES, initial_value=drawing.LIVE_PICTURE)
        self._mode.on_update(lambda _: self._redraw())
        self._layer: Any = gui.add_slider("Layer", 0, 1, 1, 0, hint="the scene as this layer of the model sees it")
        self._layer.on_update(lambda _: self._redraw())
        gui.add_button("Play layer by layer").on_click(lambda _: self._want(self._play))
        cameras = gui.add_checkbox("Key frames", True, hint="after an answer, the patches of the tokens that were left")
        cameras.on_update(lambda _: self._show_cameras(cameras.value))
        gui.add_html(f"<small {drawing.INSET}>Shift and drag selects tokens with a rectangle.</small>")
        self._chosen = gui.add_html(_chosen_html(0))
        gui.add_button("Ask again without them").on_click(lambda _: self._want(self._again, keep=False))
        gui.add_button("Ask again with only them").on_click(lambda _: self._want(self._again, keep=True))
        gui.add_button("Select nothing").on_click(lambda _: self._select(np.zeros((0, 3), np.float32)))
        self._pair = gui.add_html("")

    def _build_compare(self) -> None:
        gui, names = self._server.gui, self._source.strategies
        one = gui.add_dropdown("One", names)
        others = [name for name in names if name != one.value]
        other = gui.add_dropdown("Other", names, initial_value="none" if "none" in others else [*others, *names][0])
        gui.add_button("Compare on the question").on_click(
            lambda _: self._want(self._compare, strategies=(one.value, other.value))
        )
        self._compared = gui.add_html("")

    # --- what browsers want ---

    def _want(self, job: Callable[..., object], **arguments: Any) -> None:
        """Has it done when what came before is done; refused where too much waits."""
        with self._draws:
            if self._waiting >= MOST_WAITING or self._closed.is_set():
                self._say("Too much is waiting", "One thing after the other: try again when an answer has come.")
                return
            self._waiting += 1
        self._jobs.submit(self._do, partial(job, **arguments))

    def _do(self, job: Callable[[], object]) -> None:
        try:
            job()
        except Exception as error:
            if self._closed.is_set():
                return
            logger.warning("the view: %s", shown(error))
            self._say("That did not work", shown(error))
        finally:
            with self._draws:
                self._waiting -= 1

    def _say(self, title: str, text: str) -> None:
        for client in self._server.get_clients().values():
            client.add_notification(title, text, auto_close_seconds=10.0)

    def _question(self, text: str) -> Question:
        same = self._budget.value == self._usual_budget
        return Question(text, latency_budget_ms=float(self._source.budget_ms if same else self._budget.value) or None)

    @property
    def _chosen_strategy(self) -> str:
        return "" if self._strategy.value == USUAL else str(self._strategy.value)

    def _ask(self) -> None:
        if self._text.value.strip():
            self._want(self.answer, question=self._question(self._text.value))

    def _again(self, keep: bool) -> None:
        places, first = self._world.selected, self._asked
        if first is None or not len(places):
            self._say("Nothing to ask again", "First ask a question, then select tokens: shift and drag.")
            return
        pair = self._dialogue.again(first, places, keep, *self._progress(first.question.text))
        self._pair.content = drawing.pair_html(pair)
        self._answer.content = drawing.answer_html(pair.right.answer.record)
        self._show(pair.right, again_from=first)

    def _compare(self, strategies: tuple[str, str]) -> None:
        question = self._question(self._text.value)
        pair: Pair = self._dialogue.compare(question, strategies, *self._progress(question.text))
        self._compared.content = drawing.pair_html(pair)
        self._answer.content = drawing.answer_html(pair.right.answer.record)
        self._show(pair.right)

    def _play(self) -> None:
        if self._drawn is None or self._drawn.answer.tokens is None:
            self._say("Nothing to play", "First ask a question.")
            return
        self._leave_live()
        for layer in range(len(self._drawn.answer.tokens.spatial_per_layer)):
            self._layer.value = layer  # which draws it
            if self._closed.wait(STEP_SECONDS):
                return

    def _progress(self, question: str) -> tuple[Callable[[str], None], Callable[[str], None]]:
        """What shows the text and the stage of a question that runs."""
        state = {"text": "", "stage": "queue"}

        def tell(name: str, value: str) -> None:
            state[name] = value
            self._answer.content = drawing.writing_html(question, state["text"], state["stage"])

        return partial(tell, "text"), partial(tell, "stage")

    def _on_click(self, event: viser.SceneClickEvent) -> None:
        points = self._world.points
        number = drawing.hit(points, np.array(event.ray_origin), np.array(event.ray_direction))
        if number is not None and self._click.value.strip():
            point = points[number].astype(np.float64)
            self._want(self.answer, question=about_point(self._question(self._click.value), point))

    def _on_rectangle(self, event: viser.SceneRectSelectEvent) -> None:
        camera = event.client.camera
        T_world_camera = np.eye(4)
        T_world_camera[:3, :3] = viser.transforms.SO3(camera.wxyz).as_matrix()
        T_world_camera[:3, 3] = camera.position
        low, high = event.screen_min, event.screen_max
        points = self._world.points
        chosen = drawing.in_rectangle(points, np.linalg.inv(T_world_camera), camera.fov, camera.aspect, low, high)
        self._select(points[chosen])

    def _show_cameras(self, visible: bool) -> None:
        with self._draws:
            self._world.show_cameras(visible)

    def _select(self, chosen: np.ndarray[Any, Any]) -> None:
        with self._draws:
            self._world.select(chosen)
        self._chosen.content = _chosen_html(len(chosen))

    def _on_report(self, event: Any) -> None:
        asked = self._drawn
        if asked is None or event.client is None:
            self._say("No report yet", "First ask a question.")
            return
        pictures: tuple[Picture, ...] = self._scene.pictures
        command = self._source.command(asked.question, asked.strategy)
        page = report_page([asked.answer], pictures, command)
        event.client.send_file_download("adatoken3d-report.html", page.encode(), save_immediately=True)

    # --- what they see ---

    def _show(self, asked: Asked, again_from: Asked | None = None) -> None:
        """The answer's tokens. What was selected stays where the same question is asked again of that first answer."""
        self._asked, self._drawn = again_from or asked, asked
        layers = 1 if asked.answer.tokens is None else len(asked.answer.tokens.spatial_per_layer)
        self._layer.max = max(1, layers - 1)
        self._layer.value = 0
        self._leave_live()
        self._history.content = drawing.history_html(self._dialogue.history)
        with self._draws:
            if again_from is None:
                self._select(np.zeros((0, 3), np.float32))
            self._world.draw(self._scene, asked, self._mode.value, 0)
            self._world.cameras(self._scene.pictures, asked)
            self._world.answer(asked)

    def _leave_live(self) -> None:
        if self._mode.value in (drawing.LIVE_PICTURE, drawing.LIVE_AGE):
            self._mode.value = drawing.LAYER

    def _redraw(self, everything: bool = False) -> None:
        with self._draws, self._server.atomic():
            self._world.draw(self._scene, self._drawn, self._mode.value, int(self._layer.value))
            if everything:
                self._world.cameras(self._scene.pictures, self._drawn)
                self._stand()

    def _stand(self) -> None:
        """A browser begins above the scene as it is now; who came before there was one is brought there."""
        eye, middle = drawing.viewpoint(self._scene.xyz)
        self._server.initial_camera.position, self._server.initial_camera.look_at = eye, middle
        if self._in_sight or not len(self._scene.xyz):
            return
        self._in_sight = True
        for client in self._server.get_clients().values():
            client.camera.position, client.camera.look_at = eye, middle

    def _watch(self) -> None:
        """Draws the scene anew when it has changed."""
        while not self._closed.wait(LOOK_SECONDS):
            scene = self._source.scene()
            if scene is not self._scene:
                self._scene = scene
                try:
                    self._redraw(everything=True)
                except Exception:
                    logger.exception("the scene could not be drawn")


def _chosen_html(count: int) -> str:
    return f'<span id="adatoken3d-chosen" {drawing.INSET}>{count} tokens are selected.</span>'
