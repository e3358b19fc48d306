"""Which windows are trained on: by cluster in proportion to the divergence, and the furthest of each."""

import torch

from paredown.compress.recovery.choose import chosen, shared


def test_a_budget_goes_where_the_disagreement_is_and_leaves_out_none():
    group = torch.arange(60) % 3  # three kinds of text, far from each other
    features = torch.eye(3)[group] * 10 + 0.1 * torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    divergence = torch.rand(60, generator=torch.Generator().manual_seed(1)) * 0.1 + torch.tensor([1.0, 2.0, 3.0])[group]
    choice = chosen(divergence, features, 3, 12, seed=0)
    for kind, number in enumerate([2, 4, 6]):  # as 1 : 2 : 3
        own = [i for i in range(60) if group[i] == kind]
        furthest = sorted(own, key=lambda i: -divergence[i])[:number]
        assert [i for i in choice.rows if group[i] == kind] == sorted(furthest)
    assert sorted((c["windows"], c["chosen"]) for c in choice.clusters) == [(20, 2), (20, 4), (20, 6)]
    assert choice.chosen_divergence > choice.divergence and choice.told()["rows"] == 12
    assert chosen(divergence, features, 3, 12, seed=0) == choice


def test_a_small_cluster_gives_all_that_it_has_and_the_others_the_rest():
    assert shared(10, [9.0, 0.5, 0.5], [2, 20, 20]) == [2, 4, 4]
    assert shared(10, [1.0, 0.0], [3, 20]) == [3, 7]
    assert shared(9, [1.0, 1.0], [2, 3]) == [2, 3]


def test_a_text_that_repeats_itself_is_chosen_from_too():
    choice = chosen(torch.ones(6), torch.ones(6, 4), 8, 2, seed=0)
    assert len(choice.rows) == 2 and len(choice.clusters) == 1
