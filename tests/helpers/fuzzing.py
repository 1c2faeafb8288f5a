"""Training runs, compared with the NumPy reference bit for bit after every step.

A `Lab` holds what takes long to compile: a tree of parameters, an inner optimizer, and
the steps of a few methods. A `Run` is one of many runs in a lab.
"""

import functools
import operator
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
from granet_jax import structures
from tests.helpers import luck, numpy_reference, trees
from tests.helpers.compiler_options import QUICK, STRICT
from tests.helpers.numpy_reference import each, zeroed
from tests.helpers.training import mask_list
from tests.methods import records

PyTree = Any
DTYPES = ("float32", "bfloat16", "float16")
SEED = 5  # Of initial masks and of random growth.


class Pair(NamedTuple):
    """A container with named fields."""

    first: Any
    second: Any


class MethodSpec(NamedTuple):
    """A factory of methods and its arguments; a structure is (name, arguments...)."""

    function: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def build(self) -> tuple[granet_jax.Method, numpy_reference.ReferenceMethod]:
        ours = records if self.function == "own" else granet_jax
        pair = []
        for module, forms in ((ours, structures), (numpy_reference, numpy_reference)):
            kwargs = dict(self.kwargs)
            if "structure" in kwargs:
                form, *sides = kwargs["structure"]
                kwargs["structure"] = getattr(forms, form)(*sides)
            pair.append(getattr(module, self.function)(*self.args, **kwargs))
        return tuple(pair)


def spec(function: str, *args: Any, **kwargs: Any) -> MethodSpec:
    return MethodSpec(function, args, kwargs)


def leaf(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def rich_tree(*dtypes: str) -> PyTree:
    """A tree of every kind of container and leaf, which have the dtypes in turn."""
    first, second, third = (dtypes * 3)[:3]
    return {
        "matrix": leaf(first, 4, 8),
        "stack": [leaf(second, 3, 3, 2, 4), (leaf(third, 8, 3), leaf(first), None)],
        "bias": leaf(first, 8),
        "empty": leaf(first, 0, 3),
        "pair": Pair(leaf(second, 1, 1), leaf(third, 0)),
    }


# Every structure divides the kernels.
KERNELS = {
    "bias": leaf("float32", 6),
    "conv": leaf("float32", 3, 3, 8, 4),
    "dense": leaf("float32", 16, 6),
}

# Factors are powers of two and gradients have eight bits, so products are exact.
RATE = 2.0**-4
INNERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(RATE),
    "momentum": lambda: optax.sgd(RATE, momentum=0.5, nesterov=True),
    # A second moment that decays by half is exact with XLA's default options as well.
    "adam": lambda: optax.adam(0.125, b1=0.5, b2=0.5, eps=2.0**-10),
    "adamw": lambda: optax.adamw(RATE, b1=0.5, b2=0.75, weight_decay=2.0**-4),
    "lion": lambda: optax.lion(RATE, b1=0.5, b2=0.75, weight_decay=2.0**-4),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.sgd(RATE, momentum=0.5), 3),
    # The limit is far above the norm, but the clipping looks at all weights.
    "clipped": lambda: optax.chain(
        optax.clip_by_global_norm(2.0**10), optax.sgd(RATE, momentum=0.5)
    ),
    "rmsprop": lambda: optax.rmsprop(RATE, decay=0.5, momentum=0.5),
}


def host(tree: PyTree) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def assert_equal(actual: np.ndarray, wanted: np.ndarray) -> None:
    """Asserts equal types and numbers; NaN equals NaN."""
    assert (actual.shape, actual.dtype) == (wanted.shape, wanted.dtype)
    if actual.dtype == jnp.bfloat16:
        # NumPy does not recognise NaN in bfloat16.
        actual, wanted = actual.astype(np.float32), wanted.astype(np.float32)
    np.testing.assert_array_equal(actual, wanted)


def placed(tree: PyTree, devices: int) -> PyTree:
    """Shards every array over the devices along an axis that they divide, if any."""

    def place(x: Any) -> jax.Array:
        if devices == 1:
            return jnp.asarray(np.asarray(x))
        divides = [i for i, n in enumerate(np.shape(x)) if n and n % devices == 0]
        # As jit names shardings: without the last axes that are not sharded.
        axes = [None] * divides[-1] + ["x"] if divides else []
        return jax.device_put(np.asarray(x), NamedSharding(_mesh(devices), P(*axes)))

    return jax.tree.map(place, tree)


@functools.cache
def _mesh(devices: int) -> jax.sharding.Mesh:
    kinds = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((devices,), ("x",), kinds, devices=jax.devices()[:devices])


class Compiled:
    """A method on a lab's tree, and its compiled step."""

    def __init__(self, lab: "Lab", method: MethodSpec) -> None:
        self.method, self.reference = method.build()
        self.devices: set[int] = set()
        inner = INNERS[lab.inner]()
        build = functools.partial(
            granet_jax.transform,
            self.method,
            where=lab.where,
            seed=SEED,
            packed=lab.packed,
        )
        self.tx = build(inner) if lab.steers else optax.chain(inner, build())

        def step(params: PyTree, state: PyTree, grads: PyTree) -> PyTree:
            extra = {} if lab.steers else {"grads": grads}
            updates, state = self.tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state, updates

        self.step = jax.jit(step, compiler_options=lab.options)


class Lab:
    """A tree of parameters, an inner optimizer, and methods that a run may have.

    Attributes:
      flags: Whether each leaf carries a mask; None for the default rule.
      packed: Whether masks are packed.
      steers: Whether the method wraps the optimizer, or is the last link after it.
      coarse: Whether all values are few, so that sums of them are exact.
      options: Options of the compiler.
    """

    def __init__(
        self,
        tree: PyTree,
        methods: list[MethodSpec],
        *,
        inner: str,
        flags: list[bool] | None = None,
        packed: bool = False,
        steers: bool = True,
        coarse: bool = False,
        options: dict[str, Any] | None = STRICT,
    ) -> None:
        self.coarse = coarse
        self.tree, self.methods, self.inner = tree, methods, inner
        self.packed, self.steers, self.options = packed, steers, options
        self.leaves, self.treedef = jax.tree.flatten(tree)
        self.carries = flags or [len(x.shape) >= 2 for x in self.leaves]
        self.where = None if flags is None else self.treedef.unflatten(flags)
        optimizer = INNERS[inner]()
        self.inner_init = optimizer.init
        self.inner_step = jax.jit(optimizer.update, compiler_options=options)
        self.compiled = functools.cache(lambda i: Compiled(self, methods[i]))
        shapes = [x.shape for x in self.masked(self.leaves)]
        draw = functools.partial(luck.random_scores, shapes, SEED)
        draw = jax.jit(draw, compiler_options=QUICK)
        self.luck = functools.cache(lambda count: jax.device_get(draw(count)))
        odd = functools.partial(luck.odd_factors, len(shapes), SEED)
        self.odd_factors = functools.cache(lambda count: jax.device_get(odd(count)))

    def masked(self, leaves: list[Any]) -> list[Any]:
        return [x for x, c in zip(leaves, self.carries, strict=True) if c]

    def values(self, seed: int, kind: str) -> PyTree:
        """Draws an array of at most eight bits for every leaf.

        Kinds are "normal"; "ties", few different values; "zeros"; or "bad", some values
        not finite.
        """
        rng = np.random.default_rng(seed)

        def draw(x: jax.ShapeDtypeStruct) -> np.ndarray:
            drawn = rng.normal(size=x.shape)
            if kind == "ties" or self.coarse:
                drawn = rng.integers(-3, 4, x.shape) / 4
            if kind == "zeros":
                drawn = np.zeros(x.shape)
            elif kind == "bad":
                bad = rng.choice([np.nan, np.inf, -np.inf], x.shape)
                drawn = np.where(rng.random(x.shape) < 0.1, bad, drawn)
            return np.asarray(drawn, jnp.bfloat16).astype(x.dtype)

        return jax.tree.map(draw, self.tree)

    def masks(self, density: list[float], seed: int) -> PyTree:
        """Draws masks; the leaves have the densities in turn."""
        rng = np.random.default_rng(seed)
        drawn = [
            rng.random(x.shape) < density[i % len(density)]
            for i, x in enumerate(self.leaves)
        ]
        chosen = each(lambda m, c: m if c else None, drawn, self.carries)
        return self.treedef.unflatten(chosen)


class InnerOptimizer:
    """The inner optimizer, compiled by itself, for `ReferenceTraining`."""

    def __init__(self, lab: Lab, params: PyTree) -> None:
        self.lab = lab
        self.state: Any = lab.inner_init(params)

    def step(self, grads: list, params: list) -> list:
        unflatten = self.lab.treedef.unflatten
        updates, self.state = jax.device_get(
            self.lab.inner_step(unflatten(grads), self.state, unflatten(params))
        )
        return jax.tree.leaves(updates)

    def keep(self, keeps: list) -> None:
        def kept(x: Any) -> Any:
            if not self._is_moments(x):
                return x
            return self.lab.treedef.unflatten(each(zeroed, host(x), keeps))

        self.state = jax.tree.map(kept, self.state, is_leaf=self._is_moments)

    def restart(self, params: list) -> None:
        fresh = jax.device_get(self.lab.inner_init(self.lab.treedef.unflatten(params)))
        self.state = jax.tree.map(
            lambda x, new: new if self._is_moments(x) else x,
            *(self.state, fresh),
            is_leaf=self._is_moments,
        )

    def _is_moments(self, x: Any) -> bool:
        return jax.tree.structure(x) == self.lab.treedef


class Run:
    """A run of the library and of the reference, side by side."""

    def __init__(
        self, lab: Lab, method: int, seed: int, kind: str, apply_first: bool
    ) -> None:
        self.lab, self.devices = lab, 1
        self.params = jax.tree.map(jnp.asarray, lab.values(seed, kind))
        self.begin(method, InnerOptimizer(lab, jax.device_get(self.params)))
        if apply_first and self.compiled.reference.weights != "dense":
            masks = granet_jax.get_masks(self.state)
            self.params = granet_jax.apply_masks(self.params, masks)
            self.training.params = host(self.params)

    def host_masks(self, masks: PyTree) -> list[np.ndarray | None]:
        """Returns a mask for each parameter, None where it carries none."""
        found = mask_list(masks)
        assert [m is not None for m in found] == self.lab.carries
        return found

    def begin(self, method: int, optimizer: InnerOptimizer) -> None:
        """Starts a method from the present parameters."""
        lab, params = self.lab, host(self.params)
        self.compiled, self.optimizer = lab.compiled(method), optimizer
        state: Any = self.compiled.tx.init(placed(jax.device_get(self.params), 1))
        drawn = lab.luck(0), lab.masked(params)
        chosen = iter(numpy_reference.initial_masks(self.compiled.reference, *drawn))
        masks = [next(chosen) if c else None for c in lab.carries]
        if self.compiled.reference.draws_boxes:
            # Norms of random integers are rounded, by the order in which XLA adds them.
            masks = self.host_masks(granet_jax.get_masks(state))
        self.training = numpy_reference.ReferenceTraining(
            self.compiled.reference, params, masks, optimizer, steers=lab.steers
        )
        self.state = placed(state, self.devices)
        self.check_masks()

    def sparse(self) -> granet_jax.SparseState:
        return granet_jax.get_state(self.state)

    def replace(self, **changes: Any) -> None:
        """Changes fields of the sparse state."""
        new = self.sparse()._replace(**changes)
        self.state = new if self.lab.steers else (self.state[0], new)

    def switch(self, method: int) -> None:
        """Continues with another method from the present masks and moments."""
        before, masks = self.state, granet_jax.get_masks(self.state)
        wanted = self.training.masks
        self.begin(method, self.optimizer)
        if self.lab.steers:
            self.replace(inner_state=before.inner_state)
        else:
            self.state = (before[0], self.state[1])
        self.state = granet_jax.set_masks(self.state, masks)
        self.training.masks = wanted
        self.check_masks()

    def set_masks(self, masks: PyTree) -> None:
        self.state = granet_jax.set_masks(self.state, masks)
        leaves = iter(jax.tree.leaves(masks))
        self.training.masks = [next(leaves) if c else None for c in self.lab.carries]
        self.check_masks()

    def jump(self, count: int) -> None:
        """Sets the step count."""
        self.replace(count=placed(np.int32(count), self.devices))
        self.training.step_count = count

    def reshard(self, devices: int) -> None:
        self.devices = devices
        before = jax.device_get((self.params, self.state))
        self.params, self.state = placed(before, devices)

    def save_and_restore(self) -> None:
        """Saves with Orbax, and restores from types and shardings alone."""
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
            *(restored, point),
            is_leaf=lambda x: x is None,
        )
        trees.assert_same(restored, point)
        for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(point), strict=True):
            assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
        self.params, self.state = restored
        if self.devices == 1:
            # To jit, an array that is bound to its device is another type of argument.
            self.reshard(1)

    def step(self, seed: int, kind: str) -> None:
        """Takes a step with both, and checks all that must hold after it."""
        compiled, training, lab = self.compiled, self.training, self.lab
        grads = lab.values(seed, kind)
        old, before = training.masks, training.params
        advances = training.step_count < numpy_reference.LAST_STEP
        compiled.devices.add(self.devices)
        types = trees.types((self.params, self.state))
        self.params, self.state, updates = jax.block_until_ready(
            compiled.step(self.params, self.state, placed(grads, self.devices))
        )
        new = self.host_masks(granet_jax.get_masks(self.state))
        adjust = functools.partial(self._adjust, old, new)
        training.step(host(grads), lab.luck, adjust, lab.odd_factors)
        # Nothing is compiled again, and nothing changes its type. (A process that has
        # compiled thousands of programs forgets some.)
        assert compiled.step._cache_size() <= len(compiled.devices)
        assert trees.types((self.params, self.state)) == types
        self.check_masks()
        if advances:
            self.check_invariants(old, before)
        self._check_values(host(updates), before)

    def _adjust(self, old: list, new: list, grown: list[int], room: list[int]) -> None:
        """Accepts shares of the library that single precision rounds differently."""
        method, t = self.compiled.reference, self.training.step_count
        before, after = (method.active(self.lab.masked(m)) for m in (old, new))
        sizes = method.sizes([m.shape for m in self.lab.masked(old)])
        left = each(operator.sub, sizes, room)
        assert method.threshold is not None or left == [
            a - numpy_reference.number_dropped(method.fractions[t], a) for a in before
        ]
        exact = each(operator.sub, after, left)
        assert sum(exact) == sum(grown)
        for e, g, r in zip(exact, grown, room, strict=True):
            assert abs(e - g) <= len(grown)
            assert e <= r
        grown[:] = exact

    def _check_values(self, updates: list, before: list) -> None:
        """Checks parameters, updates, moments and averages."""
        lab, training = self.lab, self.training
        for x, u, expected, update, p, keep in zip(
            *(host(self.params), updates, training.params, training.updates),
            *(before, training.keeps),
            strict=True,
        ):
            assert x.dtype == p.dtype
            assert_equal(u, update)
            # Weights that continue have the inner optimizer's update, signed zeros too.
            kept = ~np.isnan(u) if keep is None else keep & ~np.isnan(u)
            assert u[kept].tobytes() == update[kept].tobytes()
            assert_equal(x, expected)
        inner = self.sparse().inner_state if lab.steers else self.state[0]
        for x, expected in zip(host(inner), host(self.optimizer.state), strict=True):
            assert_equal(x, expected)
        if self.compiled.reference.decay is not None:
            averages = training.masked(training.averages)
            for x, a in zip(host(self.sparse().average), averages, strict=True):
                assert_equal(x, a)

    def check_masks(self) -> None:
        """Checks that masks and step count are those of the reference."""
        state, training = self.sparse(), self.training
        marks = self.compiled.reference.marked is not None
        assert int(state.count) == training.step_count
        assert (jax.tree.leaves(state.marked) != []) == marks
        pairs = [(granet_jax.get_masks(self.state), training.masks)]
        if marks:
            pairs.append((granet_jax.unpack_masks(state.marked), training.marked))
        for masks, wanted in pairs:
            for m, w in zip(self.host_masks(masks), wanted, strict=True):
                if w is not None:
                    assert m is not None
                    assert m.dtype == bool
                    np.testing.assert_array_equal(m, w)

    def check_invariants(self, old: list[np.ndarray | None], before: list) -> None:
        """Checks what holds by definition, whatever the reference does."""
        method, t = self.compiled.reference, self.training.step_count
        masks = self.host_masks(granet_jax.get_masks(self.state))
        for p, b, m, o in zip(host(self.params), before, masks, old, strict=True):
            if m is None or o is None:
                continue
            if method.weights != "dense":
                # No addition makes NaN or infinity zero.
                assert not np.any(p[~m & np.isfinite(b)])
            if method.weights == "sparse" and t not in method.update_steps:
                np.testing.assert_array_equal(m, o)
        masked = self.lab.masked(masks)
        active, was = method.active(masked), method.active(self.lab.masked(old))
        if method.ranks_across:
            active, was = [sum(active)], [sum(was)]
        if method.weights != "sparse":
            if t % method.refresh == 0 or t in method.update_steps:
                shapes = [m.shape for m in masked]
                expected = method.numbers(shapes, method.sparsity(t))
                assert method.structure is not None or active == expected
        elif method.targets and t in self.training.plan:
            number = self.training.plan[t]
            if method.makes_up:
                active, number, was = [sum(active)], [sum(number)], [sum(was)]
            few = [min(n, w) for n, w in zip(number, was, strict=True)]
            expected = few if method.revive is None else number
            assert method.structure is not None or active == expected
        else:
            assert sum(active) == sum(was)


def run_schedule(lab: Lab, method: int = 0) -> tuple[int, Run]:
    """Runs the whole schedule of a method twice, masked at first and not, with ties.

    Returns the number of steps that changed masks, and the second run.
    """
    reference = lab.compiled(method).reference
    last = max([*reference.update_steps, 5])
    changed = 0
    for seed, kind in enumerate(("normal", "ties")):
        run = Run(lab, method, seed, kind, apply_first=seed == 0)
        for t in range(last + 3):
            before = lab.masked(run.training.masks)
            run.step(1000 * seed + t, kind)
            after = lab.masked(run.training.masks)
            changed += any(map(np.any, map(np.not_equal, before, after)))
    return changed, run


# --- Random labs --------------------------------------------------------------------


def drawn_method(rng: random.Random, *, steers: bool, penalised: bool) -> MethodSpec:
    """Draws a method that may need to wrap the optimizer, or to add a penalty."""

    def number(*special: float) -> float:
        return rng.choice([*special, round(rng.uniform(0, 0.99), 3)])

    sparsity, share, last = number(0.9, 0.5, 0.0), number(0.5, 0.0, 1.0), number(0.0)
    start = {"initial_sparsity": sparsity * rng.choice([0.0, 0.5, 1.0])}
    begin, interval = rng.randint(0, 4), {"interval": rng.randint(1, 4)}
    length = interval["interval"]
    end = begin + length + rng.randint(0, 12)
    total = 3 * length + rng.randint(0, 12)
    cycle = 2 * length + rng.randint(0, 6)
    uniform = {"distribution": rng.choice(["erk", "er", "uniform"]), **interval}
    ranking = {"scope": rng.choice(["global", "layer"]), **uniform}
    rise = {**start, "begin_step": begin, **ranking}
    later = {"end_step": end, "grow": rng.choice(["gradient", "random"]), **rise}
    cycles = {"cycles": 3, "ramp": 0.5, **start, **ranking}
    recovery = rng.choice(["hard", "projected", "straight_through"])
    without = {k: v for k, v in ranking.items() if k != "interval"}
    drawn = [
        spec("granet", sparsity, end + 6, fraction=share, final_fraction=last, **later),
        spec("gmp", sparsity, end, **rise),
        spec("rigl", sparsity, total, fraction=share, **uniform),
        spec("set_", sparsity, total, fraction=share, **uniform),
        spec("snfs", sparsity, total, fraction=share, decay=0.5, **uniform),
        spec("static", sparsity, distribution=uniform["distribution"]),
        spec("cyclical", sparsity, 3 * cycle, recovery=recovery, **cycles),
        spec("straight_through", sparsity, end, **rise),
    ]
    if steers:
        switches = tuple(sorted(rng.sample(range(1, 20), 5)))
        drawn += [
            spec("acdc", sparsity, switches, **without),
            spec("sculpt", sparsity, 3 * cycle, cycles=2, **start, **without),
        ]
    if steers and penalised:
        # Products of a coefficient of one bit are exact.
        kast = {"backward_sparsity": rng.choice([0.5, 0.25, 0.75]), **ranking}
        greg = {"growth": 0.25, "settle_steps": rng.randint(0, 3), **ranking}
        pick = {"pick_growth": 0.125, "pick_ceiling": 0.25, "weight_decay": 2.0**-4}
        drawn += [
            spec("straight_through", sparsity, end, penalty=2.0**-4, **rise),
            spec("top_kast", 0.75, penalty=rng.choice([0.0, 2.0**-5]), **kast),
            spec("greg1", sparsity, ceiling=0.25, **greg),
            spec("greg2", sparsity, ceiling=0.5, **greg, **pick),
        ]
    return rng.choice(drawn)


def drawn_tree(rng: random.Random) -> PyTree:
    """Draws a tree of any containers that has a leaf with two axes or more."""

    def array() -> jax.ShapeDtypeStruct:
        shape = [rng.choice([2, 3, 1, 5, 8, 0]) for _ in range(rng.randint(0, 4))]
        return leaf(rng.choice(DTYPES), *shape)

    def subtree(depth: int) -> PyTree:
        kind = rng.choice(["leaf", "leaf", "dict", "list", "tuple", "pair"])
        if depth == 0 or kind == "leaf":
            return array()
        if kind == "pair":
            return Pair(subtree(depth - 1), rng.choice([None, array()]))
        parts = [subtree(depth - 1) for _ in range(rng.randint(1, 3))]
        if kind == "dict":
            return dict(zip("abc", parts, strict=False))
        return tuple(parts) if kind == "tuple" else parts

    kernel = [rng.randint(2, 4) for _ in range(rng.randint(2, 3))]
    return {"kernel": leaf(rng.choice(DTYPES), *kernel), "rest": subtree(2)}


def drawn_lab(seed: int, methods: int = 4) -> Lab:
    """Draws a lab."""
    rng = random.Random(seed)
    tree = drawn_tree(rng)
    flags = None
    if rng.random() < 0.5:
        flags = [bool(x.shape) and rng.random() < 0.5 for x in jax.tree.leaves(tree)]
        flags[0] = True  # The kernel always carries a mask.
    steers = rng.random() < 0.75
    inner = rng.choice(list(INNERS))
    # A gradient with a penalty has more than eight bits, so its square is rounded.
    penalised = inner not in ("adam", "adamw", "rmsprop")
    return Lab(
        tree,
        [drawn_method(rng, steers=steers, penalised=penalised) for _ in range(methods)],
        inner=inner,
        flags=flags,
        packed=rng.random() < 0.5,
        steers=steers,
    )
