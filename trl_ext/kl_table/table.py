"""The graded methods as rows, as Markdown, and held against what they claim."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from trl_ext.kl_table.grade import LENGTH, VOCABULARY, Bench, Grade, distance_after_training
from trl_ext.kl_table.methods import Method

OFF_POLICY = 0.3
BETA = 0.5

_COLUMNS = (
    "method",
    "from",
    "value: bias",
    "sd",
    "on-policy gradient is",
    "bias",
    "sd",
    "off-policy gradient is",
    "bias",
    "sd",
    "KL(π‖π*) trained",
)
_LEGEND = (
    f"Exact, by enumeration of every completion of at most {LENGTH} tokens "
    f"from {VOCABULARY}: nothing is sampled, so there are no error bars. Values in units "
    "of the KL, gradients in units of ‖∇KL‖, of the sequence KL(π‖π_ref); sd is that of one "
    "completion. A gradient is *whole* (∇KL of sequences), *per step* (each step's own KL at the "
    "prefixes that were sampled; its effect on later prefixes is missing), *forward per step* (the "
    "same of KL(π_ref‖π)), *zero*, or *biased*: none of these. Off-policy, the samples come from "
    f"logits {OFF_POLICY} standard deviations away. The last column is the distance from π*, in "
    f"nats, after training on E[r] − {BETA}·penalty with the expected gradient, on-policy, to rest."
)


@dataclass(frozen=True)
class Row:
    """A method and its grades.

    Attributes:
        on_policy, off_policy: its grades.
        trained: KL(π‖π*), nats, after training with it.
    """

    method: Method
    on_policy: Grade
    off_policy: Grade
    trained: float

    @property
    def contradictions(self) -> list[str]:
        """Each claim of the method that its grade does not bear out."""
        claims = (
            ("on-policy", self.method.claim, self.on_policy),
            ("off-policy", self.method.off_policy_claim, self.off_policy),
        )
        return [
            f"{self.method.name}: its {where} gradient is said to be {claim}, and is {grade.part}."
            for where, claim, grade in claims
            if claim is not None and grade.part != claim
        ]

    def record(self) -> dict:
        """The row as JSON has it."""
        return {
            "method": self.method.name,
            "from": self.method.source,
            "placement": self.method.placement,
            "on_policy": asdict(self.on_policy),
            "off_policy": asdict(self.off_policy),
            "trained_kl": self.trained,
        }


def graded(methods: Sequence[Method], *, steps: int = 1500, seed: int = 0) -> list[Row]:
    """The rows of the table.

    Args:
        methods: what is graded.
        steps: of training with each, for the last column.
        seed: of the random policies and rewards.
    """
    on_policy, off_policy = Bench(seed), Bench(seed, OFF_POLICY)
    return [
        Row(
            method,
            on_policy.grade(method),
            off_policy.grade(method),
            distance_after_training(method, beta=BETA, steps=steps, seed=seed),
        )
        for method in methods
    ]


def markdown(rows: Sequence[Row], note: str = "") -> str:
    """The table with its legend, and what else is to be said of it."""
    lines = [f"{_LEGEND}{note}", "", _line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
    return "\n".join([*lines, *(_line(_cells(row)) for row in rows)])


def _cells(row: Row) -> list[str]:
    on, off = row.on_policy, row.off_policy
    return [
        row.method.name,
        row.method.source,
        _number(on.value_bias),
        f"{on.value_sd:.2f}",
        on.part,
        _number(on.gradient_bias),
        f"{on.gradient_sd:.2f}",
        off.part,
        _number(off.gradient_bias),
        f"{off.gradient_sd:.2f}",
        f"{row.trained:.4f}",
    ]


def _number(value: float) -> str:
    """Three decimals, and no sign on what rounds to 0."""
    return f"{value:.3f}".replace("-0.000", "0.000")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
