"""Quadratic attention in plain NumPy float64, from the formulas: what the tests compare to."""

import math

import numpy as np

EPSILON = 1e-3
GELU_MINIMUM = -0.16997120747990369
SIGNED = ('identity', 'softmax_trigonometric')

# Of the terms that a normaliser sums: below it the quotient is mostly their rounding.
LEAST_SHARE = 0.05


def log_features(kernel, x, projection=None, theta=None, a=0.0, temperature=None):
    """log of the unnormalised φ(x) [..., N, H, R] (a factor common to all features cancels).

    Weights of fθ with a leading axis are those of groups of heads.
    """
    if theta is not None and np.ndim(theta['hidden_kernel']) == 3:
        heads, groups = x.shape[-2], len(theta['hidden_kernel'])
        maps = [{name: weight[g] for name, weight in theta.items()} for g in range(groups)]
        features = [
            log_features(
                kernel, x[..., h, :], theta=maps[h * groups // heads], temperature=temperature
            )
            for h in range(heads)
        ]
        return np.stack(features, axis=-2)
    x = scaled(x, temperature)
    if kernel in ('ftheta', 'ftheta_mixture'):
        theta = {name: np.asarray(weight, np.float64) for name, weight in theta.items()}
        hidden = np.maximum(x @ theta['hidden_kernel'] + theta['hidden_bias'], 0)
        u = hidden @ theta['output_kernel'] + theta['output_bias']
    else:
        u = x if projection is None else x @ np.asarray(projection, np.float64).T
    half_square = 0.5 * np.sum(x**2, axis=-1, keepdims=True)
    if kernel == 'softmax':
        return u - half_square
    if kernel == 'softmax_hyperbolic':
        return np.concatenate([u, -u], axis=-1) - half_square
    if kernel == 'softmax_optimal':
        square = np.sum(np.asarray(projection, np.float64) ** 2, axis=-1)
        return np.sqrt(1 - 4 * a) * u + a * square - half_square
    if kernel == 'exp':
        return np.clip(u, -15, 15)
    if kernel in ('relu', 'cosine', 'ftheta'):
        value = np.maximum(u, 0)
    elif kernel == 'gelu':
        value = u * 0.5 * (1 + np.vectorize(math.erf)(u / math.sqrt(2))) - GELU_MINIMUM
    elif kernel == 'elu':
        value = np.where(u > 0, u, np.expm1(np.minimum(u, 0))) + 1
    elif kernel == 'relu_squared':
        value = np.maximum(u, 0) ** 2
    elif kernel == 'sigmoid':
        value = 1 / (1 + np.exp(-u))
    elif kernel == 'softplus':
        value = np.logaddexp(0, u)
    elif kernel == 'ftheta_mixture':
        weight = 1 / (1 + np.exp(-theta['mixture_logit']))
        exponent = u / np.exp(theta['log_temperature']) - theta['norm_weight'] * half_square
        exponent = np.clip(exponent, -10, 10)
        value = weight * np.maximum(u, 0) + (1 - weight) * np.exp(exponent)
    else:
        value = kernel(u)
    return np.log(value + EPSILON)


def scaled(x, temperature):
    """x' = x/√τ in float64, τ = √D unless given."""
    x = np.asarray(x, np.float64)
    return x / math.sqrt(math.sqrt(x.shape[-1]) if temperature is None else temperature)


def signed_products(kernel, query, key, projection=None, temperature=None):
    """φ(q)·φ(k) [..., H, N, M] for features of both signs, and the keys' log scale."""
    query, key = (scaled(x, temperature) for x in (query, key))
    scale = 0.5 * np.sum(key**2, axis=-1)
    if projection is not None:
        query, key = (x @ np.asarray(projection, np.float64).T for x in (query, key))
    if kernel == 'identity':
        return np.einsum('...nhr,...mhr->...hnm', query, key), np.zeros(1)
    query, key = (np.concatenate([np.cos(x), np.sin(x)], axis=-1) for x in (query, key))
    products = np.einsum('...nhr,...mhr->...hnm', query, key)
    return products, np.moveaxis(scale, -1, -2)[..., None, :]


def optimal_a(query, key, mask=None, temperature=None):
    """A of FAVOR++ [..., 1, H, 1], from every pair whose key is not masked for all queries."""
    *batch, num_queries, heads, dim = query.shape
    num_keys, groups = key.shape[-3:-1]
    # All query heads of a key head count together: they share its features.
    query = scaled(query, temperature).reshape(*batch, num_queries, 1, groups, -1, dim)
    key = scaled(key, temperature).reshape(*batch, 1, num_keys, groups, 1, dim)
    square = np.sum((query + key) ** 2, axis=-1)
    keep = np.ones((*batch, num_keys), bool)
    if mask is not None:
        mask = mask.reshape((1,) * (len(batch) + 3 - mask.ndim) + mask.shape)
        if mask.shape[-3:-1] == (1, 1):
            keep = keep & mask[..., 0, 0, :]
    keep = np.broadcast_to(keep[..., None, :, None, None], square.shape)
    mean = np.mean(square, axis=(-4, -3, -1), where=keep)
    # The minimum of the second moment is where its derivative in ρ = 1/(1 - 8A) is 0.
    rho = (np.sqrt((2 * mean + dim) ** 2 + 8 * dim * mean) - 2 * mean - dim) / (4 * mean)
    return np.repeat((1 - 1 / rho) / 8, heads // groups, axis=-1)[..., None, :, None]


def attention_matrix(
    kernel,
    query,
    key,
    mask=None,
    projection=None,
    theta=None,
    temperature=None,
    pattern=True,
    a=None,
    offset=0,
):
    """[..., H, N, M], normalised over the keys that `mask` and `pattern` let through.

    `theta` is that of queries and keys, or both by the names 'query' and 'key'. Only the mask has a
    say in A of FAVOR++; with `a` given, nothing has. The first query is at the position `offset`,
    which 'cosine' alone knows of.
    """
    if kernel == 'softmax_optimal' and a is None:
        a = optimal_a(query, key, mask, temperature)
    # Query heads that share a key head have it for themselves here.
    key = np.repeat(np.asarray(key), query.shape[-2] // key.shape[-2], axis=-2)
    mask = pattern if mask is None else mask & pattern
    if kernel in SIGNED:
        products, scale = signed_products(kernel, query, key, projection, temperature)
        mask = np.broadcast_to(mask, products.shape)
        scale = np.where(mask, scale, -np.inf)
        largest = np.max(scale, axis=-1, keepdims=True)
        weights = products * np.exp(scale - np.where(np.isinf(largest), 0, largest))
        total = np.sum(weights, axis=-1, keepdims=True)
        assert np.all(np.abs(total) >= LEAST_SHARE * np.sum(np.abs(weights), -1, keepdims=True)), (
            'the normaliser cancels: nothing can be compared on such inputs'
        )
        return weights / np.where(total == 0, 1, total)
    if kernel == 'exact':
        logits = np.einsum('...nhd,...mhd->...hnm', *(scaled(x, temperature) for x in (query, key)))
    else:
        if theta is None or 'query' not in theta:
            theta = {'query': theta, 'key': theta}
        query_log, key_log = (
            np.moveaxis(log_features(kernel, x, projection, theta[side], a, temperature), -2, -3)
            for side, x in (('query', query), ('key', key))
        )
        logits = np.logaddexp.reduce(query_log[..., :, None, :] + key_log[..., None, :, :], axis=-1)
    if kernel == 'cosine':
        num_queries, num_keys = logits.shape[-2:]
        distance = np.arange(num_queries)[:, None] + offset - np.arange(num_keys)
        logits = logits + np.log(np.cos(np.pi / 2 * distance / max(num_queries, num_keys)))
    mask = np.broadcast_to(mask, logits.shape)
    logits = np.where(mask, logits, -np.inf)
    largest = np.max(logits, axis=-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isinf(largest), 0, largest))
    total = np.sum(weights, axis=-1, keepdims=True)
    return weights / np.where(total == 0, 1, total)


def attention(kernel, query, key, value, mask=None, projection=None, theta=None, **more):
    """[..., N, H, D]; `more` as for `attention_matrix`."""
    weights = attention_matrix(kernel, query, key, mask, projection, theta, **more)
    value = np.repeat(np.asarray(value, np.float64), query.shape[-2] // key.shape[-2], axis=-2)
    return np.einsum('...hnm,...mhd->...nhd', weights, value)
