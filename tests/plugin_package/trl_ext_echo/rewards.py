"""A reward for saying it in few words."""


def short_answers(prompts, completions, **columns) -> list[float]:
    """1 / (1 + number of words) of each completion, plain or conversational."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [1 / (1 + len(text.split())) for text in texts]
