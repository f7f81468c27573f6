"""What is counted of a model's routing, against routes that are known."""

import numpy as np
import pytest
import torch
from support.digits_models import TINY, tiny
from support.levels import full

from megapromoe.config.resolve import resolve
from megapromoe.data.datasets import Digits
from megapromoe.data.sources import open_dataset
from megapromoe.routing_analysis.figures import routing_figure, routing_picture
from megapromoe.routing_analysis.observe import Routing, RoutingError, measure_routing, recorded


def routing(rows_LCE):
    rows = np.array(rows_LCE)[None]  # of one noise level
    nothing, visits = np.zeros((rows.shape[1], 1, 1), dtype=int), np.zeros((rows.shape[1], rows.shape[-1] + 1))
    blocks = tuple(range(rows.shape[1]))
    return Routing(blocks, (0.5,), rows, visits, nothing, np.zeros((1, 1, 8, 8)), np.zeros(1, dtype=int))


def test_information_is_that_of_known_tables():
    apart, alike, half = [[8, 0], [0, 8]], [[2, 6], [2, 6]], [[4, 0], [2, 2]]
    got = routing([apart, alike, half]).information_L
    # half: H(expert) - H(expert | class) = H(1/4) - 1/2
    h = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
    np.testing.assert_allclose(got, [1, 0, h - 0.5], atol=1e-12)


def test_a_layer_without_rows_has_zeros():
    numbers = routing([[[0, 0], [0, 0]]]).numbers()
    assert numbers["load"] == [[0, 0]] and numbers["class_information_bits"] == [0] == numbers["load_entropy"]


def test_numbers_of_a_known_table():
    numbers = routing([[[4, 0, 0, 0], [0, 0, 0, 12]]]).numbers()
    assert numbers["load"] == [[0.25, 0.0, 0.0, 0.75]]
    assert numbers["load_max_over_mean"] == [3.0]
    assert numbers["dead_experts"] == [2]
    assert numbers["class_share"] == [[[1, 0, 0, 0], [0, 0, 0, 1]]]
    assert numbers["load_entropy"][0] == pytest.approx(0.8113 / 2, abs=1e-4)


def test_counts_are_those_of_the_routers_themselves():
    """Every token has one expert at each noise level, in batches of any size."""
    model, config = tiny()
    dataset = open_dataset(config)
    routing = measure_routing(model, config, dataset, images=20)
    layers, classes, experts = routing.rows_LCE.shape
    assert (layers, classes, experts) == (1, 10, 4) and routing.blocks == (1,)
    per_class = np.bincount(routing.labels, minlength=10) * config.model.tokens * 3  # top 1, three noise levels
    np.testing.assert_array_equal(routing.rows_LCE[0].sum(1), per_class)
    in_one_batch = measure_routing(model, resolve("digits", overrides=(*TINY, "sample.batch=64")), dataset, images=20)
    np.testing.assert_array_equal(routing.rows_LCE, in_one_batch.rows_LCE)
    np.testing.assert_array_equal(routing.expert_LNS, in_one_batch.expert_LNS)


def test_token_maps_and_classes_follow_the_router():
    """A router that sends class c's tokens to expert c % 4, but each image's first token to expert 3."""
    model, config = tiny()
    seen_labels = []
    model.y_embedder.register_forward_hook(lambda module, arguments, out: seen_labels.append(arguments[0]))
    router = model.blocks[1].mlp.router

    def known(module, arguments, routed):
        expert_BS = (seen_labels[-1] % 4)[:, None].repeat(1, config.model.tokens)
        expert_BS[:, 0] = 3
        return routed._replace(assignment=routed.assignment._replace(expert_R=expert_BS.flatten()))

    router.register_forward_hook(known)
    routing = measure_routing(model, config, Digits(), images=40)
    for number, label in enumerate(routing.labels):
        assert routing.expert_LNS[0, number].tolist() == [3] + [label % 4] * (config.model.tokens - 1)
    share_CE = routing.share_LCE[0]
    for label in range(10):
        expected = np.eye(4)[label % 4] * 15 / 16 + np.eye(4)[3] / 16
        np.testing.assert_allclose(share_CE[label], expected)


@pytest.mark.parametrize("router", ["promoe_ec", *map(full, ("tc", "ec", "diffmoe"))])
def test_every_router_can_be_drawn(router, tmp_path):
    model, config = tiny(f"model.router={router}")
    numbers = routing_picture(model, config, open_dataset(config), tmp_path / "routing.png")
    assert (tmp_path / "routing.png").read_bytes().startswith(b"\x89PNG")
    assert np.sum(numbers["load"]) == pytest.approx(1, abs=1e-3)


def test_expert_choice_leaves_tokens_without_an_expert():
    model, config = tiny("model.router=promoe_ec")
    model.blocks[1].mlp.router.prototypes.data[:] = model.blocks[1].mlp.router.prototypes.data[0]
    routing = measure_routing(model, config, Digits(), images=8)
    # All experts prefer the same int(16 / 4) tokens.
    assert ((routing.expert_LNS[0] >= 0).sum(1) == 4).all()


def test_many_layers_and_experts_fit_a_picture():
    rng = np.random.default_rng(0)
    routing = Routing(
        tuple(range(1, 25, 2)),
        (0.1, 0.5, 0.9),
        rng.integers(0, 50, (3, 12, 30, 24)),
        rng.integers(0, 50, (12, 25)),
        rng.integers(-1, 24, (12, 30, 16)),
        rng.normal(size=(30, 4, 8, 8)),
        np.arange(30),
    )
    figure = routing_figure(routing, tuple(f"class {c}" for c in range(30)), 4)
    heat, maps, load = figure.subfigs
    assert len(heat.axes) == 12 + 1  # and the colour bar
    assert len(maps.axes) == (1 + 4) * 10
    assert len(load.axes[0].patches) == 12 * 24
    assert figure.get_figheight() < 25


@pytest.mark.parametrize(
    "router, reason", [("dense", "dense model has no experts"), ("conditional", "model without a router has no rows")]
)
def test_dense_models_are_refused_in_words(tmp_path, router, reason):
    model, config = tiny(f"model.router={router}")
    with pytest.raises(RoutingError, match=reason):
        routing_picture(model, config, Digits(), tmp_path / "routing.png")
    assert not list(tmp_path.iterdir())


def test_recording_ends_with_its_context():
    model, config = tiny()
    x, t, y = torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    with recorded(model) as records:
        model(x, t, y, 2)
    model(x, t, y, 2)
    assert len(records) == 1
