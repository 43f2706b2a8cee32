"""Muon: the momentum of every matrix inside a network, replaced by the nearest orthogonal matrix.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". Newton and
Schulz's iteration, which finds that matrix, is Optax's; here the matrices are shared out over the
devices of a training, which would otherwise all do the same work.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax import lax

# Makes the entries of an update as large as AdamW's usually are, so that both take the same
# learning rates and the same weight decay (Liu et al. 2025, arXiv 2502.16982).
_RMS = 0.2


def matrices(params) -> object:
    """Which parameters are matrices inside the network, and which of their axes are summed over.

    Returns:
      A tree like `params`: `optax.contrib.MuonDimensionNumbers` for the kernels of dense,
      multi-head and convolutional layers (a convolution's sums over its window and the channels)
      and of fθ (one for each head, where heads have their own); None for the head, whose rows are
      classes, and for all that is not a kernel.
    """

    def dimension_numbers(path, value):
        module, name = ([''] + [key.key for key in path])[-2:]
        if not name.endswith('kernel') or module == 'head':
            return None
        if name in ('hidden_kernel', 'output_kernel'):  # Of fθ: [D, R], or [H, D, R].
            return optax.contrib.MuonDimensionNumbers((value.ndim - 2,), (value.ndim - 1,))
        if value.ndim == 3 and module != 'out':
            return optax.contrib.MuonDimensionNumbers((0,), (1, 2))  # [C, H, D]
        return optax.contrib.MuonDimensionNumbers(tuple(range(value.ndim - 1)), (value.ndim - 1,))

    return jax.tree.map_with_path(dimension_numbers, params)


def scale_by_muon(momentum: float, axis_name: str | None) -> optax.GradientTransformation:
    """The direction of Muon's update for `matrices`, and of Adam's in Nesterov's form for the rest.

    For a matrix of m×n with the gradient g: t ← g + momentum·t, and the direction is
    0.2·√max(m, n)·UVᵀ, where USVᵀ = g + momentum·t (Nesterov's form). Optax's iteration leaves
    singular values between 0.7 and 1.2 or so where UVᵀ has ones, and tiny ones small.

    Args:
      momentum: from 0 to below 1.
      axis_name: an axis that `update` is mapped over, on which gradients are the same; every device
        then takes a share of the matrices. None: there is none.
    """

    def labels(params):
        return jax.tree.map(
            lambda x: 'adam' if x is None else 'muon',
            matrices(params),
            is_leaf=lambda x: x is None or _is_dimension_numbers(x),
        )

    muon = optax.chain(optax.trace(momentum, nesterov=True), _orthogonalize(axis_name))
    return optax.partition({'muon': muon, 'adam': optax.scale_by_adam(nesterov=True)}, labels)


def _is_dimension_numbers(x) -> bool:
    return isinstance(x, optax.contrib.MuonDimensionNumbers)


def _orthogonalize(axis_name: str | None) -> optax.GradientTransformation:
    """Each matrix USVᵀ becomes 0.2·√max(m, n)·UVᵀ."""

    def update(updates, state, params=None):
        del params
        values, tree = jax.tree.flatten(updates)
        axes = jax.tree.leaves(matrices(updates), is_leaf=_is_dimension_numbers)

        def one(i):
            # Optax's Muon without a momentum of its own.
            muon = optax.contrib.scale_by_muon(
                beta=0.0, nesterov=False, weight_dimension_numbers=axes[i]
            )
            direction, _ = muon.update(values[i], muon.init(values[i]))
            return _RMS * math.sqrt(max(_sides(values[i], axes[i]))) * direction

        devices = lax.axis_size(axis_name) if axis_name else 1
        if devices == 1:
            values = [one(i) for i in range(len(values))]
        else:
            owners = _share_out([_cost(x, a) for x, a in zip(values, axes, strict=True)], devices)
            shares = [
                lambda device=device: [
                    one(i) if owner == device else jnp.zeros_like(values[i])
                    for i, owner in enumerate(owners)
                ]
                for device in range(devices)
            ]
            values = lax.psum(lax.switch(lax.axis_index(axis_name), shares), axis_name)
        return jax.tree.unflatten(tree, values), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _sides(value: jax.Array, axes: optax.contrib.MuonDimensionNumbers) -> tuple[int, int]:
    """m and n of a kernel as a matrix, or as several."""
    return tuple(
        math.prod(value.shape[axis] for axis in part)
        for part in (axes.reduction_axis, axes.output_axis)
    )


def _cost(value: jax.Array, axes: optax.contrib.MuonDimensionNumbers) -> int:
    """Multiplications of one product of the iteration: several of these make a step of it."""
    return value.size * min(_sides(value, axes))


def _share_out(costs: list[int], devices: int) -> list[int]:
    """The device of each matrix: the costliest first, each to the device with the least so far."""
    loads = [0] * devices
    owners = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners
