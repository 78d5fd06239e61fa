"""Closes Ray's agent for runtime environments: over several nodes it listens on all addresses, and installs what it is told.

It imports this, where RAY_RUNTIME_ENV_PLUGINS names it, before it listens, and then answers its own node's raylet only.
"""

from aiohttp import web
from ray._private.runtime_env.plugin import RuntimeEnvPlugin

run_app = web.run_app


@web.middleware
async def from_own_node(request: web.Request, handler) -> web.StreamResponse:
    """Answer who comes from the address that he has asked: nobody else's packets do."""
    if request.remote != request.transport.get_extra_info("sockname")[0]:
        raise web.HTTPForbidden
    return await handler(request)


def run_closed(app: web.Application, **options) -> None:
    """web.run_app for an application that answers its own node only."""
    app.middlewares.append(from_own_node)
    run_app(app, **options)


web.run_app = run_closed


class OwnNodeOnly(RuntimeEnvPlugin):
    """What Ray's agent asks for: a plugin, here without a work of its own."""

    name = "bridge_own_node_only"
