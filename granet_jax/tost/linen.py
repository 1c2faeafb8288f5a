"""Ghost skips as a module of flax.linen. No other module of the library needs flax.

from granet_jax.tost import linen
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from granet_jax.checks import check_axis_name, check_choice, check_function, check_type
from granet_jax.tost.config import Skips
from granet_jax.tost.ghost_skips import SKIP_KINDS, SkipKind, check_skip, ghost_skip

constant_init: jax.nn.initializers.Initializer = nn.initializers.constant(1e-4)
"""Initializer of the authors' code.

Its scale has no effect, because a norm follows; all output channels start equal.
"""


class GhostSkip(nn.Module):
    """Ghost skip G(x) in y = F(x) + alpha G(x), for F a convolution and its norm.

    ::

        y = norm(conv(x))
        if ghosts:  # Static: the plain network compiles to another program.
            g = GhostSkip(features, strides, name="ghost_1")(x, train)
            y = y + alpha.astype(y.dtype) * g

    Whatever the name of the module, the names of its parameters begin with `"ghost_"`,
    so that `drop_ghosts` and `without_ghosts` recognize them.

    Attributes:
      features: Number of output channels.
      strides: Strides of the convolution F; one for all axes, or one for each.
      kind: "identity", without parameters (see `ghost_skip`); or "conv", a 1 x 1
        convolution without bias followed by batch norm, as in the authors' code.
      kernel_init: Initializer of the kernel of "conv"; `constant_init` in the authors'
        code.
      dtype: Dtype of the result of "conv"; None for that of the input and parameters.
      axis_name: Mapped axis over which the norm averages the batch statistics.

    References:
      Jaiswal et al., Training Your Sparse Neural Network Better with Any Mask, ICML
      2022.
    """

    features: int
    strides: int | tuple[int, ...] = 1
    kind: SkipKind = "identity"
    kernel_init: jax.nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: jnp.dtype | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return G(x).

        Args:
          x: Array of shape `(n, *positions, channels)`.
          train: Whether the norm uses the statistics of the batch and updates its
            running statistics, instead of using the running statistics.

        Returns:
          Array of shape `(n, *ceil(positions / strides), features)`.

        Raises:
          TypeError, ValueError: An attribute of the wrong type or out of range.
        """
        check_choice("kind", self.kind, SKIP_KINDS)
        if self.kind == "identity":
            return ghost_skip(x, self.features, self.strides)
        self._check(x)
        y = nn.Conv(
            self.features,
            (1,) * (x.ndim - 2),
            self.strides,
            use_bias=False,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name="ghost_conv",
        )(x)
        return nn.BatchNorm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.axis_name,
            name="ghost_norm",
        )(y)

    def _check(self, x: jax.Array) -> None:
        """Raise TypeError or ValueError for an invalid attribute."""
        check_skip(x, self.features, self.strides)
        check_function("kernel_init", self.kernel_init, "an initializer")
        if self.dtype is not None:
            try:
                floating = jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating)
            except TypeError:
                floating = False
            if not floating:
                raise TypeError(
                    f"dtype must be a floating dtype or None, got {self.dtype!r}."
                )
        check_axis_name(self.axis_name)


def make_skip(
    config: Skips,
    features: int,
    strides: int | tuple[int, ...] = 1,
    *,
    dtype: jnp.dtype | None = None,
    axis_name: str | None = None,
    name: str | None = None,
) -> GhostSkip:
    """Create the module that a record describes. For arguments see `GhostSkip`.

    Raises:
      TypeError: `config` is not a `Skips`.
    """
    check_type("config", config, Skips, "a record granet_jax.tost.Skips(...)")
    return GhostSkip(
        features,
        strides,
        kind=config.kind,
        kernel_init=(
            constant_init if config.constant_init else nn.initializers.lecun_normal()
        ),
        dtype=dtype,
        axis_name=axis_name,
        name=name,
    )
