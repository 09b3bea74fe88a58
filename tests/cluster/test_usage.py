"""What servers charged, kept in Parquet files."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.usage import JOURNAL, Meter, Prices, Usage, files_of_usage, read_usage, spell_usage


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


def test_a_journal_outlives_a_torn_line_and_its_file(tmp_path: Path) -> None:
    journal = tmp_path / f"a{JOURNAL}"
    said = {"usage": {"prompt_tokens": 3, "completion_tokens": 4}}
    for _ in range(2):
        meter = Meter(Prices(1e6, 1e6))
        meter.add(said)  # nobody said where
        meter.note_in(journal)
        meter.add(said)
        journal.write_bytes(journal.read_bytes() + b'{"answers": 1, "inp')
    assert read_usage(files_of_usage(tmp_path)) == Usage(2, 6, 8, 0, 14.0)
    pq.write_table(pa.table({"id": ["a"]}).replace_schema_metadata(Usage(5).metadata()), tmp_path / "a.parquet")
    assert read_usage(files_of_usage(tmp_path)).answers == 5  # the sum is in the file: killed before the journal went
