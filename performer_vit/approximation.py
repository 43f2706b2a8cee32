"""How far the random features of the softmax kernel are from softmax attention: a study of errors.

    python -m performer_vit.benchmark approximation --json=FILE

Four estimators (trigonometric, positive, hyperbolic and optimal features, of `feature_maps`) with
four projections (of `projections`), against the number of features R, the number of tokens N and
the scale s of the inputs: q, k ~ N(0, s² I_D), v ~ N(0, I_D), N queries and N keys. D = 16
and N = 4096 are the setting in which Choromanski et al. 2021, "Rethinking Attention with
Performers", arXiv 2009.14794, compare orthogonal with independent rows and positive with
trigonometric features. Logits q·k/√D then have the standard deviation s², and q' = q/D^(1/4) the
mean square s² √D. The kernel's errors go with the latter: their medians for D = 16 at scale s are
about those for D = 64 at s/√2, where logits are half as large.

The error of attention is ‖out - exact‖ / ‖exact‖ over all tokens and values. The error of the
kernel is |estimate/exp(q·k/√D) - 1|, the median over pairs: over all, over the tenth with the least
q·k and over the tenth with the largest. It is no mean square because that is of a few long pairs:
over Gaussian inputs the mean square of positive features is infinite from s² = √D/4 on, and a
sample shows nothing of it long before. For the same reason an error of 1 does not mean that an
estimate is merely off by its own size: positive features of long inputs are nearly always far too
small, and rarely far too large. The price of the median is that it does not see the rare ones.

What the errors depend on, for independent rows (variances: `feature_maps`):

- positive: on ‖q' + k'‖, so they are least for opposed pairs, of small kernels, and grow with
  exp(‖q' + k'‖²/2) for aligned ones;
- hyperbolic: the same where ‖q' + k'‖ is large; smaller where it is short, as the part of the error
  that is linear in w·(q' + k') cancels between w and -w;
- optimal: on ‖q' + k'‖ again, with an exponent that is 1/(1 - 8A) of it, A < 0;
- trigonometric: on ‖q' - k'‖, so they are least for aligned pairs, of large kernels, and grow
  exponentially for small ones. As features are signed, small kernels of wrong sign may bring the
  normaliser near 0; the error of attention then has heavy tails, and its mean says little but that;
- all: with 1/√R, and not with N, which appears in no variance.

Orthogonal and Hadamard rows cannot lower the linear part of the error, which is most of it for
short inputs to positive and optimal features; simplex rows can. For hyperbolic and trigonometric
features, which have no linear part, orthogonal and Hadamard rows are slightly better than simplex
ones. The gain of all three vanishes for long inputs.

With the default arguments the study shows (`results/approximation/`; orthogonal rows, R = 256,
N = 4096, means of 15 draws):

- s = 0.5: the errors of attention are 0.086 trigonometric, 0.118 optimal, 0.156 hyperbolic, 0.169
  positive; with independent rows 0.148, 0.140, 0.190 and 0.186. Orthogonal rows are better for
  every estimator at every R from 16 to 1024;
- s = 1: 117 trigonometric (27.7 in the best draw), 1.63 optimal, 1.97 positive, 1.98 hyperbolic.
  On the tenth of the pairs with the least kernel 19.9 trigonometric, 0.26 positive. None is of use
  there, but the positive ones fail without exploding;
- so trigonometric features are the best for short inputs, and by far the worst for long ones; they
  cross the others between s = 0.5 and s = 1. Optimal features are better than positive ones up to
  s = 1;
- from N = 64 to N = 4096 errors change by less than a quarter at s = 0.5, without a trend; at s = 1
  those of the positive, hyperbolic and optimal features about double.
"""

import functools
import itertools
import math
import numbers
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from performer_vit import environment, exact_attention, feature_maps, projections
from performer_vit.errors import BadInput

ESTIMATORS = {
    'softmax_trigonometric': 'trigonometric',
    'softmax': 'positive (FAVOR+)',
    'softmax_hyperbolic': 'hyperbolic',
    'softmax_optimal': 'optimal (FAVOR++)',
}
PROJECTIONS = ('gaussian', 'orthogonal', 'simplex', 'hadamard')
# Two features from each row of W: R features take R/2 rows.
PAIRED = ('softmax_trigonometric', 'softmax_hyperbolic')

ERRORS = {
    'attention_error': 'relative error of the attention output',
    'kernel_error': 'relative error of the kernel, median pair',
    'kernel_error_small': 'relative error of the kernel, tenth of the pairs with the least q·k',
    'kernel_error_large': 'relative error of the kernel, tenth of the pairs with the largest q·k',
}

KERNEL_TOKENS = 128  # Queries and keys whose pairs the kernel's errors are of.
MIN_LENGTH = 4  # Of fewer tokens a tenth of the pairs would be none.
# Mean ‖x'‖² of the inputs. Beyond, the trigonometric estimator's exp(‖q' - k'‖²/2) could leave
# float32's range; every estimate is noise long before.
MAX_MEAN_SQUARE = 16.0


def study(
    *,
    draws: int = 15,
    seed: int = 0,
    dim: int = 16,
    num_features: int = 256,
    length: int = 4096,
    compared_scales: Sequence[float] = (0.5, 1.0),
    feature_counts: Sequence[int] = (16, 32, 64, 128, 256, 512, 1024),
    lengths: Sequence[int] = (64, 256, 1024, 4096),
    scales: Sequence[float] = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0),
    on_progress: Callable[[str], None] | None = None,
) -> dict:
    """Measures every estimator with every projection, one setting varied at a time.

    R is varied over `feature_counts` and N over `lengths` at each of `compared_scales`, s over
    `scales`; what is not varied is `num_features` and `length`. Each draw has inputs and a
    projection of its own, the same for all estimators, and those of a smaller R or N are the first
    rows of the largest: differences between two figures are of the settings, not of the draws.

    Args:
      draws: independent draws, at least 2.
      seed: of the inputs and projections, an integer ≥ 0.
      dim: D, the head dimension, 2 or more.
      num_features, feature_counts: R, even because two of the estimators take rows in pairs.
      length, lengths: N, queries as well as keys, at least 4.
      compared_scales, scales: s > 0, with s² √D ≤ 16, the mean ‖q'‖².
      on_progress: called with a line of text before each setting.

    Returns:
      What `json` can write: `settings`, `seconds`, `device`, `versions` and `rows`, one for each
      setting, estimator and projection: `num_features`, `length`, `scale`, `estimator` (a kernel's
      name), `projection`, and for each of `ERRORS` its `mean`, `std` (of the sample), `low` and
      `high` over the draws.

    Raises:
      BadInput: an argument is outside what is allowed.
    """
    settings = {
        'draws': draws,
        'seed': seed,
        'dim': dim,
        'num_features': num_features,
        'length': length,
        'compared_scales': list(compared_scales),
        'feature_counts': list(feature_counts),
        'lengths': list(lengths),
        'scales': list(scales),
    }
    _check(**settings)
    started = time.perf_counter()
    cells = sorted({
        *itertools.product(feature_counts, [length], compared_scales),
        *itertools.product([num_features], lengths, compared_scales),
        *itertools.product([num_features], [length], scales),
    }, key=lambda cell: cell[1:] + cell[:1])  # fmt: skip
    rows = []
    # Or an accelerator would round the factors of every product to 10 bits or so.
    with jax.default_matmul_precision('highest'):
        most_rows = max(cell[0] for cell in cells)
        drawn = {name: _projections(seed, draws, most_rows, dim, name) for name in PROJECTIONS}
        longest = _inputs(seed, draws, max(cell[1] for cell in cells), dim)
        # Cells of one length and scale come together: exact attention is computed once for each.
        for (tokens, scale), group in itertools.groupby(cells, key=lambda cell: cell[1:]):
            query, key, value = (x[:, :tokens] for x in longest)
            inputs = (scale * query, scale * key, value)
            exact = _exact(*inputs)
            for count, *_ in group:
                if on_progress is not None:
                    on_progress(f'{count} features, {tokens} tokens, scale {scale:g}')
                for estimator, projection in itertools.product(ESTIMATORS, PROJECTIONS):
                    w = drawn[projection][:, : count // 2 if estimator in PAIRED else count]
                    errors = _errors(estimator, w, inputs, exact)
                    rows.append({
                        'num_features': count,
                        'length': tokens,
                        'scale': scale,
                        'estimator': estimator,
                        'projection': projection,
                        **{name: _spread(np.asarray(errors[name])) for name in ERRORS},
                    })  # fmt: skip
    return {
        'settings': settings,
        'rows': rows,
        'seconds': time.perf_counter() - started,
        'device': environment.device(),
        'versions': environment.versions(),
    }


def varied(figures: dict, field: str, scale: float | None = None) -> tuple[list, list[dict]]:
    """The values of one setting, and the rows of a study in which it alone varies.

    Args:
      figures: what `study` returned.
      field: 'num_features', 'length' or 'scale'.
      scale: one of the compared scales, where `field` is not the scale.

    Returns:
      The values in ascending order, and the rows, whatever their estimator and projection.
    """
    settings = figures['settings']
    values = {
        'num_features': settings['feature_counts'],
        'length': settings['lengths'],
        'scale': settings['scales'],
    }[field]
    base = {
        'num_features': settings['num_features'],
        'length': settings['length'],
        'scale': scale,
    }
    fixed = {name: value for name, value in base.items() if name != field}
    rows = [
        row
        for row in figures['rows']
        if row[field] in values and all(row[name] == value for name, value in fixed.items())
    ]
    return sorted(set(values)), rows


def table(figures: dict) -> str:
    """The study as aligned text: mean ± standard deviation in % of the mean, over the draws."""
    settings = figures['settings']
    letters = {'num_features': 'R', 'length': 'N', 'scale': 's'}
    base = {name: f'{letters[name]} = {settings[name]}' for name in ('num_features', 'length')}
    lines = [
        f'estimates of softmax attention, D = {settings["dim"]}, {settings["draws"]} draws; '
        f'{figures["device"]}'
    ]
    blocks = [
        ('attention_error', field, scale)
        for field in ('num_features', 'length')
        for scale in settings['compared_scales']
    ]
    blocks += [(error, 'scale', None) for error in ERRORS]
    for error, field, scale in blocks:
        values, rows = varied(figures, field, scale)
        fixed = [text for name, text in base.items() if name != field]
        fixed += [] if scale is None else [f's = {scale:g}']
        lines += ['', f'{ERRORS[error]}; {", ".join(fixed)}']
        heads = ''.join(f'{f"{letters[field]} = {value:g}":>16}' for value in values)
        lines.append(f'{"estimator":<19}{"projection":<11}{heads}')
        for estimator, projection in itertools.product(ESTIMATORS, PROJECTIONS):
            cells = {
                row[field]: _cell(row[error])
                for row in rows
                if (row['estimator'], row['projection']) == (estimator, projection)
            }
            shown = ''.join(f'{cells[value]:>16}' for value in values)
            lines.append(f'{ESTIMATORS[estimator]:<19}{projection:<11}{shown}')
    return '\n'.join(lines)


def _cell(value: dict) -> str:
    return f'{value["mean"]:.3g} ±{100 * value["std"] / value["mean"]:.0f}%'


def _spread(values: np.ndarray) -> dict[str, float]:
    values = values.astype(np.float64)
    spread = {
        'mean': values.mean(),
        'std': values.std(ddof=1),
        'low': values.min(),
        'high': values.max(),
    }
    # Four digits are more than a few draws determine, and keep the file short.
    return {name: float(f'{value:.4g}') for name, value in spread.items()}


def _inputs(seed: int, draws: int, length: int, dim: int) -> tuple[jax.Array, ...]:
    """q, k, v of unit scale, [draws, N, D] each; apart from the projections of the same seed."""
    keys = jax.random.split(jax.random.key(seed, impl='threefry2x32'), 3)
    return tuple(jax.random.normal(key, (draws, length, dim), jnp.float32) for key in keys)


def _projections(seed: int, draws: int, num_rows: int, dim: int, projection: str) -> jax.Array:
    """[draws, num_rows, D]."""
    return jnp.stack([
        projections.draw(seed, 0, number, num_rows, dim, projection) for number in range(draws)
    ])  # fmt: skip


@jax.jit
def _exact(query: jax.Array, key: jax.Array, value: jax.Array) -> dict[str, jax.Array]:
    """Per draw: the output, the logits of the pairs, and the pairs from least logit to largest."""

    def one(inputs):
        q, k, v = inputs
        output = exact_attention.exact_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        logits = q[:KERNEL_TOKENS] @ k[:KERNEL_TOKENS].T * q.shape[-1] ** -0.5
        return {'output': output, 'logits': logits, 'order': jnp.argsort(logits, axis=None)}

    return jax.lax.map(one, (query, key, value))


@functools.partial(jax.jit, static_argnames='estimator')
def _errors(
    estimator: str, projection: jax.Array, inputs: tuple[jax.Array, ...], exact: dict
) -> dict[str, jax.Array]:
    """Each of `ERRORS`, [draws]."""

    def one(arguments):
        w, (query, key, value), truth = arguments
        query_features, query_scale, key_features, key_scale = _features(estimator, w, query, key)
        output = _attend(query_features, key_features, key_scale, value)
        q, k = query_features[:KERNEL_TOKENS], key_features[:KERNEL_TOKENS]
        log_scale = query_scale[:KERNEL_TOKENS, None] + key_scale[:KERNEL_TOKENS]
        estimate_over_kernel = (q @ k.T) * jnp.exp(log_scale - truth['logits'])
        kernel_errors = jnp.abs(estimate_over_kernel - 1).ravel()[truth['order']]
        tenth = kernel_errors.size // 10
        return {
            'attention_error': _norm(output - truth['output']) / _norm(truth['output']),
            'kernel_error': jnp.median(kernel_errors),
            'kernel_error_small': jnp.median(kernel_errors[:tenth]),
            'kernel_error_large': jnp.median(kernel_errors[-tenth:]),
        }

    return jax.lax.map(one, (projection, inputs, exact))


def _norm(x: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x.ravel())


def _features(
    estimator: str, w: jax.Array, query: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """f [N, R] and t [N] with φ(x) = f e^t, of the queries and of the keys."""
    if estimator == 'softmax_trigonometric':
        return *feature_maps.trigonometric(query, w), *feature_maps.trigonometric(key, w)
    if estimator == 'softmax_optimal':
        # One head, by whose queries and keys attention would choose A too.
        mean_square = feature_maps.mean_square_sum(query[:, None], key[:, None])
        a = feature_maps.optimal_a(mean_square[0, 0], query.shape[-1])
        log_features = functools.partial(feature_maps.optimal_log_features, projection=w, a=a)
    elif estimator == 'softmax_hyperbolic':
        log_features = functools.partial(feature_maps.hyperbolic_log_features, projection=w)
    else:
        log_features = functools.partial(feature_maps.softmax_log_features, projection=w)
    return *_exponential(log_features(query)), *_exponential(log_features(key))


def _exponential(log_features: jax.Array) -> tuple[jax.Array, jax.Array]:
    largest = jnp.max(log_features, axis=-1)
    return jnp.exp(log_features - largest[:, None]), largest


def _attend(
    query_features: jax.Array, key_features: jax.Array, key_scale: jax.Array, value: jax.Array
) -> jax.Array:
    """φ(q) (φ(k)ᵀ v) / φ(q) (φ(k)ᵀ 1), as the estimator has it: nothing guards the quotient."""
    key_features = key_features * jnp.exp(key_scale - jnp.max(key_scale))[:, None]
    sums = query_features @ (key_features.T @ jnp.pad(value, ((0, 0), (0, 1)), constant_values=1))
    return sums[:, :-1] / sums[:, -1:]


def _check(
    *, draws, seed, dim, num_features, length, compared_scales, feature_counts, lengths, scales
) -> None:
    counts = {
        'draws': ([draws], 2, 1, 'the spread is over them'),
        'seed': ([seed], 0, 1, 'it seeds the draws'),
        'dim': ([dim], 2, 1, 'it is the head dimension'),
        'num_features': ([num_features], 2, 2, 'two of the estimators take rows in pairs'),
        'feature_counts': (feature_counts, 2, 2, 'two of the estimators take rows in pairs'),
        'length': ([length], MIN_LENGTH, 1, 'a tenth of its pairs is looked at'),
        'lengths': (lengths, MIN_LENGTH, 1, 'a tenth of their pairs is looked at'),
    }
    for name, (values, least, multiple, why) in counts.items():
        for value in values:
            whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            if not whole or value < least or value % multiple:
                kind = 'even integer' if multiple == 2 else 'integer'
                raise BadInput(
                    f'{name} is or holds {value!r}; allowed is an {kind} ≥ {least}: {why}. '
                    'Give such a one.'
                )
    largest = math.sqrt(MAX_MEAN_SQUARE / math.sqrt(dim))
    for name, values in {'compared_scales': compared_scales, 'scales': scales}.items():
        for value in values:
            # Also False for NaN.
            if not isinstance(value, numbers.Real) or not 0 < value <= largest:
                raise BadInput(
                    f'{name} holds {value!r}; allowed is a number > 0 up to {largest:g} for '
                    f'dim = {dim}, beyond which every estimate is noise. Give a smaller scale.'
                )
    series = {
        'compared_scales': compared_scales,
        'feature_counts': feature_counts,
        'lengths': lengths,
        'scales': scales,
    }
    for name, values in series.items():
        if not values:
            raise BadInput(f'{name} is empty; at least one value is needed. Give one or more.')
