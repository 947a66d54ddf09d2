"""The guest's reader of cloud-init seeds, run by this host's awk; the guest runs BusyBox's."""

import subprocess
from pathlib import Path

import lumed.images.tiny

AWK = Path(lumed.images.tiny.__file__).parent / "tiny_guest/lib/lumed/seed.awk"


def read_seed(tmp_path: Path, *, meta: str = "", user: str = "") -> str:
    (tmp_path / "meta-data").write_text(meta)
    (tmp_path / "user-data").write_text(user)
    files = (tmp_path / "meta-data", tmp_path / "user-data")
    run = subprocess.run(
        ["awk", "-f", AWK, *files], capture_output=True, text=True, timeout=10, check=True
    )
    return run.stdout


def test_the_host_name_may_be_quoted(tmp_path: Path) -> None:
    meta = 'instance-id: "1"\nlocal-hostname: "web-1"\n'
    assert read_seed(tmp_path, meta=meta) == "seed_hostname 'web-1'\n"


def test_mounts_may_be_in_brackets_or_one_item_a_line_and_in_either_file(tmp_path: Path) -> None:
    meta = 'mounts:\n- ["a", "/mnt/a", "virtiofs", "rw,nofail", "0", "0"]\n'
    user = (
        "#cloud-config\nmounts:\n  - [ b, '/mnt/b, it''s', 9p,\n      \"trans=virtio\" ]\n"
        "  - - c\n    - /mnt/c\n    - ext4\nother:\n  - [d, /mnt/d, x, y]\n"
    )
    assert read_seed(tmp_path, meta=meta, user=user).splitlines() == [
        "seed_mount 'a' '/mnt/a' 'virtiofs' 'rw,nofail'",
        "seed_mount 'b' '/mnt/b, it'\\''s' '9p' 'trans=virtio'",
        "seed_mount 'c' '/mnt/c' 'ext4' ''",
    ]


def run_quoted(seed: str) -> list[str]:
    """What a shell makes of the seed_run calls: their one argument each."""
    script = "seed_run() { printf '%s\\0' \"$1\"; }\n" + seed
    run = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=10)
    return run.stdout.split("\0")[:-1]


def test_commands_reach_the_shell_as_they_were_written(tmp_path: Path) -> None:
    user = (
        "runcmd:\n- echo \"it's\" $HOME\n- 'echo ''b'''\n- \"echo \\\"c\\\" \\\\\"\n"
        "- [sh, -c, \"echo 'd', e\"]\n# a comment\n- touch /f  # and another\n"
    )
    assert run_quoted(read_seed(tmp_path, user=user)) == [
        'echo "it\'s" $HOME',
        "echo 'b'",
        'echo "c" \\',
        "'sh' '-c' 'echo '\\''d'\\'', e'",
        "touch /f",
    ]


def test_the_password_is_found_under_users_and_a_hash_is_known_as_one(tmp_path: Path) -> None:
    plain = 'users:\n- default\n- name: "lume"\n  plain_text_passwd: "a: b"\npassword: later\n'
    assert read_seed(tmp_path, user=plain) == "seed_password 'a: b'\n"
    hashed = "users:\n  - name: lume\n    passwd: $6$salt$hash\n"
    assert read_seed(tmp_path, user=hashed) == "seed_password '$6$salt$hash' -e\n"


def test_what_is_not_understood_is_passed_over(tmp_path: Path) -> None:
    user = "#cloud-config\nwrite_files:\n- content: |\n    runcmd\n    - rm\nbootcmd:\n- y\n"
    assert read_seed(tmp_path, user=user) == ""
