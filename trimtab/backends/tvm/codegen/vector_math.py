"""Float32 transcendental functions as straight-line arithmetic, so that they vectorise.

TVM lowers ``exp``, ``erf``, ``tanh`` ... to libm calls, one scalar call per element.  The versions here are
polynomials with range reduction, accurate to a few units in the last place, and pass NaN and infinities through.
Coefficients of ``exp`` and ``log`` follow the Cephes library (S. Moshier, single precision); ``tanh`` is
computed from ``expm1``; ``erf`` is an odd polynomial.  Double precision keeps libm.  Where the result is rounded to
bfloat16 at once, a shorter polynomial does for ``sigmoid``: its error of 1e-4 is a fortieth of that of the rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm import tirx

from trimtab.backends.tvm.codegen.comparison import eq
from trimtab.backends.tvm.codegen.expression import CallRule, Expr, let
from trimtab.backends.tvm.codegen.vector_rounding import is_rounding


def f32(value: float) -> Expr:
    return tirx.const(value, "float32")


def _polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Horner evaluation, highest power first."""
    total = f32(coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + f32(coefficient)
    return total


def _bits(x: Expr) -> Expr:
    return tirx.reinterpret("int32", x)


def _float(bits: Expr) -> Expr:
    return tirx.reinterpret("float32", bits)


_ROUND = 12582912.0  # 1.5 * 2**23: adding it leaves the rounded integer in the low mantissa bits
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def _scale_two(value: Expr, rounded: Expr) -> Expr:
    """``value * 2**n`` for the integer n in the low bits of ``rounded``, in two steps so that denormals survive."""

    def steps(n: Expr) -> Expr:
        half = n >> tirx.const(1, "int32")
        first = _float((half + tirx.const(127, "int32")) << tirx.const(23, "int32"))
        second = _float((n - half + tirx.const(127, "int32")) << tirx.const(23, "int32"))
        return value * first * second

    return let(_bits(rounded) - tirx.const(0x4B400000, "int32"), steps, "n")


def _clamp_keeping_nan(x: Expr, low: float, high: float) -> Expr:
    # Comparisons with NaN are false, so a NaN passes both selects.
    return let(tirx.Select(x < f32(low), f32(low), x), lambda y: tirx.Select(y > f32(high), f32(high), y))


def exp(x: Expr) -> Expr:
    """``e**x``, about 1 ulp; 0 below -104, infinity above 88.7."""

    def core(y: Expr) -> Expr:
        return let(
            y * f32(1.44269504088896341) + f32(_ROUND),
            lambda rounded: let(
                rounded - f32(_ROUND),
                lambda n: let(
                    y - n * f32(_LN2_HIGH) - n * f32(_LN2_LOW),
                    lambda r: _scale_two(_exp_power(r), rounded),
                ),
            ),
        )

    return let(_clamp_keeping_nan(x, -104.5, 88.8), core, "y")


# Minimax for the relative error on [-0.5, 0.5], 7.5e-8.
_EXP2 = (1.3276471990e-3, 9.6755413344e-3, 5.5507132735e-2, 2.4022119724e-1, 6.9314696706e-1, 1.0000000717)


def exp2_at_most_one(x: Expr) -> Expr:
    """``2**x`` for x up to 0 (or a little above), where a softmax needs it; 0 below -126.5, NaN for NaN."""
    shift = _ROUND + 127.0  # The rounded number has the biased exponent in its low bits.

    def core(y: Expr) -> Expr:
        return let(
            y + f32(shift),
            lambda rounded: let(
                y - (rounded - f32(shift)),
                lambda r: _polynomial(r, _EXP2) * _float(_bits(rounded) << tirx.const(23, "int32")),
            ),
        )

    return let(tirx.Select(x < f32(-127.0), f32(-127.0), x), core, "y")


def _expm1_small(y: Expr) -> Expr:
    """``e**y - 1`` for y in [-90, 0], without cancellation near zero: (p - 1) * 2**n + (2**n - 1)."""

    def scaled(rounded: Expr) -> Expr:
        n = rounded - f32(_ROUND)
        two = _float((_bits(rounded) - tirx.const(0x4B400000 - 127, "int32")) << tirx.const(23, "int32"))
        return let(
            two,
            lambda t: let(
                y - n * f32(_LN2_HIGH) - n * f32(_LN2_LOW),
                lambda r: (_polynomial(r, _EXP) * (r * r) + r) * t + (t - f32(1.0)),
            ),
        )

    return let(y * f32(1.44269504088896341) + f32(_ROUND), scaled)


def _with_sign_of(magnitude: Expr, x: Expr) -> Expr:
    return _float(_bits(magnitude) | (_bits(x) & tirx.const(-(2**31), "int32")))


def _magnitude(x: Expr) -> Expr:
    return _float(_bits(x) & tirx.const(0x7FFFFFFF, "int32"))


def tanh(x: Expr) -> Expr:
    """Hyperbolic tangent: ``-e / (e + 2)`` with ``e = expm1(-2|x|)``."""

    def core(v: Expr) -> Expr:
        return let(
            _clamp_keeping_nan(f32(-2.0) * _magnitude(v), -40.0, 0.0),
            lambda y: let(_expm1_small(y), lambda e: _with_sign_of(f32(0.0) - e / (e + f32(2.0)), v)),
        )

    return let(x, core, "x")


# Minimax for the relative error on [-ln(2) / 2, ln(2) / 2], 7.5e-5, from e**0 on.
_EXP_SHORT = (0.16566821879, 0.50496424832, 1.0001642517, 0.99992804542)


def _exp_power(r: Expr) -> Expr:
    return _polynomial(r, _EXP) * (r * r) + r + f32(1.0)


def _sigmoid(x: Expr, power: Callable[[Expr], Expr]) -> Expr:
    """``1 / (1 + e**-x)``, by powers of e between -ln(2) / 2 and ln(2) / 2.

    Infinity stands for ``e**-x`` from 88.4 on, so the power of two takes one step, and its biased exponent is in the
    low bits of the rounded number.
    """
    shift = _ROUND + 127.0

    def core(y: Expr) -> Expr:
        return let(
            y * f32(1.44269504088896341) + f32(shift),
            lambda rounded: let(
                rounded - f32(shift),
                lambda n: let(
                    y - n * f32(_LN2_HIGH) - n * f32(_LN2_LOW),
                    lambda r: f32(1.0) / (power(r) * _float(_bits(rounded) << tirx.const(23, "int32")) + f32(1.0)),
                ),
            ),
        )

    return let(_clamp_keeping_nan(f32(0.0) - x, -87.0, 88.9), core, "y")


def sigmoid(x: Expr) -> Expr:
    """Logistic function ``1 / (1 + exp(-x))``."""
    return _sigmoid(x, _exp_power)


def sigmoid_short(x: Expr) -> Expr:
    """Logistic function with a relative error below 1e-4."""
    return _sigmoid(x, lambda r: _polynomial(r, _EXP_SHORT))


_LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
        -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)  # fmt: skip


def log(x: Expr) -> Expr:
    """Natural logarithm, about 1 ulp; -inf at 0, NaN below, denormals handled by scaling."""

    def core(v: Expr) -> Expr:
        tiny = v < f32(1.17549435e-38)
        return let(
            tirx.Select(tiny, v * f32(8388608.0), v),
            lambda s: let(
                _bits(s),
                lambda b: let(
                    (b - tirx.const(0x3F3504F3, "int32")) >> tirx.const(23, "int32"),
                    lambda e: let(
                        _float(b - (e << tirx.const(23, "int32"))) - f32(1.0),
                        lambda m: let(
                            tirx.Cast("float32", e) - tirx.Select(tiny, f32(23.0), f32(0.0)),
                            lambda n: let(
                                m * m,
                                lambda z: _log_edges(
                                    v,
                                    ((_polynomial(m, _LOG) * m * z + n * f32(-2.12194440e-4)) - f32(0.5) * z)
                                    + m
                                    + n * f32(0.693359375),
                                ),
                            ),
                        ),
                    ),
                ),
            ),
        )

    return let(x, core, "x")


def _log_edges(x: Expr, value: Expr) -> Expr:
    infinity, nan = f32(float("inf")), f32(float("nan"))
    finite = tirx.Select(eq(x, infinity), infinity, value)
    positive = tirx.Select(eq(x, f32(0.0)), f32(float("-inf")), finite)
    return tirx.Select(x >= f32(0.0), positive, nan)


# Minimax for the relative error of erf(y) / y on [0, 3.75], 5e-8, in t = 2 (y / 3.75)**2 - 1, whose powers stay small.
_ERF = (0.000883289031, -0.0022397209, 0.00186479394, -0.00294809835, 0.00916877016,
        -0.0168007258, 0.0249023568, -0.0372758843, 0.0536414199, -0.0716235042,
        0.0907363296, -0.111938201, 0.139268994, -0.188030094, 0.377056926)  # fmt: skip
_ERF_TO_T = 2 / 3.75**2
_ERF_END = 3.78
"""A little beyond that range the polynomial passes 1, by ten units in the last place; erf is below by one."""


def erf(x: Expr) -> Expr:
    """Error function, relative error below 4e-7."""

    # Exactly 1 from the end on: gelu multiplies 1 + erf(x) by x, which may be infinite.
    return let(
        _clamp_keeping_nan(x, -_ERF_END, _ERF_END),
        lambda y: let(
            y * y * f32(_ERF_TO_T) - f32(1.0),
            lambda t: _clamp_keeping_nan(y * _polynomial(t, _ERF), -1.0, 1.0),
        ),
    )


_LOWERINGS: dict[str, Callable[[Expr], Expr]] = {
    "tirx.exp": exp, "tirx.tanh": tanh, "tirx.erf": erf, "tirx.log": log, "tirx.sigmoid": sigmoid,
}  # fmt: skip


def lowering_of(value: Expr) -> CallRule:
    """The rule for the calls in the value of an element: :func:`lower_call`, or a rougher one before rounding."""
    while isinstance(value, tirx.Let):
        value = value.body
    if not is_rounding(value):
        return lower_call

    def lower_roughly(name: str, dtype: str, args: list[Expr]) -> Expr | None:
        is_short = name == "tirx.sigmoid" and dtype == "float32"
        return sigmoid_short(args[0]) if is_short else lower_call(name, dtype, args)

    return lower_roughly


def lower_call(name: str, dtype: str, args: list[Expr]) -> Expr | None:
    """Replacement for an intrinsic call on float32, or None when libm or the hardware should handle it."""
    if dtype != "float32" or name not in _LOWERINGS:
        return None
    return _LOWERINGS[name](args[0])
