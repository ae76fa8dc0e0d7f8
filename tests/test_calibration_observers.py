"""Observers against numpy on all of the data at once, whatever the sizes, batches and extremes are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from trimtab.errors import CalibrationError, UsageError
from trimtab.passes.quantization.histogram import BINS, Histogram
from trimtab.passes.quantization.observers import KINDS, Observer, make_observer

Data = np.ndarray


def _normal(size: int) -> Data:
    return np.random.standard_normal(size)


def _outliers(size: int) -> Data:
    data = np.random.standard_normal(size)
    data[:: max(size // 5, 1)] *= 1000
    return data


def _one_huge(size: int) -> Data:
    data = np.random.standard_normal(size)
    data[size // 2] = 3e30
    return data


DATA: dict[str, Callable[[int], Data]] = {
    "normal": _normal,
    "positive": lambda size: np.abs(_normal(size)) + 0.25,
    "negative": lambda size: -np.abs(_normal(size)) - 3,
    "far from zero": lambda size: 1e6 + np.random.random(size),
    "outliers": _outliers,
    "one huge": _one_huge,
    "zeros": np.zeros,
    "constant": lambda size: np.full(size, -0.37),
    "two values": lambda size: np.random.randint(0, 2, size) * 7.5 - 2.5,
    "denormal": lambda size: _normal(size) * 1e-41,
    "tails": lambda size: np.random.standard_cauchy(size),
}


def _batches(data: Data, dtype: type = np.float32) -> list[torch.Tensor]:
    """The data in ragged batches of several shapes, an empty one among them."""
    parts = np.split(data.astype(dtype), [1, 8, 8, min(300, len(data))])
    shaped = [part.reshape(1, -1, 1) if index % 2 else part for index, part in enumerate(parts)]
    return [torch.from_numpy(part.copy()) for part in shaped]


def _seen(observer: Observer, batches: Sequence[torch.Tensor]) -> tuple[float, float]:
    for batch in batches:
        observer.update(batch)
    low, high = observer.range()
    assert low.dtype == high.dtype == torch.float64
    assert low.shape == high.shape == ()
    return float(low), float(high)


def _all(batches: Sequence[torch.Tensor]) -> Data:
    return np.concatenate([batch.double().numpy().reshape(-1) for batch in batches])


def _bin_width(data: Data) -> float:
    """The widest that bins may be: twice what equal ones over the data would need, or what float64 resolves."""
    return max(2 * float(data.max() / 2 - data.min() / 2) * 2 / (BINS - 2), np.abs(data).max() * 2.0**-49, 2.0**-1022)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("symmetric", [False, True])
def test_minmax(name: str, symmetric: bool) -> None:
    batches = _batches(DATA[name](1001))
    data = _all(batches)
    low, high = _seen(make_observer("minmax", symmetric=symmetric), batches)
    if symmetric:
        assert (low, high) == (-np.abs(data).max(), np.abs(data).max())
    else:
        assert (low, high) == (data.min(), data.max())


@pytest.mark.parametrize("axis", [0, 1, -1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize("kind", ["minmax", "moving"])
def test_channels(kind: str, axis: int, dtype: torch.dtype) -> None:
    shape = [5, 3, 2, 4]
    batches = [(10 * torch.randn(shape, dtype=torch.float64)).to(dtype) for _ in range(4)]
    batches.insert(2, torch.empty([0 if i != axis % 4 else n for i, n in enumerate(shape)], dtype=dtype))
    observer = make_observer(kind, axis=axis)
    for batch in batches:
        observer.update(batch)
    low, high = observer.range()
    others = tuple(i for i in range(4) if i != axis % 4)
    arrays = [batch.double().numpy() for batch in batches if batch.numel()]
    ends = [(array.min(axis=others), array.max(axis=others)) for array in arrays]
    if kind == "minmax":
        expected = np.min([e[0] for e in ends], axis=0), np.max([e[1] for e in ends], axis=0)
    else:
        expected = ends[0]
        for end in ends[1:]:
            expected = 0.9 * expected[0] + 0.1 * end[0], 0.9 * expected[1] + 0.1 * end[1]
    assert low.shape == (shape[axis],)
    np.testing.assert_allclose(low.numpy(), expected[0], rtol=1e-12)
    np.testing.assert_allclose(high.numpy(), expected[1], rtol=1e-12)


def test_symmetric_channels() -> None:
    data = torch.randn(6, 11)
    observer = make_observer("minmax", axis=1, symmetric=True)
    observer.update(data)
    low, high = observer.range()
    assert torch.equal(high, data.double().abs().amax(0))
    assert torch.equal(low, -high)


@pytest.mark.parametrize("name", DATA)
def test_the_histogram_is_exact_whatever_the_order(name: str) -> None:
    batches = _batches(DATA[name](1000))
    data = _all(batches)
    forwards, backwards, at_once = Histogram(), Histogram(), Histogram()
    for batch in batches:
        forwards.add(batch)
    for batch in reversed(batches):
        backwards.add(batch)
    at_once.add(torch.from_numpy(data))
    assert forwards.total == data.size
    for other in (backwards, at_once):
        for one, two in zip(forwards.bins(), other.bins(), strict=True):
            np.testing.assert_array_equal(one, two)
    left, right, counts = forwards.bins()
    for start, end, count in zip(left, right, counts, strict=True):
        inside = (data >= start) & ((data < end) | (data == data.max() if end == data.max() else False))
        assert inside.sum() == count
    assert (right - left).max() <= _bin_width(data)
    indices, counts, width = forwards.magnitudes()
    for index, count in zip(indices, counts, strict=True):
        above = (data >= index * width) & (data < (index + 1) * width)
        below = (data >= -(index + 1) * width) & (data < -index * width)
        assert above.sum() + below.sum() == count
    assert counts.sum() == data.size


def test_the_range_of_a_histogram_grows_by_any_factor() -> None:
    histogram = Histogram()
    for exponent in (-300, -40, 0, 12, 100, 300):
        histogram.add(torch.tensor([10.0**exponent, -(10.0**exponent)], dtype=torch.float64))
    histogram.add(torch.tensor([1.7e308, -1.7e308], dtype=torch.float64))
    assert histogram.total == 14
    assert (histogram.low, histogram.high) == (-1.7e308, 1.7e308)


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.99, 100.0])
@pytest.mark.parametrize("size", [17, 1000, 4099])
def test_percentile(name: str, percentile: float, size: int) -> None:
    batches = _batches(DATA[name](size))
    data = _all(batches)
    outside = (100 - percentile) / 2
    expected = np.percentile(data, [outside, 100 - outside])
    found = _seen(make_observer("percentile", percentile=percentile), batches)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=_bin_width(data))
    bound = np.percentile(np.abs(data), percentile)
    low, high = _seen(make_observer("percentile", percentile=percentile, symmetric=True), batches)
    assert low == -high
    assert abs(high - bound) <= max(_bin_width(data), 1e-9 * bound)


def _rounded(data: Data, low: float, high: float, bits: int, symmetric: bool) -> Data:
    """The data after an affine quantizer, from its definition."""
    if symmetric:
        least, most, zero = 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1, 0
        scale = max(-low, high) / most
    else:
        low, high = min(low, 0.0), max(high, 0.0)
        scale = (high - low) / (2**bits - 1)
        zero = int(np.rint(-low / scale)) if scale else 0
        least, most = 0, 2**bits - 1
    if not scale:
        return np.zeros_like(data)
    return (np.clip(np.rint(data / scale) + zero, least, most) - zero) * scale


@pytest.mark.parametrize("name", ["normal", "positive", "negative", "outliers", "two values", "tails", "constant"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_least_squared_error(name: str, bits: int, symmetric: bool) -> None:
    batches = _batches(DATA[name](4099), np.float64)
    data = _all(batches)
    low, high = _seen(make_observer("mse", bits=bits, symmetric=symmetric), batches)
    assert low <= 0 <= high

    def error(start: float, end: float) -> float:
        return float(np.square(_rounded(data, start, end, bits, symmetric) - data).sum())

    shares = np.linspace(0.003, 1, 120)
    least, most = min(data.min(), 0), max(data.max(), 0)
    if symmetric:
        most = max(-least, most)
        best = min(error(-most * share, most * share) for share in shares)
    else:
        best = min(error(least * share, most * other) for share in shares[::4] for other in shares[::4])
        best = min(best, *(error(least * share, most * share) for share in shares))
    # The search sees a histogram and a grid of its own: on continuous data it is as good as one over the data.
    scale = float(np.square(data).sum())
    assert error(low, high) <= 1.03 * best + 1e-5 * scale


def test_least_squared_error_clips_more_at_fewer_bits() -> None:
    data = torch.randn(20_000)
    highs = [_seen(make_observer("mse", bits=bits, symmetric=True), [data])[1] for bits in (2, 4, 8)]
    assert highs[0] < highs[1] < highs[2]
    # The optimum for a normal distribution, from the literature: ACIQ (Banner et al., 2018), table 1, within a tenth.
    assert abs(highs[1] - 2.55) < 0.25


def _divergence(data: Data, threshold: float, levels: int, width: float) -> float:
    """Kullback-Leibler divergence by loops, as the description of TensorRT's calibration has it."""
    length = round(threshold / width)
    counts = np.histogram(np.abs(data), bins=np.arange(round(np.abs(data).max() / width) + 2) * width)[0].astype(float)
    reference = counts[:length].copy()
    reference[-1] += counts[length:].sum()
    expanded = np.zeros(length)
    for level in range(levels):
        start, end = level * length // levels, (level + 1) * length // levels
        filled = [i for i in range(start, end) if counts[i]]
        for i in filled:
            expanded[i] = counts[start:end].sum() / len(filled)
    expanded /= expanded.sum()
    reference /= reference.sum()
    return sum(p * np.log(p / max(q, 1e-12)) for p, q in zip(reference, expanded, strict=True) if p)


@pytest.mark.parametrize("name", ["normal", "positive", "tails"])
def test_least_divergence(name: str) -> None:
    data = _all(_batches(DATA[name](4099)))
    observer = make_observer("entropy", bits=4)
    low, high = _seen(observer, _batches(data))
    levels = 16 if data.min() >= 0 else 8
    histogram = Histogram()
    histogram.add(torch.from_numpy(data))
    indices, _, width = histogram.magnitudes()
    width *= 2 ** max(0, int(indices[-1]).bit_length() - 11)
    most = np.abs(data).max()
    chosen = max(-low, high)
    # The end of the data stands for the end of its last bin.
    threshold = np.ceil(chosen / width) * width if chosen == most else chosen
    found = _divergence(data, threshold, levels, width)
    for share in np.linspace(0.02, 1, 41):
        tried = max(levels, np.ceil(share * most / width)) * width
        if (np.abs(data) >= tried).mean() > 0.5:
            continue
        assert found <= _divergence(data, tried, levels, width) + 1e-9


def test_entropy_keeps_data_that_is_all_far_from_zero() -> None:
    low, high = _seen(make_observer("entropy"), [5 + torch.rand(20_000)])
    assert low == 0
    assert 5.5 < high <= 6


def test_entropy_clips_outliers_and_keeps_even_data() -> None:
    even = torch.linspace(-1, 1, 20_001)
    low, high = _seen(make_observer("entropy"), [even])
    assert (round(low, 1), round(high, 1)) == (-1.0, 1.0)
    bulk = torch.randn(20_000)
    bulk[7] = 80.0
    low, high = _seen(make_observer("entropy"), [bulk])
    assert high < 20
    assert low >= float(bulk.min())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_zeros_and_constants_have_ranges(kind: str, symmetric: bool) -> None:
    for value in (0.0, 2.5, -2.5, 1e-45, 3e38):
        low, high = _seen(make_observer(kind, symmetric=symmetric), [torch.full((3, 5), value)] * 2)
        assert low <= high
        assert np.isfinite([low, high]).all()
        if kind in ("minmax", "moving", "percentile"):
            assert max(-low, high) == pytest.approx(abs(float(torch.tensor(value))))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_seen_can_be_kept(kind: str) -> None:
    batches = _batches(_normal(1000))
    whole, first = make_observer(kind), make_observer(kind)
    for batch in batches[:2]:
        first.update(batch)
    second = make_observer(kind, **first.options)
    second.load(first.state())
    for batch in batches[2:]:
        second.update(batch)
    assert _seen(second, []) == _seen(whole, batches)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(kind: str, bad: float) -> None:
    data = torch.randn(4, 5)
    data[2, 3] = bad
    observer = make_observer(kind)
    with pytest.raises(CalibrationError, match="elements=1 of 20"):
        observer.update(data)
    assert not observer.has_data


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_seen_has_no_range(kind: str) -> None:
    observer = make_observer(kind)
    observer.update(torch.empty(0, 3))
    with pytest.raises(CalibrationError, match="never seen"):
        observer.range()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"kind": "median"}, "known=minmax, moving, percentile, mse, entropy"),
        ({"kind": "mse", "bits": 1}, "2 to 16 bits"),
        ({"kind": "percentile", "percentile": 0.0}, "above 0"),
        ({"kind": "percentile", "percentile": 101.0}, "at most 100"),
        ({"kind": "entropy", "axis": 0}, "one range for a whole tensor"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], part: str) -> None:
    with pytest.raises(UsageError, match=part):
        make_observer(**options)  # type: ignore[arg-type]


def test_channels_that_change_are_refused() -> None:
    observer = make_observer("minmax", axis=1)
    observer.update(torch.randn(2, 3))
    with pytest.raises(CalibrationError, match="before=3, now=4"):
        observer.update(torch.randn(2, 4))
    with pytest.raises(CalibrationError, match="no such axis"):
        observer.update(torch.randn(2))


def test_memory_is_constant() -> None:
    small, large = make_observer("mse"), make_observer("mse")
    small.update(torch.randn(10))
    for _ in range(50):
        large.update(torch.randn(5000) * 10)
    sizes = [sum(array.nbytes for array in observer.state().values()) for observer in (small, large)]
    assert sizes[0] == sizes[1] < 100_000
