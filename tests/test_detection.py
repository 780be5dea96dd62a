"""Which cloud this is, the firmware tells; the network is never asked."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import is_vm_in_maint
from checking import Vm
from is_vm_in_maint import (
    AZURE_ASSET_TAG,
    CANNOT_TELL,
    NOT_IN_MAINTENANCE,
    PROVIDERS,
    CannotTell,
    detect,
    firmware_word,
    main,
)
from metadata_service import MetadataService

AZURE = {
    "sys_vendor": "Microsoft Corporation",
    "product_name": "Virtual Machine",
    "chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77",
}
HYPER_V = {**AZURE, "chassis_asset_tag": "6544-9876-1234-0000-0000-0000-00"}
LAPTOP = {"sys_vendor": "LENOVO", "product_name": "20XW", "chassis_asset_tag": "No Asset Information"}
GOOGLE = {"sys_vendor": "Google", "product_name": "Google Compute Engine", "chassis_asset_tag": ""}
NITRO = {"sys_vendor": "Amazon EC2", "product_name": "m5.large", "chassis_asset_tag": "Amazon EC2"}
XEN = {"sys_vendor": "Xen", "product_name": "HVM domU", "chassis_asset_tag": ""}

Firmware = Callable[..., None]


class Watched:
    """What this thread does on the network, by the interpreter's own word: an audit hook can never be taken off."""

    def __init__(self) -> None:
        self.seen: list[str] | None = None
        self.thread = threading.get_ident()
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.seen is not None and event.startswith("socket.") and threading.get_ident() == self.thread:
            self.seen.append(f"{event} {arguments[-1]}")


WATCHED = Watched()


@pytest.fixture(autouse=True)
def network() -> Iterator[list[str]]:
    """What this test does on the network."""
    WATCHED.seen = seen = []
    yield seen
    WATCHED.seen = None


@pytest.fixture
def firmware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Firmware:
    """firmware(sys_vendor="Xen", uuid="ec2..."): a Linux machine whose kernel shows these words."""
    monkeypatch.setattr(is_vm_in_maint, "DMI", f"{tmp_path}/dmi/")
    monkeypatch.setattr(is_vm_in_maint, "XEN_UUID", f"{tmp_path}/uuid")
    monkeypatch.setattr(sys, "platform", "linux")

    def says(uuid: str | None = None, **words: str | bytes) -> None:
        (tmp_path / "dmi").mkdir()
        for name, word in words.items():
            (tmp_path / "dmi" / name).write_bytes(word if isinstance(word, bytes) else f"{word}\n".encode())
        if uuid is not None:
            (tmp_path / "uuid").write_text(uuid)

    return says


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Firmware:
    """registry({key: {value name: value}}): a Windows machine whose HKLM holds these values."""
    monkeypatch.setattr(sys, "platform", "win32")

    class Key:
        def __init__(self, values: dict[str, Any]) -> None:
            self.values = values

        def __enter__(self) -> Key:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    def query(key: Key, name: str) -> tuple[Any, int]:
        if name not in key.values:
            raise FileNotFoundError(2, "The system cannot find the file specified")
        return key.values[name], 1

    def holds(tree: dict[str, dict[str, Any]]) -> None:
        def open_key(hive: str, key: str) -> Key:
            if hive != "HKLM" or key not in tree:
                raise FileNotFoundError(2, "The system cannot find the file specified")
            return Key(tree[key])

        winreg = types.ModuleType("winreg")
        vars(winreg).update(HKEY_LOCAL_MACHINE="HKLM", OpenKey=open_key, QueryValueEx=query)
        monkeypatch.setitem(sys.modules, "winreg", winreg)

    return holds


# ---- Linux ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "provider"),
    [
        pytest.param(AZURE, "azure", id="azure"),
        pytest.param(GOOGLE, "gce", id="gce"),
        pytest.param({"product_name": "Google"}, "gce", id="an older gce"),
        pytest.param(NITRO, "ec2", id="ec2 on Nitro"),
        pytest.param({**XEN, "uuid": "ec2e1916-9099-7caf-fd21-012345abcdef\n"}, "ec2", id="ec2 on Xen"),
        pytest.param({"uuid": "EC2E1916-9099-7CAF-FD21-012345ABCDEF"}, "ec2", id="ec2 on Xen, no DMI at all"),
    ],
)
def test_the_firmware_tells_which_cloud_this_is(words: dict[str, str], provider: str, firmware: Firmware) -> None:
    firmware(**words)
    assert detect() == provider
    assert provider in PROVIDERS


@pytest.mark.parametrize(
    "words",
    [
        pytest.param({}, id="no DMI, as in a container or on a Raspberry Pi"),
        pytest.param(LAPTOP, id="a laptop"),
        pytest.param(HYPER_V, id="a Hyper-V that is not Azure"),
        pytest.param({**XEN, "uuid": "0badf00d-9099-7caf-fd21-012345abcdef"}, id="a Xen that is not EC2"),
        pytest.param({**XEN, "product_name": "Not Google Compute Engine"}, id="a name with Google in its midst"),
        pytest.param({"sys_vendor": "Amazon EC2 compatible"}, id="one that is like EC2"),
        pytest.param({"chassis_asset_tag": AZURE_ASSET_TAG + "-8"}, id="one that is like Azure"),
        pytest.param(dict.fromkeys(LAPTOP, b"\xff\x00\x1b\n\xfe"), id="one that talks nonsense"),
    ],
)
def test_on_no_known_cloud_the_sentence_names_what_was_looked_at_and_the_option(
    words: dict[str, Any], firmware: Firmware
) -> None:
    firmware(**words)
    with pytest.raises(CannotTell) as failure:
        detect()
    sentence = str(failure.value)
    for name in ("sys_vendor", "product_name", "chassis_asset_tag", "xen_uuid"):
        assert f"{name}=" in sentence
    assert sentence.endswith("say it with --provider azure|azure-v1|gce|ec2")
    assert sentence.isprintable()


def test_what_the_firmware_says_is_in_the_sentence(firmware: Firmware) -> None:
    firmware(**LAPTOP)
    with pytest.raises(CannotTell, match="sys_vendor='LENOVO', product_name='20XW', chassis_asset_tag='No Asset"):
        detect()


def test_words_that_may_not_be_read_are_no_words(firmware: Firmware, tmp_path: Path) -> None:
    firmware(sys_vendor="Amazon EC2")
    (tmp_path / "dmi" / "product_name").mkdir()  # reading it is an OSError, for root too
    assert detect() == "ec2"


# ---- Windows -------------------------------------------------------------------------------------------

BIOS = r"HARDWARE\DESCRIPTION\System\BIOS"
SMBIOS = r"SYSTEM\CurrentControlSet\Services\mssmbios\Data"


def tables(*texts: str) -> bytes:
    """Raw SMBIOS tables with these texts among their strings."""
    return b"\x00\x02\x08\x03\x1b\x00" + b"\x00".join(text.encode() for text in texts) + b"\x00\x00"


@pytest.mark.parametrize(
    ("tree", "provider"),
    [
        pytest.param(
            {
                BIOS: {"SystemManufacturer": "Microsoft Corporation", "SystemProductName": "Virtual Machine"},
                SMBIOS: {"SMBiosData": tables("Microsoft Corporation", AZURE["chassis_asset_tag"], "Virtual Machine")},
            },
            "azure",
            id="azure",
        ),
        pytest.param(
            {BIOS: {"SystemManufacturer": "Google", "SystemProductName": "Google Compute Engine"}}, "gce", id="gce"
        ),
        pytest.param(
            {BIOS: {"SystemManufacturer": "Amazon EC2", "SystemProductName": "m5.large"}, SMBIOS: {}}, "ec2", id="ec2"
        ),
    ],
)
def test_the_windows_registry_tells_which_cloud_this_is(
    tree: dict[str, dict[str, Any]], provider: str, registry: Firmware
) -> None:
    registry(tree)
    assert detect() == provider


@pytest.mark.parametrize(
    "tree",
    [
        pytest.param({}, id="nothing"),
        pytest.param({BIOS: {}, SMBIOS: {}}, id="no values"),
        pytest.param(
            {
                BIOS: {"SystemManufacturer": "Microsoft Corporation", "SystemProductName": "Virtual Machine"},
                SMBIOS: {"SMBiosData": tables("Microsoft Corporation", HYPER_V["chassis_asset_tag"])},
            },
            id="a Hyper-V that is not Azure",
        ),
        pytest.param({BIOS: {"SystemManufacturer": 7, "SystemProductName": None}}, id="values of another type"),
        pytest.param({BIOS: {"SystemManufacturer": "Xen", "SystemProductName": "HVM domU"}}, id="a Xen"),
    ],
)
def test_on_a_windows_off_the_clouds_there_is_the_same_sentence(
    tree: dict[str, dict[str, Any]], registry: Firmware
) -> None:
    registry(tree)
    with pytest.raises(CannotTell, match=r"the firmware says sys_vendor=.*; say it with --provider "):
        detect()


def test_windows_has_no_word_for_a_xen_uuid(registry: Firmware) -> None:
    registry({})
    assert firmware_word("xen_uuid") == ""


# ---- the whole tool ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [[], ["--test"], ["--json"], ["--dry-run"], ["--rehearse"], ["--watch"]], ids=str)
def test_off_the_clouds_the_tool_says_so_without_a_look_at_the_network(
    mode: list[str],
    firmware: Firmware,
    tmp_path: Path,
    network: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    firmware(**LAPTOP)
    assert main([*mode, "--state", str(tmp_path / "state"), "--log", "none"]) == CANNOT_TELL
    printed, said = capsys.readouterr()
    assert printed == ""
    assert said.startswith("IsVmInMaint: cannot tell which cloud this is: the firmware says ")
    assert len(said.splitlines()) == 1
    assert network == [], "anyone on a laptop's network could answer 169.254.169.254"
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("words", [AZURE, GOOGLE, NITRO, XEN, {}], ids=str)
def test_no_detection_touches_the_network(words: dict[str, str], firmware: Firmware, network: list[str]) -> None:
    firmware(**words)
    with suppress(CannotTell):
        detect()
    assert network == []


def test_the_watch_for_the_network_is_awake(network: list[str], service: Callable[..., MetadataService]) -> None:
    service("gce")
    assert network


@pytest.mark.wire
@pytest.mark.skipif(sys.platform != "linux", reason="the whole tool cannot pretend to be on Linux")
@pytest.mark.parametrize(
    ("words", "provider"), [(AZURE, "azure"), (GOOGLE, "gce"), (NITRO, "ec2")], ids=["azure", "gce", "ec2"]
)
def test_the_provider_that_was_detected_is_the_one_that_is_asked(
    words: dict[str, str], provider: str, firmware: Firmware, service: Callable[..., MetadataService], tmp_path: Path
) -> None:
    vm = Vm(service(provider), tmp_path / "vm")
    firmware(**words)
    assert vm.document("--provider", "auto")["provider"] == provider
    assert vm.check("--provider", "auto", "--test").status == NOT_IN_MAINTENANCE
