"""Test the units for one server, and the commands that install them, without a systemd."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.deploy.manifests.manifest_files import DEPLOY, ROOT, SYSTEMD, unit_values

UNITS = sorted(SYSTEMD.glob("*.service"))
BOOT = "multi-user.target"


def commands() -> str:
    """Return the commands of the document that set up a server."""
    text = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    section = text.partition("## One server with systemd")[2].partition("\n## ")[0]
    return section.split("```")[1]


def enabled() -> set[str]:
    """Return the files of the units that the document enables."""
    found = set()
    for line in re.findall(r"^systemctl enable (.*?)(?: +#.*)?$", commands(), re.M):
        for name in line.replace("--now", "").split():
            unit = re.sub(r"@.*", "@", name)
            found.add(unit if unit.endswith(".target") else f"{unit}.service")
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_a_boot_starts_what_the_document_enables(unit: Path) -> None:
    started_by = unit.name
    while started_by != BOOT:
        assert started_by in enabled(), f"nothing starts {unit.name} after a boot"
        (started_by,) = unit_values(SYSTEMD / started_by, "WantedBy")


def test_every_file_that_the_document_installs_is_there() -> None:
    """Relative paths are in the folder of the units, where the document has changed to."""
    assert "cd /opt/wan/deploy/systemd\n" in commands()
    lines = re.findall(r"^(?:cp|install) (?!-d)(.*)$", commands(), re.M)
    named = {name for line in lines for name in line.split() if re.fullmatch(r"[\w@*./-]+", name)}
    relative = {name for name in named if not name.startswith(("/", "-")) and "." in name}
    assert {"wan.env.example", "*.service", "wan-worker@.service.d/ascend.conf"} <= relative
    for name in relative:
        assert list(SYSTEMD.glob(name)), name


def test_the_password_is_nobody_else_s_at_any_moment(tmp_path: Path) -> None:
    """The document's own lines, with a folder of this test for /etc/wan."""
    lines = commands()[commands().index("PASSWORD=$(") : commands().index("chown wan-valkey")]
    lines += next(line for line in commands().splitlines() if "sed -i" in line)
    example = (SYSTEMD / "wan.env.example").read_text(encoding="utf-8")
    (tmp_path / "wan.env").write_text(example, encoding="utf-8")
    script = lines.replace("/etc/wan", str(tmp_path))
    subprocess.run(["/bin/sh", "-euc", f"umask 022\n{script}"], check=True)
    made = tmp_path / "valkey-password.conf"
    assert made.stat().st_mode & 0o777 == 0o600
    word, password = made.read_text().split()
    assert word == "requirepass"
    assert (tmp_path / "wan.env").read_text() == example.replace("PASSWORD", password)
    assert not re.search(r'^sed .*\$PASSWORD|install .*"\$PASSWORD"', commands(), re.M)


def test_commands_run_as_the_units_do() -> None:
    """A shell that reads wan.env breaks on `&`, and root may do what the units' user may not."""
    assert "wan.env;" not in commands()
    properties = set(re.findall(r"-p (\w+)=(\S+)", commands()))
    for name in ("User", "Group", "EnvironmentFile"):
        (value,) = unit_values(SYSTEMD / "wan-service@.service", name)
        assert (name, value) in properties
    ascend = SYSTEMD / "wan-worker@.service.d" / "ascend.conf"
    (group,) = unit_values(ascend, "SupplementaryGroups")
    assert ("SupplementaryGroups", group) in properties
    assert re.findall(r"(?:as_wan.*|^ +/bin/sh.*) -m (\w+)", commands(), re.M) == [
        "service",
        "worker",
    ]


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_a_call_that_is_not_allowed_is_an_error_and_no_death(unit: Path) -> None:
    assert unit_values(unit, "SystemCallFilter")
    assert unit_values(unit, "SystemCallErrorNumber") == ["EPERM"]


def test_redis_runs_as_valkey_does() -> None:
    (of_valkey,) = unit_values(SYSTEMD / "wan-valkey.service", "ExecStart")
    replaced, of_redis = unit_values(SYSTEMD / "wan-valkey.service.d" / "redis.conf", "ExecStart")
    assert replaced == "", "systemd refuses two servers in one unit of this type"
    assert of_redis == of_valkey.replace("valkey-server", "redis-server")


def test_the_folder_of_the_certificates_is_closed(tmp_path: Path) -> None:
    """The key is readable for containers, whose users are others'."""
    folder = tmp_path / "certificates"
    folder.mkdir(mode=0o755)
    script = DEPLOY / "valkey" / "certificates.sh"
    subprocess.run(["/bin/sh", script, folder, "valkey"], check=True, capture_output=True)
    assert (folder / "valkey.key").stat().st_mode & 0o777 == 0o644
    assert folder.stat().st_mode & 0o777 == 0o700
