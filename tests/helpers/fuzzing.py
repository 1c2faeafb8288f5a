"""Random training runs, held against the oracle at every step.

A `Lab` is what takes long to make: a tree of parameters, an inner optimizer, and the
compiled steps of a few methods. A `Run` is one of many runs through them.
"""

import functools
import pathlib
import random
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import granet_jax
from tests.core.test_contract import STRICT
from tests.helpers import luck, oracle, trees

PyTree = Any
DTYPES = ("float32", "bfloat16", "float16")


class Pair(NamedTuple):
    """A container of named fields, as one of those that trees are made of."""

    first: Any
    second: Any


class Recorded(NamedTuple):
    """A method: a function of `granet_jax` and of `oracle`, and its arguments."""

    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def leaf(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def rich_tree(*dtypes: str) -> PyTree:
    """All that a tree of parameters may hold; `dtypes` in turn."""
    first, second, third = (dtypes * 3)[:3]
    return {
        "matrix": leaf(first, 4, 8),
        "stack": [leaf(second, 3, 3, 2, 4), (leaf(third, 8, 3), leaf(first), None)],
        "bias": leaf(first, 8),
        "empty": leaf(first, 0, 3),
        "pair": Pair(leaf(second, 1, 1), leaf(third, 0)),
    }


# Factors are powers of two and gradients have eight bits: products are exact.
RATE = 2.0**-4
INNERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(RATE),
    "momentum": lambda: optax.sgd(RATE, momentum=0.5, nesterov=True),
    # In XLA's own compilation too a second moment that decays by half is exact.
    "adam": lambda: optax.adam(0.125, b1=0.5, b2=0.5, eps=2.0**-10),
    "adamw": lambda: optax.adamw(RATE, b1=0.5, b2=0.75, weight_decay=2.0**-4),
    "lion": lambda: optax.lion(RATE, b1=0.5, b2=0.75, weight_decay=2.0**-4),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(RATE, momentum=0.5), 3),
    "rmsprop": lambda: optax.rmsprop(RATE, decay=0.5, momentum=0.5),
}


def assert_equal(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal types and numbers; NaN equals NaN."""
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    if found.dtype == jnp.bfloat16:
        # NumPy does not know its NaN.
        found, wanted = found.astype(np.float32), wanted.astype(np.float32)
    np.testing.assert_array_equal(found, wanted)


def placed(tree: PyTree, mesh: jax.sharding.Mesh | None) -> PyTree:
    """Arrays spread over a mesh's one axis, where one of theirs divides by it."""

    def place(x: Any) -> jax.Array:
        if mesh is None:
            return jnp.asarray(np.asarray(x))
        divides = [i for i, n in enumerate(np.shape(x)) if n and n % mesh.size == 0]
        # As jit names them, without axes at the end that are not divided.
        axes = [None] * divides[-1] + ["x"] if divides else []
        return jax.device_put(np.asarray(x), NamedSharding(mesh, P(*axes)))

    return jax.tree.map(place, tree)


@functools.cache
def mesh_of(devices: int) -> jax.sharding.Mesh | None:
    if devices == 1:
        return None
    kinds = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("x",), kinds, devices=jax.devices()[:devices])


class Compiled:
    """A method on a lab's tree, and its compiled step."""

    def __init__(self, lab: "Lab", method: Recorded):
        self.method = getattr(granet_jax, method.function)(
            *method.args, **method.kwargs
        )
        self.recipe = getattr(oracle, method.function)(*method.args, **method.kwargs)
        self.devices: set[int] = set()
        where, inner = lab.where, INNERS[lab.inner]()
        options: dict[str, Any] = {"where": where, "seed": 5, "packed": lab.packed}
        if lab.steers:
            self.tx = granet_jax.transform(self.method, inner, **options)
        else:
            self.tx = optax.chain(inner, granet_jax.transform(self.method, **options))

        def step(params: PyTree, state: PyTree, grads: PyTree) -> PyTree:
            extra = {} if lab.steers else {"grads": grads}
            updates, state = self.tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state, updates

        self.init = jax.jit(self.tx.init, compiler_options=lab.options)
        self.step = jax.jit(step, compiler_options=lab.options)


class Lab:
    """A tree of parameters, an inner optimizer, and methods.

    Attributes:
      tree: of `jax.ShapeDtypeStruct`.
      methods: of those that a run may have, and change to.
      inner: of `INNERS`.
      flags: which leaves carry a mask; None for the default rule.
      packed: whether masks are held packed.
      steers: whether the method steers the optimizer, or is the last link after it.
      options: of the compiler.
    """

    def __init__(
        self,
        tree: PyTree,
        methods: list[Recorded],
        *,
        inner: str,
        flags: list[bool] | None = None,
        packed: bool = False,
        steers: bool = True,
        options: dict[str, Any] | None = STRICT,
    ):
        self.tree, self.methods, self.inner = tree, methods, inner
        self.packed, self.steers, self.options = packed, steers, options
        self.shapes = jax.tree.leaves(tree)
        self.structure = jax.tree.structure(tree)
        self.carries = flags or [len(x.shape) >= 2 for x in self.shapes]
        self.where = None if flags is None else self.structure.unflatten(flags)
        self.reference = INNERS[inner]()
        self.reference_init = jax.jit(self.reference.init, compiler_options=options)
        self.reference_step = jax.jit(self.reference.update, compiler_options=options)
        self.compiled = functools.cache(lambda i: Compiled(self, methods[i]))
        self.luck = functools.lru_cache(maxsize=64)(self._luck)

    @functools.cached_property
    def _draw(self) -> Callable[[int], list[jax.Array]]:
        shapes = [x.shape for x, c in zip(self.shapes, self.carries, strict=True) if c]
        return jax.jit(functools.partial(luck.random_scores, shapes, 5))

    def _luck(self, count: int) -> list[np.ndarray]:
        """The library's random scores of a step."""
        return jax.device_get(self._draw(count))

    def values(self, seed: int, kind: str) -> PyTree:
        """Random arrays of the tree, of eight bits at most.

        kind: "normal"; "ties", of few different values; "zeros"; or "bad", some of them
        not finite.
        """
        rng = np.random.default_rng(seed)

        def draw(x: jax.ShapeDtypeStruct) -> np.ndarray:
            drawn = rng.normal(size=x.shape)
            if kind == "ties":
                drawn = rng.integers(-3, 4, x.shape) / 4
            elif kind == "zeros":
                drawn = np.zeros(x.shape)
            elif kind == "bad":
                bad = rng.choice([np.nan, np.inf, -np.inf], x.shape)
                drawn = np.where(rng.random(x.shape) < 0.1, bad, drawn)
            return np.asarray(drawn, jnp.bfloat16).astype(x.dtype)

        return jax.tree.map(draw, self.tree)

    def masks(self, density: list[float], seed: int) -> PyTree:
        """Random masks; a density for each leaf, in turn."""
        rng = np.random.default_rng(seed)
        found: list[Any] = []
        for i, (x, carries) in enumerate(zip(self.shapes, self.carries, strict=True)):
            mask = rng.random(x.shape) < density[i % len(density)]
            found.append(mask if carries else None)
        return jax.tree.unflatten(self.structure, found)


class Reference:
    """The inner optimizer, compiled apart: an optimizer for `oracle.Trainer`.

    Attributes:
      state: of the inner optimizer.
    """

    def __init__(self, lab: Lab, params: PyTree):
        self.lab = lab
        self.state: Any = lab.reference_init(params)

    def _tree(self, arrays: list[Any]) -> PyTree:
        return jax.tree.unflatten(self.lab.structure, arrays)

    def step(self, grads: list, params: list) -> list:
        updates, self.state = jax.device_get(
            self.lab.reference_step(self._tree(grads), self.state, self._tree(params))
        )
        return jax.tree.leaves(updates)

    def _matches(self, x: Any) -> bool:
        return jax.tree.structure(x) == self.lab.structure

    def keep(self, keeps: list) -> None:
        everything = [
            np.ones(x.shape, bool) if k is None else k
            for x, k in zip(self.lab.shapes, keeps, strict=True)
        ]
        tree = self._tree(everything)

        def kept(x: Any) -> Any:
            if not self._matches(x):
                return x
            return jax.tree.map(lambda a, k: oracle.zeroed(np.asarray(a), k), x, tree)

        self.state = jax.tree.map(kept, self.state, is_leaf=self._matches)

    def restart(self, params: list) -> None:
        fresh = jax.device_get(self.lab.reference_init(self._tree(params)))
        self.state = jax.tree.map(
            lambda x, new: new if self._matches(x) else x,
            self.state,
            fresh,
            is_leaf=self._matches,
        )


class Run:
    """A run of the library and of the oracle, side by side."""

    def __init__(self, lab: Lab, method: int, seed: int, kind: str, apply_first: bool):
        self.lab, self.devices = lab, 1
        self.params = jax.tree.map(jnp.asarray, lab.values(seed, kind))
        self.begin(method, None)
        if apply_first and self.now.recipe.weights != "dense":
            masks = granet_jax.get_masks(self.state)
            self.params = granet_jax.apply_masks(self.params, masks)
            self.trainer.params = self.host(self.params)

    def host(self, tree: PyTree) -> list[np.ndarray]:
        return [np.asarray(x) for x in jax.tree.leaves(tree)]

    def host_masks(self, masks: PyTree) -> list[np.ndarray | None]:
        """One for each parameter, None where there is none."""
        found = jax.tree.leaves(
            masks, is_leaf=lambda x: x is None or isinstance(x, optax.MaskedNode)
        )
        # The tree's own None is no parameter.
        found = [x for x in found if x is not None]
        assert [not isinstance(x, optax.MaskedNode) for x in found] == self.lab.carries
        return [
            None if isinstance(x, optax.MaskedNode) else np.asarray(x) for x in found
        ]

    def begin(self, method: int, reference: Reference | None) -> None:
        """Starts a method from the present parameters."""
        lab = self.lab
        self.now = now = lab.compiled(method)
        here = jax.tree.map(jnp.asarray, jax.device_get(self.params))
        state: Any = now.init(here)
        drawn = self.host(self.params)
        recipe = now.recipe
        pairs = list(zip(drawn, lab.carries, strict=True))
        chosen = iter(
            oracle.initial_masks(recipe, lab.luck(0), [p for p, c in pairs if c])
        )
        masks = [next(chosen) if c else None for _, c in pairs]
        reference = reference or Reference(lab, jax.device_get(self.params))
        self.trainer = oracle.Trainer(
            recipe, drawn, masks, reference, steers=lab.steers
        )
        self.reference = reference
        self.state = placed(state, mesh_of(self.devices))
        self.check_masks()

    def sparse(self) -> granet_jax.SparseState:
        return granet_jax.get_state(self.state)

    def replace(self, **changes: Any) -> None:
        """Changes fields of the sparse state."""
        new = self.sparse()._replace(**changes)
        self.state = new if self.lab.steers else (self.state[0], new)

    def switch(self, method: int) -> None:
        """Another method goes on with the masks and moments of this one."""
        before, masks = self.state, granet_jax.get_masks(self.state)
        wanted = self.trainer.masks
        self.begin(method, self.reference)
        if self.lab.steers:
            self.replace(inner_state=before.inner_state)
        else:
            self.state = (before[0], self.state[1])
        self.state = granet_jax.set_masks(self.state, masks)
        self.trainer.masks = wanted
        self.check_masks()

    def set_masks(self, masks: PyTree) -> None:
        self.state = granet_jax.set_masks(self.state, masks)
        given = iter(jax.tree.leaves(masks))
        self.trainer.masks = [next(given) if c else None for c in self.lab.carries]
        self.check_masks()

    def jump(self, count: int) -> None:
        """As if so many steps had been done."""
        self.replace(count=placed(np.int32(count), mesh_of(self.devices)))
        # What the last step, which is another one now, updated.
        self.state = granet_jax.set_masks(self.state, granet_jax.get_masks(self.state))
        self.trainer.step_count = count

    def reshard(self, devices: int) -> None:
        self.devices = devices
        before = jax.device_get((self.params, self.state))
        self.params, self.state = placed(before, mesh_of(devices))

    def save_and_restore(self) -> None:
        """By orbax, onto types alone and where the arrays lie."""
        point = (self.params, self.state)
        # Orbax refuses empty arrays.
        content = jax.tree.map(lambda x: x if x.size else None, point)
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            content,
        )
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "state"
            with orbax.checkpoint.StandardCheckpointer() as checkpointer:
                checkpointer.save(path, content)
                checkpointer.wait_until_finished()
                restored = checkpointer.restore(path, like)
        restored = jax.tree.map(
            lambda x, y: y if x is None else x,
            restored,
            point,
            is_leaf=lambda x: x is None,
        )
        trees.assert_same(restored, point)
        for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(point), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        self.params, self.state = restored
        if self.devices == 1:
            # An array that is bound to its device is another argument to jit.
            self.reshard(1)

    def step(self, seed: int, kind: str) -> None:
        """A step of both, and all that is to hold after it."""
        now, trainer, lab = self.now, self.trainer, self.lab
        grads = lab.values(seed, kind)
        old, before = trainer.masks, trainer.params
        advances = trainer.step_count < oracle.LAST_STEP
        now.devices.add(self.devices)
        types = trees.types((self.params, self.state))
        placed_grads = placed(grads, mesh_of(self.devices))
        self.params, self.state, updates = jax.block_until_ready(
            now.step(self.params, self.state, placed_grads)
        )
        new = self.host_masks(granet_jax.get_masks(self.state))

        def given(grown: list[int], room: list[int]) -> None:
            # In single precision a share may round to another integer.
            pairs = zip(old, new, strict=True)
            found = [(o, n) for o, n in pairs if o is not None and n is not None]
            exact = [
                int(n.sum() - o.sum()) + d
                for (o, n), d in zip(found, self.dropped(old), strict=True)
            ]
            assert sum(exact) == sum(grown)
            for e, g, r in zip(exact, grown, room, strict=True):
                assert abs(e - g) <= len(grown)
                assert e <= r
            grown[:] = exact

        trainer.step(self.host(grads), lab.luck, given)
        # Nothing is compiled anew, and nothing changes its type.
        assert now.step._cache_size() == len(now.devices)
        assert trees.types((self.params, self.state)) == types
        self.check_masks()
        if advances:
            self.check_numbers(old, before)
        for x, u, expected, update, p, keep in zip(
            self.host(self.params),
            self.host(updates),
            trainer.params,
            trainer.updates,
            before,
            trainer.keeps,
            strict=True,
        ):
            assert x.dtype == p.dtype
            assert_equal(u, update)
            # A weight that goes on has the inner optimizer's update, zero's sign too.
            kept = ~np.isnan(u) if keep is None else keep & ~np.isnan(u)
            assert u[kept].tobytes() == update[kept].tobytes()
            assert_equal(x, expected)
        state = self.sparse()
        inner = state.inner_state if lab.steers else self.state[0]
        for x, expected in zip(
            self.host(inner), self.host(self.reference.state), strict=True
        ):
            assert_equal(x, expected)
        if now.recipe.decay is not None:
            found = self.host(state.accumulator)
            for x, a in zip(found, trainer.masked(trainer.accumulators), strict=True):
                assert x.dtype == np.float32
                assert_equal(x, a)

    def dropped(self, masks: list[np.ndarray | None]) -> list[int]:
        fraction = self.now.recipe.fractions[self.trainer.step_count]
        active = [int(m.sum()) for m in masks if m is not None]
        return [oracle.number_dropped(fraction, a) for a in active]

    def check_masks(self) -> None:
        """The masks are the oracle's, and the state counts as it does."""
        state = self.sparse()
        assert int(state.count) == self.trainer.step_count
        assert (jax.tree.leaves(state.marked) != []) == (
            self.now.recipe.marked is not None
        )
        found = [(granet_jax.get_masks(self.state), self.trainer.masks)]
        if self.now.recipe.marked is not None:
            marked = granet_jax.unpack_masks(state.marked)
            found.append((marked, self.trainer.marked))
        for masks, wanted in found:
            for m, w in zip(self.host_masks(masks), wanted, strict=True):
                if w is not None:
                    assert m is not None
                    assert m.dtype == bool
                    np.testing.assert_array_equal(m, w)

    def check_numbers(self, old: list[np.ndarray | None], before: list) -> None:
        """What holds by definition, whatever the oracle does."""
        recipe, t = self.now.recipe, self.trainer.step_count
        masks = self.host_masks(granet_jax.get_masks(self.state))
        for p, b, m, o in zip(self.host(self.params), before, masks, old, strict=True):
            if m is None or o is None:
                continue
            if recipe.weights != "dense":
                # Nothing can be added to NaN, or to infinity, that makes it zero.
                assert not np.any(p[~m & np.isfinite(b)])
            if recipe.weights == "sparse" and t not in recipe.update_steps:
                np.testing.assert_array_equal(m, o)
        active = [int(m.sum()) for m in masks if m is not None]
        was = [int(o.sum()) for o in old if o is not None]
        sizes = [m.size for m in masks if m is not None]
        target = oracle.total_count(sum(sizes), recipe.sparsity(t))
        number, change = self.trainer.plan.get(t, ([], 0))
        if recipe.weights != "sparse":
            if t % recipe.refresh == 0 or t in recipe.update_steps:
                assert sum(active) == target
        elif change and any(c > 0 for _, c in self.trainer.plan.values()):
            assert sum(active) == target
        elif change and recipe.scope == "global":
            assert sum(active) == min(target, sum(was))
        elif change:
            assert sum(number) == target
            present = [min(n, w) for n, w in zip(number, was, strict=True)]
            assert active == present
        elif t not in recipe.targets:
            assert sum(active) == sum(was)


# --- Labs ---------------------------------------------------------------------------


def recorded(function: str, *args: Any, **kwargs: Any) -> Recorded:
    return Recorded(function, args, kwargs)


def drawn_method(
    rng: random.Random,
    *,
    steers: bool = True,
    penalised: bool = True,
    updates: int = 1,
) -> Recorded:
    """A method with random arguments, of about so many updates or a few more.

    steers: whether it is to steer the optimizer, or be the last link after it.
    penalised: whether it may add a penalty to the gradient.
    """

    def number(*special: float) -> float:
        return rng.choice([*special, round(rng.uniform(0, 0.99), 3)])

    sparsity = number(0.9, 0.5, 0.0)
    start = sparsity * rng.choice([0.0, 0.5, 1.0])
    interval, begin = rng.randint(1, 4), rng.randint(0, 4)
    end = begin + interval * updates + rng.randint(0, 12)
    both = {
        "scope": rng.choice(["global", "layer"]),
        "distribution": rng.choice(["erk", "er", "uniform"]),
    }
    rise = {
        "initial_sparsity": start,
        "begin_step": begin,
        "interval": interval,
        **both,
    }
    exchange = {
        "interval": interval,
        "fraction": number(0.5, 0.0, 1.0),
        "distribution": both["distribution"],
    }
    total = interval * (updates + 2) + rng.randint(0, 12)
    period = interval * (updates + 1) + rng.randint(0, 6)
    drawn = [
        recorded(
            "granet",
            sparsity,
            end + rng.randint(0, 6),
            end_step=end,
            fraction=number(0.5, 0.0, 1.0),
            final_fraction=number(0.0, 1.0),
            grow=rng.choice(["gradient", "random"]),
            **rise,
        ),
        recorded("gmp", sparsity, end, **rise),
        recorded("rigl", sparsity, total, stop=rng.choice([1.0, 0.75]), **exchange),
        recorded("set_", sparsity, total, **exchange),
        recorded("snfs", sparsity, total, decay=0.5, **exchange),
        recorded("static", sparsity, distribution=both["distribution"]),
        recorded(
            "cyclical",
            sparsity,
            3 * period,
            cycles=3,
            initial_sparsity=start,
            ramp=0.5,
            interval=interval,
            recovery=rng.choice(["hard", "projected", "straight_through"]),
            **both,
        ),
        recorded("straight_through", sparsity, end, **rise),
    ]
    if steers:
        switches = sorted(rng.sample(range(1, 20 * updates), updates // 2 * 2 + 5))
        drawn += [
            recorded("acdc", sparsity, tuple(switches), **both),
            recorded(
                "sculpt", sparsity, 3 * period, cycles=2, initial_sparsity=start, **both
            ),
            recorded(
                "straight_through",
                sparsity,
                end,
                penalty=2.0 ** -rng.randint(1, 6),
                **rise,
            ),
            recorded(
                "top_kast",
                0.75,
                backward_sparsity=rng.choice([0.5, 0.25, 0.75]),
                interval=interval,
                penalty=rng.choice([0.0, 2.0**-5]),
                **both,
            ),
            recorded(
                "greg1",
                sparsity,
                interval=interval,
                growth=0.125,
                ceiling=0.25,  # (A product with 3/8 is rounded.)
                settle_steps=rng.randint(0, 3),
                **both,
            ),
            recorded(
                "greg2",
                sparsity,
                interval=interval,
                growth=0.25,
                ceiling=0.5,
                settle_steps=rng.randint(0, 3),
                pick_growth=0.125,
                pick_ceiling=0.25,
                weight_decay=2.0**-4,
                **both,
            ),
        ]
    if not penalised:
        penalties = ("greg1", "greg2")
        drawn = [
            m
            for m in drawn
            if m.function not in penalties and not m.kwargs.get("penalty")
        ]
    return rng.choice(drawn)


def drawn_tree(rng: random.Random) -> PyTree:
    """A tree of any containers, with one leaf of two axes at least."""

    def array() -> jax.ShapeDtypeStruct:
        shape = [rng.choice([2, 3, 1, 5, 8, 0]) for _ in range(rng.randint(0, 4))]
        return leaf(rng.choice(DTYPES), *shape)

    def subtree(depth: int) -> PyTree:
        kind = rng.choice(["leaf", "leaf", "dict", "list", "tuple", "pair"])
        if depth == 0 or kind == "leaf":
            return array()
        number = rng.randint(1, 3)
        if kind == "dict":
            return {name: subtree(depth - 1) for name in "abc"[:number]}
        if kind == "pair":
            return Pair(subtree(depth - 1), rng.choice([None, array()]))
        parts = [subtree(depth - 1) for _ in range(number)]
        return tuple(parts) if kind == "tuple" else parts

    kernel = [rng.randint(2, 4) for _ in range(rng.randint(2, 3))]
    return {"kernel": leaf(rng.choice(DTYPES), *kernel), "rest": subtree(2)}


def drawn_lab(seed: int, methods: int = 4) -> Lab:
    """Everything at random."""
    rng = random.Random(seed)
    tree = drawn_tree(rng)
    flags = None
    if rng.random() < 0.5:
        flags = [bool(x.shape) and rng.random() < 0.5 for x in jax.tree.leaves(tree)]
        flags[0] = True  # That of the kernel.
    steers = rng.random() < 0.75
    inner = rng.choice(list(INNERS))
    # A gradient with a penalty has more than eight bits: its square is rounded, or not
    # before it is added to something.
    penalised = inner not in ("adam", "adamw", "rmsprop")
    return Lab(
        tree,
        [drawn_method(rng, steers=steers, penalised=penalised) for _ in range(methods)],
        inner=inner,
        flags=flags,
        packed=rng.random() < 0.5,
        steers=steers,
    )
