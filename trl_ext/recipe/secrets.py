"""Access tokens in recipes and command lines: used, and never written to a run's record."""

import re
from collections.abc import Sequence

_SECRET = re.compile(r"hub_token|env\.\w*(TOKEN|KEY|SECRET|PASSWORD)")
_HIDDEN = "(hidden)"


def is_secret(key: str) -> bool:
    """Whether a recipe's key, or `env.NAME`, holds what opens an account."""
    return bool(_SECRET.fullmatch(key))


def hide_secrets(arguments: Sequence[str]) -> list[str]:
    """A command line with the values of secret keys hidden, in all forms that overrides have."""
    hidden, follows = [], False
    for argument in arguments:
        key, assigned, _ = argument.removeprefix("--").partition("=")
        if follows:
            hidden.append(_HIDDEN)
        else:
            hidden.append(f"{key}={_HIDDEN}" if assigned and is_secret(key) else argument)
        follows = not follows and not assigned and argument.startswith("--") and is_secret(key)
    return hidden
