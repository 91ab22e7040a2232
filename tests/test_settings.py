"""Settings in groups: one definition for fit, Lightning and scikit-learn."""

import dataclasses
import inspect
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from sklearn.base import clone

import pyro_mdn
from pyro_mdn import (
    Checkpointing,
    EarlyStopping,
    MixtureDensityNetwork,
    NegativeLogLikelihood,
    NoiseSchedule,
    Optimization,
    TrainingLoop,
    fit,
)
from pyro_mdn.lightning import LightningObjective
from pyro_mdn.sklearn import MDNRegressor
from pyro_mdn.support.settings import Group, collected, given_settings, groups_of, keyword_of, takes
from pyro_mdn.training.settings import FitArguments, LoopSettings

GROUPS = groups_of(FitArguments)
FIELDS = [(group, f.name) for group in GROUPS for f in dataclasses.fields(group)]
OTHERS = {"int": 7, "float": 0.5, "bool": True, "torch.dtype": torch.bfloat16, "str": "run"}


def other(group, name):
    """A value of the type of a setting that is not its default."""
    setting = group.__dataclass_fields__[name]
    return not setting.default if isinstance(setting.default, bool) else OTHERS[setting.type.split(" | ")[0]]


def data(n=40):
    x = torch.linspace(-1, 1, n).unsqueeze(-1)
    return x, x.sin() + 0.1 * torch.randn(n, 1, generator=torch.Generator().manual_seed(0))


def network():
    return MixtureDensityNetwork(1, 1, 2, 8, seed=0)


def entry(text, name):
    """What a list of arguments says of one of them, in one line."""
    lines = inspect.cleandoc(text).split("\n")
    start = next((i for i, line in enumerate(lines) if line.startswith(f"    {name}: ")), None)
    if start is None:
        return None
    rest = lines[start + 1 :]
    end = next((i for i, line in enumerate(rest) if not line.startswith(" " * 8)), len(rest))
    return " ".join(line.strip() for line in [lines[start], *rest[:end]])


@pytest.mark.parametrize(("group", "name"), FIELDS)
def test_every_setting_is_a_keyword_of_fit_by_itself_and_in_its_group(group, name):
    parameters, value = inspect.signature(fit).parameters, other(group, name)
    assert parameters[name].default == group.__dataclass_fields__[name].default
    assert parameters[keyword_of(group)].default is None
    for given in ({name: value}, {keyword_of(group): group(**{name: value})}):
        settings = collected(FitArguments, "fit", {"network": None, "x": None, **given})
        assert getattr(settings, name) == value != parameters[name].default


@pytest.mark.parametrize(("group", "name"), FIELDS)
def test_every_setting_is_documented_once(group, name):
    assert entry(group.__doc__, name)
    assert entry(fit.__doc__, name) == entry(group.__doc__, name)
    assert group.__name__ in entry(fit.__doc__, keyword_of(group))
    assert group.__name__ in pyro_mdn.__all__


def test_the_signature_of_fit_is_that_of_its_documentation():
    assert all(entry(fit.__doc__, name) for name in inspect.signature(fit).parameters)
    assert list(inspect.signature(fit).parameters)[:4] == ["network", "x", "y", "objective"]
    assert inspect.signature(fit).return_annotation == "FitResult"
    with pytest.raises(TypeError, match=r"fit\(\) got an unexpected keyword argument 'learning_rate'"):
        fit(network(), *data(), learning_rate=0.1)


def test_groups_train_as_their_fields_do():
    alone, together = network(), network()
    short = {"lr": 0.05, "max_epochs": 3, "final_noise": 0.5, "patience": 2, "max_grad_norm": 0.1}
    fit(alone, *data(), seed=0, progress=False, **short)
    groups = {
        "optimization": Optimization(lr=0.05),
        "training_loop": TrainingLoop(max_epochs=3, max_grad_norm=0.1),
        "noise_schedule": NoiseSchedule(final_noise=0.5),
        "early_stopping": EarlyStopping(patience=2),
    }
    fit(together, *data(), seed=0, progress=False, **groups)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), together.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimization": {"lr": 0.1}}, r"optimization: expected Optimization\(...\), got dict of 1"),
        ({"optimization": EarlyStopping()}, r"optimization: expected Optimization\(...\), got EarlyStopping"),
        (
            {"optimization": Optimization(), "lr": 0.02},
            "optimization, lr: expected lr in one of the two, got it in both",
        ),
    ],
)
def test_groups_that_are_not_usable(settings, message):
    untouched = network()
    with pytest.raises(ValueError, match=message):
        fit(untouched, *data(), **settings)
    assert untouched.training


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Optimization(lr="a"), "lr: expected a finite number that is positive, got 'a'"),
        (lambda: TrainingLoop(evaluation_rows=0), "evaluation_rows: expected a positive integer, got 0"),
        (lambda: TrainingLoop(autocast=torch.float16), "autocast: expected None or torch.bfloat16, got torch.float16"),
        (lambda: NoiseSchedule(final_noise=-1.0), "final_noise: expected a finite number that is not negative"),
        (lambda: EarlyStopping(patience=0), "patience: expected a positive integer, got 0"),
        (lambda: Checkpointing(checkpoint_every=0.5), "checkpoint_every: expected a positive integer, got 0.5"),
    ],
)
def test_a_group_checks_its_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Checkpoints


def loop_settings(**settings):
    numbers = {"max_epochs": 3, "patience": 2, "weight_decay": 0.0, "input_noise": 0.0, "target_noise": 0.0}
    numbers["final_noise"] = 0.03
    return LoopSettings(**{**numbers, **settings})


def test_checkpoints_name_the_settings_that_they_always_named():
    """Those of the first release, and others where they are not at their defaults: earlier runs go on."""
    first = {
        "max_epochs": 3,
        "patience": 2,
        "lr": 0.02,
        "weight_decay": 0.0,
        "input_noise": 0.0,
        "target_noise": 0.0,
        "final_noise": 0.03,
        "max_grad_norm": 1.0,
        "skip_bad_batches": False,
        "autocast": None,
    }
    assert loop_settings().in_checkpoints() == first
    changed = loop_settings(autocast=torch.bfloat16, evaluation_rows=7, rows_to_start=10_000)
    assert changed.in_checkpoints() == {**first, "autocast": "torch.bfloat16", "evaluation_rows": 7}


@pytest.mark.parametrize("name", ["evaluation_rows", "rows_to_start", "fading", "first_weight_decay"])
def test_later_settings_tell_runs_apart(tmp_path, name):
    settings = {"max_epochs": 2, "seed": 0, "progress": False, "checkpoint": tmp_path / "run"}
    fit(network(), *data(), **settings, **{name: 7})
    with pytest.raises(ValueError, match=f"expected a checkpoint of this run, .*{name}"):
        fit(network(), *data(), resume=True, **settings)


# Lightning and scikit-learn


@pytest.mark.parametrize(("group", "name"), [(g, n) for g, n in FIELDS if g in (Optimization, NoiseSchedule)])
def test_lightning_takes_every_setting_that_is_not_the_trainers(group, name):
    value = other(group, name)
    for given in ({name: value}, {keyword_of(group): group(**{name: value})}):
        module = LightningObjective(NegativeLogLikelihood(network()), **given)
        assert getattr(module, name) == module.hparams[name] == value
        again = LightningObjective(NegativeLogLikelihood(network()), **module.hparams)
        assert again.hparams == module.hparams
        assert getattr(again, name) == value
    assert entry(LightningObjective.__doc__, name)


def test_lightning_refuses_what_the_trainer_decides():
    objective = NegativeLogLikelihood(network())
    with pytest.raises(TypeError, match=r"LightningObjective\(\) got an unexpected keyword argument 'patience'"):
        LightningObjective(objective, patience=3)
    with pytest.raises(ValueError, match="optimization, lr: expected lr in one of the two"):
        LightningObjective(objective, lr=0.1, optimization=Optimization())


def test_hyperparameters_of_a_class_of_the_users_are_kept():
    class Extended(LightningObjective):
        def __init__(self, objective, extra=1, **settings):
            super().__init__(objective, **settings)

    module = Extended(NegativeLogLikelihood(network()), extra=3, lr=0.1)
    assert module.hparams["extra"] == 3
    assert module.hparams["lr"] == 0.1


REGRESSOR = (Optimization, TrainingLoop, NoiseSchedule, EarlyStopping)


@pytest.mark.parametrize("group", REGRESSOR)
def test_the_regressor_takes_every_setting(group):
    """Those with a keyword of their own also by themselves; pickles and clones have the same settings."""
    names = [f.name for f in dataclasses.fields(group)]
    values = {name: other(group, name) for name in names}
    whole = group(**values)
    for name in (n for n in names if n in MDNRegressor().get_params()):
        model = pickle.loads(pickle.dumps(clone(MDNRegressor(**{name: values[name]}))))
        assert given_settings(MDNRegressor.__init__, vars(model), *REGRESSOR) == {name: values[name]}
        assert entry(MDNRegressor.__doc__, name)
    model = pickle.loads(pickle.dumps(clone(MDNRegressor(**{keyword_of(group): whole}))))
    assert given_settings(MDNRegressor.__init__, vars(model), *REGRESSOR) == {keyword_of(group): whole}
    assert entry(MDNRegressor.__doc__, keyword_of(group))


def test_groups_of_the_regressor_reach_the_training():
    x, y = (t.numpy() for t in data())
    loop = TrainingLoop(max_epochs=4, skip_bad_batches=True)
    model = MDNRegressor(
        training_loop=loop, early_stopping=EarlyStopping(validation=0.2, patience=4, refit=True), random_state=0
    )
    result = model.fit(x, y).result_
    assert len(result.history) == 4
    assert len(result.refit_history) == result.best_epoch
    with pytest.raises(ValueError, match="training_loop, max_epochs: expected max_epochs in one of the two"):
        MDNRegressor(training_loop=loop, max_epochs=3).fit(x, y)
    with pytest.raises(ValueError, match=r"validation: expected a fraction in \[0, 1\), got"):
        MDNRegressor(early_stopping=EarlyStopping(validation=(x, y))).fit(x, y)


# The mechanism


@dataclass(frozen=True, kw_only=True)
class Size(Group):
    """Size of a picture.

    Args:
        width: Its width.
    """

    width: int = 3


@dataclass(frozen=True, kw_only=True)
class Drawing(Size):
    title: str = field(kw_only=False)
    size: Size | None = None


def test_a_new_setting_is_one_field():
    """What a class of groups has, the function has: by itself, in the group, in signature and documentation."""

    @takes(Drawing)
    def draw(title, **settings):
        """Draw.

        Args:
            title: Above the picture.
            **settings: Fields of groups.

        Returns:
            What was drawn.
        """
        return collected(Drawing, "draw", {"title": title, **settings})

    assert draw("a", width=4).width == draw("a", size=Size(width=4)).width == 4
    parameters = [(p.name, p.kind.name, p.default) for p in inspect.signature(draw).parameters.values()]
    title = ("title", "POSITIONAL_OR_KEYWORD", inspect.Parameter.empty)
    assert parameters == [title, ("size", "KEYWORD_ONLY", None), ("width", "KEYWORD_ONLY", 3)]
    documentation = ["    title: Above the picture.", "    width: Its width."]
    documentation.append("    size: A whole :class:`Size`, in place of ``width``.")
    assert draw.__doc__ == "\n".join(["Draw.", "", "Args:", *documentation, "", "Returns:", "    What was drawn."])
