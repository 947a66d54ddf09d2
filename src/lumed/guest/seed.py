"""The seed: a small ISO image from which a Linux guest learns its name, user and shares.

It is what cloud-init calls NoCloud (docs.cloud-init.io, "NoCloud"): a volume `cidata` with
`meta-data` and `user-data`. It is made anew for every run, since shares are chosen per run;
the instance id stays the VM's uuid, so cloud-init makes users and host keys only once.

Shares are mounted by `bootcmd`, which cloud-init runs at every boot from the seed of that boot.
Its `mounts` would not do: it runs once per instance, and leaves lines in /etc/fstab that are
wrong at the next run. The same list stands as `mounts` in `meta-data`, where cloud-init ignores
it, for guests that have a smaller reader than cloud-init, such as the built-in one.
"""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from email.message import Message
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText
from email.parser import Parser

from lumed.errors import InvalidField
from lumed.model.run import SharedDirectory, ShareTransport

VOLUME_ID = "cidata"
SHARES_FOLDER = "/mnt/shared"
USER_DATA_LIMIT = 1 << 20

# Bytes of a 9p message; the kernel's default of 128 KiB halves the speed of large reads.
_NINEP_OPTIONS = "trans=virtio,version=9p2000.L,msize=262144"
# A clone's guest takes a new machine id, once; systemd writes one where it finds the file empty.
# The old one must be gone from D-Bus too, or it would be taken from there.
_NEW_MACHINE_ID = (
    "command -v systemd-machine-id-setup >/dev/null || exit 0; : >/etc/machine-id; "
    "rm -f /var/lib/dbus/machine-id; systemd-machine-id-setup; "
    "[ ! -d /var/lib/dbus ] || ln -s /etc/machine-id /var/lib/dbus/machine-id"
)
_MACHINE_ID_COMMAND = f"cloud-init-per instance lumed-machine-id sh -c '{_NEW_MACHINE_ID}'"
# systemd-networkd would name itself to DHCP servers by the machine id, and has asked for an
# address before the command above runs: at its first boot a clone on a bridged network would get
# the address of its source. So every guest is told to use the card's address for that, which a
# clone finds in place. No network-config does it: cloud-init takes `dhcp-identifier` to netplan
# only, and wants the card's name for the others, which depends on the slot it is in.
_DHCP_FOLDER = "/etc/systemd/networkd.conf.d"
_DHCP_COMMAND = (
    f"[ ! -d /etc/systemd ] || [ -e {_DHCP_FOLDER}/50-lumed.conf ] || {{ mkdir -p {_DHCP_FOLDER} "
    "&& printf '[DHCPv4]\nDUIDType=link-layer\n[DHCPv6]\nDUIDType=link-layer\n' "
    f">{_DHCP_FOLDER}/50-lumed.conf; }}"
)
# cloud-init makes users after bootcmd, by useradd, which takes /bin/sh unless told; a shell
# that is named and missing, as bash is in Alpine, would let nobody in.
_SHELL_COMMAND = "[ ! -x /bin/bash ] || cloud-init-per instance lumed-shell useradd -D -s /bin/bash"
# Our part is merged over the user's: where both say something the user's value stays, and
# lists are joined, so that `users` and `bootcmd` of both take effect.
_MERGE_TYPE = "dict(no_replace,recurse_list)+list(append)+str()"
# What cloud-init recognises by its first line; anything else it drops with a warning.
_FIRST_LINES = (
    *("#!", "#cloud-config", "#include", "#cloud-boothook", "#part-handler"),
    *("## template: jinja", "Content-Type: multipart/", "MIME-Version:"),
)


@dataclass(frozen=True, slots=True)
class SeedShare:
    """A share with the transport that this run uses for it."""

    directory: SharedDirectory
    transport: ShareTransport


@dataclass(frozen=True, slots=True)
class Seed:
    """What the guest is told. instance_id is the VM's uuid; hostname is valid (RFC 1123).

    is_clone: the guest still has the machine id of the VM that it was cloned from.
    """

    instance_id: str
    hostname: str
    user: str = "lume"
    password: str = "lume"  # noqa: S105  (what every Lume client logs in with)
    ssh_keys: tuple[str, ...] = ()
    shares: tuple[SeedShare, ...] = ()
    user_data: str | None = None
    is_clone: bool = False


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of a guest's mount table."""

    source: str
    path: str
    type: ShareTransport
    options: str


def make_seed(seed: Seed) -> bytes:
    """The ISO image, a few hundred KiB (Rock Ridge and Joliet names). Blocks for about 10 ms.

    Raises InvalidField as check_user_data does.
    """
    # Imported here, since it costs 30 ms that a server need not pay before its first VM.
    from pycdlib import PyCdlib

    iso = PyCdlib()
    iso.new(vol_ident=VOLUME_ID, joliet=3, rock_ridge="1.09")
    files = {"meta-data": meta_data(seed), "user-data": user_data(seed)}
    try:
        for name, text in files.items():
            content = text.encode()
            iso.add_fp(
                io.BytesIO(content),
                len(content),
                iso_path=f"/{name.replace('-', '').upper()}.;1",
                rr_name=name,
                joliet_path=f"/{name}",
            )
        image = io.BytesIO()
        iso.write_fp(image)
    finally:
        iso.close()
    return image.getvalue()


def plan_mounts(shares: Sequence[SeedShare]) -> tuple[Mount, ...]:
    """Where each share appears in the guest: /mnt/shared/ and the host directory's last name.

    Letters that need quoting somewhere become "-"; a second share of a name gets "-2".
    """
    mounts: list[Mount] = []
    taken: set[str] = set()
    for share in shares:
        name = wanted = _plain_name(share.directory.host_path.rstrip("/").rpartition("/")[2])
        number = 2
        while name in taken:
            name = f"{wanted}-{number}"
            number += 1
        taken.add(name)
        options = ["ro" if share.directory.read_only else "rw"]
        if share.transport is ShareTransport.NINEP:
            options.append(_NINEP_OPTIONS)
        path = f"{SHARES_FOLDER}/{name}"
        mounts.append(Mount(share.directory.tag, path, share.transport, ",".join(options)))
    return tuple(mounts)


def _plain_name(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain)[:64].strip("-")
    return name if name.strip(".") else "share"


def meta_data(seed: Seed) -> str:
    """The `meta-data` file: identity, and the mounts for guests without cloud-init."""
    lines = [
        f"instance-id: {json.dumps(seed.instance_id)}",
        f"local-hostname: {json.dumps(seed.hostname)}",
    ]
    mounts = plan_mounts(seed.shares)
    if mounts:
        lines.append("mounts:")
        lines += [
            f"- {json.dumps([m.source, m.path, str(m.type), f'{m.options},nofail', '0', '0'])}"
            for m in mounts
        ]
    return "\n".join(lines) + "\n"


def user_data(seed: Seed) -> str:
    """The `user-data` file: our cloud-config, after the user's own data if there is any.

    Raises InvalidField as check_user_data does.
    """
    # cloud-init, too, looks at the first line that is not empty.
    theirs = (seed.user_data or "").lstrip()
    if not theirs:
        return "#cloud-config\n" + _our_config(seed, keep_default_user=True)
    has_users = "users" in check_user_data(theirs)
    ours = "#cloud-config\n" + _our_config(seed, keep_default_user=not has_users)
    message = MIMEMultipart()
    message.attach(_user_part(theirs))
    part = MIMEText(ours, "cloud-config", "us-ascii")
    part.add_header("Merge-Type", _MERGE_TYPE)
    message.attach(part)
    return message.as_string()


def _user_part(text: str) -> Message:
    if text.startswith(("Content-Type:", "MIME-Version:")):
        return Parser().parsestr(text)
    # As text/plain, cloud-init looks at the first line for the kind. Text that is not ASCII is
    # sent as base64, because cloud-init reads the message as a string and would garble it.
    return MIMEText(text, "plain", "us-ascii" if text.isascii() else "utf-8")


def _our_config(seed: Seed, *, keep_default_user: bool) -> str:
    lines = ["ssh_pwauth: true", "users:"]
    if keep_default_user:
        lines.append("- default")
    lines += [
        f"- name: {json.dumps(seed.user)}",
        f"  plain_text_passwd: {json.dumps(seed.password)}",
        "  lock_passwd: false",
        "  groups: sudo",
        '  sudo: "ALL=(ALL) NOPASSWD:ALL"',
    ]
    if seed.ssh_keys:
        lines.append("  ssh_authorized_keys:")
        lines += [f"  - {json.dumps(key.strip())}" for key in seed.ssh_keys]
    commands = [_MACHINE_ID_COMMAND] if seed.is_clone else []
    commands += [_DHCP_COMMAND, _SHELL_COMMAND, *map(_mount_command, plan_mounts(seed.shares))]
    lines.append("bootcmd:")
    lines += [f"- {json.dumps(command)}" for command in commands]
    return "\n".join(lines) + "\n"


def _mount_command(mount: Mount) -> str:
    # Plain names only, see plan_mounts and the tags of machine/shares.py: nothing to quote.
    return (
        f"mountpoint -q {mount.path} || {{ mkdir -p {mount.path} && "
        f"mount -t {mount.type} -o {mount.options} {mount.source} {mount.path}; }} || "
        f"echo 'lumed: could not mount {mount.source} at {mount.path}' >&2"
    )


def check_user_data(text: str) -> dict[str, object]:
    """Check a user's own cloud-init data; returns the keys of a #cloud-config, else {}.

    Raises InvalidField (userData) if it is 1 MiB or larger, of a kind that cloud-init would
    drop, or a #cloud-config that is no YAML mapping.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise _invalid("is no valid text: it has unpaired surrogates") from error
    if size >= USER_DATA_LIMIT:
        raise _invalid(f"is too large: {size} bytes, the limit is {USER_DATA_LIMIT}")
    text = text.lstrip()
    if not text.startswith(_FIRST_LINES):
        raise _invalid(
            f"starts with {text[:30]!r}, which cloud-init does not know",
            hint="start it with #cloud-config or, for a script, with #!/bin/sh",
        )
    if text.startswith("#cloud-config-") or not text.startswith("#cloud-config"):
        return {}
    import yaml

    try:
        # libyaml's loader where PyYAML has it: five times faster, and it limits nesting itself.
        config: object = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise _invalid(f"is a #cloud-config but no YAML: {reason}") from error
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise _invalid("is a #cloud-config but no mapping of keys to values")
    for key in ("users", "bootcmd"):
        if key in config and not isinstance(config[key], list):
            raise _invalid(f"has {key} that is no list", hint=f"write {key} as a list")
    return {str(key): value for key, value in config.items()}


def _invalid(reason: str, *, hint: str | None = None) -> InvalidField:
    return InvalidField(f"userData {reason}", hint=hint, fields={"userData": reason})
