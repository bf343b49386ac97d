# SPDX-License-Identifier: Apache-2.0
"""A shared engine as a program: MODEL PORT, 0 for any. Tells its port once it listens, then of each request for what it
is, how many bodies of a scene came with it, and the status of its response."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import MutableMapping
from typing import Any

import uvicorn

from adatoken3d_ros.fleet import wire
from adatoken3d_ros.fleet.replica import Replica, ReplicaConfig


def telling(replica: Replica) -> Any:
    """The replica, which tells of its requests."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        came: list[bytes] = []

        async def heard() -> MutableMapping[str, Any]:
            message: MutableMapping[str, Any] = await receive()
            came.append(message.get("body", b""))
            return message

        async def told(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                path, data = scope["path"], b"".join(came)
                bodies = len(wire.unframed(data)[1]) - (path == wire.ASK) if data else 0
                print(path, bodies, message["status"], flush=True)
            await send(message)

        await replica(scope, heard, told)

    return app


async def main(model: str, port: str) -> None:
    replica = Replica(ReplicaConfig({"model.path": model, "budget.warm_up": False, "model.self_test": False}))
    config = uvicorn.Config(telling(replica), "127.0.0.1", int(port), log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await serving


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
