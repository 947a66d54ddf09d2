"""What a Debian guest is built from: names, packages, commands and mirrors, checked before."""

from __future__ import annotations

import pytest

from lumed.errors import InvalidField
from lumed.images.build import Mirrors, debian_guest, plan_recipe, plan_sources


def test_a_recipe_keeps_packages_once_and_commands_in_order() -> None:
    recipe = plan_recipe("debian:13", ["tree", "git", "tree"], ["b", "a", "b"])
    assert recipe.suite == "trixie"
    assert recipe.packages == ("tree", "git")
    assert recipe.commands == ("b", "a", "b")


def test_each_recipe_is_an_image_of_its_own() -> None:
    recipes = [
        plan_recipe("debian:12"),
        plan_recipe("debian:13"),
        plan_recipe("debian:12", ["tree"]),
        plan_recipe("debian:12", [], ["true"]),
        plan_recipe("debian:12", [], ["true", "true"]),
    ]
    assert len({debian_guest(recipe).version for recipe in recipes}) == len(recipes)
    assert debian_guest(recipes[0]).version == debian_guest(plan_recipe("debian:12")).version


@pytest.mark.parametrize(
    ("arguments", "field", "reason"),
    [
        (("debian:11",), "image", "debian:12, debian:13"),
        (("ubuntu:24.04",), "image", "debian:12, debian:13"),
        (("debian:12", ["Tree"]), "packages", "'Tree'"),
        (("debian:12", ["a b"]), "packages", "no package name"),
        (("debian:12", ["--force"]), "packages", "no package name"),
        (("debian:12", ["./local.deb"]), "packages", "no package name"),
        (("debian:12", ["aa,bb"]), "packages", "no package name"),
        (("debian:12", [f"p{n:06}" for n in range(20_000)]), "packages", "too long"),
        (("debian:12", [], ["a\0b"]), "run", "NUL"),
        (("debian:12", [], ["x" * 200_000]), "run", "too long"),
    ],
)
def test_what_cannot_be_built_is_told_by_field(
    arguments: tuple[object, ...], field: str, reason: str
) -> None:
    with pytest.raises(InvalidField, match=reason) as caught:
        plan_recipe(*arguments)  # type: ignore[arg-type]
    assert field in caught.value.fields


def test_the_builder_checks_signatures_and_the_guest_gets_mirrors_it_can_reach() -> None:
    mirrors = Mirrors("http://127.0.0.1:9999/debian", "https://mirror.test/security")
    build = plan_sources("bookworm", mirrors).splitlines()
    assert len(build) == 3
    assert all(line.startswith("deb [signed-by=/usr/share/keyrings/") for line in build)
    assert build[0].endswith("] http://127.0.0.1:9999/debian bookworm main")
    guest = plan_sources("bookworm", mirrors, in_guest=True).splitlines()
    assert guest == [
        "deb http://deb.debian.org/debian bookworm main",
        "deb http://deb.debian.org/debian bookworm-updates main",
        "deb https://mirror.test/security bookworm-security main",
    ]
