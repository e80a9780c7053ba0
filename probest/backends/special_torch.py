"""The special functions of `special` for torch: differentiable (twice, too), and at home under `torch.func`."""

import sys
from collections.abc import Callable
from typing import Any

import array_api_compat.torch as xp
import torch

from probest.backends import special, special_numpy

__all__ = ["digamma", "erfinv", "lgamma", "maximum", "xp"]

Array = Any
Function: Any = torch.autograd.Function

clip, maximum, lgamma, digamma, erfinv = torch.clamp, torch.maximum, torch.lgamma, torch.digamma, torch.erfinv
_here = sys.modules[__name__]


def array(values: Any, like: Array) -> Array:
    """`values`, which may be Python numbers, as an array of the dtype and device of `like`."""
    return torch.as_tensor(values, dtype=like.dtype, device=like.device)


def pick(x: Array, indices: Any) -> Array:
    """x[..., indices] for constant indices."""
    return torch.index_select(x, -1, torch.as_tensor(indices, device=x.device))


def below(x: Array) -> Array:
    """The next smaller float."""
    return torch.nextafter(x, torch.full_like(x, -torch.inf))


def put(x: Array, rows: Any, columns: Any, values: Array) -> Array:
    """The matrix x with `values` at the given places."""
    return torch.index_put(x, (torch.as_tensor(rows), torch.as_tensor(columns)), values)


def with_diagonal(x: Array, values: Any) -> Array:
    """The matrix x with `values` on its diagonal."""
    return torch.diagonal_scatter(x, torch.as_tensor(values, dtype=x.dtype, device=x.device).expand(len(x)))


# What follows may write into its first argument, where no gradient is wanted


def _constant(*arrays: Any) -> bool:
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in arrays if torch.is_tensor(x)))


def nested(total: Array, left: Array, right: Array, factor: Array) -> Array:
    """factor ∘ (total + left rightᵀ)."""
    if _constant(total, left, right, factor):
        return total.addr_(left, right).mul_(factor)
    return factor * torch.addr(total, left, right)


def filled_diagonal(x: Array, values: Any) -> Array:
    """`with_diagonal`."""
    if not _constant(x, values):
        return with_diagonal(x, values)
    x.diagonal().copy_(torch.as_tensor(values))
    return x


def in_units(x: Array, rows: Array, columns: Array) -> Array:
    """rows_i x_ij columns_j within ±1; x is left as it is."""
    x = rows[:, None] * x
    if _constant(x, columns):
        return x.mul_(columns).clamp_(-1.0, 1.0)
    return torch.clamp(x * columns, -1.0, 1.0)


def stop_gradient(x: Array) -> Array:
    """x as a constant."""
    return x.detach()


def on_host(*arrays: Array) -> tuple[Any, tuple[Array, ...]]:
    """The arrays as NumPy's, and its functions; or as they are, and the functions here, where a gradient passes."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    if not _constant(*arrays) or any(x.device.type != "cpu" or wrapped(x) for x in arrays):
        return _here, arrays
    return special_numpy, tuple(x.detach().numpy() for x in arrays)


def repeat(times: int, body: Callable[[Any], Any], state: Any) -> Any:
    """`body` applied `times` times."""
    for _ in range(times):
        state = body(state)
    return state


def cumulative_logsumexp(x: Array) -> Array:
    """Along the last axis."""
    return torch.logcumsumexp(x, dim=-1)


def one_hot(index: Array, size: int) -> Array:
    """(...) of integers -> bool (..., size)."""
    return index[..., None] == torch.arange(size, device=index.device)


def sample_dtype(fn: Any) -> torch.dtype | None:
    """The dtype that `fn.sample()` has, where it is not that of its parameters."""
    return torch.int64 if isinstance(fn, torch.distributions.Categorical) else parameter_dtype(fn)


def parameter_dtype(fn: Any) -> torch.dtype | None:
    """The floating dtype of the distribution's parameters."""
    arrays = [value for value in vars(fn).values() if torch.is_tensor(value) and value.is_floating_point()]
    inner = [dtype for value in vars(fn).values() if hasattr(value, "log_prob") for dtype in [parameter_dtype(value)]]
    dtypes = [array.dtype for array in arrays] + [dtype for dtype in inner if dtype is not None]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).bits, default=None)


class _Elementwise(Function):  # type: ignore[misc]
    """A function of arrays that broadcast: batching is broadcasting, with the batch axes in front and ranks aligned."""

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple[int | None, ...], *args: Array) -> tuple[Array, int]:  # noqa: ARG003
        rank = max(x.ndim - (dim is not None) for x, dim in zip(args, in_dims, strict=True))
        aligned = []
        for x, dim in zip(args, in_dims, strict=True):
            if dim is not None:
                x = torch.movedim(x, dim, 0)
                x = x.reshape(x.shape[:1] + (1,) * (rank + 1 - x.ndim) + x.shape[1:])
            aligned.append(x)
        return cls.apply(*torch.broadcast_tensors(*aligned)), 0


class _LogNdtr(_Elementwise):
    @staticmethod
    def forward(z: Array) -> Array:
        return torch.special.log_ndtr(z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Array], output: Array) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Array) -> Array:
        return grad * special.log_ndtr_slope(_here, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, tangent: Array) -> Array:
        return tangent * special.log_ndtr_slope(_here, *ctx.saved_tensors)


class _NdtriExp(_Elementwise):
    @staticmethod
    def forward(log_p: Array) -> Array:
        return special.ndtri_exp(_here, log_p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Array], output: Array) -> None:  # noqa: ARG004
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: Array) -> Array:
        (w,) = ctx.saved_tensors
        return grad / special.log_ndtr_slope(_here, w, log_ndtr(w))

    jvp = backward


class _GammaLogQuantile(_Elementwise):
    @staticmethod
    def forward(concentration: Array, z: Array) -> Array:
        return special.gamma_log_quantile(_here, concentration, z)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Array, Array], output: Array) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Array) -> tuple[Array, Array]:
        by_concentration, by_z = special.gamma_log_quantile_slopes(_here, *ctx.saved_tensors)
        return grad * by_concentration, grad * by_z

    @staticmethod
    def jvp(ctx: Any, by_concentration: Array | None, by_z: Array | None) -> Array:
        slopes = special.gamma_log_quantile_slopes(_here, *ctx.saved_tensors)
        return sum(slope * by for slope, by in zip(slopes, (by_concentration, by_z), strict=True) if by is not None)


def log_ndtr(z: Array) -> Array:
    """log Φ(z)."""
    return _LogNdtr.apply(z)


def ndtri_exp(log_p: Array) -> Array:
    """The w <= 0 with log Φ(w) = log_p, for log_p <= log ½."""
    return _NdtriExp.apply(log_p)


def gamma_log_quantile(concentration: Array, z: Array) -> Array:
    """log of the quantile of Gamma(concentration, 1) at Φ(z); arguments broadcast."""
    return _GammaLogQuantile.apply(*torch.broadcast_tensors(concentration, z))


def poisson_quantile(rate: Array, z: Array) -> Array:
    """The smallest k with P(X <= k) >= Φ(z), X ~ Poisson(rate); has no gradient."""
    return special.poisson_quantile(_here, rate.detach(), z.detach())
