"""What a published number says of its machine."""

import platform

import pytest

from performer_vit import cpu_backend, environment

CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
flags\t\t: fpu : vme

processor\t: 1
cpu family\t: 26
model\t\t: 2
model name\t: AMD EPYC
"""


@pytest.mark.parametrize(
    ('text', 'name'),
    [
        (CPUINFO, 'AMD EPYC, family 26 model 2'),
        # Of some ARM machines, nothing but a name.
        ('processor\t: 0\nmodel name\t: Cortex-A72\n', 'Cortex-A72'),
    ],
)
def test_processors_of_one_name_are_told_apart(tmp_path, monkeypatch, text, name):
    """Catches figures of two machines that read as though they were of one."""
    (tmp_path / 'cpuinfo').write_text(text)
    monkeypatch.setattr(environment, '_CPUINFO', tmp_path / 'cpuinfo')
    assert name in environment.device() and 'cpu (' in environment.device()


@pytest.mark.parametrize('text', ['', 'processor\t: 0\nBogoMIPS\t: 243.75\n', None])
def test_a_processor_without_a_name(tmp_path, monkeypatch, text):
    """Other systems have no such file, and most ARM machines name none in it."""
    if text is not None:
        (tmp_path / 'cpuinfo').write_text(text)
    monkeypatch.setattr(environment, '_CPUINFO', tmp_path / 'cpuinfo')
    monkeypatch.setattr(platform, 'processor', lambda: '')
    assert f'cpu ({platform.machine()}, ' in environment.device()


def test_cores_are_those_that_may_be_used(monkeypatch):
    """Catches the speed of one core that is published as that of two."""
    monkeypatch.setattr(cpu_backend, 'num_cores', lambda: 1)
    assert ', 1 cores' in environment.device()


def test_the_commit_is_that_of_the_beginning(monkeypatch):
    """Catches a run that names a commit that was made while it ran."""
    first = environment.versions()
    monkeypatch.setattr(environment, '_git_commit', lambda: 'a later one')
    assert environment.versions() == first
