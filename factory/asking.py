"""URLs asked for, many at once, those of the earliest place first; whoever asks says what becomes of an answer.

A URL that is to be asked again leaves its place among the `concurrent` ones while it waits, and keeps the one of its host, which asked for
peace. Guards: http and https only; addresses that are not public are refused at connect time, whatever name led there (redirects, DNS answers
that change); bounded time, size, redirects and connections a host.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urljoin, urlsplit

from factory.address import Refused, find_aiohttp, guarded_resolver, refusal_in, refuse_address
from factory.recipe import DownloadRecipe

_REDIRECT = {301, 302, 303, 307, 308}
_LONGEST_WAIT_S = 60.0


@dataclass(order=True)
class Job:
    """A URL to ask for."""

    place: int
    """In the list; no two have the same."""
    url: str = field(compare=False)
    take: Callable[[str, bytearray | None, str], None] = field(compare=False)
    """Told (url, bytes, "") or (url, None, why not)."""
    fail: Callable[[Exception], None] = field(compare=False)
    """Told of an error that is no answer: what `take` raised, or a fault of ours."""
    tried: int = field(default=0, compare=False)


@dataclass
class _Host:
    busy: int = 0
    waiting: list[Job] = field(default_factory=list)


@contextlib.asynccontextmanager
async def asking(recipe: DownloadRecipe, may_ask: Callable[[int], bool]) -> AsyncGenerator[Asker]:
    """Somebody who asks until the block ends, whatever is left. `may_ask` says whether the URL at a place may be asked now."""
    aiohttp = find_aiohttp()
    timeout = aiohttp.ClientTimeout(total=recipe.timeout_s, connect=recipe.timeout_s, sock_read=recipe.timeout_s)
    connector = aiohttp.TCPConnector(
        limit=recipe.concurrent, limit_per_host=recipe.per_host, resolver=guarded_resolver(recipe.allow_private)
    )
    headers = {"User-Agent": recipe.user_agent, "Accept-Encoding": "identity"}
    # No proxy and no netrc from the environment: the guard on addresses must see the real ones.
    async with aiohttp.ClientSession(
        timeout=timeout, connector=connector, headers=headers, auto_decompress=False, trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    ) as session:  # fmt: skip
        asker = Asker(recipe, session, may_ask)
        workers = [asyncio.create_task(asker.work()) for _ in range(recipe.concurrent)]
        try:
            yield asker
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


class Asker:
    """The jobs that wait, and how many of a host are at work."""

    def __init__(self, recipe: DownloadRecipe, session: Any, may_ask: Callable[[int], bool]) -> None:
        self._recipe, self._session, self._may_ask = recipe, session, may_ask
        self._ready: list[Job] = []
        self._hosts: dict[str, _Host] = {}
        self._news = asyncio.Event()

    def add(self, job: Job) -> None:
        """One more, after all that were added before it."""
        host = self._hosts.setdefault(_host(job.url), _Host())
        if host.busy == self._recipe.per_host:
            heapq.heappush(host.waiting, job)
        else:
            host.busy += 1
            self._push(job)

    def look(self) -> None:
        """Ask `may_ask` again."""
        self._news.set()

    async def work(self) -> None:
        """Ask for one URL after another, for ever."""
        while True:
            job = await self._next()
            try:
                wait_s = await self._ask(job)
            except Exception as error:
                wait_s = None
                job.fail(error)
            if wait_s is None:
                self._leave(_host(job.url))
            else:
                asyncio.get_running_loop().call_later(wait_s, self._push, job)

    def _push(self, job: Job) -> None:
        heapq.heappush(self._ready, job)
        self._news.set()

    async def _next(self) -> Job:
        while not (self._ready and self._may_ask(self._ready[0].place)):
            self._news.clear()
            await self._news.wait()
        return heapq.heappop(self._ready)

    def _leave(self, name: str) -> None:
        """Give the place at a host to the next one."""
        host = self._hosts[name]
        if host.waiting:
            self._push(heapq.heappop(host.waiting))
            return
        host.busy -= 1
        if not host.busy:
            del self._hosts[name]

    async def _ask(self, job: Job) -> float | None:
        """One try. Seconds to wait before the next one, None if there is none."""
        recipe, aiohttp = self._recipe, find_aiohttp()
        wait_s, job.tried = recipe.back_off_s * 2**job.tried, job.tried + 1
        answer, wrong = None, ""
        try:
            answer = await _get(self._session, recipe, job.url)
        except Refused as error:
            job.take(job.url, None, str(error))
            return None
        except _Later as error:
            wrong, wait_s = str(error), max(wait_s, error.wait_s)
        except TimeoutError:
            wrong = f"no whole answer within {recipe.timeout_s:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if refused := refusal_in(error):
                job.take(job.url, None, refused)
                return None
            wrong = f"{type(error).__name__}: {str(error)[:120]}".rstrip(": ")
        if answer is None and job.tried < recipe.tries:
            # Spread, so that many clients do not come back at once; what is fetched does not depend on it.
            return min(wait_s, _LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
        job.take(job.url, answer, f"{wrong}, {recipe.tries} tries" if wrong and recipe.tries > 1 else wrong)
        return None


def may_answer_later(status: int) -> bool:
    """Whether a server that answers so may do better another time: all that it puts down to itself. Proxies and CDNs have numbers of their
    own for that (520 to 530), and one that is wrongly set up says anything."""
    return status in (408, 425, 429) or 500 <= status < 600


class _Later(Exception):
    """The server asks to come again."""

    def __init__(self, what: str, wait_s: float) -> None:
        super().__init__(what)
        self.wait_s = wait_s


async def _get(session: Any, recipe: DownloadRecipe, url: str) -> bytearray:
    """The bytes of an answer, redirects followed. Raises Refused, _Later, and what aiohttp raises."""
    for _ in range(recipe.redirects + 1):
        refuse_address(url, recipe.allow_private)
        async with session.get(url, allow_redirects=False) as answer:
            if answer.status in _REDIRECT and "Location" in answer.headers:
                url = urljoin(url, answer.headers["Location"])
                continue
            if may_answer_later(answer.status):
                wait = answer.headers.get("Retry-After", "")
                raise _Later(f"HTTP {answer.status}", float(wait) if wait.isdigit() else 0.0)
            if answer.status != 200:
                raise Refused(f"HTTP {answer.status}")
            if (answer.content_length or 0) > recipe.max_bytes:
                raise Refused(f"{answer.content_length} bytes, over the limit")
            data = bytearray()
            async for chunk in answer.content.iter_chunked(1 << 16):
                data += chunk
                if len(data) > recipe.max_bytes:
                    raise Refused(f"more than {recipe.max_bytes} bytes")
            if not data:
                raise Refused("the answer is empty")
            return data
    raise Refused(f"more than {recipe.redirects} redirects")


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
