"""What configurations of before name under `controller_options`, as
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH: serve.front:middlewares`; Serve's proxy does not start when its
callback cannot be imported.

It used to count bodies in the proxy. The gateway does that (`serve.http.body`), and a reverse proxy where
strangers send (docs/security.md).
"""

from __future__ import annotations

import logging

from starlette.middleware import Middleware

logger = logging.getLogger(__name__)


def middlewares() -> list[Middleware]:
    """Return none, with a warning; called by Serve's proxy when it starts."""
    logger.warning(
        "controller_options names serve.front:middlewares, which does nothing any more: delete controller_options "
        "and its RESSHIFT_SERVE_* from the configuration; limits stand under args alone"
    )
    return []
