"""mesh: its axes over devices and slices, the compiler's options, and the refusals' arithmetic."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from vit_scale.config import base
from vit_scale.distributed.mesh import abstract_mesh, compiler_options, cpu_options, make_mesh
from vit_scale.errors import UserError


def mesh_block(data=-1, fsdp=1, tensor=1, **slices):
    cfg = base().mesh
    cfg.update({"data": data, "fsdp": fsdp, "tensor": tensor, **slices})
    return cfg


def mesh_of(platform: str):
    devices = np.array([types.SimpleNamespace(platform=platform)], object)
    return types.SimpleNamespace(devices=devices)


def test_options_are_for_the_compiler_of_tpus():
    cfg = base().mesh
    cfg.compiler = ("xla_a=1", "xla_b=c=d")
    assert compiler_options(cfg, mesh_of("tpu")) == {"xla_a": "1", "xla_b": "c=d"}
    assert compiler_options(cfg, mesh_of("cpu")) is compiler_options(cfg, mesh_of("gpu")) is None


def test_a_cpus_compiler_optimizes_less(monkeypatch):
    cfg = base().mesh
    abstract = abstract_mesh(cfg, 8)
    assert cpu_options(mesh_of("cpu")) is None  # tests optimize nothing
    monkeypatch.setattr(jax.config, "read", lambda name: name != "jax_disable_most_optimizations")
    assert cpu_options(mesh_of("cpu")) == {"xla_backend_optimization_level": 1}
    assert compiler_options(cfg, mesh_of("cpu")) == cpu_options(mesh_of("cpu"))
    assert cpu_options(mesh_of("tpu")) is cpu_options(abstract) is None


@dataclasses.dataclass(frozen=True)
class Device:
    """The attributes of a device that a mesh is built from."""

    id: int
    slice_index: int
    process_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "any"


def pod(slices, devices):
    """`slices` slices of so many devices, each a process of its own."""
    places = [divmod(i, devices) for i in range(slices * devices)]
    return [Device(i, part, part, (at, 0, 0)) for i, (part, at) in enumerate(places)]


def test_each_axis_goes_over_devices_of_a_slice_and_over_slices():
    mesh = make_mesh(mesh_block(data=2, fsdp=2, slices_data=1, slices_fsdp=2), pod(2, 4))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    slices = [[device.slice_index for device in row] for row in mesh.devices[:, :, 0]]
    assert slices == [[0, 0, 1, 1]] * 2  # neighbours in a slice are neighbours on the axis
    assert {device.id for device in mesh.devices.flat} == set(range(8))


def test_the_batch_goes_over_slices_unless_told_otherwise():
    mesh = make_mesh(mesh_block(data=1, fsdp=4), pod(2, 4))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert [device.slice_index for device in mesh.devices[:, 0, 0]] == [0, 1]


def test_a_machine_with_gpus_is_a_slice_only_where_an_axis_spans_several():
    devices = [dataclasses.replace(device, platform="gpu") for device in pod(2, 4)]
    mesh = make_mesh(mesh_block(data=1, fsdp=4, slices_data=2), devices)
    assert [device.process_index for device in mesh.devices[:, 0, 0]] == [0, 1]
    mesh = make_mesh(mesh_block(data=1, fsdp=8), devices)
    assert [device.id for device in mesh.devices[0, :, 0]] == list(range(8))


def test_an_abstract_mesh_is_that_of_as_many_devices():
    for block, slices in ((mesh_block(fsdp=2), 1), (mesh_block(tensor=2, slices_fsdp=2), 2)):
        result, made = abstract_mesh(block, 8), make_mesh(block, pod(slices, 8 // slices))
        assert dict(result.shape) == dict(made.shape)
        assert result.axis_types == made.axis_types
    with pytest.raises(UserError, match="9 devices cannot be divided into 2 equal slices"):
        abstract_mesh(mesh_block(slices_data=2), 9)


# Refusals

REFUSALS = [
    ((3, 1, 1), 8, "mesh data=3 x fsdp=1 x tensor=1 = 3 devices, but there are 8"),
    ((4, 2, 2), 8, "mesh data=4 x fsdp=2 x tensor=2 = 16 devices, but there are 8"),
    ((-1, 3, 1), 8, "mesh data=-1 x fsdp=3 x tensor=1: 8 devices are not divisible by 3"),
    ((-1, 16, 1), 8, "mesh data=-1 x fsdp=16 x tensor=1: 8 devices are not divisible by 16"),
    ((-1, -1, 1), 8, "mesh data=-1 x fsdp=-1 x tensor=1: only one size can be -1"),
    ((0, 1, 8), 8, "mesh data=0 x fsdp=1 x tensor=8: every size must be at least 1, or -1"),
    ((-2, 1, 1), 8, "mesh data=-2 x fsdp=1 x tensor=1: every size must be at least 1, or -1"),
]


@pytest.mark.parametrize(("sizes", "devices", "message"), REFUSALS)
def test_refuses_a_mesh_that_does_not_fit(sizes, devices, message):
    with pytest.raises(UserError) as caught:
        make_mesh(mesh_block(*sizes), devices=pod(1, devices))
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ({"slices_data": 3}, "mesh slices data=3 x fsdp=1 x tensor=1 = 3 slices, but there are 2"),
        ({"slices_fsdp": 4}, "mesh slices data=-1 x fsdp=4 x tensor=1: 2 slices are not divisible"),
        ({"slices_tensor": -1}, "mesh slices data=-1 x fsdp=1 x tensor=-1: only one size can be"),
    ],
)
def test_refuses_slices_that_are_not_there(slices, message):
    with pytest.raises(UserError) as caught:
        make_mesh(mesh_block(**slices), devices=pod(2, 4))
    assert str(caught.value).startswith(message)


def test_one_device():
    mesh = make_mesh(mesh_block(), jax.devices()[:1])
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "tensor": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 3
