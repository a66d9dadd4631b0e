"""Draw scenes of garments as pictures: images of Fashion-MNIST, tinted, on a plain background."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from fashion_mnist import LABELS, load_split
from qandc.evaluation.scenes import COLOURS, KINDS, PLACES, SIZE

WINDOW = 32  # pixels that belong to a garment
JITTER = 2.0
SCALES = (0.85, 1.0)
SHADE = 0.4  # of the darkest cloth
BACKGROUNDS = (0.95, 0.55, 0.12)  # white, grey, dark
BACKGROUND_SPREAD = 0.04
NEIGHBOURS = 4


def recognisable(
    images: torch.Tensor, labels: torch.Tensor, train: torch.Tensor, train_labels: torch.Tensor
) -> torch.Tensor:
    """Tell which images ``[N, 1, 32, 32] uint8`` have their label by their four nearest training images, all of them.

    This is the editing rule of Wilson 1972, unanimous. Distances are those of 16 x 16 pixels of 7 bits: exact integers,
    so that every device keeps the same images. An image that is its own nearest neighbour is not counted.
    """
    itself = images is train
    a, b = (F.avg_pool2d(x.float() / 2, 2).floor().flatten(1) for x in (images, train))
    squares = b.square().sum(1)
    kept = []
    for rows, own in zip(a.split(2000), labels.split(2000), strict=True):
        distances = squares - 2 * (rows @ b.T)  # less |a|²
        nearest = distances.topk(NEIGHBOURS + itself, largest=False).indices[:, int(itself) :]
        kept.append((train_labels[nearest] == own[:, None]).all(1))
    return torch.cat(kept)


def cloth_masks(grey: torch.Tensor) -> torch.Tensor:
    """Find how much of each pixel is cloth in images ``[N, 1, H, W]``, black around it.

    Gaps of a pixel and enclosed dark parts are cloth; a pixel of the edge is as much as it is as bright as the
    brightest beside it.
    """
    bright = F.pad((grey > 0.06).float(), (2, 2, 2, 2))
    closed = 1 - F.max_pool2d(1 - F.max_pool2d(bright, 3, 1, 1), 3, 1, 1)
    free, outside = closed == 0, torch.zeros_like(closed, dtype=torch.bool)
    outside[..., 0, :] = True
    for _ in range(4):  # sweeps down, up, right and left: outside goes on where nothing is in the way
        for out, way in ((outside, free), (outside.mT, free.mT)):
            rows = range(out.shape[-2])
            for before, row in (*pairwise(rows), *pairwise(rows[::-1])):
                out[..., row, :] |= out[..., before, :] & way[..., row, :]
    edge = F.max_pool2d(outside.float(), 3, 1, 1) > 0
    mask = torch.where(edge, F.pad(grey / F.max_pool2d(grey, 3, 1, 1).clamp(min=0.06), (2, 2, 2, 2)), 1.0)
    return (mask * ~outside)[..., 2:-2, 2:-2]


class GarmentImages:
    """Hold the recognisable images of each kind of garment on a device, and draw pictures of scenes with them."""

    def __init__(self, images: torch.Tensor, kinds: torch.Tensor) -> None:
        """Take images ``[N, 1, 28, 28] uint8`` and the index in ``KINDS`` of each, at least one of each kind."""
        order = kinds.argsort(stable=True)
        grey = images[order].float() / 255
        masks = torch.cat([cloth_masks(part) for part in grey.split(4000)])
        self.device = images.device
        self.cloth = torch.cat([grey * (masks > 0), masks], 1)  # [N, 2, 28, 28]
        self.counts = kinds.bincount(minlength=len(KINDS))
        self.first = self.counts.cumsum(0) - self.counts
        self.colours = torch.tensor(list(COLOURS.values()), device=self.device) / 255
        self.corners = torch.tensor(list(PLACES.values()), device=self.device) - WINDOW // 2
        self.backgrounds = torch.tensor(BACKGROUNDS, device=self.device)
        pixel = torch.arange(WINDOW, device=self.device)
        self.offsets = (pixel[:, None] * SIZE + pixel).flatten()  # of a window's pixels in a picture
        centred = (pixel + 0.5 - WINDOW / 2) / (images.shape[-1] / 2)  # 1 is the edge of an image of scale 1
        self.grid = torch.stack(torch.meshgrid(centred, centred, indexing="xy"), -1)

    @classmethod
    def load(cls, directory: Path, split: str, device: torch.device | str = "cpu") -> GarmentImages:
        """Read the images of ``split``, "train" or "t10k", that are recognisable by those of "train"."""
        labels = [label.lower().removeprefix("ankle ") for label in LABELS]
        kinds = torch.tensor([KINDS.index(label) if label in KINDS else -1 for label in labels], device=device)

        def load_kinds(split: str) -> tuple[torch.Tensor, torch.Tensor]:
            images, labels = (x.to(device) for x in load_split(directory, split))
            known = kinds[labels] >= 0
            return images[known], kinds[labels[known]]

        train = load_kinds("train")
        images, found = train if split == "train" else load_kinds(split)
        kept = recognisable(images, found, *train)
        return cls(images[kept][..., 2:-2, 2:-2], found[kept])

    def draw(
        self, kinds: torch.Tensor, colours: torch.Tensor, places: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Draw pictures ``[B, 3, 64, 64]`` in [-1, 1] of :func:`scene_arrays` ``[B, 4]``; all on the device of self.

        Nothing waits for the device. A garment is a random image of its kind at 0.85 to 1 of its size, up to two pixels
        from the centre of its place, in its colour times 0.4 (dark cloth) to 1.
        """
        return self.draw_with_centres(kinds, colours, places, generator)[0]

    def draw_with_centres(
        self, kinds: torch.Tensor, colours: torch.Tensor, places: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw pictures as :meth:`draw`; return them and the garments' centres (x, y), ``[B, 4, 2]`` pixels."""
        shape = kinds.shape
        there = kinds >= 0
        kinds, colours, places = (x.long().clamp(min=0) for x in (kinds, colours, places))

        def uniform(*size: int) -> torch.Tensor:
            return torch.rand(size, generator=generator, device=self.device)

        index = self.first[kinds] + (uniform(*shape) * self.counts[kinds]).long()
        scale = SCALES[0] + (SCALES[1] - SCALES[0]) * uniform(*shape)
        jitter = (2 * uniform(*shape, 2) - 1) * JITTER
        grid = (self.grid - jitter[..., None, None, :] * (2 / self.cloth.shape[-1])) / scale[..., None, None, None]
        cloth = F.grid_sample(self.cloth[index.flatten()], grid.flatten(0, 1), align_corners=False)
        cloth = cloth.view(*shape, 2, -1) * there[..., None, None]
        grey, mask = cloth[:, :, :1], cloth[:, :, 1:]
        tinted = self.colours[colours][..., None] * (SHADE * mask + (1 - SHADE) * grey)
        layers = torch.cat([tinted, mask], 2).transpose(1, 2).flatten(2)  # [B, 4, garments * pixels]

        corner = self.corners[places]
        target = (corner[..., 1] * SIZE + corner[..., 0])[..., None] + self.offsets
        # windows do not overlap, and where no garment is, zeros are added: any order gives the same sums
        empty = torch.zeros(shape[0], 4, SIZE * SIZE, device=self.device)
        picture = empty.scatter_add(2, target.flatten(1)[:, None].expand(-1, 4, -1), layers)

        kind = (uniform(shape[0], 1) * len(BACKGROUNDS)).long()
        background = self.backgrounds[kind] + (2 * uniform(shape[0], 3) - 1) * BACKGROUND_SPREAD
        picture = picture[:, :3] + (1 - picture[:, 3:]) * background[..., None]
        return (2 * picture - 1).clamp(-1, 1).view(-1, 3, SIZE, SIZE), corner + WINDOW / 2 + jitter
