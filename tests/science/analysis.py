"""An analysis as a scientist would write it: weather stations, their trends, clusters and a model of them.

    python3 analysis.py --plain       one after the other, without sfparallel
    sfrun -n 4 analysis.py            each station in a clone

Both print one line of JSON: what came out, exactly (integers, orders, names, texts) and as numbers.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import json
import logging
import os
import sys
import time
import zoneinfo

import numpy as np
import pandas as pd
import stations
import wavelet
from scipy import fft, integrate, interpolate, linalg, optimize, signal, sparse, stats
from scipy.sparse.linalg import spsolve
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import accuracy_score
from sklearn.model_selection import KFold, cross_val_score

log = logging.getLogger("analysis")
DAYS = 730
EXACT: dict[str, object] = {}
NUMBERS: dict[str, list[float]] = {}


def exact(name: str, value: object) -> None:
    EXACT[name] = value


def numbers(name: str, *values: object) -> None:
    NUMBERS[name] = [float(x) for value in values for x in np.ravel(np.asarray(value, dtype=float))]


def bits(name: str, *values: object) -> None:
    """Numbers that come out the same to the last bit: no library takes another way on another processor."""
    EXACT[name] = [float(x).hex() for value in values for x in np.ravel(np.asarray(value, dtype=float))]


def digest(values: object) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()[:16]


def load() -> pd.DataFrame:
    """A table of all stations: made from a seed, so that it is the same everywhere."""
    rng = np.random.default_rng(20260101)
    frames = []
    for name in stations.NAMES:
        day = np.arange(DAYS)
        season = 9 * np.sin(2 * np.pi * (day - 110) / 365.25)
        temperature = 12 - stations.elevation(name) / 150 + season + 0.002 * day + rng.normal(0, 2.5, DAYS)
        rain = np.where(rng.random(DAYS) < 0.35, rng.gamma(0.8, 6.0, DAYS), 0.0)
        date = pd.date_range("2024-01-01", periods=DAYS, freq="D", tz="UTC")
        frames.append(pd.DataFrame({"station": name, "date": date, "temperature": temperature.round(1), "rain": rain.round(1)}))
    table = pd.concat(frames, ignore_index=True)
    return table.sample(frac=1, random_state=7).reset_index(drop=True)


def analyse(name: str, table: pd.DataFrame) -> dict[str, object]:
    """One station: what a clone does."""
    own = table[table.station == name].sort_values("date", kind="stable").reset_index(drop=True)
    temperature = own.temperature.to_numpy()
    spectrum = np.abs(fft.rfft(temperature - temperature.mean()))
    trend = stats.linregress(np.arange(len(own)), temperature)

    def model(x: np.ndarray, mean: float, amplitude: float, phase: float) -> np.ndarray:
        return mean + amplitude * np.sin(2 * np.pi * (x - phase) / 365.25)

    fitted, _ = optimize.curve_fit(model, np.arange(len(own)), temperature, p0=(10, 8, 100))
    smooth = signal.savgol_filter(temperature, 31, 3)
    spline = interpolate.CubicSpline(np.arange(0, len(own), 30), smooth[::30])
    degree_days, _ = integrate.quad(lambda x: max(0.0, float(spline(x)) - 10), 0, 700, limit=400)
    peaks, _ = signal.find_peaks(smooth, distance=60)
    return {
        "coldest": [str(day.date()) for day in own.nsmallest(5, "temperature", keep="first").date],
        "sorted": digest(np.sort(temperature) + 0.0),  # of -0.0 and 0.0 either may come first
        "permutation": sorted(np.argsort(temperature).tolist()) == list(range(len(own))),
        "peaks": peaks.tolist(),
        "period": int(np.argmax(spectrum)),
        "energy": wavelet.energy(name, temperature).hex(),
        "numbers": [trend.slope, trend.rvalue, *fitted, smooth.mean(), degree_days],
    }


async def quality(table: pd.DataFrame, name: str) -> int:
    await asyncio.sleep(0)
    return int((table[table.station == name].rain > 20).sum())


def check(names: list[str], table: pd.DataFrame) -> list[int]:
    """Checks a few stations in a loop of its own, as a library would that is asynchronous inside."""
    async def all_of_them() -> list[int]:
        return list(await asyncio.gather(*(quality(table, name) for name in names)))

    return asyncio.run(all_of_them())


def relations(table: pd.DataFrame) -> None:
    """What pandas does with the table as a whole."""
    monthly = table.assign(month=table.date.dt.month).groupby(["station", "month"]).agg(
        mean=("temperature", "mean"), wet=("rain", lambda rain: int((rain > 1).sum())), top=("rain", "max"))
    wide = table.pivot_table(index="date", columns="station", values="temperature")
    exact("wet days", monthly.wet.tolist())
    exact("ranking", monthly["top"].groupby("station").max().sort_values(ascending=False, kind="stable").index.tolist())
    exact("warmest", wide.idxmax().dt.strftime("%Y-%m-%d").to_dict())
    elevations = pd.DataFrame({"station": stations.NAMES, "elevation": map(stations.elevation, stations.NAMES)})
    merged = monthly.reset_index().merge(elevations, on="station").sort_values(["elevation", "month"], kind="stable")
    exact("merged", merged.station.tolist()[::12])
    exact("ranks", table.rain.rank(method="first").astype(int).iloc[:20].tolist())
    exact("unique", [int(n) for n in np.unique(table.temperature.to_numpy(), return_counts=True)[1][:30]])
    exact("rolled", digest((wide.rolling(7).min().fillna(-99).to_numpy() * 10).round().astype(int)))
    bits("means", monthly["mean"])
    numbers("correlation", wide.corr())
    bits("quantiles", table[["temperature", "rain"]].quantile([0.05, 0.5, 0.95]))


def algebra(table: pd.DataFrame) -> None:
    """Linear algebra, dense and sparse."""
    wide = table.pivot_table(index="date", columns="station", values="temperature").to_numpy()
    centred = wide - wide.mean(axis=0)
    covariance = centred.T @ centred / (len(wide) - 1)
    values = linalg.eigvalsh(covariance)
    numbers("eigenvalues", values)
    numbers("singular values", linalg.svdvals(centred))
    numbers("solution", linalg.solve(covariance + np.eye(len(covariance)), np.arange(len(covariance), dtype=float)))
    numbers("determinant", linalg.det(covariance), linalg.norm(linalg.inv(covariance)), np.trace(linalg.expm(-covariance / 100)))
    grid = 40
    laplacian = sparse.diags([-1, 2, -1], [-1, 0, 1], shape=(grid, grid))
    system = (sparse.kron(laplacian, sparse.eye(grid)) + sparse.kron(sparse.eye(grid), laplacian)).tocsc()
    numbers("poisson", spsolve(system, np.ones(grid * grid))[:: grid + 1])
    exact("lu", [int(i) for i in np.argsort(np.abs(linalg.lu(covariance)[2]).sum(axis=1))])


def learning(table: pd.DataFrame) -> None:
    """Models of scikit-learn."""
    features = table.assign(day=table.date.dt.dayofyear, elevation=table.station.map(stations.elevation))
    x = features[["day", "elevation", "rain"]].to_numpy(dtype=float)[:2000]
    y = features.temperature.to_numpy()[:2000]
    clusters = KMeans(n_clusters=4, n_init=3, random_state=3).fit(x / x.std(axis=0))
    exact("cluster sizes", sorted(np.bincount(clusters.labels_).tolist()))
    forest = RandomForestClassifier(n_estimators=20, random_state=5).fit(x[:1500], y[:1500] > 12)
    exact("forest", round(float(accuracy_score(y[1500:] > 12, forest.predict(x[1500:]))), 3))
    numbers("ridge", Ridge(alpha=1.0).fit(x, y).coef_)
    numbers("folds", cross_val_score(LinearRegression(), x, y, cv=KFold(4, shuffle=True, random_state=1)))
    numbers("components", PCA(n_components=2).fit(x).explained_variance_ratio_)


def surroundings() -> None:
    """What the interpreter was told: time zone, hash seed, search path, warnings."""
    exact("zone", [time.tzname[0], datetime.datetime.fromtimestamp(0).strftime("%H:%M"), time.strftime("%z", time.localtime(0))])
    exact("other zone", str(datetime.datetime(2024, 7, 1, 12, tzinfo=zoneinfo.ZoneInfo("America/New_York"))))
    exact("set order", list({"temperature", "rain", "pressure", "wind", "sun", "snow"}))
    exact("hash", [hash("station"), sys.flags.hash_randomization])
    exact("module", os.path.basename(os.path.dirname(stations.__file__)))
    exact("flags", [sys.flags.optimize, sys.flags.dev_mode, os.environ["TZ"], sys.warnoptions])


def main() -> None:
    surroundings()
    table = load()
    relations(table)
    algebra(table)
    learning(table)
    names = list(stations.NAMES)
    if "--plain" in sys.argv:
        found = [analyse(name, table) for name in names]
        storms = [count for name in names for count in check([name], table)]
    else:
        import sfparallel as sf
        found = sf.parallel_map(lambda name: analyse(name, table), names, n=3)

        async def all_storms() -> list[list[int]]:
            # From a coroutine, as a notebook would: each clone runs a loop of its own.
            return sf.parallel_map(lambda name: check([name], table), names, n=2)

        storms = [count for counts in asyncio.run(all_storms()) for count in counts]
    exact("storms", storms)
    for name, result in zip(names, found, strict=True):
        numbers(f"{name}, numbers", *result.pop("numbers"))
        exact(name, result)
    sys.stdout.flush()
    print(json.dumps({"exact": EXACT, "numbers": NUMBERS}, sort_keys=True, default=str))


if __name__ == "__main__":
    main()
