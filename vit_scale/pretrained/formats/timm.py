"""timm's VisionTransformer, and DeiT's, which has the same keys: PyTorch layouts, fused q, k and v.

[CLS] has a position embedding, the first row, except in models with no_embed_class, such as
DeiT III. LayerScale is folded into the layers before it.
"""

from vit_scale.pretrained.key_mapping import KeyMapping, WeightFormat

ATTENTION = "blocks/{i}/attention/"
MAPPINGS = (
    KeyMapping("embed/kernel", "patch_embed.proj.weight", "patches"),
    KeyMapping("embed/bias", "patch_embed.proj.bias"),
    KeyMapping("cls", "cls_token", "token"),
    KeyMapping("dist", "dist_token", "token"),
    KeyMapping("posemb", "pos_embed", "first"),
    KeyMapping("blocks/{i}/norm1/scale", "blocks.{i}.norm1.weight"),
    KeyMapping("blocks/{i}/norm1/bias", "blocks.{i}.norm1.bias"),
    KeyMapping(
        (ATTENTION + "query/kernel", ATTENTION + "key/kernel", ATTENTION + "value/kernel"),
        "blocks.{i}.attn.qkv.weight",
        "to_heads",
    ),
    KeyMapping(
        (ATTENTION + "query/bias", ATTENTION + "key/bias", ATTENTION + "value/bias"),
        "blocks.{i}.attn.qkv.bias",
        "heads",
    ),
    KeyMapping(ATTENTION + "out/kernel", "blocks.{i}.attn.proj.weight", "from_heads"),
    KeyMapping(ATTENTION + "out/bias", "blocks.{i}.attn.proj.bias"),
    KeyMapping("blocks/{i}/norm2/scale", "blocks.{i}.norm2.weight"),
    KeyMapping("blocks/{i}/norm2/bias", "blocks.{i}.norm2.bias"),
    KeyMapping("blocks/{i}/mlp/up/kernel", "blocks.{i}.mlp.fc1.weight", "linear"),
    KeyMapping("blocks/{i}/mlp/up/bias", "blocks.{i}.mlp.fc1.bias"),
    KeyMapping("blocks/{i}/mlp/down/kernel", "blocks.{i}.mlp.fc2.weight", "linear"),
    KeyMapping("blocks/{i}/mlp/down/bias", "blocks.{i}.mlp.fc2.bias"),
    KeyMapping("norm/scale", "norm.weight"),
    KeyMapping("norm/bias", "norm.bias"),
    KeyMapping("pool/probe", "attn_pool.latent", "first"),
    KeyMapping("pool/query/kernel", "attn_pool.q.weight", "to_heads"),
    KeyMapping("pool/query/bias", "attn_pool.q.bias", "heads"),
    KeyMapping(("pool/key/kernel", "pool/value/kernel"), "attn_pool.kv.weight", "to_heads"),
    KeyMapping(("pool/key/bias", "pool/value/bias"), "attn_pool.kv.bias", "heads"),
    KeyMapping("pool/out/kernel", "attn_pool.proj.weight", "from_heads"),
    KeyMapping("pool/out/bias", "attn_pool.proj.bias"),
    KeyMapping("pool/norm/scale", "attn_pool.norm.weight"),
    KeyMapping("pool/norm/bias", "attn_pool.norm.bias"),
    KeyMapping("pool/mlp/up/kernel", "attn_pool.mlp.fc1.weight", "linear"),
    KeyMapping("pool/mlp/up/bias", "attn_pool.mlp.fc1.bias"),
    KeyMapping("pool/mlp/down/kernel", "attn_pool.mlp.fc2.weight", "linear"),
    KeyMapping("pool/mlp/down/bias", "attn_pool.mlp.fc2.bias"),
    KeyMapping("representation/kernel", "pre_logits.fc.weight", "linear"),  # timm before 0.7
    KeyMapping("representation/bias", "pre_logits.fc.bias"),
    KeyMapping("head/kernel", "head.weight", "linear"),
    KeyMapping("head/bias", "head.bias"),
    KeyMapping("head_dist/kernel", "head_dist.weight", "linear"),
    KeyMapping("head_dist/bias", "head_dist.bias"),
)

TIMM = WeightFormat(
    name="timm",
    title="timm or DeiT",
    signature=r"patch_embed\.proj\.weight",
    mappings=MAPPINGS,
    model={"gelu": "exact", "norm_epsilon": 1e-6},
    augment={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    eval={"fit": "shorter", "crop": 0.9, "resample": "bicubic"},
    no_class_positions=(r"\.gamma_1\b", r"\.ls1\.gamma\b"),
    # Of MAE, DINO and MoCo. A head of several layers is a projection head, not a classifier.
    unused=r"mask_token$|masked_embed$|decoder_|head\.\d|predictor\.|(dino|ibot)_head\.",
    fc_norm=("fc_norm", "norm"),
    ambiguous_pool=True,
    aliases=(
        (r"\.gamma_([12])$", r".ls\1.gamma"),  # DeiT III's repository
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2: blocks in chunks
    ),
    layer_scales=(
        ("blocks.{i}.ls1.gamma", "blocks.{i}.attn.proj"),
        ("blocks.{i}.ls2.gamma", "blocks.{i}.mlp.fc2"),
    ),
)
