import torch

from frozen_1_3.plugin import OPERATOR
from subquad_kernels import Workload
from subquad_kernels.kernel_table import DEFAULT
from subquad_kernels.torch_operator import AutogradKernel, define


def reference(x, factor):
    return (factor * x,)


REFERENCE = AutogradKernel(reference)


class SCALED:
    @staticmethod
    def forward(x, factor):
        return (x * factor,)

    @staticmethod
    def backward(arguments, outputs, gradients):
        return {"x": gradients[0] * arguments["factor"]}


def check(arguments):
    if arguments["x"].dim() != 3:
        raise ValueError("x is b t c")


def empty_outputs(arguments):
    return (torch.empty_like(arguments["x"]),)


def batch_and_length(arguments):
    return tuple(arguments["x"].shape[:2])


def workload_of(arguments, phase):
    x = arguments["x"]
    dtype = str(x.dtype).removeprefix("torch.")
    shape = dict(zip("btc", map(int, x.shape)))
    return Workload(
        operator="frozen_scale", shape=shape, dtype=dtype, phase=phase, options={"factor": arguments["factor"]}
    )


def sample_inputs(workload, *, seed, device):
    generator = torch.Generator(device).manual_seed(seed)
    size = [workload.shape[axis] for axis in "btc"]
    x = torch.randn(size, generator=generator, device=device).to(getattr(torch, workload.dtype))
    return {"x": x, "factor": float(workload.options["factor"])}


OP = define(OPERATOR, "(Tensor x, float factor, str kernel) -> Tensor")


def scale(x, factor, kernel=DEFAULT):
    return OP(x, factor, kernel)
