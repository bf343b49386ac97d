# SPDX-License-Identifier: Apache-2.0
"""Replicas as Ray Serve has them: a deployment whose requests come through the door, and whose router knows scenes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adatoken3d_ros.fleet.door import guard
from adatoken3d_ros.fleet.metrics import record
from adatoken3d_ros.fleet.replica import STOP_SECONDS, Replica, ReplicaConfig

if TYPE_CHECKING:
    from ray.serve import Application


def application(config: ReplicaConfig) -> Application:
    """The deployment, to be run by Ray Serve; raises ImportError without Ray."""
    from ray import serve

    class Entrance:
        """An object, as Ray Serve would call a function to build an application."""

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            while scope["type"] == "lifespan":  # nothing is to be done at either end, but Serve waits for it
                kind = (await receive())["type"]
                await send({"type": f"{kind}.complete"})
                if kind == "lifespan.shutdown":
                    return
            served: Any = serve.get_replica_context().servable_object
            await served.enter(scope, receive, send)

    @serve.deployment(name="engine")
    @serve.ingress(Entrance())
    class Served:
        """A replica as Ray Serve has it."""

        def __init__(self) -> None:
            self.replica = Replica(config, record=record)
            self.guarded = guard(self._routed, config.door)

        async def enter(self, scope: Any, receive: Any, send: Any) -> None:
            await self.guarded(scope, receive, send)

        async def _routed(self, scope: Any, receive: Any, send: Any) -> None:
            if name := serve.get_multiplexed_model_id():
                await self.scene(name)
            await self.replica(scope, receive, send)

        @serve.multiplexed(max_num_models_per_replica=4 * config.max_scenes)
        async def scene(self, name: str) -> str:
            """Tells the router that this scene's requests come here; what is held of it, `Scenes` knows."""
            return name

        def check_health(self) -> None:
            """Asked by Serve, which replaces a replica that raises."""
            self.replica.check()

        def __del__(self) -> None:
            if replica := getattr(self, "replica", None):
                replica.stop()

    options: dict[str, Any] = {"num_cpus": config.cpus, "num_gpus": config.gpus}
    bound: Application = Served.options(  # type: ignore[attr-defined]
        num_replicas=config.replicas,
        max_ongoing_requests=1000,
        health_check_period_s=1.0,
        graceful_shutdown_timeout_s=STOP_SECONDS,
        ray_actor_options=options,
    ).bind()
    return bound
