from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from kvcompress import Hybrid, KVCacheCompressor, LowRank, TransformCoding, VectorQuantization
from kvcompress.errors import SettingError

jax = pytest.importorskip("jax")
jnp = pytest.importorskip("jax.numpy")

pytestmark = pytest.mark.library("jax")

# JAX 0.7 has it in its experimental part only.
home = jax if hasattr(jax, "enable_x64") else pytest.importorskip("jax.experimental")
enable_x64 = home.enable_x64

METHODS = [LowRank(3), Hybrid(6, 3, outliers=0.05), VectorQuantization(8, 4, iterations=2)]
SHAPE = (4, 2, 19, 8)


def kv(dtype="float32", shape=SHAPE):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(shape) + 1, dtype) for _ in range(2))


def close(a, b, tolerance=2e-5):
    """Equal but for what fusion may do to float32 sums of a few numbers of size 4."""
    for x, y in zip(a, b, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        unit = {"float16": 2.0**-10, "bfloat16": 2.0**-7}.get(x.dtype.name, 0) * 4
        np.testing.assert_allclose(
            np.asarray(x, "float32"), np.asarray(y, "float32"), atol=tolerance + unit
        )


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_container_crosses_jit(method):
    compressor = KVCacheCompressor(method, sinks=2)
    for dtype in ("float32", "bfloat16"):
        k, v = kv(dtype)
        z = jax.jit(compressor.compress_kv)(k, v)
        assert z.nbytes == compressor.estimate_size(SHAPE, dtype=dtype)
        assert z.device == k.device
        out = jax.jit(compressor.decompress_kv)(z)
        assert out[0].shape == SHAPE
        assert (out[0][:, :, :2] == k[:, :, :2]).all()
        # What was compiled, eager code decodes to the same.
        close(out, compressor.decompress_kv(z))
    together = jax.jit(lambda k, v: compressor.decompress_kv(compressor.compress_kv(k, v)))
    assert together(k, v)[0].dtype == jnp.bfloat16


def test_the_compressor_may_be_a_static_argument():
    calls = []

    def run(compressor, k, v):
        calls.append(1)
        return compressor.compress_kv(k, v)

    jitted = jax.jit(run, static_argnums=0)
    for _ in range(3):
        z = jitted(KVCacheCompressor(Hybrid(6, 3)), *kv())  # equal, and new each time
    assert len(calls) == 1
    assert z.keys.method == Hybrid(6, 3)


def test_it_is_a_pytree_with_static_metadata():
    compressor = KVCacheCompressor(METHODS[1], value_method=METHODS[0], sinks=2)
    z = compressor.compress_kv(*kv())
    leaves, tree = jax.tree_util.tree_flatten(z)
    assert len(leaves) == 9 + 4 + 2
    assert all(isinstance(x, jax.Array) for x in leaves)
    assert sum(x.nbytes for x in leaves) == z.nbytes
    again = jax.tree_util.tree_unflatten(tree, leaves)
    assert (again.layout, again.shape, again.dtype) == (z.layout, z.shape, z.dtype)
    other = jax.tree_util.tree_structure(compressor.compress_kv(*kv()))
    assert hash(other) == hash(tree)
    assert other == tree
    shapes = jax.eval_shape(compressor.compress_kv, *kv())
    assert shapes.nbytes == z.nbytes
    # Trees of things that are no arrays must not trip over validation.
    jax.tree_util.tree_map(lambda _: object(), z)


def test_it_is_traced_once_for_equal_containers():
    traced = []

    @jax.jit
    def run(z):
        traced.append(1)
        return COMPRESSOR.decompress_kv(z)

    for _ in range(3):
        run(COMPRESSOR.compress_kv(*kv()))
    assert len(traced) == 1


COMPRESSOR = KVCacheCompressor(LowRank(3))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_vmap(method):
    compressor = KVCacheCompressor(method, window=3)
    k, v = kv()
    z = jax.vmap(compressor.compress_kv_3d)(k, v)
    assert all(x.shape[0] == SHAPE[0] for x in jax.tree_util.tree_leaves(z))
    out = jax.vmap(compressor.decompress_kv_3d)(z)
    one = [
        compressor.decompress_kv_3d(compressor.compress_kv_3d(a, b))
        for a, b in zip(k, v, strict=True)
    ]
    close(out, [jnp.stack([pair[i] for pair in one]) for i in range(2)], tolerance=1e-3)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_scan_over_layers(method):
    compressor = KVCacheCompressor(method)
    layers = tuple(jnp.stack([x, 2 * x, -x]) for x in kv())

    def encode(count, layer):
        return count + 1, compressor.compress_kv(*layer)

    def decode(count, z):
        return count + 1, compressor.decompress_kv(z)

    count, stacked = jax.lax.scan(encode, 0, layers)
    count, out = jax.lax.scan(decode, count, stacked)
    assert count == 6
    one = [
        compressor.decompress_kv(compressor.compress_kv(a, b)) for a, b in zip(*layers, strict=True)
    ]
    close(out, [jnp.stack([pair[i] for pair in one]) for i in range(2)], tolerance=1e-3)


def test_codes_do_not_depend_on_the_transformation():
    from kvcompress.ops import AffineSpec, quantize

    spec = AffineSpec(3, 16, "channel")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3, 67, 16)), jnp.float32)

    def run(x):
        return quantize(x, spec=spec)

    eager = run(x)
    scanned = jax.lax.scan(lambda c, x: (c, run(x)), 0, x)[1]
    for other in (jax.jit(run)(x), jax.vmap(run)(x), jax.jit(jax.vmap(run))(x), scanned):
        for a, b in zip(eager, other, strict=True):
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_donation():
    compressor = KVCacheCompressor(VectorQuantization(8, 4), window=2)
    k, v = kv()
    expected = compressor.decompress_kv(jax.jit(compressor.compress_kv)(k, v))
    with warnings.catch_warnings():
        # A smaller result cannot take over the buffer.
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        z = jax.jit(compressor.compress_kv, donate_argnums=(0, 1))(k, v)
        leaves = jax.tree_util.tree_leaves(z)
        out = jax.jit(compressor.decompress_kv, donate_argnums=0)(z)
    close(out, expected)
    assert len(leaves) == 14
    # In place where sizes allow: the same arrays go in, scaled, and out.
    z = compressor.compress_kv(*kv())
    pointers = {x.unsafe_buffer_pointer() for x in jax.tree_util.tree_leaves(z)}
    moved = jax.jit(lambda z: jax.tree_util.tree_map(lambda x: x + 1, z), donate_argnums=0)(z)
    assert jax.tree_util.tree_leaves(z)[0].is_deleted()
    assert {x.unsafe_buffer_pointer() for x in jax.tree_util.tree_leaves(moved)} & pointers


def test_not_finite_cannot_be_seen_under_jit_but_saturates():
    k, v = kv()
    k = k.at[0, 0, 0, 0].set(jnp.nan).at[0, 0, 0, 1].set(jnp.inf)
    compressor = KVCacheCompressor(Hybrid(6, 3), nonfinite="saturate")
    out = jax.jit(lambda k, v: compressor.decompress_kv(compressor.compress_kv(k, v)))(k, v)
    assert all(bool(jnp.isfinite(x).all()) for x in out)


def test_settings_are_checked_while_tracing():
    with pytest.raises(SettingError, match="head_dim = 8, got 9"):
        jax.jit(KVCacheCompressor(LowRank(9)).compress_kv)(*kv())


def test_with_64_bits_enabled():
    """JAX's default dtypes may be 64 bits wide; results are the same."""
    k, v = kv()
    for method in METHODS:
        compressor = KVCacheCompressor(method, sinks=1)
        expected = compressor.compress_kv(k, v)
        with enable_x64(True):
            wide = compressor.compress_kv(k, v)
            out = compressor.decompress_kv(wide)
        for name, a in expected.keys.arrays.items():
            b = wide.keys.arrays[name]
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        close(out, compressor.decompress_kv(expected), tolerance=1e-4)


def equations(jaxpr):
    """All equations of a traced program, those of loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("method", [LowRank(3), Hybrid(6, 3), TransformCoding(3)], ids=str)
def test_matrices_are_decomposed_one_by_one(method):
    """Two stacks at a time can wait for each other for ever on the threads of two processors."""
    traced = jax.make_jaxpr(KVCacheCompressor(method).compress_kv)(*kv()).jaxpr
    found = [e for e in equations(traced) if e.primitive.name in ("eigh", "lu")]
    assert len(found) >= 2
    assert all(math.prod(e.invars[0].aval.shape[:-2]) == 1 for e in found)
