"""The arguments of a recipe that belong to neither the model nor the trainer's config."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ScriptArguments:
    """What to train on and what to reward: TRL's `GRPOScriptArguments`, and a little more.

    `reward_funcs` also takes entries `{name: ..., argument: value}`, and `dataset_kwargs` is new.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or local path of a dataset, or reasoning_gym/<task>. Not beside "
            "`datasets`."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Name of the dataset's configuration."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    dataset_streaming: bool = field(
        default=False, metadata={"help": "Whether to stream the dataset."}
    )
    ignore_bias_buffers: bool = field(
        default=False,
        metadata={"help": "Leave boolean buffers out of DDP's synchronisation (a debugging aid)."},
    )
    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or local path of a reward model."}
    )
    reward_funcs: list[str | dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: registered names, 'package.module:object', or mappings "
            "with `name` and the arguments of a reward factory."
        },
    )
    dataset_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Arguments of the dataset builder, such as size and seed."},
    )


@dataclass
class LaunchArguments:
    """Where to run: the few `accelerate launch` flags that a recipe may name."""

    accelerate_config: str | None = field(
        default=None,
        metadata={"help": "Accelerate config: a path, or a shipped name such as fsdp2 or zero2."},
    )
    num_processes: int | None = field(
        default=None, metadata={"help": "Number of processes, over all machines."}
    )
    num_machines: int | None = field(default=None, metadata={"help": "Number of machines."})
    machine_rank: int | None = field(
        default=None, metadata={"help": "Which of the machines this is, from 0."}
    )
    main_process_ip: str | None = field(
        default=None, metadata={"help": "Address of the machine with rank 0."}
    )
    main_process_port: int | None = field(
        default=None, metadata={"help": "Port on the machine with rank 0."}
    )
