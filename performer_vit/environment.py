"""Which machine, which versions: what a published number must stand beside."""

import functools
import importlib.metadata
import pathlib
import platform
import subprocess

import jax

from performer_vit import cpu_backend

_CPUINFO = pathlib.Path('/proc/cpuinfo')


def device() -> str:
    """The devices in words, such as '8 × TPU v4' or 'cpu (AMD EPYC, family 26 model 2, 2 cores)'.

    Clouds give one name to processors of which one multiplies matrices twice as fast as another;
    family and model tell these apart. Cores are those that this process may use.
    """
    devices = jax.devices()
    if devices[0].platform != 'cpu':
        return f'{len(devices)} × {devices[0].device_kind}'
    count = f', {len(devices)} devices' if len(devices) > 1 else ''
    return f'cpu ({_processor()}, {cpu_backend.num_cores()} cores{count})'


def _processor() -> str:
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:  # Not Linux.
        lines = []
    # All cores are alike; the last one's lines win.
    values = {
        name.strip(): value.strip() for name, _, value in (row.partition(':') for row in lines)
    }
    if 'model name' not in values:
        return platform.processor() or platform.machine()
    if 'cpu family' not in values:
        return values['model name']
    return f'{values["model name"]}, family {values["cpu family"]} model {values["model"]}'


@functools.cache
def versions() -> dict[str, str | None]:
    """Versions of Python, JAX, jaxlib, Flax and the project, and the project's git commit.

    `git_commit` ends in '+changes' where tracked files differ from the commit, and is None where
    the package does not run from a git checkout. It is that of the first call: who calls this early
    hears later of the files that run, not of those that a long run finds at its end.
    """
    from performer_vit import __version__

    return {
        'python': platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ('jax', 'jaxlib', 'flax')},
        'performer_vit': __version__,
        'git_commit': _git_commit(),
    }


def _git_commit() -> str | None:
    root = pathlib.Path(__file__).parent.parent
    if not (root / '.git').exists():
        return None

    def git(*words: str) -> str:
        command = ['git', '-C', str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git('status', '--porcelain', '--untracked-files=no')
        return git('rev-parse', 'HEAD') + ('+changes' if changes else '')
    except (OSError, subprocess.CalledProcessError):
        return None
