"""What an NPU offers to attention: memory, bandwidths and rates, each number with its source or marked as assumed.

Knows no models. Profiles are YAML files beside this module, or any file of the same keys.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from pydantic import Field, model_validator

from cluster.errors import RecipeError
from cluster.recipe import Settings, load_recipe

PROFILES = Path(__file__).parent / "profiles"


class Figure(Settings):
    """One number and where it comes from: a `source`, or the reason why it had to be `assumed`; never both."""

    value: float = Field(gt=0, description="the number, in the unit that the key's name says")
    source: str | None = Field(default=None, min_length=3, description="document, file or measurement it is taken from")
    assumed: str | None = Field(default=None, min_length=3, description="why this value, where nothing is published")

    @model_validator(mode="after")
    def _has_one_origin(self) -> Figure:
        if (self.source is None) == (self.assumed is None):
            raise ValueError("give either `source` or `assumed`, so that a reader knows what the number rests on")
        return self


class VelaSettings(Settings):
    """How Arm's offline compiler is told about this chip."""

    accelerator: str = Field(description="--accelerator-config, such as ethos-u85-1024")
    system: str = Field(description="--system-config of Arm/vela.ini")


class Profile(Settings):
    """One chip as the tile solver sees it. Rates are of W8A16: 8-bit weights, 16-bit activations."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$", description="the file's name without .yaml")
    chip: str = Field(min_length=3, description="what the profile stands for")
    sram_bytes: Figure = Field(description="on-chip memory that one network may use, bytes")
    sram_fill: Figure = Field(description="share of it that tiles may fill; the rest is for weights and double buffers")
    dram_bytes_per_s: Figure = Field(description="DRAM bandwidth, bytes per second")
    sram_bytes_per_s: Figure = Field(description="on-chip bandwidth, bytes per second")
    weight_macs_per_s: Figure = Field(
        description="multiply-accumulates per second, 8-bit weights by 16-bit activations"
    )
    matmul_macs_per_s: Figure = Field(description="multiply-accumulates per second, activations by activations")
    softmax_elements_per_s: Figure = Field(description="scores through a whole softmax per second, memory not counted")
    score_transfers: Figure = Field(
        description="times each score crosses the DRAM interface, as one activation, if it does not stay on chip"
    )
    live_scores: Figure = Field(description="copies of a tile of scores that live at once, in activations")
    keys_bytes_per_s: Figure = Field(
        description="rate at which each tile's keys and values are brought into the matrix unit, bytes per second"
    )
    operator_s: Figure = Field(description="fixed cost of starting one operator, seconds")
    row_multiple: int = Field(default=16, ge=1, description="query rows of a tile must be a multiple of this")
    activation_bytes: int = Field(default=2, ge=1, le=4, description="bytes of an activation")
    weight_bytes: int = Field(default=1, ge=1, le=4, description="bytes of a weight")
    keeps_keys: bool = Field(
        default=True, description="whether keys and values stay on chip from one query tile to the next if they fit"
    )
    vela: VelaSettings | None = Field(default=None, description="set where Arm's compiler can judge a plan")

    @model_validator(mode="after")
    def _is_possible(self) -> Profile:
        if self.sram_fill.value > 1:
            raise ValueError(f"sram_fill is a share, at most 1, not {self.sram_fill.value:g}")
        if self.sram_bytes_per_s.value < self.dram_bytes_per_s.value:
            raise ValueError("sram_bytes_per_s is under dram_bytes_per_s: such a chip has nothing to gain from tiles")
        return self

    @property
    def budget_bytes(self) -> int:
        """On-chip bytes that one tile's working set may take."""
        return int(self.sram_bytes.value * self.sram_fill.value)


def profile_names() -> list[str]:
    """The shipped profiles."""
    return sorted(path.stem for path in PROFILES.glob("*.yaml"))


def load_profile(name: str) -> Profile:
    """A shipped profile by name, or any YAML file; raises RecipeError with the nearest name or the first bad key."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not path.exists():
        near = difflib.get_close_matches(name, profile_names(), n=1, cutoff=0.4)
        known = ", ".join(profile_names())
        raise RecipeError(
            f"there is no NPU profile {name!r}",
            remedy=f"Did you mean {near[0]}?" if near else f"Give one of {known}, or the path of a YAML file",
        )
    return load_recipe(Profile, path)
