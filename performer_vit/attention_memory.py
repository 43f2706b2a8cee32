"""How much memory attention takes, each measurement in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax

from performer_vit import attention_contenders, cpu_backend
from performer_vit.errors import BadInput

_STATUS = pathlib.Path('/proc/self/status')
_CLEAR_REFS = pathlib.Path('/proc/self/clear_refs')

# JAX frees what a call held from a thread of its own, some milliseconds after the call.
_SETTLING_SECONDS = 1

# Blocks from this size on get pages of their own from the C library, and give them back; huge pages
# would round each up to 2 MiB.
_ENVIRONMENT = {'MALLOC_MMAP_THRESHOLD_': '65536', cpu_backend.HUGE_PAGES: ''}


def check() -> None:
    """Raises `BadInput` where `peak_memory` cannot be measured: without /proc, or on a GPU."""
    backend = jax.default_backend()
    if backend != 'cpu' or not os.access(_CLEAR_REFS, os.W_OK):
        raise BadInput(
            f'--memory is given on {sys.platform}, JAX computing on its {backend} backend; what is '
            'measured is the resident memory of a process on Linux that computes on the CPU. Leave '
            '--memory out, or set JAX_PLATFORMS=cpu there.'
        )


def peak_memory(name: str, length: int, num_features: int | None, is_causal: bool) -> int:
    """Bytes that one call of the pass 'gradient' adds to resident memory at its peak.

    Measured in a fresh process, after imports, inputs, compilation and one call whose results were
    dropped: the highest resident size during the next call, less the size before it. So it counts
    the loss, the gradients, what is kept for the backward pass and scratch space, not the inputs.

    The system's mark of the highest size is reset before the call. `ru_maxrss` would not do: a
    process inherits it from the one that started it.

    Args:
      name, is_causal: see `attention_contenders.make_call`.
      length: N.
      num_features: R; None for the exact ones.

    Raises:
      BadInput: the process failed, as where there is not enough memory.
    """
    arguments = json.dumps([name, length, num_features, is_causal])
    process = subprocess.run(
        [sys.executable, '-m', __name__, arguments],
        env=os.environ | _ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    if process.returncode:
        raise BadInput(
            f'the process that measures {name} at N = {length:,} ended with exit code '
            f'{process.returncode}; it may have run out of memory. Lower --quadratic_limit, or '
            'leave out that length.'
        )
    return int(process.stdout)


def _measure(name: str, length: int, num_features: int | None, is_causal: bool) -> int:
    call = attention_contenders.make_call(
        name,
        'gradient',
        attention_contenders.make_inputs(length),
        projection=attention_contenders.make_projection(num_features),
        is_causal=is_causal,
    )
    call()
    time.sleep(_SETTLING_SECONDS)
    _CLEAR_REFS.write_text('5')  # Sets the mark to the present size.
    before = _resident('VmRSS')
    call()
    return _resident('VmHWM') - before


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


if __name__ == '__main__':
    print(_measure(*json.loads(sys.argv[1])))
