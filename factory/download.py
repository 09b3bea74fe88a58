"""Pictures by URL: lists of addresses become Parquet files of what they answered, kept in the data set folder.

`downloads/part-00000.parquet` (url, text, picture, wrong) holds the bytes as they came, published atomically, a part 256 URLs: a killed
download goes on after the last whole part, and a rerun reads the disk, not the net. The plan then points into these files as into any
Parquet source. What the server calls its answer counts for nothing; decoding decides later.

A run of failures that looks like an outage stops the download, and the parts of it are not kept; if it was killed before it could tell, the
next run asks for them anew. What failed for a reason that may pass is asked once more after `ask_again`; a part changes only where an answer
came.

Guards: http and https only; addresses that are not public are refused at connect time, whatever name led there (redirects, DNS answers that
change); bounded time, size, redirects and connections a host.
"""

from __future__ import annotations

import asyncio
import csv
import random
import re
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import RecipeError, StageError
from cluster.status import reason_kind
from cluster.storage import publish_bytes
from factory.address import Refused, find_aiohttp, guarded_resolver, refusal_in, refuse_address
from factory.ingest import attributes_of, url_key
from factory.prompts import read_lines
from factory.recipe import DownloadRecipe, PicturePlan

FOLDER = "downloads"
PART_URLS = 256
_SCHEMA = pa.schema([("url", pa.string()), ("text", pa.string()), ("picture", pa.binary()), ("wrong", pa.string())])
AGAIN = "again"
"""A file beside the parts: failures that may pass are to be asked again by the next plan."""
_PASSING = re.compile(r"HTTP (408|425|429|500|502|503|504)\b|no whole answer within |\w+Error(:|,|$)")
"""Reasons that an outage or a busy server gives, as `_fetch` words them."""
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_REDIRECT = {301, 302, 303, 307, 308}
_LONGEST_WAIT_S = 60.0


def download_all(
    recipe: PicturePlan,
    paths: list[Path],
    folder: Path,
    progress: Callable[[int], None] = lambda n: None,
    planned: bool = False,
) -> list[Path]:
    """The parts of all URLs in `paths`, in order, fetched where they are not there yet. Raises RecipeError for a bad list.

    `planned`: there is a plan of them already, so what failed stays as it is unless somebody wants it again."""
    assert recipe.download is not None
    parts: list[Path] = []
    some: list[_Listed] = []
    left, again, latest = recipe.limit, wants_again(folder), _Latest(recipe.download)
    spoilt = set() if planned else _spoilt(recipe.download, folder)

    def take() -> None:
        parts.append(_part(recipe, some, folder, len(parts), again, latest, spoilt))
        progress(len(some))
        some.clear()

    for one in (one for path in paths for one in _listed(path, recipe)):
        if left is not None and left == 0:
            break
        left = None if left is None else left - 1
        some.append(one)
        if len(some) == PART_URLS:
            take()
    if some:
        take()
    return parts


_Listed = tuple[str, str, str]
"""URL, text, attributes as JSON."""


class _Latest:
    """The parts that were fetched last, as many as mean something: are they the work of an outage?"""

    def __init__(self, recipe: DownloadRecipe) -> None:
        self._recipe = recipe
        self._parts: deque[tuple[Path, list[str]]] = deque()

    def add(self, part: Path, wrong: list[str]) -> None:
        """Judge a part before it is published. Raises StageError if most failed of late; the parts where most did are then removed, and the
        next run fetches them anew."""
        self._parts.append((part, wrong))
        total = sum(len(one) for _, one in self._parts)
        while total - len(self._parts[0][1]) >= self._recipe.failed_after:
            total -= len(self._parts.popleft()[1])
        failed = [why for _, one in self._parts for why in one if why]
        most = self._recipe.max_failed_share
        if total < self._recipe.failed_after or len(failed) <= most * total:
            return
        for path, one in self._parts:
            if sum(map(bool, one)) > most * len(one):
                path.unlink(missing_ok=True)
        (why, _), *_ = Counter(map(reason_kind, failed)).most_common(1)
        raise StageError(
            f"{len(failed)} of the last {total} URLs failed, more than factory.plan.download.max_failed_share ({most:g}); most often: {why}",
            where=str(part.parent),
            remedy="See whether the network is there, then run the same command again: it asks for these anew; or raise that key",
        )


def _spoilt(recipe: DownloadRecipe, folder: Path) -> set[Path]:
    """The last parts there, as far as in each most failed for reasons that may pass: a download that was killed in an outage leaves them."""
    found: set[Path] = set()
    for part in reversed(_parts(folder)):
        wrong = pq.read_table(part, columns=["wrong"])["wrong"].to_pylist()
        if sum(map(may_pass, wrong)) <= recipe.max_failed_share * len(wrong):
            break
        found.add(part)
    return found


def _part(
    recipe: PicturePlan,
    some: list[_Listed],
    folder: Path,
    number: int,
    again: bool,
    latest: _Latest,
    spoilt: Collection[Path],
) -> Path:
    assert recipe.download is not None
    final = folder / FOLDER / f"part-{number:05d}.parquet"
    if final.exists():
        table = pq.read_table(final, columns=["url", "text"])
        if list(zip(table["url"].to_pylist(), table["text"].to_pylist(), strict=True)) != [one[:2] for one in some]:
            raise StageError(
                "was downloaded from another list of URLs", where=str(final), remedy="Start in a new output folder"
            )
        if again or final in spoilt:
            _ask_part_again(recipe.download, final, latest if final in spoilt else None)
        return final
    answers = asyncio.run(_fetch_all(recipe.download, [url for url, *_ in some]))
    rows = [
        {"url": url, "text": text, "picture": data, "wrong": wrong, "attributes": attributes}
        for (url, text, attributes), (data, wrong) in zip(some, answers, strict=True)
    ]
    latest.add(final, [wrong for _, wrong in answers])
    more = [pa.field("attributes", pa.string())] if recipe.attribute_columns else []
    _publish(final, pa.Table.from_pylist(rows, schema=pa.schema([*_SCHEMA, *more])))
    return final


def _publish(final: Path, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    publish_bytes(final, sink.getvalue().to_pybytes())


def may_pass(wrong: str) -> bool:
    """Whether a URL that failed for this reason may answer another time."""
    return _PASSING.match(wrong) is not None


def failed_urls(folder: Path) -> list[tuple[str, str]]:
    """(id of its row, reason) of the URLs that failed for reasons that may pass, of the data set in `folder`; doubles come once."""
    found: dict[str, str] = {}
    for part in _parts(folder):
        for row in pq.read_table(part, columns=["url", "text", "wrong"]).to_pylist():
            if may_pass(row["wrong"]):
                found[url_key(row["url"], b"", row["text"])[0]] = row["wrong"]
    return list(found.items())


def ask_again(folder: Path) -> None:
    """Let the next plan ask for those once more."""
    publish_bytes(folder / FOLDER / AGAIN, b"")


def wants_again(folder: Path) -> bool:
    """Whether the plan in `folder` is yet to ask for what failed."""
    return (folder / FOLDER / AGAIN).exists()


def asked_again(folder: Path) -> None:
    """The plan has what came of it."""
    (folder / FOLDER / AGAIN).unlink(missing_ok=True)


def _parts(folder: Path) -> list[Path]:
    return sorted((folder / FOLDER).glob("part-*.parquet"))


def _ask_part_again(recipe: DownloadRecipe, final: Path, latest: _Latest | None) -> None:
    table = pq.read_table(final)
    rows = table.to_pylist()
    failed = [row for row in rows if may_pass(row["wrong"])]
    if not failed:
        return
    answers = asyncio.run(_fetch_all(recipe, [row["url"] for row in failed]))
    for row, (data, wrong) in zip(failed, answers, strict=True):
        row["picture"], row["wrong"] = data, wrong
    if latest is not None:
        latest.add(final, [row["wrong"] for row in rows])
    _publish(final, pa.Table.from_pylist(rows, schema=table.schema))


def _listed(path: Path, recipe: PicturePlan) -> Iterator[_Listed]:
    assert recipe.download is not None
    columns = [recipe.download.url_column, recipe.text_column, *recipe.attribute_columns]
    needed = [columns[0], *recipe.attribute_columns]
    if path.suffix == ".txt":
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in read_lines(file):
                url, _, text = line.strip().partition("\t")
                if url:
                    yield url.strip(), text.strip(), "{}"
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            reader = csv.DictReader(read_lines(file))
            try:
                _refuse_lacking(path, needed, list(reader.fieldnames or []))
                for row in reader:
                    yield (row[columns[0]] or "").strip(), row.get(columns[1]) or "", attributes_of(row, recipe)
            except csv.Error as error:
                raise RecipeError(
                    f"cannot be read ({error})",
                    where=f"{path} line {reader.line_num}",
                    remedy="Mend or delete that line",
                ) from error
    elif path.suffix == ".parquet":
        try:
            parquet = pq.ParquetFile(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise StageError(f"cannot be read ({error})", where=str(path), remedy="Copy it again") from error
        names = parquet.schema_arrow.names
        _refuse_lacking(path, needed, names)
        for batch in parquet.iter_batches(columns=[name for name in columns if name in names]):
            for row in batch.to_pylist():
                url, text = str(row[columns[0]] or "").strip(), str(row.get(columns[1]) or "")
                yield url, text, attributes_of(row, recipe)
    else:
        raise RecipeError(
            "is no list of URLs (.txt, .csv or .parquet)", where=str(path), remedy="Check factory.plan.paths"
        )


def _refuse_lacking(path: Path, needed: list[str], names: list[str]) -> None:
    for column in needed:
        if column not in names:
            raise RecipeError(
                f"has no column {column}; there are {names}",
                where=str(path),
                remedy="Set factory.plan.download.url_column and factory.plan.attribute_columns",
            )


async def _fetch_all(recipe: DownloadRecipe, urls: list[str]) -> list[tuple[bytes | None, str]]:
    """(bytes, "") or (None, why not) of each URL, in order; the same URL is asked for once."""
    aiohttp = find_aiohttp()
    timeout = aiohttp.ClientTimeout(total=recipe.timeout_s, connect=recipe.timeout_s, sock_read=recipe.timeout_s)
    connector = aiohttp.TCPConnector(
        limit=recipe.concurrent, limit_per_host=recipe.per_host, resolver=guarded_resolver(recipe.allow_private)
    )
    turns = asyncio.Semaphore(recipe.concurrent)
    hosts: dict[str, asyncio.Semaphore] = {}
    headers = {"User-Agent": recipe.user_agent, "Accept-Encoding": "identity"}
    # No proxy and no netrc from the environment: the guard on addresses must see the real ones.
    async with aiohttp.ClientSession(
        timeout=timeout, connector=connector, headers=headers, auto_decompress=False, trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    ) as session:  # fmt: skip

        async def one(url: str) -> tuple[bytes | None, str]:
            host = hosts.setdefault(_host(url), asyncio.Semaphore(recipe.per_host))
            async with host, turns:
                return await _fetch(session, recipe, url)

        unique = list(dict.fromkeys(urls))
        answers = dict(zip(unique, await asyncio.gather(*(one(url) for url in unique)), strict=True))
    return [answers[url] for url in urls]


async def _fetch(session: Any, recipe: DownloadRecipe, url: str) -> tuple[bytes | None, str]:
    aiohttp, wrong = find_aiohttp(), ""
    for attempt in range(recipe.tries):
        wait_s = recipe.back_off_s * 2**attempt
        try:
            return await _ask(session, recipe, url), ""
        except Refused as error:
            return None, str(error)
        except _Later as error:
            wrong, wait_s = str(error), max(wait_s, error.wait_s)
        except TimeoutError:
            wrong = f"no whole answer within {recipe.timeout_s:g} s"
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if refused := refusal_in(error):
                return None, refused
            wrong = f"{type(error).__name__}: {str(error)[:120]}".rstrip(": ")
        if attempt + 1 < recipe.tries:
            # Spread, so that many clients do not come back at once; what is fetched does not depend on it.
            await asyncio.sleep(min(wait_s, _LONGEST_WAIT_S) * random.uniform(0.5, 1.0))
    return None, f"{wrong}, {recipe.tries} tries" if recipe.tries > 1 else wrong


class _Later(Exception):
    """The server asks to come again."""

    def __init__(self, what: str, wait_s: float) -> None:
        super().__init__(what)
        self.wait_s = wait_s


async def _ask(session: Any, recipe: DownloadRecipe, url: str) -> bytes:
    for _ in range(recipe.redirects + 1):
        refuse_address(url, recipe.allow_private)
        async with session.get(url, allow_redirects=False) as answer:
            if answer.status in _REDIRECT and "Location" in answer.headers:
                url = urljoin(url, answer.headers["Location"])
                continue
            if answer.status in _AGAIN:
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
            return bytes(data)
    raise Refused(f"more than {recipe.redirects} redirects")


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
