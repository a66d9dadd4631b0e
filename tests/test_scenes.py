"""Scenes and their captions: what is drawn, what is held out, what the words say."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import numpy as np
import pytest
import torch

from qandc import ConfigError
from qandc.evaluation.scenes import (
    COLOURS,
    HELD_OUT,
    KINDS,
    MAX_TOKENS,
    PLACES,
    VOCABULARY,
    Garment,
    draw_scenes,
    scene_arrays,
)

NOUNS = {
    "t-shirt": r"t-shirts?|tees?",
    "trouser": r"trousers|pants",
    "dress": r"dress(?:es)?|gowns?",
    "coat": r"coats?|jackets?",
    "sandal": r"sandals?",
    "sneaker": r"sneakers?|trainers?",
    "bag": r"bags?|handbags?",
    "boot": r"(?:ankle )?boots?",
}
SYNONYMS = {"turquoise": "cyan", "violet": "purple", "upper": "top", "lower": "bottom"}
NUMBERS = {"two": 2, "three": 3, "four": 4}
LEAD = re.compile(r"a picture of |a photo of |there is |there are ")
ITEM = re.compile(
    r"(?:(?P<number>an?|two|three|four) )?(?:pairs? of )?(?P<colour>\w+) (?P<noun>(?:ankle )?[\w-]+)"
    r"(?: (?:in|at|on) (?:the )?(?P<place>(?:(?:top|upper|bottom|lower) )?\w+)(?: side| corner)?)?"
)


@pytest.fixture(scope="module", params=[False, True], ids=["training", "held out"])
def scenes(request):
    return request.param, draw_scenes(4000, 7, held_out=request.param)


def read(caption: str) -> list[Garment]:
    """The garments that a caption asks for, by a parser that shares nothing with the grammar."""
    found = []
    for item in re.split(r", and |, | and ", LEAD.sub("", caption)):
        match = ITEM.fullmatch(item)
        assert match, item
        kind = next(name for name, noun in NOUNS.items() if re.fullmatch(noun, match["noun"]))
        plural = bool(re.search(r"[^s]s$|sses$", match["noun"]))
        assert plural == (match["number"] in NUMBERS or kind == "trouser"), item
        place = match["place"] and " ".join(SYNONYMS.get(word, word) for word in match["place"].split())
        colour = SYNONYMS.get(match["colour"], match["colour"])
        found += [Garment(kind, colour, place)] * NUMBERS.get(match["number"], 1)
    return found


def test_captions_say_what_is_asked(scenes):
    for scene in scenes[1]:
        assert Counter(read(scene.caption)) == Counter(scene.asked)
        assert len(scene.asked) == len(scene.garments)
        for asked, drawn in zip(scene.asked, scene.garments, strict=True):
            assert (asked.kind, asked.colour) == (drawn.kind, drawn.colour)
            assert asked.place in (None, drawn.place)


def test_captions_are_good_english(scenes):
    captions = [scene.caption for scene in scenes[1]]
    assert captions == [caption.lower().strip() for caption in captions]
    joined = "\n".join(captions)
    assert not re.search(r"\ba orange|\ban (?!orange)|  |there is (?!an? )|there are an? ", joined)


def test_vocabulary_is_what_captions_use():
    words = [scene.caption.replace(",", " ,").split() for scene in draw_scenes(4000, 0)]
    assert set(itertools.chain.from_iterable(words)) == set(VOCABULARY)
    assert len(VOCABULARY) == len(set(VOCABULARY))
    assert 40 < max(map(len, words)) <= MAX_TOKENS


def test_each_combination_but_the_held_out_ones_is_drawn():
    held_out = np.argwhere(HELD_OUT)
    assert 0.09 < len(held_out) / HELD_OUT.size < 0.11
    for axis in range(3):  # of each pair, most values of the third are in training
        assert HELD_OUT.sum(axis).max() == 1
        others = tuple(i for i in range(3) if i != axis)
        assert HELD_OUT.sum(others).min() >= 5  # none is spared
    seen = {(g.colour, g.kind, g.place) for scene in draw_scenes(20_000, 1) for g in scene.garments}
    everything = itertools.product(enumerate(COLOURS), enumerate(KINDS), enumerate(PLACES))
    assert seen == {(c, k, p) for (i, c), (j, k), (n, p) in everything if not HELD_OUT[i, j, n]}


def test_held_out_combinations_are_asked_for_by_their_places(scenes):
    held_out, drawn = scenes
    c, k, p = (list(names) for names in (COLOURS, KINDS, PLACES))
    for scene in drawn:
        shown, told = (
            sum(bool(HELD_OUT[c.index(g.colour), k.index(g.kind), p.index(g.place)]) for g in garments if g.place)
            for garments in (scene.garments, scene.asked)
        )
        assert (shown, told) == ((1, 1) if held_out else (0, 0))


def test_garments_do_not_overlap(scenes):
    counts, layouts = Counter(), set()
    for scene in scenes[1]:
        centres = [PLACES[garment.place] for garment in scene.garments]
        for a, b in itertools.combinations(centres, 2):
            assert max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= 32
        counts[len(centres)] += 1
        layouts.add(frozenset(centres))
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.values()) > 0.15 * len(scenes[1])
    assert len(layouts) == 8 + 16 + 8 + 1


def test_places_are_said_of_all_some_or_none():
    several = [scene.asked for scene in draw_scenes(2000, 0) if len(scene.asked) > 2]
    shares = Counter(sum(g.place is None for g in asked) / len(asked) for asked in several)
    assert shares[0] > 0.3 * len(several)
    assert shares[1] > 0.2 * len(several)
    assert len(several) - shares[0] - shares[1] > 0.1 * len(several)


def test_seeds():
    assert draw_scenes(50, 3) == draw_scenes(50, 3) != draw_scenes(50, 4)


def test_arrays():
    scenes = draw_scenes(300, 0)
    arrays = scene_arrays(scenes)
    assert [(a.dtype, a.shape) for a in arrays] == [(torch.int8, (300, 4))] * 3
    names = [(*KINDS, None), (*COLOURS, None), (*PLACES, None)]
    for i, scene in enumerate(scenes):
        rows = zip(*(a[i].tolist() for a in arrays), strict=True)
        named = [tuple(names[n][index] for n, index in enumerate(row)) for row in rows]
        assert [Garment(*row) for row in named if row != (None, None, None)] == list(scene.garments)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("hat", "red"), "kind of a garment is 'hat'; give one of t-shirt, trouser"),
        (("coat", "grey"), "colour of a garment is 'grey'; give one of red, orange"),
        (("coat", "red", "centre"), "place of a garment is 'centre'; give one of left, right"),
    ],
)
def test_unknown_names_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        Garment(*given)
    with pytest.raises(ConfigError, match="count is 0; give an integer >= 1"):
        draw_scenes(0, 1)
