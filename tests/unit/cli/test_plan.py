"""`trl_ext plan`: the table, the verdict, and changes that can be pasted."""

import json

import pytest

from tests.unit.plan.recipes import LORA, recipe


@pytest.fixture
def file(tmp_path, monkeypatch) -> str:
    """A recipe of LoRA on Qwen2.5-1.5B, whose config ships with trl_ext."""
    monkeypatch.setenv("COLUMNS", "80")
    return str(recipe(tmp_path, **LORA).path)


def test_table_and_verdict(trl_ext, file):
    code, out, err = trl_ext("plan", file, "--gpu", "rtx-4090")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert max(map(len, lines[1:])) <= 80  # the first names the file, however long it is
    assert lines[1].split() == ["load", "generate", "train", "save"]
    # 1543714304 parameters in bfloat16.
    assert lines[2].split() == ["weights", *["2.88"] * 4]
    said = out.replace("\n", " ")
    assert "Micro-batches of 8 rows of 32 generated at once" in said
    assert "Fits: " in said and "rtx-4090 leaves 22.8 of 24.0 GiB" in said


def test_a_column_adds_up(trl_ext, file):
    found = json.loads(trl_ext("plan", file, "--gpu", "rtx-4090", "--json")[1])
    assert found["fits"] is True and found["changes"] is None
    for phase, items in found["phases"].items():
        assert sum(items.values()) == found["peaks"][phase]
    assert found["peaks"][found["worst"]] == max(found["peaks"].values())


def test_without_a_card_it_names_those_that_fit(trl_ext, file):
    code, out, _ = trl_ext("plan", file, "model_name_or_path=Qwen/Qwen2.5-7B")
    assert code == 0
    fitting = out.partition("Fits: ")[2]
    assert "rtx-4090" in fitting and "rtx-3060" not in fitting


def test_what_is_pasted_fits(trl_ext, file):
    too_large = (file, "--vram", "8", "per_device_train_batch_size=32")
    code, out, _ = trl_ext("plan", *too_large)
    assert code == 1
    assert "Does not fit: " in out
    pasted = out.splitlines()[-1].split()
    assert pasted and all("=" in each for each in pasted)
    assert trl_ext("plan", *too_large, *pasted)[0] == 0


def test_nothing_is_enough(trl_ext, file):
    code, out, _ = trl_ext(
        "plan", file, "--vram", "1", "trainer=ppo", "num_generations=1", "accelerate_config=null"
    )
    assert code == 1 and "No change known here is enough" in out
    assert "zero3" not in out, "the critic would not be sharded"
    out = trl_ext("plan", file, "--vram", "1", "--num-gpus", "1")[1]
    assert "or more of them (accelerate_config=zero3 --num-gpus 2)" in out.replace("\n", " ")


def test_rows_of_logged_data_have_no_prompt_length(trl_ext, file):
    argv = ("plan", "rwr/offline", "--prompt-length", "60")
    code, _, err = trl_ext(*argv)
    assert code == 2 and "--prompt-length 60 does nothing for trainer: offline_rwr" in err
    assert trl_ext("plan", "rwr/offline")[0] == 0


def test_cards_and_prompts_are_options(trl_ext, file):
    code, out, _ = trl_ext("plan", file, "--num-gpus", "4", "--prompt-length", "700")
    assert code == 0
    assert "(700 prompt + 200 completion) tokens, 4 cards (ddp)" in out.replace("\n", " ")


def test_json_without_a_card(trl_ext, file):
    found = json.loads(trl_ext("plan", file, "--json")[1])
    assert "fits" not in found and found["unit"] == "bytes on each card"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--gpu", "rtx-4091"), "Nearest: rtx-4090"),
        (("--vram", "0"), "--vram"),
        (("--vram", "0.3"), "1 or more"),
        (("--vram", "x"), "--vram"),
        (("--num-gpus", "0"), "--num-gpus"),
        (("--num-gpus", "True"), "--num-gpus"),
        (("--prompt-length", "2.5"), "--prompt-length"),
        (("--gpu", "t4", "--vram", "8"), "not allowed with"),
        (("model_name_or_path=no/such-model",), "Known without the hub"),
        (("learning_rat=1",), "learning_rate"),
        (("load_in_4bit=true", "use_peft=false"), "use_peft=true"),
        (("lora_target_modules=[nowhere]",), "cannot be laid out"),
    ],
)
def test_bad_input(trl_ext, file, arguments, says):
    code, out, err = trl_ext("plan", file, *arguments)
    assert (code, out) == (2, "")
    assert says in err and "Traceback" not in err


@pytest.mark.parametrize("name", ["rwr/quickstart", "rwr/char_reverse", "dpo/smollm2"])
def test_shipped_recipes_are_planned_without_their_models(trl_ext, name, monkeypatch, tmp_path):
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "empty"))
    code, _, err = trl_ext("plan", name, "--gpu", "t4")
    assert (code, err) == (0, "")
    assert not (tmp_path / "empty").exists()
