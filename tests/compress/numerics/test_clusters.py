"""k-means by inner products against Lloyd's rounds on the points themselves."""

import pytest
import torch

from paredown.compress.numerics.clusters import kmeans


def clouds(count, each, spread=0.1, seed=0):
    """Points around `count` centres, shuffled, and the centre of each."""
    draw = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(count, 10, generator=draw).double()
    own = torch.arange(count).repeat(each)[torch.randperm(count * each, generator=draw)]
    return centres[own] + spread * torch.randn(count * each, 10, generator=draw).double(), own


def spread_within(points, labels):
    return sum(float((points[labels == c] - points[labels == c].mean(0)).square().sum()) for c in labels.unique())


def same_partition(labels, own):
    return torch.equal(labels[:, None] == labels, own[:, None] == own)


def test_clouds_that_lie_apart_are_the_clusters():
    points, own = clouds(6, 7)
    assert same_partition(kmeans(points @ points.T, 6), own)


@pytest.mark.parametrize("count", [1, 5, 20, 39, 40])
def test_every_label_is_used_and_no_point_is_nearer_to_another_mean(count):
    points, _ = clouds(8, 5, spread=2.0)
    labels = kmeans(points @ points.T, count)
    assert labels.shape == (40,) and sorted(labels.unique().tolist()) == list(range(count))
    means = torch.stack([points[labels == c].mean(0) for c in range(count)])
    distances = torch.cdist(points, means)
    torch.testing.assert_close(distances.gather(1, labels[:, None])[:, 0], distances.min(1).values)


def test_labels_are_better_than_random_ones_and_those_of_a_seed():
    points, _ = clouds(8, 5, spread=2.0)
    products = points @ points.T
    labels = kmeans(products, 12, seed=3)
    assert torch.equal(labels, kmeans(products, 12, seed=3))
    drawn = torch.arange(40) % 12
    assert spread_within(points, labels) < 0.5 * spread_within(points, drawn)


def test_points_that_coincide_still_fill_every_cluster():
    products = torch.ones(6, 6)
    assert sorted(kmeans(products, 4).unique().tolist()) == [0, 1, 2, 3]
    assert sorted(kmeans(torch.zeros(5, 5), 5).tolist()) == [0, 1, 2, 3, 4]
