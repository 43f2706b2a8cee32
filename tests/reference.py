"""Quadratic attention in plain NumPy float64, from the formulas: what the tests compare to."""

import math

import numpy as np

EPSILON = 1e-3
GELU_MINIMUM = -0.16997120747990369


def log_features(kernel, x, projection=None, theta=None, a=0.0):
    """log of the unnormalised φ(x) [..., N, H, R] (a factor common to all features cancels)."""
    x = np.asarray(x, np.float64) / x.shape[-1] ** 0.25
    if kernel.startswith('ftheta'):
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
    if kernel in ('relu', 'ftheta'):
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
        value = np.log1p(np.exp(u))
    else:
        weight = 1 / (1 + np.exp(-theta['mixture_logit']))
        exponent = np.clip(u / np.exp(theta['log_temperature']), -10, 10)
        value = weight * np.maximum(u, 0) + (1 - weight) * np.exp(exponent)
    return np.log(value + EPSILON)


def signed_products(kernel, query, key, projection=None):
    """φ(q)·φ(k) [..., H, N, M] for features of both signs, and the keys' log scale."""
    query, key = (np.asarray(x, np.float64) / x.shape[-1] ** 0.25 for x in (query, key))
    scale = 0.5 * np.sum(key**2, axis=-1)
    if projection is not None:
        query, key = (x @ np.asarray(projection, np.float64).T for x in (query, key))
    if kernel == 'identity':
        return np.einsum('...nhr,...mhr->...hnm', query, key), np.zeros(1)
    query, key = (np.concatenate([np.cos(x), np.sin(x)], axis=-1) for x in (query, key))
    products = np.einsum('...nhr,...mhr->...hnm', query, key)
    return products, np.moveaxis(scale, -1, -2)[..., None, :]


def optimal_a(query, key, key_mask):
    """A of FAVOR++ [..., 1, H, 1], by brute force over the pairs that may be attended to."""
    dim = query.shape[-1]
    query, key = (np.asarray(x, np.float64) / dim**0.25 for x in (query, key))
    square = np.sum((query[..., :, None, :, :] + key[..., None, :, :, :]) ** 2, axis=-1)
    weights = np.broadcast_to(key_mask[..., None, :, None], square.shape)
    mean = np.sum(square * weights, axis=(-3, -2)) / np.sum(weights, axis=(-3, -2))
    # The minimum of the second moment is where its derivative in ρ = 1/(1 - 8A) is 0.
    rho = (np.sqrt((2 * mean + dim) ** 2 + 8 * dim * mean) - 2 * mean - dim) / (4 * mean)
    return ((1 - 1 / rho) / 8)[..., None, :, None]


def attention_matrix(kernel, query, key, mask=None, projection=None, theta=None):
    """[..., H, N, M], normalised over the keys that `mask` lets through."""
    # Query heads that share a key head have it for themselves here.
    copies = query.shape[-2] // key.shape[-2]
    a = 0.0
    if kernel == 'softmax_optimal':
        shape = (*query.shape[:-3], query.shape[-2], query.shape[-3], key.shape[-3])
        full = np.broadcast_to(True if mask is None else mask, shape)
        # Only a mask of keys alone changes the keys that A is computed from.
        of_keys = mask is not None and mask.ndim > 2 and mask.shape[-2] == mask.shape[-3] == 1
        key_mask = full[..., 0, 0, :] if of_keys else np.ones((*shape[:-3], shape[-1]), bool)
        groups = key.shape[-2]
        grouped = np.moveaxis(
            np.asarray(query).reshape(*query.shape[:-2], groups, copies, -1), -2, -4
        ).reshape(*query.shape[:-3], -1, groups, query.shape[-1])
        a = np.repeat(optimal_a(grouped, key, key_mask), copies, axis=-2)
    key = np.repeat(np.asarray(key), copies, axis=-2)
    if kernel == 'exact':
        query, key = (np.asarray(x, np.float64) for x in (query, key))
        logits = np.einsum('...nhd,...mhd->...hnm', query, key) / math.sqrt(query.shape[-1])
    elif kernel in ('identity', 'softmax_trigonometric'):
        products, scale = signed_products(kernel, query, key, projection)
        mask = np.broadcast_to(True if mask is None else mask, products.shape)
        scale = np.where(mask, scale, -np.inf)
        largest = np.max(scale, axis=-1, keepdims=True)
        weights = products * np.exp(scale - np.where(np.isinf(largest), 0, largest))
        total = np.sum(weights, axis=-1, keepdims=True)
        return weights / np.where(total == 0, 1, total)
    else:
        query_log = np.moveaxis(log_features(kernel, query, projection, theta, a), -2, -3)
        key_log = np.moveaxis(log_features(kernel, key, projection, theta, a), -2, -3)
        logits = np.logaddexp.reduce(query_log[..., :, None, :] + key_log[..., None, :, :], axis=-1)
    mask = np.broadcast_to(True if mask is None else mask, logits.shape)
    logits = np.where(mask, logits, -np.inf)
    largest = np.max(logits, axis=-1, keepdims=True)
    weights = np.exp(logits - np.where(np.isinf(largest), 0, largest))
    total = np.sum(weights, axis=-1, keepdims=True)
    return weights / np.where(total == 0, 1, total)


def attention(kernel, query, key, value, mask=None, projection=None, theta=None):
    """[..., N, H, D]."""
    weights = attention_matrix(kernel, query, key, mask, projection, theta)
    value = np.repeat(np.asarray(value, np.float64), query.shape[-2] // key.shape[-2], axis=-2)
    return np.einsum('...hnm,...mhd->...nhd', weights, value)
