"""Image files are read as upright RGB, or refused with a sentence that names them."""

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from segkit.core.errors import DataError
from segkit.data import images
from segkit.data.images import image_size, read_image
from segkit.data.inputs import MAX_BYTES, check_name, inside, read_json, read_text

HEIGHT, WIDTH = 65, 97


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def picture(seed: int = 0) -> np.ndarray:
    """Return smooth pixels (65, 97, 3) without symmetry."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    planes = [a * x + b * y for a, b in rng.uniform(0.3, 1.3, (3, 2))]
    return np.stack(planes, -1).clip(0, 255).astype(np.uint8)


def read(path: Path) -> np.ndarray:
    return read_image(path).permute(1, 2, 0).numpy()


def png(
    path: Path, *, width: int, height: int, depth: int, color: int, samples: bytes = b""
) -> Path:
    """Write a PNG of a kind that Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(samples)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture()).save(path, exif=exif)
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(read(path), expected)
    assert image_size(path) == expected.shape[:2]
    assert (expected.shape[0] == WIDTH) == (orientation >= 5)


def test_orientations_by_hand(tmp_path: Path) -> None:
    """Compare each orientation with its expected pixels."""
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3)
    upright = {
        1: [[0, 1, 2], [3, 4, 5]],
        2: [[2, 1, 0], [5, 4, 3]],
        3: [[5, 4, 3], [2, 1, 0]],
        4: [[3, 4, 5], [0, 1, 2]],
        5: [[0, 3], [1, 4], [2, 5]],
        6: [[3, 0], [4, 1], [5, 2]],
        7: [[5, 2], [4, 1], [3, 0]],
        8: [[2, 5], [1, 4], [0, 3]],
    }
    for orientation, expected in upright.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
        assert read_image(tmp_path / "a.png")[0].tolist() == expected


def test_orientation_out_of_range_is_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 9
    Image.fromarray(picture()).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read(tmp_path / "a.png"), picture())


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm"])
def test_rgb_is_read_bit_for_bit(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(picture()).save(tmp_path / f"a.{suffix}")
    pixels = read_image(tmp_path / f"a.{suffix}")
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), picture())


def test_gray_and_bilevel_become_three_equal_planes(tmp_path: Path) -> None:
    gray = picture()[..., 0]
    Image.fromarray(gray).save(tmp_path / "l.png")
    Image.fromarray(gray > 60).save(tmp_path / "one.png")
    assert np.array_equal(read(tmp_path / "l.png"), np.repeat(gray[..., None], 3, 2))
    assert np.array_equal(read(tmp_path / "one.png")[..., 1], np.where(gray > 60, 255, 0))


def test_palette_is_looked_up_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.fromarray((picture()[..., 0] % 3).astype(np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 200, 100, 0, 7, 8, 9])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=bytes([0, 128, 255]))
    colors = np.array([[10, 20, 30], [200, 100, 0], [7, 8, 9]], np.uint8)
    expected = colors[picture()[..., 0] % 3]
    assert np.array_equal(read(tmp_path / "plain.png"), expected)
    assert np.array_equal(read(tmp_path / "clear.png"), expected)


def test_alpha_is_dropped(tmp_path: Path) -> None:
    alpha = picture(1)[..., :1]
    Image.fromarray(np.concatenate([picture(), alpha], -1)).save(tmp_path / "rgba.png")
    Image.fromarray(np.concatenate([picture()[..., :1], alpha], -1)).save(tmp_path / "la.png")
    assert np.array_equal(read(tmp_path / "rgba.png"), picture())
    assert np.array_equal(read(tmp_path / "la.png")[..., 2], picture()[..., 0])


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    color = np.full((HEIGHT, WIDTH, 3), [250, 120, 5], np.uint8)
    Image.fromarray(color).convert("CMYK").save(tmp_path / "a.jpg", quality=98)
    assert np.abs(read(tmp_path / "a.jpg").astype(int) - color).max() <= 3


def test_16_bit_keeps_the_high_byte(tmp_path: Path) -> None:
    """Pillow alone clips 16-bit gray to 255."""
    values = np.array([[0, 255, 256], [0x1234, 0x80FF, 0xFFFF]], np.uint16)
    high = [[0, 0, 1], [0x12, 0x80, 0xFF]]
    Image.fromarray(values).save(tmp_path / "gray.png")
    Image.fromarray(values).save(tmp_path / "gray.tif")
    rows = b"".join(b"\0" + np.repeat(row, 3).astype(">u2").tobytes() for row in values)
    png(tmp_path / "rgb.png", width=3, height=2, depth=16, color=2, samples=rows)
    for name in ("gray.png", "gray.tif", "rgb.png"):
        assert read_image(tmp_path / name).tolist() == [high] * 3, name


def test_32_bit_samples_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 5), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: samples of 32 bits .* \"range\""):
        read_image(tmp_path / "a.tif")


def deep_gray(folder: Path, suffix: str, samples: np.ndarray) -> Path:
    path = folder / f"deep.{suffix}"
    if suffix == "pgm":
        height, width = samples.shape
        path.write_bytes(b"P5\n%d %d\n65535\n" % (width, height) + samples.astype(">u2").tobytes())
    else:
        Image.fromarray(samples).save(path)
    return path


def deep_colors(folder: Path, suffix: str, samples: np.ndarray) -> Path:
    """Write colors of 16 bits, which Pillow cannot write."""
    path = folder / f"colors.{suffix}"
    height, width, bands = samples.shape
    rows = [row.astype(">u2").tobytes() for row in samples]
    if suffix == "png":
        color = {2: 4, 3: 2, 4: 6}[bands]
        lines = b"".join(b"\0" + row for row in rows)
        return png(path, width=width, height=height, depth=16, color=color, samples=lines)
    order = ">" if suffix == "big.tif" else "<"
    data = samples.astype(f"{order}u2").tobytes()
    tags = [
        (256, 3, width), (257, 3, height), (258, 3, 16), (259, 3, 1), (262, 3, 2), (273, 4, 8),
        (277, 3, bands), (278, 3, height), (279, 4, len(data)),
    ]  # fmt: skip
    entries = b""
    for tag, kind, value in tags:
        if tag == 258:  # one depth per band, behind the directory
            at = 8 + len(data) + 2 + 12 * len(tags) + 4
            entries += struct.pack(f"{order}HHII", tag, 3, bands, at)
        elif kind == 3:
            entries += struct.pack(f"{order}HHIHH", tag, kind, 1, value, 0)
        else:
            entries += struct.pack(f"{order}HHII", tag, kind, 1, value)
    head = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(f"{order}I", 8 + len(data))
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    depths = struct.pack(f"{order}{bands}H", *[16] * bands)
    path.write_bytes(head + data + directory + depths)
    return path


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
@pytest.mark.parametrize(("factor", "most"), [(1, 255), (16, 4095), (64, 16383)])
def test_samples_that_do_not_fill_16_bits_need_a_range(
    tmp_path: Path, suffix: str, factor: int, most: int
) -> None:
    samples = np.tile(np.arange(256) * factor, (3, 1)).astype(np.uint16)
    path = deep_gray(tmp_path, suffix, samples)
    with pytest.raises(DataError, match=rf'reach {255 * factor} only.*"range": \[0, {most}\]'):
        read_image(path)
    expected = np.rint(np.arange(256) * factor * 255 / most)
    for channels in (1, 3):
        pixels = read_image(path, range=(0, most), channels=channels)
        assert pixels.shape == (channels, 3, 256)
        assert np.abs(pixels[-1, 1].numpy() - expected).max() <= 1
    assert read_image(path, range="measured")[0, 0].tolist() == [*range(256)]


@pytest.mark.parametrize("suffix", ["png", "tif", "big.tif"])
def test_colors_of_16_bits_keep_both_bytes(tmp_path: Path, suffix: str) -> None:
    """Pillow decodes the high bytes only, which are 0 to 15 for a camera of 12 bits."""
    samples = np.random.default_rng(0).integers(0, 4096, (5, 7, 3)).astype(np.uint16)
    samples[0, 0] = 4095
    path = deep_colors(tmp_path, suffix, samples)
    with pytest.raises(DataError, match=r'reach 4095 only.*"range": \[0, 4095\]'):
        read_image(path)
    pixels = read_image(path, range=(0, 4095)).permute(1, 2, 0).numpy()
    assert np.abs(pixels - samples * (255 / 4095)).max() <= 0.501
    full = deep_colors(tmp_path, suffix, samples * 16)
    assert np.array_equal(read_image(full).permute(1, 2, 0).numpy(), samples * 16 >> 8)


@pytest.mark.parametrize("bands", [2, 4])
def test_alpha_of_16_bits_is_dropped_or_a_band(tmp_path: Path, bands: int) -> None:
    samples = np.random.default_rng(0).integers(0, 65536, (5, 7, bands)).astype(np.uint16)
    path = deep_colors(tmp_path, "png", samples)
    colors = samples[..., [0, 0, 0]] if bands == 2 else samples[..., :3]
    assert np.array_equal(read_image(path).permute(1, 2, 0).numpy(), colors >> 8)
    if bands == 4:
        assert np.array_equal(read_image(path, channels=4).permute(1, 2, 0).numpy(), samples >> 8)


def test_a_range_scales_floats_and_leaves_bytes(tmp_path: Path) -> None:
    values = np.array([[0.0, 0.25, 0.5], [1.0, 2.0, np.nan]], np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif", range=(0, 1))[0].tolist() == [[0, 64, 128], [255, 255, 0]]
    Image.fromarray(picture()).save(tmp_path / "a.png")
    assert np.array_equal(
        read_image(tmp_path / "a.png", range=(0, 4095)).permute(1, 2, 0).numpy(), picture()
    )


def test_bands_are_those_of_the_file(tmp_path: Path) -> None:
    bands = np.random.default_rng(0).integers(0, 256, (4, 5, 4), np.uint8)
    Image.fromarray(bands).save(tmp_path / "a.png")
    assert np.array_equal(
        read_image(tmp_path / "a.png", channels=4).permute(1, 2, 0).numpy(), bands
    )
    frames = [Image.fromarray(bands[..., i]) for i in range(4)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert np.array_equal(
        read_image(tmp_path / "a.tif", channels=4).permute(1, 2, 0).numpy(), bands
    )
    with pytest.raises(DataError, match=r"a\.tif: it has 4 frames, but the source has channels=2"):
        read_image(tmp_path / "a.tif", channels=2)
    with pytest.raises(DataError, match=r"a\.png: it has 4 bands, but the source has channels=5"):
        read_image(tmp_path / "a.png", channels=5)


def test_damaged_metadata_is_no_reason_to_refuse_a_photograph(tmp_path: Path) -> None:
    Image.fromarray(picture()).save(tmp_path / "a.jpg", quality=95)
    jpeg = (tmp_path / "a.jpg").read_bytes()
    bad = b"Exif\0\0" + b"\xde\xad\xbe\xef" * 6
    Image.fromarray(picture()).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()

    def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
        crc = zlib.crc32(kind + data) if crc is None else crc
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    head, tail = 33, len(whole) - 12  # behind the header, and before the end
    long_text = b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b" " * (3 << 20))
    files = {
        "exif.jpg": jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(bad) + 2) + bad + jpeg[2:],
        "text.png": whole[:head] + chunk(b"iTXt", long_text) + whole[head:],
        "zip.png": whole[:head] + chunk(b"zTXt", b"a\0\0" + long_text[22:]) + whole[head:],
        "checksum.png": whole[:head] + chunk(b"tEXt", b"a\0bc", 0) + whole[head:],
        "profile.png": whole[:head] + chunk(b"iCCP", b"a\0\0bc", 7) + whole[head:],
        "exif.png": whole[:head] + chunk(b"eXIf", b"\xde\xad" * 9) + whole[head:],
        "end.png": whole[:tail] + chunk(b"iTXt", long_text) + whole[tail:],
    }
    expected = {"jpg": read(tmp_path / "a.jpg"), "png": picture()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert image_size(tmp_path / name) == (HEIGHT, WIDTH), name
            assert np.array_equal(read(tmp_path / name), expected[name[-3:]]), name
        if name != "profile.png":  # Pillow skips such a profile itself
            assert any(str(tmp_path / name) in str(warning.message) for warning in caught), name


@pytest.mark.parametrize("suffix", ["jfif", "jpe", "pgm", "pbm", "pnm", "JPG", "avif", "jp2"])
def test_whatever_pillow_reads_is_listed(tmp_path: Path, suffix: str) -> None:
    end = f".{suffix.lower()}"
    if end in (".avif", ".jp2") and end not in images.SUFFIXES:
        pytest.skip("this Pillow does not decode it")
    assert end in images.SUFFIXES
    kinds = {".jfif": "JPEG", ".jpe": "JPEG", ".jpg": "JPEG"}
    gray = suffix in ("pgm", "pbm", "pnm")
    image = Image.fromarray(picture()[..., 0] if gray else picture())
    image = image.convert("1") if suffix == "pbm" else image
    image.save(tmp_path / f"a.{suffix}", format=kinds.get(end))
    assert read_image(tmp_path / f"a.{suffix}").shape == (3, HEIGHT, WIDTH)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((9, 11, 3), value, np.uint8)) for value in (40, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    assert (read(tmp_path / "a.gif") == 40).all()
    assert (read(tmp_path / "a.png") == 40).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(picture()).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataError, match=rf"a\.{suffix}"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\xff\xd8"])
def test_other_files_than_images_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for function in (read_image, image_size):
        with pytest.raises(DataError, match=r"a\.jpg"):
            function(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jpg does not exist"):
        read_image(tmp_path / "gone.jpg")
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(tmp_path)


def test_decompression_bomb_is_refused_from_its_header(tmp_path: Path) -> None:
    """An image with one column more than allowed has 1.2 GB of pixels."""
    bomb = png(tmp_path / "a.png", width=20_001, height=20_000, depth=8, color=2)
    for function in (read_image, image_size):
        with pytest.raises(DataError, match=r"a\.png has 20001 × 20000 pixels"):
            function(bomb)
    largest = png(tmp_path / "largest.png", width=20_000, height=20_000, depth=8, color=2)
    assert image_size(largest) == (20_000, 20_000)
    png(tmp_path / "b.png", width=2**31 - 1, height=2**31 - 1, depth=8, color=2)
    with pytest.raises(DataError, match=r"b\.png"):
        read_image(tmp_path / "b.png")


def test_limit_is_on_pixels_not_on_a_side(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", HEIGHT * WIDTH)
    Image.fromarray(picture()).save(tmp_path / "a.png")
    assert image_size(tmp_path / "a.png") == (HEIGHT, WIDTH)
    monkeypatch.setattr(images, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(DataError, match="97 × 65 pixels; expected at most"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "name",
    [
        *("", "..", "../a.jpg", "a/../../b.jpg", "a\\..\\b"),
        *("/etc/passwd", "C:\\a", "C:a", "\\\\server\\a"),
        *("a\0b", "a\nb", "\ud800.jpg"),
    ],
)
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="file name"):
        inside(tmp_path, name)


@pytest.mark.parametrize(
    "name", ["a.jpg", "a/b.jpg", "..a.jpg", "a..b/c", "été 1.jpg", "a b\u202f"]
)
def test_names_within_the_folder_pass(tmp_path: Path, name: str) -> None:
    check_name(name)
    assert inside(tmp_path, name) == tmp_path / name


def test_symbolic_links_may_not_leave_the_folder(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (data / "real.jpg").write_bytes(b"x")
    os.symlink(tmp_path / "secret.jpg", data / "out.jpg")
    os.symlink(tmp_path, data / "folder")
    os.symlink(data / "real.jpg", data / "within.jpg")
    os.symlink(data, tmp_path / "alias")
    for name in ("out.jpg", "folder/secret.jpg"):
        with pytest.raises(DataError, match="symbolic link out of the data folder"):
            inside(data, name)
    inside(data, "within.jpg")
    inside(tmp_path / "alias", "real.jpg")  # the folder itself may be a link


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"images": [', "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"[1, 2]", "contains a JSON list"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b'{"a": "\xff"}', "is not UTF-8"),
    ],
)
def test_invalid_json_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.json {words}"):
        read_json(tmp_path / "a.json")


def test_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_huge_or_missing_text_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(MAX_BYTES + 1)  # sparse: takes no disk
    with pytest.raises(DataError, match="expected at most"):
        read_json(tmp_path / "huge.json")
    with pytest.raises(DataError, match="does not exist"):
        read_text(tmp_path / "gone.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_text(tmp_path)
    with pytest.raises(DataError):
        read_text("a\0b")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "tif", "gif", "ppm"])
def test_mutated_files_are_read_or_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(picture()).save(path)
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    warnings.simplefilter("ignore")
    sentences = []
    for _ in range(1000):
        mutated = whole.copy()
        # mostly in the header, where a byte means most
        at = (rng.random(rng.integers(1, 6)) ** 3 * len(whole)).astype(int)
        mutated[at] = rng.integers(0, 256, len(at))
        path.write_bytes(mutated.tobytes())
        try:
            assert read_image(path).shape[0] == 3
        except DataError as error:
            sentences.append(str(error))
    assert 0 < len(sentences) < 1000
    assert all(str(path) in sentence and "\n" not in sentence for sentence in sentences)
