"""distill: DeiT's losses against numpy, the token, what a teacher sees, and which one it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from tests.helpers.tiny import (
    CLASSES,
    convnet_config,
    random_batch,
    random_params,
    tiny_config,
    tiny_model,
    write_run,
)
from vit_scale import config
from vit_scale.errors import UserError
from vit_scale.models.build import build
from vit_scale.models.parameters import named
from vit_scale.models.position_embeddings import resample
from vit_scale.pretrained import adapt
from vit_scale.training.objectives import Context, Objective, distillation
from vit_scale.training.objectives import teacher as teachers
from vit_scale.training.optimizer import trained
from vit_scale.training.setup import make_setup
from vit_scale.training.train_state import TrainState
from vit_scale.training.train_step import jit_train_step

KEY = jax.random.key(0)
MASK = np.array([1, 0, 1, 1, 1, 1, 0, 1], bool)
TAUGHT = np.random.RandomState(5).randn(8, 4) * 2


def taught_examples(objective: Objective) -> dict:
    """Examples with what a teacher that returns its parameters makes of them: TAUGHT."""
    examples = objective.prepare(random_batch() | {"mask": MASK}, KEY)
    assert objective.teach
    return objective.teach(examples, Context(jnp.int32(0), jnp.asarray(TAUGHT), None))[0]


def losses(kind: str, *overrides: str) -> tuple[dict, float]:
    """Outputs and loss of a student whose teacher says TAUGHT, whatever it sees."""
    overrides = ("model.dropout=0.0", *overrides)
    cfg = tiny_config("objective=distillation", f"distill.kind={kind}", *overrides)
    model = tiny_model(*(item for item in overrides if item.startswith("model.")))
    objective = distillation(model, cfg, lambda params, images: params)
    examples = taught_examples(objective)
    params = random_params(model)
    value, outputs = jax.jit(objective.loss)(params, examples, KEY)
    out = jax.jit(model.train)(params, examples["image"], KEY, MASK)
    assert value == pytest.approx(np.asarray(outputs["loss"])[MASK].mean(), rel=1e-5)
    return outputs | {"out": out}, value


def entropy(logits, targets):
    return -(targets * log_softmax(np.asarray(logits, np.float64), -1)).sum(-1)


LABELS = np.eye(4)[random_batch()["label"]]


@pytest.mark.parametrize("token", [False, True])
def test_hard_is_deits_equation_3(token):
    found, _ = losses("hard", "distill.weight=0.3", f"model.distilled={token}")
    out = found["out"]
    assert (out.distilled is not out.logits and not np.allclose(*out[:2])) == token
    expected = 0.7 * entropy(out.logits, LABELS)
    expected += 0.3 * entropy(out.distilled, np.eye(4)[TAUGHT.argmax(-1)])
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-4)
    mean = (np.asarray(out.logits) + np.asarray(out.distilled)) / 2
    np.testing.assert_array_equal(found["correct"], mean.argmax(-1) == LABELS.argmax(-1))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_is_the_divergence_at_the_temperature(temperature):
    overrides = ("distill.weight=0.9", f"distill.temperature={temperature}")
    found, _ = losses("soft", "model.distilled=True", *overrides)
    out = found["out"]
    wanted = log_softmax(TAUGHT / temperature, -1)
    said = log_softmax(np.asarray(out.distilled, np.float64) / temperature, -1)
    divergence = (np.exp(wanted) * (wanted - said)).sum(-1)
    expected = 0.1 * entropy(out.logits, LABELS) + 0.9 * temperature**2 * divergence
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-4)


def test_a_weight_of_one_leaves_the_labels_out():
    found, _ = losses("soft", "distill.weight=1.0")
    assert found["out"].prediction is found["out"].logits or np.array_equal(
        found["out"].prediction, found["out"].logits
    )
    wanted, said = (log_softmax(np.asarray(x, np.float64), -1) for x in (TAUGHT, found["out"][0]))
    divergence = (np.exp(wanted) * (wanted - said)).sum(-1)
    np.testing.assert_allclose(found["loss"], divergence, rtol=1e-4, atol=1e-6)


# The token


def test_the_token_is_one_more_with_a_head_of_its_own():
    plain, token = tiny_model(), tiny_model("model.distilled=True")
    assert token.shape.tokens == plain.shape.tokens + 1
    names = [named(model.abstract_params) for model in (plain, token)]
    more = {name: names[1][name].shape for name in names[1].keys() - names[0]}
    assert more == {"dist": (16,), "head_dist/kernel": (16, 4), "head_dist/bias": (4,)}
    block = 4 * 16 * 16 + 2 * 16 * 24 + 2 * 16 * (6 * 6 - 5 * 5)
    # In the last block one more token attends, with an MLP of its own, and all attend to it.
    last = 4 * 16 * 16 + 2 * 16 * 24 + 2 * 16 * (2 * 6 - 1 * 5)
    assert token.macs - plain.macs == block + last + 16 * 4
    assert (plain.shape.read, token.shape.read) == (1, 2)


def test_it_predicts_the_mean_of_both_heads():
    model = tiny_model("model.distilled=True")
    params = random_params(model)
    images = jnp.asarray(np.random.RandomState(0).randn(2, 16, 16, 3), jnp.float32)
    apply = jax.jit(model.apply)

    def only(name):
        silent = {"kernel": jnp.zeros((16, 4)), "bias": jnp.zeros(4)}
        return apply(params | {name: silent}, images)

    np.testing.assert_allclose(
        apply(params, images), only("head") + only("head_dist"), rtol=1e-4, atol=1e-5
    )
    assert np.abs(only("head") - only("head_dist")).max() > 0.1


def test_both_heads_are_new_or_kept_and_trained_alone():
    given = random_params(tiny_model("model.distilled=True"))
    larger = tiny_model("model.distilled=True", "data.resolution=32")
    target = random_params(larger, seed=1)
    placed, _ = adapt(given, target, "cubic", same_classes=False)
    for name in ("head", "head_dist"):
        np.testing.assert_array_equal(placed[name]["kernel"], target[name]["kernel"])
    np.testing.assert_array_equal(placed["dist"], given["dist"])
    expected = resample(given["posemb"], (4, 4), "cubic")
    np.testing.assert_allclose(placed["posemb"], expected, rtol=1e-5, atol=1e-6)
    mask = named(trained(tiny_config("optim.train=head").optim, given))
    assert {name for name, on in mask.items() if on} == {
        f"{head}/{part}" for head in ("head", "head_dist") for part in ("kernel", "bias")
    }


# What the teacher sees


def seen_by(teacher, student, images):
    """The images that a teacher of this config is given of a student's."""
    given = []
    model = build(teacher.model, config.image_size(teacher))
    keep = dataclasses.replace(model, apply=lambda params, images, key=None: given.append(images))
    teachers.make_logits(keep, teacher, student)(None, images)
    return given[0]


def test_the_teacher_sees_the_same_pixels_in_its_own_scale():
    images = jnp.asarray(np.random.RandomState(0).randn(2, 16, 16, 3), jnp.float32)
    student = tiny_config("augment.mean=(.1,.2,.3)", "augment.std=(.5,.6,.7)")
    assert seen_by(student, student, images) is images
    found = seen_by(tiny_config("augment.mean=(.4,.4,.4)"), student, images)
    pixels = np.asarray(images) * (0.5, 0.6, 0.7) + (0.1, 0.2, 0.3)
    np.testing.assert_allclose(found, (pixels - 0.4) / 0.5, atol=1e-5)
    larger = seen_by(tiny_config("data.resolution=32"), tiny_config(), images)
    expected = jax.image.resize(images, (2, 32, 32, 3), "linear", antialias=True)
    np.testing.assert_allclose(larger, expected, atol=1e-6)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> tuple:
    """The folder of a CNN's run that averages its weights, and the average."""
    cfg = convnet_config("cnn", "augment.mean=(.3,.3,.3)")
    model = build(cfg.model, (16, 16))
    params, ema = random_params(model), random_params(model, seed=1)
    return write_run(tmp_path_factory.mktemp("teacher") / "run", cfg, params, ema=ema), ema


DISTILL = ("objective=distillation", "model.distilled=True", "optim.lr=0.01", "augment.flip=True")


def begun(program) -> TrainState:
    params = jax.device_put(random_params(program.model))
    return TrainState(jnp.int32(1), params, program.optimizer.init(params), None)


def test_a_step_learns_from_what_the_average_of_the_teacher_says(teacher):
    run, ema = teacher
    program = make_setup(tiny_config(*DISTILL, f"distill.teacher={run}"))
    batch = random_batch()
    given = teachers.restore_params(program.teacher)
    jax.tree.map(np.testing.assert_array_equal, given[0], ema)
    step = jit_train_step(program)
    state, metrics = step(begun(program), batch, *given)
    key = jax.random.fold_in(jax.random.key(program.cfg.seed), 1)
    augment_key, _ = jax.random.split(key)
    examples = jax.jit(program.objective.prepare)(batch, augment_key)
    context = Context(jnp.int32(1), given[0], None)
    examples = jax.jit(program.objective.teach)(examples, context)[0]
    pixels = np.asarray(examples["image"]) * 0.5 + 0.5
    cnn = build(convnet_config("cnn").model, (16, 16))
    images = jnp.asarray((pixels - 0.3) / 0.5, jnp.float32)
    expected = jax.jit(cnn.apply)(ema, images)
    np.testing.assert_allclose(examples["teacher"], expected, atol=1e-4)
    out = jax.jit(program.model.train)(begun(program).params, examples["image"], KEY, batch["mask"])
    loss = entropy(out.logits, np.asarray(examples["target"]))
    loss = (loss + entropy(out.distilled, np.eye(4)[np.asarray(expected).argmax(-1)])) / 2
    np.testing.assert_allclose(metrics.compute()["loss"], loss.mean(), rtol=1e-4)
    jax.tree.map(np.testing.assert_array_equal, given[0], ema)  # the teacher learns nothing
    before, after = named(begun(program).params), named(state.params)
    assert np.abs(after["head_dist/kernel"] - before["head_dist/kernel"]).max() > 1e-4


def test_micro_batches_add_up_with_their_teachers_words():
    cfg = tiny_config(*DISTILL)
    objective = distillation(tiny_model(), cfg, lambda params, images: params)
    examples = taught_examples(objective)
    loss, params = jax.jit(objective.loss), random_params(tiny_model())
    parts = [jax.tree.map(lambda x, i=i: x[i::2], examples) for i in (0, 1)]
    found = sum(loss(params, part, KEY)[0] for part in parts)
    np.testing.assert_allclose(found, loss(params, examples, KEY)[0], rtol=1e-5)


def test_a_teacher_that_was_trained_with_cudnn_teaches_without_a_gpu(tmp_path):
    half, said = ("model.dtype=bfloat16",), []
    params, images = random_params(tiny_model(*half)), np.ones((2, 16, 16, 3), np.float32)
    for kind in ("cudnn", "xla"):
        run = write_run(tmp_path / kind, tiny_config(*half, f"model.attention={kind}"), params)
        program = make_setup(tiny_config("objective=distillation", f"distill.teacher={run}"))
        params_of_teacher = teachers.restore_params(program.teacher)
        said.append(jax.jit(program.teacher.logits)(*params_of_teacher, images))
    np.testing.assert_array_equal(*said)


# Which teacher it is


def test_the_checksum_is_filled_in_and_held_to(teacher, tmp_path):
    run, _ = teacher
    cfg = tiny_config(*DISTILL, f"distill.teacher={run}")
    program = make_setup(teachers.with_checksum(cfg))
    checksum = program.cfg.distill.checksum
    assert len(checksum) == 64 and cfg.distill.checksum == "", "the caller's stays as it is"
    assert program.teacher.folder == run / "checkpoints" / "5"
    cfg.distill.checksum = checksum
    assert make_setup(teachers.with_checksum(cfg)).cfg.distill.checksum == checksum
    other = convnet_config("cnn", "augment.mean=(.3,.3,.3)")
    changed = random_params(build(other.model, (16, 16)))
    changed["head"]["bias"][0] += 1e-3
    cfg.distill.teacher = str(write_run(tmp_path / "run", other, changed))
    with pytest.raises(UserError, match=r"it is another teacher"):
        make_setup(cfg)


def test_a_teacher_of_other_classes_is_refused(teacher, tmp_path):
    run, _ = teacher
    found = make_setup(tiny_config(*DISTILL, f"distill.teacher={run}")).teacher
    teachers.check_teacher_classes(found, CLASSES)
    teachers.check_teacher_classes(None, ("ant",))
    with pytest.raises(UserError, match="class 1 of the teacher is 'dog', of the student 'eel'"):
        teachers.check_teacher_classes(found, ("cat", "eel", "dog", "fox"))
    wanted = tiny_config(*DISTILL, f"distill.teacher={run}", "model.classes=3")
    with pytest.raises(UserError, match=r"has 4 classes, the student model\.classes=3"):
        make_setup(wanted)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["objective=distillation"], "objective=distillation needs --config.distill.teacher=RUN"),
        (["distill.teacher=x"], "distill.teacher=x has nothing to teach"),
        (["objective=distillation", "distill.teacher=none"], "none is not a run folder"),
        (["distill.kind=softly"], "distill.kind='softly' is unknown; did you mean soft"),
        (["distill.weight=0.0"], "distill.weight=0.0 must be above 0 and at most 1"),
        (["distill.weight=1.5"], "distill.weight=1.5 must be above 0 and at most 1"),
        (["distill.temperature=0.0"], "distill.temperature=0.0 must be above 0 and finite"),
        (
            ["model.distilled=True", "model.pool=gap"],
            "model.distilled=True needs pool=cls, not gap",
        ),
    ],
)
def test_what_teaches_nothing_is_refused(overrides, message):
    with pytest.raises(UserError) as caught:
        make_setup(tiny_config(*overrides))
    assert message in str(caught.value) and "\n" not in str(caught.value)
