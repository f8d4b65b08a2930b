"""optim: schedules, directions and masks against numbers by hand or plain optax, both layouts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.tiny import convnet_config, tiny_config
from vit_scale.config import base
from vit_scale.errors import UserError
from vit_scale.models.build import build
from vit_scale.models.lora import adapted
from vit_scale.models.parameters import CONVOLUTIONS, is_statistic, named, stack, unstack
from vit_scale.training.optimizer import (
    check,
    check_trained,
    make_optimizer,
    update_ema,
)
from vit_scale.training.schedules import make_schedule

DEPTH = 2
LAYOUTS = ("stacked", "unrolled")


def optim_block(**fields):
    cfg = base().optim
    cfg.update({"clip": 0.0, "schedule": "constant", **fields})
    return cfg


def random_like(tree, seed):
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(random.standard_normal(x.shape), jnp.float32), tree)


def make_params(pool):
    """Random values under the real model's names, stacked."""
    cfg = base().model
    cfg.update({"variant": "Ti/4", "width": 8, "depth": DEPTH, "heads": 2, "mlp": 16})
    cfg.update({"classes": 5, "pool": pool})
    return random_like(build(cfg, (8, 8)).abstract_params, 0)


@pytest.fixture(scope="module")
def params():
    return make_params("cls")


@pytest.fixture(scope="module")
def pooled():
    """With attention pooling, so with every kind of parameter but [CLS]."""
    return make_params("map")


def in_layout(tree, layout):
    return tree if layout == "stacked" else unstack(tree)


def updates_of(cfg, params, grads, steps=1):
    """The updates of the last of `steps` equal gradients, with fixed parameters."""
    optimizer, _ = make_optimizer(cfg, 100, params)
    state = optimizer.init(params)
    for _ in range(steps):  # not jitted: compiling each optimizer whole would take longer
        updates, state = optimizer.update(grads, state, params)
    return updates


def assert_equal_trees(left, right, rtol=1e-5, atol=1e-6):
    left, right = named(left), named(right)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol, atol, err_msg=name)


# The learning rate

SCHEDULE_VALUES = [
    ({"schedule": "constant", "warmup": 10}, {0: 0, 1: 0.2, 5: 1, 10: 2, 11: 2, 100: 2}),
    ({"schedule": "constant"}, {0: 2, 99: 2}),
    ({"schedule": "cosine", "end": 0.1}, {0: 2, 50: 1.1, 25: 0.2 + 1.8 * 0.8535534, 100: 0.2}),
    ({"schedule": "cosine", "warmup": 20}, {0: 0, 10: 1, 20: 2, 60: 1, 100: 0, 120: 0}),
    ({"schedule": "linear", "warmup": 20, "end": 0.5}, {10: 1, 20: 2, 60: 1.5, 100: 1}),
    (
        {"schedule": "rsqrt", "timescale": 8, "warmup": 4},
        {2: 1, 4: 2, 12: 2**0.5, 28: 1, 100: 0.554700},
    ),
    (
        {"schedule": "rsqrt", "timescale": 8, "cooldown": 20},
        {24: 1, 80: 0.603023, 90: 0.285714, 100: 0},
    ),
    ({"schedule": "constant", "cooldown": 40}, {0: 2, 60: 2, 70: 1.5, 90: 0.5, 100: 0, 120: 0}),
    (
        {"schedule": "constant", "cooldown": 40, "cooldown_shape": "sqrt"},
        {60: 2, 70: 1, 90: 2 - 3**0.5, 100: 0},
    ),
    ({"schedule": "cosine", "cooldown": 10}, {50: 1, 90: 0.0489435, 95: 0.5 * 0.0123117, 100: 0}),
    ({"schedule": "piecewise"}, {0: 2, 59: 2, 60: 0.2, 84: 0.2, 85: 0.02, 99: 0.02}),
    (
        {"schedule": "piecewise", "warmup": 10, "milestones": (0.5,), "factor": 0.5},
        {5: 1, 10: 2, 49: 2, 50: 1, 100: 1},
    ),
]


@pytest.mark.parametrize(("fields", "values"), SCHEDULE_VALUES)
def test_schedule_values(fields, values):
    schedule = make_schedule(optim_block(lr=2.0, **fields), 100)
    for step, expected in values.items():
        assert schedule(step) == pytest.approx(expected, rel=1e-5, abs=1e-7), step
        assert jax.jit(schedule)(jnp.int32(step)) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_update_number_n_uses_the_schedule_at_n(params):
    """SGD without momentum: the update is -lr * gradient, so it shows the learning rate."""
    cfg = optim_block(name="sgd", b1=0.0, lr=0.5, schedule="cosine", warmup=3)
    optimizer, schedule = make_optimizer(cfg, 8, params)
    state, step, grads = optimizer.init(params), jax.jit(optimizer.update), random_like(params, 1)
    for n in range(8):
        updates, state = step(grads, state, params)
        np.testing.assert_allclose(updates["cls"], -schedule(n) * grads["cls"], rtol=1e-6)
    assert schedule(0) == 0 and schedule(3) == 0.5


# The optimizers


def kernels_only(tree):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", tree)


def test_adamw_and_lion_equal_optax(params):
    grads = random_like(params, 1)
    for name, reference in (("adamw", optax.adamw), ("lion", optax.lion)):
        cfg = optim_block(name=name, lr=0.1, b1=0.8, b2=0.9, weight_decay=0.3)
        expected = reference(0.1, b1=0.8, b2=0.9, weight_decay=0.3, mask=kernels_only)
        state = expected.init(params)
        for _ in range(3):
            wanted, state = expected.update(grads, state, params)
        assert_equal_trees(updates_of(cfg, params, grads, steps=3), wanted)


def test_sgd_by_hand(params):
    """Momentum sums the gradients; weight decay stays out of it and is times lr."""
    grads = random_like(params, 1)
    cfg = optim_block(name="sgd", lr=0.1, b1=0.9, weight_decay=0.3)
    updates = updates_of(cfg, params, grads, steps=3)
    momentum = 1 + 0.9 + 0.81
    kernel = -0.1 * (momentum * grads["head"]["kernel"] + 0.3 * params["head"]["kernel"])
    np.testing.assert_allclose(updates["head"]["kernel"], kernel, rtol=1e-5)
    bias = -0.1 * momentum * grads["head"]["bias"]
    np.testing.assert_allclose(updates["head"]["bias"], bias, rtol=1e-5)


def matrices(tree):
    """{name: every hidden matrix on its own, (in, out)} of stacked blocks and the pooling."""
    flat = {}
    for name, leaf in named(tree).items():
        per_layer = leaf if name.startswith("blocks/") else leaf[None]
        if name.endswith(tuple(f"{part}/kernel" for part in ("query", "key", "value", "out"))):
            flat[name] = np.asarray(per_layer).reshape(-1, 8, 8)
        elif name.endswith(("up/kernel", "down/kernel")):
            flat[name] = np.asarray(per_layer)
    return flat


@pytest.fixture(scope="module")
def muon_updates(pooled):
    """At lr 0.1 and b1 = 0.8, b2 = 0.9, of the gradients random_like(pooled, 1)."""
    cfg = optim_block(name="muon", lr=0.1, b1=0.8, b2=0.9)
    return updates_of(cfg, pooled, random_like(pooled, 1))


def test_muon_orthogonalises_each_hidden_matrix(muon_updates):
    """Newton-Schulz brings singular values near 1; 0.2 sqrt(max(in, out)) makes that Adam-sized."""
    updates = matrices(muon_updates)
    assert len(updates) == 6 + 6
    assert len(updates["blocks/attention/key/kernel"]) == DEPTH
    assert len(updates["pool/value/kernel"]) == 1
    for name, stacked in updates.items():
        for matrix in stacked:
            values = np.linalg.svd(matrix, compute_uv=False) / (0.02 * max(matrix.shape) ** 0.5)
            # The published coefficients leave them between 0.7 and 1.2, or so.
            assert values.min() > 0.3 and values.max() < 1.3, (name, values)


def test_muon_follows_the_gradient_of_each_matrix(pooled, muon_updates):
    """U V^T of the gradient's own decomposition: no mixing of layers or of q, k, v, right sign."""
    grads = random_like(pooled, 1)
    updates = matrices(muon_updates)
    for name, stacked in matrices(grads).items():
        for matrix, update in zip(stacked, updates[name], strict=True):
            left, _, right = np.linalg.svd(matrix, full_matrices=False)
            cosine = (-update * (left @ right)).sum() / np.linalg.norm(update)
            assert cosine / np.linalg.norm(left @ right) > 0.95, name


def test_muon_gives_the_rest_to_adam(pooled, muon_updates):
    grads = random_like(pooled, 1)
    adam = optax.nadam(0.1, b1=0.8, b2=0.9)
    expected = named(adam.update(grads, adam.init(pooled))[0])
    updates = named(muon_updates)
    rest = updates.keys() - matrices(pooled).keys()
    assert {"embed/kernel", "head/kernel", "posemb", "pool/probe", "blocks/mlp/up/bias"} <= rest
    for name in rest:
        np.testing.assert_allclose(updates[name], expected[name], rtol=1e-4, err_msg=name)


def of_convnet(variant: str):
    convnet = "+" not in variant
    depth = ("model.depth=10",) if variant == "resnet18" else ()
    cfg = convnet_config(variant, *depth) if convnet else tiny_config(f"model.variant={variant}")
    return build(cfg.model, (64, 64) if "R26" in variant else (16, 16)).abstract_params


@pytest.mark.parametrize(
    ("variant", "count"),
    [
        *(("C+Ti/8", 3), ("CCT+Ti/8", 3), ("CNN+Ti/8", 6), ("R20+Ti/8", 19), ("R+Ti/8", 1)),
        *(("R26+Ti/32", 29), ("cnn", 6), ("resnet20", 7), ("resnet18", 12)),
    ],
)
def test_every_convolution_is_a_matrix_for_muon(variant, count):
    """The first and the residual ones; not the patch embedding, dense layers and the head."""
    names = [name for name in named(of_convnet(variant)) if name.endswith("kernel")]
    chosen = {name for name in names if any(re.search(p, name) for p in CONVOLUTIONS)}
    outside = ("head/kernel", "embed/kernel", "blocks/", "dense/")
    assert chosen == {name for name in names if not name.startswith(outside)}
    assert len(chosen) == count


@pytest.mark.parametrize("variant", ["CNN+Ti/8", "cnn"])
def test_muon_orthogonalises_each_convolution(variant):
    """A kernel is a matrix of all that an output pixel sees times the output channels."""
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), of_convnet(variant))
    grads = random_like(params, 1)
    block = optim_block(name="muon", lr=0.1, b1=0.8, b2=0.9, muon_convolutions=True)
    updates, raw = named(updates_of(block, params, grads)), named(grads)
    adam = optax.nadam(0.1, b1=0.8, b2=0.9)
    expected = named(adam.update(grads, adam.init(params))[0])
    for name, update in updates.items():
        if not any(re.search(p, name) for p in CONVOLUTIONS):
            if not name.startswith("blocks/") and not is_statistic(name):
                np.testing.assert_allclose(update, expected[name], rtol=1e-4, err_msg=name)
            continue
        matrix, grad = (np.asarray(x).reshape(-1, x.shape[-1]) for x in (update, raw[name]))
        values = np.linalg.svd(matrix, compute_uv=False) / (0.02 * max(matrix.shape) ** 0.5)
        assert values.min() > 0.3 and values.max() < 1.3, (name, values)
        left, _, right = np.linalg.svd(grad, full_matrices=False)
        cosine = (-matrix * (left @ right)).sum() / np.linalg.norm(matrix)
        assert cosine / np.linalg.norm(left @ right) > 0.95, name


def test_lamb_equals_optax_where_weights_decay(params):
    """And is Adam elsewhere: for biases, norms and tokens."""
    params = unstack(params)  # optax has one ratio for a stacked array
    cfg = optim_block(name="lamb", lr=0.1, weight_decay=0.3, clip=0.0)
    grads = random_like(params, 1)
    ours = named(updates_of(cfg, params, grads, steps=2))
    lamb, adam = optax.lamb(0.1, weight_decay=0.3), optax.adam(0.1, eps=1e-6)
    expected = {}
    for name, optimizer in (("lamb", lamb), ("adam", adam)):
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(grads, state, params)
        expected[name] = named(updates)
    for name, update in ours.items():
        wanted = expected["lamb" if name.endswith("kernel") else "adam"][name]
        np.testing.assert_allclose(update, wanted, rtol=2e-5, atol=1e-7, err_msg=name)
        assert not np.allclose(expected["lamb"][name], expected["adam"][name])


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon", "lamb"])
def test_stacked_and_unrolled_blocks_are_trained_alike(params, name):
    cfg = optim_block(name=name, lr=0.1, weight_decay=0.3, layer_decay=0.5, clip=0.1)
    grads = random_like(params, 1)
    stacked = updates_of(cfg, params, grads, steps=2)
    unrolled = updates_of(cfg, unstack(params), unstack(grads), steps=2)
    assert_equal_trees(stacked, stack(unrolled))


# By name


@pytest.mark.parametrize(
    ("name", "layout"), [("adamw", "stacked"), ("adamw", "unrolled"), ("muon", "stacked")]
)
def test_weight_decay_is_for_kernels_only(params, name, layout):
    params = in_layout(params, layout)
    zeros = jax.tree.map(jnp.zeros_like, params)
    cfg = optim_block(name=name, lr=0.1, weight_decay=0.3)
    for name, update in named(updates_of(cfg, params, zeros)).items():
        expected = -0.03 * named(params)[name] if name.endswith("/kernel") else 0.0
        np.testing.assert_allclose(update, expected, rtol=1e-5, atol=1e-9, err_msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_decay_by_depth(params, pooled, layout):
    """BEiT with 2 blocks: embedding 1/8, blocks 1/4 and 1/2, what follows 1."""
    params = in_layout({**params, "pool": pooled["pool"]}, layout)
    ones = jax.tree.map(jnp.ones_like, params)
    cfg = optim_block(name="sgd", b1=0.0, lr=1.0, layer_decay=0.5)
    updates = updates_of(cfg, params, ones)
    for name in ("embed", "posemb", "cls"):
        assert all((leaf == -1 / 8).all() for leaf in jax.tree.leaves(updates[name]))
    for name in ("norm", "pool", "head"):
        assert all((leaf == -1).all() for leaf in jax.tree.leaves(updates[name]))
    for i, block in unstack(updates)["blocks"].items():
        assert all((leaf == -(2.0 ** (int(i) - DEPTH))).all() for leaf in jax.tree.leaves(block))


def test_layer_decay_scales_weight_decay_too(params):
    """It is a learning rate per layer (BEiT), so it comes after the weight decay."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    cfg = optim_block(name="adamw", lr=1.0, weight_decay=0.5, layer_decay=0.5)
    updates = updates_of(cfg, params, zeros)
    np.testing.assert_allclose(
        updates["embed"]["kernel"], -0.5 / 8 * params["embed"]["kernel"], rtol=1e-6
    )


# Clipping


def test_clip_comes_before_the_optimizer_and_can_be_off(params):
    grads = random_like(params, 1)
    norm = float(np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(grads))))
    fields = {"name": "sgd", "b1": 0.0, "lr": 1.0, "weight_decay": 0.3}
    kernel, grad = params["head"]["kernel"], grads["head"]["kernel"]
    for clip, factor in ((0.5, 0.5 / norm), (2 * norm, 1.0), (0.0, 1.0)):
        updates = updates_of(optim_block(clip=clip, **fields), params, grads)
        expected = -factor * grad - 0.3 * kernel
        np.testing.assert_allclose(updates["head"]["kernel"], expected, rtol=1e-5, atol=1e-6)


def test_clip_ignores_frozen_parameters(params):
    """Or a frozen leaf with a huge gradient would shrink the update of the head to nothing."""
    grads = random_like(params, 1)
    grads = {**jax.tree.map(lambda leaf: 1e6 * leaf, grads), "head": grads["head"]}
    cfg = optim_block(name="sgd", b1=0.0, lr=1.0, clip=1.0, train="head")
    head = updates_of(cfg, params, grads)["head"]
    assert np.sqrt(sum((leaf**2).sum() for leaf in head.values())) == pytest.approx(1.0, rel=1e-5)


# Freezing


@pytest.mark.parametrize(
    ("fields", "layout", "is_frozen"),
    [
        ({"train": "head"}, "stacked", lambda name: not name.startswith("head/")),
        (
            {"train": r"bias$|^head/", "freeze": ("^norm/",)},  # BitFit, but for one bias
            "stacked",
            lambda n: n == "norm/bias" or not (n.endswith("bias") or n.startswith("head/")),
        ),
        ({"train": r"^blocks/1/"}, "unrolled", lambda name: not name.startswith("blocks/1/")),
        ({"freeze": ("^embed", "posemb$")}, "stacked", lambda n: n[:5] == "embed" or n == "posemb"),
        ({"freeze": ("^blocks/0/",)}, "unrolled", lambda name: name.startswith("blocks/0/")),
        (
            {"name": "muon", "freeze": ("bias",), "train": "head"},
            "stacked",
            lambda name: name != "head/kernel",
        ),
    ],
)
def test_frozen_parameters_get_no_update_and_keep_no_state(params, fields, layout, is_frozen):
    params = in_layout(params, layout)
    cfg = optim_block(weight_decay=0.1, layer_decay=0.5, **fields)
    optimizer, _ = make_optimizer(cfg, 100, params)
    state = optimizer.init(params)
    updates, state = optimizer.update(random_like(params, 1), state, params)
    after = named(optax.apply_updates(params, updates))
    for name, leaf in named(params).items():
        in_state = [path for path in named(state) if path.endswith(f"/{name}")]
        assert bool(in_state) != is_frozen(name), name
        assert np.array_equal(leaf, after[name]) == is_frozen(name), name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "muon", "lamb"])
def test_adapters_are_decayed_like_kernels_and_alone_have_state(optimizer):
    """Where a gradient of zero leaves weight decay as the whole update."""
    cfg = base()
    cfg.update({"lora": {"rank": 2, "kernels": "kernel$"}})
    cfg.model.update({"variant": "Ti/4", "width": 8, "depth": DEPTH, "heads": 2, "mlp": 16})
    params = random_like(adapted(build(cfg.model, (8, 8)), cfg.lora).abstract_params, 0)
    block = optim_block(name=optimizer, lr=0.1, weight_decay=0.5, layer_decay=0.5)
    optimizer, _ = make_optimizer(block, 100, params)
    state = optimizer.init(params)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
    rates = np.array([0.25, 0.5])  # of the layers
    for name, update in named(updates).items():
        kept = [path for path in named(state) if path.endswith(f"/{name}")]
        assert bool(kept) == ("lora" in name or name.startswith("head/")), name
        if "lora" in name and block.name != "lamb":  # which scales it to the parameter's norm
            leaf = named(params)[name]
            expected = -0.1 * 0.5 * leaf * rates.reshape(-1, *[1] * (leaf.ndim - 1))
            np.testing.assert_allclose(update, expected, rtol=1e-5)
        assert np.any(update) == ("lora" in name or name == "head/kernel"), name


FREEZE_REFUSALS = [
    ({"freeze": ("poseb",)}, r"optim.freeze='poseb' matches no parameter; did you mean posemb"),
    ({"freeze": ("embed", "^blocks/0/")}, r"optim.freeze='\^blocks/0/' matches no parameter"),
    ({"freeze": ("(",)}, r"optim.freeze='\(' is not a regular expression: "),
    ({"train": "haed"}, "optim.train='haed' matches no parameter; did you mean head"),
    ({"train": "bais$"}, r"optim.train='bais\$' matches no parameter; "),
    ({"train": "("}, r"optim.train='\(' is not a regular expression: "),
    (
        {"train": "bias$", "freeze": ("bias",)},
        r"freeze=\('bias',\) and train='bias\$' leave nothing",
    ),
    ({"freeze": ("",)}, r"leave nothing to train"),
    ({"freeze": ("head",), "train": "head"}, r"freeze=\('head',\) and train='head' leave nothing"),
]


@pytest.mark.parametrize(("fields", "message"), FREEZE_REFUSALS)
def test_freezing_refuses(params, fields, message):
    with pytest.raises(UserError, match=message):
        check_trained(optim_block(**fields), params)


# Refusals

REFUSALS = [
    ({"name": "adamv"}, "optim.name='adamv' is unknown; did you mean adamw"),
    ({"schedule": "cosin"}, "optim.schedule='cosin' is unknown; did you mean cosine"),
    ({"lr": -1.0}, "optim.lr=-1.0 must be at least 0 and finite"),
    ({"lr": float("nan")}, "optim.lr=nan must be at least 0 and finite"),
    ({"b1": 1.0}, "optim.b1=1.0 must be at least 0 and below 1"),
    ({"b2": -0.1}, "optim.b2=-0.1 must be at least 0 and below 1"),
    ({"ema": 1.0}, "optim.ema=1.0 must be at least 0 and below 1"),
    ({"clip": -1.0}, "optim.clip=-1.0"),
    ({"weight_decay": -0.1}, "optim.weight_decay=-0.1"),
    ({"accumulate": 0}, "optim.accumulate=0 must be at least 1"),
    ({"timescale": 0}, "optim.timescale=0 must be at least 1"),
    ({"layer_decay": 0.0}, "optim.layer_decay=0.0 must be above 0 and at most 1"),
    ({"layer_decay": 1.1}, "optim.layer_decay=1.1 must be above 0 and at most 1"),
    ({"warmup": -1}, "optim.warmup=-1 must be at least 0"),
    ({"warmup": 100}, "optim.warmup=100 must be fewer than the run's steps=100"),
    ({"cooldown": -10}, "optim.cooldown=-10 must be at least 0"),
    ({"cooldown_shape": "sqr"}, "optim.cooldown_shape='sqr' is unknown; did you mean sqrt"),
    (
        {"schedule": "rsqrt", "warmup": 60, "cooldown": 41},
        r"optim.warmup=60 \+ cooldown=41 = 101 exceed steps=100",
    ),
    (
        {"schedule": "piecewise", "milestones": (0.8, 0.6)},
        r"optim.milestones=\(0.8, 0.6\) of steps=100 are steps \[80, 60\]",
    ),
    ({"schedule": "piecewise", "milestones": (0.5, 1.0)}, r"are steps \[50, 100\]"),
    ({"schedule": "piecewise", "milestones": (0.1,), "warmup": 20}, "end of warm-up, 20, and 100"),
    ({"schedule": "piecewise", "milestones": (0.501, 0.502)}, r"are steps \[50, 50\]"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSALS)
def test_refuses(fields, message):
    with pytest.raises(UserError, match=message) as caught:
        check(optim_block(**fields), 100)
    assert "\n" not in str(caught.value)


def test_edge_values_are_accepted(params):
    def schedule(steps, **fields):
        check(optim_block(**fields), steps)
        return make_optimizer(optim_block(**fields), steps, params)[1]

    assert float(schedule(100, warmup=99, lr=0.99)(98)) == pytest.approx(0.98)
    rsqrt = schedule(100, schedule="rsqrt", warmup=60, cooldown=40, lr=1.0)
    assert [float(rsqrt(n)) for n in (60, 100)] == pytest.approx([1.0, 0.0], abs=1e-6)
    assert float(schedule(1, layer_decay=1.0, b1=0.0, lr=0.0)(0)) == 0.0


# EMA


def test_ema_by_hand():
    ema, params = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, 2.0])}
    for expected in (1.2, 1.38, 1.542):
        ema = update_ema(ema, params, 0.9)
        np.testing.assert_allclose(ema["a"], [expected, 2.0], rtol=1e-6)
    assert ema["a"][1] == 2.0
