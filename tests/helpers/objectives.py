"""Tiny configs of every self-supervised objective, each with all of its switches on."""

CROPS = ("augment.crop=resized", "augment.flip=True", "views.locals=2", "views.local_resolution=8")
VIT = ("model.classes=0", "model.variant=Ti/4", "eval.split=", "eval.final=")
HEAD = ("dino.prototypes=24", "dino.hidden=16", "dino.bottleneck=8")
SELF_SUPERVISED = {
    "mae": ("objective=mae", *VIT, "mae.width=8", "mae.depth=1", "mae.heads=2"),
    "ibot": (
        *("objective=dino", *VIT, *CROPS, *HEAD, "dino.ibot=1.0", "dino.koleo=0.1"),
        *("dino.freeze_prototypes=1", "dino.momentum=0.9", "dino.teacher_warmup=3"),
        "dino.teacher_temperature=0.07",
    ),
    "dinov2": (
        *("objective=dino", *VIT, *CROPS, *HEAD, "dino.ibot=1.0", "dino.ibot_head=own"),
        *("dino.centring=sinkhorn", "dino.momentum=0.9", "dino.mask_share=1.0"),
    ),
    "lejepa": (
        *("objective=lejepa", *VIT, *CROPS),
        *("lejepa.hidden=16", "lejepa.width=8", "lejepa.slices=16"),
    ),
}
