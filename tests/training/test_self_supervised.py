"""Self-supervised losses and gradients equal those of transformers and lightly, on golden values.

Made by tests/golden/make_self_supervised.py. Padded and corrupt examples count nowhere.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden.draw_by_name import draw, draw_images
from tests.helpers.tiny import random_batch, tiny_config, tiny_model
from vit_scale.models.build import part
from vit_scale.models.parameters import named
from vit_scale.models.projection_heads import Projector, PrototypeHead
from vit_scale.training.objectives import make_objective
from vit_scale.training.objectives import self_distillation_losses as losses
from vit_scale.training.objectives.lejepa import disagreement, sliced_statistic

GOLDEN = np.load(pathlib.Path(__file__).parents[1] / "golden/self_supervised.npz")
MAE = (
    *("objective=mae", "model.classes=0", "model.variant=Ti/4", "model.posemb=sincos2d"),
    *("mae.width=8", "mae.depth=1", "mae.heads=2", "mae.mlp=20"),
)


def drawn(name: str, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    return np.float32(scale * draw(name, shape) / 0.3)


# The masked autoencoder

RENAMED = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "attention.o_proj": "attention.out",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "vit.layernorm": "norm",
    "vit.embeddings.patch_embeddings.projection": "embed",
    "vit.embeddings.cls_token": "cls",
    "vit.layers": "blocks",
    "decoder.decoder_layers": "objective.decoder.blocks",
    "decoder.decoder_embed": "objective.decoder.project",
    "decoder.decoder_norm": "objective.decoder.norm",
    "decoder.decoder_pred": "objective.decoder.predict",
    "decoder.mask_token": "objective.decoder.mask_token",
}


def translated(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    """An array of transformers' ViTMAE as ours: 2 heads; matrices have their input first."""
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    name = name.replace(".", "/")
    if value.ndim == 4:
        return name.replace("weight", "kernel"), value.transpose(2, 3, 1, 0)
    if "token" in name or name == "cls":
        return name, value.reshape(-1)
    if "norm" in name:
        return name.replace("weight", "scale"), value
    width = value.shape[0]
    if any(part in name for part in ("query", "key", "value")):
        shape = (2, width // 2) if value.ndim == 1 else (width, 2, width // 2)
        return name.replace("weight", "kernel"), value.T.reshape(shape)
    if "attention/out/weight" in name:
        return name.replace("weight", "kernel"), value.T.reshape(2, width // 2, width)
    return name.replace("weight", "kernel"), value.T


def transformers_params() -> dict:
    leaves: dict[str, list] = {}
    for line in GOLDEN["mae/shapes"]:
        name, shape = line.split(" ")
        if "pos" not in name:
            key, value = translated(
                name, draw(f"mae/{name}", tuple(int(size) for size in shape.split(",")))
            )
            parts = key.split("/")
            stacked = "/".join(part for part in parts if not part.isdigit())
            leaves.setdefault(stacked, []).append(value)
    params: dict = {}
    for name, values in leaves.items():
        node, *parts = params, *name.split("/")
        for part_name in parts[:-1]:
            node = node.setdefault(part_name, {})
        node[parts[-1]] = np.stack(values) if "blocks" in parts else values[0]
    return params


@pytest.mark.parametrize("normalise", [True, False])
def test_the_masked_autoencoder_equals_transformers(normalise):
    """Its loss, and the gradient of each of its parts."""
    cfg = tiny_config(*MAE, f"mae.normalise={normalise}")
    objective = make_objective(tiny_model(*(o for o in MAE if o.startswith("model."))), cfg)
    case = f"mae/{normalise}"
    mask = GOLDEN[f"{case}/hidden"].astype(bool)
    examples = {
        "image": draw_images("mae", (16, 16)),
        "visible": np.stack([np.flatnonzero(~row) for row in mask]),
        "hidden": np.stack([np.flatnonzero(row) for row in mask]),
        "mask": np.ones(2, bool),
        "weight": np.full(2, 0.5, np.float32),
    }
    assert examples["hidden"].shape == (2, 12)
    value_and_grad = jax.jit(jax.value_and_grad(objective.loss, has_aux=True))
    (value, _), grads = value_and_grad(transformers_params(), examples, jax.random.key(0))
    np.testing.assert_allclose(value, GOLDEN[f"{case}/loss"], rtol=1e-5)
    grads = named(grads)
    compared = 0
    for key in GOLDEN:
        if key.startswith((f"{case}/vit", f"{case}/decoder")):
            name, expected = translated(key.removeprefix(f"{case}/"), GOLDEN[key])
            result = grads["/".join(part for part in name.split("/") if not part.isdigit())]
            result = result[1] if "blocks/1" in name else result
            np.testing.assert_allclose(result, expected, rtol=1e-3, atol=2e-6, err_msg=name)
            compared += 1
    assert compared == 8


def test_three_quarters_of_the_patches_are_hidden_at_random():
    """Differently for each example and each key, and independently of the number of examples."""
    model = tiny_model("model.classes=0", "data.resolution=64")
    objective = make_objective(model, tiny_config(*MAE[:2], *MAE[4:], "data.resolution=64"))
    batch = random_batch()
    batch["image"] = np.zeros((8, 64, 64, 3), np.uint8)
    prepare = jax.jit(objective.prepare)
    one, other = (prepare(batch, jax.random.key(i)) for i in (0, 1))
    both = np.concatenate([one["visible"], one["hidden"]], axis=1)
    np.testing.assert_array_equal(np.sort(both), np.tile(np.arange(64), (8, 1)))
    assert one["visible"].shape == (8, 16) and (np.diff(one["hidden"]) > 0).all()
    assert len({row.tobytes() for row in np.asarray(one["visible"])}) == 8
    assert not np.array_equal(one["visible"], other["visible"])
    half = prepare({name: values[:4] for name, values in batch.items()}, jax.random.key(0))
    np.testing.assert_array_equal(half["visible"], one["visible"][:4])


# DINO, iBOT, DINOv2


def test_dino_equals_lightly():
    """Two steps: the second is centred by the first."""
    centre, ones = jnp.zeros(6), np.ones((4, 2), np.float32)
    for step in range(2):
        teacher = np.stack([drawn(f"dino/{step}/teacher/{i}", (4, 6), 0.2) for i in range(2)], 1)
        student = np.stack([drawn(f"dino/{step}/student/{i}", (4, 6), 0.2) for i in range(5)], 1)

        @jax.value_and_grad
        def loss(student, targets):
            return losses.across_views(targets, student, 0.1).mean()

        value, gradient = loss(student, losses.centred(teacher, centre, 0.05))
        centre = losses.update_centre(centre, teacher, ones, 0.9)
        np.testing.assert_allclose(value, GOLDEN[f"dino/{step}/loss"], rtol=1e-5)
        expected = GOLDEN[f"dino/{step}/gradient"].swapaxes(0, 1)
        np.testing.assert_allclose(gradient, expected, atol=1e-6)
        np.testing.assert_allclose(centre, GOLDEN[f"dino/{step}/centre"], atol=1e-6)


def test_ibot_equals_lightly():
    hidden = np.array([[1, 0, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0], [0] * 6], bool)
    teacher, student = (drawn(f"ibot/{name}", (3, 6, 5), 0.2) for name in ("teacher", "student"))
    centre = draw("ibot/centre", (1, 5))[0]
    weight = np.float32(hidden / np.maximum(hidden.sum(1, keepdims=True), 1))

    @jax.value_and_grad
    def loss(student):
        targets = losses.centred(teacher, centre, 0.05)
        return losses.of_patches(targets, student, weight, 0.1).mean()

    value, gradient = loss(student)
    np.testing.assert_allclose(value, GOLDEN["ibot/loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, GOLDEN["ibot/gradient"], rtol=1e-4, atol=1e-7)
    new = losses.update_centre(centre, teacher, np.float32(hidden), 0.9)
    np.testing.assert_allclose(new, GOLDEN["ibot/centre"], atol=1e-6)


def test_koleo_equals_lightly():
    x = drawn("koleo", (6, 4))
    value, gradient = jax.value_and_grad(losses.koleo)(x, np.ones(6, bool))
    np.testing.assert_allclose(value, GOLDEN["koleo/loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, GOLDEN["koleo/gradient"], atol=1e-5)


def test_sinkhorn_knopp_equals_lightly():
    logits = drawn("sinkhorn", (8, 5), 0.1)
    result = losses.sinkhorn(logits, np.ones(8), 0.05)
    np.testing.assert_allclose(result, GOLDEN["sinkhorn"], rtol=1e-4)


def test_the_head_equals_lightlys():
    head = part(lambda rngs: PrototypeHead(4, 7, 3, 6, 3, "float32", rngs))
    params = head.init(jax.random.key(0))
    shapes = {"layers": ((7, 4), (7, 7), (3, 7))}
    for i, shape in enumerate(shapes["layers"]):
        weight = draw(f"head/layers.{2 * i}.weight", shape)
        bias = draw(f"head/layers.{2 * i}.bias", shape[:1])
        params["layers"][str(i)] = {"kernel": weight.T, "bias": bias}
    params["prototypes"]["kernel"] = draw("head/last_layer.weight_v", (6, 3)).T
    np.testing.assert_allclose(head.apply(params, drawn("head", (5, 4))), GOLDEN["head"], atol=1e-5)


# LeJEPA


def test_lejepa_equals_lightly():
    vectors = drawn("lejepa", (4, 6, 3)).swapaxes(0, 1)
    mask, directions = np.ones(6, bool), draw("lejepa/directions", (3, 10))
    parts = {
        "normality": lambda x: sliced_statistic(x, mask, directions),
        "disagreement": lambda x: disagreement(x, mask, 2),
    }
    for name, loss in parts.items():
        value, gradient = jax.value_and_grad(loss)(vectors)
        np.testing.assert_allclose(value, GOLDEN[f"lejepa/{name}"], rtol=1e-5)
        expected = GOLDEN[f"lejepa/{name}/gradient"].swapaxes(0, 1)
        np.testing.assert_allclose(gradient, expected, atol=1e-6, err_msg=name)


def test_the_projector_equals_torchs():
    projector = part(lambda rngs: Projector(4, 7, 3, 2, rngs))
    params = projector.init(jax.random.key(0))
    for i, (number, shape) in enumerate(((0, (7, 4)), (3, (3, 7)))):
        weight = draw(f"projector/{number}.weight", shape)
        bias = draw(f"projector/{number}.bias", shape[:1])
        params["layers"][str(i)] = {"kernel": weight.T} | ({"bias": bias} if i else {})
    params["scales"]["0"], params["shifts"]["0"] = (
        draw(f"projector/1.{name}", (7,)) for name in ("weight", "bias")
    )
    x, mask = drawn("projector", (5, 4)), np.ones(5, bool)
    np.testing.assert_allclose(projector.apply(params, x, mask), GOLDEN["projector"], atol=1e-5)
    gradient = jax.grad(lambda x: (projector.apply(params, x, mask) ** 2).sum())(x)
    np.testing.assert_allclose(gradient, GOLDEN["projector/gradient"], atol=1e-4)
    padded, more = np.concatenate([x, 9 * x]), np.arange(10) < 5
    np.testing.assert_allclose(
        projector.apply(params, padded, more)[:5], GOLDEN["projector"], atol=1e-5
    )


# Examples that do not count


def test_masked_examples_change_no_loss_of_a_batch():
    """Whatever they are, the others are treated as if they were alone."""
    draws = np.random.RandomState(0)
    x, mask = np.float32(draws.randn(8, 3, 5)), np.array([1, 1, 0, 1, 0, 1, 1, 0], bool)
    weight = np.float32(np.repeat(mask[:, None], 3, 1))
    directions = np.float32(draws.randn(5, 16))
    measures = {
        "koleo": lambda x, mask: losses.koleo(x[:, 0], mask),
        "normality": lambda x, mask: sliced_statistic(x, mask, directions),
        "disagreement": lambda x, mask: disagreement(x, mask, 2),
    }
    for name, measure in measures.items():
        expected = measure(x[mask], mask[mask])
        np.testing.assert_allclose(measure(x, mask), expected, rtol=1e-5, err_msg=name)
        assert abs(measure(x, np.ones(8, bool)) - expected) > 1e-3
        assert np.isfinite(measure(x, np.zeros(8, bool)))
    assigned = losses.sinkhorn(x, weight, 0.1)
    np.testing.assert_allclose(assigned[mask], losses.sinkhorn(x[mask], weight[mask], 0.1))
    assert not np.any(assigned[~mask])
    counts = np.asarray(assigned).sum((0, 1))
    assert counts.min() > 0.5 * counts.mean()  # nearly as often as each other
    centre = np.float32(draws.randn(5))
    result = losses.update_centre(centre, x, weight, 0.9)
    np.testing.assert_allclose(result, 0.9 * centre + 0.1 * x[mask].mean((0, 1)), rtol=1e-5)
    np.testing.assert_array_equal(losses.update_centre(centre, x, 0 * weight, 0.9), centre)
