"""Compiles every Triton kernel as its operator would launch it on an H100, on a machine that need not have a GPU.

In a process of its own, without the interpreter. Prints the names of the kernels.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from linsight.ops import Features
from linsight.ops.triton import conv, focus, launch, linear, sizes


class H100:
    """What Triton asks a driver for until a kernel is launched."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


run, compiled = JITFunction.run, set()


def compile_only(self, *args, grid, warmup, **options):
    compiled.add(self.__name__)
    return run(self, *args, grid=grid, warmup=True, **options)


driver.set_active(H100())
JITFunction.run = compile_only
sizes.INTERPRETED = 2048
launch.INTERPRETED = launch.HALF[0][32]

x, v = (torch.randn(2, 256, 2, 32, dtype=torch.bfloat16).requires_grad_() for _ in range(2))
local = conv.dynamic_depthwise_conv(v.flatten(2), (16, 16), torch.randn(2, 64, 3, 3).requires_grad_())
features = focus.focus(x, torch.rand(2, 32).requires_grad_(), 3.0)
matrix, shift = linear.absorb(features, v, None)
out = linear.affine(Features(x), matrix, shift, local.unflatten(2, (2, 32)), torch.bfloat16)
out.sum().backward()
linear.central(Features(x), v, None)
print(*sorted(compiled))
