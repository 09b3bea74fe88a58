"""Pictures by URL: lists of addresses become Parquet files of what they answered, kept in the data set folder.

`downloads/part-00000.parquet` (url, text, picture, wrong) holds the bytes as they came, published atomically, a part 256 URLs: a killed
download goes on after the last whole part, and a rerun reads the disk, not the net. The plan then points into these files as into any
Parquet source. What the server calls its answer counts for nothing; decoding decides later.

Guards: http and https only; addresses that are not public are refused at connect time, whatever name led there (redirects, DNS answers that
change); bounded time, size, redirects and connections a host.
"""

from __future__ import annotations

import asyncio
import csv
import ipaddress
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import RecipeError, StageError, TargetUnavailable
from cluster.storage import publish_bytes
from factory.prompts import read_lines
from factory.recipe import DownloadRecipe, PicturePlan

FOLDER = "downloads"
PART_URLS = 256
_SCHEMA = pa.schema([("url", pa.string()), ("text", pa.string()), ("picture", pa.binary()), ("wrong", pa.string())])
_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_REDIRECT = {301, 302, 303, 307, 308}
_LONGEST_WAIT_S = 60.0


class Refused(Exception):
    """An answer that will not change: its reason goes to the dead letter."""


def download_all(
    recipe: PicturePlan, paths: list[Path], folder: Path, progress: Callable[[int], None] = lambda n: None
) -> list[Path]:
    """The parts of all URLs in `paths`, in order, fetched where they are not there yet. Raises RecipeError for a bad list."""
    assert recipe.download is not None
    parts: list[Path] = []
    some: list[tuple[str, str]] = []
    left = recipe.limit
    for pair in (pair for path in paths for pair in read_list(path, recipe)):
        if left is not None and left == 0:
            break
        left = None if left is None else left - 1
        some.append(pair)
        if len(some) == PART_URLS:
            parts.append(_part(recipe.download, some, folder, len(parts)))
            progress(len(some))
            some = []
    if some:
        parts.append(_part(recipe.download, some, folder, len(parts)))
        progress(len(some))
    return parts


def _part(recipe: DownloadRecipe, some: list[tuple[str, str]], folder: Path, number: int) -> Path:
    final = folder / FOLDER / f"part-{number:05d}.parquet"
    if final.exists():
        table = pq.read_table(final, columns=["url", "text"])
        if list(zip(table["url"].to_pylist(), table["text"].to_pylist(), strict=True)) != some:
            raise StageError(
                "was downloaded from another list of URLs", where=str(final), remedy="Start in a new output folder"
            )
        return final
    answers = asyncio.run(_fetch_all(recipe, [url for url, _ in some]))
    rows = [
        {"url": url, "text": text, "picture": data, "wrong": wrong}
        for (url, text), (data, wrong) in zip(some, answers, strict=True)
    ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink, compression="zstd")
    publish_bytes(final, sink.getvalue().to_pybytes())
    return final


def read_list(path: Path, recipe: PicturePlan) -> Iterator[tuple[str, str]]:
    """(url, text) of a .txt (a URL a line, then perhaps a tab and the text), .csv or .parquet file. Raises RecipeError."""
    assert recipe.download is not None
    columns = [recipe.download.url_column, recipe.text_column]
    if path.suffix == ".txt":
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in read_lines(file):
                url, _, text = line.strip().partition("\t")
                if url:
                    yield url.strip(), text.strip()
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            reader = csv.DictReader(read_lines(file))
            try:
                _refuse_lacking(path, columns[0], list(reader.fieldnames or []))
                for row in reader:
                    yield (row[columns[0]] or "").strip(), row.get(columns[1]) or ""
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
        _refuse_lacking(path, columns[0], names)
        for batch in parquet.iter_batches(columns=[name for name in columns if name in names]):
            for row in batch.to_pylist():
                yield str(row[columns[0]] or "").strip(), str(row.get(columns[1]) or "")
    else:
        raise RecipeError(
            "is no list of URLs (.txt, .csv or .parquet)", where=str(path), remedy="Check factory.plan.paths"
        )


def _refuse_lacking(path: Path, column: str, names: list[str]) -> None:
    if column not in names:
        raise RecipeError(
            f"has no column {column}; there are {names}",
            where=str(path),
            remedy="Set factory.plan.download.url_column",
        )


async def _fetch_all(recipe: DownloadRecipe, urls: list[str]) -> list[tuple[bytes | None, str]]:
    """(bytes, "") or (None, why not) of each URL, in order; the same URL is asked for once."""
    aiohttp = _aiohttp()
    timeout = aiohttp.ClientTimeout(total=recipe.timeout_s, connect=recipe.timeout_s, sock_read=recipe.timeout_s)
    connector = aiohttp.TCPConnector(
        limit=recipe.concurrent, limit_per_host=recipe.per_host, resolver=_resolver(recipe.allow_private)
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
    aiohttp, wrong = _aiohttp(), ""
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
            if refused := _refusal(error):
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
        _refuse_address(url, recipe.allow_private)
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


def _refuse_address(url: str, allow_private: bool) -> None:
    """Raises Refused for what is neither http nor https, carries a password, or names an address that is not public."""
    from yarl import URL

    try:
        parts = urlsplit(url)
        # As aiohttp will read it, which makes plain digits of all others: `１２７.0.0.1` is this machine too.
        host, _ = URL(url).raw_host, parts.port
    except ValueError:
        raise Refused("not a URL") from None
    if parts.scheme not in ("http", "https") or not host:
        raise Refused("not an http or https URL")
    if parts.username is not None or parts.password is not None:
        raise Refused("the URL carries a user name or password")
    try:
        address = str(ipaddress.ip_address(host.partition("%")[0]))
    except ValueError:
        if host.replace(".", "").isdigit():
            # aiohttp takes it for an address and asks no resolver, and the system would make one of it.
            raise Refused("an address that is not spelled as one") from None
        return  # a name: the resolver looks at where it leads
    if not allow_private and not is_public(address):
        raise Refused(_NOT_PUBLIC)


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, also where IPv6 wraps IPv4."""
    found = ipaddress.ip_address(address)
    if isinstance(found, ipaddress.IPv6Address):
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo[1] if found.teredo else None)
        if inner is None and found in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None and not is_public(str(inner)):
            return False
    return found.is_global and not found.is_multicast


def _resolver(allow_private: bool) -> Any:
    aiohttp = _aiohttp()

    class Guarded(aiohttp.ThreadedResolver):
        """Gives only addresses that may be connected to; aiohttp connects to just these."""

        async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> Any:
            found = await super().resolve(host, port, family)
            if not allow_private and not all(is_public(one["host"].partition("%")[0]) for one in found):
                raise OSError(_NOT_PUBLIC)
            return found

    return Guarded()


_NOT_PUBLIC = "the address is not public"


def _refusal(error: BaseException | None) -> str:
    """The resolver's refusal inside of the errors that aiohttp wraps it in; empty if it is none."""
    while error is not None:
        if _NOT_PUBLIC in str(error):
            return _NOT_PUBLIC
        error = error.__cause__
    return ""


def _aiohttp() -> Any:
    try:
        import aiohttp
    except ImportError:
        raise TargetUnavailable("downloading needs aiohttp", remedy="pip install 'edgefusion[urls]'") from None
    return aiohttp
