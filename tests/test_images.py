"""Sets of images: every format gives the same bytes, and what is no set of images is refused by name."""

from __future__ import annotations

import io
import re
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image

from qandc import ConfigError, DataError, QandCError
from qandc.evaluation.images import Images
from qandc.evaluation.pixels import to_float


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
    for given in (pixels, chw, to_float(chw)):
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


def image_at(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4)).save(path, "PNG")


def test_hidden_files_and_folders_do_not_count(tmp_path):
    folder = tmp_path / ".root"  # what is above the folder that is given decides nothing
    for name in ("0.png", "sub/1.png", ".2.png", ".ipynb_checkpoints/0.png", "sub/.deep/er/3.png"):
        image_at(folder / name)
    (folder / ".DS_Store").write_bytes(b"no image")
    assert Images.open(folder).count == 2
    (folder / "sub" / "._1.png").write_bytes(b"\0\5\x16\7")
    with pytest.raises(DataError, match=r"\._1\.png is a leftover of macOS and no image; remove"):
        Images.open(folder)


def test_links_are_followed_and_files_count_once(tmp_path, pixels):
    """Among the links a cycle, two links to one folder, links to files, one of them to a hidden file."""
    folder, other = save_folder(tmp_path / "x", pixels[:2]), save_folder(tmp_path / "other", pixels[2:5])
    Image.fromarray(pixels[5]).save(folder / ".blob", "PNG")
    (folder / "class1").symlink_to(other)
    (folder / "class2").symlink_to(other)
    (folder / "cycle").symlink_to(folder)
    (other / "back").symlink_to(tmp_path)
    (folder / "again.png").symlink_to(folder / "000.png")
    (folder / "blob.PNG").symlink_to(".blob")
    (folder / "hard.png").hardlink_to(folder / "001.png")
    (folder / "link.txt").symlink_to(folder / "000.png")
    images = Images.open(folder)
    assert images.count == 7
    assert [tuple(image) for image in np.unique(read(images).reshape(7, -1), axis=0)] == sorted(
        tuple(pixels[i].reshape(-1)) for i in range(6)
    )
    assert np.array_equal(read(images), read(Images.open(folder)))


@pytest.mark.parametrize("name", ["x.png", "class0"])
def test_links_that_lead_nowhere_are_refused(tmp_path, name):
    image_at(tmp_path / "0.png")
    (tmp_path / name).symlink_to(tmp_path / "none")
    with pytest.raises(DataError, match=rf"cannot be read \(.*{name}"):
        Images.open(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(name)  # to itself
    with pytest.raises(DataError, match=rf"cannot be read \(.*{name}"):
        Images.open(tmp_path)


def test_special_files_are_not_opened(tmp_path, caplog):
    import os

    image_at(tmp_path / "0.png")
    os.mkfifo(tmp_path / "1.png")  # to open it would wait for ever
    (tmp_path / "2.png").symlink_to("/dev/zero")
    assert Images.open(tmp_path).count == 1
    assert sum("neither a file nor a folder" in message for message in caplog.messages) == 2
    os.mkfifo(tmp_path / "x.npz")
    with pytest.raises(ConfigError, match="neither a folder nor"):
        Images.open(tmp_path / "x.npz")


def test_folders_that_cannot_be_listed(tmp_path, monkeypatch):
    import os

    image_at(tmp_path / "sub" / "0.png")
    scandir = os.scandir

    def refuse(path):  # root may read everything
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot be read \(.*Permission denied.*sub"):
        Images.open(tmp_path)


def _png(path, mode: str, **options) -> None:
    image = Image.new("RGB", (4, 3), (1, 2, 3))
    image.convert(mode).save(path, "PNG", **options)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


def _raw_png(
    width: int, height: int, bits: int, colour: int, *late: bytes, early: bytes = b"", rows: bytes = b""
) -> bytes:
    """A PNG by hand: of any bit depth and size, with chunks in front of the pixels and behind them."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    data = _chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + early + data + b"".join(late) + _chunk(b"IEND", b"")


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


ROWS = (b"\0" + bytes(12)) * 3
FAULTS = {
    "palette with transparent entries": (lambda p: _png(p, "P", transparency=bytes(256)), "transparency"),
    "palette with a transparent index": (lambda p: _png(p, "P", transparency=0), "transparency"),
    "colour key": (lambda p: _png(p, "RGB", transparency=(9, 9, 9)), "transparency"),
    "grey key": (lambda p: _png(p, "L", transparency=7), "transparency"),
    "key of black and white": (lambda p: _png(p, "1", transparency=0), "transparency"),
    "RGBA": (lambda p: _png(p, "RGBA"), "mode RGBA"),
    "LA": (lambda p: _png(p, "LA"), "mode LA"),
    "CMYK": (lambda p: Image.new("CMYK", (4, 3)).save(p), "mode CMYK"),
    "16-bit RGB": (lambda p: p.write_bytes(_raw_png(4, 3, 16, 2)), "16 bits"),
    "16-bit grey": (lambda p: p.write_bytes(_raw_png(4, 3, 16, 0)), "mode I;16"),
    "animation": (
        lambda p: _png(p, "RGB", save_all=True, append_images=[Image.new("RGB", (4, 3))]),
        "an animation of 2 pictures",
    ),
    "turned PNG": (lambda p: _png(p, "RGB", exif=_exif(6)), "EXIF orientation 6"),
    "turned JPEG": (lambda p: Image.new("RGB", (4, 3)).save(p, "JPEG", exif=_exif(3)), "EXIF orientation 3"),
}


@pytest.mark.parametrize(("save", "message"), FAULTS.values(), ids=FAULTS)
def test_images_that_are_more_than_pixels_are_refused(tmp_path, save, message):
    """By contents: the name says JPEG, of a PNG file too. The message says what to do."""
    save(tmp_path / "x.jpg")
    with pytest.raises(DataError, match=rf"x\.jpg .*{message}.*; give 8-bit .*convert\('RGB'\)"):
        Images.open(tmp_path)


@pytest.mark.parametrize(
    ("late", "message"),
    [(_chunk(b"tRNS", bytes(6)), "transparency"), (_chunk(b"eXIf", _exif(8)), "EXIF orientation 8")],
    ids=["transparency", "orientation"],
)
def test_side_information_behind_the_pixels(tmp_path, late, message):
    (tmp_path / "x.png").write_bytes(_raw_png(4, 3, 8, 2, late, rows=ROWS))
    with pytest.raises(DataError, match=message):
        read(Images.open(tmp_path))


def test_what_is_the_same_picture_is_taken(tmp_path):
    """Palettes are RGB even if grey; one bit is grayscale; upright EXIF, one picture of an animation, other names."""
    picture = Image.new("RGB", (4, 3), (1, 2, 3))
    for i, image in enumerate((picture, picture.quantize(2))):
        image.save(tmp_path / f"{i}.jpeg", "PNG", exif=_exif(1))
    grey = Image.new("P", (4, 3))
    grey.putpalette([value for value in range(256) for _ in range(3)])
    grey.save(tmp_path / "2.png")
    assert Images.open(tmp_path).shape == (3, 4, 3)
    assert read(Images.open(tmp_path))[:2, 0, 0].tolist() == [[1, 2, 3]] * 2
    white = tmp_path / "white"
    white.mkdir()
    Image.new("1", (4, 3), 1).save(white / "0.png")
    Image.new("L", (4, 3), 255).save(white / "1.png")
    images = Images.open(white)
    assert images.shape == (3, 4, 1)
    assert (read(images) == 255).all()


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM"])
def test_no_other_decoder_is_opened(tmp_path, kind):
    Image.new("L", (4, 4)).save(tmp_path / "x.png", kind)
    with pytest.raises(DataError, match=r"x\.png cannot be read as an image \(it is neither PNG nor JPEG\)"):
        Images.open(tmp_path)


def test_declared_sizes_are_limited(tmp_path, pixels):
    """Of images in files, by their headers; with 400 megapixels Pillow's own limit would be an error, too."""
    folder = save_folder(tmp_path / "x", pixels)
    np.savez(tmp_path / "x.npz", pixels)
    for path in (folder, tmp_path / "x.npz"):
        assert Images.open(path, max_pixels=20).count == 7
        with pytest.raises(DataError, match=r"images of 5 x 4 pixels, 20; at most 19 .*raise max_pixels"):
            Images.open(path, max_pixels=19)
        with pytest.raises(ConfigError, match=r"max_pixels is 0; give an integer"):
            Images.open(path, max_pixels=0)
    large = tmp_path / "large"
    large.mkdir()
    for side in (8193, 10_000, 20_000):  # Pillow says nothing, warns, refuses
        (large / "0.png").write_bytes(_raw_png(side, side, 8, 2))
        with pytest.raises(DataError, match=f"{side} x {side} pixels"):
            Images.open(large)
    assert Images.open(large, max_pixels=20_000**2).shape == (20_000, 20_000, 3)


@pytest.mark.slow
@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_small_files_of_large_arrays(tmp_path, fortran, dtype):
    """640 MiB of zeros in 3: what must be read as a whole is refused, what is read by rows takes little."""
    size = np.dtype(dtype).itemsize
    path, shape = tmp_path / "x.npz", (640 // size, 1024, 1024)
    header = io.BytesIO()
    description = np.lib.format.dtype_to_descr(np.dtype(dtype))
    np.lib.format.write_array_header_1_0(header, {"descr": description, "fortran_order": fortran, "shape": shape})
    archive = zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    with archive, archive.open("arr_0.npy", "w") as file:
        file.write(header.getvalue())
        for _ in range(160):
            file.write(bytes(2**22))
    assert path.stat().st_size < 2**23
    tracemalloc.start()
    try:
        if fortran or dtype != np.uint8:
            with pytest.raises(
                DataError, match="images are uint8" if dtype != np.uint8 else "536,870,912 are decoded at once"
            ):
                Images.open(path)
        else:
            assert next(Images.open(path).batches(4)).shape == (4, 1, 1024, 1024)
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


def test_batches_of_large_images_are_smaller(pixels, monkeypatch):
    monkeypatch.setattr("qandc.evaluation.images.AT_ONCE", 125)  # two of 60 bytes
    batches = list(Images.of(pixels).batches(5))
    assert [len(batch) for batch in batches] == [2, 2, 2, 1]
    monkeypatch.setattr("qandc.evaluation.images.AT_ONCE", 1)
    assert [len(batch) for batch in Images.of(pixels).batches(5)] == [1] * 7


def _npz_of(path, content: bytes, method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("arr_0.npy", content)


def _npy(description: str, version: bytes = b"\1\0") -> bytes:
    size = len(description).to_bytes(2 if version == b"\1\0" else 4, "little")
    return b"\x93NUMPY" + version + size + description.encode()


def _uint8(shape: str) -> str:
    return f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}}}\n"


HEADERS = {
    "product beyond 64 bits": _npy(_uint8("(4294967296, 4294967296, 4294967296, 3)")),
    "product that is 0 in 64 bits": _npy(_uint8("(4611686018427387904, 4, 4, 3)")),
    "negative": _npy(_uint8("(-1, -4, -4, 3)")),
    "much more than there is": _npy(_uint8("(1000000000, 64, 64, 3)")) + bytes(64 * 64 * 3),
    "nested": _npy("(" * 5000 + "\n"),
    "no Python": _npy("{'descr': \n"),
    "unknown format": _npy(_uint8("(1, 4, 4, 3)"), b"\x09\x09") + bytes(48),
    "header of 4 GB": b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(2**22),
    "objects": _npy("{'descr': '|O', 'fortran_order': False, 'shape': (1, 4, 4, 3)}\n") + bytes(400),
    "strange type": _npy("{'descr': '|zz', 'fortran_order': False, 'shape': (1, 4, 4, 3)}\n") + bytes(400),
    "no array": b"\x93NUMP",
    "nothing": b"",
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_headers_of_npz_that_are_refused(tmp_path, content):
    _npz_of(tmp_path / "x.npz", content)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"x\.npz"):
            Images.open(tmp_path / "x.npz")
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


def test_archives_that_are_refused(tmp_path, pixels):
    path = tmp_path / "x.npz"
    whole = io.BytesIO()
    np.lib.format.write_array(whole, pixels)
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):  # zipfile inflates these without a bound
        _npz_of(path, whole.getvalue(), method)
        with pytest.raises(DataError, match="is compressed by method"):
            Images.open(path)
    _npz_of(path, whole.getvalue())
    content = bytearray(path.read_bytes())
    for header in (b"PK\1\2", b"PK\3\4"):
        content[content.index(header) + (8 if header == b"PK\1\2" else 6)] |= 1  # the flag of encryption
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"x\.npz: not an \.npz file .*encrypted"):
        Images.open(path)


def test_sizes_that_lie(tmp_path, pixels):
    """The directory of the archive promises as much as the header of the array, and neither is true."""
    content = _npy(_uint8("(9, 5, 4, 3)")) + pixels.tobytes()
    _npz_of(tmp_path / "x.npz", content)
    archive = bytearray((tmp_path / "x.npz").read_bytes())
    at = archive.index(b"PK\1\2") + 24
    assert int.from_bytes(archive[at : at + 4], "little") == len(content)
    archive[at : at + 4] = (len(content) + 2 * 60).to_bytes(4, "little")
    (tmp_path / "x.npz").write_bytes(archive)
    images = Images.open(tmp_path / "x.npz")
    with pytest.raises(DataError, match="ends after 7 of 9 images"):
        list(images.batches(9))


def test_warnings_of_decoders_are_no_faults(tmp_path):
    """Of an animation that is none, and of a damaged EXIF entry: other readers take such pictures, too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (tmp_path / "0.png").write_bytes(_raw_png(4, 3, 8, 2, rows=ROWS, early=_chunk(b"acTL", bytes(8))))
        damaged = b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x0e\0\2\0\0\xff\0\0\0\0\x1a\0\0\0\0"
        Image.new("RGB", (4, 3)).save(tmp_path / "1.jpg", exif=damaged)
        for path in tmp_path.iterdir():
            with Image.open(path) as image:
                image.getexif()
    assert len(caught) >= 2  # or the files are sound
    assert read(Images.open(tmp_path)).shape == (2, 3, 4, 3)


def _mutations(random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(len(changed))
        kind = random.randrange(4)
        if kind == 0:
            changed[at] = random.choice((0, 1, 127, 128, 255, random.randrange(256)))
        elif kind == 1:
            changed[at : at + 4] = random.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"))
        elif kind == 2:
            changed[at:at] = bytes(random.randrange(256) for _ in range(random.randrange(1, 8)))
        else:
            del changed[at : at + random.choice((1, 3, len(changed) // 2))]
        changed = changed or bytearray(1)
    return bytes(changed)


def _mutated_png(random, data: bytes) -> bytes:
    """The contents of one chunk changed, or chunks in another order, with sums that are right."""
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += size + 12
    number = random.randrange(len(chunks))
    kind, content = chunks[number]
    chunks[number] = (
        random.choice((kind, kind, b"tRNS", b"iCCP", b"IHDR", b"fcTL")),
        _mutations(random, content + b"x"),
    )
    if random.randrange(3) == 0:
        random.shuffle(chunks)
    return data[:8] + b"".join(_chunk(*chunk) for chunk in chunks)


def _mutated_npz(random, data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        archive.writestr("arr_0.npy", _mutations(random, data))
    return file.getvalue()


@pytest.mark.slow
def test_damaged_files_raise_nothing_else(tmp_path, pixels):
    """Bytes of whole files changed at random, and bytes inside their checksums: our errors only, and no warning."""
    from PIL.PngImagePlugin import PngInfo

    random = Random(0)
    text = PngInfo()
    text.add_text("key", "value" * 20, zip=True)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 1, "description"
    saved = {}
    for name, mode, kind, options in (
        ("rgb", "RGB", "PNG", {"pnginfo": text, "exif": exif, "dpi": (72, 72)}),
        ("palette", "P", "PNG", {}),
        ("animation", "RGB", "PNG", {"save_all": True, "append_images": [Image.fromarray(pixels[1])]}),
        ("jpeg", "RGB", "JPEG", {"exif": exif}),
        ("progressive", "L", "JPEG", {"progressive": True}),
    ):
        file = io.BytesIO()
        Image.fromarray(pixels[0]).convert(mode).save(file, kind, **options)
        saved[name] = file.getvalue()
    npy = io.BytesIO()
    np.lib.format.write_array(npy, pixels)
    compressed = io.BytesIO()
    np.savez_compressed(compressed, pixels)
    folder = tmp_path / "x"
    folder.mkdir()
    outcomes = set()
    for _ in range(300):
        for name in saved:
            change = _mutated_png if saved[name][:1] == b"\x89" and random.randrange(2) else _mutations
            (folder / "0.png").write_bytes(change(random, saved[name]))
            outcomes.add(_outcome(folder))
        for change, data in ((_mutations, compressed.getvalue()), (_mutated_npz, npy.getvalue())):
            (tmp_path / "x.npz").write_bytes(change(random, data))
            outcomes.add(_outcome(tmp_path / "x.npz"))
    assert outcomes == {"read", "refused"}


def _outcome(path) -> str:
    try:
        images = Images.open(path)
        assert sum(len(batch) for batch in images.batches(2)) == images.count
    except QandCError as error:
        return "refused" if path.name in str(error) else f"not named: {error}"
    return "read"


@pytest.mark.parametrize(
    "given",
    [
        torch.zeros(2, 3, 4, 4, dtype=torch.int64),
        torch.zeros(2, 3, 4, 4, dtype=torch.bool),
        torch.zeros(2, 3, 4, 4, dtype=torch.complex64),
        torch.zeros(2, 4, 4, 3),
        torch.zeros(0, 3, 4, 4),
        torch.zeros(2, 3, 0, 4),
        np.zeros((4, 4), np.uint8),
        np.zeros((0, 4, 4), np.uint8),
        np.zeros((2, 4, 4), bool),
        np.array([["a"]]),
        [[1]],
        None,
        "x.npz",
    ],
    ids=lambda given: f"{type(given).__name__} {getattr(given, 'dtype', '')}",
)
def test_what_is_no_set_of_images(given):
    with pytest.raises(DataError):
        Images.of(given)


def test_paths_and_sizes_that_are_none(tmp_path, pixels):
    for path in (None, "x" * 300, "a\0b", tmp_path / "x.npz" / "y"):
        with pytest.raises(ConfigError, match="give"):
            Images.open(path)
    with pytest.raises(ConfigError, match=r"give an integer >= 1"):
        Images.of(pixels).batches(0)
