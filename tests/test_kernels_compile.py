"""The interpreter takes what a GPU's compiler refuses: kernels are compiled too, for an H100 that is not there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from linsight.ops import triton as kernels

pytest.importorskip("triton.backends.nvidia")


@pytest.mark.full
@pytest.mark.timeout(300)  # as in the matrix
def test_kernels_compile_for_a_gpu(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = [sys.executable, "-W", "ignore", Path(__file__).with_name("compile_kernels.py")]
    done = subprocess.run(
        script, env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    sources = [path.read_text(encoding="utf-8") for path in Path(kernels.__path__[0]).glob("*_kernels.py")]
    assert set(done.stdout.split()) == set(re.findall(r"^def ([a-z]\w*)\(", "\n".join(sources), re.MULTILINE))
