"""A search by scikit-learn
========================

GridSearchCV chooses the number of components and the noise model for Old Faithful; then the best estimator predicts.
"""

import argparse
import warnings
from functools import partial
from pathlib import Path

import pandas as pd
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures

from pyro_mdn import CollapseWarning, Full
from pyro_mdn.sklearn import MDNRegressor, neg_crps, neg_interval_score, neg_log_score

DATA = Path(__file__).parent / "data" / "geyser.csv"
NOISE = {"diagonal": "diagonal", "full": "full", "full, tied": Full(tied=True)}
GRID = {"mdnregressor__n_components": [1, 3, 5], "mdnregressor__noise": list(NOISE.values())}
SCORES = {"log-likelihood": neg_log_score, "CRPS": neg_crps, "90 %": partial(neg_interval_score, mass=0.9)}


def load_pairs():
    """(waiting, duration) of each eruption and of the one after it: 238 pairs to search on, then 60 held out."""
    eruptions = pd.read_csv(DATA)
    last, following = eruptions.iloc[:-1], eruptions.iloc[1:].reset_index(drop=True)
    return (last[:238], following[:238]), (last[238:], following[238:])


def search(X, y, folds, **settings):
    """Cross-validate all of the grid by three scores, and refit what has the best log-likelihood."""
    model = MDNRegressor(random_state=0, **settings)
    # No scaling is needed. Products of the columns are an example of a step before the network.
    pipeline = make_pipeline(PolynomialFeatures(2, include_bias=False).set_output(transform="pandas"), model)
    return GridSearchCV(pipeline, GRID, scoring=SCORES, refit="log-likelihood", cv=folds).fit(X, y)


def show(results):
    """Print what cross-validation found, the best first."""
    columns = {f"param_{name}": name.removeprefix("mdnregressor__") for name in GRID}
    columns |= {f"mean_test_{name}": name for name in SCORES}
    table = pd.DataFrame(results)[list(columns)].rename(columns=columns)
    table["noise"] = table["noise"].map({model: name for name, model in NOISE.items()})
    table = table.sort_values("log-likelihood", ascending=False)
    print(table.to_string(index=False, float_format="{:.3f}".format))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a run of seconds")
    smoke = parser.parse_args().smoke
    warnings.simplefilter("ignore", CollapseWarning)  # the data may need fewer than five components
    train, test = load_pairs()
    found = search(*train, folds=2 if smoke else 5, **({"max_epochs": 2} if smoke else {"max_epochs": 200}))
    print("mean over the folds, higher is better")
    show(found.cv_results_)

    best, features = found.best_estimator_, found.best_estimator_[:-1]
    linear = LinearRegression().fit(*train).score(*test)
    print(f"\n60 eruptions held out: log-likelihood {found.score(*test):.3f}, CRPS {-neg_crps(best, *test):.3f}")
    print(f"R² of the mean {best[-1].r2_score(features.transform(test[0]), test[1]):.3f}, of a line {linear:.3f}")

    after = features.transform(pd.DataFrame({"waiting": [85.0, 75.0], "duration": [2.0, 4.5]}))
    quantiles = best[-1].predict_quantiles(after, [0.05, 0.5, 0.95])  # (2 rows, 3 levels, 2 outputs)
    print("\nthe next eruption: quantiles at 5, 50 and 95 %")
    for name, rows in zip(["short", "long"], quantiles, strict=True):
        for output, levels in zip(["waiting (min)", "duration (min)"], rows.T, strict=True):
            print(f"after a {name:<6}{output:<15}" + "".join(f"{level:8.1f}" for level in levels))


if __name__ == "__main__":
    main()
