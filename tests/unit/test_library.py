"""`megapromoe.nn` as a library: our layer on its own and in models of other people, on one device."""

import copy
import io
from contextlib import contextmanager
from dataclasses import fields
from typing import get_type_hints

import pytest
import torch
from support.foreign_network import NUM_CLASSES, D, E, Network, S, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from megapromoe.config.layer_options import LAYER_FIELDS, LayerOptions
from megapromoe.config.model_options import ModelConfig
from megapromoe.nn import ROUTERS, DiT, LayerError, MoE, Router, RoutingCache, auxiliary_loss, auxiliary_losses

CLASSES = {"num_classes": NUM_CLASSES, "superclasses": "contiguous"}


def layer(router: str = "promoe", **options) -> MoE:
    torch.manual_seed(0)
    return MoE(hidden_size=D, num_experts=E, router=router, **CLASSES, **options)


LABELS = torch.tensor([0, 5, NUM_CLASSES])


def loss_of(moe: MoE, x: torch.Tensor, num_conditional: int = 2) -> torch.Tensor:
    y, auxiliary = moe(x, num_conditional=num_conditional, y=LABELS)
    return y.float().square().mean() + auxiliary_loss([auxiliary])


@contextmanager
def poisoned_memory():
    """Within it, new uninitialised tensors have NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# ---- initial values


def test_poisoned_memory_is_seen():
    with poisoned_memory():
        assert torch.empty(3).isnan().all()


@pytest.mark.parametrize("router", ROUTERS)
def test_a_layer_initialises_itself(router):
    with poisoned_memory():
        moe = layer(router).train()
        loss_of(moe, x := tokens().requires_grad_()).backward()
    assert all(t.isfinite().all() for t in (*moe.state_dict().values(), x.grad))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters())
    weight = moe.experts.fc1.weight.detach()
    assert (
        float(weight.abs().max()) == pytest.approx((6 / (D + 2 * D)) ** 0.5, rel=0.02)
        and not moe.experts.fc1.bias.any()
    )
    assert not torch.equal(weight[0], weight[1])


@pytest.mark.parametrize("router", ROUTERS)
def test_a_layer_of_the_meta_device_can_be_initialised(router):
    with torch.device("meta"):
        moe = MoE(hidden_size=D, num_experts=E, router=router, **CLASSES)
    assert all(t.is_meta for t in moe.state_dict().values())
    with poisoned_memory():
        moe.to_empty(device="cpu")
    torch.manual_seed(0)
    moe.reset_parameters()
    assert moe.state_dict().keys() == layer(router).state_dict().keys()
    y, auxiliary = moe.train()(tokens(), 2, LABELS)
    assert y.isfinite().all() and auxiliary_loss([auxiliary]).isfinite()


def test_a_model_initialises_itself():
    config = ModelConfig(hidden_size=32, depth=2, heads=2, input_size=4, num_experts=E, num_classes=NUM_CLASSES)
    with torch.device("meta"):
        on_meta = DiT(config)
    with poisoned_memory():
        on_meta.to_empty(device="cpu")
        on_meta.reset_parameters()
        model = DiT(config)
    for made in (model, on_meta):
        prediction, auxiliary = made(torch.randn(3, 4, 4, 4), torch.ones(3), LABELS, 2)
        assert not prediction.any() and auxiliary.total().isfinite(), "DiT starts with a prediction of zero"
        assert made.blocks[1].mlp.shared.fc1.weight.any()
    assert torch.equal(model.pos_embed, on_meta.pos_embed)


# ---- options


def test_the_options_are_those_of_a_model():
    known = {f.name: f.type for f in fields(ModelConfig)}
    assert all(known[name] is kind for name, kind in get_type_hints(LayerOptions).items())
    used = set(LAYER_FIELDS) | {"router"}
    of_the_backbone = {"depth", "heads", "patch_size", "input_size", "in_channels", "mlp_ratio", "qk_norm"}
    of_the_backbone |= {"norm", "positions", "modulation", "condition", "text_width", "text_tokens", "text_ffn"}
    of_the_backbone |= {"learn_sigma", "time_input", "time_frequency_shift", "mlp_norm_eps", "moe_every"}
    of_the_backbone |= {"position_scale"}
    of_the_backbone |= {"router_input", "align_block", "align_width", "align_hidden", "align_weight"}
    assert used | of_the_backbone == set(known) and not used & of_the_backbone


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 5}, "top_k = 5: must be at most num_experts = 4"),
        (
            {"top_k": 0, "score_function": "sigmod"},
            r"2 problems in the options of MoE:\n.*top_k = 0: must lie in .*\n.*sigmoid",
        ),
        ({"top": 1}, "'top' is not a key of MoE; did you mean top_k"),
        ({"expert_width": 1.5}, "expert_width = 1.5: must be a whole number"),
        ({"router": "promo"}, "router = 'promo': must be one of .*; did you mean promoe"),
        ({"router": "dense"}, "router = 'dense': has no experts"),
        ({"router": "conditional"}, "router = 'conditional': has no routed experts"),
        ({"router": "ec", "capacity_factor": 1.0}, "capacity_factor = 1.0: must be 0 with router = 'ec'"),
        ({"router": "tc", "num_shared_experts": 2}, "num_shared_experts = 2: must be 1 with router = 'tc'"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(LayerError, match=message):
        MoE(hidden_size=D, num_experts=E, **options)


# ---- a call


@pytest.mark.parametrize("num_conditional", [-1, 4])
def test_a_number_of_conditional_images_that_does_not_fit_is_refused(num_conditional):
    with pytest.raises(ValueError, match=f"num_conditional = {num_conditional}: must be between 0 and 3"):
        layer()(tokens(), num_conditional)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"x has the shape \(3, 9, 8\): must be \(images, tokens, 16\)"):
        layer()(tokens()[..., :8])
    with pytest.raises(ValueError, match=r"y has the shape \(2,\): must be \(3,\)"):
        layer()(tokens(), 2, LABELS[:2])


def test_all_images_are_conditional_by_default_and_one_image_needs_no_batch():
    moe, x = layer(), tokens()
    y, auxiliary = moe(x)
    assert torch.equal(y, moe(x, 3)[0]) and auxiliary.load_E.sum() == 3 * S
    torch.testing.assert_close(moe(x[1])[0], y[1])
    assert not torch.equal(moe(x, 1)[0], y), "the unconditional expert is another"


@pytest.mark.parametrize("router", ROUTERS)
def test_a_call_leaves_nothing_on_the_module(router):
    """Except for the buffers with which a router trains its state: thresholds and centroids."""
    moe = layer(router, capacity_factor=0.5 if router in ("promoe", "tc") else 0.0).train()

    def attributes():
        values = [(module, {k: v for k, v in vars(module).items() if k != "_buffers"}) for module in moe.modules()]
        return {id(module): {k: (dict(v) if isinstance(v, dict) else v) for k, v in d.items()} for module, d in values}

    before, dispatcher = attributes(), dict(vars(moe.dispatcher))
    auxiliary = moe(tokens(), 2, LABELS)[1]
    assert attributes() == before and vars(moe.dispatcher) == dispatcher
    assert (auxiliary.dropped is not None) == (moe.config.capacity_factor > 0)


def test_losses_of_different_layers():
    """Layers of other sizes, settings and routers: each loss is that of the layer alone."""
    layers = [
        layer(),
        layer(rcl_temperature=0.2),
        layer("promoe_ec"),
        layer("kmeans"),
        layer(balance_weight=0.1),
        MoE(hidden_size=D, num_experts=3),
    ]
    with torch.random.fork_rng():
        auxiliaries = [moe.train()(tokens(), 2)[1] for moe in layers]
    losses = auxiliary_losses(auxiliaries)
    assert list(losses) == ["rcl", "balance"] and losses["rcl"].shape == (5,) and losses["balance"].shape == (1,)
    alone = [auxiliary_losses([a])["rcl"] for a in auxiliaries if a.losses.keys() | a.joint_losses.keys()]
    torch.testing.assert_close(losses["rcl"], torch.cat(alone))
    total = sum(float(loss.detach().sum()) for loss in losses.values())
    assert float(auxiliary_loss(auxiliaries).detach()) == pytest.approx(total, rel=1e-6)
    assert auxiliary_loss([layers[0].eval()(tokens(), 2)[1]]) == 0 == auxiliary_loss([])


# ---- what torch's own layers can do


@pytest.mark.parametrize(
    "router, top_k",
    [*((router, 1) for router in ROUTERS), *((r, 2) for r in ROUTERS if r not in ("classification", "kmeans"))],
)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_gradients_in_float64(activation, router, top_k):
    """Of tokens and of all parameters, of output and losses."""
    torch.manual_seed(3)
    # DiffMoE's predictor and the mixture learn from detached tokens: without their losses all gradients are those of
    # the function.
    options = {
        "activation": activation,
        "top_k": top_k,
        "expert_width": 8,
        "num_classes": 3,
        "capacity_predictor_weight": 0.0,
        "mixture_weight": 0.0,
    }
    moe = MoE(hidden_size=8, num_experts=3, router=router, **options).double().train()
    for p in moe.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(3, 4, 8, dtype=torch.float64, requires_grad=True)
    trained = [(buffer, buffer.clone()) for buffer in moe.buffers()]

    def outputs(x, *parameters):
        for buffer, start in trained:  # routers train them in each call
            buffer.copy_(start)
        y, auxiliary = moe(x, 2, torch.tensor([0, 1, 2]))
        return y, auxiliary_loss([auxiliary])

    assert torch.autograd.gradcheck(outputs, (x, *moe.parameters()), fast_mode=True)


@pytest.mark.parametrize("router, activation", [*((router, "gelu") for router in ROUTERS), ("promoe", "swiglu")])
def test_autocast(router, activation):
    """Experts compute in bfloat16, the router as without autocast; gradients have the dtype of their parameters."""
    moe, x = layer(router, activation=activation).train(), tokens()
    exact, exact_auxiliary = copy.deepcopy(moe)(x, 2, LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, auxiliary = moe(x, num_conditional=2, y=LABELS)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), exact, rtol=0.03, atol=0.03)
    assert torch.equal(auxiliary.load_E, exact_auxiliary.load_E)
    assert torch.equal(auxiliary.mean_weight, exact_auxiliary.mean_weight)
    assert torch.equal(auxiliary_loss([auxiliary]), auxiliary_loss([exact_auxiliary]))
    (y.float().square().mean() + auxiliary_loss([auxiliary])).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in moe.parameters())


@pytest.mark.parametrize("router, activation", [*((router, "gelu") for router in ROUTERS), ("promoe", "swiglu")])
def test_bfloat16(router, activation):
    """A layer with all its tensors in bfloat16; the router computes in float32."""
    moe, x = layer(router, activation=activation).train(), tokens()
    exact, exact_auxiliary = copy.deepcopy(moe)(x, 2, LABELS)
    moe, x = moe.bfloat16(), x.bfloat16().requires_grad_()
    assert all(p.dtype == torch.bfloat16 for p in moe.parameters())
    assert all(b.dtype == torch.float32 for b in moe.buffers() if b.is_floating_point()), "state keeps its precision"
    y, auxiliary = moe(x, 2, LABELS)
    assert y.dtype == torch.bfloat16 and auxiliary.mean_weight.dtype == torch.float32
    assert (y.float() - exact).norm() < 0.1 * exact.norm()
    loss = auxiliary_loss([auxiliary])
    torch.testing.assert_close(loss, auxiliary_loss([exact_auxiliary]), rtol=0.05, atol=0.01)
    (y.float().square().mean() + loss).backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in moe.parameters())


def test_a_model_under_autocast():
    config = ModelConfig(hidden_size=32, depth=2, heads=2, input_size=4, num_experts=E, qk_norm="layer")
    model = DiT(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    arguments = torch.randn(3, 4, 4, 4), torch.ones(3), torch.tensor([1, 2, 1000]), 2
    exact, _ = model(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction, auxiliary = model(*arguments)
    assert (prediction.float() - exact).norm() < 0.05 * exact.norm()
    (prediction.float().square().mean() + auxiliary.total()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("router", ROUTERS)
def test_copies_and_states(router):
    moe, x = layer(router), tokens()
    loss_of(moe.train(), x).backward()  # trains the state of the router
    copied, other = copy.deepcopy(moe), MoE(hidden_size=D, num_experts=E, router=router, **CLASSES)
    file = io.BytesIO()
    torch.save(moe.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    expected = moe.eval()(x, 2)[0]
    for made in (copied, other):
        assert torch.equal(made.eval()(x, 2)[0], expected)
    with torch.no_grad():
        copied.experts.fc1.weight.add_(1)
    assert torch.equal(moe(x, 2)[0], expected)


@pytest.mark.parametrize("router", ["promoe", "kmeans", "diffmoe"])
def test_recomputed_activations(router):
    """Results are those without recomputation, and routers train their state once."""
    moe, results = layer(router).train(), []
    for recompute in (False, True):
        trained, x = copy.deepcopy(moe), tokens().requires_grad_()
        if recompute:
            y, auxiliary = checkpoint(trained, x, 2, LABELS, RoutingCache(), use_reentrant=False)
        else:
            y, auxiliary = trained(x, 2, LABELS)
        (y.square().mean() + auxiliary_loss([auxiliary])).backward()
        results.append([y.detach(), x.grad, *(p.grad for p in trained.parameters()), *trained.buffers()])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_whole_module_can_be_pickled():
    """torch.save of the module itself, which some projects do."""
    moe, file = layer(), io.BytesIO()
    torch.save(moe, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(tokens())[0], moe(tokens())[0])


@pytest.mark.full
@pytest.mark.parametrize("router, backend", [("promoe", "aot_eager"), ("ec", "eager")])
def test_compile_of_a_foreign_module(router, backend):
    """One graph; results and gradients are those of the eager module, for other batches too."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = Network(router=router).train()
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    for B, num_conditional in ((3, 2), (4, 4), (3, 0)):
        results = []
        for module in (network, compiled):
            x = tokens(B).requires_grad_()
            network.zero_grad()
            y, auxiliary = module(x, num_conditional)
            (y.square().mean() + auxiliary_loss([auxiliary])).backward()
            results.append([y.detach(), x.grad, *(p.grad.clone() for p in network.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


# ---- a router of one's own


class FirstExperts(Router):
    """Sends every token to expert 0; its parameters have no rules."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(()))


def test_a_router_must_define_its_initial_values_and_forward():
    router = FirstExperts(ModelConfig())
    with pytest.raises(NotImplementedError, match="FirstExperts must define forward"):
        router(tokens())
    with pytest.raises(
        Exception, match=r"FirstExperts\.scale: has no initial value; add 'scale' to FirstExperts\.rules"
    ):
        router.reset_parameters()
