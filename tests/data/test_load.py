"""`load`: its arguments, the built-in digits, downloads."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from sklearn.datasets import load_digits

from geco_fast.data import DATASETS, DataError, DataNotFoundError, load


def test_names():
    assert DATASETS == (
        "digits",
        "mnist",
        "cifar10",
        "celeba",
        "color-mnist",
        "mnist-triplets",
        "mnist-sum",
        "mnist-sum-hard",
        "mnist-rotate",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "imagenet"}, "name must be one of 'digits', .*, got 'imagenet'"),
        ({"split": "valid"}, "split must be one of 'train', 'test', got 'valid'"),
        ({"base": "cifar10"}, "base must be one of 'mnist', 'digits', got 'cifar10'"),
        ({"image_size": 0}, "image_size must be a whole number >= 1, got int 0"),
        ({"image_size": 16.0}, "image_size must be a whole number >= 1, got float 16.0"),
        ({"image_size": True}, "image_size must be a whole number"),
        ({"seed": -1}, "seed must be a whole number >= 0, got int -1"),
        ({"seed": None}, "seed must be a whole number >= 0, got NoneType None"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load(**{"name": "digits", **arguments})


@pytest.mark.parametrize("name", DATASETS[1:])
def test_files_need_a_root(name):
    with pytest.raises(DataNotFoundError, match=r"root must be the folder of .* got None"):
        load(name)


@pytest.mark.parametrize("name", DATASETS[1:])
@pytest.mark.parametrize("root", ["absent", "file"])
def test_wrong_root(tmp_path, name, root):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match=rf"no .* in any of {tmp_path / root}, "):
        load(name, tmp_path / root)


def test_unreadable_folder(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.is_file", refuse)
    with pytest.raises(DataError, match=f"{tmp_path}: cannot be read .*Permission denied"):
        load("mnist", tmp_path)


def test_digits_are_those_of_scikit_learn_split_by_class():
    train, test = (load("digits", split=split, image_size=8) for split in ("train", "test"))
    pictures = load_digits()
    expected = torch.from_numpy(pictures.images)
    labels = torch.from_numpy(pictures.target)
    train_batch, test_batch = (d.batch(range(len(d))) for d in (train, test))

    for digit in range(10):
        of_class = expected[labels == digit]
        in_test = torch.arange(1, len(of_class) + 1) % 5 == 0
        for batch, chosen in ((train_batch, ~in_test), (test_batch, in_test)):
            images = batch.image[batch.label == digit, 0]
            assert torch.equal(images * 16, of_class[chosen].float())


def test_digits_do_not_depend_on_the_seed():
    first, second = (load("digits", seed=seed).batch(range(100)).image for seed in (0, 1))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("module", "name"), [("sklearn.datasets", "digits"), ("PIL.Image", "celeba")]
)
def test_missing_library_names_the_extra(tmp_path, monkeypatch, module, name):
    (tmp_path / "a.png").touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"needs .*: pip install 'geco-fast\[train\]'"):
        load(name, tmp_path, split="test").batch([0])


def test_download_needs_torchvision(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(DataError, match=rf"needs torchvision: .*mnist in {tmp_path}"):
        load("mnist", tmp_path, download=True)


@pytest.fixture
def torchvision(monkeypatch):
    """A torchvision whose data sets run the function that a test sets, and count the calls."""
    module = ModuleType("torchvision")
    module.datasets = ModuleType("torchvision.datasets")
    monkeypatch.setitem(sys.modules, "torchvision", module)
    return module.datasets


@pytest.mark.parametrize("name", ["mnist", "mnist-sum"])
def test_downloads_what_is_missing_once(tmp_path, write_mnist, torchvision, name):
    calls = []

    def fetch(root, download):
        calls.append(download)
        write_mnist(tmp_path / "MNIST/raw")
        assert root == str(tmp_path)

    torchvision.MNIST = fetch
    with pytest.raises(DataNotFoundError):
        load(name, tmp_path)
    for _ in range(2):
        assert load(name, tmp_path, download=True).image_shape[1:] == (12, 12)
    assert calls == [True]


def test_failed_download(tmp_path, torchvision):
    def fetch(root, download):
        raise RuntimeError("no route to host")

    torchvision.CIFAR10 = fetch
    with pytest.raises(DataError, match=r"cifar10: .* cannot download it \(no route"):
        load("cifar10", tmp_path, download=True)


def test_damaged_files_are_not_downloaded_over(tmp_path, write_mnist, torchvision):
    write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"damaged")
    with pytest.raises(DataError, match="cannot be read"):
        load("mnist", tmp_path, download=True)
