"""What a JAX function does, before it is compiled."""

import jax
import jax.numpy as jnp


def equations(jaxpr, times=1):
    """All of a program, those of inner programs included, and how often each one runs."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        for parameter in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, 'jaxpr')):
            inner = getattr(parameter, 'jaxpr', parameter)
            if hasattr(inner, 'eqns'):
                yield from equations(inner, times * eqn.params.get('length', 1))


def largest_array(function, *arrays):
    """Elements of the largest array that a program makes."""
    jaxpr = jax.make_jaxpr(function)(*arrays).jaxpr
    return max(v.aval.size for eqn, _ in equations(jaxpr) for v in eqn.outvars)


def all_gradients(function):
    return jax.grad(lambda *x: jnp.sum(function(*x) ** 2), argnums=(0, 1, 2))
