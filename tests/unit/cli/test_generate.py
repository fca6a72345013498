"""`generate`: what is refused before a model loads, what is printed, what is written."""

import io
import json
import os
import re
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len

from tests.tiny import save_byte_llama
from trl_ext.poe.counted import NaiveBayesExpert, NGramExpert
from trl_ext.poe.side_by_side import SideBySide

SHORT = ["--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders: base, style (other weights), bare (no chat template), docs and grams (counted)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("models")
    for name in ("base", "style", "bare"):
        save_byte_llama(folder / name)
    model = AutoModelForCausalLM.from_pretrained(folder / "style")
    torch.manual_seed(1)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.3)
    model.save_pretrained(folder / "style")
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    NaiveBayesExpert.fit(["abcabc"], tokenizer=tokenizer).save(folder / "docs")
    NGramExpert.fit(["abcabc"], tokenizer=tokenizer).save(folder / "grams")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "bare")
    (folder / "bare/chat_template.jinja").unlink()
    return folder


@pytest.fixture
def here(models, tmp_path, monkeypatch) -> Path:
    """An empty current folder beside the models; 100 columns, no standard input."""
    for model in models.iterdir():
        (tmp_path / model.name).symlink_to(model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    return tmp_path


@pytest.fixture
def unloaded(here, monkeypatch):
    """No model may be opened."""
    monkeypatch.setattr("trl_ext.poe.loading.load_product", lambda *_, **__: pytest.fail("loaded"))


def rows(name="out.jsonl"):
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def without_speed(out):
    return re.sub(r"tokens/s: .*", "", out)


def test_side_by_side(here, trl_ext):
    argv = ["base", "--expert", "style=style", "--expert", "docs=docs", *SHORT, "--prompt", "Hi"]
    code, out, err = trl_ext("generate", *argv, "--prompt", "Ho", "--output", "out.jsonl")
    assert code == 0, err
    assert out.startswith("weights: base 0.333333, style 0.333333, docs 0.333333\n")
    assert re.search(r"│ base +│ style +│ docs +│ product +│", out)
    assert re.search(r"product's answer: \d tokens; nats per token under base -\d", out)
    assert re.search(
        r"tokens/s: product [\d.]+; alone: base [\d.]+, style [\d.]+, docs [\d.]+", out
    )
    assert max(map(cell_len, out.split("\n"))) <= 100
    first, second = rows()
    assert (first["prompt"], second["prompt"]) == ("Hi", "Ho")
    assert first["experts"].keys() == {"base", "style", "docs"}
    assert first["weights"] == pytest.approx({"base": 1 / 3, "style": 1 / 3, "docs": 1 / 3})
    assert first["log_likelihood"].keys() == {"base", "style", "docs", "product"}
    assert first["log_z"] < 0


def test_the_same_command_prints_the_same_text(here, trl_ext):
    argv = ["base", "--expert", "style=style", *SHORT, "--prompt", "Hi", "--num-samples", "2"]
    first, second, other = (
        without_speed(trl_ext("generate", *argv, "--seed", seed)[1]) for seed in "001"
    )
    assert first == second != other
    assert "product's answer 2:" in first


def test_a_narrow_terminal_stacks(here, trl_ext, monkeypatch):
    monkeypatch.setenv("COLUMNS", "44")
    argv = ["base", "--expert", "style=style", *SHORT, "--prompt", "Hi"]
    _, out, _ = trl_ext("generate", *argv)
    assert "│ base " in out and "│ base │" not in out
    assert not re.search(r"base.*│.*style", out)
    assert max(map(cell_len, out.split("\n"))) <= 44


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        ([], "base 1"),
        (["--expert", "b=style"], "base 0.5, b 0.5"),
        (["--expert", "b=style", "--weight", "b=0.3"], "base 0.7, b 0.3"),
        (["--expert", "b=style", "--weight", "base=0.3"], "base 0.3, b 0.7"),
        (["--expert", "b=style", "--weight", "b=0.3", "--weight", "base=1"], "base 1, b 0.3"),
        (
            ["--expert", "b=style", "--expert", "c=docs", "--weight", "b=0.5"],
            "base 0.25, b 0.5, c 0.25",
        ),
    ],
)
def test_weights_left_out(here, trl_ext, argv, shown):
    _, out, _ = trl_ext("generate", "base", *argv, "--max-new-tokens", "1", "--prompt", "Hi")
    assert out.startswith(f"weights: {shown}\n")


def test_the_product_alone(here, trl_ext):
    argv = ["--expert", "a=base", "--expert", "b=style", *SHORT, "--prompt", "Hi"]
    code, out, _ = trl_ext("generate", *argv, "--no-own-answers", "--output", "out.jsonl")
    assert code == 0
    assert "│ product" in out and "│ a " not in out and "alone:" not in out
    assert rows()[0]["experts"] == {} and rows()[0]["weights"] == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize("how", [["--greedy"], ["--num-beams", "2", "--num-samples", "2"]])
def test_without_sampling_the_seed_does_nothing(here, trl_ext, how):
    argv = ["base", "--expert", "style=style", *SHORT, *how, "--prompt", "Hi"]
    first, other = (without_speed(trl_ext("generate", *argv, "--seed", s)[1]) for s in "01")
    assert first == other and "product" in first


def test_prompts_are_piped(here, trl_ext, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("One\n\nTwo\n"))
    code, _, _ = trl_ext("generate", "base", *SHORT, "--output", "out.jsonl")
    assert code == 0
    assert [row["prompt"] for row in rows()] == ["One", "Two"]


def test_prompts_are_typed_and_answered_at_once(here, trl_ext, monkeypatch, capsys):
    typed, printed = iter(["One", " ", "Two"]), []

    def type_in(question):
        printed.append(capsys.readouterr().out)
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", type_in)
    argv = ["base", "--expert", "style=style", "--chat", *SHORT, "--output", "out.jsonl"]
    code, out, err = trl_ext("generate", *argv)
    assert code == 0, err
    first, second = rows()
    assert (first["prompt"], second["prompt"]) == ("One", "Two")
    before, answer, skipped, _ = printed
    assert "Type a prompt" in before and skipped == ""
    texts = (first["product"], first["experts"]["base"], first["experts"]["style"])
    names = ("product", "base", "style")
    assert answer.startswith("".join(f"{n}\n{t}\n" for n, t in zip(names, texts, strict=True)))
    assert "tokens/s" in out


def test_messages_from_a_file(here, trl_ext):
    messages = [{"role": "user", "content": "Hi"}]
    Path("p.jsonl").write_text(json.dumps({"prompt": messages}))
    argv = [*SHORT, "--prompts", "p.jsonl", "--greedy"]
    assert trl_ext("generate", "base", *argv, "--output", "out.jsonl")[0] == 0
    assert rows()[0]["prompt"] == messages
    # The same as a text that the template makes a user's message.
    trl_ext("generate", "base", *SHORT, "--prompt", "Hi", "--greedy", "--output", "text.jsonl")
    assert rows()[0]["product"] == rows("text.jsonl")[0]["product"]
    code, _, err = trl_ext("generate", "bare", *argv)
    assert code == 2 and "the tokenizer has no chat template" in err


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_and_its_base(here, trl_ext, dtype):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained("base"),
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained("adapter")
    argv = ["base", "--expert", "style=adapter", *SHORT, "--prompt", "Hi", "--dtype", dtype]
    code, out, err = trl_ext("generate", *argv, "--output", "out.jsonl")
    assert code == 0, err
    (row,) = rows()
    log_likelihood = row["log_likelihood"]
    assert log_likelihood["base"] != log_likelihood["style"]
    mean = (log_likelihood["base"] + log_likelihood["style"]) / 2
    # bfloat16 has three digits, and batches of another width round differently.
    assert log_likelihood["product"] == pytest.approx(mean - row["log_z"], abs=0.05)
    assert f"(cpu, {dtype})" in out


def test_ctrl_c_leaves_what_is_done(here, trl_ext, monkeypatch):
    answer, calls = SideBySide.answer, []

    def interrupted(self, *batch):
        calls.append(batch)
        if len(calls) == 3:
            assert len(rows()) == 2  # on disk already, were the process killed
            raise KeyboardInterrupt
        return answer(self, *batch)

    monkeypatch.setattr(SideBySide, "answer", interrupted)
    prompts = [each for text in "abcd" for each in ("--prompt", text)]
    argv = ["base", *SHORT, *prompts, "--batch-size", "1", "--output", "out.jsonl"]
    assert trl_ext("generate", *argv)[0] == 130
    assert [row["prompt"] for row in rows()] == ["a", "b"]


def test_an_output_is_replaced_only_by_force(here, trl_ext):
    Path("out.jsonl").write_text("mine")
    argv = ["base", *SHORT, "--prompt", "Hi", "--output", "out.jsonl"]
    code, _, err = trl_ext("generate", *argv)
    assert (code, Path("out.jsonl").read_text()) == (2, "mine")
    assert err == (
        "Error: --output out.jsonl: the file exists and is left alone. Give another name, or "
        "--force.\n"
    )
    assert trl_ext("generate", *argv, "--force")[0] == 0
    assert len(rows()) == 1


def test_what_makes_text_fall_apart_is_said(here, trl_ext):
    argv = ["base", *SHORT, "--prompt", "Hi"]
    _, _, err = trl_ext("generate", *argv, "--expert", "n=grams", "--weight", "n=0.75")
    assert "n counts n-grams" in err and "the product is base at temperature 4." in err
    _, _, err = trl_ext("generate", *argv, "--expert", "s=style", "--weight", "s=-0.5")
    assert "the weight of s is negative" in err
    for more in (["--weight", "base=1", "--weight", "n=0.3"], ["--plausibility", "0.1"]):
        code, _, err = trl_ext("generate", *argv, "--expert", "n=grams", *more)
        assert (code, err) == (0, "")


SWEEP = ["base", "--expert", "docs=docs", "--sweep"]


def test_a_sweep(here, trl_ext):
    argv = [*SWEEP, "docs=0:1:0.5", "--prompt", "Hi", "--prompt", "Ho", "--num-samples", "2"]
    files = ["--plot", "s.png", "--output", "s.json"]
    code, out, err = trl_ext("generate", *argv, *SHORT, *files, "--metric", "words")
    assert code == 0, err
    legend, _, _, header, *table, _, picture = out.splitlines()
    assert legend.startswith("Samples of base^(1−α) · docs^α / Z.")
    columns = re.split(r"\s{2,}", header.strip())
    assert columns == [
        "α", "log p base", "log p docs", "log Z", "ppl base", "distinct-2", "tokens", "words",
    ]  # fmt: skip
    assert [line.split()[0] for line in table] == ["0", "0.5", "1"]
    assert picture == "s.png" and Path("s.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(Path("s.json").read_text())
    assert [point["alpha"] for point in found["points"]] == [0, 0.5, 1]
    assert found["reference"] == "base" and found["prompts"] == ["Hi", "Ho"]
    assert all(len(group) == 2 for point in found["points"] for group in point["texts"])


def test_a_sweep_of_one_prompt_has_no_standard_error(here, trl_ext):
    argv = [*SWEEP, "docs=0.5", "--prompt", "Hi", *SHORT, "--output", "s.json"]
    code, out, _ = trl_ext("generate", *argv)
    assert code == 0 and "± standard error" in out and out.count("±") == 1
    assert json.loads(Path("s.json").read_text())["points"][0]["log_z"]["standard_error"] is None


EXPERT = ["--expert", "style=style"]
PROMPT = ["--prompt", "Hi"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (PROMPT, "no model is given. Name one, for example trl_ext generate bundled:smollm2"),
        (["base", *EXPERT, "--weight", "stlye=1", *PROMPT], "no expert 'stlye'. Did you mean 'st"),
        (["base", *EXPERT, *EXPERT, *PROMPT], "there is an expert 'style' already: it is style"),
        (["base", "--expert", "base=x", *PROMPT], "an expert 'base' already: base is MODEL, base"),
        (["base", "--expert", "style", *PROMPT], "--expert style: it must be NAME=PATH, such as"),
        (["base", "--expert", "=x", *PROMPT], "--expert =x: it must be NAME=PATH"),
        (["base", "--expert", "a=", *PROMPT], "--expert a=: it must be NAME=PATH"),
        (["base", "--expert", "product=x", *PROMPT], "cannot be called 'product'"),
        (["base", "--expert", "a b=x", *PROMPT], "cannot be called 'a b'. Take letters"),
        (["base", *EXPERT, "--weight", "style", *PROMPT], "it must be NAME=NUMBER, such as"),
        (["base", *EXPERT, "--weight", "style=much", *PROMPT], "'much' is no number. Give one"),
        (["base", *EXPERT, "--weight", "style=nan", *PROMPT], "Weights must be finite"),
        (
            ["base", *EXPERT, "--weight", "style=1", "--weight", "style=2", *PROMPT],
            "'style' has the weight 1 already. Give it once",
        ),
        (
            ["base", *EXPERT, "--weight", "style=-1", "--weight", "base=1", *PROMPT],
            "The weights sum to nothing: base=1.0, style=-1.0",
        ),
        (["base"], "there is no prompt: standard input is empty. Give --prompt TEXT"),
        (["base", "--prompt", " "], "--prompt ' ' is empty. Give a text"),
        (["base", "--prompts", "no.txt"], "There is no prompt file 'no.txt'. Give a text file"),
        (["base", "--prompts", "empty.txt"], "The prompt file empty.txt is empty"),
        (["base", "--prompts", "keyless.jsonl"], "keyless.jsonl:1: there is no key 'prompt'"),
        (["base", "--prompts", "chat.jsonl", "--no-chat"], "has prompts that are chat messages"),
        (["base", *PROMPT, "--output", "exists"], "exists and is left alone. Give another name"),
        (["base", *PROMPT, "--output", "no/x.jsonl"], "Name a file in a folder that exists"),
        (["base", *PROMPT, "--greedy", "--top-p", "0.9"], "--greedy samples nothing"),
        (["base", *PROMPT, "--greedy", "--num-samples", "2"], "has at most 1 answers to a prompt"),
        (["base", *PROMPT, "--temperature", "0"], "a number from 0.001 to 1000, got '0'; for the"),
        (["base", *PROMPT, "--temperature", "1e-39"], "got '1e-39'; for the likeliest token: --gr"),
        (["base", "--prompt", "a\udcff"], "prompt 0 has half a character, '\\udcff', at 1: 'a"),
        (["base", *PROMPT, "--device", "foo"], "--device foo: it cannot be used: Expected one of"),
        (["base", *PROMPT, "--device", "meta"], "Here are: cpu"),
        (["base", "--prompts", "bin.parquet"], "bin.parquet cannot be read: ArrowInvalid: Parquet"),
        (["base", *PROMPT, "--plausibility", "2"], "greater than 0 and at most 1, got '2'"),
        (["base", *PROMPT, "--plot", "a.png"], "--plot a.png is of a sweep. Add --sweep"),
        ([*SWEEP, "docs", *PROMPT], "--sweep docs: it must be NAME=START:STOP:STEP"),
        ([*SWEEP, "docs=0:1", *PROMPT], "A sweep over '0:1' cannot be read; write start:stop"),
        ([*SWEEP, "dosc=0:1:1", *PROMPT], "no expert 'dosc'. Did you mean 'docs'?"),
        ([*SWEEP, "docs=0,1", *EXPERT, *PROMPT], "here are 3: base, docs, style. Give MODEL and"),
        (["base", "--sweep", "base=0,1", *PROMPT], "here is one: base. Give MODEL and one --exp"),
        ([*SWEEP, "docs=0,1", "--weight", "docs=1", *PROMPT], "a sweep sets the weights. Leave"),
        ([*SWEEP, "docs=0,1", "--own-answers", *PROMPT], "a sweep has no answers beside each oth"),
        ([*SWEEP, "docs=0,1", *PROMPT, "--plot", "a.pdf"], "the picture is a .png. Name a .png"),
        ([*SWEEP, "docs=0,1e17", *PROMPT], "The sweep cannot go to α = 1e+17. "),
        ([*SWEEP, "docs=0,1", *PROMPT, "--device", "meta"], "--device meta: it cannot be used"),
        (
            [*SWEEP, "docs=0,1", *PROMPT, "--output", "a.png", "--plot", "./a.png"],
            "--output a.png and --plot ./a.png are one file. Give --output another name, such as",
        ),
        ([*SWEEP, "docs=0,1", *PROMPT, "--metric", "builtins:abs"], "'builtins:abs' raised TypeE"),
    ],
)
def test_what_is_refused_before_a_model_loads(unloaded, trl_ext, argv, says):
    Path("empty.txt").write_text("\n")
    Path("keyless.jsonl").write_text('{"text": "a"}\n')
    Path("chat.jsonl").write_text('{"prompt": [{"role": "user", "content": "a"}]}\n')
    Path("exists").write_text("mine")
    Path("bin.parquet").write_bytes(b"\x00\xff")
    code, out, err = trl_ext("generate", *argv)
    assert (code, out) == (1 if "--metric" in argv else 2, "")
    assert says in err
    assert "dataset_name" not in err
    if "bin.parquet" not in argv:  # of which `datasets` writes a line of its own
        assert len(err.splitlines()) <= 2  # argparse repeats the usage


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_standard_input_is_utf8(unloaded, trl_ext, monkeypatch, errors):
    piped = io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", piped)
    code, _, err = trl_ext("generate", "base")
    assert code == 2
    assert ("not text in UTF-8: invalid start byte at byte 1" in err) == (errors == "strict")
    assert ("prompt 0 has half a character" in err) == (errors != "strict")


def test_what_is_typed_is_utf8(here, trl_ext, monkeypatch):
    def type_in(_):
        return b"\xff".decode()

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", type_in)
    code, _, err = trl_ext("generate", "base", *SHORT)
    assert code == 2 and "standard input is not text in UTF-8" in err


def test_prompts_may_come_through_a_pipe(here, trl_ext):
    end, begin = os.pipe()  # as <(echo Hi) gives it
    os.write(begin, b"Hi\n")
    os.close(begin)
    code, _, err = trl_ext("generate", "base", "--prompts", f"/dev/fd/{end}", *SHORT)
    os.close(end)
    assert (code, err) == (0, "")


def test_a_data_file_is_read_quietly(here, trl_ext):
    Path("p.csv").write_text("prompt\nHi\n")
    code, _, err = trl_ext("generate", "base", "--prompts", "p.csv", *SHORT)
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["bare", "--prompt", "Hi", "--chat"], "the tokenizer has no chat template"),
        (
            ["base", "--no-chat", "--prompt", "Hi", "--prompt", "Ho!", "--max-new-tokens", "2046"],
            "Prompt 1 is too long: 'Ho!' has 3 tokens, and max_new_tokens is 2046; together the "
            "experts read at most 2048. Shorten the prompt, or ask for at most 2045 new tokens.",
        ),
        (
            ["base", "--no-chat", "--prompt", "a" * 2048, *SHORT],
            "has 2048 tokens, and max_new_tokens is 4; together the experts read at most 2048. "
            "Shorten the prompt.\n",
        ),
    ],
)
def test_what_fails_before_the_first_row_leaves_the_output_alone(here, trl_ext, argv, says):
    Path("keep.jsonl").write_text("mine")
    code, _, err = trl_ext("generate", *argv, "--output", "keep.jsonl", "--force")
    assert (code, Path("keep.jsonl").read_text()) == (2, "mine")
    assert says in err


@pytest.mark.parametrize("argv", [["base"], ["base", "--expert", "d=docs", "--sweep", "d=0"]])
def test_a_full_disk_is_said(here, trl_ext, argv):
    argv = [*argv, *SHORT, "--prompt", "Hi", "--output", "/dev/full", "--force"]
    code, _, err = trl_ext("generate", *argv)
    assert code == 1
    assert err == (
        "Error: --output /dev/full: cannot be written: No space left on device. Free space there, "
        "or give another name.\n"
    )


def test_a_sweep_that_fails_late_shows_what_was_done(here, trl_ext, monkeypatch):
    from trl_ext.poe import sweep

    calls = []

    def late(texts):
        calls.append(texts)
        return [float("nan") if len(calls) > 2 else 1.0] * len(texts)  # the first call tries it

    monkeypatch.setattr(sweep, "words", late)
    argv = [*SWEEP, "docs=0:1:0.5", "--prompt", "Hi", "--prompt", "Ho", *SHORT]
    code, out, err = trl_ext("generate", *argv, "--metric", "words")
    assert code == 1
    assert "The metric 'words' returned nan for the text" in err
    _, _, _, header, *table = out.splitlines()
    assert header.split()[-1] == "words" and [line.split()[0] for line in table] == ["0"]


def test_a_sweep_is_not_typed(unloaded, trl_ext, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    code, _, err = trl_ext("generate", *SWEEP, "docs=0,1")
    assert code == 2 and "a sweep wants its prompts beforehand" in err


def test_what_is_wrong_is_said_without_torch(tmp_path, monkeypatch, python):
    monkeypatch.chdir(tmp_path)
    program = """
import sys
from trl_ext.cli import main
for argv in (["generate", "--prompt", "a"], ["generate", "m", "--prompts", "no.txt"],
             ["generate", "--help"], ["count", "--help"]):
    try:
        main(argv)
    except SystemExit:
        pass
print(sorted({"torch", "transformers", "datasets", "rich", "numpy"} & set(sys.modules)))
"""
    assert python(program).splitlines()[-1] == "[]"
