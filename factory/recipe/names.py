"""What several parts of a recipe say alike: names that a user gives, and whether pickled weights may be opened."""

from typing import Annotated

from pydantic import Field

VIEW_NAME = r"^[a-z0-9][a-z0-9-]{0,39}$"
"""Of selections, which are folders, and of teachers."""

AllowPickle = Annotated[
    bool,
    Field(
        description="also open weights that are pickled (.bin, .pt), which may run code of their maker; safetensors alone if left out"
    ),
]
