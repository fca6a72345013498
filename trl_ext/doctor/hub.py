"""Whether the hub answers; asked for only when the user wants it."""

from urllib.parse import urlsplit

from trl_ext.doctor.finding import Finding

_SECONDS = 10


def check_hub() -> list[Finding]:
    """Whether the hub answers, and whether there is a token. Names neither host nor token."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return [Finding("hub", "note", "not asked: HF_HUB_OFFLINE is set.")]
    problem = _problem(constants.ENDPOINT)
    if problem:
        do = "Check the network, HTTPS_PROXY and HF_ENDPOINT; or work offline: HF_HUB_OFFLINE=1"
        return [Finding("hub", "warning", f"it does not answer: {problem}.", do)]
    if get_token() is None:
        says = "it answers; there is no token, which gated and private models need."
        return [Finding("hub", "ok", says, "hf auth login")]
    return [Finding("hub", "ok", "it answers, and there is a token.")]


def _problem(endpoint: str) -> str | None:
    """Why the hub cannot be reached, without its address, which may be a private mirror's."""
    from huggingface_hub import get_session

    try:  # the client that runs use, which is another in each major version, with its own errors
        status = get_session().head(endpoint, timeout=_SECONDS).status_code
    except Exception as error:
        address = urlsplit(endpoint)
        reason = f"{type(error).__name__}: {error}"
        for part in filter(None, (address.netloc, address.hostname)):
            reason = reason.replace(part, "the hub")
        return reason
    return f"status {status}" if status >= 500 else None
