"""Sets of images: every format gives the same bytes, and what is no set of images is refused by name."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from qandc import ConfigError, DataError
from qandc.images import Images


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)


def read(images: Images, size: int = 3) -> np.ndarray:
    """``[N, H, W, C]``."""
    parts = list(images.batches(size))
    assert [len(part) for part in parts] == [min(size, images.count - i) for i in range(0, images.count, size)]
    return torch.cat(parts).permute(0, 2, 3, 1).numpy()


def save_folder(folder, pixels, suffix=".png"):
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image.squeeze()).save(folder / f"{i:03d}{suffix}")
    return folder


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [0, 1, 3])
def test_npz(tmp_path, pixels, save, channels):
    array = pixels[..., 0] if channels == 0 else pixels[..., :channels]
    save(tmp_path / "x.npz", np.ascontiguousarray(array), np.arange(7))  # the second array holds labels in ADM's files
    images = Images.open(tmp_path / "x.npz")
    assert (images.count, images.shape) == (7, (5, 4, channels or 1))
    assert np.array_equal(read(images), pixels[..., : channels or 1])
    assert np.array_equal(read(images), pixels[..., : channels or 1])  # a second time


def test_npz_in_fortran_order(tmp_path, pixels):
    np.savez(tmp_path / "x.npz", np.asfortranarray(pixels))
    assert np.array_equal(read(Images.open(tmp_path / "x.npz")), pixels)


def test_folder(tmp_path, pixels):
    folder = save_folder(tmp_path / "x", pixels[:5])
    save_folder(folder / "sub", pixels[5:], ".PNG")
    (folder / "notes.txt").write_text("no image")
    images = Images.open(folder)
    assert (images.count, images.shape) == (7, (5, 4, 3))
    assert np.array_equal(read(images), pixels)


def test_folder_of_grayscale_and_jpeg(tmp_path, pixels):
    gray = Images.open(save_folder(tmp_path / "gray", pixels[..., 0]))
    assert gray.shape == (5, 4, 1)
    assert np.array_equal(read(gray), pixels[..., :1])
    flat = np.full((2, 16, 16, 3), 90, np.uint8)
    assert np.array_equal(read(Images.open(save_folder(tmp_path / "jpeg", flat, ".jpg"))), flat)


def test_arrays_and_tensors(pixels):
    chw = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    for given in (pixels, chw, chw.float() / 127.5 - 1):
        images = Images.of(given)
        assert (images.count, images.shape) == (7, (5, 4, 3))
        assert np.array_equal(read(images), pixels)
    assert Images.of(pixels[..., 0]).shape == (5, 4, 1)


def test_what_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing' is not there; give an \.npz file or a folder"):
        Images.open(tmp_path / "nothing")
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(ConfigError, match=r"is neither a folder nor an \.npz file; give"):
        Images.open(tmp_path / "x.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.png, \.jpg, \.jpeg file"):
        Images.open(tmp_path / "empty")


def _npz_bytes(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an .npz file that can be read"),
        (b"text", "not an .npz file that can be read"),
        (_npz_bytes(images=np.zeros((2, 4, 4), np.uint8)), "there is no array arr_0, only images; save them"),
        (_npz_bytes(arr_0=np.array([{}], object)), "got object"),
        (_npz_bytes(arr_0=np.zeros((2, 4, 4, 3))), "images are uint8, 0 to 255; got float64; round values in"),
        (_npz_bytes(arr_0=np.full((2, 4, 4, 3), np.nan)), "contain NaN or inf"),
        (_npz_bytes(arr_0=np.zeros((2, 4), np.uint8)), r"got [2, 4]"),
        (_npz_bytes(arr_0=np.zeros((2, 3, 4, 4), np.uint8)), r"got [2, 3, 4, 4]"),
        (_npz_bytes(arr_0=np.zeros((0, 4, 4, 3), np.uint8)), r"got [0, 4, 4, 3]"),
    ],
    ids=["empty", "text", "other name", "objects", "float", "NaN", "rank", "channels first", "no images"],
)
def test_npz_that_is_refused(tmp_path, content, message):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(message)):
        Images.open(tmp_path / "x.npz")


def test_npz_that_is_cut_off(tmp_path, pixels):
    """The header promises more than there is."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (9, 5, 4, 3)})
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", file.getvalue() + pixels.tobytes())
    with pytest.raises(DataError, match="ends after 7 of 9 images"):
        read(Images.open(tmp_path / "x.npz"))


def test_folder_with_images_that_differ(tmp_path, pixels):
    folder = save_folder(tmp_path / "x", pixels)
    Image.fromarray(pixels[0, :4]).save(folder / "100.png")
    with pytest.raises(DataError, match=r"mixes sizes .* 000\.png is \[5, 4, 3\], 100\.png \[4, 4, 3\]"):
        Images.open(folder)
    Image.fromarray(pixels[0, :, :, 0]).save(folder / "100.png")
    with pytest.raises(DataError, match=r"100\.png \[5, 4, 1\]"):
        Images.open(folder)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "CMYK"])
def test_folder_with_images_of_another_kind(tmp_path, mode):
    Image.new(mode, (4, 4)).save(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"))
    with pytest.raises(DataError, match=rf"is of mode {mode}; give 8-bit grayscale or RGB"):
        Images.open(tmp_path)


def test_folder_with_broken_images(tmp_path, pixels):
    folder = save_folder(tmp_path / "x", pixels)
    images = Images.open(folder)
    whole = (folder / "003.png").read_bytes()
    (folder / "003.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"003\.png cannot be read as an image"):
        read(images)
    (folder / "003.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"003\.png cannot be read as an image"):
        Images.open(folder)
    Image.fromarray(pixels[0, :4]).save(folder / "003.png")
    with pytest.raises(DataError, match=r"003\.png has changed"):
        read(images)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_arrays_that_are_refused(pixels, value):
    broken = torch.zeros(4, 1, 8, 8)
    broken[2, 0, 3, 3] = value
    for given in (broken, broken.numpy()):
        with pytest.raises(DataError, match="contain NaN or inf"):
            Images.of(given)
    with pytest.raises(DataError, match=r"is \[N, C, H, W\]; got \[1, 8, 8\]"):
        Images.of(torch.zeros(1, 8, 8))
    with pytest.raises(DataError, match="got float32"):
        Images.of(np.zeros((4, 8, 8), np.float32))
