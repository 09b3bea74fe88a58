"""The page on which people keep, reject and re-caption: catalogue (DuckDB), pictures (bounded caches), server (loopback), page."""
