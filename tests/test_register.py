from __future__ import annotations

import os
import pickle
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, get_peft_config
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

from lotr import LotrConfig
from lotr.tuner.model import LotrModel
from lotr.tuner.register import add_peft_type, register


def test_the_type_is_a_member_of_the_enum_in_every_respect() -> None:
    member = PeftType("LOTR")
    assert member is PeftType["LOTR"] is PeftType.LOTR
    assert isinstance(member, PeftType) and (member.name, member.value) == ("LOTR", "LOTR")
    assert list(PeftType).count(member) == 1 and member in PeftType and "LOTR" in PeftType.__members__
    assert {member: 1}["LOTR"] == 1 and member == "LOTR" and member != PeftType.LORA
    assert pickle.loads(pickle.dumps(member)) is member


def test_peft_finds_configuration_model_and_prefix() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LOTR] is LotrConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LOTR] is LotrModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LOTR] == "lotr_"
    assert "r" in CONFIG_KEYS_TO_CHECK[PeftType.LOTR]


def test_registering_again_changes_nothing() -> None:
    members, methods = list(PeftType), dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    add_peft_type()
    register()
    assert list(PeftType) == members and methods == PEFT_TYPE_TO_CONFIG_MAPPING


def test_a_name_that_another_class_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        pass

    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.LOTR, Other)
    with pytest.raises(RuntimeError, match=r"already registered by .*Other"):
        register()


def test_a_configuration_can_be_made_from_a_dictionary() -> None:
    config = get_peft_config({"peft_type": "LOTR", "r": 4, "target_modules": ["query"]})
    assert isinstance(config, LotrConfig) and config.r == 4


def test_a_configuration_is_read_back_as_it_was_written(tmp_path: object) -> None:
    config = LotrConfig(r=(2, 4), target_modules=["a", "b"], rank_pattern={"a": (1, 2)}, scaling=0.5)
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def bounds() -> tuple[Version, Version]:
    """The supported range of PEFT, as the package itself declares it."""
    declared = next(r for line in requires("lotr") or () if (r := Requirement(line)).name == "peft")
    low, high = (next(s.version for s in declared.specifier if s.operator == op) for op in (">=", "<"))
    return Version(low), Version(high)


def test_the_installed_peft_is_one_that_is_supported() -> None:
    low, high = bounds()
    assert low <= Version(version("peft")) < high


def test_everything_here_holds_on_the_lowest_supported_peft() -> None:
    lowest = Path(sys.prefix) / "peft-lowest"
    if not lowest.is_dir():
        pytest.skip("`make setup` installs the lowest supported PEFT beside the newest")
    tests = Path(__file__).parent
    found = subprocess.run(
        [sys.executable, "-c", "import importlib.metadata as m; print(m.version('peft'))"],
        env={**os.environ, "PYTHONPATH": str(lowest)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Version(found.stdout.strip()).release[:2] == bounds()[0].release[:2]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "not lowest"]
        + [str(tests / name) for name in ("test_register.py", "test_tuner_adapters.py")],
        env={**os.environ, "PYTHONPATH": str(lowest)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
