"""Every error is caught as one of ours and as the standard error of its kind."""

import inspect

import pytest

from trl_ext import errors

KINDS = {
    errors.ConfigError: ValueError,
    errors.UnknownNameError: LookupError,
    errors.PluginError: ImportError,
    errors.MissingDependencyError: ImportError,
    errors.DataError: ValueError,
    errors.RewardError: RuntimeError,
    errors.RunError: RuntimeError,
    errors.OutOfMemoryError: RuntimeError,
}


@pytest.mark.parametrize(("kind", "standard"), KINDS.items())
def test_an_error_is_ours_and_standard(kind, standard):
    for caught in (errors.TrlExtError, standard):
        with pytest.raises(caught, match="what was wrong"):
            raise kind("what was wrong")


def test_every_error_is_in_the_table():
    defined = {value for _, value in inspect.getmembers(errors, inspect.isclass)}
    assert defined == {errors.TrlExtError, *KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_message_is_printed_as_written(kind):
    """KeyError, a LookupError too, would print the repr: quotes around, newlines escaped."""
    assert str(kind("two\nlines")) == "two\nlines"
