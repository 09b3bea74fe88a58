"""The pocket world: emoji pictures with their names, as the training material of the embedded zoo.

Owns the list of concepts, the held-out split and the pixels. Knows nothing of models.
Sources (fetched with `npm pack`, see README.md in this folder): fluent-emoji-3d and fluent-emoji-flat (MIT),
noto (Apache-2.0) for the pictures, emojibase-data (MIT) for the names.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from factory.pocket.roster import HELD_OUT_OBJECTS, TEACHER_OBJECTS, TEACHER_ROLES

SIZE = 64
"""Edge of every picture, in pixels."""

STYLES = ("3d", "flat", "cartoon")
"""Drawing styles: fluent-emoji-3d, fluent-emoji-flat and noto."""

TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
GENDERS = ("man", "woman", "person")

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "gray": (176, 180, 186),
    "black": (24, 24, 28),
    "red": (226, 96, 88),
    "yellow": (250, 224, 120),
    "green": (140, 204, 140),
    "blue": (130, 178, 240),
    "pink": (246, 178, 204),
}

# Emojibase subgroups that make up the object part of the world.
_OBJECT_SUBGROUPS = [
    "animal-amphibian",
    "animal-bird",
    "animal-bug",
    "animal-mammal",
    "animal-marine",
    "animal-reptile",
    "plant-flower",
    "plant-other",
    "food-fruit",
    "food-vegetable",
    "food-prepared",
    "food-asian",
    "food-sweet",
    "drink",
    "sport",
    "musical-instrument",
    "tool",
    "clothing",
    "transport-air",
    "transport-ground",
    "transport-water",
    "face-costume",
    "monkey-face",
    "writing",
    "game",
    "award-medal",
    "heart",
]

_EXTRA_OBJECTS = [
    "sun",
    "crescent moon",
    "star",
    "rainbow",
    "umbrella",
    "snowman",
    "fire",
    "droplet",
    "cloud",
    "snowflake",
    "ringed planet",
    "house",
    "castle",
    "tent",
    "church",
    "alarm clock",
    "watch",
    "hourglass done",
    "jack-o-lantern",
    "Christmas tree",
    "balloon",
    "wrapped gift",
    "party popper",
    "closed book",
    "books",
    "glasses",
    "crown",
    "gem stone",
    "laptop",
    "television",
    "camera",
    "light bulb",
    "candle",
    "key",
    "locked",
    "envelope",
    "package",
    "telephone",
    "mobile phone",
    "magnifying glass tilted left",
    "microscope",
    "telescope",
    "bell",
    "money bag",
    "coin",
    "chair",
    "door",
    "bed",
    "bucket",
    "broom",
    "toothbrush",
    "shopping cart",
    "microphone",
    "headphone",
    "radio",
    "grinning face",
    "crying face",
    "angry face",
    "smiling face with sunglasses",
    "smiling face with heart-eyes",
    "sleeping face",
    "nerd face",
    "cowboy hat face",
    "thinking face",
    "exploding head",
    "skull",
]

# Signs, near copies of another emoji, and pictures that are little but text: they teach the model nothing but confusion.
_EXCLUDED = re.compile(
    r"oncoming|closed mailbox|no one|facing right|o’clock|-thirty|suit|guide dog|service dog|wheelchair|hatching|"
    r"front-facing|baby chick|railway|metro|light rail|station|tram|monorail|bus stop|motorway|construction|"
    r"horizontal|mahjong|joker|playing cards|heart with|heart on|mending|heart decoration|heart exclamation|"
    r"two hearts|revolving|beating|growing|love letter|paw prints|pig nose|microbe|leaf fluttering|1st|2nd|3rd|"
    r"military medal|cricket game|field hockey|lacrosse|goal net|flag in hole|oil drum|mammoth|black bird|"
    r"one-piece|briefs|bikini|hair pick|prayer beads|white cane|broken chain|suspension|mountain cableway|"
    r"airplane departure|airplane arrival|hot springs|pouring liquid|landslide|treasure chest|trombone|orca"
)

_ROLES = [
    "health worker",
    "student",
    "teacher",
    "judge",
    "farmer",
    "cook",
    "mechanic",
    "factory worker",
    "office worker",
    "scientist",
    "technologist",
    "singer",
    "artist",
    "pilot",
    "astronaut",
    "firefighter",
    "police officer",
    "detective",
    "guard",
    "construction worker",
]


@dataclass(frozen=True)
class Concept:
    """One nameable thing: an object, or a profession with its gender and skin tone."""

    key: str
    """Unicode code points in lower-case hex joined by '-': the file name in the picture packages."""
    subject: str
    """`red apple` for an object, the bare profession (`astronaut`) for a person."""
    group: str
    tags: tuple[str, ...] = ()
    gender: str = ""
    tone: str = ""

    @property
    def is_person(self) -> bool:
        return bool(self.gender)

    @property
    def held_out(self) -> bool:
        """True for the held-out objects and for 10% of the profession compositions; only the judge ever trains on them."""
        if not self.is_person:
            return self.subject in HELD_OUT_OBJECTS
        share = int(hashlib.sha256(f"held-out/{self.key}".encode()).hexdigest(), 16) % 1000 / 1000
        return bool(self.tone) and share < 0.10

    @property
    def is_drawn(self) -> bool:
        """True for what the teacher learns to draw (held-out compositions of its professions included)."""
        return self.subject in (TEACHER_ROLES if self.is_person else TEACHER_OBJECTS)


def load_concepts(packages: Path) -> list[Concept]:
    """Read the concepts from `emojibase-data` below `packages`, in Unicode order."""
    root = packages / "emojibase-data" / "en"
    names = {entry["order"]: entry["key"] for entry in json.loads((root / "messages.json").read_text())["subgroups"]}
    concepts = []
    for entry in json.loads((root / "data.json").read_text()):
        label, subgroup = entry["label"], names.get(entry.get("subgroup", -1), "")
        if subgroup == "person-role":
            concepts += _people(entry)
        elif (subgroup in _OBJECT_SUBGROUPS or label in _EXTRA_OBJECTS) and not _EXCLUDED.search(label):
            tags = tuple(t.lower() for t in entry.get("tags", ()))
            concepts.append(Concept(_key(entry["hexcode"]), label.lower().replace("’", "'"), subgroup, tags))
    return concepts


def _people(entry: dict) -> list[Concept]:
    label = entry["label"]
    gender = label.split(" ")[0] if label.split(" ")[0] in ("man", "woman") else "person"
    role = label.removeprefix(f"{gender} ")
    if role not in _ROLES:
        return []
    found = [Concept(_key(entry["hexcode"]), role, "profession", (), gender)]
    for skin in entry.get("skins", ()):
        if isinstance(skin.get("tone"), int):
            found.append(Concept(_key(skin["hexcode"]), role, "profession", (), gender, TONES[skin["tone"] - 1]))
    return found


def _key(hexcode: str) -> str:
    return hexcode.lower()


def render_world(packages: Path, cache: Path) -> tuple[list[tuple[Concept, str]], np.ndarray]:
    """Draw every concept in every style that has it.

    Returns the (concept, style) pairs and their pixels, N x 64 x 64 x 4 uint8 RGBA; kept in `cache`, an .npz file.
    """
    concepts = load_concepts(packages)
    if cache.exists():
        stored = np.load(cache, allow_pickle=False)
        by_key = {c.key: c for c in concepts}
        pairs = [(by_key[k], s) for k, s in zip(stored["keys"].tolist(), stored["styles"].tolist(), strict=True)]
        return pairs, stored["pixels"]
    pairs, pixels = [], []
    vectors = {"flat": _IconSet(packages / "fluent-emoji-flat"), "cartoon": _IconSet(packages / "noto")}
    for concept in concepts:
        for style in STYLES:
            picture = (
                _raster(packages / "fluent-emoji-3d" / "assets", concept.key)
                if style == "3d"
                else vectors[style].draw(concept.key)
            )
            if picture is not None:
                pairs.append((concept, style))
                pixels.append(np.asarray(picture.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)))
    stack = np.stack(pixels)
    keys, styles = [c.key for c, _ in pairs], [s for _, s in pairs]
    cache.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(cache, pixels=stack, keys=np.array(keys), styles=np.array(styles))
    return pairs, stack


def _spellings(key: str) -> tuple[str, ...]:
    """Packages disagree on whether the variation selector U+FE0F belongs to the name."""
    bare = key.replace("-fe0f", "")
    return (key, bare, f"{bare}-fe0f", bare.replace("-200d", "-fe0f-200d", 1))


def _raster(folder: Path, key: str) -> Image.Image | None:
    for name in _spellings(key):
        if (folder / f"{name}.webp").exists():
            return Image.open(folder / f"{name}.webp")
    return None


class _IconSet:
    """An Iconify package: SVG bodies by name, and names by code point."""

    def __init__(self, package: Path) -> None:
        self.icons = json.loads((package / "icons.json").read_text())
        self.names = json.loads((package / "chars.json").read_text())

    def draw(self, key: str) -> Image.Image | None:
        import resvg_py

        name = next((self.names[k] for k in _spellings(key) if k in self.names), None)
        if name is None or name not in self.icons["icons"]:
            return None
        body, side = self.icons["icons"][name]["body"], self.icons.get("width", 16)
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">{body}</svg>'
        return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256))))


def compose(rgba: np.ndarray, background: str, rng: np.random.Generator) -> np.ndarray:
    """Place a picture on a plain background with a small random scale and shift; returns 64 x 64 x 3 uint8."""
    side = int(rng.integers(50, 61))
    left, top = (int(v) for v in rng.integers(0, SIZE - side + 1, size=2) // 2 + (SIZE - side) // 4)
    canvas = Image.new("RGBA", (SIZE, SIZE), (*BACKGROUNDS[background], 255))
    subject = Image.fromarray(rgba).resize((side, side), Image.Resampling.LANCZOS)
    canvas.alpha_composite(subject, (left, top))
    return np.asarray(canvas.convert("RGB"))


def describe(concept: Concept, style: str, background: str) -> dict[str, str]:
    """The attribute record of one picture, as the prompt grammar and the language model read it."""
    record = {k: v for k, v in asdict(concept).items() if k in ("subject", "gender", "tone") and v}
    return {**record, "style": style, "background": background}
