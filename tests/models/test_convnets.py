"""convnets: the published counts, each layer against numpy, statistics as state, and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.numpy_layers import conv, halved, norm, relu
from tests.helpers.tiny import (
    convnet_config,
    random_batch,
    random_images,
    random_params,
    tiny_config,
)
from vit_scale import config
from vit_scale.distributed.mesh import abstract_mesh
from vit_scale.distributed.sharding import partition_spec
from vit_scale.errors import UserError
from vit_scale.models import convnets
from vit_scale.models.build import build
from vit_scale.models.parameters import count, is_statistic, named, unite
from vit_scale.pretrained import adapt
from vit_scale.training.setup import make_setup, summary
from vit_scale.training.train_state import TrainState
from vit_scale.training.train_step import jit_train_step

KEY = jax.random.key(0)
MASK = np.array([1, 0, 1, 1, 1, 0, 1, 1], bool)
# Option A's shortcuts have no parameters, but three stages; with option B there are four.
VARIANTS = {"cnn": (), "resnet20": (), "resnet18": ("model.depth=10",)}


def model_of(cfg, size=None):
    return build(cfg.model, size or config.image_size(cfg))


def shapes_of(model) -> dict:
    return named(model.abstract_params)


def full(variant: str, size=(32, 32)):
    cfg = config.override(config.base(), [f"model.variant={variant}", "model.classes=10"])
    return build(cfg.model, size)


# The published architectures


@pytest.mark.parametrize(
    ("variant", "parameters", "macs"),
    [
        ("cnn", 5_852_234, 137.7e6),  # the slides': 5.9M
        ("resnet20", 269_722, 40.6e6),  # .27M, 41M: He et al. 2016 and its reimplementations
        ("resnet56", 853_018, 125.5e6),  # .85M, 126M
        ("resnet18", 11_173_962, 555.4e6),  # 11.17M, .56G: with a 3x3 stem
    ],
)
def test_published_sizes(variant, parameters, macs):
    model = full(variant)
    assert count(model.abstract_params) == parameters
    assert model.macs == pytest.approx(macs, rel=2e-3)


def test_the_slides_cnn_layer_by_layer():
    shapes = {name: leaf.shape for name, leaf in shapes_of(full("cnn")).items()}
    kernels = [shape for name, shape in shapes.items() if name.endswith("kernel")]
    pairs = [(3, 32), (32, 64), (64, 128), (128, 128), (128, 256), (256, 256)]
    dense = [(4 * 4 * 256, 1024), (1024, 512), (512, 10)]
    assert sorted(kernels) == sorted([*((3, 3, *pair) for pair in pairs), *dense])
    means = {name: shape for name, shape in shapes.items() if name.endswith("mean")}
    assert means == {f"stages/{i}/norm/mean": (c,) for i, c in enumerate((64, 128, 256))}


def test_statistics_are_no_parameters():
    cfg = convnet_config("cnn")
    params = model_of(cfg).abstract_params
    statistics = {name for name in named(params) if is_statistic(name)}
    assert len(statistics) == 6
    sizes = [leaf.size for name, leaf in named(params).items() if name not in statistics]
    assert count(params) == sum(sizes) == summary(cfg)["parameters"]
    assert summary(cfg)["tokens"] == 0
    optimizer = make_setup(cfg).state.opt_state
    kept = {name for name in named(optimizer) if "stages/0/norm" in name}
    assert {name.rpartition("/")[2] for name in kept} == {"scale", "bias"}


# Against numpy


def plain_cnn(params, x, mask):
    for i in range(3):
        part = params["stages"][str(i)]
        x = relu(conv(relu(conv(x, part["conv1"])), part["conv2"]))
        x = norm(halved(x), part["norm"], mask)
    x = x.reshape(len(x), -1)
    for i in range(2):
        x = relu(x @ params["dense"][str(i)]["kernel"] + params["dense"][str(i)]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def plain_features(params, x, mask, stages):
    x = relu(norm(conv(x, params["conv"]), params["norm"], mask))
    for i in range(stages):  # of one block each
        part, stride = params["layers"][str(i)], 2 if i else 1
        y = relu(norm(conv(x, part["conv1"], stride), part["norm1"], mask))
        y = norm(conv(y, part["conv2"]), part["norm2"], mask)
        if "shortcut_conv" in part:
            x = norm(conv(x, part["shortcut_conv"], 2), part["shortcut_norm"], mask)
        elif i:
            x = x[:, ::2, ::2]
            x = np.concatenate([x, np.zeros_like(x)], axis=-1)
        x = relu(x + y)
    return x


def plain_resnet(params, x, mask, stages):
    x = plain_features(params["features"], x, mask, stages).mean((1, 2))
    return x @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mask", [None, MASK], ids=["running", "batch"])
def test_logits_are_those_of_numpy(variant, mask):
    model = model_of(convnet_config(variant, *VARIANTS[variant]))
    params = random_params(model)
    images = random_images(8).astype(np.float64) / 128 - 1
    inputs = jnp.asarray(images, jnp.float32)
    if mask is None:
        actual = jax.jit(model.apply)(params, inputs)
    else:
        actual = jax.jit(model.train)(params, inputs, KEY, mask).prediction
    if variant == "cnn":
        expected = plain_cnn(params, images, mask)
    else:
        expected = plain_resnet(params, images, mask, 3 if variant == "resnet20" else 4)
    chosen = slice(None) if mask is None else mask
    assert np.abs(expected[chosen]).max() > 0.05
    np.testing.assert_allclose(actual[chosen], expected[chosen], rtol=2e-4, atol=2e-4)


def test_running_statistics_move_towards_the_unmasked_batch():
    model = model_of(convnet_config("cnn"))
    params = random_params(model)
    images = random_images(8).astype(np.float64) / 128 - 1
    train = jax.jit(model.train)
    out = train(params, jnp.asarray(images, jnp.float32), KEY, MASK)
    part = params["stages"]["0"]
    x = relu(conv(relu(conv(images, part["conv1"])), part["conv2"]))
    x = halved(x)[MASK]
    moved = out.statistics["stages"]["0"]["norm"]
    before = part["norm"]
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    np.testing.assert_allclose(moved["mean"], 0.9 * before["mean"] + 0.1 * mean, rtol=1e-4)
    expected = 0.9 * before["variance"] + 0.1 * variance
    np.testing.assert_allclose(moved["variance"], expected, rtol=1e-4)
    merged = named(unite(params, out.statistics))
    changed = {k for k in merged if not np.array_equal(merged[k], named(params)[k])}
    assert changed == {name for name in merged if is_statistic(name)}
    nothing = train(params, jnp.asarray(images, jnp.float32), KEY, np.zeros(8, bool))
    for name, leaf in named(nothing.statistics).items():
        np.testing.assert_array_equal(leaf, named(params)[name])


def test_bfloat16_is_of_the_computation_only():
    single = model_of(convnet_config("resnet20"))
    half = model_of(convnet_config("resnet20", "model.dtype=bfloat16"))
    params, images = random_params(single), jnp.asarray(random_images(4) / 128 - 1, jnp.float32)
    assert {leaf.dtype for leaf in shapes_of(half).values()} == {jnp.float32.dtype}
    a, b = (jax.jit(m.apply)(params, images) for m in (single, half))
    assert b.dtype == jnp.float32
    assert 1e-5 < np.abs(a - b).max() < 0.05 * np.abs(a).max() + 0.05


# FLOPs


@pytest.mark.parametrize(
    ("variant", "size", "overrides"),
    [
        ("cnn", 64, ("model.width=16", "model.mlp=64")),
        ("resnet20", 64, ("model.width=16", "model.depth=8")),
        ("resnet18", 64, ("model.width=16", "model.depth=10")),
        ("R20+Ti/4", 64, ("model.depth=1",)),
        ("C+Ti/4", 64, ("model.depth=1", "model.distilled=True")),
    ],
)
def test_xla_counts_the_same(variant, size, overrides):
    """XLA leaves out the zeros around an image, and counts norms, which we do not."""
    fields = [f"model.variant={variant}", "model.classes=100", "model.scan=False", *overrides]
    cfg = config.override(config.base(), fields).model
    model = build(cfg, (size, size))
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    lowered = jax.jit(model.apply).lower(model.abstract_params, images)
    counted = lowered.compile().cost_analysis()["flops"]
    assert counted / (2 * 2 * model.macs) == pytest.approx(1.0, abs=0.06)


# Statistics are state


STEP = ("optim.lr=0.03", "optim.ema=0.75", "steps=40", "data.batch=32")


@pytest.fixture(scope="module")
def program():
    return make_setup(convnet_config("cnn", *STEP))


@pytest.fixture(scope="module")
def step(program):
    return jit_train_step(program)


def begun(program) -> TrainState:
    """At step 1, past a warm-up, the average still being the parameters; nothing is compiled."""
    params, ema = (jax.device_put(random_params(program.model)) for _ in range(2))
    return TrainState(jnp.int32(1), params, program.optimizer.init(params), ema)


def test_a_step_trains_measures_and_averages_both(program, step):
    old = jax.tree.map(np.asarray, begun(program))
    new, metrics = step(begun(program), random_batch(32))
    before, after, mean = (named(tree) for tree in (old.params, new.params, new.ema))
    for name in ("stages/1/norm/mean", "stages/1/norm/variance", "head/kernel"):
        assert np.abs(after[name] - before[name]).max() > 1e-6, name
        expected = 0.75 * before[name] + 0.25 * np.asarray(after[name])
        np.testing.assert_allclose(mean[name], expected, rtol=1e-5, atol=1e-7)
    norms = metrics.compute()
    trained = [leaf for name, leaf in before.items() if not is_statistic(name)]
    expected = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in trained))
    np.testing.assert_allclose(norms["parameter_norm"], expected, rtol=1e-5)
    changes = [np.asarray(after[n]) - before[n] for n in before if not is_statistic(n)]
    expected = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in changes))
    np.testing.assert_allclose(norms["update_norm"], expected, rtol=1e-4)


def test_masked_examples_are_never_looked_at(program, step):
    mask = np.tile(MASK, 4)
    batch = random_batch(32) | {"mask": mask}
    image = batch["image"].copy()
    image[~mask] = 255 - image[~mask]
    one, other = (step(begun(program), batch | {"image": x})[0] for x in (batch["image"], image))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    unmasked, _ = step(begun(program), random_batch(32))
    name = "stages/0/norm/mean"
    assert np.abs(named(unmasked.params)[name] - named(one.params)[name]).max() > 1e-5


def test_a_step_that_is_not_finite_measures_nothing(program, step):
    state = begun(program)
    state.params["head"]["bias"] = state.params["head"]["bias"].at[0].set(jnp.nan)
    old = jax.tree.map(np.asarray, state.params)
    new, metrics = step(state, random_batch(32))
    assert metrics.compute()["nonfinite"] == 1
    jax.tree.map(np.testing.assert_array_equal, new.params, old)


def test_it_learns_and_evaluates_by_the_running_statistics(program, step):
    state, losses = begun(program), []
    for i in range(40):
        state, metrics = step(state._replace(step=jnp.int32(1)), random_batch(32, seed=i % 4))
        losses.append(float(metrics.compute()["loss"]))
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:2])
    batch, cfg = random_batch(32, seed=99), program.cfg.augment
    images = (batch["image"] / 255 - np.array(cfg.mean)) / np.array(cfg.std)
    images = images.astype(np.float32)
    apply = jax.jit(program.model.apply)
    logits = apply(state.params, images)
    assert (logits.argmax(-1) == batch["label"]).mean() > 0.5
    images[1:] *= -1
    np.testing.assert_array_equal(apply(state.params, images)[0], logits[0])  # no other's


def test_fine_tuning_takes_the_statistics_along():
    model = model_of(convnet_config("cnn"))
    pretrained, target = random_params(model), random_params(model, seed=1)
    placed, rows = adapt(pretrained, target, "cubic", same_classes=False)
    jax.tree.map(np.testing.assert_array_equal, placed["stages"], pretrained["stages"])
    jax.tree.map(np.testing.assert_array_equal, placed["head"], target["head"])
    assert ("stages/0/norm/variance", "kept") in [(row.name, row.action) for row in rows]
    vit = random_params(model_of(tiny_config()))
    for source, other in ((pretrained, vit), (vit, pretrained)):
        with pytest.raises(UserError, match="the pretrained parameters don't fit"):
            adapt(source, other, "cubic", same_classes=True)


# Where it lies


def test_kernels_are_split_over_fsdp_and_statistics_are_whole():
    sizes = abstract_mesh(convnet_config("cnn", "mesh.fsdp=2").mesh, 2).shape
    for variant, overrides in VARIANTS.items():
        model = model_of(convnet_config(variant, *overrides))
        for name, leaf in shapes_of(model).items():
            split = "fsdp" in partition_spec(name, leaf.shape, sizes)
            assert split == name.endswith("kernel"), name
    for variant, name in (("C", "stem/convs/1/kernel"), ("CNN", "stem/stages/0/conv2/kernel")):
        hybrid = shapes_of(model_of(tiny_config(f"model.variant={variant}+Ti/8")))
        assert "fsdp" in partition_spec(name, hybrid[name].shape, sizes)


# Refusals


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.variant=cnm", "is not SIZE/PATCH such as S/16; did you mean cnn"),
        ("model.variant=X+Ti/4", "unknown stem 'X'; valid: C, CCT, CNN, R, R20, R26, R50"),
        (
            "model.dropout=0.1",
            "model.dropout=0.1 applies to a ViT: with model.variant=cnn it must be 0",
        ),
        ("model.drop_path=0.1", "model.drop_path=0.1 applies to a ViT"),
        ("model.posemb=sincos2d", "model.posemb=sincos2d applies to a ViT"),
        ("model.pool=gap", "model.pool=gap applies to a ViT"),
        ("model.scan=False", "model.scan=False applies to a ViT"),
        ("model.remat=full", "model.remat=full applies to a ViT"),
        ("model.heads=2", "model.heads=2 applies to a ViT"),
        ("model.distilled=True", "model.distilled=True applies to a ViT"),
        ("model.depth=3", "model.depth=3 does not apply to cnn"),
        ("model.dtype=float16", "model.dtype='float16' is unknown"),
        ("model.width=0", "too small"),
        ("data.resolution=20", "image height 20 is not divisible by 8, the stride of cnn"),
        ("optim.layer_decay=0.7", "optim.layer_decay=0.7 applies to the blocks of a ViT"),
        (
            "optim.accumulate=2",
            "optim.accumulate=2 splits the batch over which batch normalisation takes its ",
        ),
        (
            "optim.train=head",
            "would leave the batch normalisation of frozen layers updating its statistics",
        ),
        (
            "optim.freeze=('stages',)",
            "would leave the batch normalisation of frozen layers updating its statistics",
        ),
        ("lora.rank=2", "lora.rank=2 would leave the batch normalisation of frozen layers"),
        (
            "optim.name=muon",
            "optim.name=muon needs the matrices of a ViT, of which cnn has none: set "
            "optim.muon_convolutions=True",
        ),
    ],
)
def test_what_a_cnn_cannot_do_is_refused(override, message):
    with pytest.raises(UserError) as caught:
        make_setup(convnet_config("cnn", override))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_resnet_a_hybrid_and_a_mesh_cannot_do_is_refused():
    for cfg, message in (
        (convnet_config("resnet20", "model.depth=9"), "model.depth=9 must be 6 n + 2"),
        (convnet_config("resnet20", "model.mlp=9"), "model.mlp=9 does not apply to resnet20"),
        (
            tiny_config("model.variant=R20+Ti/2"),
            "patch size 2 is not divisible by 4, the stride of R20",
        ),
        (
            tiny_config("model.variant=C+Ti/8", "model.width=18"),
            "C+ needs a width divisible by 2^(n - 1) = 4, not 18",
        ),
        (
            tiny_config("model.variant=CCT+Ti/6", "data.resolution=48"),
            "CCT+ needs a patch size 2^n, not 6",
        ),
        (
            tiny_config("model.variant=CNN+Ti/8", "model.width=18"),
            "CNN+ needs a width divisible by 2^(n - 1) = 4, not 18: its channels double n - 1 = 2 ",
        ),
        (tiny_config("model.variant=C+Ti/8", "optim.accumulate=2"), "optim.accumulate=2 splits"),
        (tiny_config("model.variant=CNN+Ti/8", "optim.accumulate=2"), "optim.accumulate=2 splits"),
        (
            tiny_config("optim.name=muon", "optim.muon_convolutions=True"),
            "optim.muon_convolutions=True applies to stems and convnets",
        ),
        (
            tiny_config("model.variant=C+Ti/8", "optim.muon_convolutions=True"),
            "optim.muon_convolutions=True applies to name=muon, not adamw",
        ),
        (tiny_config("model.variant=C+Ti/8", "optim.train=head"), "optim.train=head would leave"),
    ):
        with pytest.raises(UserError) as caught:
            make_setup(cfg)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"mesh\.tensor=2 splits attention heads and MLP"):
        make_setup(convnet_config("cnn", "mesh.tensor=2"), 2)
    make_setup(tiny_config("model.variant=C+Ti/8", "mesh.tensor=2"), 2)


def test_every_size_is_named_in_the_module():
    assert all(name in convnets.__doc__ for name in convnets.SIZES)
