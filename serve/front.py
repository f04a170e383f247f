"""A callback of Serve's proxy that does nothing, for configurations of version 0.1.

They name it under `controller_options`, as RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, and Serve's proxy
does not start when its callback cannot be imported. It used to count bodies in the proxy. The gateway does
that now (`serve.http.body`), and a reverse proxy where strangers send (docs/security.md).
"""

from __future__ import annotations

import logging

from starlette.middleware import Middleware

logger = logging.getLogger(__name__)


def middlewares() -> list[Middleware]:
    """Return none, with a warning; called by Serve's proxy when it starts."""
    logger.warning(
        "controller_options names serve.front:middlewares, which no longer does anything: delete "
        "controller_options with its RESSHIFT_SERVE_* from the configuration; limits are set under args only"
    )
    return []
