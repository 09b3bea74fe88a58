# pyright: reportMissingImports=false, reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
"""Spans for OpenTelemetry, where somebody asks for them: OTEL_EXPORTER_OTLP_ENDPOINT is set and the extra `otel` is installed. Else nothing.

A run is one trace: the run, its steps, and below `make` a span for each unit and stage, whichever process it was in. The address, headers
(often a secret), service name and sampling come from OpenTelemetry's own variables and are read by its SDK; none of them stands in a recipe.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

_ASKED = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_SEND_EVERY_MS = 1000
"""Ray ends workers without asking, so little is kept back."""
_FLUSH_MS = 5000
log = logging.getLogger("edgefusion")


def is_asked() -> bool:
    return any(os.environ.get(name) for name in _ASKED)


@contextmanager
def span(name: str, facts: Mapping[str, Any], parent: str) -> Generator[str]:
    """Around a piece of work; `parent` and what is yielded are W3C traceparents, empty where nobody asks for spans."""
    provider = _provider(os.getpid()) if is_asked() else None
    if provider is None:
        yield ""
        return
    from opentelemetry.propagate import extract, inject
    from opentelemetry.trace import StatusCode

    above = extract({"traceparent": parent} if parent else {})
    told = {f"edgefusion.{key}": value for key, value in facts.items() if isinstance(value, str | int | float)}
    # What an exception says may hold a secret: its kind is enough, the log has the rest, scrubbed.
    with provider.get_tracer("edgefusion").start_as_current_span(
        name, context=above, attributes=told, record_exception=False, set_status_on_exception=False
    ) as inner:
        carrier: dict[str, str] = {}
        inject(carrier)
        try:
            yield carrier.get("traceparent", "")
        except BaseException as error:
            inner.set_status(StatusCode.ERROR, type(error).__name__)
            raise


def flush() -> None:
    """Send what is kept back, before this process ends or is ended."""
    if _provider.cache_info().currsize and (provider := _provider(os.getpid())):
        with contextlib.suppress(Exception):
            provider.force_flush(_FLUSH_MS)


@lru_cache(maxsize=1)
def _provider(_pid: int) -> Any:
    """Our own, not the process's: Ray and others may have theirs. None, with a word in the log, if the packages are not there."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        log.warning("an OTEL_EXPORTER_OTLP_ENDPOINT is set, but spans need a package: pip install 'edgefusion[otel]'")
        return None
    # A collector that is away is told by the SDK at every try, over our bars.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    service = os.environ.get("OTEL_SERVICE_NAME", "edgefusion")
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(), schedule_delay_millis=_SEND_EVERY_MS))
    return provider
