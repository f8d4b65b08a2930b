"""Write golden/probes.npz: what scikit-learn's classifiers make of drawn features.

    pip install scikit-learn && python tests/golden/make_probes.py

The features have correlated dimensions of different scales, a constant one, and classes that
overlap.
"""

import pathlib
import warnings

import numpy as np
import sklearn
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

FILE = pathlib.Path(__file__).with_name("probes.npz")
TRAIN, TEST, WIDTH, CLASSES = 300, 200, 12, 4
NEIGHBOURS = ((1, 0.07), (5, 0.07), (20, 0.07), (20, 0.5), (200, 0.02))
STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3)


def draw(count: int, random: np.random.RandomState, centres, mixing) -> tuple:
    labels = random.randint(0, CLASSES, count)
    features = (centres[labels] + random.randn(count, WIDTH)) @ mixing
    features = features * 10.0 ** np.linspace(-1, 1, WIDTH) + np.linspace(-3, 3, WIDTH)
    features[:, 5] = 2.5
    return features.astype(np.float32), labels


def fit(strength: float, features, labels, factor: float = 1.0) -> LogisticRegression:
    inverse = factor / (strength * len(labels))
    return LogisticRegression(C=inverse, tol=1e-9, max_iter=100_000).fit(features, labels)


def main() -> None:
    random = np.random.RandomState(0)
    centres, mixing = random.randn(CLASSES, WIDTH), random.randn(WIDTH, WIDTH)
    train, labels = draw(TRAIN, random, centres, mixing)
    test, test_labels = draw(TEST, random, centres, mixing)
    result = {"train": train, "labels": labels, "test": test, "test_labels": test_labels}
    for k, temperature in NEIGHBOURS:
        model = KNeighborsClassifier(
            k,
            metric="cosine",
            algorithm="brute",
            weights=lambda distance, t=temperature: np.exp((1 - distance) / t),
        )
        result[f"knn/{k}/{temperature}"] = model.fit(train.astype(float), labels).predict(
            test.astype(float)
        )
    scaler = StandardScaler().fit(train.astype(float))
    rows, test_rows = scaler.transform(train.astype(float)), scaler.transform(test.astype(float))
    for strength in STRENGTHS:
        model = fit(strength, rows, labels)
        result[f"linear/{strength}/kernel"] = model.coef_.T
        result[f"linear/{strength}/bias"] = model.intercept_
        result[f"linear/{strength}/classes"] = model.predict(test_rows)
    # Of two classes: one vector, the difference of ours.
    two = labels < 2
    model = fit(1e-2, StandardScaler().fit_transform(train[two].astype(float)), labels[two], 2.0)
    result["two/kernel"], result["two/bias"] = model.coef_[0], model.intercept_
    np.savez_compressed(FILE, **result, version=sklearn.__version__)
    print(f"{FILE}: {FILE.stat().st_size:,} bytes, scikit-learn {sklearn.__version__}")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        main()
