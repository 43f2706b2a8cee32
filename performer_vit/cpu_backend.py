"""What XLA's CPU backend gains from: huge pages and two devices.

Huge pages: XLA asks malloc for every array of a step anew, and the kernel hands memory out page by
page as it is first written. With pages of 4 KiB these faults take up to a fifth of a training step;
with transparent huge pages of 2 MiB there are 512 times fewer. Most Linux systems give huge pages
to those alone who ask for them, and glibc asks where a variable tells it to.

Two devices: many operations of a step (small products of a batch, sums, moved data) run on one
thread however many there are. Two devices of the CPU, with half of a batch each, run beside each
other.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import sys
from collections.abc import Mapping

HUGE_PAGES = 'GLIBC_TUNABLES'
DEVICES = 'XLA_FLAGS'
_ENABLED = pathlib.Path('/sys/kernel/mm/transparent_hugepage/enabled')
# Since glibc 2.35; others ignore it. Memory that XLA frees stays with the process: a step that gave
# its arrays back to the kernel would pay for their pages again in the next one.
_TUNABLES = {
    'glibc.malloc.hugetlb': '1',
    'glibc.malloc.mmap_threshold': str(2**32),
    'glibc.malloc.trim_threshold': str(2**33),
    'glibc.malloc.top_pad': str(2**28),
}
_DEVICE_COUNT = '--xla_force_host_platform_device_count'


def tunables(given: str, enabled: str) -> str | None:
    """The value of `GLIBC_TUNABLES` that asks for huge pages, or None where nothing is to be done.

    Args:
      given: its value now, '' for none; what it sets is kept.
      enabled: the kernel's choice, such as 'always [madvise] never'. Asking helps under 'madvise'
        alone: 'always' needs no asking, and 'never' means never.
    """
    settings = dict(word.partition('=')[::2] for word in given.split(':') if word)
    if '[madvise]' not in enabled or 'glibc.malloc.hugetlb' in settings:
        return None
    return ':'.join(f'{name}={value}' for name, value in {**_TUNABLES, **settings}.items())


def device_flags(given: str, cores: int) -> str | None:
    """The value of `XLA_FLAGS` that makes two devices, or None where nothing is to be done.

    Args:
      given: its value now, '' for none; what it sets is kept, a number of devices too. It may also
        name a file of flags, to which nothing can be added.
      cores: that this process may use. One core has nothing to share out.
    """
    names_a_file = given.strip() and not given.strip().startswith('-')
    if cores < 2 or _DEVICE_COUNT in given or names_a_file:
        return None
    return f'{given} {_DEVICE_COUNT}=2'.strip()


def may_use_accelerator(variables: Mapping[str, str]) -> bool:
    """Whether JAX could choose another backend than the CPU; asks without starting JAX."""
    platforms = variables.get('JAX_PLATFORMS', '')
    if platforms:
        return platforms.split(',')[0] != 'cpu'
    return bool(importlib.metadata.entry_points(group='jax_plugins')) or any(
        importlib.util.find_spec(name) for name in ('jax_plugins', 'libtpu')
    )


def with_cpu(platforms: str) -> str:
    """The value of `JAX_PLATFORMS` that has the CPU too, which counts operations; last of all."""
    names = platforms.split(',')
    return platforms if not platforms or 'cpu' in names else f'{platforms},cpu'


def configure() -> None:
    """Gives this process two devices and huge pages; for the beginning of a program.

    XLA reads its flags when JAX first computes, so devices are a matter of a variable. Malloc reads
    its own when a process begins: for huge pages this process starts again, in its place.

    Does nothing where that would change nothing. Where JAX may use an accelerator, it only sees to
    it that `JAX_PLATFORMS`, if set, has the CPU too. Small pages are kept by
    `GLIBC_TUNABLES=glibc.malloc.hugetlb=0`, one device by
    `XLA_FLAGS=--xla_force_host_platform_device_count=1`.
    """
    if may_use_accelerator(os.environ):
        if os.environ.get('JAX_PLATFORMS'):
            os.environ['JAX_PLATFORMS'] = with_cpu(os.environ['JAX_PLATFORMS'])
        return
    flags = device_flags(os.environ.get(DEVICES, ''), num_cores())
    if flags is not None:
        os.environ[DEVICES] = flags
    if _ENABLED.exists() and sys.executable:  # Linux.
        value = tunables(os.environ.get(HUGE_PAGES, ''), _ENABLED.read_text())
        if value is not None:
            arguments = [sys.executable, *sys.orig_argv[1:]]
            os.execve(sys.executable, arguments, {**os.environ, HUGE_PAGES: value})


def num_cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
