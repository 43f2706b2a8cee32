"""Asking for huge pages: when, and that a command which asks is the same command."""

import os
import subprocess
import sys

import pytest

from performer_vit import huge_pages


@pytest.mark.parametrize('enabled', ['[always] madvise never', 'always madvise [never]', ''])
def test_nothing_is_asked_where_asking_is_of_no_use(enabled):
    assert huge_pages.tunables('', enabled) is None


def test_asks_where_the_kernel_waits_to_be_asked():
    words = huge_pages.tunables('', 'always [madvise] never').split(':')
    assert 'glibc.malloc.hugetlb=1' in words


def test_what_the_user_set_is_kept():
    """Catches a user's own tunables overwritten, or a process that restarts without end."""
    kept = huge_pages.tunables('glibc.malloc.top_pad=1:glibc.rtld.nns=4', 'always [madvise] never')
    assert {'glibc.malloc.top_pad=1', 'glibc.rtld.nns=4', 'glibc.malloc.hugetlb=1'} < set(
        kept.split(':')
    )
    assert kept.count('top_pad') == 1
    for hugetlb in ('0', '1', '2'):
        given = f'glibc.malloc.hugetlb={hugetlb}'
        assert huge_pages.tunables(given, 'always [madvise] never') is None
    assert huge_pages.tunables(kept, 'always [madvise] never') is None


@pytest.mark.parametrize(
    'platforms, expected', [('cpu', False), ('cpu,cuda', False), ('cuda,cpu', True), ('tpu', True)]
)
def test_only_the_cpu_backend_asks(platforms, expected):
    assert huge_pages.may_use_accelerator({'JAX_PLATFORMS': platforms}) == expected


PROGRAM = """
import os, sys
import performer_vit.huge_pages as huge_pages
print('begins', flush=True)
huge_pages.restart()
print(sys.argv[1:])
print(os.environ.get('GLIBC_TUNABLES', ''))
"""


@pytest.mark.parametrize('asks', [True, False])
def test_restart_keeps_the_command(asks, tmp_path):
    """The process begins twice where it asks and once where not, with the same arguments."""
    if not huge_pages._ENABLED.exists() or '[madvise]' not in huge_pages._ENABLED.read_text():
        pytest.skip('needs a Linux that gives huge pages to those who ask')
    script = tmp_path / 'program.py'
    script.write_text(PROGRAM)
    variables = {**os.environ, 'JAX_PLATFORMS': 'cpu' if asks else 'cuda'}
    variables.pop(huge_pages.VARIABLE, None)
    result = subprocess.run(
        [sys.executable, str(script), '--one', 'two words', ''],
        env=variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = result.stdout.splitlines()
    assert lines.count('begins') == (2 if asks else 1)
    assert lines[-2] == "['--one', 'two words', '']"
    assert ('glibc.malloc.hugetlb=1' in lines[-1]) == asks
