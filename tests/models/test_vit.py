"""model: equal to a ViT in plain numpy; layouts, precision, dropout and recomputation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from scipy.special import erf

from tests.helpers.tiny import random_images, random_params, tiny_config, tiny_model
from vit_scale.config import base
from vit_scale.errors import UserError
from vit_scale.inference.export import without_layer_scale
from vit_scale.models import attention, layers
from vit_scale.models import vit as vit_module
from vit_scale.models.build import build
from vit_scale.models.parameters import count, named, stack, unstack
from vit_scale.models.spec import SIZES, shape

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def initialised() -> dict:
    """The tiny model's parameters of seed 0."""
    return jax.jit(tiny_model().init)(KEY)


def pixels(count: int, size=(16, 16)) -> np.ndarray:
    return random_images(count, size).astype(np.float32) / 127.5 - 1


def shapes(vit) -> dict:
    return named(vit.abstract_params)


# The paper's table


@pytest.mark.parametrize(
    ("variant", "parameters"),
    [("Ti/16", 5_717_416), ("S/16", 22_050_664), ("B/16", 86_567_656), ("L/16", 304_326_632)],
)
def test_parameter_counts(variant, parameters):
    """As published (timm, DeiT), less the width: [CLS] and its position are one vector here."""
    cfg = base().model
    cfg.variant = variant
    width = SIZES[variant.partition("/")[0]].width
    vit = build(cfg, (224, 224))
    assert count(vit.abstract_params) == parameters - width


def test_parameter_names_and_shapes():
    actual = {name: leaf.shape for name, leaf in shapes(tiny_model("model.heads=4")).items()}
    assert actual == {
        "blocks/attention/out/bias": (2, 16),
        "blocks/attention/out/kernel": (2, 4, 4, 16),
        **{f"blocks/attention/{part}/bias": (2, 4, 4) for part in ("query", "key", "value")},
        **{f"blocks/attention/{part}/kernel": (2, 16, 4, 4) for part in ("query", "key", "value")},
        "blocks/mlp/down/bias": (2, 16),
        "blocks/mlp/down/kernel": (2, 24, 16),
        "blocks/mlp/up/bias": (2, 24),
        "blocks/mlp/up/kernel": (2, 16, 24),
        "blocks/norm1/bias": (2, 16),
        "blocks/norm1/scale": (2, 16),
        "blocks/norm2/bias": (2, 16),
        "blocks/norm2/scale": (2, 16),
        "cls": (16,),
        "embed/bias": (16,),
        "embed/kernel": (8, 8, 3, 16),
        "head/bias": (4,),
        "head/kernel": (16, 4),
        "norm/bias": (16,),
        "norm/scale": (16,),
        "posemb": (2, 2, 16),
    }


# The function


def plain_vit(params: dict, images: np.ndarray, pool: str, patch: int) -> np.ndarray:
    """Dosovitskiy et al. 2021, equations 1 to 4, in float64, a token and a head at a time."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    return np.stack(
        [plain_logits(params, image.astype(np.float64), pool, patch) for image in images]
    )


def plain_logits(params, image, pool, patch, angles=None, kept=slice(None)):
    """`angles` [n, k, e/2] are those of rotary positions, or a list of them by block; `kept` are
    the patches that aren't dropped."""
    kernel = params["embed"]["kernel"]
    tokens = []
    for row in range(image.shape[0] // patch):
        for column in range(image.shape[1] // patch):
            box = image[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            embedded = np.einsum("ijc,ijcd->d", box, kernel) + params["embed"].get("bias", 0)
            tokens.append(embedded + params["posemb"][row, column])
    tokens = np.stack(tokens)[kept]
    before = [params["cls"]] if "cls" in params else []
    x = np.stack([*before, *params.get("registers", ()), *tokens])
    if "pre_norm" in params:
        x = norm(params["pre_norm"], x)
    for i, block in unstack(params)["blocks"].items():
        attention, y = block["attention"], norm(block["norm1"], x)
        q, k, v = (linear(attention[part], y, "nd,dke->nke") for part in ("query", "key", "value"))
        if "query_norm" in attention:
            q, k = norm(attention["query_norm"], q), norm(attention["key_norm"], k)
        if angles is not None:
            own = angles[int(i)] if isinstance(angles, list) else angles
            q, k = turned(q, own), turned(k, own)
        read = attend(q, k, v)
        if "norm" in attention:
            read = norm(attention["norm"], read.reshape(len(x), -1)).reshape(read.shape)
        added = linear(attention["out"], read, "nke,ked->nd")
        x = x + added * block.get("scale1", 1)
        x = x + mlp(block["mlp"], norm(block["norm2"], x)) * block.get("scale2", 1)
    x = norm(params["norm"], x) if "norm" in params else x
    registers = len(params.get("registers", ()))
    first = len(before) + registers
    if pool == "map":
        part = params["pool"]
        x = np.concatenate([x[: len(before)], x[first:]])
        q = linear(part["query"], part["probe"], "nd,dke->nke")
        k, v = (linear(part[name], x, "nd,dke->nke") for name in ("key", "value"))
        x = linear(part["out"], attend(q, k, v), "nke,ked->nd")
        x = x + mlp(part["mlp"], norm(part["norm"], x))
    mean = x[first:].mean(0) if pool != "map" else x[0]
    x = {"gap": mean, "cls_gap": np.append(x[0], mean)}.get(pool, x[0])
    if "representation" in params:
        x = np.tanh(linear(params["representation"], x, "d,dr->r"))
    return linear(params["head"], x, "d,dc->c")


def linear(part, x, equation):
    return np.einsum(equation, x, part["kernel"]) + part.get("bias", 0)


def norm(part, x):
    if "bias" not in part:  # RMSNorm
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * part["scale"]
    variance = x.var(-1, keepdims=True)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(variance + 1e-6) * part["scale"] + part["bias"]


def mlp(part, x):
    if "gate" in part:
        gate = linear(part["gate"], x, "nd,df->nf")
        x = gate / (1 + np.exp(-gate)) * linear(part["up"], x, "nd,df->nf")
    else:
        x = linear(part["up"], x, "nd,df->nf")
        x = x * (1 + erf(x / np.sqrt(2))) / 2
    x = norm(part["norm"], x) if "norm" in part else x
    return linear(part["down"], x, "nf,fd->nd")


def turned(x, angles):
    """The patches, which are last, as complex numbers of channels i and i + e/2."""
    x, half = x.copy(), x.shape[-1] // 2
    last = x[-len(angles) :]
    pairs = (last[..., :half] + 1j * last[..., half:]) * np.exp(1j * angles)
    x[-len(angles) :] = np.concatenate([pairs.real, pairs.imag], axis=-1)
    return x


def attend(q, k, v):
    return np.einsum("knm,mke->nke", plain_weights(q, k), v)


def plain_weights(q, k):
    scores = np.exp(np.einsum("nke,mke->knm", q, k) / np.sqrt(q.shape[-1]))
    return scores / scores.sum(-1, keepdims=True)


@pytest.mark.parametrize("pool", ["cls", "gap", "map"])
def test_equals_a_plain_numpy_vit(pool):
    """On 16 x 24 px: rows and columns can't be confused."""
    vit = tiny_model(f"model.pool={pool}", "data.width=24")
    params, images = random_params(vit), pixels(2, (16, 24))
    assert vit.shape.grid == (2, 3) and vit.shape.tokens == 6 + (pool == "cls")
    expected = plain_vit(params, images, pool, 8)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(jax.jit(vit.apply)(params, images), expected, atol=2e-5)


NEW_BLOCK = {
    "registers": ("model.registers=3",),
    "swiglu": ("model.swiglu=true",),
    "rmsnorm": ("model.norm=rmsnorm", "model.pre_norm=true"),
    "qk-norm": ("model.qk_norm=layernorm", "model.pre_norm=true"),
    "no-bias": ("model.qkv_bias=false", "model.proj_bias=false", "model.patch_bias=false"),
    "layer-scale": ("model.layer_scale=0.1",),
    "inner-norms": ("model.attention_norm=true", "model.mlp_norm=true"),
    "no-norm": ("model.final_norm=false",),
}
NEW_BLOCK["all"] = (
    *(field for fields in NEW_BLOCK.values() for field in fields if "k_norm=" not in field),
    "model.qk_norm=rmsnorm",
)


@pytest.mark.parametrize(
    ("pool", "scan"), [("cls", False), ("gap", True), ("cls_gap", False), ("map", True)]
)
@pytest.mark.parametrize("name", NEW_BLOCK)
def test_each_part_of_a_newer_block_equals_plain_numpy(name, pool, scan):
    """And changes the logits, or the parameters, of the older block."""
    fields = (f"model.pool={pool}", "data.width=24", f"model.scan={scan}")
    vit, older = tiny_model(*fields, *NEW_BLOCK[name]), tiny_model(*fields)
    params, images = random_params(vit), pixels(2, (16, 24))
    assert shapes(vit).keys() != shapes(older).keys()
    expected = plain_vit(params, images, pool, 8)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(jax.jit(vit.apply)(params, images), expected, atol=5e-5)


@pytest.mark.parametrize(
    ("variant", "pool", "millions"),
    [
        ("H/14", "cls", 630.8),
        ("So400m/14", "map", 427.7),
        ("g/14", "cls", 1134.8),
        ("G/14", "cls", 1842.8),
        ("S+/16", "cls", 28.7),
        ("H+/16", "cls", 840.5),
        ("7B/16", "cls", 6716.0),
    ],
)
def test_larger_sizes_have_the_papers_parameters(variant, pool, millions):
    """Without a head, and at 224 px: timm's counts, and for the last three DINOv3's."""
    cfg = base().model
    cfg.update({"variant": variant, "pool": pool})
    params = named(build(cfg, (224, 224)).abstract_params)
    own = sum(leaf.size for name, leaf in params.items() if not name.startswith("head/"))
    assert own / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("pool", ["cls", "gap", "map"])
def test_attention_shows_the_weights_that_the_plain_vit_uses(pool, scan, monkeypatch):
    """Of every block and head, and the shares of the last tokens in the pooled vector."""
    vit = tiny_model(f"model.pool={pool}", "data.width=24", f"model.scan={scan}")
    params, images, used = random_params(vit), pixels(1, (16, 24)), []

    def recorded(q, k, plain=plain_weights):
        used.append(plain(q, k))
        return used[-1]

    monkeypatch.setitem(globals(), "plain_weights", recorded)
    plain_vit(params, images, pool, 8)
    seen, pooled = jax.jit(lambda *args: vit.attention(*args, lambda w: w))(params, images)
    assert seen.shape == (2, 1, 2, *2 * [vit.shape.tokens]) and seen.dtype == jnp.float32
    assert np.ptp(used[0]) > 0.01
    np.testing.assert_allclose(seen[:, 0], used[:2], atol=2e-6)
    expected = {
        "cls": np.eye(vit.shape.tokens)[0],
        "gap": np.full(vit.shape.tokens, 1 / vit.shape.tokens),
        "map": used[-1].mean(axis=(0, 1)),
    }
    np.testing.assert_allclose(pooled[0], expected[pool], atol=2e-6)


def test_bfloat16_weights_are_shown_as_float32():
    vit = tiny_model("model.dtype=bfloat16")
    seen, _ = vit.attention(random_params(vit), pixels(1), lambda w: w)
    assert seen.dtype == jnp.float32
    np.testing.assert_allclose(seen.sum(-1), 1, atol=0.02)


GOLDEN = [[0.088236, -0.520982, -0.651212, -0.182720], [0.965330, -0.445415, -1.446648, -1.117839]]


def test_golden_logits(initialised):
    """What seed 0 gave when this was written: initialisation and forward pass together."""
    vit = tiny_model()
    head = {"kernel": jnp.sin(jnp.arange(64.0)).reshape(16, 4), "bias": jnp.zeros(4)}
    params = initialised | {"head": head}
    images = np.sin(np.arange(2 * 16 * 16 * 3, dtype=np.float32)).reshape(2, 16, 16, 3)
    np.testing.assert_allclose(
        jax.jit(vit.apply)(params, images),
        GOLDEN,
        rtol=0,
        atol=1e-4,
        err_msg="The same seed gives another model: every published result changes. If that is "
        "meant, say so in the commit and replace GOLDEN by these numbers.",
    )


def test_a_new_model_has_zero_logits(initialised):
    vit = tiny_model()
    assert not jax.jit(vit.apply)(initialised, pixels(2)).any()
    assert np.std(initialised["blocks"]["mlp"]["up"]["kernel"]) > 0.1


def test_patches_are_a_strided_convolution():
    """With their positions, after the tokens that are the same for all images."""
    cfg = tiny_config("model.variant=Ti/4", "data.width=24")
    size = shape(cfg.model, (16, 24)).size
    embed = layers.PatchEmbed(cfg.model, 4, size, nnx.Rngs(0))
    embed.bias[...] = jnp.arange(16.0)
    images, position = pixels(2, (16, 24)), np.random.RandomState(1).randn(4, 6, 16)
    expected = jax.lax.conv_general_dilated(
        images, embed.kernel[...], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    expected = (expected + np.arange(16) + position).reshape(2, 24, 16)
    before = [np.full(16, 7.0), np.full(16, 8.0)]
    tokens = embed(images, position, before)
    np.testing.assert_allclose(tokens[:, 2:], expected, atol=1e-5)
    np.testing.assert_array_equal(tokens[:, :2], [before, before])
    np.testing.assert_allclose(embed(images, position), expected, atol=1e-5)


@pytest.mark.parametrize("pool", ["gap", "map"])
def test_without_positions_the_order_of_the_patches_is_nothing(pool):
    vit = tiny_model(f"model.pool={pool}")
    params, images = random_params(vit), pixels(2)
    shuffled = np.concatenate([images[:, 8:], images[:, :8]], axis=1)  # the patch rows swapped
    apply = jax.jit(vit.apply)
    assert np.abs(apply(params, shuffled) - apply(params, images)).max() > 1e-3
    params["posemb"] = np.zeros_like(params["posemb"])
    np.testing.assert_allclose(apply(params, shuffled), apply(params, images), atol=1e-5)


def test_sincos2d_has_no_parameter_but_positions():
    vit, learned = tiny_model("model.posemb=sincos2d"), tiny_model()
    assert shapes(learned).keys() - shapes(vit).keys() == {"posemb"}
    params, images = random_params(vit), pixels(2)
    with_table = params | {"posemb": np.asarray(vit_module.sincos2d((2, 2), 16))}
    np.testing.assert_allclose(
        jax.jit(vit.apply)(params, images), jax.jit(learned.apply)(with_table, images), atol=1e-5
    )


def test_norm_divides_by_the_variance_plus_epsilon():
    layer = layers.make_norm(tiny_config().model, 2, nnx.Rngs(0))
    np.testing.assert_allclose(
        layer(jnp.array([1e-3, -1e-3])), np.array([1, -1]) / 2**0.5, rtol=1e-3
    )


def test_the_epsilon_of_the_norms_is_a_switch():
    params, images = random_params(tiny_model()), pixels(2)
    logits = [
        jax.jit(tiny_model(f"model.norm_epsilon={epsilon}").apply)(params, images)
        for epsilon in (1e-6, 1e-2)
    ]
    assert 1e-4 < np.abs(logits[0] - logits[1]).max() < 1


def test_a_representation_is_a_tanh_layer_before_the_head():
    """ViT paper, section 3.2: pretraining's head has one hidden layer."""
    vit = tiny_model("model.representation=12")
    actual = {name: leaf.shape for name, leaf in shapes(vit).items()}
    assert actual["representation/kernel"] == (16, 12) and actual["head/kernel"] == (12, 4)
    params, images = random_params(vit), pixels(2)
    expected = plain_vit(params, images, "cls", 8)
    np.testing.assert_allclose(jax.jit(vit.apply)(params, images), expected, atol=1e-5)
    assert vit.macs - tiny_model().macs == 16 * 12 + 12 * 4 - 16 * 4


def test_bfloat16_is_of_the_computation_only():
    single, half = tiny_model(), tiny_model("model.dtype=bfloat16")
    assert {leaf.dtype for leaf in shapes(half).values()} == {jnp.float32.dtype}
    params, images = random_params(single), pixels(2)
    expected, logits = jax.jit(single.apply)(params, images), jax.jit(half.apply)(params, images)
    assert logits.dtype == jnp.float32
    assert 1e-5 < np.abs(logits - expected).max() < 0.2
    # Scores and softmax stay float32 inside attention, and so does the head.
    products = matrix_products(half, params, images)
    assert (products.count("bf16"), products.count("f32")) == (8, 2)
    assert set(matrix_products(single, params, images)) == {"f32"}


def matrix_products(vit, params, images) -> list[str]:
    """The type of the result of each in the program for a TPU."""
    traced = jax.jit(vit.apply).trace(params, images)
    program = traced.lower(lowering_platforms=("tpu",)).as_text()
    return re.findall(r"dot_general .* -> tensor<(?:\d+x)*(\w+)>", program)


def test_flops_are_what_xla_counts():
    """Unrolled: XLA counts the body of a loop once. Norms, softmax and GELU are its few % more."""
    for pool in ("cls", "map"):
        vit = tiny_model(
            "model.variant=Ti/16", "model.width=192", "model.heads=3", "model.mlp=768",
            "model.classes=100", "data.resolution=224", "model.scan=False", f"model.pool={pool}",
        )  # fmt: skip
        params = vit.abstract_params
        images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
        counted = jax.jit(vit.apply).lower(params, images).cost_analysis()["flops"]
        assert 2 * vit.macs < counted < 1.06 * 2 * vit.macs


# Layouts of the blocks


@pytest.mark.parametrize("fields", [(), ("model.scan=False",), ("model.pool=map",)], ids=str)
def test_the_abstract_parameters_are_those_that_are_initialised(fields):
    vit = tiny_model(*fields)
    expected = jax.eval_shape(vit.init, KEY)
    assert jax.tree.structure(vit.abstract_params) == jax.tree.structure(expected)
    assert jax.tree.leaves(vit.abstract_params) == jax.tree.leaves(expected)


def test_scanned_and_unrolled_blocks_begin_alike():
    """To the bit, as users compile: unoptimized, XLA rounds stacks and slices differently."""
    options = {"xla_backend_optimization_level": 1}
    models = (tiny_model(), tiny_model("model.scan=False"))
    scanned, unrolled = (jax.jit(vit.init, compiler_options=options)(KEY) for vit in models)
    assert "0" in unrolled["blocks"] and "0" not in scanned["blocks"]
    jax.tree.map(np.testing.assert_array_equal, stack(unrolled), scanned)
    layers = scanned["blocks"]["mlp"]["up"]["kernel"]
    assert np.abs(layers[0] - layers[1]).max() > 0.1, "each layer draws its own"


@pytest.mark.parametrize(
    "options",
    [
        ("model.drop_path=0.5",),
        ("model.dropout=0.2", "model.drop_path=0.5", "model.pool=gap"),
        ("model.distilled=True",),
    ],
)
def test_scanned_and_unrolled_blocks_are_one_function(options):
    """Also of the key: each layer drops the same, where all tokens of the last one are read."""
    scanned, unrolled = (tiny_model(f"model.scan={scan}", *options) for scan in (True, False))
    params, images = random_params(scanned), pixels(4)
    expected = jax.jit(scanned.apply)(params, images, KEY)
    np.testing.assert_allclose(
        jax.jit(unrolled.apply)(unstack(params), images, KEY), expected, atol=1e-5
    )


def test_stack_and_unstack_are_inverse():
    stacked = random_params(tiny_model("model.depth=11"))  # "10" sorts before "2"
    unstacked = unstack(stacked)
    assert list(unstacked["blocks"]) == [str(i) for i in range(11)]
    kernel = unstacked["blocks"]["10"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(kernel, stacked["blocks"]["mlp"]["up"]["kernel"][10])
    jax.tree.map(np.testing.assert_array_equal, stack(unstacked), stacked)
    assert stack(stacked) is stacked and unstack(unstacked) is unstacked


@pytest.mark.parametrize(("pool", "distilled"), [("cls", False), ("cls", True), ("gap", False)])
def test_the_last_block_computes_what_is_read(pool, distilled):
    """And nothing else: the widest product of its MLP is of so many tokens."""
    vit = tiny_model("model.scan=False", f"model.pool={pool}", f"model.distilled={distilled}")
    program = str(jax.make_jaxpr(vit.apply)(shapes_tree(vit), pixels(2)))
    tokens = [int(n) for n in re.findall(r":f32\[2,(\d+),24\] = dot_general", program)]
    assert tokens == [vit.shape.tokens, vit.shape.read or vit.shape.tokens]
    assert vit.shape.read == (None if pool == "gap" else 1 + distilled)


# Dropout and stochastic depth


def test_drop_keeps_the_expectation():
    x = jnp.full((400, 101), 3.0)
    dropped = np.asarray(layers.drop(x, 0.3, KEY, x.shape))
    assert set(np.unique(dropped)) == {0.0, np.float32(3 / (1 - 0.3))}
    assert abs(dropped.mean() - 3) < 0.05  # its standard deviation is .01
    assert 0.6 < (dropped[:, 0] > 0).mean() < 0.8 and 0.6 < (dropped[:, 100] > 0).mean() < 0.8
    both = (dropped[:, :-1:2] > 0) & (dropped[:, 1::2] > 0)  # neighbours share a random number
    assert abs(both.mean() - 0.7**2) < 0.02


def test_drop_draws_once_per_entry_of_its_shape():
    dropped = layers.drop(jnp.ones((64, 3, 5)), 0.5, KEY, (64, 1, 1))
    examples = np.asarray(dropped).reshape(64, -1)
    assert (examples == examples[:, :1]).all() and 0 < (examples[:, 0] > 0).sum() < 64


@pytest.mark.parametrize("rate", ["dropout", "drop_path"])
def test_nothing_is_dropped_without_a_key(rate):
    vit, fixed = tiny_model(f"model.{rate}=0.5"), tiny_model()
    params, images = random_params(vit), pixels(4)
    apply, expected = jax.jit(vit.apply), jax.jit(fixed.apply)(params, images)
    np.testing.assert_array_equal(apply(params, images), expected)
    first, second = apply(params, images, KEY), apply(params, images, jax.random.key(1))
    assert np.abs(first - expected).max() > 1e-3 and np.abs(first - second).max() > 1e-3
    np.testing.assert_array_equal(apply(params, images, KEY), first)
    unused = str(jax.make_jaxpr(fixed.apply)(params, images, KEY))
    assert "random_bits" not in unused, "rates of 0 cost no random numbers"


def test_drop_path_grows_linearly(monkeypatch):
    rates = []

    def record(block, x, rate, key, first, rope):
        rates.append(float(rate))
        return x

    monkeypatch.setattr(vit_module.Block, "__call__", record)
    vit = tiny_model("model.depth=4", "model.drop_path=0.3", "model.scan=False")
    vit.apply(random_params(vit), pixels(1), KEY)
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3], atol=1e-6)
    rates.clear()
    vit = tiny_model(
        "model.depth=4", "model.drop_path=0.3", "model.drop_path_uniform=true", "model.scan=False"
    )
    vit.apply(random_params(vit), pixels(1), KEY)
    np.testing.assert_allclose(rates, 4 * [0.3], atol=1e-6)


@pytest.mark.parametrize("scan", ["true", "false"])
def test_layer_scale_multiplies_what_a_block_adds(scan):
    """As layers with that much smaller weights would, which is how it is exported."""
    scaled, plain = (
        tiny_model(f"model.scan={scan}", f"model.layer_scale={value}") for value in (0.1, 0)
    )
    scales = [x for name, x in named(scaled.init(KEY)).items() if re.search(r"/scale[12]$", name)]
    assert scales and {float(x) for array in scales for x in array.ravel()} == {np.float32(0.1)}
    params = random_params(scaled)
    folded = without_layer_scale(named(jax.tree.map(np.asarray, unstack(params))))
    assert not any(re.search(r"/scale[12]$", name) for name in folded)
    unrolled = traverse_util.unflatten_dict(folded, sep="/")
    expected = jax.jit(plain.apply)(stack(unrolled) if scan == "true" else unrolled, pixels(2))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(jax.jit(scaled.apply)(params, pixels(2)), expected, atol=1e-5)


def test_head_bias_is_where_the_head_starts():
    head = tiny_model("model.head_bias=-6.9").init(KEY)["head"]
    assert set(np.asarray(head["bias"])) == {np.float32(-6.9)} and not head["kernel"].any()


# Recomputation


def test_remat_recomputes_and_changes_no_gradient():
    images = pixels(2)

    def gradient(policy):
        vit = tiny_model(f"model.remat={policy}")
        params = random_params(vit)
        function = jax.grad(lambda params: (vit.apply(params, images) ** 2).sum())
        program = str(jax.make_jaxpr(function)(params))
        return jax.jit(function)(params), program.count("dot_general"), program.count("erf")

    grads, products, gelus = gradient("none")
    full, products_full, gelus_full = gradient("full")
    saving_products, products_saved, gelus_saved = gradient("dots_saveable")
    assert products_full > products_saved == products
    assert gelus_full == gelus_saved > gelus
    for other in (full, saving_products):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, other
        )


def test_unknown_remat_names_the_nearest():
    with pytest.raises(
        UserError, match=r"model\.remat='dots_savable' is unknown; did you mean dots_"
    ):
        tiny_model("model.remat=dots_savable").init(KEY)


# Refusals


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.variant=XS/16",
            "model.variant='XS/16' is not SIZE/PATCH such as S/16; did you mean S",
        ),
        ("model.variant=S16", "is not SIZE/PATCH"),
        ("model.heads=3", "model width 16 is not divisible by 3 heads"),
        ("data.resolution=20", "image height 20 is not divisible by the patch size 8"),
        ("data.width=30", "image width 30 is not divisible by the patch size 8"),
        (
            "data.resolution=8",
            "a grid of 1 x 1 patches, not at least 2 x 2",
        ),
        ("model.pool=mean", "model.pool='mean' is unknown; "),
        ("model.posemb=sincos", "did you mean sincos2d"),
        ("model.dtype=float16", "model.dtype='float16' is unknown; "),
        ("model.attention=flash", "model.attention='flash' is unknown; "),
        ("model.dropout=1.0", "model.dropout=1.0 must be at least 0 and below 1"),
        ("model.drop_path=-0.1", "model.drop_path=-0.1 must be at least 0 and below 1"),
        ("model.classes=-1", "model.classes=-1 must be at least 0 (0: no head)"),
        ("model.depth=0", "each must be at least 1"),
        ("model.representation=-1", "model.representation=-1 must be at least 0"),
        ("model.norm_epsilon=0.0", "model.norm_epsilon=0.0 above 0"),
    ],
)
def test_refusals(override, message):
    with pytest.raises(UserError) as caught:
        tiny_model(override)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# Attention


def plain_attention(q, k, v):
    return jax.nn.dot_product_attention(q, k, v, implementation="xla")


@pytest.mark.parametrize(
    ("dtype", "logits", "atol"),
    [
        ("float32", "float32", 2e-6),
        ("bfloat16", "float32", 2e-2),
        ("bfloat16", "bfloat16", 2e-2),
    ],
)
def test_attention_and_its_gradients_equal_the_plain_one(dtype, logits, atol):
    """With more keys than queries, as in pooling; large scores, so weights are unequal."""
    draw = np.random.RandomState(0)
    q, k, v, out = (draw.randn(2, n, 3, 4).astype(np.float32) for n in (5, 7, 7, 5))
    half = [jnp.asarray(x, dtype) for x in (2 * q, k, v, out)]
    q, k, v, out = (np.asarray(x, np.float32) for x in half)  # the same values, whatever the type
    expected, pull = jax.vjp(plain_attention, q, k, v)
    actual, pull_found = jax.vjp(lambda *x: attention.attend(*x, logits, "xla"), *half[:3])
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual.astype(jnp.float32), expected, atol=atol)
    errors = jax.tree.map(lambda a, b: np.abs(a - b).max(), pull_found(half[3]), pull(out))
    assert max(errors) < 3 * atol
    assert dtype == "float32" or min(errors) > 1e-4, "bfloat16 changes something"


def test_precision_of_logits_is_a_switch():
    """Float32 also where the model is bfloat16, but where it is said."""
    params, images = random_params(tiny_model()), pixels(2)
    half = tiny_model("model.dtype=bfloat16")
    # Of the scanned block the scores, and the head; not patches, q, k, v, values, out, and the MLP.
    products = matrix_products(half, params, images)
    assert (products.count("f32"), products.count("bf16")) == (2, 8)
    lower = tiny_model("model.dtype=bfloat16", "model.logits=bfloat16")
    assert matrix_products(lower, params, images).count("f32") == 1
    q, k = (jnp.asarray(x, jnp.bfloat16) for x in np.random.RandomState(0).randn(2, 1, 300, 1, 16))
    close = attention.weights(q, k, "float32")
    np.testing.assert_allclose(close.sum(axis=-1), 1, atol=1e-6)
    plain = np.stack([plain_weights(*(np.asarray(x[0], np.float64) for x in (q, k)))])
    # Queries are scaled exactly, by 1 / 4; each weight is rounded once, to 8 bits. A bfloat16 sum
    # would stop growing.
    np.testing.assert_allclose(close, plain, rtol=0.01)


def test_the_form_of_gelu_is_a_switch():
    params, images = random_params(tiny_model()), pixels(2)
    exact, tanh = (
        jax.jit(tiny_model(f"model.gelu={gelu}").apply)(params, images)
        for gelu in ("exact", "tanh")
    )
    assert 1e-6 < np.abs(exact - tanh).max() < 1e-2


def test_tokens_between_blocks_are_constrained():
    """Once where they enter the blocks, and as they leave each; of the last, what is read."""
    seen = []
    for scan, expected in ((True, [5, 5]), (False, [5, 5, 1])):
        cfg = tiny_config(f"model.scan={scan}")
        seen.clear()
        vit = build(cfg.model, (16, 16), constrain=lambda x: (seen.append(x.shape), x)[1])
        seen.clear()
        jax.eval_shape(vit.apply, shapes_tree(vit), pixels(2))
        assert seen == [(2, n, 16) for n in expected]


def shapes_tree(vit):
    return vit.abstract_params
