"""Prompts or raw pictures to curated shards."""
