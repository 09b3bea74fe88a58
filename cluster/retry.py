"""Another try for what a store may well do the next time: a time-out, a broken connection, an overloaded store.

Bounded in tries and time, told in the log. A no is taken for a no: what is missing, forbidden or there already is not asked for again. The
drivers of stores have retries of their own, which these come on top of: not all have them, and none sees a stream break off.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from cluster.storage import store_code

TRIES = 4
FIRST_WAIT_S = 0.5
"""Doubled before each further try, and up to half as much again by chance, so that the workers of a cluster do not all come back at once."""
_LAST_TRY_S = 120.0
"""No new try begins later than this: drivers may themselves have waited for minutes."""
_PASSING_STATUS = (408, 425, 429, 500, 502, 503, 504)
_PASSING_CODES = (
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
)
_PASSING_KINDS = (
    # botocore's
    "ConnectionClosedError",
    "ConnectTimeoutError",
    "EndpointConnectionError",
    "IncompleteReadError",
    "ReadTimeoutError",
    "ResponseStreamingError",
    # aiohttp's, of gs:// and https://
    "ClientConnectionError",
    "ClientPayloadError",
    # http.client's and urllib3's
    "IncompleteRead",
    "ProtocolError",
)
_NO = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)

log = logging.getLogger("edgefusion")
Answer = TypeVar("Answer")


def retried(do: Callable[[], Answer], where: str) -> Answer:
    """What `do` gives; it is called again, up to TRIES times in all, while it raises what `is_passing`. `where` is for the log."""
    end = time.monotonic() + _LAST_TRY_S
    wait_s = FIRST_WAIT_S
    for left in range(TRIES - 1, -1, -1):
        try:
            return do()
        except Exception as error:  # each store has exceptions of its own
            pause_s = wait_s * random.uniform(1, 1.5)
            if not left or not is_passing(error) or time.monotonic() + pause_s > end:
                raise
            first = (str(error).splitlines() or [""])[0] or type(error).__name__
            log.warning("%s: %s; another try in %.1f s, %d left", where, first, pause_s, left)
        time.sleep(pause_s)
        wait_s *= 2
    raise AssertionError("the last try returns or raises")


def is_passing(error: BaseException) -> bool:
    """Trouble that may be over at the next try. The outermost error that says anything decides: a store's driver hides the real one in a cause."""
    for one in chain_of(error):
        if isinstance(one, _NO):
            return False
        if isinstance(one, TimeoutError | ConnectionError) or store_code(one) in _PASSING_CODES:
            return True
        if (status := _status(one)) is not None:
            return status in _PASSING_STATUS
        if any(kind.__name__ in _PASSING_KINDS for kind in type(one).__mro__):
            return True
    return False


def chain_of(error: BaseException) -> list[BaseException]:
    """The error and what it came from, the outermost first."""
    found: list[BaseException] = []
    inner: BaseException | None = error
    while inner is not None and inner not in found:
        found.append(inner)
        inner = inner.__cause__ or inner.__context__
    return found


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of botocore, aiohttp, gcsfs or requests carries."""
    answer: Any = getattr(error, "response", None)
    try:
        return int(answer["ResponseMetadata"]["HTTPStatusCode"])
    except (KeyError, TypeError, ValueError):
        pass
    for status in (getattr(error, "status", None), getattr(error, "code", None), getattr(answer, "status_code", None)):
        if str(status).isdigit() and 400 <= int(str(status)) < 600:
            return int(str(status))
    return None
