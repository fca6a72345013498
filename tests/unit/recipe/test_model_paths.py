"""Models that a recipe names and that are not there."""

from pathlib import Path

import pytest

from trl_ext.errors import ConfigError
from trl_ext.models.paths import place_problem
from trl_ext.recipe import read_recipe

LEAST = "trainer: reinforce\nmodel_name_or_path: m\ndataset_name: d\noutput_dir: o\n"


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, file in (
        ("outputs/quickstart", "adapter_config.json"),
        ("outputs/whole", "config.json"),
        ("outputs/counted", "counted_expert.json"),
        ("outputs/empty", "README.md"),
    ):
        Path(folder).mkdir(parents=True)
        Path(folder, file).touch()
    Path("notes.txt").touch()


@pytest.mark.parametrize(
    "name",
    [
        "outputs/quickstart",
        "./outputs/whole",
        "bundled:smollm2-135m-instruct",
        # The hub's: not looked up. No folder "owner" is here.
        "owner/name",
        "gpt2",
        "out",
    ],
)
def test_a_model_that_is_there_or_may_be_on_the_hub(name):
    assert place_problem(name) is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("outputs/quikstart", "no such folder. Did you mean 'outputs/quickstart'?"),
        ("ouputs/quikstart/checkpoint-5", "The nearest that exists is 'outputs/quickstart'."),
        ("ouputs/quikstart/", "Did you mean 'outputs/quickstart'?"),
        ("./nothing", "no such folder. The nearest that exists is '/"),
        ("outputs/zzz", "no such folder. The nearest that exists is 'outputs'."),
        ("/no/such/model", "no such folder. The nearest that exists is '/'."),
        ("./nots.txt", "no such folder. The nearest that exists is '/"),
        ("outputs/half/of/" + "a" * 300, "no such folder."),
        ("~/model", "no such folder."),
        ("", "got '', "),
        ("outputs/empty", "a folder that holds no config.json and no adapter_config.json"),
        ("outputs/counted", "a folder that holds no config.json"),
        ("./notes.txt", "which is a file"),
        ("notes.txt", "which is a file"),
        ("bundled:smollm2", "no bundled model. Did you mean bundled:smollm2-135m-instruct?"),
        ("bundled:", "no bundled model."),
    ],
)
def test_a_model_that_is_not_there(name, says):
    problem = place_problem(name)
    assert problem is not None and says in problem
    assert problem.startswith(f"got {name!r}")
    assert "allowed: a folder with config.json or adapter_config.json, a hub id" in problem


@pytest.mark.parametrize("key", ["process_reward", "process_reference"])
def test_a_process_reward_that_is_not_there(key):
    """File and line; the key, the value, what is allowed and the nearest that exists."""
    other = "" if key == "process_reward" else "process_reward: outputs/whole\n"
    Path("r.yaml").write_text(f"{LEAST}{other}{key}: outputs/quikstart\n")
    with pytest.raises(ConfigError) as caught:
        read_recipe("r.yaml")
    line = 6 if other else 5
    assert f"r.yaml:{line}: {key}: got 'outputs/quikstart', and there" in str(caught.value)
    assert "Did you mean 'outputs/quickstart'? allowed: a folder" in str(caught.value)
    assert "has 1 problem" in str(caught.value)
    assert read_recipe("r.yaml", [f"{key}=outputs/quickstart"]).values[key] == "outputs/quickstart"
    assert read_recipe("r.yaml", [f"{key}=null", "process_reward=owner/name"])


def test_experts_that_are_not_there():
    """Not what another run has still to write: "outputs/x" may be a hub id, "./outputs/x" not."""
    least = (
        "trainer: poe_distillation\nmodel_name_or_path: m\ndataset_name: d\noutput_dir: o\n"
        "expert_weights: {a: 0.5, b: 0.5}\n"
    )
    Path("r.yaml").write_text(f"{least}experts: {{a: outputs/counted, b: outputs/to_come}}\n")
    read_recipe("r.yaml")
    Path("r.yaml").write_text(f"{least}experts: {{a: ./outputs/cuonted, b: bundled:smolm2}}\n")
    with pytest.raises(ConfigError) as caught:
        read_recipe("r.yaml")
    assert "r.yaml:6: experts: a: got './outputs/cuonted', and there" in str(caught.value)
    assert "Did you mean 'outputs/counted'?" in str(caught.value)
    assert "experts: b: got 'bundled:smolm2', which is no bundled model." in str(caught.value)
    Path("r.yaml").write_text(f"{least}experts: {{a: outputs/empty, b: outputs/whole}}\n")
    with pytest.raises(ConfigError, match=r"a: got 'outputs/empty', .* no counted_expert\.json"):
        read_recipe("r.yaml")
