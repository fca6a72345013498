"""Files are found on disk first, then among what is shipped, in a checkout and in a wheel."""

from pathlib import Path

import pytest

from trl_ext.errors import UnknownNameError
from trl_ext.recipe import shipped

LAYOUTS = {
    "checkout": ("recipes", "configs"),
    "wheel": ("trl_ext/_recipes", "trl_ext/_configs"),
}


@pytest.fixture(params=LAYOUTS)
def home(request, tmp_path, monkeypatch) -> Path:
    """A root with a package and one shipped recipe that extends a config; elsewhere is current."""
    recipes, configs = LAYOUTS[request.param]
    for folder in ("trl_ext", f"{recipes}/rwr", f"{configs}/accelerate", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / recipes / "rwr/first.yaml").write_text("extends: ../../configs/lora.yaml\n")
    (tmp_path / configs / "lora.yaml").write_text("lora_r: 4\n")
    (tmp_path / configs / "accelerate/two.yaml").write_text("num_processes: 2\n")
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "trl_ext")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


@pytest.mark.parametrize("name", ["rwr/first", "rwr/first.yaml", "recipes/rwr/first.yaml"])
def test_names_of_a_shipped_recipe(home, name):
    assert shipped.find_recipe(name) == shipped.shipped_folder("recipes") / "rwr/first.yaml"
    assert shipped.recipe_names() == ["rwr/first"]


def test_a_file_on_disk_comes_first(home):
    Path("rwr").mkdir()
    Path("rwr/first.yaml").write_text("")
    assert shipped.find_recipe("rwr/first") == Path("rwr/first.yaml")


def test_a_shipped_recipe_finds_shipped_configs(home):
    # In a wheel, ../../configs beside the recipe does not exist.
    recipe = shipped.find_recipe("rwr/first")
    found = shipped.find_extended("../../configs/lora.yaml", recipe)
    assert found is not None
    assert found.samefile(shipped.shipped_folder("configs") / "lora.yaml")


def test_any_recipe_finds_shipped_configs_by_name(home):
    found = shipped.find_extended("configs/lora.yaml", Path("mine.yaml"))
    assert found == shipped.shipped_folder("configs") / "lora.yaml"
    assert shipped.find_extended("configs/none.yaml", Path("mine.yaml")) is None


def test_shipped_names_invert(home):
    for name in ("recipes/rwr/first.yaml", "configs/lora.yaml"):
        path = shipped.find_shipped(name)
        assert path is not None and shipped.shipped_name(path) == name
    assert shipped.shipped_name(Path("mine.yaml")) is None


def test_nothing_outside_is_shipped(home):
    assert shipped.find_shipped("recipes/../trl_ext") is None
    assert shipped.find_shipped("elsewhere/x.yaml") is None


def test_accelerate_configs_are_trls_and_ours(home):
    names = shipped.accelerate_configs()
    assert {"two", "zero2", "fsdp2"} <= set(names)
    assert shipped.read_accelerate_config("two") == {"num_processes": 2}


@pytest.mark.parametrize("name", ["frist", "rwr", "", "."])
def test_an_unknown_name(home, name):
    with pytest.raises(UnknownNameError, match="trl_ext ls"):
        shipped.find_recipe(name)
