"""Folders of images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from geco_fast.data import DataError, DataNotFoundError, load


def write_images(folder, count, size=(18, 22), suffix=".png", color=lambda i: (10 * i, 0, 0)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, color(i)).save(folder / f"{i + 1:06d}{suffix}")


def reds(dataset) -> list[int]:
    image = dataset.batch(range(len(dataset))).image
    assert (image == image[:, :, :1, :1]).all()
    return (image[:, 0, 0, 0] * 255).round().int().tolist()


@pytest.mark.parametrize("folder", [".", "celeba", "img_align_celeba", "celeba/img_align_celeba"])
def test_splits_by_order_of_names(tmp_path, folder):
    write_images(tmp_path / folder, 20)
    train, test = (load("celeba", tmp_path, split=split) for split in ("train", "test"))
    assert train.image_shape == (3, 64, 64)
    assert train.num_classes is None
    assert train.batch([0]).label is None
    assert reds(train) == [10 * i for i in range(18)]
    assert reds(test) == [180, 190]


@pytest.mark.parametrize("place", ["img_align_celeba", "."])
def test_splits_by_the_official_list(tmp_path, place):
    write_images(tmp_path / "img_align_celeba", 6)
    lines = [f"{i + 1:06d}.png {part}" for i, part in enumerate("021002")]
    listing = tmp_path / place / "list_eval_partition.txt"
    listing.write_text("\n".join([*lines, "000007.png 0", ""]))
    assert reds(load("celeba", tmp_path)) == [0, 30, 40]
    assert reds(load("celeba", tmp_path, split="test")) == [10, 50]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("000001.png 0\n", "does not list the image 000002.png"),
        ("000001.png 0\n000002.png 3\n", "line 2 is '000002.png 3', wants"),
        ("000001.png\n", "line 1 is '000001.png', wants"),
    ],
)
def test_wrong_list(tmp_path, content, message):
    write_images(tmp_path, 2)
    (tmp_path / "list_eval_partition.txt").write_text(content)
    with pytest.raises(DataError, match=f"list_eval_partition.txt: {message}"):
        load("celeba", tmp_path)


@pytest.mark.parametrize("size", [(178, 218), (31, 20), (20, 31), (16, 16)])
def test_crops_the_central_square(tmp_path, size):
    width, height = size
    side = min(size)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = 255
    left, top = (width - side) // 2, (height - side) // 2
    square = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    pixels[top : top + side, left : left + side] = square
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = load("celeba", tmp_path, split="test", image_size=side).batch([0]).image
    expected = torch.from_numpy(square).permute(2, 0, 1)
    assert torch.equal((image[0] * 255).round(), expected.float())


def test_orientation_and_colours_of_a_resized_jpeg(tmp_path):
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32, :32] = [255, 0, 0]
    pixels[:32, 32:] = [0, 255, 0]
    pixels[32:, :32] = [0, 0, 255]
    Image.fromarray(pixels).save(tmp_path / "a.JPG", quality=95)
    image = load("celeba", tmp_path, split="test", image_size=8).batch([0]).image[0]
    corners = image[:, [0, 0, -1, -1], [0, -1, 0, -1]].round()
    assert torch.equal(corners, torch.eye(4)[:3])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_colour_modes_become_rgb(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new("RGB", (9, 9), "white").convert(mode).save(tmp_path / f"a.{suffix}")
    image = load("celeba", tmp_path, split="test", image_size=4).batch([0]).image
    assert image.shape == (1, 3, 4, 4)
    assert (image == 1).all()


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("damage", ["truncated", "corrupt", "text", "empty"])
def test_damaged_image_is_named_when_it_is_used(tmp_path, suffix, damage):
    write_images(tmp_path, 20, size=(64, 64), suffix=suffix)
    path = tmp_path / f"000003{suffix}"
    data = path.read_bytes()
    broken = {
        "truncated": data[: len(data) // 2],
        "corrupt": data[:8] + bytes(40) + data[48:],
        "text": b"not an image",
        "empty": b"",
    }
    path.write_bytes(broken[damage])
    dataset = load("celeba", tmp_path)
    dataset.batch([0, 1, 3])
    with pytest.raises(DataError, match=f"{path.name}: cannot be decoded"):
        dataset.batch([0, 2])


def test_vanished_image(tmp_path):
    write_images(tmp_path, 2)
    dataset = load("celeba", tmp_path)
    (tmp_path / "000001.png").unlink()
    with pytest.raises(DataError, match=r"000001\.png: cannot be decoded"):
        dataset.batch([0])


def test_empty_split(tmp_path):
    write_images(tmp_path, 1)
    with pytest.raises(DataError, match="none of its 1 images is in split 'train'"):
        load("celeba", tmp_path)


def test_nothing_there(tmp_path):
    (tmp_path / "notes.txt").write_text("no images here")
    with pytest.raises(DataNotFoundError, match="celeba: no jpg or png image in any of"):
        load("celeba", tmp_path)


def test_batch_of_nothing(tmp_path):
    write_images(tmp_path, 10)
    assert load("celeba", tmp_path).batch([]).image.shape == (0, 3, 64, 64)
