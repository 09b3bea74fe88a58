"""What servers charged, kept in Parquet files."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.usage import Usage, read_usage, spell_usage


def test_files_add_up_and_damaged_ones_count_for_nothing(tmp_path: Path) -> None:
    table = pa.table({"id": ["a"]})
    for name, usage in (("a", Usage(2, 30, 40, 0, 1.5)), ("b", Usage(1, 5, 0, 1, 0.25)), ("c", Usage())):
        pq.write_table(table.replace_schema_metadata(usage.metadata()), tmp_path / f"{name}.parquet")
    (tmp_path / "d.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    pq.write_table(table.replace_schema_metadata({b"usage": b"{"}), tmp_path / "e.parquet")
    found = read_usage(sorted(tmp_path.glob("*.parquet")))
    assert found == Usage(3, 35, 40, 1, 1.75)
    assert spell_usage(found) == "3 answers, 35 tokens read, 40 written, tokens of 1 unknown, cost 1.75"
    assert read_usage([]) == Usage(cost=None) and Usage().metadata() is None
    assert spell_usage(found + Usage(1, 1, 1, 0, None)).endswith("unknown")  # a sum with an unknown price has none
