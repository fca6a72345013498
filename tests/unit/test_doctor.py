"""Each finding of the doctor from its cause, faked, and a machine where nothing is wrong."""

import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants

from trl_ext import doctor
from trl_ext.doctor import devices, hub, machine, packages, probe
from trl_ext.doctor.probe import Probed

H100 = {"name": "NVIDIA H100", "capability": [9, 0], "problem": None}
V100 = {"name": "Tesla V100", "capability": [7, 0], "problem": None}
RTX_4090 = {"name": "NVIDIA GeForce RTX 4090", "capability": [8, 9], "problem": None}
NO_CARDS = {"cards": [], "driver": None, "error": None}
TRAINS = {"gpu_library": True, "device": "cuda", "trains": None, "trains_after_evaluation": None}


def torch_facts(*gpus: dict, **facts: Any) -> dict[str, Any]:
    return {
        "version": "2.13.0",
        "built_for": "13.0",
        "device": ", ".join(gpu["name"] for gpu in gpus) or "CPU",
        "accelerator": bool(gpus),
        "gpus": list(gpus),
        "peers": True,
        "nccl": True,
        "threads": 2,
    } | facts


def with_torch(*gpus: dict, **facts: Any) -> Probed:
    return Probed({"torch": torch_facts(*gpus, **facts)})


def cards(*gpus: dict, driver: str = "580.65.06") -> dict[str, Any]:
    return {"cards": [gpu["name"] for gpu in gpus], "driver": driver, "error": None}


@pytest.fixture(autouse=True)
def plain(monkeypatch, tmp_path):
    """No variable of this machine speaks, and its caches and files are not read."""
    for name in (
        "CUDA_VISIBLE_DEVICES",
        "NCCL_P2P_DISABLE",
        "LOCAL_RANK",
        "OMP_NUM_THREADS",
        "OMP_WAIT_POLICY",
        "TRANSFORMERS_CACHE",
        "HF_DATASETS_CACHE",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRL_EXT_CACHE", str(tmp_path / "ours"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf/hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(machine, "_CPU_QUOTA", tmp_path / "none")
    monkeypatch.setattr(devices, "_CPU_FLAGS", tmp_path / "none")
    monkeypatch.setattr(devices, "_SHARED_MEMORY", tmp_path / "none")
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    free(monkeypatch, 50)


def free(monkeypatch, gigabytes: float):
    space = SimpleNamespace(free=gigabytes * 2**30, total=gigabytes * 2**30)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: space)


def levels(findings) -> list[tuple[str, str]]:
    return [(finding.name, finding.level) for finding in findings]


def only(findings):
    (finding,) = findings
    return finding


def test_a_healthy_machine(monkeypatch, tmp_path):
    """Two GPUs that reach each other: nothing but "ok", and the note that there are two."""
    monkeypatch.setattr(doctor, "nvidia_cards", lambda: cards(H100, H100))
    installed(monkeypatch)
    facts = {
        "torch": torch_facts(H100, H100),
        "bitsandbytes": TRAINS,
        "flash_attn": {"version": "2.8.3"},
    }
    found = doctor.diagnose(Probed(facts), output=tmp_path / "outputs")
    assert {finding.level for finding in found if finding.name != "processes"} == {"ok"}
    assert {finding.name for finding in found} == {
        *("versions", "gpu", "bf16", "nccl", "processes", "bitsandbytes", "flash-attn", "threads"),
        *("output", "model cache", "dataset cache", "trl_ext cache", "temporary"),
    }


def test_what_is_not_ok_says_what_to_do(monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_cards", lambda: cards(V100, V100))
    free(monkeypatch, 0.5)
    found = doctor.diagnose(Probed({"torch": torch_facts(built_for=None)}))
    bad = [finding for finding in found if finding.level in ("warning", "error")]
    assert bad and all(finding.do for finding in bad)


def test_a_check_that_fails_is_a_finding(monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_cards", lambda: NO_CARDS)
    monkeypatch.setattr(doctor, "check_caches", lambda: 1 / 0)
    found = doctor.diagnose(with_torch())
    assert ("caches", "warning") in levels(found) and ("output", "ok") in levels(found)
    (failed,) = [finding for finding in found if finding.name == "caches"]
    assert "ZeroDivisionError: division by zero" in failed.says


# Versions.


def installed(monkeypatch, ours=("trl>=1.16,<1.17",), trls=(), python=">=3.11", **versions):
    """A world of distributions: what trl-ext and trl require, and what is installed."""
    requires = {"trl-ext": list(ours), "trl": list(trls)}
    versions = {"trl": "1.16.0", **versions}
    extras = SimpleNamespace(get_all=lambda name: ["vllm", "quant", "test"])

    def describe(name):
        if name not in requires:
            raise metadata.PackageNotFoundError(name)
        return SimpleNamespace(**vars(extras)) if name == "trl" else Described(python)

    class Described(dict):
        def __init__(self, needed):
            super().__init__({"Requires-Python": needed})

        def get_all(self, name):
            return extras.get_all(name)

    def version(name):
        if versions.get(name) is None:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    fake = SimpleNamespace(
        requires=requires.__getitem__,
        metadata=describe,
        version=version,
        PackageNotFoundError=metadata.PackageNotFoundError,
    )
    monkeypatch.setattr(packages, "metadata", fake)


@pytest.mark.parametrize(
    ("world", "name", "level", "says", "do"),
    [
        ({"trl": "1.17.0"}, "trl", "error", "trl 1.17.0 is installed", '"trl<1.17,>=1.16"'),
        ({"trl": None}, "trl", "error", "trl is not installed", "pip install"),
        ({"python": ">=3.99"}, "python", "error", "trl_ext needs >=3.99", "another Python"),
        (
            {"ours": ['bitsandbytes>=0.50; extra == "quant"'], "bitsandbytes": "0.49.0"},
            *("bitsandbytes", "warning", "bitsandbytes 0.49.0 is installed; supported is >=0.50"),
            'pip install "bitsandbytes>=0.50"',
        ),
        (
            {"trls": ['vllm<=0.31.0,>=0.22.0; extra == "vllm"'], "vllm": "0.9.0"},
            *("vllm", "warning", "vllm 0.9.0 is installed; supported is <=0.31.0,>=0.22.0"),
            "pip install",
        ),
    ],
)
def test_a_version_out_of_range(monkeypatch, world, name, level, says, do):
    installed(monkeypatch, **world)
    finding = only(packages.check_versions())
    assert (finding.name, finding.level) == (name, level)
    assert says in finding.says and do in finding.do


@pytest.mark.parametrize(
    "world",
    [
        {"trl": "1.16.3+local"},
        {"ours": ['bitsandbytes>=0.50; extra == "quant"']},  # not installed, and not asked for
        {"ours": ['pytest>=8.4; extra == "test"'], "pytest": "7.0"},  # no run imports it
        {"ours": ['uvloop>=9; sys_platform == "win32"'], "uvloop": "1.0"},
    ],
)
def test_versions_in_order(monkeypatch, world):
    installed(monkeypatch, **world)
    assert levels(packages.check_versions()) == [("versions", "ok")]


def test_a_package_that_is_not_installed_itself(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "metadata", missing)
    finding = only(packages.check_versions())
    assert finding.level == "warning" and "not installed" in finding.says


def test_the_real_versions_are_in_range():
    assert levels(packages.check_versions()) == [("versions", "ok")]


# Devices.


@pytest.mark.parametrize(
    ("probed", "seen", "name", "level", "says"),
    [
        (Probed(errors={"torch": "OSError: x"}), NO_CARDS, "torch", "error", "OSError: x"),
        (Probed(), NO_CARDS, "torch", "error", "it is not installed"),
        (with_torch(), NO_CARDS, "gpu", "note", "there is none"),
        (with_torch(H100), cards(H100), "gpu", "ok", "torch for 13.0, driver 580.65.06"),
        (with_torch(accelerator=True, device="mps"), NO_CARDS, "gpu", "ok", "mps"),
        (with_torch(built_for=None), cards(H100), "gpu", "warning", "without CUDA"),
        (with_torch(), cards(H100, driver="470.1"), "gpu", "error", "(driver 470.1)"),
        (
            with_torch(),
            NO_CARDS | {"error": "couldn't communicate with the driver"},
            *("gpu", "error", "couldn't communicate"),
        ),
        (
            with_torch(H100 | {"problem": "no kernel image"}),
            cards(H100),
            *("gpu", "error", "cannot compute on NVIDIA H100 (no kernel image)"),
        ),
    ],
)
def test_devices(probed, seen, name, level, says):
    finding = only(devices.check_devices(probed, seen))
    assert (finding.name, finding.level) == (name, level)
    assert says in finding.says


@pytest.mark.parametrize("hides", ["", "-1"])
def test_hidden_gpus_are_no_error(monkeypatch, hides):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hides)
    finding = only(devices.check_devices(with_torch(), cards(H100)))
    assert finding.level == "note" and "CUDA_VISIBLE_DEVICES" in finding.do


@pytest.mark.parametrize(
    ("probed", "flags", "found"),
    [
        (with_torch(H100), None, [("bf16", "ok")]),
        (with_torch(H100, V100), None, [("bf16", "warning")]),
        (with_torch(), "flags : fma avx2 avx512_bf16", [("bf16", "ok")]),
        (with_torch(), "flags : fma avx2", [("bf16", "note")]),
        (with_torch(), None, []),
        (with_torch(accelerator=True), "flags : fma avx2", []),  # no NVIDIA card: not known
        (Probed(), "flags : avx2", []),
    ],
)
def test_bf16(monkeypatch, tmp_path, probed, flags, found):
    if flags:
        (tmp_path / "cpuinfo").write_text(flags)
        monkeypatch.setattr(devices, "_CPU_FLAGS", tmp_path / "cpuinfo")
    assert levels(devices.check_bf16(probed)) == found


@pytest.mark.parametrize(
    ("probed", "driver", "level", "words"),
    [
        (with_torch(RTX_4090, RTX_4090), "535.154.05", "warning", "NCCL_P2P_DISABLE=1"),
        (with_torch(RTX_4090, RTX_4090), "550.40.07", "ok", ""),
        (with_torch(H100, H100), "535.154.05", "ok", ""),
        (with_torch(RTX_4090, RTX_4090, peers=False), "580.1", "note", "NCCL_P2P_DISABLE=1"),
        (with_torch(H100, H100, nccl=False), "580.1", "warning", "torch with NCCL"),
    ],
)
def test_nccl(probed, driver, level, words):
    finding = only(devices.check_nccl(probed, cards(driver=driver)))
    assert finding.level == level and words in finding.do


def test_nccl_that_is_told_to_do_without(monkeypatch):
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    probed = with_torch(RTX_4090, RTX_4090, peers=False)
    assert levels(devices.check_nccl(probed, cards(driver="535.1"))) == [("nccl", "ok")]


def test_little_shared_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "_SHARED_MEMORY", tmp_path)
    free(monkeypatch, 64 / 1024)  # what a container has by default
    finding = only(devices.check_nccl(with_torch(H100, H100), cards()))
    assert finding.level == "warning" and "64 MB" in finding.says and "--shm-size" in finding.do


def test_one_gpu_needs_no_nccl():
    assert devices.check_nccl(with_torch(H100, nccl=False), cards()) == []


def test_several_gpus_without_a_launcher(monkeypatch):
    finding = only(devices.check_one_process(with_torch(H100, H100)))
    assert finding.level == "note" and "num_processes=2" in finding.do
    assert devices.check_one_process(with_torch(H100)) == []
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert devices.check_one_process(with_torch(H100, H100)) == []


# bitsandbytes and flash attention.


@pytest.mark.parametrize(
    ("facts", "errors", "found", "says"),
    [
        (None, {}, [("bitsandbytes", "note")], "not installed"),
        (None, {"bitsandbytes": "OSError: libcudart"}, [("bitsandbytes", "error")], "libcudart"),
        (TRAINS, {}, [("bitsandbytes", "ok")], "on the GPU"),
        (TRAINS | {"gpu_library": False}, {}, [("bitsandbytes", "warning")], "not found"),
        (TRAINS | {"trains": "E: x"}, {}, [("bitsandbytes", "warning")], "does not train"),
        (
            TRAINS | {"device": "cpu", "gpu_library": False},
            *({}, [("bitsandbytes", "ok")], "on the CPU"),
        ),
        (
            TRAINS | {"device": "cpu", "trains_after_evaluation": "there is no gradient"},
            *({}, [("bitsandbytes", "ok"), ("bitsandbytes", "note")], "AVX512-BF16"),
        ),
    ],
)
def test_quantization(facts, errors, found, says):
    all_facts = {"torch": torch_facts(), **({"bitsandbytes": facts} if facts else {})}
    findings = packages.check_quantization(Probed(all_facts, errors))
    assert levels(findings) == found
    assert says in findings[-1].says


@pytest.mark.parametrize(
    ("probed", "level", "says"),
    [
        (with_torch(H100), "note", "not installed"),
        (Probed({"torch": torch_facts(H100), "flash_attn": {"version": "2.8"}}), "ok", "2.8"),
        (
            Probed({"torch": torch_facts(V100), "flash_attn": {"version": "2.8"}}),
            *("warning", "does not run on Tesla V100"),
        ),
        (
            Probed({"torch": torch_facts(), "flash_attn": {"version": "2.8"}}),
            *("warning", "CUDA cards alone"),
        ),
        (
            Probed({"torch": torch_facts(H100)}, {"flash_attn": "ImportError: undefined symbol"}),
            *("warning", "undefined symbol"),
        ),
    ],
)
def test_flash_attention(probed, level, says):
    finding = only(packages.check_flash_attention(probed))
    assert finding.level == level and says in finding.says


# Threads, disks, caches, the hub.


@pytest.mark.parametrize(
    ("threads", "variables", "found"),
    [
        (2, {}, ["ok"]),
        (4, {}, ["ok", "note"]),  # two runs of four threads on four cores
        (4, {"OMP_WAIT_POLICY": "passive"}, ["ok"]),
        (8, {}, ["warning"]),
        (4, {"OMP_NUM_THREADS": "four"}, ["warning"]),
        (4, {"OMP_NUM_THREADS": "0"}, ["warning"]),
        (2, {"OMP_NUM_THREADS": "2,1"}, ["ok"]),
    ],
)
def test_threads(monkeypatch, threads, variables, found):
    """Of four cores."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    findings = machine.check_threads(with_torch(threads=threads))
    assert [finding.level for finding in findings] == found


@pytest.mark.parametrize(("quota", "cores"), [("150000 100000", 2), ("max 100000", 4)])
def test_a_containers_quota_counts(monkeypatch, tmp_path, quota, cores):
    (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(machine, "_CPU_QUOTA", tmp_path / "cpu.max")
    assert machine.usable_cores() == cores
    finding = machine.check_threads(with_torch(threads=4))[0]
    assert finding.level == ("warning" if cores == 2 else "ok")


@pytest.mark.parametrize(
    ("gigabytes", "level"), [(50, "ok"), (10, "ok"), (9, "warning"), (1, "warning"), (0.9, "error")]
)
def test_disk(monkeypatch, tmp_path, gigabytes, level):
    free(monkeypatch, gigabytes)
    findings = machine.check_disk(str(tmp_path / "not/yet/there"))
    assert {finding.level for finding in findings} == {level}
    assert f"{gigabytes:.1f} GB free" in findings[0].says


def test_places_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    findings = machine.check_disk(str(tmp_path / "file/outputs"))
    assert findings[0].level == "error" and "is a file" in findings[0].says
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    findings = machine.check_disk(str(tmp_path / "outputs"))
    assert findings[0].level == "error" and "may not be written" in findings[0].says


def test_cache_folders_follow_the_variables(monkeypatch, tmp_path):
    assert machine.cache_folders() == {
        "model cache": tmp_path / "hf/hub",
        "dataset cache": tmp_path / "hf/datasets",
        "trl_ext cache": tmp_path / "ours",
    }
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "data"))
    assert machine.cache_folders()["dataset cache"] == tmp_path / "data"


def test_caches(monkeypatch, tmp_path):
    assert machine.check_caches() == []
    monkeypatch.setenv("TRANSFORMERS_CACHE", "x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "hf/accelerate").mkdir(parents=True)
    (tmp_path / "hf/accelerate/default_config.yaml").write_text("")
    found = machine.check_caches()
    assert levels(found) == [("caches", "warning"), ("caches", "note"), ("caches", "note")]
    for finding, word in zip(
        found, ("TRANSFORMERS_CACHE", "OFFLINE", "default_config"), strict=True
    ):
        assert word in finding.says and finding.do


PRIVATE = "https://user:password@private.mirror"


class Session:
    """The hub's client, with an answer: a status, or an error that names the address."""

    def __init__(self, answer: int | None):
        self.answer = answer
        self.asked: list[str] = []

    def head(self, url: str, timeout: float):
        self.asked.append(url)
        if self.answer is None:
            raise RuntimeError("user:password@private.mirror: no certificate for private.mirror")
        return SimpleNamespace(status_code=self.answer)


@pytest.mark.parametrize(
    ("answer", "token", "level", "says"),
    [
        (200, "hf_secret", "ok", "it answers, and there is a token"),
        (403, "hf_secret", "ok", "it answers"),
        (200, None, "ok", "there is no token"),
        (503, "hf_secret", "warning", "status 503"),
        (None, "hf_secret", "warning", "RuntimeError: the hub: no certificate for the hub"),
    ],
)
def test_hub(monkeypatch, answer, token, level, says):
    session = Session(answer)
    monkeypatch.setattr(constants, "ENDPOINT", PRIVATE)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: session)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    finding = only(hub.check_hub())
    assert finding.level == level and says in finding.says
    assert session.asked == [PRIVATE]
    assert not any(word in repr(finding) for word in ("private.mirror", "password", "hf_secret"))


def test_hub_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: pytest.fail("asked"))
    assert only(hub.check_hub()).level == "note"


def test_the_hub_is_asked_only_when_wanted(monkeypatch):
    monkeypatch.setattr(doctor, "nvidia_cards", lambda: NO_CARDS)
    monkeypatch.setattr(doctor, "check_hub", lambda: [doctor.Finding("hub", "ok", "asked")])
    assert ("hub", "ok") not in levels(doctor.diagnose(with_torch()))
    assert ("hub", "ok") in levels(doctor.diagnose(with_torch(), hub=True))


# The process that asks the libraries, with libraries of a few lines.


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    """libraries(torch="raise ImportError('x')") -> what is probed where that is all of torch."""

    def probed(**modules: str) -> Probed:
        for name, code in modules.items():
            (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setattr(probe, "find_spec", lambda name: name if name in modules else None)
        # Ahead of the site-packages, which have the real ones.
        return probe.probe.__wrapped__()

    return probed


def test_an_import_that_fails(libraries):
    found = libraries(torch="raise OSError('libcudart.so.12: cannot open\\nmore')")
    assert found == Probed(errors={"torch": "OSError: libcudart.so.12: cannot open"})
    assert found.torch == {}


def test_an_import_that_crashes(libraries):
    found = libraries(bitsandbytes="import os; os.abort()", flash_attn="__version__ = '2.8'")
    assert found.errors == {"bitsandbytes": "Python died of signal 6"}
    assert found.facts == {"flash_attn": {"version": "2.8"}}  # the next is still asked


def test_without_torch_the_others_are_not_asked(libraries):
    found = libraries(torch="import os; os.abort()", bitsandbytes="", flash_attn="")
    assert found == Probed(errors={"torch": "Python died of signal 6"})
    assert packages.check_quantization(found) == packages.check_flash_attention(found) == []


def test_an_import_that_ends_python(libraries):
    assert libraries(torch="raise SystemExit('no licence')").errors["torch"] == (
        "it ended Python: no licence"
    )


def test_an_import_that_hangs(libraries, monkeypatch):
    monkeypatch.setattr(probe, "_SECONDS", 1)
    found = libraries(torch="import time; time.sleep(60)")
    assert found.errors["torch"] == "the import took longer than 1 seconds"


def test_noise_is_no_fact(libraries):
    found = libraries(flash_attn="print('{}'); print('hello'); __version__ = '2.8'")
    assert found == Probed({"flash_attn": {"version": "2.8"}})


@pytest.mark.parametrize(
    ("printed", "code", "expected"),
    [
        (
            "NVIDIA H100, 580.65.06\nNVIDIA A100, 40GB, 580.65.06\n",
            0,
            {"cards": ["NVIDIA H100", "NVIDIA A100, 40GB"], "driver": "580.65.06", "error": None},
        ),
        ("Failed to initialize NVML\nmore\n", 9, NO_CARDS | {"error": "Failed to initialize NVML"}),
        ("", 1, NO_CARDS | {"error": "no reason is given"}),
    ],
)
def test_nvidia_cards(monkeypatch, printed, code, expected):
    done = subprocess.CompletedProcess([], code, stdout=printed, stderr="")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert probe.nvidia_cards() == expected


def test_no_nvidia_driver(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert probe.nvidia_cards() == NO_CARDS


def test_a_driver_that_hangs(monkeypatch):
    def run(*_, **__):
        raise subprocess.TimeoutExpired("nvidia-smi", 30)

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", run)
    assert probe.nvidia_cards()["error"] == "it took longer than 30 seconds"


# What the facts say of the libraries that are really here.


def test_facts_of_torch():
    import torch

    facts = probe._torch_facts()
    assert facts["version"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert (facts["gpus"], facts["device"], facts["peers"]) == ([], "CPU", True)
    assert set(facts) == set(torch_facts())


@pytest.mark.filterwarnings("ignore:bitsandbytes::gemv_4bit")  # the fault that is looked for
def test_facts_of_bitsandbytes():
    """On CPUs with AVX512-BF16 an evaluation pass costs the gradient, and on no other CPU."""
    from bitsandbytes.functional import has_avx512bf16

    facts = probe._bitsandbytes_facts()
    assert set(facts) == set(TRAINS)
    assert facts["trains"] is None
    assert (facts["trains_after_evaluation"] is None) != has_avx512bf16()


def test_a_gradient_that_is_wrong(monkeypatch):
    import bitsandbytes as bnb

    forward = bnb.nn.Linear4bit.forward
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: 2 * forward(self, x))
    assert "the gradient is off by" in str(probe.nf4_problem("cpu"))

    def fail(self, x):
        raise NotImplementedError("no kernel\nmore")

    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", fail)
    assert probe.nf4_problem("cpu") == "NotImplementedError: no kernel"


def test_a_gpu_that_cannot_compute(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    facts = probe._gpu_facts(0)  # there is none here
    assert facts["problem"] and facts["capability"] == [9, 0]
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    assert probe._gpu_facts(0)["problem"] is None
    monkeypatch.setattr(torch, "ones", lambda *shape, device: 2 * ones(*shape))
    assert probe._gpu_facts(0)["problem"] == "8×8 ones multiplied are not 8"


def test_the_process_finds_this_trl_ext():
    """Whatever is installed: without site-packages (-S) only its own path is left."""
    program = "import trl_ext; print(trl_ext.__file__)"
    printed, _ = probe._run([sys.executable, "-P", "-S", "-c", program])
    assert Path(printed.strip()).parents[1] == Path(probe.__file__).parents[2]
