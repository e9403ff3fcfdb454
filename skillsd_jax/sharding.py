"""A mesh of devices, and what lies where on it; without a mesh nothing here acts.

The axes: 'data' splits rows; 'fsdp' splits rows, and weights that are gathered where
they are used; 'tp' splits heads and hidden units. Weights, moments and adapters are
known by the names on their path, so a whole learner's state is laid out by one list.
The mesh is jax's own ambient one, entered with `over`.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from skillsd_jax import config as settings

PyTree = Any
Axes = str | tuple[str, ...] | None

ROWS = ("data", "fsdp")
AXES = (*ROWS, "tp")
HEAD = ("tp", "fsdp")  # the width of embedding and head

# What a path ends with → the axes that split its last dimensions; those before them,
# such as the layers of a stack, are whole. The vocabulary is never split: it is walked
# through part by part (models/scoring.py), and may have any size.
RULES: tuple[tuple[str, tuple[Axes, ...]], ...] = (
    (r"\b(embed|head)$", (None, HEAD)),
    (r"\b(output|down)/kernel$", ("tp", "fsdp")),
    (r"/kernel$", ("fsdp", "tp")),
    (r"\b(output|down)/lora_down$", ("tp", None)),
    (r"\b(output|down)/lora_up$", (None, "fsdp")),
    (r"/lora_down$", ("fsdp", None)),
    (r"/lora_up$", (None, "tp")),
    (r"/bias$", ("tp",)),
    (r"(norm|/scale)$", ()),
    (r"/ns_coeffs$", ()),  # muon's polynomial
)


def make(
    setting: settings.Mesh, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh | None:
    """The mesh that is set, or None where one device is enough.

    Args:
      setting: sizes of the axes; data=0 takes all devices that are left. In a job of
        several processes a mesh of one device is one of all.
      devices: None: all that jax sees, of every process.

    Raises:
      ValueError: there are fewer devices, or data=0 leaves a part of them over.
    """
    devices = jax.devices() if devices is None else devices
    there, inner = len(devices), setting.fsdp * setting.tp
    many = len({device.process_index for device in devices}) > 1
    if many and setting.data == inner == 1:
        setting = dataclasses.replace(setting, data=0)
    if not setting.data and there % inner:
        raise ValueError(
            f"mesh.fsdp × mesh.tp = {inner} must divide the {there} devices for "
            "mesh.data=0 to take the rest; change one of them"
        )
    sizes = setting.data or there // inner, setting.fsdp, setting.tp
    wanted = math.prod(sizes)
    if wanted > there:
        named = " × ".join(f"mesh.{axis}={n}" for axis, n in zip(AXES, sizes) if n > 1)
        raise ValueError(
            f"{named} asks for {wanted} devices and jax sees {there}; make their product "
            f"at most {there}, or set mesh.data=0 to take what fsdp × tp leaves"
        )
    if many and wanted < there:
        raise ValueError(
            f"the mesh takes {wanted} devices, and the processes of the job have {there}: "
            "each has its part in the work; set mesh.data=0 to take what fsdp × tp leaves"
        )
    if wanted == 1:
        return None
    # Explicit axes, the default, refuse gathers.
    return jax.make_mesh(
        sizes, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:wanted]
    )


def over(setting: settings.Mesh) -> contextlib.AbstractContextManager:
    """In this context everything runs over the mesh that is set."""
    mesh = make(setting)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def own() -> contextlib.AbstractContextManager:
    """In this context everything runs over this process's own devices.

    In a job of one process these are those of the mesh: nothing changes.
    """
    if jax.process_count() == 1:
        return contextlib.nullcontext()
    devices = jax.local_devices()
    mesh = jax.make_mesh(
        (len(devices), 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
    )
    return jax.set_mesh(mesh)


def mine(tree: PyTree) -> PyTree:
    """Weights of the mesh as whole copies on this process's own devices, for `own`."""
    if jax.process_count() == 1:
        return tree
    whole = _whole(tree)
    with own():
        where = _sharding(PartitionSpec())

    def one(x):
        parts = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, where, parts)

    return jax.tree.map(one, whole)


def sizes() -> Mapping[str, int]:
    """Devices along each axis of the present mesh; empty without one."""
    shape = jax.sharding.get_abstract_mesh().shape
    return shape if tuple(shape) == AXES else {}


def ways(axes: Axes = ROWS) -> int:
    """Into how many parts the axes split; 1 without a mesh."""
    return _product(axes, sizes())


def spec(
    path: str, shape: Sequence[int], sizes: Mapping[str, int], whole: Axes = None
) -> PartitionSpec:
    """Where a parameter, or what mirrors one, lies.

    Args:
      path: names from the root, '/' between them.
      shape: of the array.
      sizes: devices along each axis.
      whole: axes that do not split.

    Raises:
      ValueError: no rule knows it, or an axis does not divide it.
    """
    if not shape:
        return PartitionSpec()
    for pattern, axes in RULES:
        if re.search(pattern, path):
            break
    else:
        raise ValueError(f"no rule of sharding.RULES says where {path} lies")
    kept = [_names(entry, whole) for entry in axes]
    for size, names in zip(shape[len(shape) - len(kept) :], kept):
        if size % _product(names, sizes):
            raise ValueError(_indivisible(path, shape, size, names, sizes))
    return _trimmed([None] * (len(shape) - len(kept)) + kept)


def check(shapes: PyTree, sizes: Mapping[str, int]) -> None:
    """Raises ValueError unless every leaf has a rule and can be split by it."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        spec(_name(path), leaf.shape, sizes)


def laid(tree: PyTree, whole: Axes = None) -> PyTree:
    """Weights, moments or a learner's state as RULES lay them; inside jit as well."""
    if not sizes():
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.lax.with_sharding_constraint(
            x, spec(_name(path), x.shape, sizes(), whole)
        ),
        tree,
    )


def shardings(tree: PyTree) -> PyTree | None:
    """Of weights or of their shapes, for what loads them; None without a mesh."""
    if not sizes():
        return None
    return jax.tree_util.tree_map_with_path(
        lambda path, x: _sharding(spec(_name(path), x.shape, sizes())), tree
    )


def put(tree: PyTree) -> PyTree:
    """Weights from the host or from any devices to where RULES lay them."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree)):
        return laid(tree)
    where = shardings(tree)
    return tree if where is None else jax.tree.map(_put, tree, where)


def put_whole(tree: PyTree) -> PyTree:
    """Arrays from the host, the same on every device."""
    where = whole_shardings(tree)
    return tree if where is None else jax.tree.map(_put, tree, where)


def whole_shardings(tree: PyTree) -> PyTree | None:
    """Of arrays, or of their shapes, that are the same on every device."""
    if not sizes():
        return None
    return jax.tree.map(lambda x: _sharding(PartitionSpec()), tree)


def made(make: Callable[..., PyTree], *arguments) -> PyTree:
    """make(*arguments), laid out: no device ever holds the whole of it."""
    if not sizes():
        return make(*arguments)
    return jax.jit(lambda *arguments: laid(make(*arguments)))(*arguments)


def replicated(tree: PyTree) -> PyTree:
    """The same on every device."""
    if not sizes():
        return tree
    constrain = jax.lax.with_sharding_constraint
    return jax.tree.map(lambda x: constrain(x, PartitionSpec()), tree)


def rows(x: jax.Array, *rest: Axes) -> jax.Array:
    """Rows first, then what `rest` names; a dimension that cannot be split is whole."""
    return split(x, ROWS, *rest)


def split(x: jax.Array, *axes: Axes) -> jax.Array:
    """Its first dimensions over `axes`, each where that divides it."""
    present = sizes()
    if not present:
        return x
    kept = [
        names if size % _product(names, present) == 0 else None
        for size, names in zip(x.shape, axes)
    ]
    return jax.lax.with_sharding_constraint(x, _trimmed(kept))


def looked_up(x: jax.Array) -> jax.Array:
    """Rows of a table whose width HEAD splits: from there to whole, each where it is.

    An axis at a time: of one leap the compiler makes the whole of all rows everywhere.
    """
    between = (None,) * (x.ndim - 2)
    return rows(split(x, ROWS, *between, "tp"))


def by_heads(
    attend: Callable[..., jax.Array], *arrays: jax.Array, axis: int = 2
) -> jax.Array:
    """attend(q, k, v, …) on each device's own rows and heads.

    For kernels that the compiler cannot divide. Key heads that 'tp' does not divide
    are whole on every device, and the query heads with them.

    Args:
      arrays: rows first; the result lies as the first of them.
      axis: of the heads, in those that have so many; others are of rows alone.
    """
    present = sizes()
    if not present:
        return attend(*arrays)
    headed = [x.shape[axis] for x in arrays if x.ndim > axis]
    tp = "tp" if all(heads % present["tp"] == 0 for heads in headed) else None
    by_row = None if arrays[0].shape[0] % ways() else ROWS
    whole = (by_row, *[None] * (axis - 1), tp)
    where = tuple(PartitionSpec(*whole[: x.ndim]) for x in arrays)
    # A kernel's result does not say over which axes it varies.
    return jax.shard_map(attend, in_specs=where, out_specs=where[0], check_vma=False)(
        *arrays
    )


_whole = jax.jit(lambda tree: replicated(tree))


def _trimmed(axes: Sequence[Axes]) -> PartitionSpec:
    """As jit writes the shardings of its results: others would be compiled for anew."""
    last = max((i for i, names in enumerate(axes) if names), default=-1)
    return PartitionSpec(*axes[: last + 1])


def _names(axes: Axes, whole: Axes) -> Axes:
    """`axes` without those of `whole`."""
    left = tuple(axis for axis in _tuple(axes) if axis not in _tuple(whole))
    return left if len(left) > 1 else (left[0] if left else None)


def _tuple(axes: Axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else (axes or ())


def _product(axes: Axes, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes.get(axis, 1) for axis in _tuple(axes))


def _indivisible(path, shape, size, names, sizes) -> str:
    named = " × ".join(f"mesh.{axis}" for axis in _tuple(names))
    fits = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0 and n <= 256)
    return (
        f"{path} {list(shape)}: {named} = {_product(names, sizes)} does not divide its "
        f"{size}; set {named} to one of {fits}"
    )


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _sharding(where: PartitionSpec) -> NamedSharding:
    return NamedSharding(jax.sharding.get_mesh(), where)


def _put(x, where: NamedSharding) -> jax.Array:
    if jax.process_count() > 1 and getattr(x, "is_fully_addressable", False):
        x = np.asarray(x)  # of this process alone, and the same in all
    if not isinstance(x, np.ndarray):
        return jax.device_put(x, where)
    # Every process hands over what its own devices hold.
    return jax.make_array_from_callback(x.shape, where, functools.partial(_part, x))


def _part(x: np.ndarray, index) -> np.ndarray:
    return x[index]
