"""timm's VisionTransformer and DeiT's, which it began as: PyTorch's layouts, fused q, k and v.

[CLS] has a position of its own, the first, except where the models say no_embed_class, as DeiT III,
whose LayerScale is multiplied into the layers before it.
"""

from vit_scale.pretrained.key_mapping import Rule, WeightFormat

ATTENTION = "blocks/{i}/attention/"
RULES = (
    Rule("embed/kernel", "patch_embed.proj.weight", "patches"),
    Rule("embed/bias", "patch_embed.proj.bias"),
    Rule("cls", "cls_token", "token"),
    Rule("dist", "dist_token", "token"),
    Rule("posemb", "pos_embed", "first"),
    Rule("blocks/{i}/norm1/scale", "blocks.{i}.norm1.weight"),
    Rule("blocks/{i}/norm1/bias", "blocks.{i}.norm1.bias"),
    Rule(
        (ATTENTION + "query/kernel", ATTENTION + "key/kernel", ATTENTION + "value/kernel"),
        "blocks.{i}.attn.qkv.weight",
        "to_heads",
    ),
    Rule(
        (ATTENTION + "query/bias", ATTENTION + "key/bias", ATTENTION + "value/bias"),
        "blocks.{i}.attn.qkv.bias",
        "heads",
    ),
    Rule(ATTENTION + "out/kernel", "blocks.{i}.attn.proj.weight", "from_heads"),
    Rule(ATTENTION + "out/bias", "blocks.{i}.attn.proj.bias"),
    Rule("blocks/{i}/norm2/scale", "blocks.{i}.norm2.weight"),
    Rule("blocks/{i}/norm2/bias", "blocks.{i}.norm2.bias"),
    Rule("blocks/{i}/mlp/up/kernel", "blocks.{i}.mlp.fc1.weight", "linear"),
    Rule("blocks/{i}/mlp/up/bias", "blocks.{i}.mlp.fc1.bias"),
    Rule("blocks/{i}/mlp/down/kernel", "blocks.{i}.mlp.fc2.weight", "linear"),
    Rule("blocks/{i}/mlp/down/bias", "blocks.{i}.mlp.fc2.bias"),
    Rule("norm/scale", "norm.weight"),
    Rule("norm/bias", "norm.bias"),
    Rule("pool/probe", "attn_pool.latent", "first"),
    Rule("pool/query/kernel", "attn_pool.q.weight", "to_heads"),
    Rule("pool/query/bias", "attn_pool.q.bias", "heads"),
    Rule(("pool/key/kernel", "pool/value/kernel"), "attn_pool.kv.weight", "to_heads"),
    Rule(("pool/key/bias", "pool/value/bias"), "attn_pool.kv.bias", "heads"),
    Rule("pool/out/kernel", "attn_pool.proj.weight", "from_heads"),
    Rule("pool/out/bias", "attn_pool.proj.bias"),
    Rule("pool/norm/scale", "attn_pool.norm.weight"),
    Rule("pool/norm/bias", "attn_pool.norm.bias"),
    Rule("pool/mlp/up/kernel", "attn_pool.mlp.fc1.weight", "linear"),
    Rule("pool/mlp/up/bias", "attn_pool.mlp.fc1.bias"),
    Rule("pool/mlp/down/kernel", "attn_pool.mlp.fc2.weight", "linear"),
    Rule("pool/mlp/down/bias", "attn_pool.mlp.fc2.bias"),
    Rule("representation/kernel", "pre_logits.fc.weight", "linear"),  # until timm 0.6
    Rule("representation/bias", "pre_logits.fc.bias"),
    Rule("head/kernel", "head.weight", "linear"),
    Rule("head/bias", "head.bias"),
    Rule("head_dist/kernel", "head_dist.weight", "linear"),
    Rule("head_dist/bias", "head_dist.bias"),
)

TIMM = WeightFormat(
    name="timm",
    text="timm or DeiT",
    mark=r"patch_embed\.proj\.weight",
    rules=RULES,
    model={"gelu": "exact", "norm_epsilon": 1e-6},
    augment={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    view={"fit": "shorter", "crop": 0.9, "resample": "bicubic"},
    apart=(r"\.gamma_1\b", r"\.ls1\.gamma\b"),
    # MAE's, DINO's, MoCo's; a head of several layers is no class's, whosever it is.
    unused=r"mask_token$|masked_embed$|decoder_|head\.\d|predictor\.|(dino|ibot)_head\.",
    fc_norm=("fc_norm", "norm"),
    reads_both=True,
    aliases=(
        (r"\.gamma_([12])$", r".ls\1.gamma"),  # DeiT III's own code
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2's, in chunks
    ),
    scales=(
        ("blocks.{i}.ls1.gamma", "blocks.{i}.attn.proj"),
        ("blocks.{i}.ls2.gamma", "blocks.{i}.mlp.fc2"),
    ),
)
