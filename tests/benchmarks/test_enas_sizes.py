"""Candidates of the benchmark of sizes: what the search begins with, and how far they differ."""

import pytest
import torch

pytest.importorskip("nni")
import bench_enas_sizes as bench

import smlt_tune as smlt


def flops_and_parameters(sample):
    with torch.device("meta"):
        model = bench.SimplifiedModelSpace.from_model(bench.Headed()).freeze(sample)
        features = smlt.model_features(model.executable_model(), torch.zeros(8, 1, 28, 28))
    return features.flops_per_sample, features.parameters


def test_the_search_begins_with_the_one_that_computes_most_and_sizes_differ_tenfold():
    samples = bench.architectures(bench.CANDIDATES)
    assert samples == bench.architectures(bench.CANDIDATES)
    assert len(samples) == bench.CANDIDATES
    flops, parameters = zip(*map(flops_and_parameters, samples), strict=True)
    assert flops[0] == max(flops)
    assert max(flops) > 10 * min(flops)
    assert max(parameters) > 10 * min(parameters)
    assert parameters[0] < max(parameters)  # what it computes is not what it synchronises


def test_ranks_share_the_mean_of_ties():
    assert bench.ranks([3.0, 1.0, 3.0, 9.0]) == [1.5, 0, 1.5, 3]
