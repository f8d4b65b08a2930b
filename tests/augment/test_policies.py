"""Policies: operations equal timm's, torchvision's and big_vision's, and are drawn as theirs."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.augment.test_pipeline import settings
from vit_scale.augment import colour, operations, policies, warp
from vit_scale.augment.pipeline import check, train_images
from vit_scale.errors import UserError

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden" / "policies.npz")
IMAGE = GOLDEN["image"]
CASES = [name.split("/") for name in GOLDEN.files if name.count("/") == 4]
MEAN = tuple(map(float, GOLDEN["mean"]))
KEY = jax.random.key(7)

# Of an operation's values, the share that may be one level off; the other operations are exact.
# Where the references truncate, a level that is whole in exact arithmetic can be one lower.
OFF_BY_ONE = {
    **dict.fromkeys(("brightness", "colour", "contrast", "sharpness"), 0.02),
    **dict.fromkeys(("colour_tf", "contrast_tf"), 0.02),
    "autocontrast": 0.01,
    "rotate": 0.02,
    "shear_x": 0.02,
    "shear_y": 0.02,
    "translate_x": 0.06,
    "translate_y": 0.06,
}
MOVES = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")


def planar(image):
    return jnp.asarray(image).transpose(2, 0, 1)


def policy_of(name, **fields):
    (made,) = policies.make(settings(policy=name, mean=MEAN, **fields), IMAGE.shape[:2])
    return made


@functools.cache
def operation(name, policy):
    @jax.jit
    def run(image, argument, numbers):
        operand = operations.Operand(argument, numbers, policy)
        return operations.OPERATIONS[name](image, operand).transpose(1, 2, 0)

    return run


def assert_close(actual, wanted, name, nearest):
    difference = np.abs(np.asarray(actual).astype(int) - wanted)
    share = 0 if nearest and name in MOVES else OFF_BY_ONE.get(name, 0)
    assert difference.max() <= (1 if share else 0), name
    assert (difference > 0).mean() <= share, name


@pytest.mark.parametrize("name", sorted({policy for policy, *_ in CASES}))
def test_operations_equal_the_references(name):
    """At every level and in both directions, with arguments that are read as the reference does."""
    compared = 0
    for case in [case for case in CASES if case[0] == name]:
        _, theirs, level, sign, interpolation = case
        policy = policy_of(
            name, resample="bicubic" if interpolation == "nearest" else interpolation
        )
        ours = [a.operation.removesuffix("_tf") for a in policy.arguments]
        if theirs not in ours:
            continue  # the reference has operations that none of its policies draws
        compared += 1
        number = jnp.array([ours.index(theirs)])
        drawn = jnp.array([[0.0 if sign == "1" else 0.9], [0.5]])
        argument = policies.arguments(policy, number, jnp.array([float(level)]), drawn)
        used = policy.arguments[int(number[0])].operation
        # Compiled once for all policies that fill and interpolate alike.
        policy = policies.Policy((), 0, interpolation=policy.interpolation, fill=policy.fill)
        changed = operation(used, policy)(planar(IMAGE), argument[0], jnp.array([0.25, 0.75]))
        wanted = GOLDEN["/".join(case)]
        if name.startswith("randaug") and used in (*MOVES, "shear_x_tf", "shear_y_tf"):
            # Halfway between two pixels, float32 decides which is the nearest.
            assert (np.asarray(changed) != wanted).mean() < 0.02
        elif used == "sharpness_tf":  # levels of the smoothed image, up to 3 times as strong
            difference = np.abs(np.asarray(changed).astype(int) - wanted)
            assert difference.max() <= 3 and (difference > 0).mean() < 0.01
        else:
            assert_close(changed, wanted, used, interpolation == "nearest")
    assert compared > 2


def test_every_operation_of_the_policies_was_compared():
    compared = {(policy, name) for policy, name, *_ in CASES}
    for name in ("rand-m9-mstd0.5-inc1", "randaug(2,10)", "trivialaugment"):
        for argument in policy_of(name).arguments:
            assert (name, argument.operation.removesuffix("_tf")) in compared


@pytest.mark.parametrize(
    "name", ["original", "v0", "3a", "autoaugment-imagenet", "autoaugment-cifar10"]
)
def test_tables_equal_the_references(name):
    policy = policy_of(name)
    ours = [
        [(policy.arguments[int(op)].operation, round(float(p), 3), level) for op, p, level in row]
        for row in policy.rows
    ]
    for row, text in zip(ours, GOLDEN[f"table/{name}"], strict=True):
        words = text.split()
        wanted = [
            (words[i], float(words[i + 1]), float(words[i + 2])) for i in range(0, len(words), 3)
        ]
        plain = ("autocontrast", "equalize", "invert")  # whatever their level
        assert [entry[: 2 + (entry[0] not in plain)] for entry in row] == [
            entry[: 2 + (entry[0] not in plain)] for entry in wanted
        ]


@pytest.mark.parametrize("cubic", [None, False, True], ids=["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize(("h", "w"), [(40, 72), (6, 9)])
def test_what_a_tpu_runs_equals_what_others_run(h, w, cubic):
    """Products with one-hot matrices, on images larger than a tile, wider, and smaller."""
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, h, w), np.uint8))
    image = image.at[:, :5].set(77)  # a flat area stays what it is

    def fixed(shifts):
        return np.float32(np.floor(np.asarray(shifts) * 65536) / 65536)

    def assert_same(products, gather, argument, name):
        one, other = (
            np.asarray(jax.jit(lambda x, a, f=f: f(x, a, (1.0, 2.0, 3.0), cubic))(image, argument))
            for f in (products, gather)
        )
        assert_close(one, other.astype(int), name, cubic is None)

    for angle in (-0.5, 0.3, 2.3):
        assert_same(warp.rotate_by_products, warp.rotate_by_gather, angle, "rotate")
    for rate in (0.3, -0.99, 0.0):
        shifts = fixed(rate * np.arange(h) + 1.7)
        assert_same(warp.slide_by_products, warp.slide_by_gather, shifts, "shear_x")
    for shift in (-3.3, 1.7, 8.0):
        assert_same(warp.translate_by_product, warp.slide_by_gather, fixed([shift]), "translate_x")


def test_equalize_on_a_tpu_equals_equalize_elsewhere():
    image = planar(IMAGE)
    for values in (image, image // 2 + 40, image.at[0].set(9)):
        one, other = colour.equalize_by_products(values), colour.equalize_by_gather(values)
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("case", [n for n in GOLDEN.files if n.count("/") == 1 and n[0] != "t"])
def test_jitter_grey_and_blur_equal_pillow(case):
    name, argument = case.split("/")
    policy = policies.Policy((policies.Argument(name),), 1)
    changed = operation(name, policy)(planar(IMAGE), jnp.float32(argument), jnp.zeros(2))
    difference = np.abs(np.asarray(changed).astype(int) - GOLDEN[case])
    if name == "hue":  # Pillow converts to HSV and back in whole levels
        assert difference.max() <= 5 and (difference > 0).mean() < 0.003
    else:
        assert_close(changed, GOLDEN[case], name, nearest=False)


def draws_of(policy, n=4000):
    return jax.tree.map(
        np.asarray, jax.jit(jax.vmap(lambda k: policies.draw(policy, k)))(jax.random.split(KEY, n))
    )


def test_randaugment_draws_operations_levels_and_signs_as_timm():
    """Each layer with probability 1/2, each of 15 alike, levels around 9 and at most 10."""
    policy = policy_of("rand-m9-mstd0.5-inc1")
    drawn = draws_of(policy)
    assert drawn["operation"].shape == (4000, 2)
    assert abs((drawn["operation"] >= 0).mean() - 0.5) < 0.02
    share = np.bincount(drawn["operation"][drawn["operation"] >= 0], minlength=15) / 4000
    np.testing.assert_allclose(share, 1 / 15, atol=0.015)
    names = [a.operation for a in policy.arguments]
    degrees = drawn["argument"][drawn["operation"] == names.index("rotate")]
    assert abs((degrees > 0).mean() - 0.5) < 0.1
    assert abs(np.abs(degrees).mean() / 3 - 9) < 0.1 and np.abs(degrees).max() <= 30
    assert abs(np.abs(degrees).std() / 3 - 0.5) < 0.1
    weak = draws_of(policy_of("rand-m9-mstd101-n3-p1"))
    levels = np.abs(weak["argument"][weak["operation"] == names.index("rotate")])
    assert levels.min() < 1 and 26 < levels.max() < 27 and weak["operation"].min() == 0
    assert weak["operation"].shape == (4000, 3)
    strong = draws_of(policy_of("rand-m15-mmax20"))
    assert np.abs(strong["argument"][strong["operation"] == names.index("rotate")]).max() == 45


def test_the_others_draw_as_their_references():
    drawn = draws_of(policy_of("trivialaugment"))
    assert drawn["operation"].shape == (4000, 1) and drawn["operation"].min() == 0
    names = [a.operation for a in policy_of("trivialaugment").arguments]
    degrees = drawn["argument"][drawn["operation"] == names.index("rotate")]
    assert len(np.unique(np.abs(degrees))) == 31 and np.abs(degrees).max() == 135
    assert draws_of(policy_of("randaug(3,10)"))["operation"].shape == (4000, 3)
    grey = policy_of("3a")
    drawn = draws_of(grey)
    np.testing.assert_allclose(np.bincount(drawn["operation"][:, 0]) / 4000, 1 / 3, atol=0.03)
    sigma = drawn["argument"][
        drawn["operation"] == [a.operation for a in grey.arguments].index("blur")
    ]
    assert 0.1 <= sigma.min() < 0.12 and 1.98 < sigma.max() <= 2.0
    cifar = policy_of("autoaugment-cifar10")
    first = (draws_of(cifar)["operation"] >= 0).mean()
    assert abs(first - cifar.rows[..., 1].mean()) < 0.02


def test_jitter_draws_an_order_and_strengths():
    (policy,) = policies.make(settings(jitter=(0.4, 0.3, 1.2, 0.1), jitter_chance=0.8), (8, 8))
    drawn = draws_of(policy)
    applied = drawn["operation"][:, 0] >= 0
    assert abs(applied.mean() - 0.8) < 0.02
    assert (drawn["operation"][~applied] == -1).all()
    orders = {tuple(row) for row in drawn["operation"][applied]}
    assert len(orders) == 24 and all(sorted(row) == [0, 1, 2, 3] for row in orders)
    for number, (low, high) in enumerate([(0.6, 1.4), (0.7, 1.3), (0.0, 2.2), (-0.1, 0.1)]):
        values = drawn["argument"][drawn["operation"] == number]
        margin = 0.02 * (high - low)
        assert low <= values.min() < low + margin and high - margin < values.max() <= high + 1e-6
    (gentle,) = policies.make(settings(jitter=(0.4, 0.0, 0.0, 0.0)), (8, 8))
    assert [a.operation for a in gentle.arguments] == ["brightness"]


BATCH = {
    "image": np.stack([IMAGE, IMAGE[::-1], 255 - IMAGE, IMAGE[:, ::-1]]),
    "label": np.arange(4, dtype=np.int32),
    "mask": np.ones(4, bool),
}


def images_of(batch, fields, key=KEY, late=False):
    images = stages(json.dumps(fields))(batch | {"late": np.bool_(late)}, key)
    return np.round(np.asarray(images) * 255).astype(int)


@functools.cache
def stages(fields):
    cfg = settings(until=0.5, **json.loads(fields))
    return jax.jit(lambda batch, key: train_images(batch, key, cfg, IMAGE.shape[:2], 4)[0])


@pytest.mark.parametrize(
    "fields",
    [
        {"policy": "rand-m9-mstd0.5-inc1-p1"},
        {"policy": "3a"},
        {"jitter": (0.4, 0.4, 0.2, 0.1)},
        {"grey": 1.0},
        {"blur": 1.0},
        {"solarize": 1.0},
    ],
    ids=lambda fields: next(iter(fields)) + str(next(iter(fields.values()))),
)
def test_an_image_is_changed_by_its_own_draws_until_the_end(fields):
    """An image's pixels don't depend on its neighbours; another step changes others; late, none."""
    plain, changed = images_of(BATCH, {}), images_of(BATCH, fields)
    assert (changed != plain).any()
    alone = BATCH | {"image": np.stack([BATCH["image"][0], *[BATCH["image"][3]] * 3])}
    np.testing.assert_array_equal(images_of(alone, fields)[[0, 3]], changed[[0, 3]])
    if fields.keys() <= {"policy", "jitter"}:
        assert (images_of(BATCH, fields, jax.random.key(8)) != changed).any()
    np.testing.assert_array_equal(images_of(BATCH, fields, late=True), plain)


def test_order_is_policy_jitter_grey_blur_solarize():
    made = policies.make(
        settings(policy="3a", jitter=(0.1, 0, 0, 0), grey=0.1, blur=0.2, solarize=0.3), (8, 8)
    )
    assert [policy.arguments[0].operation for policy in made[1:]] == [
        *("brightness", "grey", "blur", "solarize")
    ]
    assert [policy.chance for policy in made[2:]] == [0.1, 0.2, 0.3]
    assert len(made[0].rows) == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "rand-m9-q3"}, "augment.policy='rand-m9-q3': 'q3' is not one of m, n, p, mstd"),
        ({"policy": "randaug(2,21)"}, "level of at most 20"),
        ({"policy": "randaug(0,9)"}, "at least one layer"),
        ({"policy": "trivialaugmnt"}, "did you mean trivialaugment?"),
        ({"policy": "original", "resample": "lanczos"}, "augment.resample=lanczos can't rotate"),
        ({"jitter": (0.4, 0.4, 0.4, 0.6)}, r"augment.jitter=\(.*\) must be four numbers"),
        ({"jitter": (0.4, 0.4, 0.4)}, "must be four numbers"),
        ({"grey": 1.5}, "augment.grey=1.5 must be a probability"),
        ({"blur": -0.1}, "augment.blur=-0.1 must be a probability"),
        ({"solarize": 2.0}, "augment.solarize=2.0 must be a probability"),
        ({"jitter_chance": 2.0}, "augment.jitter_chance=2.0 must be a probability"),
    ],
)
def test_refuses(fields, message):
    with pytest.raises(UserError, match=message):
        check(settings(**fields))
