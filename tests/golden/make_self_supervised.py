"""Writes self_supervised.npz: losses of other libraries' objectives, and their gradients.

Run with numpy, torch, transformers (ViTMAE) and lightly (DINO, iBOT, KoLeo, Sinkhorn-Knopp,
LeJEPA):
    python tests/golden/make_self_supervised.py
Inputs are drawn by their names (draw_by_name.py) and not stored. Nothing here imports vit_scale.
"""

import pathlib

import numpy as np
import torch
import transformers
from draw_by_name import draw, draw_images
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.loss.lejepa_loss import SIGReg, lejepa_invariance_loss
from lightly.loss.swav_loss import sinkhorn
from lightly.models.modules.heads import DINOProjectionHead

FILE = pathlib.Path(__file__).with_name("self_supervised.npz")
CONTENT: dict[str, np.ndarray] = {}
STORED_GRADIENTS = (
    "vit.embeddings.cls_token",
    "vit.embeddings.patch_embeddings.projection.weight",
    "vit.layers.1.mlp.fc1.weight",
    "vit.layernorm.weight",
    "decoder.decoder_embed.weight",
    "decoder.mask_token",
    "decoder.decoder_norm.bias",
    "decoder.decoder_pred.weight",
)


def tensor(name: str, shape: tuple[int, ...], scale: float = 1.0) -> torch.Tensor:
    return torch.tensor(scale * draw(name, shape) / 0.3, requires_grad=True)


def store(name: str, value: torch.Tensor) -> None:
    CONTENT[name] = value.detach().numpy()


def table(width: int) -> torch.Tensor:
    """MAE's positions of [CLS] and 4 x 4 patches, which published files hold."""
    rates = 10_000.0 ** (-np.arange(width // 4) / (width / 4))
    y, x = np.divmod(np.arange(16), 4)
    angles = [np.outer(coordinate, rates) for coordinate in (x, y)]
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    rows = np.concatenate([np.zeros((1, width)), np.concatenate(waves, axis=1)])
    return torch.tensor(rows[None], dtype=torch.float32)


def masked_autoencoder(normalise: bool) -> None:
    """Of 2 images of 16 patches, 12 of them hidden by given noise."""
    config = transformers.ViTMAEConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=4,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=20,
        layer_norm_eps=1e-6,
        norm_pix_loss=normalise,
        attn_implementation="eager",
    )
    model = transformers.ViTMAEForPreTraining(config).eval()
    fixed = [name for name, value in model.named_parameters() if not value.requires_grad]
    state = {
        name: table(value.shape[-1])
        if name in fixed
        else torch.tensor(draw(f"mae/{name}", tuple(value.shape)))
        for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    images = torch.tensor(draw_images("mae", (16, 16))).permute(0, 3, 1, 2)
    noise = torch.tensor(np.abs(draw("mae/noise", (2, 16))))
    out = model(images, noise=noise)
    out.loss.backward()
    case = f"mae/{normalise}"
    store(f"{case}/loss", out.loss)
    store(f"{case}/hidden", out.mask)
    for name, value in model.named_parameters():
        if name in STORED_GRADIENTS:
            store(f"{case}/{name}", value.grad)
    CONTENT["mae/shapes"] = np.array(
        [f"{name} {','.join(map(str, value.shape))}" for name, value in state.items()]
    )


def self_distillation() -> None:
    """Two steps of DINO's loss on 2 global and 3 local crops of 4 images, 6 prototypes."""
    dino = DINOLoss(output_dim=6, teacher_temp=0.05, student_temp=0.1, warmup_teacher_temp_epochs=0)
    for step in range(2):
        teacher = [tensor(f"dino/{step}/teacher/{i}", (4, 6), 0.2) for i in range(2)]
        student = [tensor(f"dino/{step}/student/{i}", (4, 6), 0.2) for i in range(5)]
        value = dino([t.detach() for t in teacher], student)
        value.backward()
        store(f"dino/{step}/loss", value)
        store(f"dino/{step}/gradient", torch.stack([s.grad for s in student]))
        store(f"dino/{step}/centre", dino.center[0, 0])


def hidden_patches() -> None:
    """iBOT's loss of 3 images of 2 x 3 patches, of which 3, 1 and none are hidden."""
    mask = torch.tensor([[[1, 0, 1], [0, 1, 0]], [[0, 0, 0], [1, 0, 0]], [[0] * 3] * 2]).bool()
    ibot = IBOTPatchLoss(output_dim=5, teacher_temp=0.05, student_temp=0.1)
    ibot.center.center.copy_(torch.tensor(draw("ibot/centre", (1, 5))))
    teacher = tensor("ibot/teacher", (3, 6, 5), 0.2)
    student = tensor("ibot/student", (3, 6, 5), 0.2)
    flat = mask.flatten(1)
    value = ibot(teacher[flat].detach(), student[flat], mask)
    value.backward()
    store("ibot/loss", value)
    store("ibot/gradient", student.grad)
    store("ibot/centre", ibot.center.value[0])


def spread_and_assign() -> None:
    """KoLeo of 6 vectors, Sinkhorn-Knopp of 8 vectors and 5 prototypes, DINO's head."""
    x = tensor("koleo", (6, 4))
    value = KoLeoLoss()(x)
    value.backward()
    store("koleo/loss", value)
    store("koleo/gradient", x.grad)
    logits = tensor("sinkhorn", (8, 5), 0.1)
    store("sinkhorn", sinkhorn(logits.detach(), iterations=3, epsilon=0.05))
    head = DINOProjectionHead(4, 7, 3, 6).eval()
    for name, value in head.named_parameters():
        shape = tuple(value.shape)
        drawn = np.ones(shape) if name.endswith("weight_g") else draw(f"head/{name}", shape)
        value.data = torch.tensor(drawn, dtype=torch.float32)
    CONTENT["head/names"] = np.array([name for name, _ in head.named_parameters()])
    store("head", head(tensor("head", (5, 4))))


def lejepa() -> None:
    """SIGReg and agreement of 2 global and 2 local crops of 6 images; the projector."""
    directions = torch.tensor(draw("lejepa/directions", (3, 10)))
    vectors = tensor("lejepa", (4, 6, 3))
    sigreg = SIGReg(num_vectors=10)
    sigreg._generate_unit_vectors = lambda *_: directions / directions.norm(dim=0)
    for name, value in {
        "normality": sigreg(vectors),
        "disagreement": lejepa_invariance_loss(all_proj=vectors, global_proj=vectors[:2]),
    }.items():
        vectors.grad = None
        value.backward()
        store(f"lejepa/{name}", value)
        store(f"lejepa/{name}/gradient", vectors.grad)
    sizes, x = (4, 7, 3), tensor("projector", (5, 4))
    layers = [torch.nn.Linear(*sizes[:2]), torch.nn.BatchNorm1d(7), torch.nn.ReLU()]
    projector = torch.nn.Sequential(*layers, torch.nn.Linear(*sizes[1:]))
    for name, value in projector.named_parameters():
        value.data = torch.tensor(draw(f"projector/{name}", tuple(value.shape)))
    out = projector(x)
    (out**2).sum().backward()
    store("projector", out)
    store("projector/gradient", x.grad)


if __name__ == "__main__":
    masked_autoencoder(normalise=True)
    masked_autoencoder(normalise=False)
    self_distillation()
    hidden_patches()
    spread_and_assign()
    lejepa()
    np.savez_compressed(FILE, **CONTENT)
