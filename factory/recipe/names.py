"""Names that a user gives."""

VIEW_NAME = r"^[a-z0-9][a-z0-9-]{0,39}$"
"""Of selections, which are folders, and of teachers."""
