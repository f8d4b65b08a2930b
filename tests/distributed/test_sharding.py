"""sharding: the spec of every leaf, and what goes to which device. Several devices: tests/laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vit_scale.config import base
from vit_scale.distributed.mesh import AXES, make_mesh
from vit_scale.distributed.sharding import (
    batch_sharding,
    check_batch,
    device_bytes,
    shard,
    shard_batch,
    shardings,
)
from vit_scale.errors import UserError
from vit_scale.models.build import build
from vit_scale.models.lora import adapted
from vit_scale.models.parameters import named
from vit_scale.training.optimizer import make_optimizer


def abstract_of(data, fsdp, tensor):
    """A mesh of any number of devices, without devices."""
    return AbstractMesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def model_block(**fields):
    cfg = base().model
    cfg.update({"variant": "Ti/4", "width": 8, "depth": 3, "heads": 2, "mlp": 16, "classes": 5})
    cfg.update(fields)
    return cfg


def shapes(**fields):
    return build(model_block(**fields), (8, 8)).abstract_params


def specs(tree, mesh):
    return {name: sharding.spec for name, sharding in named(shardings(tree, mesh)).items()}


# The table

SPLIT = {  # on 2 x 2 x 2, with unrolled blocks; every other parameter is whole everywhere
    "embed/kernel": P(None, None, None, "fsdp"),
    "posemb": P(None, None, "fsdp"),
    "query/kernel": P("fsdp", "tensor"),
    "query/bias": P("tensor"),
    "key/kernel": P("fsdp", "tensor"),
    "key/bias": P("tensor"),
    "value/kernel": P("fsdp", "tensor"),
    "value/bias": P("tensor"),
    "attention/out/kernel": P("tensor", None, "fsdp"),
    "mlp/up/kernel": P("fsdp", "tensor"),
    "mlp/up/bias": P("tensor"),
    "mlp/down/kernel": P("tensor", "fsdp"),
    "pool/out/kernel": P("tensor", None, "fsdp"),
    "head/kernel": P("fsdp"),
    "representation/kernel": P("fsdp"),
}


def expected(name):
    return next((spec for end, spec in SPLIT.items() if f"/{name}".endswith(f"/{end}")), P())


def test_every_unrolled_parameter():
    result = specs(shapes(scan=False, pool="map", representation=8), abstract_of(2, 2, 2))
    assert result == {name: expected(name) for name in result}
    used = {end for end in SPLIT for name in result if f"/{name}".endswith(f"/{end}")}
    assert used == SPLIT.keys()


def test_the_layer_axis_of_stacked_blocks_is_never_split():
    for depth in (2, 4):  # which fsdp and tensor would divide
        result = specs(shapes(scan=True, depth=depth), abstract_of(2, 2, 2))
        for name, spec in result.items():
            whole = expected(name)
            stacked = name.startswith("blocks/") and whole != P()
            assert spec == (P(None, *whole) if stacked else whole), name


@pytest.mark.parametrize("scan", [True, False])
def test_an_adapter_lies_so_that_its_product_lies_like_its_kernel(scan):
    """A has the input axes of the kernel, B the output axes, and the rank is whole."""
    cfg = base()
    cfg.lora.update({"rank": 2, "kernels": "kernel$"})
    cfg.model.update({"variant": "Ti/4", "width": 16, "depth": 2, "heads": 2, "mlp": 32})
    cfg.model.update({"scan": scan, "swiglu": True, "pool": "map"})
    model = adapted(build(cfg.model, (8, 8)), cfg.lora)
    result = specs(model.abstract_params, abstract_of(2, 2, 2))
    shape = named(model.abstract_params)
    modules = [name.rpartition("/")[0] for name in result if name.endswith("lora_a")]
    assert len(modules) == 7 * (1 if scan else 2) + 6  # of blocks, and of pooling, without a gate

    def axes(name):
        return [*result[name], *[None] * (len(shape[name].shape) - len(result[name]))]

    for module in modules:
        a, b, kernel = (axes(f"{module}/{leaf}") for leaf in ("lora_a", "lora_b", "kernel"))
        layer = len(a) + len(b) - 2 - len(kernel)
        assert kernel == a[:-1] + b[1 + layer :], module
        assert {"fsdp", "tensor"} <= {*kernel} and a[-1] is b[layer] is None


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "muon"])
def test_optimizer_state_lies_with_its_parameter(optimizer):
    params, cfg = shapes(), base().optim
    cfg.update({"name": optimizer, "freeze": ("^norm/",)})
    state = jax.eval_shape(make_optimizer(cfg, 10, params)[0].init, params)
    mesh = abstract_of(2, 2, 2)
    by_parameter, result = specs(params, mesh), specs(state, mesh)
    owned = 0
    for path, spec in result.items():
        owner = [name for name in by_parameter if path.endswith(f"/{name}")]
        assert spec == (by_parameter[max(owner, key=len)] if owner else P()), path
        owned += bool(owner)
    assert owned >= len(by_parameter) - 2


def test_a_dimension_that_does_not_divide_is_whole():
    """3 heads over tensor=2: attention is not split over it, the MLP is."""
    result = specs(shapes(width=12, heads=3, scan=False), abstract_of(1, 2, 2))
    assert result["blocks/0/attention/key/kernel"] == P("fsdp")
    assert result["blocks/0/attention/key/bias"] == P()
    assert result["blocks/0/attention/out/kernel"] == P(None, None, "fsdp")
    assert result["blocks/0/mlp/up/kernel"] == P("fsdp", "tensor")


def test_fsdp_falls_back_to_the_longest_dimension_that_divides():
    """Width 12 over fsdp=8: the MLP's 16 take it; heads of 6 do not, nor q, k, v, nor 5 classes."""
    result = specs(shapes(width=12, heads=2, scan=False), abstract_of(1, 8, 1))
    assert result["blocks/0/mlp/up/kernel"] == P(None, "fsdp")
    assert result["blocks/0/mlp/down/kernel"] == P("fsdp")
    assert result["blocks/0/attention/key/kernel"] == P()
    assert result["head/kernel"] == P()
    stacked = specs(shapes(width=12, heads=2, depth=8), abstract_of(1, 8, 1))
    assert stacked["blocks/mlp/down/kernel"] == P(None, "fsdp")
    with_tensor = specs(shapes(width=12, heads=2, mlp=32, scan=False), abstract_of(1, 8, 2))
    assert with_tensor["blocks/0/mlp/down/kernel"] == P("tensor")  # 32 are taken


def test_on_pure_data_parallelism_all_parameters_are_whole():
    assert set(specs(shapes(), abstract_of(8, 1, 1)).values()) == {P()}


def test_leaves_of_other_rank_or_name_are_whole():
    matrix, more = (jax.ShapeDtypeStruct((8,) * rank, jnp.float32) for rank in (2, 4))
    tree = {"mlp": {"up": {"kernel": more}}, "overhead": {"kernel": matrix}, "step": jnp.int32(0)}
    assert set(specs(tree, abstract_of(2, 2, 2)).values()) == {P()}


def test_batches_are_split_over_data_and_fsdp():
    mesh = abstract_of(2, 2, 2)
    assert batch_sharding(mesh) == NamedSharding(mesh, P(("data", "fsdp")))


def test_device_bytes_are_of_one_part():
    mesh = abstract_of(2, 4, 1)
    tree = {
        "mlp": {"up": {"kernel": jax.ShapeDtypeStruct((8, 6), jnp.bfloat16)}},
        "n": jnp.int32(0),
    }
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings(tree, mesh),
    )
    assert device_bytes(placed) == 8 * 6 * 2 // 4 + 4


def test_shard_sends_each_device_its_part():
    mesh = make_mesh(base().mesh, jax.devices()[:1])
    sharding = NamedSharding(mesh, P("data"))
    whole = np.arange(6.0).reshape(2, 3)
    (result,) = shard([whole], [sharding])
    assert result.sharding == sharding and np.array_equal(result, whole)
    assert shard([result], [sharding])[0] is result


def test_check_batch():
    check_batch("data.batch", 1008, abstract_of(8, 2, 1))
    check_batch("data.batch", 1024, abstract_of(8, 2, 1), accumulate=4)
    check_batch("data.batch", 6, abstract_of(2, 1, 4))  # tensor does not split the batch
    with pytest.raises(UserError) as caught:
        check_batch("data.batch", 1000, abstract_of(8, 2, 1))
    message = "data.batch=1000 is not divisible by 16 data shards (8 data x 2 fsdp)"
    assert str(caught.value) == message
    with pytest.raises(UserError) as caught:
        check_batch("data.batch", 1008, abstract_of(8, 2, 1), accumulate=4)
    message = "data.batch=1008 is not divisible by 64 = 4 micro-batches x 8 data x 2 fsdp"
    assert str(caught.value) == message
    with pytest.raises(UserError, match=r"data\.batch=0 must be"):
        check_batch("data.batch", 0, abstract_of(1, 1, 1))


def test_a_batch_goes_to_the_devices_as_it_is():
    mesh = make_mesh(base().mesh, jax.devices()[:1])
    host = {
        "image": np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3),
        "mask": np.array([True, False]),
    }
    batch = shard_batch(host, mesh, 2)
    for name, array in batch.items():
        assert array.sharding == batch_sharding(mesh) and array.dtype == host[name].dtype
        assert np.array_equal(array, host[name])
