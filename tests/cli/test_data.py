"""The images that come with the package: whole, balanced, and split once and for all."""

import gzip
import hashlib
from pathlib import Path

import pytest
import torch

from nnfast.cli._tasks import FASHION_MNIST, fashion_mnist, read_idx

SHA256 = {
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}


@pytest.fixture(scope="module")
def split():
    return fashion_mnist()


@pytest.mark.parametrize("name", SHA256)
def test_files_are_the_original_ones(name):
    assert hashlib.sha256((FASHION_MNIST / name).read_bytes()).hexdigest() == SHA256[name]


def test_licence_names_its_source():
    text = (FASHION_MNIST / "LICENSE").read_text()
    for words in ("MIT", "2017 Zalando SE", "github.com/zalandoresearch/fashion-mnist", "arXiv:1708.07747"):
        assert words in text


def test_nothing_else_is_shipped():
    assert sorted(path.name for path in FASHION_MNIST.iterdir()) == ["LICENSE", *sorted(SHA256)]


def test_split_is_balanced_and_disjoint(split):
    train, held_out = split
    assert train.inputs.shape == (8000, 1, 28, 28)
    assert held_out.inputs.shape == (2000, 1, 28, 28)
    assert train.targets.bincount().tolist() == [800] * 10
    assert held_out.targets.bincount().tolist() == [200] * 10
    digests = [
        {hashlib.sha256(image.numpy().tobytes()).digest() for image in part.inputs}
        for part in (train, held_out)
    ]
    assert not digests[0] & digests[1]
    assert sum(map(len, digests)) == 10_000  # no image comes twice


def test_split_is_always_the_same(split):
    torch.manual_seed(123)
    for once, again in zip(split, fashion_mnist(), strict=True):
        assert torch.equal(once.inputs, again.inputs)
        assert torch.equal(once.targets, again.targets)


def test_images_keep_their_labels(split):
    images = read_idx(FASHION_MNIST / "t10k-images-idx3-ubyte.gz")[:, None].float()
    labels = read_idx(FASHION_MNIST / "t10k-labels-idx1-ubyte.gz").long()
    images = (images - images.mean()) / images.std()
    original = {image.numpy().tobytes(): label for image, label in zip(images, labels.tolist(), strict=True)}
    for part in split:
        found = [original[image.numpy().tobytes()] for image in part.inputs]
        assert found == part.targets.tolist()


def test_images_are_normalised(split):
    everything = torch.cat([part.inputs for part in split])
    assert everything.dtype == torch.float32
    assert abs(everything.mean()) < 1e-4
    assert abs(everything.std() - 1) < 1e-4


def test_a_file_that_is_no_idx_says_so(tmp_path: Path):
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"\x89PNG...."))
    with pytest.raises(
        ValueError, match=r"x\.gz: begins with .*PNG.*an IDX file of uint8 begins with 0, 0, 8"
    ):
        read_idx(tmp_path / "x.gz")
