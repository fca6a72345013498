"""Any metric of the library evaluate as a reward: `evaluate:rouge`."""

import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from trl_ext.errors import ConfigError, MissingDependencyError, RewardError
from trl_ext.metrics import metric_path
from trl_ext.rewards.guard import FAILURES, raised
from trl_ext.rewards.reading import completion_text
from trl_ext.rewards.returned import cut, shown

# Of the metrics that are shipped: those of a text.
OF_TEXTS = ("chrf", "rouge")
MADE_UP = "one and two"


class MetricReward:
    """A reward function out of a metric: each completion alone against its reference.

    In a recipe: `{name: "evaluate:rouge", reference: answer, key: rougeL}`. A metric that is made
    for a corpus, such as BLEU, is a rough judge of one text.

    Args:
        metric: the name of one that trl_ext ships (`rouge`, `chrf`), the path of a metric's folder
            or file, or a hub name. Its module is run here: name only one that you trust.
        reference: the dataset's column with what each completion is compared with. None: for a
            metric of the completion alone.
        key: which of the metric's results; needed where there are several.
        kwargs: arguments of the metric's `compute`.
        empty: reward of an empty completion, which some metrics cannot take; None asks the metric.

    Raises:
        ConfigError: if there is no such metric, it wants other inputs, or an argument is wrong.
        RewardError: if it does not take its kwargs, or gives no number under that key.
        MissingDependencyError: if it needs a package that is not there.
    """

    def __init__(
        self,
        metric: str,
        reference: str | None = None,
        key: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        empty: float | None = None,
    ):
        self.__name__ = Path(metric).stem
        _check_arguments(metric, reference, key, kwargs, empty)
        self.reference, self.key, self.empty = reference, key, empty
        self.kwargs = dict(kwargs or {})
        self.metric = load_metric(metric)
        _check_inputs(self.metric, metric, reference)
        self._try()

    def __call__(self, prompts: list, completions: list, **columns: Any) -> list[float]:
        """As TRL calls a reward function.

        Raises:
            RewardError: if the column is not there, or the metric raises or gives no number.
        """
        if self.reference is not None and columns.get(self.reference) is None:
            raise RewardError(
                f"The metric {self.__name__!r} needs the dataset's column {self.reference!r}, and "
                "there is none. Name another: reference."
            )
        rights = columns[self.reference] if self.reference else [None] * len(completions)
        return [
            self._score(completion_text(completion), right, shown(index, prompts, completions))
            for index, (completion, right) in enumerate(zip(completions, rights, strict=True))
        ]

    def _score(self, said: str, right: Any, where: str) -> float:
        if self.empty is not None and not said.strip():
            return float(self.empty)
        if self.reference is not None:
            right = _reference(right, self.reference, self.__name__, where)
        try:
            results = self._compute(said, right)
        except FAILURES as error:  # a metric may fail in any way
            advice = "" if said.strip() else " `empty` gives the reward of an empty completion."
            raise RewardError(
                f"The metric {self.__name__!r} raised {raised(error)}. {where}{advice}"
            ) from error
        return _number(results, self.key, self.__name__, where)

    def _compute(self, said: str, right: Any) -> Any:
        given = {} if self.reference is None else {"references": [right]}
        return self.metric.compute(predictions=[said], **given, **self.kwargs)

    def _try(self) -> None:
        """Score a made-up completion, so that a wrong key or argument is found before a model is.

        Raises:
            RewardError: if the metric does not take its arguments, or gives no such number.
        """
        where = f"It was tried on the made-up completion {MADE_UP!r}."
        try:
            results = self._compute(MADE_UP, MADE_UP)
        except TypeError as error:
            raise RewardError(
                f"The metric {self.__name__!r} raised {raised(error)}. {where} Correct kwargs, now "
                f"{self.kwargs}."
            ) from error
        except FAILURES:  # it may want texts of another form, which the first batch will tell
            return
        _number(results, self.key, self.__name__, where)


def _reference(right: Any, column: str, name: str, where: str) -> str | list[str]:
    if isinstance(right, int | float):  # a column of numbers, compared as text
        return str(right)
    listed = [right] if isinstance(right, str) else right
    if isinstance(listed, list) and listed and all(isinstance(each, str) for each in listed):
        return right
    raise RewardError(
        f"The metric {name!r} is given {cut(right)} of the column {column!r}; it must be a text, a "
        f"number, or a list of texts. {where} Leave out rows without a reference."
    )


def load_metric(metric: str) -> Any:
    """A metric by the path of its module, its name here, or its name on the hub.

    Raises:
        ConfigError: if it cannot be had; with what can.
        MissingDependencyError: if it needs a package that is not there.
    """
    import datasets
    import evaluate
    from huggingface_hub import is_offline_mode

    is_shipped = metric in OF_TEXTS
    path = metric_path(metric) if is_shipped else Path(metric).expanduser()
    try:
        return evaluate.load(
            str(path),
            keep_in_memory=True,
            # Else it asks a hub that cannot be reached several times.
            download_config=datasets.DownloadConfig(local_files_only=is_offline_mode()),
        )
    except ImportError as error:
        extra = " They come with trl-ext[metrics]." if is_shipped else ""
        raise MissingDependencyError(f"The metric {metric!r}: {error}{extra}") from error
    except FAILURES as error:  # the module of a metric may fail in any way
        raise ConfigError(
            f"The metric {metric!r} cannot be loaded: {raised(error)}. Write evaluate:NAME with "
            f"one that is shipped ({', '.join(OF_TEXTS)}), with the path of a metric's "
            "folder or file, or, online, with a hub name; a hub name that was loaded once is kept."
        ) from error


def _check_arguments(metric: str, reference: Any, key: Any, kwargs: Any, empty: Any) -> None:
    for name, value in (("reference", reference), ("key", key)):
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"The metric {metric!r}: {name} is {value!r}; it must be a name.")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ConfigError(
            f"The metric {metric!r}: kwargs is {kwargs!r}; it must map arguments of the metric's "
            "compute to their values."
        )
    is_number = isinstance(empty, Real) and not isinstance(empty, bool)
    if empty is not None and not (is_number and math.isfinite(empty)):
        raise ConfigError(f"The metric {metric!r}: empty is {empty!r}; it must be a finite number.")


def _check_inputs(loaded: Any, metric: str, reference: str | None) -> None:
    """Whether it takes texts, and a reference if one is given and only then."""
    forms = loaded.features if isinstance(loaded.features, list) else [loaded.features]
    given = {"predictions"} | ({"references"} if reference is not None else set())
    wanted = set(forms[0])
    if wanted != given:
        advice = (
            "Name the dataset's column with the references: reference."
            if wanted - given == {"references"}
            else "Leave out reference."
            if given - wanted == {"references"}
            else "Write a reward function that calls it."
        )
        raise ConfigError(
            f"The metric {metric!r} takes {', '.join(sorted(wanted))}, and as a reward it is given "
            f"{', '.join(sorted(given))}. {advice}"
        )
    kinds = [form["predictions"] for form in forms]
    if not any(getattr(kind, "dtype", None) in ("string", "large_string") for kind in kinds):
        raise ConfigError(
            f"The metric {metric!r} takes predictions of the type {kinds[0]}, and a completion is "
            "a text. Write a reward function that reads the text and calls it."
        )


def _number(results: Any, key: str | None, name: str, where: str) -> float:
    found = dict(results) if isinstance(results, Mapping) else {"": results}
    if key is None and len(found) > 1:
        raise RewardError(f"The metric {name!r} gives {_named(found)}. Say which: key.")
    if key is not None and key not in found:
        raise RewardError(f"The metric {name!r} gives no {key!r}. It gives {_named(found)}.")
    value: Any = found[key] if key is not None else next(iter(found.values()), None)
    if hasattr(value, "tolist"):  # an array or a number of NumPy
        value = value.tolist()
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, Real):
        raise RewardError(
            f"The metric {name!r} gives {cut(value)} for {key or 'its result'}, which is no number."
            f" {where} It gives {_named(found)}; key says which."
        )
    return float(value)


def _named(found: Mapping[str, Any]) -> str:
    return ", ".join(found) or "no name"
