"""Huge pages and two devices: when a command asks for them, and that it stays the same command."""

import os
import subprocess
import sys

import pytest

from performer_vit import cpu_backend


@pytest.mark.parametrize('enabled', ['[always] madvise never', 'always madvise [never]', ''])
def test_nothing_is_asked_where_asking_is_of_no_use(enabled):
    assert cpu_backend.tunables('', enabled) is None


def test_asks_where_the_kernel_waits_to_be_asked():
    words = cpu_backend.tunables('', 'always [madvise] never').split(':')
    assert 'glibc.malloc.hugetlb=1' in words


def test_what_the_user_set_is_kept():
    """Catches a user's own tunables overwritten, or a process that restarts without end."""
    enabled = 'always [madvise] never'
    kept = cpu_backend.tunables('glibc.malloc.top_pad=1:glibc.rtld.nns=4', enabled)
    assert {'glibc.malloc.top_pad=1', 'glibc.rtld.nns=4', 'glibc.malloc.hugetlb=1'} < set(
        kept.split(':')
    )
    assert kept.count('top_pad') == 1
    for hugetlb in ('0', '1', '2'):
        given = f'glibc.malloc.hugetlb={hugetlb}'
        assert cpu_backend.tunables(given, enabled) is None
    assert cpu_backend.tunables(kept, enabled) is None


def test_two_devices_where_there_are_cores_for_them():
    """Catches flags of the user's own overwritten, or a process that restarts without end."""
    flags = cpu_backend.device_flags('', 2)
    assert flags == '--xla_force_host_platform_device_count=2'
    assert cpu_backend.device_flags('--xla_cpu_enable_fast_math=true', 64) == (
        f'--xla_cpu_enable_fast_math=true {flags}'
    )
    assert cpu_backend.device_flags('', 1) is None
    assert cpu_backend.device_flags('--xla_force_host_platform_device_count=1', 2) is None
    assert cpu_backend.device_flags(flags, 2) is None
    assert cpu_backend.device_flags('flags.txt', 2) is None


@pytest.mark.parametrize(
    'platforms, expected', [('cpu', False), ('cpu,cuda', False), ('cuda,cpu', True), ('tpu', True)]
)
def test_only_the_cpu_backend_asks(platforms, expected):
    assert cpu_backend.may_use_accelerator({'JAX_PLATFORMS': platforms}) == expected


@pytest.mark.parametrize(
    'given, expected',
    [('', ''), ('cuda', 'cuda,cpu'), ('cuda,cpu', 'cuda,cpu'), ('cpu', 'cpu'), ('tpu', 'tpu,cpu')],
)
def test_the_cpu_stays_beside_an_accelerator(given, expected):
    """Catches a training that `JAX_PLATFORMS=cuda` ends, since the CPU counts its operations."""
    assert cpu_backend.with_cpu(given) == expected


PROGRAM = """
import os, sys
import jax
from performer_vit import cpu_backend
print('begins', flush=True)
cpu_backend.configure()
print(sys.argv[1:])
print(os.environ.get('GLIBC_TUNABLES', ''))
print(os.environ.get('XLA_FLAGS', ''))
if os.environ['JAX_PLATFORMS'] == 'cpu':
    print(jax.device_count())
"""


def begin(tmp_path, **changes):
    """What the program prints, line by line, with these environment variables alone changed."""
    script = tmp_path / 'program.py'
    script.write_text(PROGRAM)
    variables = {
        name: value
        for name, value in os.environ.items()
        if name not in (cpu_backend.HUGE_PAGES, cpu_backend.DEVICES)
    }
    result = subprocess.run(
        [sys.executable, str(script), '--one', 'two words', ''],
        env={**variables, **changes}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return result.stdout.splitlines()


def test_configure_keeps_the_command(tmp_path):
    """Huge pages need a second beginning, with the same arguments; devices are there in time."""
    enabled = cpu_backend._ENABLED.read_text() if cpu_backend._ENABLED.exists() else ''
    lines = begin(tmp_path, JAX_PLATFORMS='cpu')
    assert lines.count('begins') == (2 if '[madvise]' in enabled else 1)
    assert lines[-4] == "['--one', 'two words', '']"
    assert ('glibc.malloc.hugetlb=1' in lines[-3]) == ('[madvise]' in enabled)
    several = cpu_backend.num_cores() > 1
    assert ('--xla_force_host_platform_device_count=2' in lines[-2]) == several
    assert lines[-1] == ('2' if several else '1')


@pytest.mark.parametrize(
    'variables',
    [
        {'JAX_PLATFORMS': 'cuda'},
        {
            'JAX_PLATFORMS': 'cpu',
            'GLIBC_TUNABLES': 'glibc.malloc.hugetlb=0',
            'XLA_FLAGS': '--xla_force_host_platform_device_count=1',
        },
    ],
)
def test_what_the_user_chose_stays(variables, tmp_path):
    lines = begin(tmp_path, **variables)
    assert lines.count('begins') == 1
    assert lines[2:4] == [variables.get(name, '') for name in ('GLIBC_TUNABLES', 'XLA_FLAGS')]
