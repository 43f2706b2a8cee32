"""Quadratic attention in plain NumPy float64, from the formulas: what the tests compare to."""

import math

import numpy as np

EPSILON = 1e-3
GELU_MINIMUM = -0.16997120747990369


def log_features(kernel, x, projection=None, theta=None):
    """log of the unnormalised φ(x) [..., N, H, R] (a factor common to all features cancels)."""
    x = np.asarray(x, np.float64) / x.shape[-1] ** 0.25
    if kernel.startswith('ftheta'):
        theta = {name: np.asarray(weight, np.float64) for name, weight in theta.items()}
        hidden = np.maximum(x @ theta['hidden_kernel'] + theta['hidden_bias'], 0)
        u = hidden @ theta['output_kernel'] + theta['output_bias']
    else:
        u = x if projection is None else x @ np.asarray(projection, np.float64).T
    if kernel == 'softmax':
        return u - 0.5 * np.sum(x**2, axis=-1, keepdims=True)
    if kernel in ('relu', 'ftheta'):
        value = np.maximum(u, 0)
    elif kernel == 'gelu':
        value = u * 0.5 * (1 + np.vectorize(math.erf)(u / math.sqrt(2))) - GELU_MINIMUM
    elif kernel == 'elu':
        value = np.where(u > 0, u, np.expm1(np.minimum(u, 0))) + 1
    else:
        weight = 1 / (1 + np.exp(-theta['mixture_logit']))
        exponent = np.clip(u / np.exp(theta['log_temperature']), -10, 10)
        value = weight * np.maximum(u, 0) + (1 - weight) * np.exp(exponent)
    return np.log(value + EPSILON)


def attention_matrix(kernel, query, key, mask=None, projection=None, theta=None):
    """[..., H, N, M], normalised over the keys that `mask` lets through."""
    if kernel == 'exact':
        query, key = (np.asarray(x, np.float64) for x in (query, key))
        logits = np.einsum('...nhd,...mhd->...hnm', query, key) / math.sqrt(query.shape[-1])
    else:
        query_log = np.moveaxis(log_features(kernel, query, projection, theta), -2, -3)
        key_log = np.moveaxis(log_features(kernel, key, projection, theta), -2, -3)
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
    return np.einsum('...hnm,...mhd->...nhd', weights, np.asarray(value, np.float64))
