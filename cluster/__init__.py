"""Where work runs: stages, runners, storage. Knows no images; the only importer of ray."""
