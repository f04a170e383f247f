"""Patience with a store that is away for a moment."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from resshift.storage import StorageError, StorageReason

logger = logging.getLogger(__name__)
T = TypeVar("T")


def retried(access: Callable[[], T], *, attempts: int = 7, first_wait_s: float = 0.5) -> T:
    """Run an access again while the store is `unavailable`, waiting twice as long each time (31.5 s in all by
    default).

    `resshift.storage` repeats single requests within seconds; this is for outages and throttling that last
    longer.

    Raises:
        StorageError: Any other reason at once, `unavailable` after the last attempt.
    """
    for i_attempt in range(attempts):
        try:
            return access()
        except StorageError as error:
            if error.reason is not StorageReason.UNAVAILABLE or i_attempt == attempts - 1:
                raise
            wait_s = first_wait_s * 2**i_attempt
            logger.warning("attempt=%d/%d wait_s=%.1f error=%s", i_attempt + 1, attempts, wait_s, error)
            time.sleep(wait_s)
    raise ValueError(f"attempts must be at least 1, got {attempts}")
