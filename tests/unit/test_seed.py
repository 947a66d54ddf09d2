"""The NoCloud seed: what a guest finds on it."""

from __future__ import annotations

import dataclasses
import email
import io
import subprocess
import time
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pycdlib import PyCdlib

from lumed.errors import InvalidField
from lumed.guest.seed import (
    USER_DATA_LIMIT,
    Seed,
    SeedShare,
    check_user_data,
    make_seed,
    meta_data,
    plan_mounts,
    user_data,
)
from lumed.model.run import SharedDirectory, ShareTransport

KEY = "ssh-ed25519 AAAAC3Nza me@home"


def a_share(
    path: str,
    tag: str = "share-1",
    *,
    read_only: bool = False,
    transport: ShareTransport = ShareTransport.VIRTIOFS,
) -> SeedShare:
    return SeedShare(SharedDirectory(path, read_only, tag), transport)


A_SEED = Seed("uuid-1", "web", ssh_keys=(KEY,), shares=(a_share("/home/me/Projects"),))


def read_files(image: bytes) -> dict[str, dict[str, bytes]]:
    iso = PyCdlib()
    iso.open_fp(io.BytesIO(image))
    try:
        assert iso.pvd.volume_identifier.rstrip() == b"cidata"
        found: dict[str, dict[str, bytes]] = {}
        for kind in ("rr_path", "joliet_path"):
            found[kind] = {}
            for name in ("meta-data", "user-data"):
                out = io.BytesIO()
                iso.get_file_from_iso_fp(out, **{kind: f"/{name}"})
                found[kind][name] = out.getvalue()
        return found
    finally:
        iso.close()


def the_parts(text: str) -> list[tuple[str, str, str | None]]:
    """The parts of a message as (type, decoded text, Merge-Type)."""
    message = email.message_from_string(text)
    parts: list[tuple[str, str, str | None]] = []
    for part in message.walk():
        if not part.is_multipart():
            payload = part.get_payload(decode=True)
            assert isinstance(payload, bytes)
            parts.append((part.get_content_type(), payload.decode(), part.get("Merge-Type")))
    return parts


def test_the_image_has_both_files_under_both_kinds_of_long_names() -> None:
    files = read_files(make_seed(A_SEED))
    assert files["rr_path"] == files["joliet_path"]
    assert files["rr_path"]["meta-data"].decode() == meta_data(A_SEED)
    assert files["rr_path"]["user-data"].decode() == user_data(A_SEED)


def test_a_seed_is_made_quickly() -> None:
    make_seed(A_SEED)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        make_seed(A_SEED)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.015


def test_the_guest_gets_the_user_that_every_lume_client_logs_in_as() -> None:
    text = user_data(A_SEED)
    assert text.startswith("#cloud-config\n")
    config = yaml.safe_load(text)
    assert config["ssh_pwauth"] is True
    default, user = config["users"]
    assert default == "default"
    assert (user["name"], user["plain_text_passwd"]) == ("lume", "lume")
    assert user["lock_passwd"] is False
    assert user["ssh_authorized_keys"] == [KEY]
    assert user["sudo"] == "ALL=(ALL) NOPASSWD:ALL"


def test_a_password_that_looks_like_yaml_stays_what_it_is() -> None:
    password = "a: [b]\"'#\\ż"
    config = yaml.safe_load(user_data(dataclasses.replace(A_SEED, password=password)))
    assert config["users"][1]["plain_text_passwd"] == password


def test_the_guest_learns_who_it_is() -> None:
    assert meta_data(A_SEED).startswith('instance-id: "uuid-1"\nlocal-hostname: "web"\n')


def test_shares_are_mounted_at_every_boot_and_never_through_fstab() -> None:
    seed = dataclasses.replace(
        A_SEED,
        shares=(
            a_share("/home/me/Projects", "one"),
            a_share("/srv/Projects", "two", read_only=True, transport=ShareTransport.NINEP),
        ),
    )
    config = yaml.safe_load(user_data(seed))
    assert "mounts" not in config
    *_, first, second = config["bootcmd"]
    assert "mount -t virtiofs -o rw one /mnt/shared/Projects" in first
    assert "mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=262144 two" in second
    assert "/mnt/shared/Projects-2" in second


def test_smaller_guests_find_the_mounts_in_the_meta_data_one_a_line() -> None:
    text = meta_data(A_SEED)
    assert '- ["share-1", "/mnt/shared/Projects", "virtiofs", "rw,nofail", "0", "0"]\n' in text
    assert yaml.safe_load(text)["mounts"] == [
        ["share-1", "/mnt/shared/Projects", "virtiofs", "rw,nofail", "0", "0"]
    ]


def test_a_vm_without_shares_has_no_mounts() -> None:
    seed = dataclasses.replace(A_SEED, shares=())
    assert "mounts" not in yaml.safe_load(meta_data(seed))
    assert "mount" not in user_data(seed)


def test_only_a_clone_takes_a_new_machine_id_and_only_once_an_instance() -> None:
    plain = yaml.safe_load(user_data(A_SEED))["bootcmd"]
    clone = yaml.safe_load(user_data(dataclasses.replace(A_SEED, is_clone=True)))["bootcmd"]
    assert clone[1:] == plain
    assert clone[0].startswith("cloud-init-per instance lumed-machine-id sh -c '")
    assert not any("machine-id" in command for command in plain)


def run_in(root: Path, command: str) -> None:
    """Run a bootcmd as cloud-init does, in a shell, with another folder as the guest's root."""
    tools = root / "tools"
    tools.mkdir(exist_ok=True)
    # As its manual says: the rest of the line is the command; systemd's fills an empty file.
    scripts = {
        "cloud-init-per": 'shift 2; exec "$@"',
        "systemd-machine-id-setup": f"[ -s {root}/etc/machine-id ] || "
        f"cat {root}/var/lib/dbus/machine-id {root}/new 2>/dev/null >{root}/etc/machine-id",
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    for folder in ("/etc/", "/var/"):
        command = command.replace(folder, f"{root}{folder}")
    env = {"PATH": f"{tools}:/usr/bin:/bin"}
    subprocess.run(["/bin/sh", "-e", "-c", command], check=True, env=env, timeout=10)


@pytest.mark.parametrize("dbus", ["none", "file", "link"])
def test_the_old_machine_id_is_gone_from_wherever_it_would_be_taken(
    tmp_path: Path, dbus: str
) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/machine-id").write_text("old\n")
    (tmp_path / "new").write_text("new\n")
    if dbus != "none":
        (tmp_path / "var/lib/dbus").mkdir(parents=True)
        if dbus == "file":
            (tmp_path / "var/lib/dbus/machine-id").write_text("old\n")
        else:
            (tmp_path / "var/lib/dbus/machine-id").symlink_to(tmp_path / "etc/machine-id")
    text = user_data(dataclasses.replace(A_SEED, is_clone=True))
    run_in(tmp_path, yaml.safe_load(text)["bootcmd"][0])
    assert (tmp_path / "etc/machine-id").read_text() == "new\n"
    if dbus != "none":
        assert (tmp_path / "var/lib/dbus/machine-id").read_text() == "new\n"


def test_guests_of_systemd_name_themselves_to_dhcp_servers_by_their_card(tmp_path: Path) -> None:
    command = yaml.safe_load(user_data(dataclasses.replace(A_SEED, shares=())))["bootcmd"][0]
    run_in(tmp_path, command)
    assert not (tmp_path / "etc").exists()
    (tmp_path / "etc/systemd").mkdir(parents=True)
    run_in(tmp_path, command)
    (file,) = (tmp_path / "etc/systemd/networkd.conf.d").iterdir()
    parsed = ConfigParser()
    parsed.read(file)
    assert parsed["DHCPv4"]["DUIDType"] == parsed["DHCPv6"]["DUIDType"] == "link-layer"
    # What somebody has changed inside the guest stays.
    file.write_text("theirs")
    run_in(tmp_path, command)
    assert file.read_text() == "theirs"


@pytest.mark.parametrize("has_bash", [True, False])
def test_the_user_gets_bash_where_there_is_one(tmp_path: Path, has_bash: bool) -> None:
    config = yaml.safe_load(user_data(dataclasses.replace(A_SEED, shares=())))
    assert "shell" not in config["users"][1]
    command = config["bootcmd"][1].replace("/bin/bash", f"{tmp_path}/bin/bash")
    (tmp_path / "bin").mkdir()
    (tmp_path / "tools").mkdir()
    useradd = tmp_path / "tools/useradd"
    useradd.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/called\n')
    useradd.chmod(0o755)
    if has_bash:
        (tmp_path / "bin/bash").touch(mode=0o755)
    run_in(tmp_path, command)
    if has_bash:
        assert (tmp_path / "called").read_text() == f"-D -s {tmp_path}/bin/bash\n"
    else:
        assert not (tmp_path / "called").exists()


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/\0")), max_size=6))
def test_every_mount_point_is_its_own_and_needs_no_quoting(names: list[str]) -> None:
    mounts = plan_mounts([a_share(f"/srv/x/{name}") for name in names])
    paths = [mount.path for mount in mounts]
    assert len(set(paths)) == len(paths)
    for path in paths:
        folder, _, name = path.rpartition("/")
        assert folder == "/mnt/shared"
        assert name not in ("", ".", "..")
        assert name.isascii()
        assert name.replace("-", "").replace("_", "").replace(".", "x").isalnum() or set(
            name
        ) <= set("-_.")


def test_the_users_own_config_comes_first_and_ours_yields_to_it() -> None:
    theirs = "#cloud-config\nusers:\n- name: bob\npackages: [vim]\n"
    parts = the_parts(user_data(dataclasses.replace(A_SEED, user_data=theirs)))
    (type_one, text_one, _), (type_two, text_two, merge) = parts
    assert (type_one, text_one) == ("text/plain", theirs)
    assert type_two == "text/cloud-config"
    assert merge == "dict(no_replace,recurse_list)+list(append)+str()"
    # They named their users, so the image's default user is theirs to ask for.
    assert [user["name"] for user in yaml.safe_load(text_two)["users"]] == ["lume"]


def test_a_users_script_runs_beside_our_config() -> None:
    script = "\n#!/bin/sh\necho Zażółć\n"
    parts = the_parts(user_data(dataclasses.replace(A_SEED, user_data=script)))
    assert parts[0][:2] == ("text/plain", script.lstrip())
    assert yaml.safe_load(parts[1][1])["users"][0] == "default"


def test_a_users_multipart_message_is_nested() -> None:
    theirs = (
        'Content-Type: multipart/mixed; boundary="B"\nMIME-Version: 1.0\n\n--B\n'
        "Content-Type: text/x-shellscript\n\n#!/bin/sh\n--B--\n"
    )
    parts = the_parts(user_data(dataclasses.replace(A_SEED, user_data=theirs)))
    assert [part[0] for part in parts] == ["text/x-shellscript", "text/cloud-config"]


def test_plain_ascii_user_data_can_be_read_without_decoding() -> None:
    theirs = "#cloud-config\nruncmd:\n- echo hello\n"
    assert "\nruncmd:\n- echo hello\n" in user_data(dataclasses.replace(A_SEED, user_data=theirs))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("#cloud-config\na: [", "no YAML"),
        ("#cloud-config\n- a\n", "no mapping"),
        ("#cloud-config\n" + "[" * 100_000, "no YAML"),
        ("#cloud-config\n" + "- " * 100_000 + "x", "no YAML"),
        ("#cloud-config\na: 2001-99-99\n", "no YAML"),
        ("#cloud-config\nusers: bob\n", "users that is no list"),
        ("packages: [vim]\n", "does not know"),
        ("#!/bin/sh\n" + "x" * USER_DATA_LIMIT, "too large"),
        ("#!/bin/sh\n\ud800", "no valid text"),
    ],
)
def test_user_data_that_cannot_work_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidField, match=reason) as caught:
        check_user_data(text)
    assert list(caught.value.fields) == ["userData"]


def test_user_data_that_says_nothing_is_as_good_as_none() -> None:
    plain = user_data(A_SEED)
    assert user_data(dataclasses.replace(A_SEED, user_data=" \n")) == plain
    assert check_user_data("#cloud-config\n") == {}
