"""The attentions that are measured against each other: ours, those of JAX, and PyTorch's.

Each computes one thing, softmax attention exactly or FAVOR+ by a given projection, for the same
inputs, so that a comparison compares programs. Letters: B batch, N tokens of a sequence, H heads, D
head dimension, R features.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from performer_vit import cpu_backend, favor, feature_maps, projections
from performer_vit.errors import BadInput, choose

NUM_HEADS = 8
HEAD_DIM = 64
NUM_TOKENS = 4096

PASSES = ('forward', 'gradient')

OURS = ('relu', 'softmax', 'exact')
JAX = ('jax_exact', 'jax_per_token')
TORCH = ('torch_exact', 'performer_pytorch_relu', 'performer_pytorch_softmax')
NAMES = (*OURS, *JAX, *TORCH)

# The opponents of linear attention, in O(N²) time.
EXACT = ('exact', 'jax_exact', 'torch_exact')


def chosen(*, is_causal: bool, peers: bool) -> tuple[str, ...]:
    """The names of the contenders: the per-token scan is causal alone, PyTorch's are `peers`.

    Raises:
      BadInput: `peers`, and PyTorch or performer-pytorch cannot be imported.
    """
    if peers:
        try:
            import performer_pytorch  # noqa: F401
        except ImportError as error:
            raise BadInput(
                f'--peers needs PyTorch and performer-pytorch, which cannot be imported ({error}). '
                "Install them with: pip install -e '.[bench]'"
            ) from error
    jax_names = JAX if is_causal else ('jax_exact',)
    return (*OURS, *jax_names, *(TORCH if peers else ()))


def batch_size(length: int) -> int:
    """B: as many sequences as make `NUM_TOKENS`, at least one."""
    return max(1, NUM_TOKENS // length)


def make_inputs(length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Standard normal query, key and value [B, N, H, D] float32, the same at every call."""
    shape = (batch_size(length), length, NUM_HEADS, HEAD_DIM)
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(jax.random.normal(key, shape) for key in keys)


def make_projection(num_features: int | None) -> jax.Array | None:
    """Orthogonal rows W [R, D] float32, the same at every call; None for None."""
    if num_features is None:
        return None
    return projections.draw(0, 0, 0, num_features, HEAD_DIM, 'orthogonal')


def make_call(
    name: str,
    which: str,
    inputs: tuple[jax.Array, jax.Array, jax.Array],
    *,
    projection: jax.Array | None,
    is_causal: bool,
) -> Callable[[], object]:
    """One pass of a contender as a call without arguments, compiled, with its inputs in place.

    The pass 'forward' gives the attention's output; 'gradient' gives L = Σ output² and its
    gradients of query, key and value.

    Args:
      name: one of `NAMES`: 'relu', 'softmax' and 'exact' are the kernels of `favor.favor_attention`
        here; 'jax_exact' is `jax.nn.dot_product_attention`; 'jax_per_token' is
        `per_token_attention` with ReLU features; 'torch_exact' is PyTorch's
        `scaled_dot_product_attention`; 'performer_pytorch_relu' and '..._softmax' are
        performer-pytorch's `FastAttention`. That one's fast causal form needs a CUDA kernel of
        another package; the causal contender is its form in plain PyTorch, which keeps a state for
        every token.
      which: one of `PASSES`.
      inputs: query, key and value, [B, N, H, D] float32. PyTorch gets copies as [B, H, N, D], its
        own layout, on the CPU.
      projection: W [R, D]; None for the exact ones.
      is_causal: whether token n sees tokens m ≤ n alone.

    Returns:
      A function that returns when its result is there: the output [B, N, H, D] ([B, H, N, D] from
      PyTorch), or (L, the three gradients) in the layout of the inputs.

    Raises:
      BadInput: an unknown name.
    """
    choose('the contender', name, NAMES)
    if name in TORCH:
        return _torch_call(_torch_attention(name, projection, is_causal), which, inputs)
    attention = _jax_attention(name, projection, is_causal)

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.sum(attention(query, key, value) ** 2)

    function = attention if which == 'forward' else jax.value_and_grad(loss, argnums=(0, 1, 2))
    compiled = jax.jit(function).lower(*inputs).compile()
    return lambda: jax.block_until_ready(compiled(*inputs))


def per_token_attention(
    query_features: jax.Array, key_features: jax.Array, value: jax.Array
) -> jax.Array:
    """Causal linear attention by a scan over tokens, one outer product φ(k_n) v_nᵀ a step.

    out_n = φ(q_n)·S_n / φ(q_n)·z_n, S_n = Σ_{m≤n} φ(k_m) v_mᵀ, z_n = Σ_{m≤n} φ(k_m). This is how
    the authors of Choromanski et al. 2021, arXiv 2009.14794, published it: two scans, of S and of
    z, whose backward pass is a scan from the last token to the first that takes each outer product
    out of the state again, so that no state is kept per token.

    Args:
      query_features: φ(q) [B, N, H, R], positive.
      key_features: φ(k) [B, N, H, R], positive.
      value: [B, N, H, D].

    Returns:
      [B, N, H, D] of the inputs' dtype.
    """
    query_features, key_features, value = (
        jnp.moveaxis(x, 1, 0) for x in (query_features, key_features, value)
    )
    numerator = _running_reads(query_features, key_features, value)
    denominator = _running_reads(query_features, key_features, jnp.ones_like(value[..., :1]))
    return jnp.moveaxis(numerator / denominator, 0, 1)


@jax.custom_vjp
def _running_reads(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """q_n·Σ_{m≤n} k_m v_mᵀ for every n; the axis of tokens comes first."""
    return _running_reads_forward(queries, keys, values)[0]


def _running_reads_forward(queries: jax.Array, keys: jax.Array, values: jax.Array):
    def step(state: jax.Array, token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        query, key, value = token
        state = state + key[..., :, None] * value[..., None, :]
        return state, jnp.einsum('...r,...rd->...d', query, state)

    empty = jnp.zeros((*keys.shape[1:], values.shape[-1]), values.dtype)
    state, reads = jax.lax.scan(step, empty, (queries, keys, values))
    return reads, (state, queries, keys, values)


def _running_reads_backward(saved: tuple[jax.Array, ...], read_gradients: jax.Array):
    state, queries, keys, values = saved

    def step(carry: tuple[jax.Array, jax.Array], token: tuple[jax.Array, ...]):
        state, state_gradient = carry
        query, key, value, read_gradient = token
        query_gradient = jnp.einsum('...rd,...d->...r', state, read_gradient)
        state_gradient = state_gradient + query[..., :, None] * read_gradient[..., None, :]
        key_gradient = jnp.einsum('...rd,...d->...r', state_gradient, value)
        value_gradient = jnp.einsum('...rd,...r->...d', state_gradient, key)
        state = state - key[..., :, None] * value[..., None, :]
        return (state, state_gradient), (query_gradient, key_gradient, value_gradient)

    tokens = (queries, keys, values, read_gradients)
    _, gradients = jax.lax.scan(step, (state, jnp.zeros_like(state)), tokens, reverse=True)
    return gradients


_running_reads.defvjp(_running_reads_forward, _running_reads_backward)


def _jax_attention(
    name: str, projection: jax.Array | None, is_causal: bool
) -> Callable[..., jax.Array]:
    if name in OURS:
        return functools.partial(
            favor.favor_attention, kernel=name, projection=projection, is_causal=is_causal
        )
    if name == 'jax_exact':
        return functools.partial(jax.nn.dot_product_attention, is_causal=is_causal)

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        query_features, key_features = (feature_maps.relu(x, projection) for x in (query, key))
        return per_token_attention(query_features, key_features, value)

    return attention


def _torch_attention(name: str, projection: jax.Array | None, is_causal: bool) -> Callable:
    import performer_pytorch.performer_pytorch as performer_pytorch
    import torch

    if name == 'torch_exact':
        return functools.partial(
            torch.nn.functional.scaled_dot_product_attention, is_causal=is_causal
        )
    num_features, dim = projection.shape
    attention = performer_pytorch.FastAttention(
        dim, num_features, generalized_attention=name == 'performer_pytorch_relu'
    )
    attention.projection_matrix.copy_(torch.from_numpy(np.array(projection)))
    # Set by hand, because with causal=True the module looks for the CUDA kernel, and prints.
    attention.causal = is_causal
    attention.causal_linear_fn = performer_pytorch.causal_linear_attention_noncuda
    return attention


def _torch_call(
    attention: Callable, which: str, inputs: tuple[jax.Array, ...]
) -> Callable[[], object]:
    import torch

    torch.set_num_threads(cpu_backend.num_cores())
    tensors = [torch.from_numpy(np.swapaxes(np.asarray(x), 1, 2).copy()) for x in inputs]

    def forward() -> torch.Tensor:
        with torch.inference_mode():
            return attention(*tensors)

    def gradient() -> tuple:
        loss = attention(*tensors).square().sum()
        return loss.detach(), torch.autograd.grad(loss, tensors)

    if which == 'forward':
        return forward
    for tensor in tensors:
        tensor.requires_grad_()
    return gradient
