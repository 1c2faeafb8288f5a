"""Networks: from normalised float images (n, height, width, channels) to logits.

Layers are named so that their alphabetical order, in which jax walks a dictionary of
parameters, is their order in the network; reports list them in it.
"""

from collections.abc import Callable

import flax.linen as nn
import jax


class MLP(nn.Module):
    """Fully connected layers with ReLU; LeNet-300-100 by default.

    Attributes:
      classes: number of logits.
      features: units of every hidden layer.

    References:
      LeCun et al., Gradient-Based Learning Applied to Document Recognition, 1998.
    """

    classes: int
    features: tuple[int, ...] = (300, 100)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (n, classes) of images (n, height, width, channels)."""
        x = x.reshape(x.shape[0], -1)
        for i, features in enumerate(self.features):
            x = nn.relu(nn.Dense(features, name=f"hidden_{i}")(x))
        return nn.Dense(self.classes, name="output")(x)


class CNN(nn.Module):
    """3 x 3 convolutions with ReLU, halving the resolution from the second on.

    Attributes:
      classes: number of logits.
      features: channels of every convolution.
    """

    classes: int
    features: tuple[int, ...] = (16, 32, 64)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (n, classes) of images (n, height, width, channels)."""
        for i, features in enumerate(self.features):
            strides = 1 if i == 0 else 2
            conv = nn.Conv(features, (3, 3), strides=strides, name=f"conv_{i}")
            x = nn.relu(conv(x))
        return nn.Dense(self.classes, name="output")(x.reshape(x.shape[0], -1))


MODELS: dict[str, Callable[[int], nn.Module]] = {"mlp": MLP, "cnn": CNN}
"""Networks by name, as functions of the number of classes."""
