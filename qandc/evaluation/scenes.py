"""Draw scenes of garments and captions that describe them: what wardrobe is trained on and scored with.

A scene is one to four garments on 64 x 64 pixels, each of a kind, a colour and a place. Its caption names kinds
and colours of all, and the places of all, some or none. A tenth of the combinations (colour, kind, place) is held out:
no training scene has them, so that a score on them tells what a model composes from what it learned one by one.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qandc.errors import ConfigError
from qandc.support.arguments import Count, Seed, checked

__all__ = [
    "COLOURS",
    "HELD_OUT",
    "KINDS",
    "MAX_TOKENS",
    "PLACES",
    "SIZE",
    "VOCABULARY",
    "Garment",
    "Scene",
    "draw_scenes",
    "scene_arrays",
]

SIZE = 64  # pixels of a side
MAX_TOKENS = 62  # words and commas of a caption, at most
MOST = 4  # garments of a scene

NOUNS = {  # singular and plural, with {} where the colour is not in front
    "t-shirt": (("t-shirt", "t-shirts"), ("tee", "tees")),
    "trouser": (
        ("a pair of {} trousers", "pairs of {} trousers"),
        ("{} trousers", "pairs of {} trousers"),
        ("a pair of {} pants", "pairs of {} pants"),
        ("{} pants", "pairs of {} pants"),
    ),
    "dress": (("dress", "dresses"), ("gown", "gowns")),
    "coat": (("coat", "coats"), ("jacket", "jackets")),
    "sandal": (("sandal", "sandals"),),
    "sneaker": (("sneaker", "sneakers"), ("trainer", "trainers")),
    "bag": (("bag", "bags"), ("handbag", "handbags")),
    "boot": (("boot", "boots"), ("ankle boot", "ankle boots")),
}
KINDS = tuple(NOUNS)
COLOURS = {
    "red": (225, 35, 35),
    "orange": (250, 135, 15),
    "yellow": (245, 225, 45),
    "green": (40, 165, 55),
    "cyan": (45, 215, 215),
    "blue": (45, 75, 230),
    "purple": (135, 45, 185),
    "pink": (250, 130, 190),
}
OTHER_COLOURS = {"cyan": "turquoise", "purple": "violet"}
PLACES = {  # centre (x, y) in pixels
    "left": (16, 32),
    "right": (48, 32),
    "top": (32, 16),
    "bottom": (32, 48),
    "top left": (16, 16),
    "top right": (48, 16),
    "bottom left": (16, 48),
    "bottom right": (48, 48),
}
SIDES = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "on top"),
    "bottom": ("at the bottom", "on the bottom"),
}
LEADS = ("", "", "", "a picture of ", "a photo of ", "there is ")  # drawn with equal chances, as all synonyms are
JOINS = ((", ", " and "), (", ", " and "), (", ", ", and "), (" and ", " and "))
NUMBERS = ("", "", "two", "three", "four")
SHARES = (0.25, 0.35, 0.2, 0.2)  # of scenes with 1, 2, 3, 4 garments
TWINS = (0.05, 0.9)  # share of garments that are made like the first, in nine of ten scenes and in one


def _where(place: str) -> tuple[str, ...]:
    if place in SIDES:
        return SIDES[place]
    row, column = place.split()
    rows = (row, {"top": "upper", "bottom": "lower"}[row])
    return tuple(text for r in rows for text in (f"in the {r} {column} corner", f"at the {r} {column}"))


def _phrases(kind: str, colour: str, number: int) -> tuple[str, ...]:
    """List what so many garments of one kind and colour are called, article or number included."""
    texts = []
    for shade in (colour, OTHER_COLOURS.get(colour, colour)):
        for noun in NOUNS[kind]:
            text = noun[number > 1]
            if "{}" in text:
                text = text.format(shade)
            elif number == 1:
                text = f"{'an' if shade[0] in 'aeiou' else 'a'} {shade} {text}"
            else:
                text = f"{shade} {text}"
            texts.append(f"{NUMBERS[number]} {text}".strip())
    return tuple(texts)


WHERE = [_where(place) for place in PLACES]
PHRASES = [[[_phrases(k, c, n) for n in range(1, MOST + 1)] for c in COLOURS] for k in KINDS]


def _words() -> tuple[str, ...]:
    texts = [*LEADS, "there are", "and ,", *itertools.chain.from_iterable(WHERE)]
    texts += [text for kind in PHRASES for colour in kind for number in colour for text in number]
    return tuple(sorted({word for text in texts for word in text.split()}))


VOCABULARY = _words()  # the comma is one of them


def _layouts(number: int) -> np.ndarray:
    """List the ways ``[L, 4]`` to put so many garments, in order, at places that do not overlap; -1 is no garment."""

    def apart(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= SIZE // 2

    centres = list(PLACES.values())
    orders = itertools.permutations(range(len(centres)), number)
    free = [o for o in orders if all(apart(centres[a], centres[b]) for a, b in itertools.combinations(o, 2))]
    return np.array([[*order, *[-1] * (MOST - number)] for order in free])


LAYOUTS = [_layouts(number) for number in range(1, MOST + 1)]
# [colour, kind, place]: each pair of two of them is held out with one value of the third, or with none
HELD_OUT = np.tensordot((1, 3, 7), np.indices((len(COLOURS), len(KINDS), len(PLACES))), 1) % 10 == 0


@dataclass(frozen=True)
class Garment:
    """Describe a garment by kind, colour and place; the place is None where a caption does not say it.

    Raises:
        ConfigError: a name is none of ``KINDS``, ``COLOURS`` or ``PLACES``.
    """

    kind: str
    colour: str
    place: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("kind", KINDS), ("colour", COLOURS), ("place", (*PLACES, None))):
            if getattr(self, name) not in known:
                given, allowed = getattr(self, name), ", ".join(map(str, known))
                raise ConfigError(f"{name} of a garment is {given!r}; give one of {allowed}")


@dataclass(frozen=True)
class Scene:
    """Hold a scene: its garments as drawn, the same as the caption says (a place may be None), and the caption."""

    garments: tuple[Garment, ...]
    asked: tuple[Garment, ...]
    caption: str


# the last place, which is index -1 as well, is none
GARMENTS = [[[Garment(k, c, p) for p in (*PLACES, None)] for c in COLOURS] for k in KINDS]


def _draw(count: int, random: np.random.Generator, held_out: bool) -> tuple[np.ndarray, ...]:
    """Draw kinds, colours, places ``[N, 4]``, -1 where no garment is, and which places the caption says."""
    number = random.choice(MOST, count, p=SHARES)
    layouts = np.concatenate(LAYOUTS)
    sizes = np.array([len(layout) for layout in LAYOUTS])
    first = np.cumsum(sizes) - sizes
    places = layouts[first[number] + random.integers(0, sizes[number])]
    kinds, colours = np.empty_like(places), np.empty_like(places)
    redraw = np.arange(count)
    while len(redraw):
        twin = random.random((len(redraw), MOST)) < random.choice(TWINS, (len(redraw), 1), p=[0.9, 0.1])
        for array, names in ((kinds, KINDS), (colours, COLOURS)):
            drawn = random.integers(0, len(names), twin.shape)
            array[redraw] = np.where(twin, drawn[:, :1], drawn)
        new = HELD_OUT[colours[redraw], kinds[redraw], places[redraw]] & (places[redraw] >= 0)
        redraw = redraw[new.any(1)]
    said = random.random((count, MOST)) < random.choice([0, 0.5, 1], (count, 1), p=[0.25, 0.3, 0.45])
    if held_out:
        rows, which = np.arange(count), random.integers(0, number + 1)
        for place in range(len(PLACES)):
            here = rows[places[rows, which] == place]
            options = np.argwhere(HELD_OUT[:, :, place])
            colour, kind = options[random.integers(0, len(options), len(here))].T
            colours[here, which[here]], kinds[here, which[here]] = colour, kind
        said[rows, which] = True
    return kinds, colours, places, said


@checked
def draw_scenes(count: Count, seed: Seed, held_out: bool = False) -> list[Scene]:
    """Draw scenes and their captions, the same for the same arguments.

    Args:
        count: how many.
        seed: of all that is random.
        held_out: True: each scene has one garment of a held-out combination of colour, kind and place, and its caption
            says the place; False: none has.
    """
    random = np.random.default_rng(seed)
    arrays = _draw(count, random, held_out)
    words = random.integers(0, 2**12, (count, MOST + 1))
    return [_scene(*row) for row in zip(*(array.tolist() for array in (*arrays, words)), strict=True)]


def _scene(kinds: list[int], colours: list[int], places: list[int], said: list[bool], words: list[int]) -> Scene:
    number = MOST - places.count(-1)
    unplaced: dict[tuple[int, int], int] = {}  # what is alike and has no place is counted: "two green bags"
    for i in range(number):
        if not said[i]:
            key = (kinds[i], colours[i])
            unplaced[key] = unplaced.get(key, 0) + 1
    parts: list[str] = []
    garments: list[Garment] = []
    asked: list[Garment] = []
    for i in range(number):
        kind, colour, place, word = kinds[i], colours[i], places[i], words[i]
        garment = GARMENTS[kind][colour]
        garments.append(garment[place])
        asked.append(garment[place if said[i] else -1])
        alike = 1 if said[i] else unplaced.pop((kind, colour), 0)
        if alike:
            names = PHRASES[kind][colour][alike - 1]
            text = names[word % len(names)]
            if said[i]:
                where = WHERE[place]
                text = f"{text} {where[(word >> 6) % len(where)]}"
            parts.append(text)
    style = words[MOST]
    lead = LEADS[style % len(LEADS)]
    if lead == "there is " and not parts[0].startswith(("a ", "an ")):
        lead = "there are "
    *others, last = parts
    comma, final = JOINS[(style >> 6) % len(JOINS)]
    caption = f"{lead}{comma.join(others)}{final}{last}" if others else lead + last
    return Scene(tuple(garments), tuple(asked), caption)


INDEX: dict[str | None, int] = {name: i for names in (KINDS, COLOURS, PLACES) for i, name in enumerate(names)}


@checked
def scene_arrays(scenes: Sequence[Scene]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return kinds, colours and true places of scenes as int8 ``[N, 4]``, -1 where there is no garment."""
    rows = np.full((3, len(scenes), MOST), -1, np.int8)
    for i, scene in enumerate(scenes):
        for j, garment in enumerate(scene.garments):
            rows[:, i, j] = INDEX[garment.kind], INDEX[garment.colour], INDEX[garment.place]
    return torch.from_numpy(rows[0]), torch.from_numpy(rows[1]), torch.from_numpy(rows[2])
