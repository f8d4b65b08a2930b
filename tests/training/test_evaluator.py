"""evaluate: every example once, whatever the batch; equal to numpy; wrong classes are refused."""

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from tests.helpers.tiny import CLASSES, random_images, random_params, tiny_config, tiny_model
from vit_scale.data import are_files, views
from vit_scale.data.sources import InMemory
from vit_scale.distributed.mesh import make_mesh
from vit_scale.errors import UserError
from vit_scale.inference.predictor import Predictor
from vit_scale.training.evaluator import Evaluate
from vit_scale.training.validation import check_classes, validate_evaluation

IMAGES, LABELS = random_images(23), np.random.RandomState(1).randint(0, 4, 23)
MASK = np.arange(23) % 5 != 2  # 5 are corrupt


def source(mask=None, classes=CLASSES) -> InMemory:
    return InMemory("drawn", IMAGES, LABELS, classes, mask)


@pytest.fixture(scope="module")
def evaluate():
    """Evaluations by batch size; each compiles once."""
    made = {}

    def run(batch: int, source) -> dict:
        if batch not in made:
            cfg = tiny_config(f"eval.batch={batch}", "data.workers=0", "augment.flip=True")
            made[batch] = Evaluate(cfg, tiny_model(), make_mesh(cfg.mesh, jax.devices()[:1]))
        return made[batch](random_params(tiny_model()), source)

    return run


def by_hand(mask) -> dict:
    pixels = (IMAGES.astype(np.float32) / 255 - 0.5) / 0.5
    logits = np.asarray(jax.jit(tiny_model().apply)(random_params(tiny_model()), pixels))
    losses = -log_softmax(logits.astype(np.float64), -1)[np.arange(23), LABELS]
    hits = logits.argmax(-1) == LABELS
    return {"n": mask.sum(), "accuracy": hits[mask].mean(), "loss": losses[mask].mean()}


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "corrupt"])
def test_every_example_counts_once_for_every_batch(evaluate, mask):
    expected = by_hand(np.ones(23, bool) if mask is None else mask)
    assert 0 < expected["accuracy"] < 1
    for batch in (1, 4, 23, 64):
        found = evaluate(batch, source(mask))
        assert found["n"] == expected["n"] and found["accuracy"] == pytest.approx(
            expected["accuracy"], abs=1e-12
        )
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)


def test_the_outputs_of_mirrored_images_are_averaged():
    """In an evaluation and in a prediction alike."""
    params = random_params(tiny_model())
    pixels = (IMAGES.astype(np.float32) / 255 - 0.5) / 0.5
    apply = jax.jit(tiny_model().apply)
    logits = (apply(params, pixels) + apply(params, pixels[:, :, ::-1])) / 2
    cfg = tiny_config("eval.flip=True", "data.workers=0")
    evaluate = Evaluate(cfg, tiny_model(), make_mesh(cfg.mesh, jax.devices()[:1]))
    result = evaluate(params, source())
    losses = -log_softmax(np.asarray(logits, np.float64), -1)[np.arange(23), LABELS]
    assert result["loss"] == pytest.approx(losses.mean(), abs=1e-5)
    assert result["accuracy"] == (logits.argmax(-1) == LABELS).mean()
    assert result["loss"] != pytest.approx(by_hand(np.ones(23, bool))["loss"], abs=1e-4)
    size = ((16, 16), (16, 16))
    view = views(cfg, are_files(cfg.data))
    predictor = Predictor("", tiny_model(), params, cfg, CLASSES, 0, *size, *view)
    np.testing.assert_allclose(predictor(IMAGES), jax.nn.softmax(logits), atol=1e-6)


def test_what_is_masked_is_never_looked_at(evaluate):
    images, labels = IMAGES.copy(), LABELS.copy()
    images[~MASK], labels[~MASK] = 255, 3 - labels[~MASK]
    other = InMemory("other", images, labels, CLASSES, MASK)
    assert evaluate(4, other) == evaluate(4, source(MASK))


def test_a_set_in_which_nothing_can_be_read_is_refused(evaluate):
    with pytest.raises(UserError, match="drawn: none of its 23 images could be read"):
        evaluate(4, source(np.zeros(23, bool)))


@pytest.mark.parametrize("classes", [(*CLASSES, "gnu"), ("a", "b", "c", "d", "e", "f")])
def test_other_classes_are_refused(evaluate, classes):
    message = f"drawn has {len(classes)} classes, the model model.classes=4"
    with pytest.raises(UserError, match=message):
        evaluate(4, source(classes=classes))
    with pytest.raises(UserError, match=message):
        check_classes(source(classes=classes), tiny_config())
    check_classes(source(), tiny_config())


def test_a_batch_that_the_mesh_cannot_split_is_refused():
    cfg = tiny_config("eval.batch=0")
    with pytest.raises(UserError, match=r"eval\.batch=0 must be at least 1"):
        validate_evaluation(cfg, make_mesh(cfg.mesh, jax.devices()[:1]))
