"""Ghost skips as a module of flax.linen. The only module here that needs flax.

from granet_jax.tost import linen
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from granet_jax.checks import check_axis_name, check_choice, check_function, check_type
from granet_jax.tost.config import Skips
from granet_jax.tost.ghost_skips import SKIP_KINDS, SkipKind, check_skip, ghost_skip

constant_init: jax.nn.initializers.Initializer = nn.initializers.constant(1e-4)
"""Initial kernel of the authors' code. Not small, since a norm follows; and all output
channels start equal."""


class GhostSkip(nn.Module):
    """G(x) of y = F(x) + alpha G(x), beside a convolution with its norm.

    ::

        y = norm(conv(x))
        if ghosts:  # static: the plain network is another program
            g = GhostSkip(features, strides, name="ghost_1")(x, train)
            y = y + alpha.astype(y.dtype) * g

    Whatever the module's own name, its parameters stand under names that begin with
    `"ghost_"`, for `drop_ghosts` and `without_ghosts`.

    Attributes:
      features: channels of the result.
      strides: of the convolution beside it; one for all axes, or one for each.
      kind: "identity", without parameters (see `ghost_skip`); or "conv", a 1 x 1
        convolution without bias and a batch norm, as in the authors' code.
      kernel_init: initial kernel of "conv"; `constant_init` in the authors' code.
      dtype: of the result of "conv"; None for that of the input and parameters.
      axis_name: mapped axis that the norm averages the statistics of the batch over.

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
        """G(x).

        Args:
          x: array of shape `(n, *positions, channels)`.
          train: with the statistics of the batch, which the running ones then follow.

        Returns:
          Array of shape `(n, *ceil(positions / strides), features)`.

        Raises:
          TypeError, ValueError: an attribute of the wrong type or out of range.
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
        """Raises TypeError or ValueError for an attribute that cannot be used."""
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
    """The module that the record asks for; for arguments see `GhostSkip`.

    Raises:
      TypeError: `config` is no `Skips`.
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
