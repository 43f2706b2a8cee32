"""Four virtual CPU devices for every test, and a small run to test the loop with."""

import atexit
import importlib.util
import os
import pathlib
import shutil
import sys
import tempfile

# Before JAX is imported anywhere. Another backend is for those who ask: JAX_PLATFORMS=cuda,cpu.
if os.environ.setdefault('JAX_PLATFORMS', 'cpu') != 'cpu':
    # A GPU would round the factors of float32 products to 11 bits, coarser than what tests allow.
    os.environ.setdefault('JAX_DEFAULT_MATMUL_PRECISION', 'highest')
    # Nor would there be room for a second worker, of the memory that JAX takes for itself.
    os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
# Most of a test's time is compilation: LLVM need not optimise programs that run for milliseconds.
os.environ['XLA_FLAGS'] = ' '.join([
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=4',
    '--xla_backend_optimization_level=0',
])  # fmt: skip
# And no program need be compiled twice by the processes of one session: workers, and the commands
# that tests start. Where it is set already, this is a worker, or the user has one.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = tempfile.mkdtemp(prefix='performer_vit-programs-')
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = cache
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

import pytest  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # For `configs`, which is no part of the package.


def load_config(name: str, arguments: str = ''):
    """What --config=configs/NAME.py:ARGUMENTS gives."""
    spec = importlib.util.spec_from_file_location(name, ROOT / 'configs' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arguments)


def make_tiny_config():
    """Performer-ReLU with 16 tokens of width 16 on the digits, two epochs: seconds to train."""
    config = load_config('performer_relu', 'digits')
    config.num_epochs = 2
    config.batch_size = 128
    config.log_every_steps = 3
    config.dataset.validation_fraction = 0.2
    config.model.update(stem='patch', patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=32)
    config.model.pooling = 'gap'
    config.model.attention.num_features = 8
    return config


@pytest.fixture
def tiny_config():
    return make_tiny_config()


def flip(path):
    """The lowest bit in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
